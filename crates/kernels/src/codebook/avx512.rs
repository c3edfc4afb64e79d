//! AVX-512: tables in registers, permutes by bytes.

use super::{Codebook, UNIT, entries};
use crate::gemv::Operand;
use crate::gemv::WIDE;
use crate::x86::{prefetch, sums512};
use std::arch::x86_64::*;

/// How far ahead of its reads each of several rows is prefetched, in bytes.
const AHEAD: usize = 1024;

/// Rows `first ..` of `w` with `x`, as many as `y` has room for. The CPU must have [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
pub(super) fn compute(w: &Codebook, first: usize, x: &Operand, y: &mut [f32]) {
    macro_rules! drive {
        ($bits:literal) => {{
            let stretch = y.len() / WIDE;
            for i in 0..stretch {
                let rows: [_; WIDE] = std::array::from_fn(|k| first + i + k * stretch);
                for (k, sum) in dot::<WIDE, $bits>(w, rows, x).into_iter().enumerate() {
                    y[i + k * stretch] = sum;
                }
            }
            for i in stretch * WIDE..y.len() {
                [y[i]] = dot::<1, $bits>(w, [first + i], x);
            }
        }};
    }
    match w.bits() {
        2 => drive!(2),
        3 => drive!(3),
        _ => drive!(4),
    }
}

/// 128 columns: those of the low nibbles of Q4_0, those of the high ones, and what sums of weights plus 128 start from.
#[derive(Clone, Copy)]
struct Shared {
    first: __m512i,
    second: __m512i,
    bias: __m512i,
    d: __m512,
}

impl Shared {
    /// Arrays, not slices to be checked: the products keep their sums in registers only if this is part of their loop.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(q: &[i8; UNIT], bias: &[i32; 16], d: &[f32; 16]) -> Self {
        // SAFETY: the arrays have 128, 64 and 64 bytes.
        unsafe {
            Self {
                first: _mm512_loadu_si512(q.as_ptr().cast()),
                second: _mm512_loadu_si512(q.as_ptr().add(64).cast()),
                // Stored for an offset of 8.
                bias: _mm512_slli_epi32::<4>(_mm512_loadu_si512(bias.as_ptr().cast())),
                d: _mm512_loadu_ps(d.as_ptr()),
            }
        }
    }
}

/// 64 codes, each in a byte (whose upper bits hold anything with less than 8 bits), from 16 `BITS` bytes.
///
/// # Safety
/// `at` begins 64 bytes that can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn codes<const BITS: usize>(at: *const u8) -> __m512i {
    // SAFETY: by contract.
    unsafe {
        match BITS {
            2 => {
                let four = _mm512_cvtepu32_epi64(_mm256_loadu_si256(at.cast()));
                _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1c18_1410_0c08_0400), four)
            }
            3 => {
                let six = _mm512_permutexvar_epi8(sixes(), _mm512_loadu_si512(at.cast()));
                _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2a24_1e18_120c_0600), six)
            }
            _ => _mm512_loadu_si512(at.cast()),
        }
    }
}

/// Six bytes into each of eight lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn sixes() -> __m512i {
    const PLACES: [u8; 64] = {
        let mut all = [0; 64];
        let mut i = 0;
        while i < 64 {
            all[i] = (i / 8 * 6 + i % 8) as u8 % 64;
            i += 1;
        }
        all
    };
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) }
}

/// The first and the second numbers of 64 entries, plus 128.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
fn look_up<const BITS: usize>(table: &[u8], codes: __m512i) -> [__m512i; 2] {
    let size = entries(BITS);
    assert!(table.len() == 2 * size);
    // SAFETY: every read below ends inside the table, whose length was checked.
    unsafe {
        let at = |i: usize| table.as_ptr().add(i);
        match BITS {
            // Four copies of sixteen entries: the upper bits of a code do not matter.
            2 => {
                [0, size].map(|i| _mm512_permutexvar_epi8(codes, _mm512_broadcast_i32x4(_mm_loadu_si128(at(i).cast()))))
            }
            3 => [0, size].map(|i| _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(at(i).cast()))),
            _ => {
                let upper = _mm512_movepi8_mask(codes);
                [0, size].map(|i| {
                    let part = |k: usize| _mm512_loadu_si512(at(i + 64 * k).cast());
                    let low = _mm512_permutex2var_epi8(part(0), codes, part(1));
                    let high = _mm512_permutex2var_epi8(part(2), codes, part(3));
                    _mm512_mask_blend_epi8(upper, low, high)
                })
            }
        }
    }
}

