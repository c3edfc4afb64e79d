//! NEON: bytes of a mask look up the shuffles that put packed values on their places, as with AVX2; then the arithmetic of
//! the dense kernels, in their order, so that the results have their bits. Several rows go side by side.

use super::pack::stored_unit;
use super::shuffles::{BYTES, WORDS};
use super::{Bitmap, PADDING};
use crate::Format;
use crate::gemv::{Operand, WIDE};
use crate::neon::{codes, dot, halves, has_dot};
use std::arch::aarch64::*;

/// Rows `first ..` of `w` with `x`, as many as `y` has room for.
pub(super) fn compute(w: &Bitmap, first: usize, x: &Operand, y: &mut [f32]) {
    // SAFETY: NEON is part of AArch64, and the dot products were asked for.
    unsafe { if has_dot() { compute_as::<true>(w, first, x, y) } else { compute_as::<false>(w, first, x, y) } }
}

/// # Safety
/// The CPU must have the integer dot products if `DOT` says so; that holds for all functions here.
#[target_feature(enable = "neon")]
unsafe fn compute_as<const DOT: bool>(w: &Bitmap, first: usize, x: &Operand, y: &mut [f32]) {
    macro_rules! drive {
        ($dot:expr, $one:expr) => {{
            let stretch = y.len() / WIDE;
            for i in 0..stretch {
                for (k, sum) in $dot(w, w.far(first + i, stretch), x).into_iter().enumerate() {
                    y[i + k * stretch] = sum;
                }
            }
            for i in stretch * WIDE..y.len() {
                [y[i]] = $one(w, [w.start(first + i)], x);
            }
        }};
    }
    // SAFETY: as the caller vouches.
    unsafe {
        match w.format() {
            Format::Bf16 => drive!(dot_bf16::<WIDE>, dot_bf16::<1>),
            Format::Q8_0 => drive!(dot_q8_0::<DOT, WIDE>, dot_q8_0::<DOT, 1>),
            _ => drive!(dot_q4_0::<DOT, WIDE>, dot_q4_0::<DOT, 1>),
        }
    }
}

/// The bytes from the start of a unit on.
type Bytes = [u8; PADDING];

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
                let $bytes = unsafe { &*start.add(at).cast::<Bytes>() };
                $starts[$r] = at + $body;
            }
        }
    }};
}

/// A mask and where the values of each of its bytes are.
#[derive(Clone, Copy)]
struct Marks {
    mask: u64,
    /// Per byte the bits set in it, and in it and all below: at most 64, so that sums stay within their bytes.
    each: u64,
    up_to: u64,
}

impl Marks {
    /// The mask at `AT`. NEON counts the bits of bytes; a product adds up.
    #[inline]
    #[target_feature(enable = "neon")]
    fn read<const AT: usize>(bytes: &Bytes) -> Self {
        const { assert!(AT + 8 <= PADDING) };
        // SAFETY: the assertion keeps the read inside the array.
        let each = unsafe { vcnt_u8(vld1_u8(bytes.as_ptr().add(AT))) };
        let each = vget_lane_u64::<0>(vreinterpret_u64_u8(each));
        Self { mask: super::mask(&bytes[AT..]), each, up_to: each.wrapping_mul(0x0101_0101_0101_0101) }
    }

    /// Bits set in all.
    fn count(self) -> usize {
        (self.up_to >> 56) as usize
    }

    /// Byte `k` of the mask.
    fn byte(self, k: usize) -> usize {
        (self.mask >> (8 * k)) as usize & 0xff
    }

    /// Bits set below byte `k`: at most 56.
    fn below(self, k: usize) -> usize {
        (self.up_to << 8 >> (8 * k)) as usize & 0xff
    }
}

/// The 16 bytes of values from `from` on.
///
/// # Safety
/// `from` is where values of a unit begin, at most 152: 24 bytes before them and 128 of them.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn values(bytes: &Bytes, from: usize) -> uint8x16_t {
    const { assert!(24 + 128 + 16 <= PADDING) };
    debug_assert!(from <= 24 + 128);
    // SAFETY: by contract and the first assertion the read ends inside the array.
    unsafe { vld1q_u8(bytes.as_ptr().add(from)) }
}

/// Eight numbers of two bytes, put on the places of byte `k` of the mask.
#[inline]
#[target_feature(enable = "neon")]
fn expand_words(bytes: &Bytes, marks: Marks, k: usize) -> uint8x16_t {
    // SAFETY: a BF16 unit has 8 bytes before its values, and at most 56 of two bytes lie below byte `k`; an entry of the
    // table has 16 bytes.
    unsafe { vqtbl1q_u8(values(bytes, 8 + 2 * marks.below(k)), vld1q_u8(WORDS[marks.byte(k)].as_ptr())) }
}

