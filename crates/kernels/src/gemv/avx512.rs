//! Dot products with AVX-512 (VNNI for block formats), several rows side by side to share the loads of the vector.
//!
//! Block formats are read as stored, in groups whose size is known at compile time; the last, partial group of a row
//! is copied into a zeroed one (zero blocks add nothing). VNNI multiplies unsigned with signed bytes, so codes enter
//! with their offset (128, 8 or 32), which the accumulator takes back from the start: see `bias` in [`Operand`].

use super::operand::{Int8, Operand};
use super::scalar::q4k_scales;
use super::{Rows, WIDE};
use crate::Format;
use crate::format::last_group;
use crate::x86::{Ahead, pair_sums512, sums512};
use std::arch::x86_64::*;

/// Computes the rows of a claim, four at a time and far apart: hardware prefetchers follow one stream per page, so rows
/// of adjacent memory would leave them one stream where they could follow four. The CPU must have [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
pub(super) fn compute(rows: &Rows, x: &Operand, y: &mut [f32]) {
    macro_rules! drive {
        ($dot:ident) => {{
            let stretch = y.len() / WIDE;
            for i in 0..stretch {
                for (k, sum) in $dot(rows.far::<WIDE>(i, stretch), x).into_iter().enumerate() {
                    y[i + k * stretch] = sum;
                }
            }
            for i in stretch * WIDE..y.len() {
                [y[i]] = $dot(rows.far(i, 0), x);
            }
        }};
    }
    match rows.w.format() {
        Format::F32 => drive!(dot_f32),
        Format::F16 => drive!(dot_f16),
        Format::Bf16 => drive!(dot_bf16),
        Format::Q8_0 => drive!(dot_q8_0),
        Format::Q4_0 => drive!(dot_q4_0),
        Format::Q4K => drive!(dot_q4k),
        Format::Q6K => drive!(dot_q6k),
    }
}

/// 64 bytes from `AT` on.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn at512<const AT: usize, const N: usize>(bytes: &[u8; N]) -> __m512i {
    const { assert!(AT + 64 <= N) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().add(AT).cast()) }
}

/// 32 bytes from `AT` on.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn at256<const AT: usize, const N: usize>(bytes: &[u8; N]) -> __m256i {
    const { assert!(AT + 32 <= N) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().add(AT).cast()) }
}

/// 32 bytes from `A` on, then 32 bytes from `B` on.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn pair<const A: usize, const B: usize, const N: usize>(bytes: &[u8; N]) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(at256::<A, N>(bytes)), at256::<B, N>(bytes))
}

