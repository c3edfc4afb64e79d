//! AVX-512 VNNI block kernel: unsigned weight codes times int8 activations, one f32 scale product per group of 32
//! (Q6_K: 16) inputs.
//!
//! The zero point of the codes costs nothing: the integer sum of a group starts at minus zero point times the sum of
//! the activation codes, which was stored with them.

use std::arch::x86_64::*;

use super::avx512::{load_sums, store_sums};
use super::product::{Product, Scales};
use super::{LANES, TILE_K, TILE_N};

const TILE: usize = TILE_N * TILE_K;

/// Twin: `scalar::int8_block`, with the same bits.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(crate) fn int8_block(p: Product<'_, u8, i8>, s: Scales<'_>) {
    p.check();
    p.check_scales(&s);
    let mut block = 0;
    while block < p.blocks {
        // SAFETY: the checks cover every address that the kernel forms for these blocks.
        block += unsafe {
            match (s.groups, s.offsets.is_some()) {
                (1, false) => strips::<1, false>(&p, &s, block),
                (1, true) => strips::<1, true>(&p, &s, block),
                (_, false) => strips::<2, false>(&p, &s, block),
                (_, true) => strips::<2, true>(&p, &s, block),
            }
        };
    }
}

/// # Safety
/// The checks of [`int8_block`] hold and `block` exists.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn strips<const G: usize, const OFFSETS: bool>(p: &Product<'_, u8, i8>, s: &Scales<'_>, block: usize) -> usize {
    // SAFETY: by contract.
    unsafe {
        if p.blocks - block == 1 {
            for n in (0..p.outputs()).step_by(8) {
                rows::<G, OFFSETS, 8, 1>(p, s, block, n);
            }
            return 1;
        }
        // 6 x 2 integer and as many f32 sums, and the factors, just fit into 32 registers.
        for n in (0..p.outputs()).step_by(TILE_N) {
            rows::<G, OFFSETS, 6, 2>(p, s, block, n);
            rows::<G, OFFSETS, 6, 2>(p, s, block, n + 6);
            rows::<G, OFFSETS, 4, 2>(p, s, block, n + 12);
        }
        2
    }
}

/// Outputs `n..n + R` (of one tile) of `V` row blocks.
///
/// # Safety
/// The checks of [`int8_block`] hold; the outputs and blocks `block..block + V` exist.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn rows<const G: usize, const OFFSETS: bool, const R: usize, const V: usize>(
    p: &Product<'_, u8, i8>,
    s: &Scales<'_>,
    block: usize,
    n: usize,
) {
    let step = p.outputs() * LANES;
    let (scale_stride, sum_stride) = (p.x_stride / 32, p.x_stride / 16);
    let zero_point = _mm512_set1_epi32(s.zero_point);
    let tile_n = n / TILE_N * p.tiles_k;
    // SAFETY: everything of these outputs and blocks is inside the slices.
    unsafe {
        let sums = p.sums.as_ptr().cast_mut().add(block * step + n * LANES);
        let mut acc = load_sums::<R, V>(sums, step, p.first);
        let w = p.w.as_ptr().add(tile_n * TILE + n % TILE_N * TILE_K);
        let w_scales = s.w.as_ptr().add(tile_n * G * TILE_N + n % TILE_N);
        let offsets = s.offsets.map_or(std::ptr::null(), |o| o.as_ptr().add(tile_n * G * TILE_N + n % TILE_N));
        let x = p.x.as_ptr().add(block * p.x_stride);
        let x_scales = s.x.as_ptr().add(block * scale_stride);
        let x_sums = s.x_sums.as_ptr().add(block * sum_stride);
        for t in 0..p.tiles_k {
            let (w, x) = (w.add(t * TILE), x.add(t * TILE_K * LANES));
            let x_scale: [__m512; V] =
                std::array::from_fn(|v| _mm512_loadu_ps(x_scales.add(v * scale_stride + t * LANES)));
            for g in 0..G {
                let x_sum = group_sums::<G, V>(x_sums.add((t * 2 + g) * LANES), sum_stride);
                let start: [__m512i; V] = std::array::from_fn(|v| {
                    _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_mullo_epi32(x_sum[v], zero_point))
                });
                let mut dots = [start; R];
                for q in g * (8 / G)..(g + 1) * (8 / G) {
                    let xs: [__m512i; V] =
                        std::array::from_fn(|v| _mm512_loadu_si512(x.add(v * p.x_stride + q * 64).cast()));
                    for (r, dots) in dots.iter_mut().enumerate() {
                        let b = _mm512_set1_epi32(w.add(r * TILE_K + q * 4).cast::<i32>().read_unaligned());
                        for (dot, x) in dots.iter_mut().zip(xs) {
                            *dot = _mm512_dpbusd_epi32(*dot, b, x);
                        }
                    }
                }
                let at = (t * G + g) * TILE_N;
                for r in 0..R {
                    let scale = _mm512_set1_ps(*w_scales.add(at + r));
                    for v in 0..V {
                        let both = _mm512_mul_ps(scale, x_scale[v]);
                        acc[r][v] = _mm512_fmadd_ps(both, _mm512_cvtepi32_ps(dots[r][v]), acc[r][v]);
                    }
                }
                if OFFSETS {
                    for v in 0..V {
                        let x_value = _mm512_mul_ps(_mm512_cvtepi32_ps(x_sum[v]), x_scale[v]);
                        for (r, acc) in acc.iter_mut().enumerate() {
                            acc[v] = _mm512_fmadd_ps(_mm512_set1_ps(*offsets.add(at + r)), x_value, acc[v]);
                        }
                    }
                }
            }
        }
        store_sums(sums, step, &acc);
    }
}

/// Sums of the activation codes of one group: one stored sum of 16, or two.
///
/// # Safety
/// They are readable at `x_sums`, `stride` numbers apart for each block.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn group_sums<const G: usize, const V: usize>(x_sums: *const i32, stride: usize) -> [__m512i; V] {
    std::array::from_fn(|v| {
        // SAFETY: by contract.
        unsafe {
            let first = _mm512_loadu_si512(x_sums.add(v * stride).cast());
            if G == 2 {
                return first;
            }
            _mm512_add_epi32(first, _mm512_loadu_si512(x_sums.add(v * stride + LANES).cast()))
        }
    })
}
