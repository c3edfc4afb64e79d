//! Sums over groups with AVX-512: four channels are interleaved to one register per 16 outputs, which one VNNI product
//! adds.

use super::{Groups, LINE, Operand, Quad};
use crate::Format;
use crate::x86::prefetch;
use std::arch::x86_64::*;
use std::ops::Range;

/// Most quads of a group.
const QUADS: usize = super::GROUP / 4;
/// How far ahead codes are fetched, in bytes over all rows of a group.
const AHEAD: usize = 8192;

/// Where the rows of a group's quads begin.
struct Rows {
    start: [[*const u8; 4]; QUADS],
    len: usize,
}

impl Rows {
    #[inline(always)]
    fn new(w: &Groups, group: usize, quads: &[Quad]) -> Self {
        let codes = w.codes.as_ptr();
        let mut start = [[codes; 4]; QUADS];
        for (start, quad) in start.iter_mut().zip(quads) {
            // `wrapping_add` asks for no proof here: whoever reads there gives one.
            *start = quad.channels.map(|c| codes.wrapping_add(w.start(c.into(), group)));
        }
        Self { start, len: quads.len().min(QUADS) }
    }

    fn quads(&self) -> &[[*const u8; 4]] {
        &self.start[..self.len]
    }
}

/// [`Operand::fill`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn fill(operand: &mut Operand, w: &Groups, index: &[u32], value: &[f32]) {
    operand.fill(w, index, value);
}

/// See [`super::add`]; `unit` is the first one.
///
/// # Safety
/// The CPU must have [`crate::Isa::Avx512`], `x` be made for `w`, and `y` lie within the outputs of `w`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
pub(super) unsafe fn add(w: &Groups, x: &Operand, range: Range<usize>, unit: usize, y: &mut [f32]) {
    // SAFETY: as the caller vouches.
    unsafe {
        match w.format {
            Format::Q8_0 => add_as::<4>(w, x, range, unit, y),
            _ => add_as::<8>(w, x, range, unit, y),
        }
    }
}

/// [`add`] for units of `SUMS` registers of outputs.
///
/// # Safety
/// As [`add`], for a format with such units.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
unsafe fn add_as<const SUMS: usize>(w: &Groups, x: &Operand, range: Range<usize>, unit: usize, y: &mut [f32]) {
    let units = y.len().div_ceil(SUMS * 16);
    let of = |g: usize| x.number(g).map(|number| Rows::new(w, number, x.group(g).1));
    let mut next = of(range.start);
    for g in range {
        let (group, quads) = x.group(g);
        let Some(rows) = std::mem::replace(&mut next, of(g + 1)) else { return };
        let next = next.as_ref().unwrap_or(&rows);
        let (scales, minima) = w.scales(group.number as usize);
        let ahead = (AHEAD / (LINE * 4 * rows.len.max(1))).clamp(1, units);
        for u in 0..units {
            let (soon, line) = if u + ahead < units { (&rows, u + ahead) } else { (next, u + ahead - units) };
            for rows in soon.quads() {
                rows.iter().for_each(|row| prefetch(row.wrapping_add((unit + line) * LINE)));
            }
            let mut sums = [_mm512_set1_epi32(group.bias); SUMS];
            for (rows, quad) in rows.quads().iter().zip(quads) {
                let q = _mm512_set1_epi32(i32::from_le_bytes(quad.q.map(i8::cast_unsigned)));
                // SAFETY: the rows of `x` are rows of `w`, and have 64 bytes for each unit of the outputs.
                unsafe { multiply(&mut sums, rows.map(|row| row.add((unit + u) * LINE)), q) };
            }
            let scales = &scales.as_chunks::<32>().0[(unit + u) * SUMS..][..SUMS];
            let out = &mut y[u * SUMS * 16..];
            let d = _mm512_set1_ps(group.d);
            if let Some(out) = out.get_mut(..SUMS * 16) {
                for ((sum, scale), out) in sums.into_iter().zip(scales).zip(out.as_chunks_mut::<16>().0) {
                    add_scaled(sum, scale, d, out);
                }
            } else {
                for ((sum, scale), out) in sums.into_iter().zip(scales).zip(out.chunks_mut(16)) {
                    let mut copy = [0.0; 16];
                    copy[..out.len()].copy_from_slice(out);
                    add_scaled(sum, scale, d, &mut copy);
                    out.copy_from_slice(&copy[..out.len()]);
                }
            }
            if !minima.is_empty() {
                subtract(&minima.as_chunks::<32>().0[(unit + u) * SUMS..][..SUMS], group.sum, out);
            }
        }
    }
}

/// `out -= minimum * sum`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn subtract(minima: &[[u8; 32]], sum: f32, out: &mut [f32]) {
    let sum = _mm512_set1_ps(sum);
    for (minimum, out) in minima.iter().zip(out.chunks_mut(16)) {
        let mask = ((1_u32 << out.len()) - 1) as u16;
        // SAFETY: 32 bytes are read; only lanes within `out` are touched.
        unsafe {
            let minimum = _mm512_cvtph_ps(_mm256_loadu_si256(minimum.as_ptr().cast()));
            let y = _mm512_fnmadd_ps(sum, minimum, _mm512_maskz_loadu_ps(mask, out.as_ptr()));
            _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, y);
        }
    }
}

/// `out += sum * d * scale`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn add_scaled(sum: __m512i, scale: &[u8; 32], d: __m512, out: &mut [f32; 16]) {
    // SAFETY: the arrays have 32 and 64 bytes.
    unsafe {
        let scale = _mm512_cvtph_ps(_mm256_loadu_si256(scale.as_ptr().cast()));
        let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), d);
        let sum = _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(out.as_ptr()));
        _mm512_storeu_ps(out.as_mut_ptr(), sum);
    }
}

/// Adds the products of four channels with `q` to the outputs of a unit.
///
/// # Safety
/// Each pointer must have 64 readable bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
unsafe fn multiply<const SUMS: usize>(sums: &mut [__m512i; SUMS], rows: [*const u8; 4], q: __m512i) {
    // SAFETY: as the caller vouches.
    let [a, b, c, d] = rows.map(|row| unsafe { _mm512_loadu_si512(row.cast()) });
    let (ab, cd) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
    let codes = [
        _mm512_unpacklo_epi16(ab, cd),
        _mm512_unpackhi_epi16(ab, cd),
        _mm512_unpacklo_epi16(ab_high, cd_high),
        _mm512_unpackhi_epi16(ab_high, cd_high),
    ];
    for (k, codes) in codes.into_iter().enumerate() {
        if SUMS == 8 {
            let low = _mm512_and_si512(codes, _mm512_set1_epi8(15));
            // Byte 7 - i of the matrix selects the bits that make result bit i: moves bits 4-7 to 0-3.
            let high = _mm512_gf2p8affine_epi64_epi8::<0>(codes, _mm512_set1_epi64(0x1020_4080_0000_0000));
            sums[k] = _mm512_dpbusd_epi32(sums[k], low, q);
            sums[k + 4] = _mm512_dpbusd_epi32(sums[k + 4], high, q);
        } else {
            sums[k] = _mm512_dpbusd_epi32(sums[k], codes, q);
        }
    }
}