/// 64 codes of the vector from `AT` on.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn codes<const AT: usize, const N: usize>(q: &[i8; N]) -> __m512i {
    const { assert!(AT + 64 <= N) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { _mm512_loadu_si512(q.as_ptr().add(AT).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn lanes<const AT: usize, const N: usize>(v: &[i32; N]) -> __m512i {
    const { assert!(AT + 16 <= N) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { _mm512_loadu_si512(v.as_ptr().add(AT).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn floats<const AT: usize, const N: usize>(v: &[f32; N]) -> __m512 {
    const { assert!(AT + 16 <= N) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { _mm512_loadu_ps(v.as_ptr().add(AT)) }
}

/// Runs `$body` for group `$g` of every row: whole groups of `$bytes` bytes in place, the partial last one as a
/// zero-padded copy.
macro_rules! for_groups {
    ($rows:ident, $bytes:literal, |$g:ident, $blocks:ident| $body:block) => {{
        let rows = $rows.rows();
        let whole = $rows.groups::<$bytes>();
        let groups = whole[0].len();
        for $g in 0..groups {
            let $blocks = whole.map(|w| &w[$g]);
            $rows.fetch($g * $bytes, $bytes);
            $body
        }
        if groups * $bytes < rows[0].len() {
            let last = rows.map(|row| last_group::<$bytes>(row));
            let ($g, $blocks) = (groups, last.each_ref());
            $body
        }
    }};
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_f32<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let x = x.plain().as_chunks::<32>().0;
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for_groups!(rows, 128, |g, blocks| {
        let (x0, x1) = (floats::<0, 32>(&x[g]), floats::<16, 32>(&x[g]));
        for r in 0..R {
            acc[r][0] = _mm512_fmadd_ps(_mm512_castsi512_ps(at512::<0, 128>(blocks[r])), x0, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_castsi512_ps(at512::<64, 128>(blocks[r])), x1, acc[r][1]);
        }
    });
    pair_sums512(acc)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_f16<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let x = x.plain().as_chunks::<32>().0;
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for_groups!(rows, 64, |g, blocks| {
        let (x0, x1) = (floats::<0, 32>(&x[g]), floats::<16, 32>(&x[g]));
        for r in 0..R {
            let (w0, w1) = (at256::<0, 64>(blocks[r]), at256::<32, 64>(blocks[r]));
            acc[r][0] = _mm512_fmadd_ps(_mm512_cvtph_ps(w0), x0, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_cvtph_ps(w1), x1, acc[r][1]);
        }
    });
    pair_sums512(acc)
}

/// A pair of bf16 in 32 bits widens by a shift (even) and by a mask (odd); the vector is split the same way.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_bf16<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let x = x.split().as_chunks::<32>().0;
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for_groups!(rows, 64, |g, blocks| {
        let (even, odd) = (floats::<0, 32>(&x[g]), floats::<16, 32>(&x[g]));
        for r in 0..R {
            let w = at512::<0, 64>(blocks[r]);
            let (w0, w1) = (_mm512_slli_epi32::<16>(w), _mm512_and_si512(w, upper));
            acc[r][0] = _mm512_fmadd_ps(_mm512_castsi512_ps(w0), even, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_castsi512_ps(w1), odd, acc[r][1]);
        }
    });
    pair_sums512(acc)
}

/// Four blocks (136 bytes) at a time; each register holds two blocks, eight lanes of four numbers each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_q8_0<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let Int8 { q, d8, bias, .. } = x.int8();
    let (q, d8, bias) = (q.as_chunks::<128>().0, d8.as_chunks::<32>().0, bias.as_chunks::<32>().0);
    let offset = _mm512_set1_epi8(-128);
    let pick = words([0, 17], 8);
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for_groups!(rows, 136, |g, blocks| {
        let (q0, q1) = (codes::<0, 128>(&q[g]), codes::<64, 128>(&q[g]));
        let (b0, b1) = (lanes::<0, 32>(&bias[g]), lanes::<16, 32>(&bias[g]));
        let (d0, d1) = (floats::<0, 32>(&d8[g]), floats::<16, 32>(&d8[g]));
        for r in 0..R {
            let b = blocks[r];
            let (w0, w1) = (pair::<2, 36, 136>(b), pair::<70, 104, 136>(b));
            let t0 = _mm512_dpbusd_epi32(b0, _mm512_xor_si512(w0, offset), q0);
            let t1 = _mm512_dpbusd_epi32(b1, _mm512_xor_si512(w1, offset), q1);
            let s0 = _mm512_mul_ps(scales(at512::<0, 136>(b), pick), d0);
            let s1 = _mm512_mul_ps(scales(at512::<68, 136>(b), pick), d1);
            acc[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t0), s0, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t1), s1, acc[r][1]);
        }
    });
    pair_sums512(acc)
}

/// Sixteen word numbers, each of `from` repeated `times` times.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn words<const N: usize>(from: [i16; N], times: usize) -> __m512i {
    let mut all = [0_i16; 32];
    for (i, w) in all[..N * times].iter_mut().enumerate() {
        *w = from[i / times];
    }
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(all.as_ptr().cast()) }
}

/// Sixteen of the f16 in `bytes`, chosen by `pick`, widened.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn scales(bytes: __m512i, pick: __m512i) -> __m512 {
    _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(pick, bytes)))
}

