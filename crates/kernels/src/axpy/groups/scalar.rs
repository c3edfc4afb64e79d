//! Sums over groups in plain Rust: the reference of the other instruction sets.

use super::{Groups, LINE, Operand, place};
use crate::Format;
use half::f16;
use std::ops::Range;

/// See [`super::add`].
pub(super) fn add(w: &Groups, x: &Operand, range: Range<usize>, first: usize, y: &mut [f32]) {
    for g in range {
        let (group, quads) = x.group(g);
        let (scales, minima) = w.scales(group.number as usize);
        let half = |from: &[u8], o: usize| f16::from_le_bytes([from[2 * o], from[2 * o + 1]]).to_f32();
        for (o, y) in y.iter_mut().enumerate() {
            let o = first + o;
            let (byte, upper) = place(o % w.unit());
            let at = o / w.unit() * LINE + byte;
            let mut sum = group.bias;
            for quad in quads {
                for (&c, &q) in quad.channels.iter().zip(&quad.q) {
                    let code = w.row(c.into(), group.number as usize)[at];
                    let code = if w.format == Format::Q8_0 { code } else { code >> (4 * u8::from(upper)) & 15 };
                    sum += i32::from(code) * i32::from(q);
                }
            }
            *y = (sum as f32 * group.d).mul_add(half(scales, o), *y);
            if !minima.is_empty() {
                *y = (-group.sum).mul_add(half(minima, o), *y);
            }
        }
    }
}
