//! Matrix products for prefill: `y[m, n] = x[m, k] * W`, straight from the one resident copy of the weights.
//!
//! A panel of weights (some dozens of outputs by some hundred inputs) is decoded from the mapped bytes into scratch
//! that stays in a core's cache, then multiplied with all rows of activations, which were packed once for all
//! matrices that read them ([`Input`]). Nothing is repacked for good, so no second copy of the weights is resident.
//!
//! # Arithmetic
//! The arithmetic depends on the weights' format, their orientation and the instruction set, never on `m`:
//!
//! | weights | scalar, AVX2, NEON | AVX-512 | AMX |
//! |---|---|---|---|
//! | F32, F16 | f32 | f32 | f32 |
//! | BF16 | f32 | BF16 dot | BF16 tiles |
//! | quantised, output-major | f32 | int8 dot, activations in int8 with one scale per 32 | BF16 tiles |
//! | quantised, input-major | f32 | BF16 dot | BF16 tiles |
//!
//! BF16 rounds the activations (and decoded weights) to the nearest even; accumulation is always in f32. F16 weights
//! keep f32 arithmetic: BF16 would lose three bits of each weight. Input-major quantised weights carry their scales
//! across outputs, so an int8 product along the inputs does not exist for them; those by groups become output-major
//! blocks in scratch first.
//!
//! # Order of summation
//! One output is summed over `k` in an order fixed by the arithmetic alone. A row of the result therefore has the
//! same bits whatever the other rows, the number of rows, threads or chunks (batch invariance).
//!
//! # Few rows
//! Rows are computed 16 at a time and every panel is decoded for each call: a call costs some 0.2 ns per Q4_0 weight
//! for 1 to 16 rows, where one streamed matrix-vector product costs some 0.02 to 0.03 (one Sapphire Rapids core). So
//! up to about 6 rows as many matrix-vector products are faster.
//!
//! # Memory layout
//! * activations: blocks of 16 rows, inside a block `[k / q][16 rows][q]` with `q` numbers in 4 bytes (1 f32, 2
//!   bf16, 4 int8): one vector register holds the same `q` inputs of 16 rows;
//! * weights: tiles of 16 outputs x 32 inputs, `[16][32]`, so a tile is 16 cache lines in bf16 and an AMX operand;
//! * sums: `[block of 16 rows][output][16 rows]`, transposed into `y` at the end of a chunk.

#[cfg(target_arch = "x86_64")]
mod amx;
mod arithmetic;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_int8;
pub(crate) mod buffer;
mod codes;
#[cfg(target_arch = "x86_64")]
mod decode512;
mod driver;
mod input;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod pack512;
mod panel;
mod product;
mod scalar;
mod store;
mod transpose;

#[cfg(test)]
mod tests;

use crate::{
    Format, Matrix, Pool,
    axpy::groups::Groups,
    bitmap::Bitmap,
    codebook::{self, Codebook},
};

pub use input::Input;

/// Rows of activations in a packed block: the lanes of one AVX-512 register.
pub(crate) const LANES: usize = 16;
/// Outputs in a tile of packed weights.
pub(crate) const TILE_N: usize = 16;
/// Inputs in a tile of packed weights.
pub(crate) const TILE_K: usize = 32;

/// How the weights `W[n outputs, k inputs]` of a product lie in memory.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// A run per output.
    OutputMajor(Matrix<'a>),
    /// A run per input, as the axpy decode kernels want them.
    InputMajor(Matrix<'a>),
    /// Output-major blocks whose codes lie by inputs. Products of Q8_0 and Q4_0 have the bits of the output-major form.
    Groups(Groups<'a>),
    /// Output-major rows without their zeros. Products have the bits of the output-major form.
    Bitmap(Bitmap<'a>),
    /// Output-major rows in codes of pairs. Products have the bits of the same numbers in BF16.
    Codebook(Codebook<'a>),
}

impl Weights<'_> {
    /// How the numbers are stored.
    pub fn format(&self) -> Format {
        match self {
            Self::OutputMajor(w) | Self::InputMajor(w) => w.format(),
            Self::Groups(w) => w.format(),
            Self::Bitmap(w) => w.format(),
            Self::Codebook(_) => codebook::DENSE,
        }
    }

    /// Outputs and inputs.
    pub(crate) fn shape(&self) -> (usize, usize) {
        match self {
            Self::OutputMajor(w) => (w.rows(), w.cols()),
            Self::InputMajor(w) => (w.cols(), w.rows()),
            Self::Groups(w) => (w.outputs(), w.inputs()),
            Self::Bitmap(w) => (w.rows(), w.cols()),
            Self::Codebook(w) => (w.rows(), w.cols()),
        }
    }

    /// Whether there are no blocks along the inputs that an int8 product could take.
    pub(crate) fn without_blocks(&self) -> bool {
        match self {
            Self::OutputMajor(_) | Self::Bitmap(_) | Self::Codebook(_) => false,
            Self::InputMajor(_) => true,
            Self::Groups(w) => w.format() == Format::Q4K,
        }
    }
}

/// One product `y = x * W` or `y += x * W`.
#[derive(Debug)]
pub struct Job<'a> {
    /// The weights.
    pub w: Weights<'a>,
    /// The activations, `m` rows of `k`, prepared for the format of `w`.
    pub x: &'a Input,
    /// The result, `m` rows of `n`.
    pub y: &'a mut [f32],
    /// Adds to `y` (a residual stream) instead of replacing it.
    pub accumulate: bool,
}

/// Runs products, all in one parallel region.
///
/// # Panics
/// If a job's sizes do not fit together, or its input was not prepared for the format of its weights.
pub fn run(pool: &Pool, jobs: &mut [Job<'_>]) {
    driver::run(crate::isa::get(), pool, jobs);
}