/// The upper nibble of every byte, shifted down: an 8x8 bit matrix that moves bits 4-7 to 0-3.
#[inline]
#[target_feature(enable = "avx512f,gfni")]
pub(super) fn high_nibbles(bytes: __m512i) -> __m512i {
    // Byte 7 - i of the matrix selects the bits that make result bit i.
    let matrix = _mm512_set1_epi64(0x1020_4080_0000_0000);
    _mm512_gf2p8affine_epi64_epi8::<0>(bytes, matrix)
}

/// Four blocks (72 bytes) at a time: their 4 x 16 code bytes gathered into one register, four lanes per block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_q4_0<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let x = x.q4_0();
    let (q, d4, bias) = (x.q.as_chunks::<128>().0, x.d4.as_chunks::<16>().0, x.bias.as_chunks::<16>().0);
    let low = _mm512_set1_epi8(15);
    let pick = words([0, 9, 18, 27], 4);
    let mut gather = [0_i8; 64];
    for (i, at) in gather.iter_mut().enumerate() {
        *at = (i / 16 * 18 + 2 + i % 16) as i8 & 63;
    }
    let gather = codes::<0, 64>(&gather);
    let mut acc = [_mm512_setzero_ps(); R];
    for_groups!(rows, 72, |g, blocks| {
        let (q0, q1) = (codes::<0, 128>(&q[g]), codes::<64, 128>(&q[g]));
        let (start, d) = (lanes::<0, 16>(&bias[g]), floats::<0, 16>(&d4[g]));
        for r in 0..R {
            let first = at512::<0, 72>(blocks[r]);
            // Blocks 0 to 2 come from the first load; block 3 already sits at its place in the second.
            let w = _mm512_mask_permutexvar_epi8(at512::<8, 72>(blocks[r]), 0xffff_ffff_ffff, gather, first);
            let t = _mm512_dpbusd_epi32(start, _mm512_and_si512(w, low), q0);
            let t = _mm512_dpbusd_epi32(t, high_nibbles(w), q1);
            acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), _mm512_mul_ps(scales(first, pick), d), acc[r]);
        }
    });
    sums512(acc)
}

/// An f16 in all lanes. (The plain conversion asks on every call what the CPU has, and brings along what it does without.)
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn half(bytes: [u8; 2]) -> __m512 {
    _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(u16::from_le_bytes(bytes).into())))
}

/// One super-block at a time; each register holds two sub-blocks of 32, eight lanes each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_q4k<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let Int8 { q, d, sum, .. } = x.int8();
    let (q, d, sum) = (q.as_chunks::<256>().0, d.as_chunks::<8>().0, sum.as_chunks::<8>().0);
    let low = _mm512_set1_epi8(15);
    let spread: [__m512i; 4] = [[0, 2], [1, 3], [4, 6], [5, 7]].map(|[a, b]| {
        let (a, b) = (_mm256_set1_epi32(a), _mm256_set1_epi32(b));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b)
    });
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    let mut minima = [_mm256_setzero_ps(); R];
    for_groups!(rows, 144, |g, blocks| {
        let q = as_bytes(&q[g]);
        let qs = [pair::<0, 64, 256>(q), pair::<32, 96, 256>(q), pair::<128, 192, 256>(q), pair::<160, 224, 256>(q)];
        // SAFETY: both arrays have eight numbers.
        let (d, sum) = unsafe { (_mm256_loadu_ps(d[g].as_ptr()), _mm256_loadu_ps(sum[g].as_ptr())) };
        for r in 0..R {
            let b = blocks[r];
            let (sc, mn) = q4k_scales(&b[4..16]);
            let both = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from_le_bytes([b[0], b[1], b[2], b[3]])));
            let wd = _mm256_broadcastss_ps(both);
            let wmin = _mm256_broadcastss_ps(_mm_movehdup_ps(both));
            let sc = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(sc as i64)));
            let mn = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(mn as i64)));
            let scale = _mm512_castps256_ps512(_mm256_mul_ps(_mm256_mul_ps(sc, wd), d));
            minima[r] = _mm256_fmadd_ps(_mm256_mul_ps(mn, wmin), sum, minima[r]);
            let (w0, w1) = (at512::<16, 144>(b), at512::<80, 144>(b));
            let w = [_mm512_and_si512(w0, low), high_nibbles(w0), _mm512_and_si512(w1, low), high_nibbles(w1)];
            for k in 0..4 {
                let t = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w[k], qs[k]));
                acc[r][k % 2] = _mm512_fmadd_ps(t, _mm512_permutexvar_ps(spread[k], scale), acc[r][k % 2]);
            }
        }
    });
    let mut out = pair_sums512(acc);
    for (out, minima) in out.iter_mut().zip(minima) {
        *out -= _mm512_reduce_add_ps(_mm512_zextps256_ps512(minima));
    }
    out
}

