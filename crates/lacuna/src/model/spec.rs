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
    /// Many small experts `down(act(up x))`, as many of them per token as have a positive score in the router (BlockFFN,
    /// arXiv 2507.08771): `y = sum over g_e > 0 of p_e down_e(act(up_e x))`, `g = max(router x, 0)`, `p` as `scale` says.
    ReluExperts {
        /// Number of experts.
        experts: usize,
        /// Neurons of one expert.
        inner: usize,
        /// From `g` to `p`.
        scale: RouterScale,
    },
}

/// What becomes of the positive scores of a router with a ReLU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RouterScale {
    /// They stay.
    Plain,
    /// `g / (factor * sum(g) + 1e-5)`.
    Sum {
        /// Factor on the sum.
        factor: f32,
    },
    /// `g / sqrt(mean(g^2) + eps) * gain`, the mean over all experts.
    Rms {
        /// Epsilon.
        eps: f32,
    },
}

/// Latent attention (MLA; DeepSeek-V2, arXiv 2405.04434): queries may, and keys and values do, come from low-rank latents of
/// the residual stream. A head's query and key are `nope` components without a position, then `rope` rotated ones; the
/// rotated part of the key is one for all heads. The cache holds expanded keys and values, values filled up with zeros to the
/// size of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latent {
    /// Size of the query's latent; `None`: queries come from the residual stream.
    pub q_rank: Option<usize>,
    /// Size of the latent of keys and values.
    pub kv_rank: usize,
    /// Components of a query or key without a position.
    pub nope: usize,
    /// Rotated components.
    pub rope: usize,
    /// Components of a value, at most `nope + rope`.
    pub value: usize,
    /// Epsilon of the norms of the latents.
    pub eps: f32,
}

/// What a block adds to the residual stream out of its own embedding of the token (per-layer embeddings, Gemma 3n): behind the MLP
/// `x += norm(out(act(gate x) * e))`. For all blocks at once the inputs `e` are
/// `(norm(projection x_0 / sqrt(width)) + table[token] * sqrt(P)) / sqrt(2)`, with the embedding `x_0` and norms over the `P` numbers of a
/// block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerLayer {
    /// Where its numbers begin among those of all blocks.
    pub first: usize,
    /// How many they are: `P`.
    pub width: usize,
    /// The non-linearity.
    pub act: Act,
}

/// One transformer block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of a head; in latent attention that of a query and key, `nope + rope`.
    pub head_dim: usize,
    /// Latent attention, where it is of that kind; every head has its own key and value then.
    pub latent: Option<Latent>,
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
    /// Factor on what attention and MLP add to the residual stream (MiniCPM: `scale_depth / sqrt(blocks)`), usually 1.
    pub residual_scale: f32,
    /// Its own embedding of the token, where it has one.
    pub per_layer: Option<PerLayer>,
}

impl BlockSpec {
    /// Numbers that the output projection reads.
    pub fn attended(&self) -> usize {
        self.heads * self.latent.map_or(self.head_dim, |l| l.value)
    }
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
    /// Factor on the output of the last norm, which loading puts into its gains (MiniCPM: `dim_model_base / width`), usually 1.
    pub logit_scale: f32,
    /// The width that the model had before its residual stream was given another basis in every block and cut there: norms
    /// of the stream divide by it, `rms^2 = sum(x_i^2) / norm_width`, and every block has its shortcuts
    /// ([`Shortcuts`](super::weights::Shortcuts)). `None` in models that were not cut.
    pub norm_width: Option<usize>,
    /// Logits become `cap * tanh(logit / cap)` (Gemma 2).
    pub logit_cap: Option<f32>,
    /// The score from which predictors that came with the model call a neuron active.
    pub predictor_threshold: f32,
    /// The blocks.
    pub blocks: Vec<BlockSpec>,
}

impl Spec {
    /// Numbers of a token's inputs of all blocks, in models with per-layer embeddings; otherwise 0.
    pub fn per_layer_inputs(&self) -> usize {
        self.blocks.iter().filter_map(|b| b.per_layer).map(|p| p.first + p.width).max().unwrap_or(0)
    }

    /// Longest context that can be computed: rotary positions go on behind what the model was trained with, a table of
    /// learned positions ends.
    pub fn most_positions(&self) -> usize {
        match self.position {
            Position::Rotary => usize::MAX,
            Position::Learned { .. } => self.context,
        }
    }
}