/// Not inlined: the forms for several widths in one function leave none enough registers.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn dot<const R: usize, const BITS: usize>(w: &Codebook, rows: [usize; R], x: &Operand) -> [f32; R] {
    let x = x.q4_0();
    let (q, bias, d) = (x.q.as_chunks::<UNIT>().0, x.bias.as_chunks::<16>().0, x.d4.as_chunks::<16>().0);
    let streams = rows.map(|r| w.row(r).as_ptr());
    let books = rows.map(|r| w.first_book(r));
    let (units, per_span) = (w.cols().div_ceil(UNIT), w.span / UNIT);
    let mut acc = [_mm512_setzero_ps(); R];
    for span in 0..w.spans() {
        let tables = books.map(|b| w.table(b + span));
        let mut sums = [_mm512_setzero_ps(); R];
        for u in span * per_span..units.min((span + 1) * per_span) {
            let x = Shared::load(&q[u], &bias[u], &d[u]);
            for r in 0..R {
                let at = streams[r].wrapping_add(u * 16 * BITS);
                prefetch(at.wrapping_add(AHEAD));
                // SAFETY: a unit begins inside its row, and behind the last row there are as many zeros as a register.
                let codes = unsafe { codes::<BITS>(at) };
                let [first, second] = look_up::<BITS>(tables[r], codes);
                let t = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(x.bias, first, x.first), second, x.second);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), x.d, sums[r]);
            }
        }
        for r in 0..R {
            acc[r] = _mm512_fmadd_ps(sums[r], _mm512_set1_ps(w.scale(books[r] + span)), acc[r]);
        }
    }
    sums512(acc)
}

/// Columns `start ..` of row `row` in BF16, as many as `out` takes: whole units, from the start of one on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
pub(super) fn unpack(w: &Codebook, row: usize, start: usize, out: &mut [u8]) {
    match w.bits() {
        2 => unpack_units::<2>(w, row, start, out),
        3 => unpack_units::<3>(w, row, start, out),
        _ => unpack_units::<4>(w, row, start, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
fn unpack_units<const BITS: usize>(w: &Codebook, row: usize, start: usize, out: &mut [u8]) {
    let (stream, first) = (w.row(row), w.first_book(row));
    for (i, out) in out.as_chunks_mut::<{ 2 * UNIT }>().0.iter_mut().enumerate() {
        let u = start / UNIT + i;
        let book = first + u * UNIT / w.span;
        let scale = _mm512_set1_ps(w.scale(book));
        let unit: &[u8; 64] = stream[u * 16 * BITS..].first_chunk().expect("zeros behind the last row");
        // SAFETY: the array has 64 bytes.
        let codes = unsafe { codes::<BITS>(unit.as_ptr()) };
        for (half, numbers) in look_up::<BITS>(w.table(book), codes).into_iter().enumerate() {
            let signed = _mm512_xor_si512(numbers, _mm512_set1_epi8(-128));
            let quarters = [
                _mm512_castsi512_si128(signed),
                _mm512_extracti32x4_epi32::<1>(signed),
                _mm512_extracti32x4_epi32::<2>(signed),
                _mm512_extracti32x4_epi32::<3>(signed),
            ];
            for (b, quarter) in quarters.into_iter().enumerate() {
                let floats = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter)), scale);
                // Seven bits times a power of two: the lower half is zero.
                let halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_castps_si512(floats)));
                let to: &mut [u8; 32] = out[64 * b + 32 * half..].first_chunk_mut().expect("four blocks of 64 bytes");
                // SAFETY: the array has 32 bytes.
                unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), halves) };
            }
        }
    }
}
