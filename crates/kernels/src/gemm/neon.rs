//! NEON block kernel: four registers hold one input of 16 rows of activations, 16 hold the sums of 4 outputs.

use std::arch::aarch64::*;

use super::product::Product;
use super::{LANES, TILE_K, TILE_N};

/// Outputs at a time.
const R: usize = 4;

/// Twin: `scalar::f32_block`.
#[target_feature(enable = "neon")]
pub(crate) fn f32_block(p: Product<'_, f32, f32>) {
    p.check();
    for block in 0..p.blocks {
        for n in (0..p.outputs()).step_by(R) {
            // SAFETY: `check` covers every address that the kernel forms for these outputs of this block.
            unsafe { rows(&p, block, n) };
        }
    }
}

/// # Safety
/// `p.check()` holds; the block and outputs `n..n + R` (of one tile) exist.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn rows(p: &Product<'_, f32, f32>, block: usize, n: usize) {
    // SAFETY: the sums, weights and activations of these outputs and the block are inside the slices.
    unsafe {
        let sums = p.sums.as_ptr().cast_mut().add((block * p.outputs() + n) * LANES);
        let mut acc = [[vdupq_n_f32(0.0); 4]; R];
        if !p.first {
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = std::array::from_fn(|h| vld1q_f32(sums.add(r * LANES + h * 4)));
            }
        }
        let mut w = p.w.as_ptr().add(n / TILE_N * p.tiles_k * TILE_N * TILE_K + n % TILE_N * TILE_K);
        let mut x = p.x.as_ptr().add(block * p.x_stride);
        for _ in 0..p.tiles_k {
            for k in 0..TILE_K {
                let xs: [float32x4_t; 4] = std::array::from_fn(|h| vld1q_f32(x.add(k * LANES + h * 4)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    for (sum, x) in acc.iter_mut().zip(xs) {
                        *sum = vfmaq_n_f32(*sum, x, *w.add(r * TILE_K + k));
                    }
                }
            }
            w = w.add(TILE_N * TILE_K);
            x = x.add(TILE_K * LANES);
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (h, sum) in acc.into_iter().enumerate() {
                vst1q_f32(sums.add(r * LANES + h * 4), sum);
            }
        }
    }
}
