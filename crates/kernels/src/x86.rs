//! What the x86 decode kernels share: prefetching.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// How far ahead of the reads rows are prefetched at most, in bytes over all rows side by side: long enough to cover
/// the latency of memory, short against the first cache. (Measured: 4 KiB to 16 KiB differ little.)
const AHEAD: usize = 8192;

/// Rows computed side by side, and those that come next: what is read soon is fetched evenly, a few lines per step,
/// because bursts stall on the limited number of outstanding misses.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a, const R: usize> {
    rows: [&'a [u8]; R],
    next: [&'a [u8]; R],
}

impl<'a, const R: usize> Ahead<'a, R> {
    /// `next` may hold anything: it is only fetched.
    #[inline(always)]
    pub(crate) fn new(rows: [&'a [u8]; R], next: [&'a [u8]; R]) -> Self {
        Self { rows, next }
    }

    /// The rows to compute; all have the same length.
    #[inline(always)]
    pub(crate) fn rows(&self) -> [&'a [u8]; R] {
        self.rows
    }

    /// Fetches the `bytes` bytes that will be read some time after those at offset `at` of each row.
    #[inline(always)]
    pub(crate) fn fetch(&self, at: usize, bytes: usize) {
        let len = self.rows[0].len();
        let at = at + len.min(AHEAD / R);
        let (rows, at) = if at < len { (&self.rows, at) } else { (&self.next, at - len) };
        for row in rows {
            for line in (0..bytes).step_by(64) {
                prefetch(row.as_ptr().wrapping_add(at + line));
            }
        }
    }
}

/// Fetches the line that holds `p`.
#[inline(always)]
pub(crate) fn prefetch(p: *const u8) {
    // SAFETY: a prefetch reads nothing and cannot fault, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
}
