//! Where sparsity lives, and the names of the points of a forward pass.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The places where something can be skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Site {
    /// Stored weights.
    Weights,
    /// Inputs of linear layers and neurons of the MLP.
    Activations,
    /// Query-key pairs.
    Attention,
    /// Cached keys and values.
    Kv,
    /// Whole tokens.
    Tokens,
    /// Experts of a mixture.
    Experts,
    /// Steps of the decoding loop.
    Decoding,
    /// Weights that stay on disk.
    Offload,
}

/// One linear layer of a block. The text form (`attn.q`, `mlp.down`) is used in plans, recipes and observers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Proj {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Output projection of the attention.
    O,
    /// Gate of a gated MLP; its activated output is the neuron's opening.
    Gate,
    /// Up projection (the only first projection of a plain MLP).
    Up,
    /// Down projection.
    Down,
}

impl Proj {
    /// All projections in the order of the forward pass.
    pub const ALL: [Proj; 7] = [Proj::Q, Proj::K, Proj::V, Proj::O, Proj::Gate, Proj::Up, Proj::Down];

    /// `attn.q`, ..., `mlp.down`.
    pub const fn name(self) -> &'static str {
        match self {
            Proj::Q => "attn.q",
            Proj::K => "attn.k",
            Proj::V => "attn.v",
            Proj::O => "attn.o",
            Proj::Gate => "mlp.gate",
            Proj::Up => "mlp.up",
            Proj::Down => "mlp.down",
        }
    }

    /// The projection of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == name)
    }
}

impl fmt::Display for Proj {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A named point of the forward pass that observers can read; text form `layers.3.mlp.down.input`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Point {
    /// The vector that enters a projection: `layers.N.<proj>.input`. A vector that several projections read is shown
    /// once, under the first of them: q for q, k, v; gate for gate and up.
    Input {
        /// Layer, from 0.
        layer: usize,
        /// Projection.
        proj: Proj,
    },
    /// The activated gate (or activated up projection of a plain MLP): `layers.N.mlp.neurons`.
    Neurons {
        /// Layer, from 0.
        layer: usize,
    },
    /// The output of up in a gated MLP, before it is multiplied with the gate: `layers.N.mlp.up.output`.
    Up {
        /// Layer, from 0.
        layer: usize,
    },
    /// The factor of every expert in an MLP of experts, 0 for those that a token does not use: `layers.N.mlp.experts`.
    Experts {
        /// Layer, from 0.
        layer: usize,
    },
    /// What a block leaves in the residual stream: `layers.N.output`.
    Output {
        /// Layer, from 0.
        layer: usize,
    },
    /// The vector that enters the output head: `head.input`.
    Head,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Point::Input { layer, proj } => write!(f, "layers.{layer}.{proj}.input"),
            Point::Neurons { layer } => write!(f, "layers.{layer}.mlp.neurons"),
            Point::Up { layer } => write!(f, "layers.{layer}.mlp.up.output"),
            Point::Experts { layer } => write!(f, "layers.{layer}.mlp.experts"),
            Point::Output { layer } => write!(f, "layers.{layer}.output"),
            Point::Head => f.write_str("head.input"),
        }
    }
}
