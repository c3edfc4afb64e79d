//! AVX2 block kernel: two registers hold one input of 16 rows of activations, up to 12 hold the sums of 6 outputs.

use std::arch::x86_64::*;

use super::product::Product;
use super::{LANES, TILE_K, TILE_N};

/// Twin: `scalar::f32_block`.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn f32_block(p: Product<'_, f32, f32>) {
    p.check();
    for block in 0..p.blocks {
        for tile in 0..p.tiles_n {
            // SAFETY: `check` covers every address that the kernel forms for these 16 outputs.
            unsafe {
                rows::<6>(&p, block, tile * TILE_N);
                rows::<6>(&p, block, tile * TILE_N + 6);
                rows::<4>(&p, block, tile * TILE_N + 12);
            }
        }
    }
}

/// Outputs `n..n + R` (of one tile) of one row block.
///
/// # Safety
/// `p.check()` holds; the block and the outputs exist.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const R: usize>(p: &Product<'_, f32, f32>, block: usize, n: usize) {
    // SAFETY: the sums, weights and activations of these outputs and the block are inside the slices.
    unsafe {
        let sums = p.sums.as_ptr().cast_mut().add((block * p.outputs() + n) * LANES);
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        if !p.first {
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = std::array::from_fn(|h| _mm256_loadu_ps(sums.add(r * LANES + h * 8)));
            }
        }
        let mut w = p.w.as_ptr().add(n / TILE_N * p.tiles_k * TILE_N * TILE_K + n % TILE_N * TILE_K);
        let mut x = p.x.as_ptr().add(block * p.x_stride);
        for _ in 0..p.tiles_k {
            for k in 0..TILE_K {
                let (low, high) = (_mm256_loadu_ps(x.add(k * LANES)), _mm256_loadu_ps(x.add(k * LANES + 8)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let b = _mm256_broadcast_ss(&*w.add(r * TILE_K + k));
                    acc[0] = _mm256_fmadd_ps(b, low, acc[0]);
                    acc[1] = _mm256_fmadd_ps(b, high, acc[1]);
                }
            }
            w = w.add(TILE_N * TILE_K);
            x = x.add(TILE_K * LANES);
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (h, sum) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(sums.add(r * LANES + h * 8), sum);
            }
        }
    }
}
