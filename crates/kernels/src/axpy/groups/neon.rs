//! Sums over groups with NEON: four channels are interleaved to one register per four outputs, which one integer dot
//! product adds.

use super::{Groups, LINE, Operand, Quad};
use crate::Format;
use crate::neon::{dot, halves, has_dot};
use std::arch::aarch64::*;
use std::ops::Range;

/// See [`super::add`]; `unit` is the first one. `x` must be made for `w`, and `y` lie within the outputs of `w`.
pub(super) fn add(w: &Groups, x: &Operand, range: Range<usize>, unit: usize, y: &mut [f32]) {
    // SAFETY: NEON is part of AArch64, and the dot products were asked for.
    unsafe {
        match (w.format, has_dot()) {
            (Format::Q8_0, true) => add_as::<true, false>(w, x, range, unit, y),
            (Format::Q8_0, false) => add_as::<false, false>(w, x, range, unit, y),
            (_, true) => add_as::<true, true>(w, x, range, unit, y),
            (_, false) => add_as::<false, true>(w, x, range, unit, y),
        }
    }
}

/// [`add`] for units of 64 outputs, or twice as many in nibbles.
///
/// # Safety
/// The CPU must have the integer dot products if `DOT` says so.
#[target_feature(enable = "neon")]
unsafe fn add_as<const DOT: bool, const NIBBLES: bool>(
    w: &Groups,
    x: &Operand,
    range: Range<usize>,
    unit: usize,
    y: &mut [f32],
) {
    let outputs = w.unit();
    for g in range {
        let (group, quads) = x.group(g);
        let (scales, minima) = w.scales(group.number as usize);
        for (u, y) in y.chunks_mut(outputs).enumerate() {
            // SAFETY: as the caller vouches.
            let sums = unsafe { sums::<DOT, NIBBLES>(w, group.number as usize, quads, unit + u, group.bias) };
            let at = (unit + u) * outputs * 2;
            let scales = scales[at..][..2 * outputs].as_chunks::<8>().0;
            for ((sum, scale), out) in sums.iter().zip(scales).zip(y.chunks_mut(4)) {
                let sum = vmulq_n_f32(vcvtq_f32_s32(*sum), group.d);
                update(out, |y| vfmaq_f32(y, sum, halves(scale)));
            }
            if !minima.is_empty() {
                let minima = minima[at..][..2 * outputs].as_chunks::<8>().0;
                for (minimum, out) in minima.iter().zip(y.chunks_mut(4)) {
                    update(out, |y| vfmsq_n_f32(y, halves(minimum), group.sum));
                }
            }
        }
    }
}

/// Replaces up to four numbers.
#[inline]
#[target_feature(enable = "neon")]
fn update(out: &mut [f32], step: impl Fn(float32x4_t) -> float32x4_t) {
    let mut four = [0.0; 4];
    four[..out.len()].copy_from_slice(out);
    // SAFETY: the array has four numbers.
    unsafe { vst1q_f32(four.as_mut_ptr(), step(vld1q_f32(four.as_ptr()))) };
    out.copy_from_slice(&four[..out.len()]);
}

/// The integer sums of one unit, four outputs each (half of them are not used without nibbles).
///
/// # Safety
/// As [`add_as`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn sums<const DOT: bool, const NIBBLES: bool>(
    w: &Groups,
    group: usize,
    quads: &[Quad],
    unit: usize,
    bias: i32,
) -> [int32x4_t; 32] {
    // Codes of 8 bits become signed, which takes back their offset; nibbles fit as they are.
    let mut all = [vdupq_n_s32(if NIBBLES { bias } else { 0 }); 32];
    for l in 0..4 {
        let mut low: [int32x4_t; 4] = std::array::from_fn(|k| all[4 * k + l]);
        let mut high = low;
        for quad in quads {
            let rows: [&[u8; LINE]; 4] = quad.channels.map(|c| &w.row(c.into(), group).as_chunks::<LINE>().0[unit]);
            let q = vreinterpretq_s8_s32(vdupq_n_s32(i32::from_le_bytes(quad.q.map(i8::cast_unsigned))));
            // SAFETY: the rows have 64 bytes; the dot products as the caller vouches.
            unsafe {
                let codes = interleave(rows.map(|row| vld1q_u8(row.as_ptr().add(16 * l))));
                for (k, codes) in codes.into_iter().enumerate() {
                    if NIBBLES {
                        let nibbles = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15)));
                        low[k] = dot::<DOT>(low[k], nibbles, q);
                        high[k] = dot::<DOT>(high[k], vreinterpretq_s8_u8(vshrq_n_u8::<4>(codes)), q);
                    } else {
                        low[k] = dot::<DOT>(low[k], vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80))), q);
                    }
                }
            }
        }
        for k in 0..4 {
            all[4 * k + l] = low[k];
            all[16 + 4 * k + l] = high[k];
        }
    }
    all
}

/// Four channels of 16 outputs, side by side: four outputs per register, each with its four channels.
#[inline]
#[target_feature(enable = "neon")]
fn interleave([a, b, c, d]: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
    let pair = |x, y| vreinterpretq_u16_u8(vzip1q_u8(x, y));
    let upper = |x, y| vreinterpretq_u16_u8(vzip2q_u8(x, y));
    let (ab, cd, ab_high, cd_high) = (pair(a, b), pair(c, d), upper(a, b), upper(c, d));
    [vzip1q_u16(ab, cd), vzip2q_u16(ab, cd), vzip1q_u16(ab_high, cd_high), vzip2q_u16(ab_high, cd_high)]
        .map(|x| vreinterpretq_u8_u16(x))
}
