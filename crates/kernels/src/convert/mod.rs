//! One run of numbers from and to its stored form.
//!
//! Decoding follows ggml bit for bit (block definitions and decoding rules: ggml, `ggml-common.h`, `ggml-quants.c`);
//! a product of a scale and a code is rounded once to f32, as there. Encoding F32, F16, BF16, Q8_0 and Q4_0 follows the
//! reference rules of the same file; Q4_K and Q6_K use the same kind of search and are not bit-identical to it, which
//! readers cannot tell apart from any other encoder.

mod blocks;
mod finite;
mod floats;
mod kblocks;
mod ksearch;

pub use finite::first_non_finite;
pub use kblocks::scale_min as k_scale_min;

use crate::Format;

/// Decodes one stored run into `out`, one f32 per number. Decoding is exact: F16 subnormals and every scale included.
///
/// # Panics
/// If `bytes` is not exactly `format.run_bytes(out.len())` long.
pub fn decode_run(format: Format, bytes: &[u8], out: &mut [f32]) {
    check(format, bytes.len(), out.len());
    match format {
        Format::F32 => floats::decode_f32(bytes, out),
        Format::F16 => floats::decode_f16(bytes, out),
        Format::Bf16 => floats::decode_bf16(bytes, out),
        Format::Q8_0 => each_block(format, bytes, out, blocks::decode_q8_0),
        Format::Q4_0 => each_block(format, bytes, out, blocks::decode_q4_0),
        Format::Q4K => each_block(format, bytes, out, kblocks::decode_q4_k),
        Format::Q6K => each_block(format, bytes, out, kblocks::decode_q6_k),
    }
}

/// Encodes `values` as one run into `out`. F16 and BF16 round to nearest even and keep NaN (quiet); block formats expect
/// finite values (others give an arbitrary code, never a panic).
///
/// # Panics
/// If `out` is not exactly `format.run_bytes(values.len())` long.
pub fn encode_run(format: Format, values: &[f32], out: &mut [u8]) {
    check(format, out.len(), values.len());
    match format {
        Format::F32 => floats::encode_f32(values, out),
        Format::F16 => floats::encode_f16(values, out),
        Format::Bf16 => floats::encode_bf16(values, out),
        Format::Q8_0 => each_block_mut(format, values, out, blocks::encode_q8_0),
        Format::Q4_0 => each_block_mut(format, values, out, blocks::encode_q4_0),
        Format::Q4K => each_block_mut(format, values, out, kblocks::encode_q4_k),
        Format::Q6K => each_block_mut(format, values, out, kblocks::encode_q6_k),
    }
}

fn check(format: Format, bytes: usize, n: usize) {
    assert_eq!(Some(bytes), format.run_bytes(n), "a {} run of {n} numbers has another length in bytes", format.name());
}

fn each_block(format: Format, bytes: &[u8], out: &mut [f32], decode: impl Fn(&[u8], &mut [f32])) {
    let blocks = bytes.chunks_exact(format.block_bytes());
    for (block, values) in blocks.zip(out.chunks_exact_mut(format.block_len())) {
        decode(block, values);
    }
}

fn each_block_mut(format: Format, values: &[f32], out: &mut [u8], encode: impl Fn(&[f32], &mut [u8])) {
    let blocks = out.chunks_exact_mut(format.block_bytes());
    for (block, values) in blocks.zip(values.chunks_exact(format.block_len())) {
        encode(values, block);
    }
}

#[cfg(test)]
mod tests;
