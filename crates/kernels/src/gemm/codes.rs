//! Quantised weights as unsigned codes with scales along the inputs, for the int8 kernels.

use half::f16;

use super::panel::TILE;
use super::{TILE_K, TILE_N};
use crate::Format;
use crate::isa::Isa;

/// `w = scale * (code - zero_point) + offset`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodeLayout {
    /// Scales per 32 inputs.
    pub(crate) groups: usize,
    /// Subtracted from every code.
    pub(crate) zero_point: i32,
    /// True if every scale has an offset beside it.
    pub(crate) has_offsets: bool,
}

impl CodeLayout {
    /// The layout of a quantised format.
    pub(crate) fn of(format: Format) -> Self {
        match format {
            Format::Q8_0 => Self { groups: 1, zero_point: 128, has_offsets: false },
            Format::Q4_0 => Self { groups: 1, zero_point: 8, has_offsets: false },
            Format::Q4K => Self { groups: 1, zero_point: 0, has_offsets: true },
            Format::Q6K => Self { groups: 2, zero_point: 32, has_offsets: false },
            Format::F32 | Format::F16 | Format::Bf16 => unreachable!("int8 arithmetic is chosen for blocks only"),
        }
    }
}

/// Where one row goes, from its first line on: lines of 32 codes are a tile apart, scales 16 numbers.
pub(crate) struct CodeRow<'a> {
    pub(crate) codes: &'a mut [u8],
    pub(crate) scales: &'a mut [f32],
    pub(crate) offsets: &'a mut [f32],
}

impl CodeRow<'_> {
    /// Makes the row zero.
    pub(crate) fn clear(&mut self, tiles: usize, layout: CodeLayout) {
        for t in 0..tiles {
            self.codes[t * TILE..][..TILE_K].fill(0);
        }
        for g in 0..tiles * layout.groups {
            self.scales[g * TILE_N] = 0.0;
            if layout.has_offsets {
                self.offsets[g * TILE_N] = 0.0;
            }
        }
    }
}

/// Splits a stored run into codes, scales and offsets.
pub(crate) fn decode_row(isa: Isa, format: Format, bytes: &[u8], row: &mut CodeRow<'_>) {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() {
        // SAFETY: these instruction sets include all that the decoder uses.
        return unsafe { super::decode512::code_row(format, bytes, row) };
    }
    let _ = isa;
    decode_row_scalar(format, bytes, row);
}

/// The readable twin of the fast decoder.
pub(crate) fn decode_row_scalar(format: Format, bytes: &[u8], row: &mut CodeRow<'_>) {
    let lines = format.block_len() / TILE_K;
    for (i, block) in bytes.chunks_exact(format.block_bytes()).enumerate() {
        for line in 0..lines {
            let t = i * lines + line;
            let codes = &mut row.codes[t * TILE..][..TILE_K];
            match format {
                Format::Q8_0 => {
                    codes.iter_mut().zip(&block[2..]).for_each(|(c, q)| *c = q ^ 0x80);
                    row.scales[t * TILE_N] = scale(block, 0);
                }
                Format::Q4_0 => {
                    for (j, c) in codes.iter_mut().enumerate() {
                        *c = block[2 + j % 16] >> (j / 16 * 4) & 15;
                    }
                    row.scales[t * TILE_N] = scale(block, 0);
                }
                Format::Q4K => {
                    for (c, q) in codes.iter_mut().zip(&block[16 + line / 2 * 32..]) {
                        *c = q >> (line % 2 * 4) & 15;
                    }
                    let (s, m) = scale_min(line, &block[4..16]);
                    row.scales[t * TILE_N] = scale(block, 0) * f32::from(s);
                    row.offsets[t * TILE_N] = -(scale(block, 2) * f32::from(m));
                }
                _ => {
                    let (ql, qh) = (&block[line / 4 * 64 + line % 2 * 32..], &block[128 + line / 4 * 32..]);
                    for (j, c) in codes.iter_mut().enumerate() {
                        *c = (ql[j] >> (line % 4 / 2 * 4) & 15) | ((qh[j] >> (line % 4 * 2) & 3) << 4);
                    }
                    for g in 0..2 {
                        let s = block[192 + line * 2 + g] as i8;
                        row.scales[(t * 2 + g) * TILE_N] = scale(block, 208) * f32::from(s);
                    }
                }
            }
        }
    }
}

/// The f16 at byte `at` of a block.
pub(crate) fn scale(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The 6-bit scale and minimum of sub-block `j` (ggml, `get_scale_min_k4`).
pub(crate) fn scale_min(j: usize, s: &[u8]) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4))
    }
}
