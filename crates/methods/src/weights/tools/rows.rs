//! Work on the rows of a matrix in parallel.

use lacuna_kernels::Pool;
use std::sync::{Mutex, PoisonError};

/// Numbers that one task works on at least.
const GRAIN: usize = 1 << 14;

/// Runs `f(row, numbers)` for every row of `matrix`; the result does not depend on the threads.
pub fn each<T: Send>(pool: &Pool, matrix: &mut [T], cols: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let cols = cols.max(1);
    let mut rows: Vec<&mut [T]> = matrix.chunks_mut(cols).collect();
    units(pool, &mut rows, (GRAIN / cols).max(1), |i, row| f(i, row));
}

/// Runs `f(index, item)` for every item, `grain` of them in one task.
pub fn units<T: Send>(pool: &Pool, items: &mut [T], grain: usize, f: impl Fn(usize, &mut T) + Sync) {
    let parts: Vec<Mutex<&mut [T]>> = items.chunks_mut(grain).map(Mutex::new).collect();
    pool.run(parts.len(), &|_, part| {
        // Each part is taken by one task, so the lock is never waited for.
        let mut items = parts[part].lock().unwrap_or_else(PoisonError::into_inner);
        for (i, item) in items.iter_mut().enumerate() {
            f(part * grain + i, item);
        }
    });
}
