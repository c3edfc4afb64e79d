//! `y += value * row` in plain Rust: the reference of the other instruction sets.

use crate::{Format, convert};
use half::f16;

/// Adds `value` times the run `row` of `y.len()` numbers.
pub(super) fn add(format: Format, row: &[u8], value: f32, y: &mut [f32]) {
    match format {
        Format::Q8_0 => add_q8_0(row, value, y),
        Format::Q4_0 => add_q4_0(row, value, y),
        _ => add_decoded(format, row, y, |w, y| y + value * w),
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Block formats scale the value first (`(value * d) * q`), as the wide kernels do.
fn add_q8_0(row: &[u8], value: f32, y: &mut [f32]) {
    for (block, y) in row.chunks_exact(34).zip(y.chunks_exact_mut(32)) {
        let scaled = value * half(block);
        for (&q, y) in block[2..].iter().zip(y) {
            *y += scaled * f32::from(q as i8);
        }
    }
}

fn add_q4_0(row: &[u8], value: f32, y: &mut [f32]) {
    for (block, y) in row.chunks_exact(18).zip(y.chunks_exact_mut(32)) {
        let scaled = value * half(block);
        let (low, high) = y.split_at_mut(16);
        for ((&q, low), high) in block[2..].iter().zip(low).zip(high) {
            *low += scaled * (f32::from(q & 15) - 8.0);
            *high += scaled * (f32::from(q >> 4) - 8.0);
        }
    }
}

/// Decodes the run piece by piece and replaces every output by `step(weight, output)`.
#[inline(always)]
pub(super) fn add_decoded(format: Format, row: &[u8], y: &mut [f32], step: impl Fn(f32, f32) -> f32) {
    const RUN: usize = 256;
    let mut weights = [0.0; RUN];
    let bytes = RUN / format.block_len() * format.block_bytes();
    for (row, y) in row.chunks(bytes).zip(y.chunks_mut(RUN)) {
        let weights = &mut weights[..y.len()];
        convert::decode_run(format, row, weights);
        for (w, y) in weights.iter().zip(y) {
            *y = step(*w, *y);
        }
    }
}
