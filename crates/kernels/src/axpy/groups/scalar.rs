//! Sums over groups in plain Rust: the reference of the other instruction sets.

use super::{Groups, LINE, Operand, place};
use crate::Format;
use half::f16;
use std::ops::Range;

/// See [`super::add`].
pub(super) fn add(w: &Groups, x: &Operand, range: Range<usize>, first: usize, y: &mut [f32]) {
    for g in range {
        let (group, quads) = x.group(g);
        let scales = w.scales(group.number as usize);
        for (o, y) in y.iter_mut().enumerate() {
            let o = first + o;
            let (byte, upper) = place(o % w.unit());
            let at = o / w.unit() * LINE + byte;
            let mut sum = group.bias;
            for quad in quads {
                for (&row, &q) in quad.rows.iter().zip(&quad.q) {
                    let code = w.row(row as usize)[at];
                    let code = if w.format == Format::Q4_0 { code >> (4 * u8::from(upper)) & 15 } else { code };
                    sum += i32::from(code) * i32::from(q);
                }
            }
            let scale = f16::from_le_bytes([scales[2 * o], scales[2 * o + 1]]).to_f32();
            *y = (sum as f32 * group.d).mul_add(scale, *y);
        }
    }
}
