//! The readable twin: units one after the other, values in the order of their bits.

use super::pack::unit_bytes;
use super::{Bitmap, mask};
use crate::Format;
use crate::gemv::Operand;
use half::{bf16, f16};

/// Row `row` of `w` times `x`; NaN if the row leads outside the bytes.
pub(super) fn dot(w: &Bitmap, row: usize, x: &Operand) -> f32 {
    let (mut at, mut sum) = (w.start(row), 0.0);
    for u in 0..w.units() {
        if at > w.limit() {
            return f32::NAN;
        }
        let bytes = &w.data()[at..];
        let mut masks = [mask(bytes), 0];
        sum += match w.format() {
            Format::Bf16 => bf16_unit(bytes, masks[0], &x.split()[u * 64..]),
            Format::Q8_0 => q8_0_unit(bytes, masks[0], u, x),
            _ => {
                masks[1] = mask(&bytes[8..]);
                q4_0_unit(bytes, masks, u, x)
            }
        };
        at += unit_bytes(w.format(), masks);
    }
    sum
}

/// The columns whose bits are set, ascending.
fn columns(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let column = mask.trailing_zeros() as usize;
        (mask != 0).then(|| mask &= mask - 1).map(|()| column)
    })
}

fn bf16_unit(bytes: &[u8], mask: u64, split: &[f32]) -> f32 {
    let values = bytes[8..].as_chunks::<2>().0;
    let x = |c: usize| split[c / 32 * 32 + c % 32 / 2 + 16 * (c % 2)];
    columns(mask).zip(values).map(|(c, v)| bf16::from_le_bytes(*v).to_f32() * x(c)).sum()
}

fn scale(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn q8_0_unit(bytes: &[u8], mask: u64, u: usize, x: &Operand) -> f32 {
    let x = x.int8();
    let mut dots = [0; 2];
    for (c, v) in columns(mask).zip(&bytes[12..]) {
        dots[c / 32] += (i32::from(*v) - 128) * i32::from(x.q[u * 64 + c]);
    }
    (0..2).map(|b| scale(&bytes[8 + 2 * b..]) * x.d[u * 2 + b] * dots[b] as f32).sum()
}

fn q4_0_unit(bytes: &[u8], masks: [u64; 2], u: usize, x: &Operand) -> f32 {
    let x = x.int8();
    let mut dots = [0; 4];
    for (half, mask) in masks.into_iter().enumerate() {
        for (c, v) in columns(mask).zip(&bytes[24..]) {
            let (block, column) = (c / 16, c / 16 * 32 + half * 16 + c % 16);
            dots[block] += (i32::from(v >> (4 * half) & 15) - 8) * i32::from(x.q[u * 128 + column]);
        }
    }
    (0..4).map(|b| scale(&bytes[16 + 2 * b..]) * x.d[u * 4 + b] * dots[b] as f32).sum()
}
