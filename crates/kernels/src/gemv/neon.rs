//! Dot products with NEON: several rows side by side, block formats with integer dot products.

use super::Rows;
use super::operand::{BLOCK, Int8, Operand};
use super::scalar::q4k_scales;
use crate::Format;
use crate::format::last_group;
use crate::neon::{at, codes, dot, half, has_dot};
use std::arch::aarch64::*;

/// Computes the rows of a claim, several at a time and far apart: hardware prefetchers follow one stream per page.
pub(super) fn compute(rows: &Rows, x: &Operand, y: &mut [f32]) {
    // SAFETY: NEON is part of AArch64, and the dot products were asked for.
    unsafe { if has_dot() { compute_as::<true>(rows, x, y) } else { compute_as::<false>(rows, x, y) } }
}

/// # Safety
/// The CPU must have the integer dot products if `DOT` says so; that holds for all functions here.
#[target_feature(enable = "neon")]
unsafe fn compute_as<const DOT: bool>(rows: &Rows, x: &Operand, y: &mut [f32]) {
    macro_rules! drive {
        ($dot:expr, $one:expr, $rows:literal) => {{
            let stretch = y.len() / $rows;
            for i in 0..stretch {
                let group: [_; $rows] = std::array::from_fn(|k| rows.get(i + k * stretch));
                for (k, sum) in $dot(group, x).into_iter().enumerate() {
                    y[i + k * stretch] = sum;
                }
            }
            for i in stretch * $rows..y.len() {
                [y[i]] = $one([rows.get(i)], x);
            }
        }};
    }
    // SAFETY: as the caller vouches.
    unsafe {
        match rows.w.format() {
            Format::F32 => drive!(dot_f32::<4>, dot_f32::<1>, 4),
            Format::F16 => drive!(dot_f16::<4>, dot_f16::<1>, 4),
            Format::Bf16 => drive!(dot_bf16::<4>, dot_bf16::<1>, 4),
            Format::Q8_0 => drive!(dot_q8_0::<DOT, 4>, dot_q8_0::<DOT, 1>, 4),
            Format::Q4_0 => drive!(dot_q4_0::<DOT, 4>, dot_q4_0::<DOT, 1>, 4),
            Format::Q4K => drive!(dot_q4k::<DOT, 2>, dot_q4k::<DOT, 1>, 2),
            Format::Q6K => drive!(dot_q6k::<DOT, 2>, dot_q6k::<DOT, 1>, 2),
        }
    }
}

/// Runs `$body` for group `$g` of every row: whole groups of `$bytes` bytes in place, a partial last one as a
/// zero-padded copy.
macro_rules! for_groups {
    ($rows:ident, $bytes:literal, |$g:ident, $blocks:ident| $body:block) => {{
        let whole = $rows.map(|row| row.as_chunks::<$bytes>().0);
        let groups = whole[0].len();
        for $g in 0..groups {
            let $blocks = whole.map(|w| &w[$g]);
            $body
        }
        if groups * $bytes < $rows[0].len() {
            let last = $rows.map(|row| last_group::<$bytes>(row));
            let ($g, $blocks) = (groups, last.each_ref());
            $body
        }
    }};
}

/// Numbers `4 PART..4 PART + 4`.
#[inline]
#[target_feature(enable = "neon")]
fn floats(v: &[f32; 32], part: usize) -> float32x4_t {
    let four: &[f32; 4] = v[4 * part..].first_chunk().expect("a group holds eight times four numbers");
    // SAFETY: the array has four numbers.
    unsafe { vld1q_f32(four.as_ptr()) }
}

