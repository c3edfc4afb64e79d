//! Channel sums with NEON: four channels per pass, so that each output is loaded and stored once for four.

use super::{Channels, scalar};
use crate::Format;
use crate::format::last_group;
use crate::neon::{half, halves};
use std::arch::aarch64::*;

/// Channels per pass.
const WIDE: usize = 4;

/// Adds all channels to `y`.
pub(super) fn add(channels: &Channels, y: &mut [f32]) {
    macro_rules! drive {
        ($add:ident) => {{
            let stretch = channels.len() / WIDE;
            for i in channels.groups(stretch) {
                let group = channels.far::<WIDE>(i, stretch);
                // SAFETY: NEON is part of AArch64.
                unsafe { $add(group.rows, group.value, y) };
            }
            for i in channels.rest(stretch * WIDE) {
                // SAFETY: as above.
                unsafe { $add([channels.row(i)], [channels.value[i]], y) };
            }
        }};
    }
    match channels.format {
        Format::F32 => drive!(add_f32),
        Format::F16 => drive!(add_f16),
        Format::Bf16 => drive!(add_bf16),
        Format::Q8_0 => drive!(add_q8_0),
        Format::Q4_0 => drive!(add_q4_0),
        Format::Q4K | Format::Q6K => {
            for i in channels.groups(channels.len()) {
                let value = channels.value[i];
                scalar::add_decoded(channels.format, channels.row(i), y, |w, y| value.mul_add(w, y));
            }
        }
    }
}

/// Defines `y += value * row` in units of 32 outputs: `$scale` is the factor of a unit, `$widen` four of its numbers.
macro_rules! add_units {
    ($name:ident, $bytes:literal, |$b:ident, $v:ident, $part:ident| $widen:expr, $scale:expr) => {
        #[inline]
        #[target_feature(enable = "neon")]
        fn $name<const C: usize>(rows: [&[u8]; C], value: [f32; C], y: &mut [f32]) {
            let (units, rest) = y.as_chunks_mut::<32>();
            let whole = rows.map(|row| row.as_chunks::<$bytes>().0);
            macro_rules! unit {
                ($w:expr, $out:expr) => {{
                    let w = $w;
                    let scale: [f32; C] = std::array::from_fn(|c| {
                        let ($b, $v): (&[u8; $bytes], f32) = (w[c], value[c]);
                        let _ = $b;
                        $scale
                    });
                    for ($part, out) in $out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                        // SAFETY: the array has four numbers.
                        let mut sum = unsafe { vld1q_f32(out.as_ptr()) };
                        for ($b, scale) in w.into_iter().zip(scale) {
                            sum = vfmaq_n_f32(sum, $widen, scale);
                        }
                        // SAFETY: as above.
                        unsafe { vst1q_f32(out.as_mut_ptr(), sum) };
                    }
                }};
            }
            for (u, out) in units.iter_mut().enumerate() {
                unit!(whole.map(|w| &w[u]), out);
            }
            if !rest.is_empty() {
                let last = rows.map(|row| last_group::<$bytes>(row));
                let mut copy = [0.0_f32; 32];
                copy[..rest.len()].copy_from_slice(rest);
                unit!(last.each_ref(), copy);
                rest.copy_from_slice(&copy[..rest.len()]);
            }
        }
    };
}

add_units!(add_f32, 128, |b, v, part| vreinterpretq_f32_u8(at128(b, 16 * part)), v);
add_units!(add_f16, 64, |b, v, part| halves(eight(b, 8 * part)), v);
add_units!(
    add_bf16,
    64,
    |b, v, part| vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(at64(b, 8 * part)))),
    v
);
add_units!(
    add_q8_0,
    34,
    |b, v, part| four(vreinterpret_s8_u8(at64(b, 2 + part / 2 * 8)), part % 2),
    v * half(b[0], b[1])
);
add_units!(add_q4_0, 18, |b, v, part| q4_0_numbers(at64(b, 2 + part % 4 / 2 * 8), part), v * half(b[0], b[1]));

fn eight<const N: usize>(bytes: &[u8; N], at: usize) -> &[u8; 8] {
    bytes[at..].first_chunk().expect("units hold whole registers")
}

/// 8 bytes from `at` on.
#[inline]
#[target_feature(enable = "neon")]
fn at64<const N: usize>(bytes: &[u8; N], at: usize) -> uint8x8_t {
    // SAFETY: the array has eight bytes.
    unsafe { vld1_u8(eight(bytes, at).as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn at128<const N: usize>(bytes: &[u8; N], at: usize) -> uint8x16_t {
    let bytes: &[u8; 16] = bytes[at..].first_chunk().expect("units hold whole registers");
    // SAFETY: the array has 16 bytes.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// The first or the second four of eight codes as floats.
#[inline]
#[target_feature(enable = "neon")]
fn four(codes: int8x8_t, second: usize) -> float32x4_t {
    let wide = vmovl_s8(codes);
    vcvtq_f32_s32(if second == 0 { vmovl_s16(vget_low_s16(wide)) } else { vmovl_high_s16(wide) })
}

/// Numbers `4 part..4 part + 4` of a block, from the eight bytes that hold them: low nibbles for the first half of the
/// block, high ones for the second, less 8.
#[inline]
#[target_feature(enable = "neon")]
fn q4_0_numbers(bytes: uint8x8_t, part: usize) -> float32x4_t {
    let codes = if part < 4 { vand_u8(bytes, vdup_n_u8(15)) } else { vshr_n_u8::<4>(bytes) };
    four(vsub_s8(vreinterpret_s8_u8(codes), vdup_n_s8(8)), part % 2)
}