pub(super) fn as_bytes(q: &[i8; 256]) -> &[u8; 256] {
    // SAFETY: i8 and u8 have the same size and alignment, and every bit pattern is valid for both.
    unsafe { &*std::ptr::from_ref(q).cast() }
}

/// One super-block at a time; each register holds 64 numbers, four lanes for each of the four scales.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn dot_q6k<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let Int8 { q, d, bias, .. } = x.int8();
    let (q, d, bias) = (q.as_chunks::<256>().0, d.as_chunks::<8>().0, bias.as_chunks::<64>().0);
    let twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    let quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    let spread: [__m512i; 4] = [0, 4, 8, 12].map(|k| _mm512_add_epi32(quarter, _mm512_set1_epi32(k)));
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for_groups!(rows, 210, |g, blocks| {
        let (q, b) = (&q[g], &bias[g]);
        let qs = [codes::<0, 256>(q), codes::<64, 256>(q), codes::<128, 256>(q), codes::<192, 256>(q)];
        // The stored bias is for an offset of 128; here it is 32.
        let start = [lanes::<0, 64>(b), lanes::<16, 64>(b), lanes::<32, 64>(b), lanes::<48, 64>(b)];
        let start = start.map(|b| _mm512_srai_epi32::<2>(b));
        // SAFETY: the array has eight numbers.
        let d = _mm512_castps256_ps512(unsafe { _mm256_loadu_ps(d[g].as_ptr()) });
        let d = _mm512_permutexvar_ps(twice, d);
        for r in 0..R {
            let b = blocks[r];
            // SAFETY: bytes 192 to 207 lie inside the 210.
            let scale = unsafe { _mm_loadu_si128(b.as_ptr().add(192).cast()) };
            let scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scale));
            let wd = half([b[208], b[209]]);
            let scale = _mm512_mul_ps(_mm512_mul_ps(scale, wd), d);
            let (first, second) = (
                q6k_half(at512::<0, 210>(b), at256::<128, 210>(b)),
                q6k_half(at512::<64, 210>(b), at256::<160, 210>(b)),
            );
            let w = [first[0], first[1], second[0], second[1]];
            for k in 0..4 {
                let t = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start[k], w[k], qs[k]));
                acc[r][k % 2] = _mm512_fmadd_ps(t, _mm512_permutexvar_ps(spread[k], scale), acc[r][k % 2]);
            }
        }
    });
    pair_sums512(acc)
}

/// The 128 codes (0 to 63) of one half of a Q6_K super-block, in natural order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,gfni")]
pub(super) fn q6k_half(ql: __m512i, qh: __m256i) -> [__m512i; 2] {
    let qh = _mm512_broadcast_i64x4(qh);
    let halves = |a, b| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm256_set1_epi16(a)), _mm256_set1_epi16(b));
    let bits = _mm512_set1_epi8(0x30);
    // Bits 0-1 (first 32 numbers) and 2-3 (next 32) move up to 4-5; bits 4-5 stay and 6-7 move down for the others.
    let (up, down) = (_mm512_sllv_epi16(qh, halves(4, 2)), _mm512_srlv_epi16(qh, halves(0, 2)));
    // a | (b & c)
    const MERGE: i32 = 0xf8;
    [
        _mm512_ternarylogic_epi32::<MERGE>(_mm512_and_si512(ql, _mm512_set1_epi8(15)), up, bits),
        _mm512_ternarylogic_epi32::<MERGE>(high_nibbles(ql), down, bits),
    ]
}
