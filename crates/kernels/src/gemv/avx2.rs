//! Dot products with AVX2: several rows side by side, block formats through `maddubs` on exact 16-bit pair sums.

use super::Rows;
use super::operand::{BLOCK, Int8, Operand};
use super::scalar::q4k_scales;
use crate::Format;
use crate::format::last_group;
use crate::x86::{Ahead, pair_sums256, sum256, sums256};
use std::arch::x86_64::*;

/// Computes the rows of a claim, several at a time and far apart: hardware prefetchers follow one stream per page. The
/// formats that need most registers take two rows. The CPU must have [`crate::Isa::Avx2`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn compute(rows: &Rows, x: &Operand, y: &mut [f32]) {
    macro_rules! drive {
        ($dot:ident, $rows:literal) => {{
            let stretch = y.len() / $rows;
            for i in 0..stretch {
                for (k, sum) in $dot(rows.far::<$rows>(i, stretch), x).into_iter().enumerate() {
                    y[i + k * stretch] = sum;
                }
            }
            for i in stretch * $rows..y.len() {
                [y[i]] = $dot(rows.far(i, 0), x);
            }
        }};
    }
    match rows.w.format() {
        Format::F32 => drive!(dot_f32, 4),
        Format::F16 => drive!(dot_f16, 4),
        Format::Bf16 => drive!(dot_bf16, 4),
        Format::Q8_0 => drive!(dot_q8_0, 4),
        Format::Q4_0 => drive!(dot_q4_0, 4),
        Format::Q4K => drive!(dot_q4k, 2),
        Format::Q6K => drive!(dot_q6k, 2),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn at256<const AT: usize, const N: usize>(bytes: &[u8; N]) -> __m256i {
    const { assert!(AT + 32 <= N) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().add(AT).cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn at128<const AT: usize, const N: usize>(bytes: &[u8; N]) -> __m128i {
    const { assert!(AT + 16 <= N) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { _mm_loadu_si128(bytes.as_ptr().add(AT).cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn floats<const AT: usize, const N: usize>(v: &[f32; N]) -> __m256 {
    const { assert!(AT + 8 <= N) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { _mm256_loadu_ps(v.as_ptr().add(AT)) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn codes(q: &[i8; BLOCK]) -> __m256i {
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn lanes(v: &[i32; 8]) -> __m256i {
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn half(low: u8, high: u8) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes([low, high])))))
}

/// Runs `$body` for group `$g` of every row: whole groups of `$bytes` bytes in place, a partial last one as a
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
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_f32<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let x = x.plain().as_chunks::<32>().0;
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    for_groups!(rows, 128, |g, blocks| {
        let x = &x[g];
        let x = [floats::<0, 32>(x), floats::<8, 32>(x), floats::<16, 32>(x), floats::<24, 32>(x)];
        for (acc, b) in acc.iter_mut().zip(blocks) {
            let w = [at256::<0, 128>(b), at256::<32, 128>(b), at256::<64, 128>(b), at256::<96, 128>(b)];
            for k in 0..4 {
                acc[k % 2] = _mm256_fmadd_ps(_mm256_castsi256_ps(w[k]), x[k], acc[k % 2]);
            }
        }
    });
    pair_sums256(acc)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_f16<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let x = x.plain().as_chunks::<32>().0;
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    for_groups!(rows, 64, |g, blocks| {
        let x = &x[g];
        let x = [floats::<0, 32>(x), floats::<8, 32>(x), floats::<16, 32>(x), floats::<24, 32>(x)];
        for (acc, b) in acc.iter_mut().zip(blocks) {
            let w = [at128::<0, 64>(b), at128::<16, 64>(b), at128::<32, 64>(b), at128::<48, 64>(b)];
            for k in 0..4 {
                acc[k % 2] = _mm256_fmadd_ps(_mm256_cvtph_ps(w[k]), x[k], acc[k % 2]);
            }
        }
    });
    pair_sums256(acc)
}

/// A pair of bf16 in 32 bits widens by a shift (even) and by a mask (odd); the vector is split the same way.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_bf16<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let x = x.split().as_chunks::<32>().0;
    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    for_groups!(rows, 64, |g, blocks| {
        let x = &x[g];
        let (even, odd) = ([floats::<0, 32>(x), floats::<8, 32>(x)], [floats::<16, 32>(x), floats::<24, 32>(x)]);
        for (acc, b) in acc.iter_mut().zip(blocks) {
            let w = [at256::<0, 64>(b), at256::<32, 64>(b)];
            for k in 0..2 {
                acc[0] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(w[k])), even[k], acc[0]);
                acc[1] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w[k], upper)), odd[k], acc[1]);
            }
        }
    });
    pair_sums256(acc)
}

