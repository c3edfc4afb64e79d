//! Sums over groups with AVX2: four channels are interleaved, `maddubs` and `madd` add their products.

use super::{Groups, LINE, Operand, Taken};
use crate::Format;
use crate::x86::prefetch;
use std::arch::x86_64::*;
use std::ops::Range;

/// [`Operand::fill`].
#[target_feature(enable = "avx2")]
pub(super) fn fill(operand: &mut Operand, w: &Groups, index: &[u32], value: &[f32]) {
    operand.fill(w, index, value, Taken::new);
}

/// See [`super::add`]; `unit` is the first one.
///
/// # Safety
/// The CPU must have [`crate::Isa::Avx2`], `x` be made for `w`, and `y` lie within the outputs of `w`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn add(w: &Groups, x: &Operand, range: Range<usize>, unit: usize, y: &mut [f32]) {
    // SAFETY: as the caller vouches.
    unsafe {
        match w.format {
            Format::Q8_0 => add_as::<64>(w, x, range, unit, y),
            _ => add_as::<128>(w, x, range, unit, y),
        }
    }
}

/// [`add`] for units of `UNIT` outputs.
///
/// # Safety
/// As [`add`], for a format with such units.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_as<const UNIT: usize>(w: &Groups, x: &Operand, range: Range<usize>, unit: usize, y: &mut [f32]) {
    let units = y.len().div_ceil(UNIT);
    for g in range {
        let (group, quads) = x.group(g);
        let number = group.number as usize;
        let (next, next_number) = x.number(g + 1).map_or((quads, number), |n| (x.group(g + 1).1, n));
        let (scales, minima) = w.scales(group.number as usize);
        for u in 0..units {
            let (soon, number_soon, line) = if u + 1 < units { (quads, number, u + 1) } else { (next, next_number, 0) };
            for c in soon.iter().flat_map(|quad| quad.channels) {
                prefetch(w.codes.as_ptr().wrapping_add(w.start(c.into(), number_soon) + (unit + line) * LINE));
            }
            // The sums of each 16 bytes: one dword per output.
            let mut sums = [_mm_set1_epi32(group.bias); 32];
            for quad in quads {
                let q = _mm256_set1_epi32(i32::from_le_bytes(quad.q.map(i8::cast_unsigned)));
                let rows = quad.channels.map(|c| w.row(c.into(), number)[(unit + u) * LINE..][..LINE].as_ptr());
                for l in 0..4 {
                    // SAFETY: the slices have 64 bytes.
                    unsafe { multiply::<UNIT>(&mut sums, rows.map(|row| row.add(16 * l)), l, q) };
                }
            }
            let scales = &scales[(unit + u) * UNIT * 2..][..UNIT * 2];
            scale::<UNIT>(&sums, scales, group.d, &mut y[u * UNIT..]);
            if !minima.is_empty() {
                subtract(&minima[(unit + u) * UNIT * 2..][..UNIT * 2], group.sum, &mut y[u * UNIT..]);
            }
        }
    }
}

/// Adds the products of 16 bytes of four channels, the `l`th of the unit, to `sums[4 k + l]` for outputs `16 k + 4 l`.
///
/// # Safety
/// Each pointer must have 16 readable bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply<const UNIT: usize>(sums: &mut [__m128i; 32], rows: [*const u8; 4], l: usize, q: __m256i) {
    // SAFETY: as the caller vouches.
    let [a, b, c, d] = rows.map(|row| unsafe { _mm_loadu_si128(row.cast()) });
    let (ab, cd) = (_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d));
    let (ab_high, cd_high) = (_mm_unpackhi_epi8(a, b), _mm_unpackhi_epi8(c, d));
    let codes = [
        _mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd)),
        _mm256_set_m128i(_mm_unpackhi_epi16(ab_high, cd_high), _mm_unpacklo_epi16(ab_high, cd_high)),
    ];
    for (pair, codes) in codes.into_iter().enumerate() {
        if UNIT == 128 {
            let nibble = _mm256_set1_epi8(15);
            let low = _mm256_maddubs_epi16(_mm256_and_si256(codes, nibble), q);
            let high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble), q);
            add_pair(sums, low, 8 * pair + l);
            add_pair(sums, high, 16 + 8 * pair + l);
        } else {
            // `maddubs` saturates with bytes above 127: products of the low seven bits and of the top bit, apart.
            let low = _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(127)), q);
            let top = _mm256_and_si256(_mm256_srli_epi16::<7>(codes), _mm256_set1_epi8(1));
            let top = _mm256_maddubs_epi16(top, q);
            add_pair(sums, low, 8 * pair + l);
            let weight = _mm256_set1_epi16(128);
            add_products(sums, top, weight, 8 * pair + l);
        }
    }
}

/// Adds the pair sums of two times four outputs to `sums[at]` and `sums[at + 4]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_pair(sums: &mut [__m128i; 32], pairs: __m256i, at: usize) {
    add_products(sums, pairs, _mm256_set1_epi16(1), at);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_products(sums: &mut [__m128i; 32], pairs: __m256i, weight: __m256i, at: usize) {
    let all = _mm256_madd_epi16(pairs, weight);
    sums[at] = _mm_add_epi32(sums[at], _mm256_castsi256_si128(all));
    sums[at + 4] = _mm_add_epi32(sums[at + 4], _mm256_extracti128_si256::<1>(all));
}

/// `y -= minimum * sum` for as many outputs as there are.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn subtract(minima: &[u8], sum: f32, y: &mut [f32]) {
    for (minimum, y) in minima.as_chunks::<8>().0.iter().zip(y.chunks_mut(4)) {
        let mut four = [0.0; 4];
        four[..y.len()].copy_from_slice(y);
        // SAFETY: the arrays have 8 and 16 bytes.
        unsafe {
            let minimum = _mm_cvtph_ps(_mm_loadl_epi64(minimum.as_ptr().cast()));
            let sums = _mm_fnmadd_ps(_mm_set1_ps(sum), minimum, _mm_loadu_ps(four.as_ptr()));
            _mm_storeu_ps(four.as_mut_ptr(), sums);
        }
        y.copy_from_slice(&four[..y.len()]);
    }
}

/// Scales the sums of a unit and adds them to as many outputs as there are.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scale<const UNIT: usize>(sums: &[__m128i; 32], scales: &[u8], d: f32, y: &mut [f32]) {
    let d = _mm_set1_ps(d);
    let mut spare = [0.0; UNIT];
    let whole = y.len() >= UNIT;
    let live = y.len().min(UNIT);
    let out = if whole {
        &mut y[..UNIT]
    } else {
        spare[..live].copy_from_slice(&y[..live]);
        &mut spare[..]
    };
    for ((sum, scale), out) in sums.iter().zip(scales.as_chunks::<8>().0).zip(out.as_chunks_mut::<4>().0) {
        // SAFETY: the arrays have 8 and 16 bytes.
        unsafe {
            let scale = _mm_cvtph_ps(_mm_loadl_epi64(scale.as_ptr().cast()));
            let sum = _mm_mul_ps(_mm_cvtepi32_ps(*sum), d);
            _mm_storeu_ps(out.as_mut_ptr(), _mm_fmadd_ps(sum, scale, _mm_loadu_ps(out.as_ptr())));
        }
    }
    if !whole {
        y[..live].copy_from_slice(&spare[..live]);
    }
}