/// The first of `values` put on the places of bytes `2 b` and `2 b + 1` of the mask, zero elsewhere.
#[inline]
#[target_feature(enable = "neon")]
fn expand_bytes(values: uint8x16_t, marks: Marks, b: usize) -> uint8x16_t {
    let first = vdup_n_u8((marks.each >> (16 * b)) as u8);
    // SAFETY: an entry of the table has 8 bytes.
    let (low, high) =
        unsafe { (vld1_u8(BYTES[marks.byte(2 * b)].as_ptr()), vld1_u8(BYTES[marks.byte(2 * b + 1)].as_ptr())) };
    // Places that have no value stay beyond the table: 0x80 and at most 8.
    vqtbl1q_u8(values, vcombine_u8(low, vadd_u8(high, first)))
}

/// The codes of half a Q8_0 block, where the values of its mask begin at `from`.
///
/// # Safety
/// `from` is at most 88: 24 bytes and the 64 values of another mask.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn q8_0_codes(bytes: &Bytes, from: usize, marks: Marks, b: usize) -> int8x16_t {
    // SAFETY: by contract, and at most 48 values lie below byte `2 b`.
    let stored = unsafe { values(bytes, from + marks.below(2 * b)) };
    vreinterpretq_s8_u8(expand_bytes(veorq_u8(stored, vdupq_n_u8(0x80)), marks, b))
}

/// The codes of half `h` of a Q4_0 block less 8, so that the places between them are zero.
#[inline]
#[target_feature(enable = "neon")]
fn q4_0_codes(bytes: &Bytes, marks: Marks, b: usize, h: usize) -> int8x16_t {
    // SAFETY: a Q4_0 unit has 24 bytes before its values, and at most 48 lie below byte `2 b`.
    let stored = unsafe { values(bytes, 24 + marks.below(2 * b)) };
    let nibbles = if h == 0 { vandq_u8(stored, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(stored) };
    vreinterpretq_s8_u8(expand_bytes(vsubq_u8(nibbles, vdupq_n_u8(8)), marks, b))
}

/// As the dense product: pairs of bf16 in 32 bits widen by a shift (even) and by a mask (odd).
#[inline]
#[target_feature(enable = "neon")]
fn dot_bf16<const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let x = x.split().as_chunks::<64>().0;
    let mut acc = [[vdupq_n_f32(0.0); 2]; R];
    for_units!(w, starts, |u, r, bytes| {
        let marks = Marks::read::<0>(bytes);
        for (k, x) in x[u].as_chunks::<32>().0.iter().enumerate() {
            let pairs: [_; 4] = std::array::from_fn(|i| vreinterpretq_u32_u8(expand_words(bytes, marks, 4 * k + i)));
            for (part, x) in x.as_chunks::<4>().0.iter().enumerate() {
                let w = pairs[part % 4];
                let w = if part < 4 { vshlq_n_u32::<16>(w) } else { vandq_u32(w, vdupq_n_u32(0xffff_0000)) };
                // SAFETY: the array has four numbers.
                let x = unsafe { vld1q_f32(x.as_ptr()) };
                acc[r][part % 2] = vfmaq_f32(acc[r][part % 2], vreinterpretq_f32_u32(w), x);
            }
        }
        8 + 2 * marks.count()
    });
    acc.map(|[a, b]| vaddvq_f32(vaddq_f32(a, b)))
}

/// Adds the scaled products of a block with codes `w`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_block<const DOT: bool>(acc: float32x4_t, w: [int8x16_t; 2], q: &[i8; 32], scale: f32) -> float32x4_t {
    // SAFETY: as the caller vouches.
    let t = unsafe {
        let t = dot::<DOT>(vdupq_n_s32(0), w[0], codes::<0>(q));
        dot::<DOT>(t, w[1], codes::<16>(q))
    };
    vfmaq_n_f32(acc, vcvtq_f32_s32(t), scale)
}

/// The scales of the four blocks of a unit, and of the vector.
#[inline]
#[target_feature(enable = "neon")]
fn scales(bytes: &Bytes, d: &[f32; 4]) -> [f32; 4] {
    let mut out = [0.0; 4];
    // SAFETY: both arrays have four numbers.
    unsafe { vst1q_f32(out.as_mut_ptr(), vmulq_f32(halves(stored_scales(bytes)), vld1q_f32(d.as_ptr()))) };
    out
}

