//! AVX-512: `vpexpand` puts packed values on their places; then the arithmetic of the dense kernels, in their order, so that
//! the results have their bits. Rows that lie far apart are computed side by side, as there.

use super::gemv::WIDE;
use super::{Bitmap, PADDING};
use crate::Format;
use crate::gemv::Operand;
use crate::x86::prefetch;
use std::arch::x86_64::*;

/// How far ahead of its reads each of several rows is prefetched, in bytes: rows of a stretch lie one behind the other.
const AHEAD: usize = 2048;

/// Rows `first ..` of `w` with `x`, as many as `y` has room for. The CPU must have [`crate::Isa::Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,popcnt")]
pub(super) fn compute(w: &Bitmap, first: usize, x: &Operand, y: &mut [f32]) {
    macro_rules! drive {
        ($dot:ident) => {{
            let stretch = y.len() / WIDE;
            for i in 0..stretch {
                let at: [_; WIDE] = std::array::from_fn(|k| w.start(first + i + k * stretch));
                for (k, sum) in $dot(w, at, x).into_iter().enumerate() {
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

    /// Fetches the lines that a unit will need that begins `AHEAD` bytes after `at`.
    #[inline(always)]
    fn fetch(self, at: usize) {
        let p = self.start.wrapping_add(at + AHEAD);
        prefetch(p);
        prefetch(p.wrapping_add(64));
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sums<const R: usize>(acc: [__m512; R]) -> [f32; R] {
    acc.map(|a| _mm512_reduce_add_ps(a))
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

/// As the dense product: pairs of bf16 in 32 bits widen by a shift (even) and by a mask (odd).
#[inline]
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
    sums(acc.map(|[a, b]| _mm512_add_ps(a, b)))
}

/// The first sixteen numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn floats(v: &[f32]) -> __m512 {
    let v: &[f32; 16] = v.first_chunk().expect("callers pass at least a register's worth");
    // SAFETY: the array has sixteen numbers.
    unsafe { _mm512_loadu_ps(v.as_ptr()) }
}

/// The first 64 codes.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes(q: &[i8]) -> __m512i {
    let q: &[i8; 64] = q.first_chunk().expect("callers pass at least a register's worth");
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(q.as_ptr().cast()) }
}

/// The first sixteen lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn lanes(v: &[i32]) -> __m512i {
    let v: &[i32; 16] = v.first_chunk().expect("callers pass at least a register's worth");
    // SAFETY: the array has sixteen numbers.
    unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
}

/// Byte numbers that spread the two-byte numbers of each eight bytes over sixteen places, `each` times each.
#[inline]
#[target_feature(enable = "avx2")]
fn spread(each: usize) -> __m256i {
    let mut at = [0_u8; 32];
    for (i, at) in at.iter_mut().enumerate() {
        *at = (i / 2 / each * 2 + i % 2) as u8;
    }
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(at.as_ptr().cast()) }
}

/// Values carry an offset of 128 and so do the places between them; the bias takes it back.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,popcnt")]
fn dot_q8_0<const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let x = x.int8();
    let zero = _mm512_set1_epi8(-128);
    let pick = spread(8);
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    for_units!(
        w,
        starts,
        |u, x = (codes(&x.q[u * 64..]), lanes(&x.bias[u * 16..]), floats(&x.d8[u * 16..])), reader, r, at| {
            let (q, bias, d) = x;
            // SAFETY: `at` is within the limit; all reads end before `12 + 64` bytes.
            let (mask, scales, values) = unsafe {
                (reader.read::<u64>(at, 0), reader.read::<i32>(at, 8), reader.read::<__m512i>(at, 12))
            };
            let t = _mm512_dpbusd_epi32(bias, _mm512_mask_expand_epi8(zero, mask, values), q);
            let s = _mm512_cvtph_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(scales), pick));
            let sum = &mut acc[r][u % 2];
            *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), _mm512_mul_ps(s, d), *sum);
            12 + mask.count_ones() as usize
        }
    );
    sums(acc.map(|[a, b]| _mm512_add_ps(a, b)))
}

/// A unit is a group of the dense product: four lanes for each of four scales, low nibbles before high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,popcnt")]
fn dot_q4_0<const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let x = x.q4_0();
    let (low, zero) = (_mm512_set1_epi8(15), _mm512_set1_epi8(8));
    // Byte 7 - i of the matrix selects the bits that make result bit i: bits 4-7 move to 0-3.
    let down = _mm512_set1_epi64(0x1020_4080_0000_0000);
    let pick = spread(4);
    let mut acc = [_mm512_setzero_ps(); R];
    for_units!(
        w,
        starts,
        |u, x = (&x.q[u * 128..], lanes(&x.bias[u * 16..]), floats(&x.d4[u * 16..])), reader, r, at| {
            let (q, bias, d) = (x.0, x.1, x.2);
            // SAFETY: `at` is within the limit; all reads end before `24 + 64` bytes.
            let (m0, m1, scales, values) = unsafe {
                let scales = reader.read::<i64>(at, 16);
                (reader.read::<u64>(at, 0), reader.read::<u64>(at, 8), scales, reader.read::<__m512i>(at, 24))
            };
            let w0 = _mm512_mask_expand_epi8(zero, m0, _mm512_and_si512(values, low));
            let w1 = _mm512_mask_expand_epi8(zero, m1, _mm512_gf2p8affine_epi64_epi8::<0>(values, down));
            let t = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(bias, w0, codes(q)), w1, codes(&q[64..]));
            let s = _mm512_cvtph_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(scales), pick));
            acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), _mm512_mul_ps(s, d), acc[r]);
            24 + m0.count_ones().max(m1.count_ones()) as usize
        }
    );
    sums(acc)
}