/// Eight lanes of four products of unsigned and signed codes; pair sums stay within 16 bits for codes up to 128.
#[inline]
#[target_feature(enable = "avx2")]
fn products(unsigned: __m256i, signed: __m256i) -> __m256i {
    _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned, signed), _mm256_set1_epi16(1))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_q8_0<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let Int8 { q, d, .. } = x.int8();
    let q = q.as_chunks::<BLOCK>().0;
    let mut acc = [_mm256_setzero_ps(); R];
    for_groups!(rows, 34, |g, blocks| {
        let x = codes(&q[g]);
        for (acc, b) in acc.iter_mut().zip(blocks) {
            let w = at256::<2, 34>(b);
            let t = products(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t), _mm256_set1_ps(half(b[0], b[1]) * d[g]), *acc);
        }
    });
    sums256(acc)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_q4_0<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let Int8 { q, d, bias, .. } = x.int8();
    let (q, bias) = (q.as_chunks::<BLOCK>().0, bias.as_chunks::<8>().0);
    let low = _mm256_set1_epi8(15);
    let mut acc = [_mm256_setzero_ps(); R];
    for_groups!(rows, 18, |g, blocks| {
        // The stored bias is for an offset of 128; here it is 8.
        let (x, start) = (codes(&q[g]), _mm256_srai_epi32::<4>(lanes(&bias[g])));
        for (acc, b) in acc.iter_mut().zip(blocks) {
            let w = at128::<2, 18>(b);
            let w = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16::<4>(w), w), low);
            let t = _mm256_add_epi32(products(w, x), start);
            *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t), _mm256_set1_ps(half(b[0], b[1]) * d[g]), *acc);
        }
    });
    sums256(acc)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_q4k<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let x = x.int8();
    let (q, d, sums) = (x.q.as_chunks::<BLOCK>().0, x.d.as_chunks::<8>().0, x.sum.as_chunks::<8>().0);
    let low = _mm256_set1_epi8(15);
    let mut acc = [_mm256_setzero_ps(); R];
    let mut minima = [_mm256_setzero_ps(); R];
    for_groups!(rows, 144, |g, blocks| {
        for (r, b) in blocks.into_iter().enumerate() {
            let (sc, mn) = q4k_scales(&b[4..16]);
            let sc = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(sc as i64)));
            let mn = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(mn as i64)));
            let scale = _mm256_mul_ps(_mm256_mul_ps(sc, _mm256_set1_ps(half(b[0], b[1]))), floats::<0, 8>(&d[g]));
            let mn = _mm256_mul_ps(mn, _mm256_set1_ps(half(b[2], b[3])));
            minima[r] = _mm256_fmadd_ps(mn, floats::<0, 8>(&sums[g]), minima[r]);
            let w = [at256::<16, 144>(b), at256::<48, 144>(b), at256::<80, 144>(b), at256::<112, 144>(b)];
            let at = |i: usize| _mm256_permutevar8x32_ps(scale, _mm256_set1_epi32(i as i32));
            for (k, w) in w.into_iter().enumerate() {
                let (even, odd) = (g * 8 + 2 * k, g * 8 + 2 * k + 1);
                let t0 = products(_mm256_and_si256(w, low), codes(&q[even]));
                let t1 = products(_mm256_and_si256(_mm256_srli_epi16::<4>(w), low), codes(&q[odd]));
                acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t0), at(2 * k), acc[r]);
                acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t1), at(2 * k + 1), acc[r]);
            }
        }
    });
    let mut out = sums256(acc);
    for (out, minima) in out.iter_mut().zip(minima) {
        *out -= sum256(minima);
    }
    out
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_q6k<const R: usize>(rows: Ahead<R>, x: &Operand) -> [f32; R] {
    let Int8 { q, d, bias, .. } = x.int8();
    let (q, bias) = (q.as_chunks::<BLOCK>().0, bias.as_chunks::<8>().0);
    let mut acc = [_mm256_setzero_ps(); R];
    for_groups!(rows, 210, |g, blocks| {
        for (acc, b) in acc.iter_mut().zip(blocks) {
            let wd = half(b[208], b[209]);
            let first = q6k_half([at256::<0, 210>(b), at256::<32, 210>(b)], at256::<128, 210>(b));
            let second = q6k_half([at256::<64, 210>(b), at256::<96, 210>(b)], at256::<160, 210>(b));
            for k in 0..8 {
                let block = g * 8 + k;
                let w = if k < 4 { first[k] } else { second[k - 4] };
                // The stored bias is for an offset of 128; here it is 32.
                let t = _mm256_add_epi32(products(w, codes(&q[block])), _mm256_srai_epi32::<2>(lanes(&bias[block])));
                // Four lanes per scale.
                let xd = wd * d[block];
                let low = _mm_set1_ps(xd * f32::from(b[192 + 2 * k] as i8));
                let high = _mm_set1_ps(xd * f32::from(b[193 + 2 * k] as i8));
                *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t), _mm256_set_m128(high, low), *acc);
            }
        }
    });
    sums256(acc)
}

/// The 128 codes (0 to 63) of one half of a Q6_K super-block, in natural order.
#[inline]
#[target_feature(enable = "avx2")]
fn q6k_half(ql: [__m256i; 2], qh: __m256i) -> [__m256i; 4] {
    let (low, bits) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
    let merge = |l, h| _mm256_or_si256(_mm256_and_si256(l, low), _mm256_and_si256(h, bits));
    [
        merge(ql[0], _mm256_slli_epi16::<4>(qh)),
        merge(ql[1], _mm256_slli_epi16::<2>(qh)),
        merge(_mm256_srli_epi16::<4>(ql[0]), qh),
        merge(_mm256_srli_epi16::<4>(ql[1]), _mm256_srli_epi16::<2>(qh)),
    ]
}
