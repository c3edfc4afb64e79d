//! Q8_0 and Q4_0: blocks of 32 numbers with one f16 scale.

use half::f16;

/// The f16 at the start of `bytes`, widened.
pub fn scale(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Stores `d` as f16 at the start of `out`.
pub fn put_scale(d: f32, out: &mut [u8]) {
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

pub fn decode_q8_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block);
    for (q, o) in block[2..].iter().zip(out) {
        *o = d * f32::from(*q as i8);
    }
}

pub fn encode_q8_0(values: &[f32], block: &mut [u8]) {
    let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let d = largest / 127.0;
    let id = inverse(d);
    put_scale(d, block);
    for (v, q) in values.iter().zip(&mut block[2..]) {
        *q = (v * id).round() as i8 as u8;
    }
}

pub fn decode_q4_0(block: &[u8], out: &mut [f32]) {
    let d = scale(block);
    let (low, high) = out.split_at_mut(16);
    for ((q, l), h) in block[2..].iter().zip(low).zip(high) {
        *l = d * (f32::from(q & 15) - 8.0);
        *h = d * (f32::from(q >> 4) - 8.0);
    }
}

pub fn encode_q4_0(values: &[f32], block: &mut [u8]) {
    let largest = values.iter().fold(0.0_f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = largest / -8.0;
    let id = inverse(d);
    put_scale(d, block);
    let code = |v: f32| ((v * id + 8.5) as u8).min(15);
    let (low, high) = values.split_at(16);
    for ((l, h), q) in low.iter().zip(high).zip(&mut block[2..]) {
        *q = code(*l) | code(*h) << 4;
    }
}
