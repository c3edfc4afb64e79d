//! The readable twins of the block kernels.

use super::product::Product;
use super::{LANES, TILE_K, TILE_N};

/// f32 weights times f32 activations, one multiply-add per input in order (fused in the SIMD kernels).
pub(crate) fn f32_block(p: Product<'_, f32, f32>) {
    p.check();
    let outputs = p.outputs();
    for block in 0..p.blocks {
        for n in 0..outputs {
            let sums: &mut [f32] = &mut p.sums[(block * outputs + n) * LANES..][..LANES];
            if p.first {
                sums.fill(0.0);
            }
            for t in 0..p.tiles_k {
                let row = &p.w[((n / TILE_N * p.tiles_k + t) * TILE_N + n % TILE_N) * TILE_K..][..TILE_K];
                let x = &p.x[block * p.x_stride + t * TILE_K * LANES..][..TILE_K * LANES];
                for (w, x) in row.iter().zip(x.chunks_exact(LANES)) {
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = multiply_add(*w, *x, *sum);
                    }
                }
            }
        }
    }
}

/// A plain multiply and add: a fused one is a library call on targets without the instruction.
#[inline(always)]
fn multiply_add(w: f32, x: f32, sum: f32) -> f32 {
    sum + w * x
}

/// bf16 weights times bf16 activations, each product exact, summed in f32.
#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) fn bf16_block(p: Product<'_, u16, u16>) {
    p.check();
    let outputs = p.outputs();
    let wide = |v: u16| f32::from_bits(u32::from(v) << 16);
    for block in 0..p.blocks {
        for n in 0..outputs {
            for lane in 0..LANES {
                let sum = &mut p.sums[(block * outputs + n) * LANES + lane];
                let mut s = if p.first { 0.0 } else { *sum };
                for k in 0..p.tiles_k * TILE_K {
                    let (t, kk) = (k / TILE_K, k % TILE_K);
                    let w = p.w[((n / TILE_N * p.tiles_k + t) * TILE_N + n % TILE_N) * TILE_K + kk];
                    let x = p.x[block * p.x_stride + (k / 2 * LANES + lane) * 2 + k % 2];
                    s += wide(w) * wide(x);
                }
                *sum = s;
            }
        }
    }
}

/// Codes times int8 activations: exact integer sums per group of one scale, then one fused multiply-add in f32 (and
/// one for the offset). The SIMD kernels give the same bits.
#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) fn int8_block(p: Product<'_, u8, i8>, s: super::product::Scales<'_>) {
    p.check();
    p.check_scales(&s);
    let outputs = p.outputs();
    let (groups, len) = (p.tiles_k * s.groups, TILE_K / s.groups);
    for block in 0..p.blocks {
        for n in 0..outputs {
            for lane in 0..LANES {
                let out = &mut p.sums[(block * outputs + n) * LANES + lane];
                let mut sum = if p.first { 0.0 } else { *out };
                for g in 0..groups {
                    let mut dot = 0i32;
                    let mut x_sum = 0i32;
                    for k in g * len..(g + 1) * len {
                        let tile = n / TILE_N * p.tiles_k + k / TILE_K;
                        let w = p.w[(tile * TILE_N + n % TILE_N) * TILE_K + k % TILE_K];
                        let x = i32::from(p.x[block * p.x_stride + (k / 4 * LANES + lane) * 4 + k % 4]);
                        dot += (i32::from(w) - s.zero_point) * x;
                        x_sum += x;
                    }
                    let x_scale = s.x[block * p.x_stride / 32 + g * len / 32 * LANES + lane];
                    let at = (n / TILE_N * groups + g) * TILE_N + n % TILE_N;
                    sum = (s.w[at] * x_scale).mul_add(dot as f32, sum);
                    if let Some(offsets) = s.offsets {
                        sum = offsets[at].mul_add(x_sum as f32 * x_scale, sum);
                    }
                }
                *out = sum;
            }
        }
    }
}