/// Sums of groups of 32 numbers of `$bytes` bytes; `$widen` are the numbers that meet the vector's numbers
/// `4 $part..4 $part + 4`.
macro_rules! dot_floats {
    ($name:ident, $form:ident, $bytes:literal, |$b:ident, $part:ident| $widen:expr) => {
        #[inline]
        #[target_feature(enable = "neon")]
        fn $name<const R: usize>(rows: [&[u8]; R], x: &Operand) -> [f32; R] {
            let x = x.$form().as_chunks::<32>().0;
            let mut acc = [[vdupq_n_f32(0.0); 2]; R];
            for_groups!(rows, $bytes, |g, blocks| {
                for $part in 0..8 {
                    let x = floats(&x[g], $part);
                    for (acc, $b) in acc.iter_mut().zip(blocks) {
                        acc[$part % 2] = vfmaq_f32(acc[$part % 2], $widen, x);
                    }
                }
            });
            acc.map(|[a, b]| vaddvq_f32(vaddq_f32(a, b)))
        }
    };
}

dot_floats!(dot_f32, plain, 128, |b, part| vreinterpretq_f32_u8(piece(b, 16 * part)));
dot_floats!(dot_f16, plain, 64, |b, part| half_piece(b, 8 * part));
// A pair of bf16 in 32 bits widens by a shift (even) and by a mask (odd); the vector is split the same way.
dot_floats!(dot_bf16, split, 64, |b, part| {
    let pairs = vreinterpretq_u32_u8(piece(b, 16 * (part % 4)));
    vreinterpretq_f32_u32(if part < 4 { vshlq_n_u32::<16>(pairs) } else { vandq_u32(pairs, vdupq_n_u32(0xffff_0000)) })
});

/// 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
fn piece<const N: usize>(bytes: &[u8; N], at: usize) -> uint8x16_t {
    let bytes: &[u8; 16] = bytes[at..].first_chunk().expect("groups hold whole registers");
    // SAFETY: the array has 16 bytes.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// Four half-precision numbers.
#[inline]
#[target_feature(enable = "neon")]
fn half_piece(bytes: &[u8; 64], at: usize) -> float32x4_t {
    crate::neon::halves(bytes[at..].first_chunk().expect("groups hold whole registers"))
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot_q8_0<const DOT: bool, const R: usize>(rows: [&[u8]; R], x: &Operand) -> [f32; R] {
    let Int8 { q, d, .. } = x.int8();
    let q = q.as_chunks::<BLOCK>().0;
    let mut acc = [vdupq_n_f32(0.0); R];
    for_groups!(rows, 34, |g, blocks| {
        let x = [codes::<0>(&q[g]), codes::<16>(&q[g])];
        for (acc, b) in acc.iter_mut().zip(blocks) {
            let w = [vreinterpretq_s8_u8(at::<2, 34>(b)), vreinterpretq_s8_u8(at::<18, 34>(b))];
            // SAFETY: as the caller vouches.
            let t = unsafe { pair::<DOT>(w, x) };
            *acc = vfmaq_n_f32(*acc, vcvtq_f32_s32(t), half(b[0], b[1]) * d[g]);
        }
    });
    acc.map(|a| vaddvq_f32(a))
}

/// Four lanes of eight products.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn pair<const DOT: bool>(w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
    // SAFETY: as the caller vouches.
    unsafe { dot::<DOT>(dot::<DOT>(vdupq_n_s32(0), w[0], x[0]), w[1], x[1]) }
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot_q4_0<const DOT: bool, const R: usize>(rows: [&[u8]; R], x: &Operand) -> [f32; R] {
    let Int8 { q, d, .. } = x.int8();
    let q = q.as_chunks::<BLOCK>().0;
    let mut acc = [vdupq_n_f32(0.0); R];
    for_groups!(rows, 18, |g, blocks| {
        let x = [codes::<0>(&q[g]), codes::<16>(&q[g])];
        for (acc, b) in acc.iter_mut().zip(blocks) {
            let w = nibbles(at::<2, 18>(b)).map(|w| vsubq_s8(w, vdupq_n_s8(8)));
            // SAFETY: as the caller vouches.
            let t = unsafe { pair::<DOT>(w, x) };
            *acc = vfmaq_n_f32(*acc, vcvtq_f32_s32(t), half(b[0], b[1]) * d[g]);
        }
    });
    acc.map(|a| vaddvq_f32(a))
}

/// The low and the high nibbles.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles(w: uint8x16_t) -> [int8x16_t; 2] {
    [vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8::<4>(w))]
}

