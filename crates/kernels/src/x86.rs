//! What the x86 decode kernels share: prefetching, sums of lanes.

use std::arch::x86_64::*;

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

    /// The rows in whole groups of `N` bytes.
    #[inline(always)]
    pub(crate) fn groups<const N: usize>(&self) -> [&'a [[u8; N]]; R] {
        self.rows.map(|row| row.as_chunks().0)
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

// A closure has the instruction set of the function that it is in, and `map` of arrays has none, so that the one is not inlined
// into the other, and what is in registers goes through memory. Hence loops in what follows and in kernels; and functions
// without an instruction set, always inlined, where closures are wanted.

/// The sum of the lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn sum256(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

/// The sum of the lanes of each.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn sums256<const R: usize>(acc: [__m256; R]) -> [f32; R] {
    let mut out = [0.0; R];
    for r in 0..R {
        out[r] = sum256(acc[r]);
    }
    out
}

/// The sum of the lanes of each pair.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn pair_sums256<const R: usize>(acc: [[__m256; 2]; R]) -> [f32; R] {
    let mut out = [0.0; R];
    for r in 0..R {
        out[r] = sum256(_mm256_add_ps(acc[r][0], acc[r][1]));
    }
    out
}

/// The sum of the lanes of each.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn sums512<const R: usize>(acc: [__m512; R]) -> [f32; R] {
    let mut out = [0.0; R];
    for r in 0..R {
        out[r] = _mm512_reduce_add_ps(acc[r]);
    }
    out
}

/// The sum of the lanes of each pair.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn pair_sums512<const R: usize>(acc: [[__m512; 2]; R]) -> [f32; R] {
    let mut out = [0.0; R];
    for r in 0..R {
        out[r] = _mm512_reduce_add_ps(_mm512_add_ps(acc[r][0], acc[r][1]));
    }
    out
}

/// Fetches the line that holds `p`.
#[inline(always)]
pub(crate) fn prefetch(p: *const u8) {
    // SAFETY: a prefetch reads nothing and cannot fault, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
}
