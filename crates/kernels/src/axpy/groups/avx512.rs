//! Sums over groups with AVX-512: four channels are interleaved to one register per 16 outputs, which one VNNI product
//! adds.

use super::{GROUP, Group, Groups, LINE, Operand, Taken};
use crate::Format;
use crate::x86::prefetch;
use std::arch::x86_64::*;
use std::ops::Range;

/// Most quads of a group.
const QUADS: usize = GROUP / 4;
/// How far ahead codes are fetched, in bytes over all rows of a group.
const AHEAD: usize = 8192;

/// Where the rows of a group's quads begin.
#[derive(Clone, Copy)]
struct Rows {
    start: [[*const u8; 4]; QUADS],
    len: usize,
}

impl Rows {
    const NONE: Self = Self { start: [[std::ptr::null(); 4]; QUADS], len: 0 };

    /// The rows of the `g`th group of `x`; none after the last.
    #[inline(always)]
    fn set(&mut self, w: &Groups, x: &Operand, g: usize) {
        self.len = 0;
        let Some(number) = x.number(g) else { return };
        for (start, quad) in self.start.iter_mut().zip(x.group(g).1) {
            // `wrapping_add` asks for no proof here: whoever reads there gives one.
            *start = quad.channels.map(|c| w.codes.as_ptr().wrapping_add(w.start(c.into(), number)));
            self.len += 1;
        }
    }

    #[inline(always)]
    fn quads(&self) -> &[[*const u8; 4]] {
        &self.start[..self.len.min(QUADS)]
    }
}

/// [`Operand::fill`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn fill(operand: &mut Operand, w: &Groups, index: &[u32], value: &[f32]) {
    operand.fill(w, index, value, |index, value| take(index, value));
}

/// As [`Taken::new`]. (Compilers make some four hundred scalar instructions of that.)
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn take(index: &[u32], value: &[f32]) -> Taken {
    let number = _mm512_set1_epi32((index[0] / GROUP as u32).cast_signed());
    let there = u32::MAX >> (32 - index.len().min(GROUP));
    // SAFETY: the masks leave out what lies behind the list.
    let index: [__m512i; 2] = unsafe {
        [0, 16].map(|k| _mm512_maskz_loadu_epi32((there >> k) as u16, index.as_ptr().wrapping_add(k).cast()))
    };
    let same = index.map(|i| u32::from(_mm512_cmpeq_epi32_mask(_mm512_srli_epi32::<5>(i), number)));
    let count = ((same[0] | same[1] << 16) & there).trailing_ones();
    let (value, taken) = (&value[..count as usize], u32::MAX >> (32 - count));
    // SAFETY: as above.
    let x: [__m512; 2] =
        unsafe { [0, 16].map(|k| _mm512_maskz_loadu_ps((taken >> k) as u16, value.as_ptr().wrapping_add(k))) };
    let amount = x.map(|x| _mm512_castps_si512(_mm512_abs_ps(x)));
    // Amounts order like their bits, so that what is not finite is above all others.
    let largest = f32::from_bits(_mm512_reduce_max_epi32(_mm512_max_epi32(amount[0], amount[1])).cast_unsigned());
    let largest = if largest.is_finite() { largest } else { f32::NAN };
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let codes = join(x.map(|x| {
        let rounded = _mm512_add_ps(_mm512_mul_ps(x, _mm512_set1_ps(inverse)), _mm512_set1_ps(12_582_912.0));
        _mm512_cvtepi32_epi8(_mm512_castps_si512(rounded))
    }));
    let numbers = _mm256_and_si256(join(index.map(|i| _mm512_cvtepi32_epi8(i))), _mm256_set1_epi8(GROUP as i8 - 1));
    let sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), codes);
    let (mut channels, mut q) = ([0_u8; GROUP], [0_i8; GROUP]);
    // SAFETY: both arrays have 32 bytes.
    unsafe {
        _mm256_storeu_si256(channels.as_mut_ptr().cast(), numbers);
        _mm256_storeu_si256(q.as_mut_ptr().cast(), codes);
    }
    let sum = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(sums));
    Taken { count: count as usize, channels, q, sum, largest }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn join([low, high]: [__m128i; 2]) -> __m256i {
    _mm256_set_m128i(high, low)
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
    // This group's rows and the next one's, by turns: what is fetched is chosen by one index.
    let mut tables = [Rows::NONE; 2];
    tables[range.start % 2].set(w, x, range.start);
    for g in range {
        let (group, quads) = x.group(g);
        tables[(g + 1) % 2].set(w, x, g + 1);
        let rows = &tables[g % 2];
        let (scales, minima) = w.scales(group.number as usize);
        let (scales, minima) = (scales.as_chunks::<32>().0, minima.as_chunks::<32>().0);
        let ahead = (AHEAD / (LINE * 4 * rows.len.max(1))).clamp(1, units);
        for u in 0..units {
            let (table, line) = if u + ahead < units { (g % 2, u + ahead) } else { ((g + 1) % 2, u + ahead - units) };
            for four in tables[table].quads() {
                four.iter().for_each(|row| prefetch(row.wrapping_add((unit + line) * LINE)));
            }
            let mut sums = [_mm512_set1_epi32(group.bias); SUMS];
            for (four, quad) in rows.quads().iter().zip(quads) {
                let q = _mm512_set1_epi32(i32::from_le_bytes(quad.q.map(i8::cast_unsigned)));
                // SAFETY: the rows of `x` are rows of `w`, and have 64 bytes for each unit of the outputs.
                unsafe { multiply(&mut sums, four.map(|row| row.add((unit + u) * LINE)), q) };
            }
            let scales: &[_; SUMS] = scales[(unit + u) * SUMS..].first_chunk().expect("rows of scales are whole units");
            let minima: Option<&[_; SUMS]> = minima.get((unit + u) * SUMS..).and_then(|m| m.first_chunk());
            let out = &mut y[u * SUMS * 16..];
            let whole: Option<&mut [_; SUMS]> = out.as_chunks_mut::<16>().0.first_chunk_mut();
            if let Some(out) = whole {
                finish(&group, &sums, scales, minima, out);
            } else {
                let mut copy = [[0.0; 16]; SUMS];
                copy.as_flattened_mut()[..out.len()].copy_from_slice(out);
                finish(&group, &sums, scales, minima, &mut copy);
                out.copy_from_slice(&copy.as_flattened()[..out.len()]);
            }
        }
    }
}

/// `out += sums * d * scales - minima * sum`. Loops by index: iterators over arrays by value keep their state in memory.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,gfni")]
fn finish<const SUMS: usize>(
    group: &Group,
    sums: &[__m512i; SUMS],
    scales: &[[u8; 32]; SUMS],
    minima: Option<&[[u8; 32]; SUMS]>,
    out: &mut [[f32; 16]; SUMS],
) {
    let (d, sum) = (_mm512_set1_ps(group.d), _mm512_set1_ps(group.sum));
    for k in 0..SUMS {
        // SAFETY: the arrays have 32 and 64 bytes.
        unsafe {
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales[k].as_ptr().cast()));
            let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[k]), d);
            let mut y = _mm512_fmadd_ps(scaled, scale, _mm512_loadu_ps(out[k].as_ptr()));
            if let Some(minima) = minima {
                let minimum = _mm512_cvtph_ps(_mm256_loadu_si256(minima[k].as_ptr().cast()));
                y = _mm512_fnmadd_ps(sum, minimum, y);
            }
            _mm512_storeu_ps(out[k].as_mut_ptr(), y);
        }
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
    for k in 0..4 {
        let codes = codes[k];
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
