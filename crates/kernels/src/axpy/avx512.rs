//! Channel sums with AVX-512: eight channels per pass, so that each output is loaded and stored once for eight; block
//! formats take sixteen in integers ([`digits`]) and what is left over here.

use super::{Channels, scalar};
use crate::Format;
use crate::format::last_group;
use crate::x86::Ahead;
use digits::MANY;
use std::arch::x86_64::*;

/// Channels per pass.
const WIDE: usize = 8;

/// Adds all channels to `y`. The CPU must have [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
pub(super) fn add(channels: &Channels, y: &mut [f32]) {
    macro_rules! drive {
        ($add:ident) => {
            drive!($add, WIDE, |group, next| $add(group.rows, group.value, next.rows, y))
        };
        ($add:ident, $wide:ident, |$group:ident, $next:ident| $pass:expr) => {{
            let stretch = channels.len() / $wide;
            for i in channels.groups(stretch) {
                let ($group, $next) = (channels.far::<$wide>(i, stretch), channels.far::<$wide>(i + 1, stretch));
                $pass;
            }
            for i in channels.rest(stretch * $wide) {
                let next = channels.row((i + 1).min(channels.len() - 1));
                $add([channels.row(i)], [channels.value[i]], [next], y);
            }
        }};
    }
    match channels.format {
        Format::F32 => drive!(add_f32),
        Format::F16 => drive!(add_f16),
        Format::Bf16 => drive!(add_bf16),
        Format::Q8_0 => drive!(add_q8_0, MANY, |group, next| digits::add::<digits::Q8_0>(&group, &next, y)),
        Format::Q4_0 => drive!(add_q4_0, MANY, |group, next| digits::add::<digits::Q4_0>(&group, &next, y)),
        Format::Q4K | Format::Q6K => {
            for i in channels.groups(channels.len()) {
                add_decoded(channels.format, channels.row(i), channels.value[i], y);
            }
        }
    }
}

/// Compiles the plain form, which decodes, with wide vectors and fused multiply-adds.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn add_decoded(format: Format, row: &[u8], value: f32, y: &mut [f32]) {
    scalar::add_decoded(format, row, y, |w, y| value.mul_add(w, y));
}

/// Runs `$body` for every unit of `$cols` outputs with the `$bytes` bytes of each channel, and fetches what comes soon.
/// A partial last unit is computed in zero-padded copies.
macro_rules! for_units {
    ($rows:ident, $next:ident, $y:ident, $bytes:literal, $cols:literal, |$w:ident, $out:ident| $body:block) => {{
        let ahead = Ahead::new($rows, $next);
        let whole = $rows.map(|row| row.as_chunks::<$bytes>().0);
        let (units, rest) = $y.as_chunks_mut::<$cols>();
        for (u, $out) in units.iter_mut().enumerate() {
            let $w = whole.map(|w| &w[u]);
            ahead.fetch(u * $bytes, $bytes);
            $body
        }
        if !rest.is_empty() {
            let last = $rows.map(|row| last_group::<$bytes>(row));
            let $w = last.each_ref();
            let mut copy = [0.0_f32; $cols];
            copy[..rest.len()].copy_from_slice(rest);
            {
                let $out = &mut copy;
                $body
            }
            rest.copy_from_slice(&copy[..rest.len()]);
        }
    }};
}

mod digits;

