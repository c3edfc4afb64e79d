//! GPT-2: layer norm, learned positions, tanh GELU, biases everywhere; checkpoints store `[inputs, outputs]` matrices with
//! query, key and value in one.

use super::act;
use super::arch::{Architecture, GgufSide};
use super::fields::Fields;
use super::names::{self, Names, Qkv};
use super::opt::learned;
use super::shape::Shape;
use super::spec::{Act, Spec};
use crate::error::Result;

/// See the module.
pub static GPT2: Architecture = Architecture {
    name: "gpt2",
    classes: &["GPT2LMHeadModel"],
    model_types: &["gpt2"],
    spec,
    names: &Names {
        prefixes: &["transformer.", ""],
        embed: "wte",
        positions: "wpe",
        final_norm: "ln_f",
        attn_norm: "h.{}.ln_1",
        qkv: Qkv::Rows("h.{}.attn.c_attn"),
        o: "h.{}.attn.c_proj",
        mlp_norm: "h.{}.ln_2",
        up: "h.{}.mlp.c_fc",
        down: "h.{}.mlp.c_proj",
        width: "n_embd",
        inner: "n_inner",
        transposed: true,
        biased: true,
        ..names::LLAMA
    },
    gguf: Some(GgufSide {
        arch: "gpt2",
        spec: gguf_spec,
        names: &Names { qkv: Qkv::Rows("blk.{}.attn_qkv"), biased: true, ..names::GGUF },
    }),
};

fn spec(f: &Fields) -> Result<Spec> {
    let (width, heads) = (f.count("n_embd")?, f.count("n_head")?);
    if !width.is_multiple_of(heads) {
        return Err(f.wrong("n_head", format!("{heads} heads do not divide the width {width}")));
    }
    let shape = Shape {
        vocab: f.count("vocab_size")?,
        width,
        layers: f.layers("n_layer")?,
        heads,
        kv_heads: heads,
        head_dim: width / heads,
        inner: f.count_or("n_inner", 4 * width)?,
        context: f.positions(if f.get("n_positions").is_some() { "n_positions" } else { "n_ctx" })?,
    };
    let act = act::from_fields(f, "activation_function", Act::GeluTanh)?;
    let mut spec = learned(&shape, "gpt2", f.epsilon("layer_norm_epsilon", Some(1e-5))?, act, 0);
    let (scaled, by_layer) =
        (f.flag_or("scale_attn_weights", true)?, f.flag_or("scale_attn_by_inverse_layer_idx", false)?);
    for (i, block) in spec.blocks.iter_mut().enumerate() {
        let scale = if scaled { block.scale } else { 1.0 };
        block.scale = if by_layer { scale / (i + 1) as f32 } else { scale };
    }
    Ok(spec)
}

fn gguf_spec(f: &Fields) -> Result<Spec> {
    let eps = f.epsilon("attention.layer_norm_epsilon", None)?;
    Ok(learned(&Shape::from_gguf(f)?, "gpt2", eps, act::from_gguf(f, Act::GeluTanh)?, 0))
}
