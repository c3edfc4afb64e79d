//! What the x86 decode kernels share: prefetching and the last group of a row.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// How far ahead of the reads a row is prefetched, in bytes.
const AHEAD: usize = 1024;
/// How much of the next rows is prefetched before the current ones are computed, in bytes.
const HEAD_BYTES: usize = AHEAD;

/// Fetches `BYTES` bytes that lie some lines behind each of the places. A prefetch of any address is allowed.
#[inline(always)]
pub(crate) fn prefetch_ahead<const R: usize, const BYTES: usize>(at: [&[u8; BYTES]; R]) {
    for group in at {
        for line in 0..BYTES.div_ceil(64) {
            prefetch(group.as_ptr().wrapping_add(AHEAD + line * 64));
        }
    }
}

/// Fetches the first lines of a row.
#[inline(always)]
pub(crate) fn prefetch_head(row: &[u8]) {
    for at in (0..row.len().min(HEAD_BYTES)).step_by(64) {
        prefetch(row.as_ptr().wrapping_add(at));
    }
}

/// Fetches the line that holds `p`.
#[inline(always)]
pub(crate) fn prefetch(p: *const u8) {
    // SAFETY: a prefetch reads nothing and cannot fault, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
}

/// What remains of `row` after its whole groups of `BYTES`, padded with zeros.
#[inline(always)]
pub(crate) fn last_group<const BYTES: usize>(row: &[u8]) -> [u8; BYTES] {
    let rest = row.as_chunks::<BYTES>().1;
    let mut group = [0; BYTES];
    group[..rest.len()].copy_from_slice(rest);
    group
}
