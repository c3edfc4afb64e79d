//! Work on the rows of an activation matrix, shared among the threads of a pool.

use lacuna_kernels::Pool;
use std::sync::Mutex;

/// Numbers handled by one chunk of the pool: large against the cost of claiming a chunk.
const CHUNK: usize = 16 * 1024;

/// Calls `f(row number, row)` for every row of `width` numbers; a single row stays on the calling thread.
pub(super) fn each(pool: &Pool, x: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let per_chunk = (CHUNK / width).max(1);
    if x.len() <= per_chunk * width {
        return x.chunks_exact_mut(width).enumerate().for_each(|(i, row)| f(i, row));
    }
    // Each chunk is taken exactly once, so the lock is never waited for.
    let parts: Vec<_> = x.chunks_mut(per_chunk * width).map(|part| Mutex::new(Some(part))).collect();
    pool.run(parts.len(), &|_, chunk| {
        if let Some(part) = parts[chunk].lock().ok().and_then(|mut p| p.take()) {
            part.chunks_exact_mut(width).enumerate().for_each(|(i, row)| f(chunk * per_chunk + i, row));
        }
    });
}

/// `x += y`.
pub(super) fn add(pool: &Pool, x: &mut [f32], y: &[f32], width: usize) {
    each(pool, x, width, |i, row| lacuna_kernels::elementwise::add(row, &y[i * width..(i + 1) * width]));
}

/// `x += factor * y`; with a factor of 1 the bits of [`add`].
pub(super) fn add_scaled(pool: &Pool, x: &mut [f32], y: &[f32], width: usize, factor: f32) {
    if factor == 1.0 {
        return add(pool, x, y, width);
    }
    each(pool, x, width, |i, row| {
        row.iter_mut().zip(&y[i * width..(i + 1) * width]).for_each(|(x, y)| *x += factor * y);
    });
}

/// Calls `f(row of a, row of b)` for every row of `width` numbers of both.
pub(super) fn pairs(
    pool: &Pool,
    a: &mut [f32],
    b: &mut [f32],
    width: usize,
    f: impl Fn(&mut [f32], &mut [f32]) + Sync,
) {
    let step = (CHUNK / width).max(1) * width;
    let run = |a: &mut [f32], b: &mut [f32]| {
        a.chunks_exact_mut(width).zip(b.chunks_exact_mut(width)).for_each(|(a, b)| f(a, b));
    };
    if a.len() <= step {
        return run(a, b);
    }
    let parts: Vec<_> = a.chunks_mut(step).zip(b.chunks_mut(step)).map(|part| Mutex::new(Some(part))).collect();
    pool.run(parts.len(), &|_, chunk| {
        if let Some((a, b)) = parts[chunk].lock().ok().and_then(|mut p| p.take()) {
            run(a, b);
        }
    });
}