/// Eight 6-bit numbers as floats.
#[inline]
#[target_feature(enable = "neon")]
fn eight(bytes: u64) -> [f32; 8] {
    bytes.to_le_bytes().map(f32::from)
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot_q4k<const DOT: bool, const R: usize>(rows: [&[u8]; R], x: &Operand) -> [f32; R] {
    let x = x.int8();
    let (q, d, sums) = (x.q.as_chunks::<BLOCK>().0, x.d.as_chunks::<8>().0, x.sum.as_chunks::<8>().0);
    let mut acc = [vdupq_n_f32(0.0); R];
    let mut minima = [0.0_f32; R];
    for_groups!(rows, 144, |g, blocks| {
        for (r, b) in blocks.into_iter().enumerate() {
            let (scales, mins) = q4k_scales(&b[4..16]);
            let (wd, wmin) = (half(b[0], b[1]), half(b[2], b[3]));
            let (scales, mins) = (eight(scales), eight(mins));
            minima[r] += wmin * mins.iter().zip(&sums[g]).map(|(m, s)| m * s).sum::<f32>();
            for k in 0..4 {
                let (low, high) = (nibbles(piece(b, 16 + 32 * k)), nibbles(piece(b, 32 + 32 * k)));
                for (j, w) in [[low[0], high[0]], [low[1], high[1]]].into_iter().enumerate() {
                    let block = 2 * k + j;
                    let q = &q[g * 8 + block];
                    // SAFETY: as the caller vouches.
                    let t = unsafe { pair::<DOT>(w, [codes::<0>(q), codes::<16>(q)]) };
                    acc[r] = vfmaq_n_f32(acc[r], vcvtq_f32_s32(t), wd * scales[block] * d[g][block]);
                }
            }
        }
    });
    std::array::from_fn(|r| vaddvq_f32(acc[r]) - minima[r])
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot_q6k<const DOT: bool, const R: usize>(rows: [&[u8]; R], x: &Operand) -> [f32; R] {
    let Int8 { q, d, .. } = x.int8();
    let q = q.as_chunks::<BLOCK>().0;
    let mut acc = [vdupq_n_f32(0.0); R];
    for_groups!(rows, 210, |g, blocks| {
        for (acc, b) in acc.iter_mut().zip(blocks) {
            let wd = half(b[208], b[209]);
            // 16 codes share a scale.
            for part in 0..16 {
                let w = q6k_codes(b, part);
                let q = &q[g * 8 + part / 2];
                let x = if part % 2 == 0 { codes::<0>(q) } else { codes::<16>(q) };
                // SAFETY: as the caller vouches.
                let t = unsafe { dot::<DOT>(vdupq_n_s32(0), w, x) };
                let scale = wd * f32::from(b[192 + part] as i8) * d[g * 8 + part / 2];
                *acc = vfmaq_n_f32(*acc, vcvtq_f32_s32(t), scale);
            }
        }
    });
    acc.map(|a| vaddvq_f32(a))
}

/// Codes `16 part..16 part + 16` of a Q6_K super-block, -32 to 31.
#[inline]
#[target_feature(enable = "neon")]
fn q6k_codes(b: &[u8; 210], part: usize) -> int8x16_t {
    let (side, quarter, l) = (part / 8, part % 8 / 2, part % 2);
    let low = nibbles(piece(b, side * 64 + quarter % 2 * 32 + 16 * l))[quarter / 2];
    let bits = vshlq_u8(piece(b, 128 + side * 32 + 16 * l), vdupq_n_s8(4 - 2 * quarter as i8));
    let code = vorrq_u8(vreinterpretq_u8_s8(low), vandq_u8(bits, vdupq_n_u8(0x30)));
    vsubq_s8(vreinterpretq_s8_u8(code), vdupq_n_s8(32))
}
