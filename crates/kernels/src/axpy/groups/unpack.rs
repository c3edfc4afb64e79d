//! Back to blocks, for a panel of a matrix product.

use super::{GROUP, Groups, LINE, place};
use crate::{Format, Isa};
use std::ops::Range;

/// Writes the blocks of `outputs` (from the start of a unit on) and `inputs` (whole groups) to `out`, output by output.
///
/// # Panics
/// If the ranges do not begin so, or `out` has another length.
pub(crate) fn unpack(isa: Isa, w: &Groups, outputs: Range<usize>, inputs: Range<usize>, out: &mut [u8]) {
    assert!(outputs.start.is_multiple_of(w.unit()) && outputs.end <= w.outputs, "outputs from a unit on");
    assert!(inputs.start.is_multiple_of(GROUP) && inputs.len().is_multiple_of(GROUP), "whole groups");
    let (groups, block) = (inputs.len() / GROUP, w.format.block_bytes());
    assert_eq!(out.len(), outputs.len() * groups * block, "room for all blocks");
    for g in 0..groups {
        let number = inputs.start / GROUP + g;
        for first in outputs.clone().step_by(w.unit()) {
            let live = w.unit().min(outputs.end - first);
            let mut lines = [[0; LINE]; GROUP];
            for (c, line) in lines.iter_mut().enumerate() {
                line.copy_from_slice(&w.row(c * w.groups() + number)[first / w.unit() * LINE..][..LINE]);
            }
            let bytes = by_byte(isa, &lines);
            let scales = &w.scales(number)[2 * first..];
            for o in 0..live {
                let at = ((first - outputs.start + o) * groups + g) * block;
                let (byte, upper) = place(o);
                let to = &mut out[at..at + block];
                to[..2].copy_from_slice(&scales[2 * o..2 * o + 2]);
                put(w.format, &bytes[byte], upper, &mut to[2..]);
            }
        }
    }
}

/// Writes the codes of one output.
#[inline]
fn put(format: Format, codes: &[u8; GROUP], upper: bool, out: &mut [u8]) {
    if format == Format::Q4_0 {
        let (low, high) = codes.split_at(GROUP / 2);
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            *out = if upper { low >> 4 | high & 0xf0 } else { low & 15 | high << 4 };
        }
    } else {
        out.iter_mut().zip(codes).for_each(|(out, code)| *out = code ^ 0x80);
    }
}

/// The bytes of 32 lines, transposed.
fn by_byte(isa: Isa, lines: &[[u8; LINE]; GROUP]) -> [[u8; GROUP]; LINE] {
    let mut out = [[0; GROUP]; LINE];
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() || isa == Isa::Avx2 {
        for half in 0..2 {
            for part in 0..LINE / 16 {
                // SAFETY: SSE2 is part of every x86-64 CPU.
                unsafe { square(lines, half * 16, part * 16, &mut out) };
            }
        }
        return out;
    }
    let _ = isa;
    for (c, line) in lines.iter().enumerate() {
        line.iter().zip(&mut out).for_each(|(byte, out)| out[c] = *byte);
    }
    out
}

/// Transposes the 16 lines from `line` on, bytes from `byte` on: each round interleaves lines that are half of them apart.
///
/// # Safety
/// The CPU must have SSE2.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn square(lines: &[[u8; LINE]; GROUP], line: usize, byte: usize, out: &mut [[u8; GROUP]; LINE]) {
    use std::arch::x86_64::*;
    // SAFETY: 16 bytes are read and written at places that the slices have.
    unsafe {
        let mut rows: [__m128i; 16] =
            std::array::from_fn(|i| _mm_loadu_si128(lines[line + i][byte..byte + 16].as_ptr().cast()));
        for _ in 0..4 {
            let old = rows;
            for i in 0..8 {
                rows[2 * i] = _mm_unpacklo_epi8(old[i], old[i + 8]);
                rows[2 * i + 1] = _mm_unpackhi_epi8(old[i], old[i + 8]);
            }
        }
        for (i, row) in rows.into_iter().enumerate() {
            _mm_storeu_si128(out[byte + i][line..line + 16].as_mut_ptr().cast(), row);
        }
    }
}
