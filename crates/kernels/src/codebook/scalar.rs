//! The readable twins.

use super::{BLOCK, Codebook, entries};
use crate::gemv::Operand;
use half::bf16;

/// Code `pair` of a row.
pub(super) fn code(bits: usize, row: &[u8], pair: usize) -> usize {
    let at = pair * 2 * bits;
    let two = u16::from_le_bytes([row[at / 8], row[at / 8 + 1]]);
    usize::from(two) >> (at % 8) & (entries(bits) - 1)
}

/// Row `row` of `w` times `x`.
pub(super) fn dot(w: &Codebook, row: usize, x: &Operand) -> f32 {
    let (codes, first, x) = (w.row(row), w.first_book(row), x.int8());
    let mut sum = 0.0;
    for b in 0..w.cols().div_ceil(BLOCK) {
        let book = first + b * BLOCK / w.span;
        let (low, high) = w.table(book).split_at(entries(w.bits));
        let weight = |table: &[u8], code: usize| i32::from(table[code]) - 128;
        let dot: i32 = (0..16)
            .map(|j| {
                let code = code(w.bits, codes, 16 * b + j);
                let (p, q) = (x.q[32 * b + j], x.q[32 * b + 16 + j]);
                weight(low, code) * i32::from(p) + weight(high, code) * i32::from(q)
            })
            .sum();
        sum += x.d[b] * w.scale(book) * dot as f32;
    }
    sum
}

/// Columns `start ..` of row `row` in BF16, as many as `out` takes; `start` begins a block.
pub(super) fn unpack(w: &Codebook, row: usize, start: usize, out: &mut [u8]) {
    let (codes, first) = (w.row(row), w.first_book(row));
    for (i, block) in out.chunks_mut(2 * BLOCK).enumerate() {
        let b = start / BLOCK + i;
        let book = first + b * BLOCK / w.span;
        let (low, high) = w.table(book).split_at(entries(w.bits));
        for (j, number) in block.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let code = code(w.bits, codes, 16 * b + j % 16);
            let entry = i32::from(if j < 16 { low[code] } else { high[code] }) - 128;
            *number = bf16::from_f32(entry as f32 * w.scale(book)).to_le_bytes();
        }
    }
}
