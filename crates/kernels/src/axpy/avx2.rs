//! Channel sums with AVX2: four channels per pass, so that each output is loaded and stored once for four.

use super::{Channels, scalar};
use crate::Format;
use crate::format::last_group;
use crate::x86::Ahead;
use std::arch::x86_64::*;

/// Channels per pass.
const WIDE: usize = 4;

/// Adds all channels to `y`. The CPU must have [`crate::Isa::Avx2`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add(channels: &Channels, y: &mut [f32]) {
    macro_rules! drive {
        ($add:ident) => {{
            let stretch = channels.len() / WIDE;
            for i in channels.groups(stretch) {
                let (group, next) = (channels.far::<WIDE>(i, stretch), channels.far::<WIDE>(i + 1, stretch));
                $add(group.rows, group.value, next.rows, y);
            }
            for i in channels.rest(stretch * WIDE) {
                let next = channels.row((i + 1).min(channels.len() - 1));
                $add([channels.row(i)], [channels.value[i]], [next], y);
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
                add_decoded(channels.format, channels.row(i), channels.value[i], y);
            }
        }
    }
}

/// Compiles the plain form, which decodes, with vectors and fused multiply-adds.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_decoded(format: Format, row: &[u8], value: f32, y: &mut [f32]) {
    scalar::add_decoded(format, row, y, |w, y| value.mul_add(w, y));
}

#[inline]
#[target_feature(enable = "avx2")]
fn at256<const N: usize>(bytes: &[u8; N], at: usize) -> __m256i {
    let bytes: &[u8; 32] = bytes[at..].first_chunk().expect("units hold whole registers");
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn at128<const N: usize>(bytes: &[u8; N], at: usize) -> __m128i {
    let bytes: &[u8; 16] = bytes[at..].first_chunk().expect("units hold whole registers");
    // SAFETY: the array has 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// 8 bytes from `at` on.
#[inline]
#[target_feature(enable = "avx2")]
fn at64<const N: usize>(bytes: &[u8; N], at: usize) -> __m128i {
    let bytes: &[u8; 8] = bytes[at..].first_chunk().expect("units hold whole registers");
    _mm_cvtsi64_si128(i64::from_le_bytes(*bytes))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn half(low: u8, high: u8) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes([low, high])))))
}

/// Defines `y += value * row` in units of 32 outputs: `$scale` is the factor of a unit, `$widen` eight of its numbers.
macro_rules! add_units {
    ($name:ident, $bytes:literal, |$b:ident, $v:ident, $part:ident| $widen:expr, $scale:expr) => {
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn $name<const C: usize>(rows: [&[u8]; C], value: [f32; C], next: [&[u8]; C], y: &mut [f32]) {
            let ahead = Ahead::new(rows, next);
            let (units, rest) = y.as_chunks_mut::<32>();
            let whole = rows.map(|row| row.as_chunks::<$bytes>().0);
            macro_rules! unit {
                ($w:expr, $out:expr) => {
                    for $part in 0..4 {
                        let out: &mut [f32; 8] = &mut $out.as_chunks_mut::<8>().0[$part];
                        // SAFETY: the array has eight numbers.
                        let mut sum = unsafe { _mm256_loadu_ps(out.as_ptr()) };
                        for ($b, $v) in $w.into_iter().zip(value) {
                            sum = _mm256_fmadd_ps(_mm256_set1_ps($scale), $widen, sum);
                        }
                        // SAFETY: as above.
                        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
                    }
                };
            }
            for (u, out) in units.iter_mut().enumerate() {
                ahead.fetch(u * $bytes, $bytes);
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

add_units!(add_f32, 128, |b, v, part| _mm256_castsi256_ps(at256(b, part * 32)), v);
add_units!(add_f16, 64, |b, v, part| _mm256_cvtph_ps(at128(b, part * 16)), v);
add_units!(
    add_bf16,
    64,
    |b, v, part| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(at128(b, part * 16)))),
    v
);
add_units!(
    add_q8_0,
    34,
    |b, v, part| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(at64(b, 2 + part * 8))),
    v * half(b[0], b[1])
);
add_units!(add_q4_0, 18, |b, v, part| q4_0_numbers(at64(b, 2 + part % 2 * 8), part / 2), v * half(b[0], b[1]));

/// The low (`upper` = 0) or high nibbles of eight bytes, less 8.
#[inline]
#[target_feature(enable = "avx2")]
fn q4_0_numbers(bytes: __m128i, upper: usize) -> __m256 {
    let bytes = _mm256_cvtepu8_epi32(bytes);
    let codes = if upper == 0 { _mm256_and_si256(bytes, _mm256_set1_epi32(15)) } else { _mm256_srli_epi32::<4>(bytes) };
    _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)))
}
