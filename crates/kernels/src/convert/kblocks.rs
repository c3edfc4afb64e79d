//! Q4_K and Q6_K: super-blocks of 256 numbers whose sub-block scales are themselves quantised.

use super::blocks::{put_scale, scale};
use super::ksearch::{affine_scale, symmetric_scale};

/// Scale and minimum (6 bits each) of sub-block `j` of a Q4_K block, from its 12 packed bytes.
pub fn scale_min(j: usize, s: &[u8]) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
    }
}

fn put_scale_min(j: usize, sc: u8, m: u8, s: &mut [u8]) {
    if j < 4 {
        s[j] = sc;
        s[j + 4] = m;
    } else {
        s[j + 4] = (sc & 15) | (m & 15) << 4;
        s[j - 4] |= (sc >> 4) << 6;
        s[j] |= (m >> 4) << 6;
    }
}

pub fn decode_q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (scale(block), scale(&block[2..]));
    let (scales, codes) = block[4..].split_at(12);
    for (c, out) in out.chunks_exact_mut(64).enumerate() {
        let codes = &codes[32 * c..][..32];
        let (low, high) = out.split_at_mut(32);
        for (out, j, shift) in [(low, 2 * c, 0), (high, 2 * c + 1, 4)] {
            let (sc, m) = scale_min(j, scales);
            let (step, min) = (d * f32::from(sc), dmin * f32::from(m));
            for (q, o) in codes.iter().zip(out) {
                *o = step * f32::from(q >> shift & 15) - min;
            }
        }
    }
}

pub fn encode_q4_k(values: &[f32], block: &mut [u8]) {
    let (mut steps, mut mins) = ([0.0_f32; 8], [0.0_f32; 8]);
    for (j, sub) in values.as_chunks::<32>().0.iter().enumerate() {
        (steps[j], mins[j]) = affine_scale(sub);
    }
    let largest = |v: &[f32; 8]| v.iter().fold(0.0_f32, |m, x| m.max(*x));
    let (d, dmin) = (largest(&steps) / 63.0, largest(&mins) / 63.0);
    block.fill(0);
    put_scale(d, block);
    put_scale(dmin, &mut block[2..]);
    let (d, dmin) = (scale(block), scale(&block[2..]));
    let six_bits = |v: f32, unit: f32| if unit > 0.0 { (v / unit).round().min(63.0) as u8 } else { 0 };
    let (scales, codes) = block[4..].split_at_mut(12);
    for (j, sub) in values.chunks_exact(32).enumerate() {
        let (sc, m) = (six_bits(steps[j], d), six_bits(mins[j], dmin));
        put_scale_min(j, sc, m, scales);
        let (step, min) = (d * f32::from(sc), dmin * f32::from(m));
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        for (v, q) in sub.iter().zip(&mut codes[32 * (j / 2)..]) {
            *q |= (((v + min) * inverse).round().clamp(0.0, 15.0) as u8) << (4 * (j % 2));
        }
    }
}

pub fn decode_q6_k(block: &[u8], out: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, d) = (&rest[..16], scale(&rest[16..]));
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high, scales) = (&low[64 * half..], &high[32 * half..], &scales[8 * half..]);
        // A quarter of the half: which of the low bytes, which nibble of them, which bit pair of the high bytes.
        for (quarter, out) in out.chunks_exact_mut(32).enumerate() {
            let low = &low[32 * (quarter % 2)..][..32];
            for l in 0..32 {
                let q = (low[l] >> (4 * (quarter / 2)) & 15) | (high[l] >> (2 * quarter) & 3) << 4;
                let step = d * f32::from(scales[2 * quarter + l / 16] as i8);
                out[l] = step * (f32::from(q) - 32.0);
            }
        }
    }
}

pub fn encode_q6_k(values: &[f32], block: &mut [u8]) {
    let mut steps = [0.0_f32; 16];
    for (s, sub) in steps.iter_mut().zip(values.as_chunks::<16>().0) {
        *s = symmetric_scale(sub);
    }
    let extreme = steps.iter().fold(0.0_f32, |m, s| if s.abs() > m.abs() { *s } else { m });
    block.fill(0);
    put_scale(extreme / -128.0, &mut block[208..]);
    let d = scale(&block[208..]);
    if d == 0.0 {
        // Too small for an f16 scale: every number becomes zero, whatever the codes.
        return;
    }
    for (j, sub) in values.chunks_exact(16).enumerate() {
        let sc = (steps[j] / d).round().clamp(-128.0, 127.0);
        block[192 + j] = sc as i8 as u8;
        let inverse = if sc == 0.0 { 0.0 } else { 1.0 / (d * sc) };
        for (l, v) in sub.iter().enumerate() {
            let q = ((v * inverse).round().clamp(-32.0, 31.0) + 32.0) as u8;
            let i = 16 * j + l;
            let (half, quarter, byte) = (i / 128, i % 128 / 32, i % 32);
            block[64 * half + 32 * (quarter % 2) + byte] |= (q & 15) << (4 * (quarter / 2));
            block[128 + 32 * half + byte] |= (q >> 4) << (2 * quarter);
        }
    }
}
