//! Decoding of the types that have no kernel format (ggml, `ggml-quants.c`, `dequantize_row_*`).

use super::TensorType;
use crate::error::{Error, Result};
use half::f16;
use lacuna_kernels::convert;

/// Decodes a run of whole blocks into one f32 per number.
///
/// # Errors
/// [`Error::Unsupported`] if there is no decoder for `kind`; [`Error::Malformed`] if the lengths do not fit.
pub fn decode_run(kind: TensorType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let blocks = out.len() / kind.block_len();
    if !out.len().is_multiple_of(kind.block_len()) || bytes.len() != blocks * kind.block_bytes() {
        let expected = format!("{} bytes of {}", blocks * kind.block_bytes(), kind.name());
        return Err(Error::malformed(format!("{} bytes for {} numbers", bytes.len(), out.len()), expected));
    }
    if let Some(format) = kind.format() {
        convert::decode_run(format, bytes, out);
        return Ok(());
    }
    let decode: fn(&[u8], &mut [f32]) = match kind {
        TensorType::Q4_1 => q4_1,
        TensorType::Q5_0 => q5_0,
        TensorType::Q5_1 => q5_1,
        TensorType::Q2_K => q2_k,
        TensorType::Q3_K => q3_k,
        TensorType::Q5_K => q5_k,
        _ => return Err(kind.unsupported()),
    };
    for (block, out) in bytes.chunks_exact(kind.block_bytes()).zip(out.chunks_exact_mut(kind.block_len())) {
        decode(block, out);
    }
    Ok(())
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// f16 d, f16 m, 16 bytes of two codes: `d q + m`.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block), half(&block[2..]));
    for (j, q) in block[4..].iter().enumerate() {
        out[j] = d * f32::from(q & 15) + m;
        out[j + 16] = d * f32::from(q >> 4) + m;
    }
}

/// Five-bit codes: the fifth bits of all 32 in `high`, the rest two to a byte.
fn five_bits(high: &[u8], low: &[u8], mut put: impl FnMut(usize, f32)) {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let fifth = |j: usize| (high >> j & 1) as u8 * 16;
    for (j, q) in low.iter().enumerate() {
        put(j, f32::from(q & 15 | fifth(j)));
        put(j + 16, f32::from(q >> 4 | fifth(j + 16)));
    }
}

/// f16 d, u32 fifth bits, 16 bytes: `d (q - 16)`.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half(block);
    five_bits(&block[2..6], &block[6..], |j, q| out[j] = d * (q - 16.0));
}

/// f16 d, f16 m, u32 fifth bits, 16 bytes: `d q + m`.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block), half(&block[2..]));
    five_bits(&block[4..8], &block[8..], |j, q| out[j] = d * q + m);
}

/// 16 bytes of 4-bit scale and minimum, 64 bytes of four 2-bit codes, f16 d, f16 dmin.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half(&block[80..]), half(&block[82..]));
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        let (step, min) = (d * f32::from(scales[i] & 15), dmin * f32::from(scales[i] >> 4));
        let (codes, shift) = two_bits(codes, i);
        for (q, o) in codes.iter().zip(out) {
            *o = step * f32::from(q >> shift & 3) - min;
        }
    }
}

/// The 16 bytes and the shift that hold the 2-bit codes of sub-block `i` of 16 numbers: the first 32 bytes serve the
/// first 128 numbers, 32 of them at each shift.
fn two_bits(codes: &[u8], i: usize) -> (&[u8], usize) {
    let (half, in_half) = (i / 8, i % 8);
    (&codes[32 * half + 16 * (in_half % 2)..][..16], 2 * (in_half / 2))
}

/// 32 bytes of third bits (set: nothing to subtract), 64 bytes of 2-bit codes, 12 bytes of 6-bit scales, f16 d.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, codes, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half(&block[108..]);
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        let low = if i < 8 { scales[i] & 15 } else { scales[i - 8] >> 4 };
        let scale = low | (scales[8 + i % 4] >> (2 * (i / 4)) & 3) << 4;
        let step = d * (f32::from(scale) - 32.0);
        let (codes, shift) = two_bits(codes, i);
        let third = &high[16 * (i % 2)..][..16];
        for ((q, h), o) in codes.iter().zip(third).zip(out) {
            let minus = if h >> (i / 2) & 1 == 1 { 0.0 } else { 4.0 };
            *o = step * (f32::from(q >> shift & 3) - minus);
        }
    }
}

/// As Q4_K with 32 bytes of fifth bits before the codes.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(block), half(&block[2..]));
    let (scales, high, codes) = (&block[4..16], &block[16..48], &block[48..]);
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (sc, m) = convert::k_scale_min(j, scales);
        let (step, min) = (d * f32::from(sc), dmin * f32::from(m));
        let codes = &codes[32 * (j / 2)..][..32];
        for ((q, h), o) in codes.iter().zip(high).zip(out) {
            let q = (q >> (4 * (j % 2)) & 15) + 16 * (h >> j & 1);
            *o = step * f32::from(q) - min;
        }
    }
}
