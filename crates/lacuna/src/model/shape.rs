//! The sizes that all architectures share, read from either kind of configuration, and the checks on a finished spec.

use super::fields::Fields;
use super::spec::{Act, BlockSpec, MlpSpec, NormKind, Position, Rope, Spec};
use crate::error::Result;

/// Sizes of a decoder.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Neurons of the MLP.
    pub inner: usize,
    /// Longest context.
    pub context: usize,
}

impl Shape {
    /// From the names that the llama family uses in config.json.
    ///
    /// # Errors
    /// Missing or impossible sizes.
    pub fn from_config(f: &Fields) -> Result<Self> {
        let (width, heads) = (f.count("hidden_size")?, f.count("num_attention_heads")?);
        let shape = Self {
            vocab: f.count("vocab_size")?,
            width,
            layers: f.layers("num_hidden_layers")?,
            heads,
            kv_heads: f.count_or("num_key_value_heads", heads)?,
            head_dim: head_dim(f, "head_dim", width, heads, "num_attention_heads")?,
            inner: f.count("intermediate_size")?,
            context: f.positions("max_position_embeddings")?,
        };
        shape.checked(f, "num_key_value_heads")
    }

    /// From GGUF metadata; the vocabulary is that of the embedding tensor, which the reader puts in as `vocab_size`.
    ///
    /// # Errors
    /// Missing or impossible sizes.
    pub fn from_gguf(f: &Fields) -> Result<Self> {
        let heads_key = "attention.head_count";
        let need = |key: &str| {
            let value = f.uniform_count(key)?;
            value.ok_or_else(|| f.wrong(key, "is missing in the metadata"))
        };
        let (width, heads) = (f.count("embedding_length")?, need(heads_key)?);
        let shape = Self {
            vocab: f.count("vocab_size")?,
            width,
            layers: f.layers("block_count")?,
            heads,
            kv_heads: f.uniform_count("attention.head_count_kv")?.unwrap_or(heads),
            head_dim: head_dim(f, "attention.key_length", width, heads, heads_key)?,
            inner: need("feed_forward_length")?,
            context: f.positions("context_length")?,
        };
        if f.count_or("attention.value_length", shape.head_dim)? != shape.head_dim {
            return Err(f.unsupported("a value head of another size than the key head", ""));
        }
        shape.checked(f, "attention.head_count_kv")
    }

    fn checked(self, f: &Fields, kv_key: &str) -> Result<Self> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            let problem = format!("{} query heads are not a multiple of {} key/value heads", self.heads, self.kv_heads);
            return Err(f.wrong(kv_key, problem));
        }
        Ok(self)
    }

    /// A decoder of this shape: RMS norm, gated MLP, one rotary table, full attention. Architectures change what differs.
    pub fn decoder(&self, arch: &str, norm_eps: f32, rope: Rope, act: Act) -> Spec {
        let block = BlockSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            latent: None,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: None,
            score_cap: None,
            rope: Some(0),
            parallel: false,
            mlp: MlpSpec::Gated { inner: self.inner },
            act,
            up_act: None,
            residual_scale: 1.0,
            per_layer: None,
        };
        Spec {
            arch: arch.into(),
            vocab: self.vocab,
            width: self.width,
            context: self.context,
            embed_scale: 1.0,
            position: Position::Rotary,
            ropes: vec![rope],
            norm: NormKind::Rms,
            norm_eps,
            logit_scale: 1.0,
            norm_width: None,
            logit_cap: None,
            predictor_threshold: 0.0,
            blocks: vec![block; self.layers],
        }
    }
}

fn head_dim(f: &Fields, key: &str, width: usize, heads: usize, heads_key: &str) -> Result<usize> {
    match f.opt_count(key)? {
        Some(d) => Ok(d),
        None if width.is_multiple_of(heads) => Ok(width / heads),
        None => {
            Err(f.wrong(heads_key, format!("{heads} heads do not divide the width {width}, and `{key}` is not set")))
        }
    }
}

/// Sets the window of every block for which `slides(block number)` holds.
pub fn set_windows(spec: &mut Spec, window: Option<usize>, slides: impl Fn(usize) -> bool) {
    for (i, block) in spec.blocks.iter_mut().enumerate() {
        block.window = window.filter(|_| slides(i));
    }
}

/// Which blocks slide, by `layer_types` of newer configurations, or else by `rule`.
///
/// # Errors
/// Kinds of attention other than full and sliding.
pub fn sliding_blocks(f: &Fields, layers: usize, rule: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    let Some(types) = f.opt_texts("layer_types", layers)? else { return Ok((0..layers).map(rule).collect()) };
    let slides = |kind: &str| match kind {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(f.unsupported(format!("attention of the kind `{other}` in `layer_types`"), "")),
    };
    types.into_iter().map(slides).collect()
}
