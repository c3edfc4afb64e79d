//! Which arithmetic a product uses: a function of instruction set and weights only.

use super::Weights;
use crate::Format;
use crate::isa::Isa;

/// The number types of the inner loop; sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    /// f32 weights and activations, fused multiply-add.
    F32,
    /// bf16 weights and activations, pairs along the inputs.
    Bf16,
    /// Unsigned 8-bit codes with scales along the inputs, int8 activations with one scale per 32.
    Int8,
}

impl Arithmetic {
    /// The arithmetic for weights of `format`; `without_blocks`: none that lie along the inputs.
    pub(crate) fn of(isa: Isa, format: Format, without_blocks: bool) -> Self {
        match (isa, format) {
            (_, Format::F32 | Format::F16) => Self::F32,
            (Isa::Amx, _) | (Isa::Avx512, Format::Bf16) => Self::Bf16,
            (Isa::Avx512, _) if without_blocks => Self::Bf16,
            (Isa::Avx512, _) => Self::Int8,
            _ => Self::F32,
        }
    }

    /// Inputs per panel of weights: a multiple of the longest block of a format (256). Sums are continued from panel to
    /// panel, so this does not change the order of summation.
    pub(crate) fn panel_k(self, isa: Isa) -> usize {
        match self {
            Self::Bf16 if isa != Isa::Amx => 256,
            Self::F32 => 256,
            Self::Bf16 | Self::Int8 => 512,
        }
    }

    /// Outputs per chunk: the more, the fewer times the activations come from the shared cache, which tiles outrun
    /// first. Input-major weights are cut at block borders along the outputs.
    pub(crate) fn panel_n(self, isa: Isa, w: &Weights) -> usize {
        match self {
            _ if matches!(w, Weights::InputMajor(_)) && w.format().block_len() == 256 => 256,
            // Whole units of every format.
            Self::F32 | Self::Int8 if matches!(w, Weights::Groups(_)) => 128,
            Self::F32 | Self::Int8 => 64,
            Self::Bf16 if isa == Isa::Amx => 256,
            Self::Bf16 => 128,
        }
    }
}
