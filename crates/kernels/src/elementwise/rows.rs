//! The same function on every row of a matrix, shared among the threads of a pool.

use std::sync::Mutex;

use crate::pool::Pool;

/// Numbers handled by one chunk of the pool: large against the cost of claiming a chunk.
const CHUNK: usize = 16 * 1024;

/// Calls `f(row of x, row of out)` for every row of `width` numbers.
///
/// # Panics
/// If `x` and `out` are not the same whole number of rows.
pub(super) fn map(pool: &Pool, width: usize, x: &[f32], out: &mut [f32], f: impl Fn(&[f32], &mut [f32]) + Sync) {
    assert!(x.len() == out.len() && width > 0 && x.len().is_multiple_of(width), "rows of {width}");
    let step = (CHUNK / width).max(1) * width;
    // Each chunk is taken exactly once, so the lock is never waited for.
    let parts: Vec<_> = x.chunks(step).zip(out.chunks_mut(step)).map(|part| Mutex::new(Some(part))).collect();
    pool.run(parts.len(), &|_, chunk| {
        let part = parts[chunk].lock().ok().and_then(|mut part| part.take());
        if let Some((x, out)) = part {
            x.chunks(width).zip(out.chunks_mut(width)).for_each(|(x, out)| f(x, out));
        }
    });
}
