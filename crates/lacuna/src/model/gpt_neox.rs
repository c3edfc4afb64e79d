//! GPT-NeoX and Pythia: layer norm, biases, rotary positions on a part of each head, attention and MLP side by side or in
//! a row; checkpoints interleave query, key and value head by head.

use super::arch::{Architecture, GgufSide};
use super::fields::Fields;
use super::names::{self, Names, Qkv};
use super::shape::Shape;
use super::spec::{Act, MlpSpec, NormKind, Rope, RopePairs, Spec};
use super::{act, rope};
use crate::error::Result;

/// See the module.
pub static GPT_NEOX: Architecture = Architecture {
    name: "gpt_neox",
    classes: &["GPTNeoXForCausalLM"],
    model_types: &["gpt_neox"],
    spec,
    names: &Names {
        prefixes: &["gpt_neox.", ""],
        embed: "embed_in",
        final_norm: "final_layer_norm",
        head: "embed_out",
        qkv: Qkv::PerHead("layers.{}.attention.query_key_value"),
        o: "layers.{}.attention.dense",
        up: "layers.{}.mlp.dense_h_to_4h",
        down: "layers.{}.mlp.dense_4h_to_h",
        biased: true,
        ..names::LLAMA
    },
    gguf: Some(GgufSide {
        arch: "gptneox",
        spec: gguf_spec,
        names: &Names { qkv: Qkv::Rows("blk.{}.attn_qkv"), biased: true, ..names::GGUF },
    }),
};

fn spec(f: &Fields) -> Result<Spec> {
    if !f.flag_or("attention_bias", true)? {
        return Err(f.unsupported("a GPT-NeoX without attention biases", ""));
    }
    let shape = Shape::from_config(f)?;
    if shape.kv_heads != shape.heads {
        return Err(f.unsupported("a GPT-NeoX with fewer key/value heads than query heads", ""));
    }
    let (theta, share) = (f.opt_positive("rotary_emb_base")?, f.opt_number("rotary_pct")?);
    let own = f.inside("rope_parameters").or(f.inside("rope_scaling"));
    let own = own.unwrap_or_else(|| Fields::new(f.file.clone(), f.context, Default::default()));
    let rope = rope::from_parameters(f, &own, shape.head_dim, theta, share.or(Some(0.25)))?;
    let act = act::from_fields(f, "hidden_act", Act::Gelu)?;
    let eps = f.epsilon("layer_norm_eps", Some(1e-5))?;
    Ok(decoder(&shape, eps, rope, act, f.flag_or("use_parallel_residual", true)?))
}

fn gguf_spec(f: &Fields) -> Result<Spec> {
    let shape = Shape::from_gguf(f)?;
    let rope = rope::from_gguf(f, shape.head_dim, RopePairs::Half)?;
    let eps = f.epsilon("attention.layer_norm_epsilon", None)?;
    Ok(decoder(&shape, eps, rope, act::from_gguf(f, Act::Gelu)?, f.flag_or("use_parallel_residual", true)?))
}

fn decoder(shape: &Shape, eps: f32, rope: Rope, act: Act, parallel: bool) -> Spec {
    let mut spec = shape.decoder("gpt_neox", eps, rope, act);
    spec.norm = NormKind::Layer;
    for block in &mut spec.blocks {
        (block.parallel, block.mlp) = (parallel, MlpSpec::Plain { inner: shape.inner });
    }
    spec
}
