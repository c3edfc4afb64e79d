//! Back to output-major numbers, for a panel of a matrix product.

use super::{GROUP, Groups, LINE, place};
use crate::{Format, Isa};
use half::f16;
use std::ops::Range;

/// Writes the blocks of `outputs` (from the start of a unit on) and `inputs` (whole groups) to `out`, output by output, for
/// formats with a scale per block.
///
/// # Panics
/// If the ranges do not begin so, or `out` has another length.
pub(crate) fn unpack(isa: Isa, w: &Groups, outputs: Range<usize>, inputs: Range<usize>, out: &mut [u8]) {
    let (groups, bytes) = (inputs.len() / GROUP, w.format.block_bytes());
    assert_eq!(out.len(), outputs.len() * groups * bytes, "room for all blocks");
    each(isa, w, outputs, inputs, |o, g, codes, scale, _| {
        let block = &mut out[(o * groups + g) * bytes..][..bytes];
        block[..2].copy_from_slice(scale);
        if w.format == Format::Q4_0 {
            let (low, high) = codes.split_at(GROUP / 2);
            block[2..].iter_mut().zip(low).zip(high).for_each(|((out, low), high)| *out = low | high << 4);
        } else {
            block[2..].iter_mut().zip(codes).for_each(|(out, code)| *out = code ^ 0x80);
        }
    });
}

/// [`unpack`] for formats with minima: the numbers, each through `put`.
pub(crate) fn unpack_values<T>(
    isa: Isa,
    w: &Groups,
    (outputs, inputs): (Range<usize>, Range<usize>),
    out: &mut [T],
    put: fn(f32) -> T,
) {
    let width = inputs.len();
    assert_eq!(out.len(), outputs.len() * width, "room for all numbers");
    let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
    each(isa, w, outputs, inputs, |o, g, codes, scale, minimum| {
        let (scale, minimum) = (half(scale), half(minimum));
        let out = &mut out[o * width + g * GROUP..][..GROUP];
        out.iter_mut().zip(codes).for_each(|(out, code)| *out = put(f32::from(*code) * scale - minimum));
    });
}

/// Calls `f(output, group, codes, scale, minimum)`, counted from the start of the ranges.
fn each(
    isa: Isa,
    w: &Groups,
    outputs: Range<usize>,
    inputs: Range<usize>,
    mut f: impl FnMut(usize, usize, &[u8; GROUP], &[u8], &[u8]),
) {
    assert!(outputs.start.is_multiple_of(w.unit()) && outputs.end <= w.outputs, "outputs from a unit on");
    assert!(inputs.start.is_multiple_of(GROUP) && inputs.len().is_multiple_of(GROUP), "whole groups");
    for g in 0..inputs.len() / GROUP {
        let number = inputs.start / GROUP + g;
        let (scales, minima) = w.scales(number);
        for first in outputs.clone().step_by(w.unit()) {
            let live = w.unit().min(outputs.end - first);
            let mut lines = [[0; LINE]; GROUP];
            for (c, line) in lines.iter_mut().enumerate() {
                line.copy_from_slice(&w.row(c, number)[first / w.unit() * LINE..][..LINE]);
            }
            let bytes = by_byte(isa, &lines);
            for o in 0..live {
                let (byte, upper) = place(o);
                let codes = match (w.format, upper) {
                    (Format::Q8_0, _) => bytes[byte],
                    (_, false) => bytes[byte].map(|b| b & 15),
                    (_, true) => bytes[byte].map(|b| b >> 4),
                };
                let at = 2 * (first + o);
                let minimum = minima.get(at..at + 2).unwrap_or(&[0, 0]);
                f(first - outputs.start + o, g, &codes, &scales[at..at + 2], minimum);
            }
        }
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
