//! What a prefill kernel must offer: two small matrix products and one softmax step over a group of rows.

use super::page::{KvType, Layout};

/// Where the rows of a group keep their numbers. Strides are in numbers; all rows exist, padded ones included.
#[derive(Clone, Copy)]
pub(super) struct Rows<A> {
    /// Queries, `queries` numbers each.
    pub q: *const A,
    /// Stride of `q`.
    pub q_stride: usize,
    /// Scores of the current block of keys.
    pub scores: *mut f32,
    /// Stride of `scores`.
    pub scores_stride: usize,
    /// Weights of the current block of keys; the same memory as `scores` if `A` is f32.
    pub weights: *mut A,
    /// Stride of `weights`.
    pub weights_stride: usize,
    /// Weighted values, `d16` numbers each.
    pub out: *mut f32,
}

/// One row's part of the softmax over a block of keys.
#[derive(Clone, Copy)]
pub(super) struct SoftmaxRow<A> {
    /// Scores of the block.
    pub scores: *mut f32,
    /// Where the weights go.
    pub weights: *mut A,
    /// Weighted values so far, to be scaled when the maximum rises.
    pub out: *mut f32,
    /// Numbers of `out`.
    pub d16: usize,
    /// Scores of the block, a multiple of `COLUMNS`.
    pub columns: usize,
    /// Keys of the block that the row sees.
    pub visible: (usize, usize),
    /// Factor on the scores: to the unit of `exp2`, or to that of the cap.
    pub scale: f32,
    /// Score cap.
    pub cap: Option<f32>,
}

/// Running maximum (in the unit of `exp2`) and sum of weights of a row.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub max: f32,
    pub sum: f32,
}

/// Below every real score; finite, so that a row which has seen nothing yet never computes infinity minus infinity.
pub(super) const LOWEST: f32 = -1e30;

/// A prefill kernel. Operands of the products have the layout of [`super::page`] for [`Backend::KV`].
pub(super) trait Backend: Sync {
    /// Number type of queries, weights, keys and values in the products; its default is zero.
    type A: Copy + Default + Send + Sync + 'static;
    /// The same as a page type: such pages are used as they lie in the cache.
    const KV: KvType;

    /// Rows of a group.
    fn group(&self) -> usize;
    /// Number of scores computed together: the count of columns is rounded up to this.
    fn columns(&self) -> usize;
    /// Rounds the numbers of a row to the number type.
    ///
    /// # Safety
    /// `to` has room for them, and the machine has the instruction set.
    unsafe fn load_row(&self, row: &[f32], to: *mut Self::A);
    /// Called on a thread before and after a piece of work.
    fn begin(&self) {}
    /// See [`Backend::begin`].
    fn end(&self) {}

    /// `scores[r][at + j] = q[r] . keys[0][j]` for the rows of a group and `j < columns`; `keys[1]`, if there, is the
    /// next page (to be fetched ahead).
    ///
    /// # Safety
    /// The pointers and shapes fit, and the machine has the instruction set.
    unsafe fn scores(&self, layout: &Layout, rows: &Rows<Self::A>, keys: &[*const Self::A], at: usize, columns: usize);

    /// Turns scores into weights; see [`SoftmaxRow`].
    ///
    /// # Safety
    /// The pointers and shapes fit, and the machine has the instruction set.
    unsafe fn softmax(&self, row: SoftmaxRow<Self::A>, state: &mut State);

    /// `out[r] += sum over j < columns of weights[r][j] * values[j]`, the pages of values being listed in order.
    ///
    /// # Safety
    /// The pointers and shapes fit, and the machine has the instruction set.
    unsafe fn values(&self, layout: &Layout, rows: &Rows<Self::A>, values: &[*const Self::A], columns: usize);

    /// Converts a run of `rows * width` numbers (keys or values of one head) of another page type.
    ///
    /// # Safety
    /// The pointers and shapes fit, and the machine has the instruction set.
    unsafe fn convert(&self, ty: KvType, run: &[u8], width: usize, rows: usize, to: *mut Self::A);
}
