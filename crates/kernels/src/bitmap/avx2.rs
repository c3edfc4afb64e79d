//! AVX2: bytes of a mask look up the shuffles that put packed values on their places, eight at a time; then the arithmetic
//! of the dense kernels, in their order.

use super::Bitmap;
use super::pack::stored_unit;
use super::shuffles::{BYTES, WORDS};
use crate::Format;
use crate::gemv::Operand;
use crate::gemv::WIDE;
use crate::x86::{pair_sums256, prefetch, sums256};
use std::arch::x86_64::*;

/// How far ahead of its reads each of several rows is prefetched, in bytes.
const AHEAD: usize = 2048;

/// Rows `first ..` of `w` with `x`, as many as `y` has room for. The CPU must have [`crate::Isa::Avx2`].
#[target_feature(enable = "avx2,fma,f16c,popcnt")]
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

/// Runs `$body` for unit `$u` of every row `$r` whose bytes begin at `$bytes`, and moves on by what it gives; rows that
/// lead outside give NaN.
macro_rules! for_units {
    ($w:ident, $starts:ident, |$u:ident, $r:ident, $bytes:ident| $body:block) => {{
        let (start, limit) = ($w.data().as_ptr(), $w.limit());
        for $u in 0..$w.units() {
            for $r in 0..R {
                let at = $starts[$r];
                if at > limit {
                    return [f32::NAN; R];
                }
                // SAFETY: `at` is within the limit, behind which there are `PADDING` bytes.
                let $bytes = unsafe { &*start.add(at).cast::<[u8; super::PADDING]>() };
                prefetch(start.wrapping_add(at + AHEAD));
                $starts[$r] = at + $body;
            }
        }
    }};
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn half(bytes: &[u8], at: usize) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])))))
}

#[inline]
#[target_feature(enable = "avx2")]
fn floats(v: &[f32]) -> __m256 {
    let v: &[f32; 8] = v.first_chunk().expect("callers pass at least a register's worth");
    // SAFETY: the array has eight numbers.
    unsafe { _mm256_loadu_ps(v.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn codes(v: &[i8]) -> __m256i {
    let v: &[i8; 32] = v.first_chunk().expect("callers pass at least a register's worth");
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn lanes(v: &[i32]) -> __m256i {
    let v: &[i32; 8] = v.first_chunk().expect("callers pass at least a register's worth");
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
}

/// Eight numbers of two bytes, put on the places of `mask`.
#[inline]
#[target_feature(enable = "avx2")]
fn expand_words(values: &[u8], mask: u8) -> __m128i {
    let v: &[u8; 16] = values.first_chunk().expect("the padding holds the longest unit and a register");
    // SAFETY: both arrays have 16 bytes.
    unsafe {
        let at = _mm_loadu_si128(WORDS[mask as usize].as_ptr().cast());
        _mm_shuffle_epi8(_mm_loadu_si128(v.as_ptr().cast()), at)
    }
}

/// Sixteen bytes on the places of a mask of 16 bits, zero elsewhere: `low` and `high` are the next values of each of its
/// bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn expand_bytes(low: __m128i, high: __m128i, mask: u16) -> __m128i {
    let [a, b] = mask.to_le_bytes();
    // SAFETY: both arrays have 8 bytes.
    unsafe {
        let a = _mm_loadl_epi64(BYTES[a as usize].as_ptr().cast());
        let b = _mm_loadl_epi64(BYTES[b as usize].as_ptr().cast());
        _mm_unpacklo_epi64(_mm_shuffle_epi8(low, a), _mm_shuffle_epi8(high, b))
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn eight(values: &[u8]) -> __m128i {
    let v: &[u8; 8] = values.first_chunk().expect("the padding holds the longest unit and a register");
    // SAFETY: the array has 8 bytes.
    unsafe { _mm_loadl_epi64(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn dot_bf16<const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let x = x.split().as_chunks::<64>().0;
    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    for_units!(w, starts, |u, r, bytes| {
        let mask = super::mask(bytes);
        let mut from = 8;
        for k in 0..4 {
            let part = (mask >> (16 * k)) as u16;
            let [a, b] = part.to_le_bytes();
            let low = expand_words(&bytes[from..], a);
            let high = expand_words(&bytes[from + 2 * a.count_ones() as usize..], b);
            from += 2 * part.count_ones() as usize;
            let w = _mm256_set_m128i(high, low);
            let (even, odd) = (_mm256_slli_epi32::<16>(w), _mm256_and_si256(w, upper));
            let x = &x[u][k / 2 * 32 + k % 2 * 8..];
            acc[r][0] = _mm256_fmadd_ps(_mm256_castsi256_ps(even), floats(x), acc[r][0]);
            acc[r][1] = _mm256_fmadd_ps(_mm256_castsi256_ps(odd), floats(&x[16..]), acc[r][1]);
        }
        from
    });
    pair_sums256(acc)
}

/// Eight lanes of four products of unsigned and signed codes; pair sums stay within 16 bits for codes up to 128.
#[inline]
#[target_feature(enable = "avx2")]
fn products(unsigned: __m256i, signed: __m256i) -> __m256i {
    _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned, signed), _mm256_set1_epi16(1))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn dot_q8_0<const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let x = x.int8();
    let offset = _mm_set1_epi8(-128);
    let mut acc = [_mm256_setzero_ps(); R];
    for_units!(w, starts, |u, r, bytes| {
        let masks = [super::mask(bytes), super::mask(&bytes[8..])];
        let mut from = [24, 24 + masks[0].count_ones() as usize];
        for b in 0..4 {
            let mut parts = [_mm_setzero_si128(); 2];
            for (h, out) in parts.iter_mut().enumerate() {
                let part = (masks[h] >> (16 * b)) as u16;
                let second = from[h] + (part as u8).count_ones() as usize;
                let (low, high) = (eight(&bytes[from[h]..]), eight(&bytes[second..]));
                *out = expand_bytes(_mm_xor_si128(low, offset), _mm_xor_si128(high, offset), part);
                from[h] += part.count_ones() as usize;
            }
            let w = _mm256_set_m128i(parts[1], parts[0]);
            let t = products(_mm256_abs_epi8(w), _mm256_sign_epi8(codes(&x.q[(u * 4 + b) * 32..]), w));
            let s = half(bytes, 16 + 2 * b) * x.d[u * 4 + b];
            acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t), _mm256_set1_ps(s), acc[r]);
        }
        from[1]
    });
    sums256(acc)
}

/// Values pass through the shuffle with bit 3 flipped, so that the places between them become code 8, which is zero.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn dot_q4_0<const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let x = x.int8();
    let (flip, low) = (_mm_set1_epi8(8), _mm_set1_epi8(15));
    let mut acc = [_mm256_setzero_ps(); R];
    for_units!(w, starts, |u, r, bytes| {
        let masks = [super::mask(bytes), super::mask(&bytes[8..])];
        let mut from = [24; 2];
        for b in 0..4 {
            let mut parts = [_mm_setzero_si128(); 2];
            for (h, out) in parts.iter_mut().enumerate() {
                let part = (masks[h] >> (16 * b)) as u16;
                let second = from[h] + (part as u8).count_ones() as usize;
                let codes = [eight(&bytes[from[h]..]), eight(&bytes[second..])];
                let [a, c] = if h == 0 { codes } else { codes.map(|v| _mm_srli_epi16::<4>(v)) };
                let signed = |v| _mm_xor_si128(_mm_and_si128(v, low), flip);
                *out = _mm_xor_si128(expand_bytes(signed(a), signed(c), part), flip);
                from[h] += part.count_ones() as usize;
            }
            let w = _mm256_set_m128i(parts[1], parts[0]);
            // The stored bias is for an offset of 128; here it is 8.
            let start = _mm256_srai_epi32::<4>(lanes(&x.bias[(u * 4 + b) * 8..]));
            let t = _mm256_add_epi32(products(w, codes(&x.q[(u * 4 + b) * 32..])), start);
            let s = half(bytes, 16 + 2 * b) * x.d[u * 4 + b];
            acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t), _mm256_set1_ps(s), acc[r]);
        }
        from[0].max(from[1])
    });
    sums256(acc)
}