/// The scales of the four blocks of a unit, as stored.
fn stored_scales(bytes: &Bytes) -> &[u8; 8] {
    bytes[16..].first_chunk().expect("a unit of blocks begins with 24 bytes")
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot_q8_0<const DOT: bool, const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let (q, d) = (x.int8().q.as_chunks::<32>().0.as_chunks::<4>().0, x.int8().d.as_chunks::<4>().0);
    let mut acc = [vdupq_n_f32(0.0); R];
    for_units!(w, starts, |u, r, bytes| {
        let marks = [Marks::read::<0>(bytes), Marks::read::<8>(bytes)];
        let (second, scales) = (24 + marks[0].count(), scales(bytes, &d[u]));
        for b in 0..4 {
            // SAFETY: the first mask has at most 64 values; the rest as the caller vouches.
            acc[r] = unsafe {
                let w = [q8_0_codes(bytes, 24, marks[0], b), q8_0_codes(bytes, second, marks[1], b)];
                add_block::<DOT>(acc[r], w, &q[u][b], scales[b])
            };
        }
        second + marks[1].count()
    });
    acc.map(|a| vaddvq_f32(a))
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot_q4_0<const DOT: bool, const R: usize>(w: &Bitmap, mut starts: [usize; R], x: &Operand) -> [f32; R] {
    let (q, d) = (x.int8().q.as_chunks::<32>().0.as_chunks::<4>().0, x.int8().d.as_chunks::<4>().0);
    let mut acc = [vdupq_n_f32(0.0); R];
    for_units!(w, starts, |u, r, bytes| {
        let marks = [Marks::read::<0>(bytes), Marks::read::<8>(bytes)];
        let scales = scales(bytes, &d[u]);
        for b in 0..4 {
            let w = [q4_0_codes(bytes, marks[0], b, 0), q4_0_codes(bytes, marks[1], b, 1)];
            // SAFETY: as the caller vouches.
            acc[r] = unsafe { add_block::<DOT>(acc[r], w, &q[u][b], scales[b]) };
        }
        24 + marks[0].count().max(marks[1].count())
    });
    acc.map(|a| vaddvq_f32(a))
}

/// Writes units from `at` on in the dense format until `out`, which takes whole ones, is full; returns where the next one
/// begins.
pub(super) fn unpack(w: &Bitmap, mut at: usize, out: &mut [u8]) -> usize {
    for out in out.chunks_exact_mut(stored_unit(w.format())) {
        let bytes = w.data().get(at..).filter(|_| at <= w.limit()).and_then(|b| b.first_chunk());
        let Some(bytes) = bytes else {
            // 0xffff is a NaN in BF16 and as an f16 scale.
            out.fill(0xff);
            at = usize::MAX;
            continue;
        };
        // SAFETY: NEON is part of AArch64.
        at += unsafe {
            match w.format() {
                Format::Bf16 => unpack_bf16(bytes, out),
                Format::Q8_0 => unpack_q8_0(bytes, out),
                _ => unpack_q4_0(bytes, out),
            }
        };
    }
    at
}

#[inline]
#[target_feature(enable = "neon")]
fn store(out: &mut [u8; 16], v: uint8x16_t) {
    // SAFETY: the array has 16 bytes.
    unsafe { vst1q_u8(out.as_mut_ptr(), v) };
}

#[inline]
#[target_feature(enable = "neon")]
fn unpack_bf16(bytes: &Bytes, out: &mut [u8]) -> usize {
    let marks = Marks::read::<0>(bytes);
    for (k, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        store(out, expand_words(bytes, marks, k));
    }
    8 + 2 * marks.count()
}

#[inline]
#[target_feature(enable = "neon")]
fn unpack_q8_0(bytes: &Bytes, out: &mut [u8]) -> usize {
    let marks = [Marks::read::<0>(bytes), Marks::read::<8>(bytes)];
    let from = [24, 24 + marks[0].count()];
    let scales = stored_scales(bytes).as_chunks::<2>().0;
    for (b, (out, scale)) in out.as_chunks_mut::<34>().0.iter_mut().zip(scales).enumerate() {
        out[..2].copy_from_slice(scale);
        for (h, out) in out[2..].as_chunks_mut::<16>().0.iter_mut().enumerate() {
            // SAFETY: the first mask has at most 64 values.
            store(out, vreinterpretq_u8_s8(unsafe { q8_0_codes(bytes, from[h], marks[h], b) }));
        }
    }
    from[1] + marks[1].count()
}

#[inline]
#[target_feature(enable = "neon")]
fn unpack_q4_0(bytes: &Bytes, out: &mut [u8]) -> usize {
    let marks = [Marks::read::<0>(bytes), Marks::read::<8>(bytes)];
    let scales = stored_scales(bytes).as_chunks::<2>().0;
    for (b, (out, scale)) in out.as_chunks_mut::<18>().0.iter_mut().zip(scales).enumerate() {
        let [low, high] = [0, 1].map(|h| {
            let code = vreinterpretq_u8_s8(q4_0_codes(bytes, marks[h], b, h));
            vaddq_u8(code, vdupq_n_u8(8))
        });
        let (scale_out, code_out) = out.split_first_chunk_mut().expect("a block is longer than its scale");
        *scale_out = *scale;
        let code_out = code_out.first_chunk_mut().expect("a block has 16 bytes of codes");
        store(code_out, vorrq_u8(low, vshlq_n_u8::<4>(high)));
    }
    24 + marks[0].count().max(marks[1].count())
}
