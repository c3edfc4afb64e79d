//! AVX-512: `vpexpand` puts packed values on their places; then the arithmetic of the dense kernels, in their order, so that
//! the results have their bits. Rows that lie far apart are computed side by side, as there.

use super::pack::stored_unit;
use super::{Bitmap, PADDING};
use crate::Format;
use crate::gemv::Operand;
use crate::gemv::WIDE;
use crate::x86::{pair_sums512, prefetch, sums512};
use std::arch::x86_64::*;

/// How far ahead of its reads each of several rows is prefetched, in bytes: rows of a stretch lie one behind the other.
const AHEAD: usize = 2048;

/// Rows `first ..` of `w` with `x`, as many as `y` has room for. The CPU must have [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,f16c,popcnt")]
pub(super) fn compute(w: &Bitmap, first: usize, x: &Operand, y: &mut [f32]) {
    macro_rules! drive {
        ($dot:ident) => {{
            let stretch = y.len() / WIDE;
            for i in 0..stretch {
                for (k, sum) in $dot(w, w.far::<WIDE>(first + i, stretch), x).into_iter().enumerate() {
                    y[i + k * stretch] = sum;
                }
            }
            for i in stretch * WIDE..y.len() {
                [y[i]] = $dot(w, [w.start(first + i)], x);
            }
        }};
    }
    match w.format() {
        Format::Bf16 => drive!(dot_bf16),
        Format::Q8_0 => drive!(dot_q8_0),
        _ => drive!(dot_q4_0),
    }
}

/// The bytes of a matrix, for reads that stay inside from every place up to the limit.
#[derive(Clone, Copy)]
struct Reader {
    start: *const u8,
    limit: usize,
}

impl Reader {
    fn new(w: &Bitmap) -> Self {
        Self { start: w.data().as_ptr(), limit: w.limit() }
    }

    /// # Safety
    /// `at` is at most the limit, and `plus` plus the bytes of a `T` at most [`PADDING`].
    #[inline(always)]
    unsafe fn read<T: Copy>(self, at: usize, plus: usize) -> T {
        debug_assert!(at <= self.limit && plus + size_of::<T>() <= PADDING);
        // SAFETY: by contract the read ends before the bytes do.
        unsafe { self.start.add(at + plus).cast::<T>().read_unaligned() }
    }

    /// Fetches the line `AHEAD` bytes after `at`. Where units are longer than a line, hardware follows with the rest.
    #[inline(always)]
    fn fetch(self, at: usize) {
        prefetch(self.start.wrapping_add(at + AHEAD));
    }
}

/// Runs `$body` for unit `$u` of every row `$r` beginning at `$at`, which it moves; rows that lead outside give NaN.
macro_rules! for_units {
    ($w:ident, $starts:ident, |$u:ident, $shared:ident = $load:expr, $reader:ident, $r:ident, $at:ident| $body:block) => {{
        let $reader = Reader::new($w);
        for $u in 0..$w.units() {
            let $shared = $load;
            for $r in 0..R {
                let $at = $starts[$r];
                if $at > $reader.limit {
                    return [f32::NAN; R];
                }
                $reader.fetch($at);
                $starts[$r] = $at + $body;
            }
        }
    }};
}

// The products are not inlined: three of them in one function leave none enough registers.

/// As the dense product: pairs of bf16 in 32 bits widen by a shift (even) and by a mask (odd).
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,popcnt")]
fn dot_bf16<const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let x = x.split().as_chunks::<64>().0;
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for_units!(w, starts, |u, x = &x[u], reader, r, at| {
        // SAFETY: `at` is within the limit; both reads end before `8 + 2 * 32 + 64` bytes.
        let (mask, first, second) = unsafe {
            let mask: u64 = reader.read(at, 0);
            let n = (mask as u32).count_ones() as usize;
            (mask, reader.read::<__m512i>(at, 8), reader.read::<__m512i>(at, 8 + 2 * n))
        };
        let w0 = _mm512_maskz_expand_epi16(mask as u32, first);
        let w1 = _mm512_maskz_expand_epi16((mask >> 32) as u32, second);
        for (k, w) in [w0, w1].into_iter().enumerate() {
            let (even, odd) = (_mm512_slli_epi32::<16>(w), _mm512_and_si512(w, upper));
            acc[r][0] = _mm512_fmadd_ps(_mm512_castsi512_ps(even), floats(&x[32 * k..]), acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_castsi512_ps(odd), floats(&x[32 * k + 16..]), acc[r][1]);
        }
        8 + 2 * mask.count_ones() as usize
    });
    pair_sums512(acc)
}