#[inline]
#[target_feature(enable = "avx512f")]
fn load<const N: usize>(y: &[f32; N], at: usize) -> __m512 {
    let y: &[f32; 16] = y[at..].first_chunk().expect("units hold whole registers");
    // SAFETY: the array has 16 numbers.
    unsafe { _mm512_loadu_ps(y.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const N: usize>(y: &mut [f32; N], at: usize, v: __m512) {
    let y: &mut [f32; 16] = y[at..].first_chunk_mut().expect("units hold whole registers");
    // SAFETY: the array has 16 numbers.
    unsafe { _mm512_storeu_ps(y.as_mut_ptr(), v) }
}

/// 64 bytes from `at` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn at512<const N: usize>(bytes: &[u8; N], at: usize) -> __m512i {
    let bytes: &[u8; 64] = bytes[at..].first_chunk().expect("units hold whole registers");
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// 32 bytes from `at` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn at256<const N: usize>(bytes: &[u8; N], at: usize) -> __m256i {
    let bytes: &[u8; 32] = bytes[at..].first_chunk().expect("units hold whole registers");
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// 16 bytes from `at` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn at128<const N: usize>(bytes: &[u8; N], at: usize) -> __m128i {
    let bytes: &[u8; 16] = bytes[at..].first_chunk().expect("units hold whole registers");
    // SAFETY: the array has 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// The formats that widen 16 numbers at a time without a scale.
macro_rules! add_plain {
    ($name:ident, $bytes:literal, |$b:ident, $half:ident| $widen:expr) => {
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
        fn $name<const C: usize>(rows: [&[u8]; C], value: [f32; C], next: [&[u8]; C], y: &mut [f32]) {
            let value = value.map(|v| _mm512_set1_ps(v));
            for_units!(rows, next, y, $bytes, 32, |w, out| {
                let mut sum = [load(out, 0), load(out, 16)];
                for ($b, value) in w.into_iter().zip(value) {
                    for ($half, sum) in sum.iter_mut().enumerate() {
                        *sum = _mm512_fmadd_ps(value, $widen, *sum);
                    }
                }
                store(out, 0, sum[0]);
                store(out, 16, sum[1]);
            });
        }
    };
}

add_plain!(add_f32, 128, |b, half| _mm512_castsi512_ps(at512(b, half * 64)));
add_plain!(add_f16, 64, |b, half| _mm512_cvtph_ps(at256(b, half * 32)));
add_plain!(add_bf16, 64, |b, half| {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(at256(b, half * 32))))
});

/// Word numbers of the scales of two blocks in their first 64 bytes, in the lanes of blocks 0 and 1 and again of 2
/// and 3.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn scale_words(words: [i16; 4]) -> __m512i {
    let [a, b, c, d] = words.map(|w| w as u16 as i64);
    _mm512_castsi128_si512(_mm_cvtsi64_si128(a | b << 16 | c << 32 | d << 48))
}

/// `value` times four f16 scales.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
fn scaled(words: __m512i, value: f32) -> [f32; 4] {
    let scales = _mm_mul_ps(_mm_cvtph_ps(_mm512_castsi512_si128(words)), _mm_set1_ps(value));
    let mut out = [0.0; 4];
    // SAFETY: the array has four numbers.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), scales) };
    out
}

/// Four blocks (136 bytes, 128 outputs) per unit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn add_q8_0<const C: usize>(rows: [&[u8]; C], value: [f32; C], next: [&[u8]; C], y: &mut [f32]) {
    let pick = scale_words([0, 17, 0, 17]);
    for_units!(rows, next, y, 136, 128, |w, out| {
        let scale: [[f32; 4]; C] = std::array::from_fn(|c| {
            let words = _mm512_permutexvar_epi16(pick, at512(w[c], 0));
            scaled(_mm512_mask_permutexvar_epi16(words, 0b1100, pick, at512(w[c], 68)), value[c])
        });
        for block in 0..4 {
            let mut sum = [load(out, block * 32), load(out, block * 32 + 16)];
            for (c, scale) in scale.iter().enumerate() {
                let s = _mm512_set1_ps(scale[block]);
                for (half, sum) in sum.iter_mut().enumerate() {
                    let q = _mm512_cvtepi8_epi32(at128(w[c], block * 34 + 2 + half * 16));
                    *sum = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(q), *sum);
                }
            }
            store(out, block * 32, sum[0]);
            store(out, block * 32 + 16, sum[1]);
        }
    });
}

/// Four blocks (72 bytes, 128 outputs) per unit; a table in a register turns codes into numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn add_q4_0<const C: usize>(rows: [&[u8]; C], value: [f32; C], next: [&[u8]; C], y: &mut [f32]) {
    let pick = scale_words([0, 9, 18, 27]);
    let table = _mm512_set_ps(7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0);
    for_units!(rows, next, y, 72, 128, |w, out| {
        let scale: [[f32; 4]; C] =
            std::array::from_fn(|c| scaled(_mm512_permutexvar_epi16(pick, at512(w[c], 0)), value[c]));
        for block in 0..4 {
            let mut sum = [load(out, block * 32), load(out, block * 32 + 16)];
            for (c, scale) in scale.iter().enumerate() {
                let s = _mm512_set1_ps(scale[block]);
                // The table look-up reads only the lowest four bits of a lane.
                let low = _mm512_cvtepu8_epi32(at128(w[c], block * 18 + 2));
                let high = _mm512_srli_epi32::<4>(low);
                sum[0] = _mm512_fmadd_ps(s, _mm512_permutexvar_ps(low, table), sum[0]);
                sum[1] = _mm512_fmadd_ps(s, _mm512_permutexvar_ps(high, table), sum[1]);
            }
            store(out, block * 32, sum[0]);
            store(out, block * 32 + 16, sum[1]);
        }
    });
}
