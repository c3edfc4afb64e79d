//! Writes the sums of a tile, `[16 outputs][16 rows]`, to rows of the result.

use super::transpose::transpose16;
use super::{LANES, TILE_N};
use crate::isa::Isa;

/// Where a tile goes: `rows` rows, `stride` numbers apart, of `outputs` numbers each.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) y: *mut f32,
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) outputs: usize,
    /// Adds to what is there.
    pub(crate) accumulate: bool,
}

/// Transposes `tile` into the target.
///
/// # Safety
/// All numbers of the target are writable and nobody else touches them.
pub(crate) unsafe fn store_tile(isa: Isa, tile: &[f32; TILE_N * LANES], to: Target) {
    assert!(to.rows <= LANES && to.outputs <= TILE_N, "a target is at most a tile");
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() {
        // SAFETY: these instruction sets include AVX-512F; the rest by contract.
        return unsafe { avx512(tile, to) };
    }
    let mut square: [u32; TILE_N * LANES] = std::array::from_fn(|i| tile[i].to_bits());
    transpose16(isa, &mut square);
    for (m, line) in square.chunks_exact(TILE_N).take(to.rows).enumerate() {
        // SAFETY: by contract.
        let y = unsafe { std::slice::from_raw_parts_mut(to.y.add(m * to.stride), to.outputs) };
        for (y, s) in y.iter_mut().zip(line) {
            let s = f32::from_bits(*s);
            *y = if to.accumulate { *y + s } else { s };
        }
    }
}

/// # Safety
/// As [`store_tile`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(tile: &[f32; TILE_N * LANES], to: Target) {
    use std::arch::x86_64::*;
    // SAFETY: 16 lines of 16 numbers.
    let square = std::array::from_fn(|i| unsafe { _mm512_loadu_si512(tile.as_ptr().add(i * LANES).cast()) });
    let mask = (u32::from(u16::MAX) >> (TILE_N - to.outputs)) as __mmask16;
    for (m, line) in super::transpose::transpose_registers(square).into_iter().enumerate().take(to.rows) {
        let mut line = _mm512_castsi512_ps(line);
        // SAFETY: by contract; the mask leaves out what is not of the target.
        unsafe {
            let y = to.y.add(m * to.stride);
            if to.accumulate {
                line = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), line);
            }
            _mm512_mask_storeu_ps(y, mask, line);
        }
    }
}
