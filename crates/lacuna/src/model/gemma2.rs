//! Gemma 2: norms before and after attention and MLP with gains stored less one, tanh caps on scores and logits, a window
//! in every other block, the embedding scaled by the root of the width.

use super::arch::{Architecture, GgufSide};
use super::fields::Fields;
use super::names::{self, Names};
use super::shape::{Shape, set_windows, sliding_blocks};
use super::spec::{Act, RopePairs, Spec};
use super::{act, rope};
use crate::error::Result;

/// Blocks of the 27B model, whose GGUF files do not store that its scores are scaled by width / heads.
const BLOCKS_OF_27B: usize = 46;

/// See the module.
pub static GEMMA2: Architecture = Architecture {
    name: "gemma2",
    classes: &["Gemma2ForCausalLM"],
    model_types: &["gemma2"],
    spec,
    names: &NAMES,
    gguf: Some(GgufSide { arch: "gemma2", spec: gguf_spec, names: &GGUF }),
};

/// Names in Hugging Face checkpoints; Gemma 3 adds q/k norms.
pub const NAMES: Names = Names {
    attn_post_norm: "layers.{}.post_attention_layernorm",
    mlp_norm: "layers.{}.pre_feedforward_layernorm",
    mlp_post_norm: "layers.{}.post_feedforward_layernorm",
    gain_offset: 1.0,
    ..names::LLAMA
};

/// Names in GGUF files, where the one is already added to the gains.
pub const GGUF: Names =
    Names { attn_post_norm: "blk.{}.post_attention_norm", mlp_post_norm: "blk.{}.post_ffw_norm", ..names::GGUF };

fn spec(f: &Fields) -> Result<Spec> {
    let shape = Shape::from_config(f)?;
    let rope = rope::from_config(f, shape.head_dim)?;
    let act = act::from_fields(f, "hidden_activation", Act::GeluTanh)?;
    let mut spec = scaled(shape.decoder("gemma2", f.epsilon("rms_norm_eps", Some(1e-6))?, rope, act));
    let scalar = f.opt_positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    let cap = f.opt_positive("attn_logit_softcapping")?.map(|c| c as f32);
    for block in &mut spec.blocks {
        (block.scale, block.score_cap) = (scalar.sqrt().recip() as f32, cap);
    }
    spec.logit_cap = f.opt_positive("final_logit_softcapping")?.map(|c| c as f32);
    let slides = sliding_blocks(f, spec.blocks.len(), |i| i % 2 == 0)?;
    set_windows(&mut spec, f.opt_positions("sliding_window")?, |i| slides[i]);
    Ok(spec)
}

fn gguf_spec(f: &Fields) -> Result<Spec> {
    let shape = Shape::from_gguf(f)?;
    let rope = rope::from_gguf(f, shape.head_dim, RopePairs::Half)?;
    let eps = f.epsilon("attention.layer_norm_rms_epsilon", None)?;
    let mut spec = scaled(shape.decoder("gemma2", eps, rope, act::from_gguf(f, Act::GeluTanh)?));
    set_gguf_scale(f, &shape, BLOCKS_OF_27B, &mut spec)?;
    let cap = f.opt_positive("attn_logit_softcapping")?.unwrap_or(50.0) as f32;
    spec.blocks.iter_mut().for_each(|b| b.score_cap = Some(cap));
    spec.logit_cap = Some(f.opt_positive("final_logit_softcapping")?.unwrap_or(30.0) as f32);
    set_windows(&mut spec, f.opt_positions("attention.sliding_window")?.or(Some(4096)), |i| i % 2 == 0);
    Ok(spec)
}

/// The embedding times the root of the width.
pub fn scaled(spec: Spec) -> Spec {
    Spec { embed_scale: (spec.width as f32).sqrt(), ..spec }
}

/// The factor on the scores: `attention.scale` where the file has it, else by the size of a head, but by width / heads in
/// the 27B model, which is known by its number of blocks (as llama.cpp does).
///
/// # Errors
/// A scale that is no number above zero.
pub fn set_gguf_scale(f: &Fields, shape: &Shape, blocks_of_27b: usize, spec: &mut Spec) -> Result<()> {
    let by_size = if shape.layers == blocks_of_27b { shape.width / shape.heads } else { shape.head_dim };
    let scale = f.opt_positive("attention.scale")?.unwrap_or(1.0 / (by_size as f64).sqrt()) as f32;
    spec.blocks.iter_mut().for_each(|b| b.scale = scale);
    Ok(())
}
