//! Where the tensors of an architecture are in a file. `{}` stands for the number of the block, a second one for the
//! expert. Names leave out `.weight` and `.bias`.

/// The attention's first projections.
#[derive(Clone, Copy, Debug)]
pub enum Qkv {
    /// Three matrices.
    Split(&'static str, &'static str, &'static str),
    /// One matrix: all rows of q, then of k, then of v.
    Rows(&'static str),
    /// One matrix: q, k and v of the first head, then of the second, ... (GPT-NeoX).
    PerHead(&'static str),
}

/// Gate and up of a gated MLP.
#[derive(Clone, Copy, Debug)]
pub enum GateUp {
    /// Two matrices.
    Split(&'static str, &'static str),
    /// One matrix: all rows of gate, then of up.
    Rows(&'static str),
}

/// The experts of a mixture: gate, up, down.
#[derive(Clone, Copy, Debug)]
pub enum Experts {
    /// The architecture has none.
    None,
    /// Three matrices per expert.
    Each(&'static str, &'static str, &'static str),
    /// Three tensors `[experts, outputs, inputs]` per block.
    Stacked(&'static str, &'static str, &'static str),
}

/// Names of latent attention (MLA).
#[derive(Clone, Copy, Debug)]
pub struct LatentNames {
    /// Queries from the residual stream, where they have no latent.
    pub q: &'static str,
    /// Down to the query's latent.
    pub q_down: &'static str,
    /// Norm of that.
    pub q_norm: &'static str,
    /// From it to the queries.
    pub q_up: &'static str,
    /// Down to the latent of keys and values, with the rotated part of the keys behind it.
    pub kv_down: &'static str,
    /// Norm of the latent.
    pub kv_norm: &'static str,
    /// From it to keys and values.
    pub kv_up: &'static str,
}

/// Names of experts behind a router with a ReLU, which checkpoints store in one of several ways.
#[derive(Clone, Copy, Debug)]
pub struct ReluExpertNames {
    /// Norm of the router's scores.
    pub norm: &'static str,
    /// Whole names of up and down: stacked `[experts, outputs, inputs]`, or as one layer of all neurons
    /// `[experts * inner, width]` and `[width, experts * inner]`.
    pub pairs: &'static [[&'static str; 2]],
    /// The same where down is stored as up is, `[experts * inner, width]`.
    pub alike: &'static [[&'static str; 2]],
}

/// No such experts.
pub const NO_RELU_EXPERTS: ReluExpertNames = ReluExpertNames { norm: "", pairs: &[], alike: &[] };

/// Names of per-layer embeddings.
#[derive(Clone, Copy, Debug)]
pub struct PerLayerNames {
    /// From the embedding to the inputs of all blocks.
    pub projection: &'static str,
    /// Norm of that.
    pub norm: &'static str,
    /// One row per token.
    pub table: &'static str,
    /// From the residual stream.
    pub gate: &'static str,
    /// Back to it.
    pub out: &'static str,
    /// Norm of what is added.
    pub out_norm: &'static str,
}

/// No per-layer embeddings.
pub const NO_PER_LAYER: PerLayerNames =
    PerLayerNames { projection: "", norm: "", table: "", gate: "", out: "", out_norm: "" };

/// No latent attention.
pub const NO_LATENT: LatentNames =
    LatentNames { q: "", q_down: "", q_norm: "", q_up: "", kv_down: "", kv_norm: "", kv_up: "" };

/// The table of names, and what is special about the stored numbers.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// Prefixes that checkpoints put before everything but the head; the first under which `embed` exists is used.
    pub prefixes: &'static [&'static str],
    /// Token embedding.
    pub embed: &'static str,
    /// Learned positions, where the architecture has them.
    pub positions: &'static str,
    /// Norm before the head.
    pub final_norm: &'static str,
    /// Output heads, tried in this order without and with the prefix; none present means tied to the embedding.
    pub head: &'static str,
    /// Norm before the attention.
    pub attn_norm: &'static str,
    /// First projections of the attention.
    pub qkv: Qkv,
    /// Output projection of the attention.
    pub o: &'static str,
    /// Norm of query heads, bound where present.
    pub q_norm: &'static str,
    /// Norm of key heads, bound where present.
    pub k_norm: &'static str,
    /// Norm after the attention; empty where the architecture has none.
    pub attn_post_norm: &'static str,
    /// Norm before the MLP.
    pub mlp_norm: &'static str,
    /// Norm after the MLP; empty where the architecture has none.
    pub mlp_post_norm: &'static str,
    /// Gate and up.
    pub gate_up: GateUp,
    /// Up projection of a plain MLP.
    pub up: &'static str,
    /// Down projection.
    pub down: &'static str,
    /// Down projection stored `[inputs, outputs]`, used where it is present; empty where the architecture has none.
    pub down_t: &'static str,
    /// A predictor of active neurons that may come with an MLP: its two layers; empty where the architecture has none.
    pub predictor: [&'static str; 2],
    /// Router of the experts.
    pub router: &'static str,
    /// Experts.
    pub experts: Experts,
    /// The matrices and norms of latent attention; empty where the architecture has none.
    pub latent: LatentNames,
    /// Experts behind a router with a ReLU; empty where the architecture has none.
    pub relu_experts: ReluExpertNames,
    /// Per-layer embeddings; empty where the architecture has none.
    pub per_layer: PerLayerNames,
    /// Added to every stored gain (Gemma stores `gain - 1`).
    pub gain_offset: f32,
    /// The setting that says how wide the residual stream is.
    pub width: &'static str,
    /// The setting that says how many neurons an MLP has.
    pub inner: &'static str,
    /// Block matrices are stored `[inputs, outputs]` (GPT-2's Conv1D).
    pub transposed: bool,
    /// Every linear layer of a block must have a bias (elsewhere a bias is bound where present).
    pub biased: bool,
    /// Query, key and value must have a bias.
    pub qkv_biased: bool,
    /// Query and key heads must have their norms.
    pub qk_normed: bool,
}

impl Names {
    /// The shortcuts of block `i` where the attention and where the MLP is added, named as SliceGPT's code names them
    /// (TransformerCompression, `rotate.py`): `layers.3.attn_shortcut_Q`. They are stored `[inputs, outputs]`, for rows `x S`.
    pub fn shortcuts(&self, i: usize) -> [String; 2] {
        let block = self.attn_norm.find("{}").map_or("", |at| &self.attn_norm[..at]);
        ["attn", "mlp"].map(|part| format!("{block}{i}.{part}_shortcut_Q"))
    }
}

/// Names of the llama family in Hugging Face checkpoints; others change what differs.
pub const LLAMA: Names = Names {
    prefixes: &["model.", "", "language_model.model.", "model.language_model."],
    embed: "embed_tokens",
    positions: "",
    final_norm: "norm",
    head: "lm_head",
    attn_norm: "layers.{}.input_layernorm",
    qkv: Qkv::Split("layers.{}.self_attn.q_proj", "layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj"),
    o: "layers.{}.self_attn.o_proj",
    q_norm: "layers.{}.self_attn.q_norm",
    k_norm: "layers.{}.self_attn.k_norm",
    attn_post_norm: "",
    mlp_norm: "layers.{}.post_attention_layernorm",
    mlp_post_norm: "",
    gate_up: GateUp::Split("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
    up: "layers.{}.mlp.up_proj",
    down: "layers.{}.mlp.down_proj",
    down_t: "",
    predictor: ["", ""],
    router: "layers.{}.mlp.gate",
    experts: Experts::None,
    latent: NO_LATENT,
    relu_experts: NO_RELU_EXPERTS,
    per_layer: NO_PER_LAYER,
    gain_offset: 0.0,
    width: "hidden_size",
    inner: "intermediate_size",
    transposed: false,
    biased: false,
    qkv_biased: false,
    qk_normed: false,
};

/// Names in GGUF files (llama.cpp, `gguf-py/gguf/constants.py`); architectures change what differs.
pub const GGUF: Names = Names {
    prefixes: &[""],
    embed: "token_embd",
    positions: "position_embd",
    final_norm: "output_norm",
    head: "output",
    attn_norm: "blk.{}.attn_norm",
    qkv: Qkv::Split("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
    o: "blk.{}.attn_output",
    q_norm: "blk.{}.attn_q_norm",
    k_norm: "blk.{}.attn_k_norm",
    attn_post_norm: "",
    mlp_norm: "blk.{}.ffn_norm",
    mlp_post_norm: "",
    gate_up: GateUp::Split("blk.{}.ffn_gate", "blk.{}.ffn_up"),
    up: "blk.{}.ffn_up",
    down: "blk.{}.ffn_down",
    // PowerInfer, `gguf-py/gguf/constants.py`.
    down_t: "blk.{}.ffn_down_t",
    predictor: ["blk.{}.fc1", "blk.{}.fc2"],
    router: "blk.{}.ffn_gate_inp",
    experts: Experts::Stacked("blk.{}.ffn_gate_exps", "blk.{}.ffn_up_exps", "blk.{}.ffn_down_exps"),
    latent: NO_LATENT,
    relu_experts: NO_RELU_EXPERTS,
    per_layer: NO_PER_LAYER,
    gain_offset: 0.0,
    width: "embedding_length",
    inner: "feed_forward_length",
    transposed: false,
    biased: false,
    qkv_biased: false,
    qk_normed: false,
};

/// `template` with `{}` replaced by the numbers, in order.
pub fn fill(template: &str, numbers: &[usize]) -> String {
    let mut parts = template.split("{}");
    let mut name = parts.next().unwrap_or_default().to_owned();
    for (part, n) in parts.zip(numbers) {
        name.push_str(&n.to_string());
        name.push_str(part);
    }
    name
}
