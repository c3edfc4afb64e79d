//! A block cut in two where its residual stream gets another basis: the attention with its addition, the MLP with its own.
//! Each half is a block whose other half adds zeros, so that the engine runs it as it is.

use crate::{
    compress::block::Runner,
    error::Result,
    model::{
        Model,
        source::plain,
        spec::{BlockSpec, MlpSpec},
        weights::{Block, Linear, Mlp},
    },
};
use lacuna_core::weight::{Orientation, Weight};
use lacuna_kernels::Format;

/// Which part of a block is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// `x + attention(norm(x))`.
    Attention,
    /// `x + mlp(norm(x))`.
    Mlp,
    /// All of it: a parallel block adds both at once.
    Both,
}

/// `half` of block `layer` of `model`, ready to run.
///
/// # Errors
/// As the engine's.
pub fn runner(model: &Model, layer: usize, half: Half, threads: usize) -> Result<Runner> {
    let (spec, block, width) = (model.spec.blocks[layer].clone(), model.blocks[layer].clone(), model.spec.width);
    let (spec, block) = match half {
        Half::Both => (spec, block),
        Half::Attention => {
            let mlp = Mlp::Plain { up: zeros(1, width), down: zeros(width, 1) };
            let spec = BlockSpec { mlp: MlpSpec::Plain { inner: 1 }, up_act: None, ..spec };
            (spec, Block { mlp, predictor: None, ..block })
        }
        Half::Mlp => {
            let head = spec.head_dim;
            let [q, k, v] = [(); 3].map(|()| zeros(head, width));
            let spec = BlockSpec { heads: 1, kv_heads: 1, ..spec };
            (spec, Block { q, k, v, o: zeros(width, head), q_norm: None, k_norm: None, ..block })
        }
    };
    Runner::of(model, spec, block, threads)
}

fn zeros(outputs: usize, inputs: usize) -> Linear {
    let bytes = vec![0; 4 * outputs * inputs].into();
    let weight = Weight::new(Format::F32, Orientation::OutputMajor, outputs, inputs, bytes);
    plain(weight.expect("four bytes for each number"))
}
