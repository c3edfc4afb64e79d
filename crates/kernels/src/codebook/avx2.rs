//! AVX2: tables of sixteen bytes in both halves of a register, the first numbers of pairs below, the second above, so that a
//! block of 32 columns comes out in its natural order.

use super::{BLOCK, Codebook, entries};
use crate::gemv::Operand;
use std::arch::x86_64::*;

/// Rows `first ..` of `w` with `x`, as many as `y` has room for. The CPU must have [`crate::Isa::Avx2`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn compute(w: &Codebook, first: usize, x: &Operand, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        *y = match w.bits() {
            2 => dot::<2>(w, first + i, x),
            3 => dot::<3>(w, first + i, x),
            _ => dot::<4>(w, first + i, x),
        };
    }
}

/// A book in the form that [`weights`] reads: sixteen entries in a register, first numbers below, second above.
#[derive(Clone, Copy)]
struct Table<'a> {
    parts: [__m256i; 4],
    bytes: &'a [u8],
}

impl<'a> Table<'a> {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new<const BITS: usize>(bytes: &'a [u8]) -> Self {
        let size = entries(BITS);
        assert!(bytes.len() == 2 * size);
        let part = |t: usize| {
            if BITS == 4 || 16 * t >= size {
                return _mm256_setzero_si256();
            }
            // SAFETY: both reads of 16 bytes end inside the table, whose length was checked.
            unsafe {
                let low = _mm_loadu_si128(bytes.as_ptr().add(16 * t).cast());
                let high = _mm_loadu_si128(bytes.as_ptr().add(size + 16 * t).cast());
                _mm256_xor_si256(_mm256_set_m128i(high, low), _mm256_set1_epi8(-128))
            }
        };
        Self { parts: [part(0), part(1), part(2), part(3)], bytes }
    }
}

/// The weights of a block of 32 columns from its sixteen codes.
#[inline]
#[target_feature(enable = "avx2")]
fn weights<const BITS: usize>(table: &Table<'_>, stream: &[u8; 16]) -> __m256i {
    if BITS == 4 {
        let mut both = [0_u8; 32];
        let (low, high) = table.bytes.split_at(256);
        for (j, code) in stream.iter().enumerate() {
            (both[j], both[16 + j]) = (low[usize::from(*code)], high[usize::from(*code)]);
        }
        // SAFETY: the array has 32 bytes.
        let v = unsafe { _mm256_loadu_si256(both.as_ptr().cast()) };
        return _mm256_xor_si256(v, _mm256_set1_epi8(-128));
    }
    // SAFETY: the array has 16 bytes.
    let bytes = unsafe { _mm_loadu_si128(stream.as_ptr().cast()) };
    if BITS == 2 {
        let wide = _mm_cvtepu8_epi16(bytes);
        let codes = _mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16::<4>(wide)), _mm_set1_epi8(15));
        return _mm256_shuffle_epi8(table.parts[0], _mm256_broadcastsi128_si256(codes));
    }
    let three = _mm_shuffle_epi8(bytes, _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0));
    let at = |v: __m128i, mask: i32| _mm_and_si128(v, _mm_set1_epi32(mask));
    let pair = |a, b| _mm_or_si128(a, b);
    let codes = pair(
        pair(at(three, 0x3f), at(_mm_slli_epi32::<2>(three), 0x3f00)),
        pair(at(_mm_slli_epi32::<4>(three), 0x3f_0000), at(_mm_slli_epi32::<6>(three), 0x3f00_0000)),
    );
    let codes = _mm256_broadcastsi128_si256(codes);
    let mut out = _mm256_setzero_si256();
    for (t, part) in table.parts.iter().enumerate() {
        // Codes of other parts get their highest bit set, for which a shuffle gives zero.
        let own = _mm256_xor_si256(codes, _mm256_set1_epi8(16 * t as i8));
        let own = _mm256_adds_epu8(own, _mm256_set1_epi8(0x70));
        out = _mm256_or_si256(out, _mm256_shuffle_epi8(*part, own));
    }
    out
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn dot<const BITS: usize>(w: &Codebook, row: usize, x: &Operand) -> f32 {
    let (stream, first, x) = (w.row(row), w.first_book(row), x.int8());
    let (blocks, per_span) = (w.cols().div_ceil(BLOCK), w.span / BLOCK);
    let ones = _mm256_set1_epi16(1);
    let mut acc = _mm256_setzero_ps();
    for span in 0..w.spans() {
        let table = Table::new::<BITS>(w.table(first + span));
        let mut sums = _mm256_setzero_ps();
        for b in span * per_span..blocks.min((span + 1) * per_span) {
            let block: &[u8; 16] = stream[b * 4 * BITS..].first_chunk().expect("zeros behind the last row");
            let q: &[i8; BLOCK] = x.q[b * BLOCK..].first_chunk().expect("vectors are padded to whole blocks");
            let weights = weights::<BITS>(&table, block);
            // SAFETY: the array has 32 bytes.
            let q = unsafe { _mm256_loadu_si256(q.as_ptr().cast()) };
            let pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(weights, weights), _mm256_sign_epi8(q, weights));
            let fours = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
            sums = _mm256_fmadd_ps(fours, _mm256_set1_ps(x.d[b]), sums);
        }
        acc = _mm256_fmadd_ps(sums, _mm256_set1_ps(w.scale(first + span)), acc);
    }
    let half = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps::<1>(acc));
    let half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps::<1>(half, half)))
}
