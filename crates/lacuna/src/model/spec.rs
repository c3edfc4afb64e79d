//! What one architecture computes, as data: the forward pass reads this and nothing else of a configuration.

pub use lacuna_kernels::elementwise::{Activation as Act, RopePairs};

/// Normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// `x / rms(x) * gain`. Where a checkpoint stores `gain - 1` (Gemma), loading adds the one.
    Rms,
    /// `(x - mean) / std * gain + bias`.
    Layer,
}

/// How positions enter.
#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// Rotary; each block says which of [`Spec::ropes`] it uses.
    Rotary,
    /// A learned table, added to the embedding; row = position + `offset` (OPT: 2, GPT-2: 0).
    Learned {
        /// Rows skipped at the start of the table.
        offset: usize,
    },
}

/// One rotary table.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Rotated components per head (an even number, at most the head's size).
    pub dims: usize,
    /// Pairing.
    pub pairs: RopePairs,
    /// `dims / 2` frequencies in radians per position, scaling (linear, llama3, longrope) already applied.
    pub freqs: Vec<f32>,
    /// Factor on cos and sin (longrope), usually 1.
    pub factor: f32,
}

/// Shape of an MLP.
#[derive(Clone, Debug, PartialEq)]
pub enum MlpSpec {
    /// `down(act(gate x) * up x)`.
    Gated {
        /// Neurons.
        inner: usize,
    },
    /// `down(act(up x))`.
    Plain {
        /// Neurons.
        inner: usize,
    },
    /// Gated experts behind a softmax router.
    Experts {
        /// Number of experts.
        experts: usize,
        /// Experts used per token.
        active: usize,
        /// Neurons of one expert.
        inner: usize,
        /// Whether the kept router weights are divided by their sum.
        normalise: bool,
    },
}

/// One transformer block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Factor on the scores, usually `1/sqrt(head_dim)`.
    pub scale: f32,
    /// Sliding window: a query sees this many positions, itself included.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)` (Gemma 2).
    pub score_cap: Option<f32>,
    /// Index into [`Spec::ropes`]; `None` with learned positions.
    pub rope: Option<usize>,
    /// Attention and MLP both read the block's input and are added together (GPT-NeoX).
    pub parallel: bool,
    /// The MLP.
    pub mlp: MlpSpec,
    /// Its non-linearity.
    pub act: Act,
    /// The non-linearity of up in a gated MLP, where there is one (dReLU: that of the gate).
    pub up_act: Option<Act>,
}

/// A whole decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Name of the architecture (`llama`, `qwen3`, ...).
    pub arch: String,
    /// Size of the vocabulary (rows of the embedding).
    pub vocab: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Longest context the model was made for.
    pub context: usize,
    /// Factor on the embedding (Gemma: sqrt(width)), usually 1.
    pub embed_scale: f32,
    /// Positions.
    pub position: Position,
    /// Rotary tables.
    pub ropes: Vec<Rope>,
    /// Kind of every norm.
    pub norm: NormKind,
    /// Epsilon of every norm.
    pub norm_eps: f32,
    /// Logits become `cap * tanh(logit / cap)` (Gemma 2).
    pub logit_cap: Option<f32>,
    /// The score from which predictors that came with the model call a neuron active.
    pub predictor_threshold: f32,
    /// The blocks.
    pub blocks: Vec<BlockSpec>,
}

impl Spec {
    /// Longest context that can be computed: rotary positions go on behind what the model was trained with, a table of
    /// learned positions ends.
    pub fn most_positions(&self) -> usize {
        match self.position {
            Position::Rotary => usize::MAX,
            Position::Learned { .. } => self.context,
        }
    }
}
