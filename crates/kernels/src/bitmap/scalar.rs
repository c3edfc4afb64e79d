//! The readable twins: units one after the other, values in the order of their bits.

use super::pack::{stored_unit, unit_bytes};
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
            format => {
                masks[1] = mask(&bytes[8..]);
                block_unit(format, bytes, masks, u, x)
            }
        };
        at += unit_bytes(w.format(), masks.map(|m| m.count_ones() as usize));
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

fn block_unit(format: Format, bytes: &[u8], masks: [u64; 2], u: usize, x: &Operand) -> f32 {
    let x = x.int8();
    let mut dots = [0; 4];
    for (half, mask) in masks.into_iter().enumerate() {
        let first = if format == Format::Q8_0 && half == 1 { 24 + masks[0].count_ones() as usize } else { 24 };
        for (c, v) in columns(mask).zip(&bytes[first..]) {
            let (block, column) = (c / 16, c / 16 * 32 + half * 16 + c % 16);
            let code = if format == Format::Q8_0 { i32::from(*v) - 128 } else { i32::from(v >> (4 * half) & 15) - 8 };
            dots[block] += code * i32::from(x.q[u * 128 + column]);
        }
    }
    (0..4).map(|b| scale(&bytes[16 + 2 * b..]) * x.d[u * 4 + b] * dots[b] as f32).sum()
}

/// Writes units from `at` on in the dense format until `out` is full; returns where the next one begins.
pub(super) fn unpack(w: &Bitmap, mut at: usize, out: &mut [u8]) -> usize {
    for out in out.chunks_mut(stored_unit(w.format())) {
        at = unpack_unit(w, at, out);
    }
    at
}

/// Writes one unit; returns where the next one begins.
fn unpack_unit(w: &Bitmap, at: usize, out: &mut [u8]) -> usize {
    if at > w.limit() {
        // 0xffff is a NaN in BF16 and as an f16 scale.
        out.fill(0xff);
        return usize::MAX;
    }
    let bytes = &w.data()[at..];
    let mut masks = [mask(bytes), 0];
    match w.format() {
        Format::Bf16 => {
            let mut values = bytes[8..].as_chunks::<2>().0.iter();
            for (i, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *out = if masks[0] >> i & 1 == 1 { values.next().copied().unwrap_or_default() } else { [0; 2] };
            }
        }
        Format::Q8_0 => {
            masks[1] = mask(&bytes[8..]);
            let second = 24 + masks[0].count_ones() as usize;
            let mut values = [bytes[24..].iter(), bytes[second..].iter()];
            for (b, block) in out.as_chunks_mut::<34>().0.iter_mut().enumerate() {
                block[..2].copy_from_slice(&bytes[16 + 2 * b..][..2]);
                for (i, q) in block[2..].iter_mut().enumerate() {
                    let kept = masks[i / 16] >> (b * 16 + i % 16) & 1 == 1;
                    *q = if kept { values[i / 16].next().copied().unwrap_or_default() ^ 0x80 } else { 0 };
                }
            }
        }
        _ => {
            masks[1] = mask(&bytes[8..]);
            let (mut low, mut high) = (bytes[24..].iter(), bytes[24..].iter());
            for (b, block) in out.as_chunks_mut::<18>().0.iter_mut().enumerate() {
                block[..2].copy_from_slice(&bytes[16 + 2 * b..][..2]);
                for (i, q) in block[2..].iter_mut().enumerate() {
                    let bit = b * 16 + i;
                    let l = if masks[0] >> bit & 1 == 1 { low.next().map_or(0, |v| v & 15) } else { 8 };
                    let h = if masks[1] >> bit & 1 == 1 { high.next().map_or(0, |v| v >> 4) } else { 8 };
                    *q = l | h << 4;
                }
            }
        }
    }
    at + unit_bytes(w.format(), masks.map(|m| m.count_ones() as usize))
}