/// The first sixteen numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn floats(v: &[f32]) -> __m512 {
    let v: &[f32; 16] = v.first_chunk().expect("callers pass at least a register's worth");
    // SAFETY: the array has sixteen numbers.
    unsafe { _mm512_loadu_ps(v.as_ptr()) }
}

/// What the rows of block formats share for one unit: 128 codes in the order of Q4_0, what codes without their offset of 8
/// start from, and the scales of the four blocks.
#[derive(Clone, Copy)]
struct Shared {
    first: __m512i,
    second: __m512i,
    bias: __m512i,
    d: __m128,
}

impl Shared {
    /// Arrays, not slices to be checked: the products keep their sums in registers only if this is part of their loop.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(q: &[i8; 128], bias: &[i32; 16], d: &[f32; 4]) -> Self {
        // SAFETY: the arrays have as many bytes as are read.
        unsafe {
            Self {
                first: _mm512_loadu_si512(q.as_ptr().cast()),
                second: _mm512_loadu_si512(q.as_ptr().add(64).cast()),
                bias: _mm512_loadu_si512(bias.as_ptr().cast()),
                d: _mm_loadu_ps(d.as_ptr()),
            }
        }
    }
}

/// Four f16 times the scales of the vector, each in four lanes.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
fn scales(stored: i64, d: __m128) -> __m512 {
    let four = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi64_si128(stored)), d);
    let spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(four))
}

/// Values carry an offset of 128, and so do the places between them; the bias takes it back.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,f16c,popcnt")]
fn dot_q8_0<const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let q = x.q4_0().q.as_chunks::<128>().0;
    let (bias, d) = (x.q4_0().bias.as_chunks::<16>().0, x.int8().d.as_chunks::<4>().0);
    let zero = _mm512_set1_epi8(-128);
    let mut acc = [_mm512_setzero_ps(); R];
    for_units!(w, starts, |u, x = Shared::load(&q[u], &bias[u], &d[u]), reader, r, at| {
        // SAFETY: `at` is within the limit; all reads end before `24 + 64 + 64` bytes.
        let (m0, m1, stored, first) = unsafe {
            let (m0, m1) = (reader.read::<u64>(at, 0), reader.read::<u64>(at, 8));
            (m0, m1, reader.read::<i64>(at, 16), reader.read::<__m512i>(at, 24))
        };
        let n0 = m0.count_ones() as usize;
        // SAFETY: as above.
        let second = unsafe { reader.read::<__m512i>(at, 24 + n0) };
        let (w0, w1) = (_mm512_mask_expand_epi8(zero, m0, first), _mm512_mask_expand_epi8(zero, m1, second));
        // The stored bias is for an offset of 8.
        let t = _mm512_dpbusd_epi32(_mm512_slli_epi32::<4>(x.bias), w0, x.first);
        let t = _mm512_dpbusd_epi32(t, w1, x.second);
        acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), scales(stored, x.d), acc[r]);
        24 + n0 + m1.count_ones() as usize
    });
    sums512(acc)
}

/// A unit is a group of the dense product: four lanes for each of four scales, low nibbles before high ones.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,f16c,popcnt")]
fn dot_q4_0<const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let q = x.q4_0().q.as_chunks::<128>().0;
    let (bias, d) = (x.q4_0().bias.as_chunks::<16>().0, x.int8().d.as_chunks::<4>().0);
    let (low, zero) = (_mm512_set1_epi8(15), _mm512_set1_epi8(8));
    // Byte 7 - i of the matrix selects the bits that make result bit i: bits 4-7 move to 0-3.
    let down = _mm512_set1_epi64(0x1020_4080_0000_0000);
    let mut acc = [_mm512_setzero_ps(); R];
    for_units!(w, starts, |u, x = Shared::load(&q[u], &bias[u], &d[u]), reader, r, at| {
        // SAFETY: `at` is within the limit; all reads end before `24 + 64` bytes.
        let (m0, m1, stored, values) = unsafe {
            let (m0, m1) = (reader.read::<u64>(at, 0), reader.read::<u64>(at, 8));
            (m0, m1, reader.read::<i64>(at, 16), reader.read::<__m512i>(at, 24))
        };
        let w0 = _mm512_mask_expand_epi8(zero, m0, _mm512_and_si512(values, low));
        let w1 = _mm512_mask_expand_epi8(zero, m1, _mm512_gf2p8affine_epi64_epi8::<0>(values, down));
        let t = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(x.bias, w0, x.first), w1, x.second);
        acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), scales(stored, x.d), acc[r]);
        24 + m0.count_ones().max(m1.count_ones()) as usize
    });
    sums512(acc)
}

