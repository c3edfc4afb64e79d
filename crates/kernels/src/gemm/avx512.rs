//! AVX-512 block kernels for f32 and BF16: a register holds one input (or pair) of 16 rows of activations, a weight
//! is broadcast, and up to 24 registers hold sums.

use std::arch::x86_64::*;

use super::product::Product;
use super::{LANES, TILE_K, TILE_N};

const TILE: usize = TILE_N * TILE_K;

/// Twin: `scalar::f32_block`.
#[target_feature(enable = "avx512f")]
pub(crate) fn f32_block(p: Product<'_, f32, f32>) {
    p.check();
    let mut block = 0;
    while block < p.blocks {
        // SAFETY: `check` covers every address that the kernel forms for these blocks.
        block += unsafe {
            match p.blocks - block {
                1 => f32_strip::<16, 1>(&p, block),
                2 | 4 => f32_strip::<8, 2>(&p, block),
                _ => f32_strip::<8, 3>(&p, block),
            }
        };
    }
}

/// All outputs of `V` row blocks, `R` outputs at a time; returns `V`.
///
/// # Safety
/// `p.check()` holds and blocks `block..block + V` exist.
#[target_feature(enable = "avx512f")]
unsafe fn f32_strip<const R: usize, const V: usize>(p: &Product<'_, f32, f32>, block: usize) -> usize {
    let step = p.outputs() * LANES;
    for n in (0..p.outputs()).step_by(R) {
        // SAFETY: the sums, weights and activations of these outputs and blocks are inside the slices.
        unsafe {
            let sums = p.sums.as_ptr().cast_mut().add(block * step + n * LANES);
            let mut acc = load_sums::<R, V>(sums, step, p.first);
            let mut w = p.w.as_ptr().add(n / TILE_N * p.tiles_k * TILE + n % TILE_N * TILE_K);
            let mut x = p.x.as_ptr().add(block * p.x_stride);
            for _ in 0..p.tiles_k {
                for k in 0..TILE_K {
                    let xs: [__m512; V] = std::array::from_fn(|v| _mm512_loadu_ps(x.add(v * p.x_stride + k * LANES)));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let b = _mm512_set1_ps(*w.add(r * TILE_K + k));
                        for (sum, x) in acc.iter_mut().zip(xs) {
                            *sum = _mm512_fmadd_ps(b, x, *sum);
                        }
                    }
                }
                w = w.add(TILE);
                x = x.add(TILE_K * LANES);
            }
            store_sums(sums, step, &acc);
        }
    }
    V
}

/// Twin: `scalar::bf16_block`. The dot instruction treats subnormals as zero and sums a pair in its own order.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn bf16_block(p: Product<'_, u16, u16>) {
    p.check();
    let mut block = 0;
    while block < p.blocks {
        // SAFETY: `check` covers every address that the kernel forms for these blocks.
        block += unsafe {
            match p.blocks - block {
                1 => bf16_strip::<16, 1>(&p, block),
                2 | 4 => bf16_strip::<8, 2>(&p, block),
                _ => bf16_strip::<8, 3>(&p, block),
            }
        };
    }
}

/// All outputs of `V` row blocks, `R` outputs at a time; returns `V`.
///
/// # Safety
/// As [`f32_strip`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_strip<const R: usize, const V: usize>(p: &Product<'_, u16, u16>, block: usize) -> usize {
    let step = p.outputs() * LANES;
    for n in (0..p.outputs()).step_by(R) {
        // SAFETY: the sums, weights and activations of these outputs and blocks are inside the slices.
        unsafe {
            let sums = p.sums.as_ptr().cast_mut().add(block * step + n * LANES);
            let mut acc = load_sums::<R, V>(sums, step, p.first);
            let mut w = p.w.as_ptr().add(n / TILE_N * p.tiles_k * TILE + n % TILE_N * TILE_K);
            let mut x = p.x.as_ptr().add(block * p.x_stride);
            for _ in 0..p.tiles_k {
                for k in (0..TILE_K).step_by(2) {
                    let xs: [__m512bh; V] = std::array::from_fn(|v| {
                        std::mem::transmute(_mm512_loadu_si512(x.add(v * p.x_stride + k * LANES).cast()))
                    });
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let pair = w.add(r * TILE_K + k).cast::<i32>().read_unaligned();
                        let b: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                        for (sum, x) in acc.iter_mut().zip(xs) {
                            *sum = _mm512_dpbf16_ps(*sum, b, x);
                        }
                    }
                }
                w = w.add(TILE);
                x = x.add(TILE_K * LANES);
            }
            store_sums(sums, step, &acc);
        }
    }
    V
}

/// Sums of `R` outputs, 16 numbers apart, of `V` blocks, `step` numbers apart.
///
/// # Safety
/// All of them are readable at `sums`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn load_sums<const R: usize, const V: usize>(
    sums: *const f32,
    step: usize,
    first: bool,
) -> [[__m512; V]; R] {
    if first {
        return [[_mm512_setzero_ps(); V]; R];
    }
    // SAFETY: by contract.
    std::array::from_fn(|r| std::array::from_fn(|v| unsafe { _mm512_loadu_ps(sums.add(v * step + r * LANES)) }))
}

/// # Safety
/// All sums are writable at `sums`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store_sums<const R: usize, const V: usize>(sums: *mut f32, step: usize, acc: &[[__m512; V]; R]) {
    for (r, acc) in acc.iter().enumerate() {
        for (v, &sum) in acc.iter().enumerate() {
            // SAFETY: by contract.
            unsafe { _mm512_storeu_ps(sums.add(v * step + r * LANES), sum) };
        }
    }
}
