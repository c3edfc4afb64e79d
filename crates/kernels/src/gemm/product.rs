//! What a block kernel gets: one panel of weights, the packed activations, and the sums to continue.

use super::{LANES, TILE_K, TILE_N};

/// One panel of weights times all row blocks of a chunk.
///
/// `T` and `X` are the number types of weights and activations; `q` numbers of `X` make 4 bytes.
pub(crate) struct Product<'a, T, X> {
    /// Weights, `[tiles_n][tiles_k][16 outputs][32 inputs]`.
    pub(crate) w: &'a [T],
    /// Activations, `[blocks][k / q][16 rows][q]`, from the first block and input of the panel on.
    pub(crate) x: &'a [X],
    /// Numbers from one block of activations to the next.
    pub(crate) x_stride: usize,
    /// Sums, `[blocks][tiles_n * 16][16 rows]`.
    pub(crate) sums: &'a mut [f32],
    /// Tiles of 16 outputs.
    pub(crate) tiles_n: usize,
    /// Tiles of 32 inputs.
    pub(crate) tiles_k: usize,
    /// Blocks of 16 rows.
    pub(crate) blocks: usize,
    /// True for the first panel along the inputs: the sums start at zero, whatever `sums` holds.
    pub(crate) first: bool,
}

/// The scales of an int8 product: `w = scale * (code - zero_point) + offset`, `x = scale * code`.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "int8 arithmetic is chosen on x86-64 only"))]
pub(crate) struct Scales<'a> {
    /// Weight scales, `[tiles_n][tiles_k * groups][16 outputs]`.
    pub(crate) w: &'a [f32],
    /// Weight offsets in the same order, if the format has them.
    pub(crate) offsets: Option<&'a [f32]>,
    /// Subtracted from every weight code.
    pub(crate) zero_point: i32,
    /// Weight scales per tile of 32 inputs: 1 or 2.
    pub(crate) groups: usize,
    /// Activation scales, `[blocks][k / 32][16 rows]`, from the first block and input of the panel on.
    pub(crate) x: &'a [f32],
    /// Sums of activation codes, `[blocks][k / 16][16 rows]`.
    pub(crate) x_sums: &'a [i32],
}

impl<T, X> Product<'_, T, X> {
    /// Outputs of the panel, padding included.
    pub(crate) fn outputs(&self) -> usize {
        self.tiles_n * TILE_N
    }

    /// Checks the lengths that the kernels' pointer arithmetic relies on.
    pub(crate) fn check(&self) {
        assert!(self.blocks > 0 && self.tiles_n > 0 && self.tiles_k > 0, "an empty product");
        assert!(self.w.len() >= self.tiles_n * self.tiles_k * TILE_N * TILE_K, "weights too short");
        let x = (self.blocks - 1) * self.x_stride + self.tiles_k * TILE_K * LANES;
        assert!(self.x.len() >= x, "activations too short");
        assert!(self.sums.len() >= self.blocks * self.outputs() * LANES, "sums too short");
    }

    /// Checks the lengths of the scales of this product.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "int8 arithmetic is chosen on x86-64 only"))]
    pub(crate) fn check_scales(&self, scales: &Scales<'_>) {
        let w = self.tiles_n * self.tiles_k * scales.groups * TILE_N;
        assert!(matches!(scales.groups, 1 | 2) && scales.w.len() >= w, "weight scales too short");
        assert!(scales.offsets.is_none_or(|o| o.len() >= w), "weight offsets too short");
        let x = (self.blocks - 1) * self.x_stride / 32 + self.tiles_k * LANES;
        assert!(scales.x.len() >= x && scales.x_sums.len() >= 2 * x, "activation scales too short");
    }
}
