//! F32, F16 and BF16 runs, little-endian, of any alignment.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Values converted at a time through the stack, so that `half` can use the hardware's vector conversion.
const CHUNK: usize = 256;

pub fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *o = f32::from_le_bytes(*b);
    }
}

pub fn encode_f32(values: &[f32], out: &mut [u8]) {
    for (v, o) in values.iter().zip(out.as_chunks_mut::<4>().0) {
        *o = v.to_le_bytes();
    }
}

pub fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut buffer = [f16::ZERO; CHUNK];
    for (bytes, out) in bytes.chunks(2 * CHUNK).zip(out.chunks_mut(CHUNK)) {
        let buffer = &mut buffer[..out.len()];
        for (b, h) in bytes.as_chunks::<2>().0.iter().zip(buffer.iter_mut()) {
            *h = f16::from_le_bytes(*b);
        }
        buffer.convert_to_f32_slice(out);
    }
}

pub fn encode_f16(values: &[f32], out: &mut [u8]) {
    let mut buffer = [f16::ZERO; CHUNK];
    for (values, out) in values.chunks(CHUNK).zip(out.chunks_mut(2 * CHUNK)) {
        let buffer = &mut buffer[..values.len()];
        buffer.convert_from_f32_slice(values);
        for (h, o) in buffer.iter().zip(out.as_chunks_mut::<2>().0) {
            *o = h.to_le_bytes();
        }
    }
}

pub fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    }
}

pub fn encode_bf16(values: &[f32], out: &mut [u8]) {
    for (v, o) in values.iter().zip(out.as_chunks_mut::<2>().0) {
        *o = bf16::from_f32(*v).to_le_bytes();
    }
}