/// Writes units from `at` on in the dense format until `out`, which takes whole ones, is full; returns where the next one
/// begins. The CPU must have [`crate::Isa::Avx2`].
#[target_feature(enable = "avx2,popcnt")]
pub(super) fn unpack(w: &Bitmap, mut at: usize, out: &mut [u8]) -> usize {
    for out in out.chunks_exact_mut(stored_unit(w.format())) {
        let bytes = w.data().get(at..).filter(|_| at <= w.limit()).and_then(|b| b.first_chunk());
        let Some(bytes) = bytes else {
            // 0xffff is a NaN in BF16 and as an f16 scale.
            out.fill(0xff);
            at = usize::MAX;
            continue;
        };
        at += match w.format() {
            Format::Bf16 => unpack_bf16(bytes, out),
            format => unpack_blocks(format, bytes, out),
        };
    }
    at
}

/// The sixteen bytes of a register.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes_of(v: __m128i) -> [u8; 16] {
    // SAFETY: both are 16 bytes of plain numbers.
    unsafe { std::mem::transmute(v) }
}

#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn unpack_bf16(bytes: &[u8; super::PADDING], out: &mut [u8]) -> usize {
    let mut from = 8;
    for (mask, out) in super::mask(bytes).to_le_bytes().into_iter().zip(out.as_chunks_mut::<16>().0) {
        *out = bytes_of(expand_words(&bytes[from..], mask));
        from += 2 * mask.count_ones() as usize;
    }
    from
}

#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn unpack_blocks(format: Format, bytes: &[u8; super::PADDING], out: &mut [u8]) -> usize {
    let masks = [super::mask(bytes), super::mask(&bytes[8..])];
    let wide = format == Format::Q8_0;
    let mut from = [24, if wide { 24 + masks[0].count_ones() as usize } else { 24 }];
    let (low, flip) = (_mm_set1_epi8(15), _mm_set1_epi8(if wide { -128 } else { 8 }));
    for (b, out) in out.chunks_exact_mut(format.block_bytes()).enumerate() {
        let mut halves = [_mm_setzero_si128(); 2];
        for (h, half) in halves.iter_mut().enumerate() {
            let part = (masks[h] >> (16 * b)) as u16;
            let second = from[h] + (part as u8).count_ones() as usize;
            let codes = [eight(&bytes[from[h]..]), eight(&bytes[second..])].map(|v| match (wide, h) {
                (true, _) => v,
                (_, 0) => _mm_and_si128(v, low),
                _ => _mm_and_si128(_mm_srli_epi16::<4>(v), low),
            });
            let [a, c] = codes.map(|v| _mm_xor_si128(v, flip));
            *half = expand_bytes(a, c, part);
            from[h] += part.count_ones() as usize;
        }
        out[..2].copy_from_slice(&bytes[16 + 2 * b..][..2]);
        if wide {
            out[2..18].copy_from_slice(&bytes_of(halves[0]));
            out[18..].copy_from_slice(&bytes_of(halves[1]));
        } else {
            let [l, h] = halves.map(|v| _mm_xor_si128(v, flip));
            out[2..].copy_from_slice(&bytes_of(_mm_or_si128(l, _mm_slli_epi16::<4>(h))));
        }
    }
    if wide { from[1] } else { from[0].max(from[1]) }
}
