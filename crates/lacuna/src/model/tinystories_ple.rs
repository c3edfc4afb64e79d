//! `tinystories-ple`: a small Llama with per-layer embeddings in the manner of Gemma 3n, made for microcontrollers
//! (github.com/slvDev/esp32-ai, `firmware/model`): rotary positions in halves, RMS norm, gated MLP, tied embedding.

use super::arch::Architecture;
use super::fields::Fields;
use super::names::{self, GateUp, Names, PerLayerNames, Qkv};
use super::shape::Shape;
use super::spec::{Act, PerLayer, Spec};
use super::{act, rope};
use crate::error::Result;

/// See the module.
pub static TINYSTORIES_PLE: Architecture = Architecture {
    name: "tinystories-ple",
    classes: &[],
    model_types: &["tinystories-ple"],
    spec,
    names: &NAMES,
    gguf: None,
};

const NAMES: Names = Names {
    prefixes: &[""],
    embed: "tok_embeddings",
    attn_norm: "layers.{}.attn_norm",
    qkv: Qkv::Split("layers.{}.attn.q_proj", "layers.{}.attn.k_proj", "layers.{}.attn.v_proj"),
    o: "layers.{}.attn.o_proj",
    mlp_norm: "layers.{}.ffn_norm",
    gate_up: GateUp::Split("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
    per_layer: PerLayerNames {
        projection: "ple.model_proj",
        norm: "ple.proj_norm",
        table: "ple.table",
        gate: "layers.{}.ple.gate",
        out: "layers.{}.ple.proj",
        out_norm: "layers.{}.ple.norm",
    },
    ..names::LLAMA
};

fn spec(f: &Fields) -> Result<Spec> {
    let shape = Shape::from_config(f)?;
    let layout = f.opt_text("rope_layout")?.unwrap_or("split-half");
    if layout != "split-half" {
        return Err(f.unsupported(format!("`rope_layout` `{layout}`"), "; reorder query and key to `split-half`"));
    }
    let rope = rope::from_config(f, shape.head_dim)?;
    let act = act::from_fields(f, "hidden_act", Act::Silu)?;
    let mut spec = shape.decoder("tinystories-ple", f.epsilon("rms_norm_eps", None)?, rope, act);
    let (width, act) = (f.count("ple_dim")?, act::from_fields(f, "ple_act", Act::Gelu)?);
    for (i, block) in spec.blocks.iter_mut().enumerate() {
        block.per_layer = Some(PerLayer { first: i * width, width, act });
    }
    Ok(spec)
}