/// Writes units from `at` on in the dense format until `out`, which takes whole ones, is full; returns where the next one
/// begins. The CPU must have [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,f16c,popcnt")]
pub(super) fn unpack(w: &Bitmap, mut at: usize, out: &mut [u8]) -> usize {
    let reader = Reader::new(w);
    for out in out.chunks_exact_mut(stored_unit(w.format())) {
        if at > reader.limit {
            // 0xffff is a NaN in BF16 and as an f16 scale.
            out.fill(0xff);
            at = usize::MAX;
            continue;
        }
        // SAFETY: `at` is within the limit, and the reads are those of the products.
        at += unsafe {
            match w.format() {
                Format::Bf16 => unpack_bf16(reader, at, out),
                Format::Q8_0 => unpack_q8_0(reader, at, out),
                _ => unpack_q4_0(reader, at, out),
            }
        };
    }
    at
}

/// # Safety
/// `at` is within the limit of `reader`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
unsafe fn unpack_bf16(reader: Reader, at: usize, out: &mut [u8]) -> usize {
    let out: &mut [u8; 128] = out.first_chunk_mut().expect("callers pass room for a unit");
    // SAFETY: reads by contract and as in the product; the array takes both registers.
    unsafe {
        let mask: u64 = reader.read(at, 0);
        let second = 8 + 2 * (mask as u32).count_ones() as usize;
        let w0 = _mm512_maskz_expand_epi16(mask as u32, reader.read(at, 8));
        let w1 = _mm512_maskz_expand_epi16((mask >> 32) as u32, reader.read(at, second));
        _mm512_storeu_si512(out.as_mut_ptr().cast(), w0);
        _mm512_storeu_si512(out.as_mut_ptr().add(64).cast(), w1);
        8 + 2 * mask.count_ones() as usize
    }
}

/// # Safety
/// As [`unpack_bf16`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
unsafe fn unpack_q8_0(reader: Reader, at: usize, out: &mut [u8]) -> usize {
    let offset = _mm512_set1_epi8(-128);
    // SAFETY: reads by contract and as in the product.
    let (m0, m1, scales, w0, w1) = unsafe {
        let (m0, m1): (u64, u64) = (reader.read(at, 0), reader.read(at, 8));
        let w0 = _mm512_mask_expand_epi8(offset, m0, reader.read(at, 24));
        let w1 = _mm512_mask_expand_epi8(offset, m1, reader.read(at, 24 + m0.count_ones() as usize));
        (m0, m1, reader.read::<[[u8; 2]; 4]>(at, 16), w0, w1)
    };
    let halves = [w0, w1].map(|w| quarters(_mm512_xor_si512(w, offset)));
    for (b, block) in out.as_chunks_mut::<34>().0.iter_mut().enumerate() {
        block[..2].copy_from_slice(&scales[b]);
        block[2..18].copy_from_slice(&halves[0][b]);
        block[18..].copy_from_slice(&halves[1][b]);
    }
    24 + (m0.count_ones() + m1.count_ones()) as usize
}

/// # Safety
/// As [`unpack_bf16`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
unsafe fn unpack_q4_0(reader: Reader, at: usize, out: &mut [u8]) -> usize {
    let (low, zero) = (_mm512_set1_epi8(15), _mm512_set1_epi8(8));
    // SAFETY: reads by contract and as in the product.
    let (m0, m1, scales, values) = unsafe {
        let (m0, m1): (u64, u64) = (reader.read(at, 0), reader.read(at, 8));
        (m0, m1, reader.read::<[[u8; 2]; 4]>(at, 16), reader.read::<__m512i>(at, 24))
    };
    let w0 = _mm512_mask_expand_epi8(zero, m0, _mm512_and_si512(values, low));
    let w1 = _mm512_mask_expand_epi8(zero, m1, _mm512_and_si512(_mm512_srli_epi16::<4>(values), low));
    let codes = quarters(_mm512_or_si512(w0, _mm512_slli_epi16::<4>(w1)));
    for (b, block) in out.as_chunks_mut::<18>().0.iter_mut().enumerate() {
        block[..2].copy_from_slice(&scales[b]);
        block[2..].copy_from_slice(&codes[b]);
    }
    24 + m0.count_ones().max(m1.count_ones()) as usize
}

/// The four parts of a register.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters(v: __m512i) -> [[u8; 16]; 4] {
    // SAFETY: both are 64 bytes of plain numbers.
    unsafe { std::mem::transmute(v) }
}
