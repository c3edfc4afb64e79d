//! Looking for NaN and infinity in stored numbers without decoding them.

use crate::Format;

/// Bits of an f16, bf16 or f32 that are all set in NaN and infinity, and in nothing else.
const F16: u16 = 0x7C00;
const BF16: u16 = 0x7F80;
const F32: u32 = 0x7F80_0000;

/// Blocks looked at together: their answers are joined without a branch, which vectorises.
const GROUP: usize = 1024;

/// Index of the first number of `run` that is NaN or infinite; for block formats, of the first number of the first block
/// with such a scale.
///
/// # Panics
/// If `run` is no whole number of blocks long.
pub fn first_non_finite(format: Format, run: &[u8]) -> Option<usize> {
    assert!(run.len().is_multiple_of(format.block_bytes()), "a part of a {} block", format.name());
    let half = |b: &[u8], at: usize, mask: u16| u16::from_le_bytes([b[at], b[at + 1]]) & mask == mask;
    let block = match format {
        Format::F32 => first::<4>(run, |b| u32::from_le_bytes(*b) & F32 == F32),
        Format::F16 => first::<2>(run, |b| u16::from_le_bytes(*b) & F16 == F16),
        Format::Bf16 => first::<2>(run, |b| u16::from_le_bytes(*b) & BF16 == BF16),
        Format::Q8_0 => first::<34>(run, |b| half(b, 0, F16)),
        Format::Q4_0 => first::<18>(run, |b| half(b, 0, F16)),
        Format::Q4K => first::<144>(run, |b| half(b, 0, F16) | half(b, 2, F16)),
        Format::Q6K => first::<210>(run, |b| half(b, 208, F16)),
    };
    block.map(|b| b * format.block_len())
}

fn first<const N: usize>(run: &[u8], bad: impl Fn(&[u8; N]) -> bool) -> Option<usize> {
    let blocks = run.as_chunks::<N>().0;
    let group = blocks.chunks(GROUP).position(|g| g.iter().fold(false, |any, b| any | bad(b)))?;
    let start = group * GROUP;
    blocks[start..].iter().position(bad).map(|i| start + i)
}
