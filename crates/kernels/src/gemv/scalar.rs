//! Dot products of one row in plain Rust: the reference of the other instruction sets.

use super::operand::{BLOCK, Int8, Operand};
use crate::Format;
use half::{bf16, f16};

/// `row · x` for a run of `x.len()` numbers.
pub(super) fn dot(format: Format, row: &[u8], x: &Operand) -> f32 {
    match format {
        Format::F32 => dot_plain::<4>(row, x, f32::from_le_bytes),
        Format::F16 => dot_plain::<2>(row, x, |b| f16::from_le_bytes(b).to_f32()),
        Format::Bf16 => dot_bf16(row, x),
        Format::Q8_0 => dot_q8_0(row, x.int8()),
        Format::Q4_0 => dot_q4_0(row, x.int8()),
        Format::Q4K => dot_q4k(row, x.int8()),
        Format::Q6K => dot_q6k(row, x.int8()),
    }
}

fn dot_plain<const BYTES: usize>(row: &[u8], x: &Operand, widen: impl Fn([u8; BYTES]) -> f32) -> f32 {
    let numbers = row.as_chunks::<BYTES>().0;
    numbers.iter().zip(x.plain()).map(|(b, x)| widen(*b) * x).sum()
}

fn dot_bf16(row: &[u8], x: &Operand) -> f32 {
    let mut sum = 0.0;
    for (i, b) in row.as_chunks::<2>().0.iter().enumerate() {
        let (block, j) = (i / BLOCK, i % BLOCK);
        sum += bf16::from_le_bytes(*b).to_f32() * x.split()[block * BLOCK + j / 2 + 16 * (j % 2)];
    }
    sum
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn dot_q8_0(row: &[u8], x: &Int8) -> f32 {
    let mut sum = 0.0;
    for (b, block) in row.chunks_exact(34).enumerate() {
        let q = &x.q[b * BLOCK..][..BLOCK];
        let dot: i32 = block[2..].iter().zip(q).map(|(&w, &x)| i32::from(w as i8) * i32::from(x)).sum();
        sum += half(block) * x.d[b] * dot as f32;
    }
    sum
}

fn dot_q4_0(row: &[u8], x: &Int8) -> f32 {
    let mut sum = 0.0;
    for (b, block) in row.chunks_exact(18).enumerate() {
        let (low, high) = x.q[b * BLOCK..][..BLOCK].split_at(16);
        let mut dot = 0;
        for (j, &w) in block[2..].iter().enumerate() {
            dot += (i32::from(w & 15) - 8) * i32::from(low[j]) + (i32::from(w >> 4) - 8) * i32::from(high[j]);
        }
        sum += half(block) * x.d[b] * dot as f32;
    }
    sum
}

/// The eight 6-bit scales and the eight 6-bit minima of a Q4_K super-block, each as bytes of a u64 (lowest first).
/// Always inlined: a call amid a wide kernel spills all its registers.
#[inline(always)]
pub(crate) fn q4k_scales(s: &[u8]) -> (u64, u64) {
    let word = |i: usize| u32::from_le_bytes([s[i], s[i + 1], s[i + 2], s[i + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let upper = |w: u32| (w >> 2) & 0x3030_3030;
    let scales = u64::from(a & 0x3f3f_3f3f) | u64::from((c & 0x0f0f_0f0f) | upper(a)) << 32;
    let minima = u64::from(b & 0x3f3f_3f3f) | u64::from(((c >> 4) & 0x0f0f_0f0f) | upper(b)) << 32;
    (scales, minima)
}

fn dot_q4k(row: &[u8], x: &Int8) -> f32 {
    let mut sum = 0.0;
    for (s, block) in row.chunks_exact(144).enumerate() {
        let (d, dmin) = (half(block), half(&block[2..]));
        let (scales, minima) = q4k_scales(&block[4..16]);
        let (scales, minima) = (scales.to_le_bytes(), minima.to_le_bytes());
        for j in 0..8 {
            let b = s * 8 + j;
            let q = &x.q[b * BLOCK..][..BLOCK];
            let codes = &block[16 + j / 2 * 32..][..32];
            let dot: i32 = codes.iter().zip(q).map(|(&w, &x)| i32::from(w >> (j % 2 * 4) & 15) * i32::from(x)).sum();
            sum += d * f32::from(scales[j]) * x.d[b] * dot as f32;
            sum -= dmin * f32::from(minima[j]) * x.sum[b];
        }
    }
    sum
}

fn dot_q6k(row: &[u8], x: &Int8) -> f32 {
    let mut sum = 0.0;
    for (s, block) in row.chunks_exact(210).enumerate() {
        let d = half(&block[208..]);
        for g in 0..16 {
            let scale = f32::from(block[192 + g] as i8);
            let mut dot = 0;
            for e in g * 16..(g + 1) * 16 {
                dot += q6k_code(block, e) * i32::from(x.q[s * 256 + e]);
            }
            sum += d * scale * x.d[s * 8 + g / 2] * dot as f32;
        }
    }
    sum
}

/// Code of element `e` of a Q6_K super-block, -32 to 31.
fn q6k_code(block: &[u8], e: usize) -> i32 {
    let (half, quarter, l) = (e / 128, e % 128 / 32, e % 32);
    let low = block[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
    let high = block[128 + half * 32 + l] >> (quarter * 2) & 3;
    i32::from(low | high << 4) - 32
}
