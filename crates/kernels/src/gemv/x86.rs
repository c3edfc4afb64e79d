//! What the x86 kernels share: prefetching and the last group of a row.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// How far ahead of the reads a row is prefetched, in bytes.
const AHEAD: usize = 1024;
/// How much of the next rows is prefetched before the current ones are computed, in bytes.
const HEAD_BYTES: usize = AHEAD;

/// Fetches what lies some lines behind each of the places. A prefetch of any address is allowed.
#[inline(always)]
pub(super) fn prefetch_ahead<const R: usize>(at: [*const u8; R]) {
    for p in at {
        prefetch(p.wrapping_add(AHEAD));
    }
}

/// Fetches the first lines of a row.
#[inline(always)]
pub(super) fn prefetch_head(row: &[u8]) {
    for at in (0..row.len().min(HEAD_BYTES)).step_by(64) {
        prefetch(row.as_ptr().wrapping_add(at));
    }
}

#[inline(always)]
fn prefetch(p: *const u8) {
    // SAFETY: a prefetch reads nothing and cannot fault, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
}

/// What remains of `row` after its whole groups of `BYTES`, padded with zeros.
#[inline(always)]
pub(super) fn last_group<const BYTES: usize>(row: &[u8]) -> [u8; BYTES] {
    let rest = row.as_chunks::<BYTES>().1;
    let mut group = [0; BYTES];
    group[..rest.len()].copy_from_slice(rest);
    group
}
