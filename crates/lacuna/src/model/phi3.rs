//! Phi-3, Phi-3.5 and Phi-4-mini: a llama with fused query/key/value and gate/up matrices, longrope, sometimes a window.

use super::arch::{Architecture, GgufSide};
use super::fields::Fields;
use super::names::{self, GateUp, Names, Qkv};
use super::shape::set_windows;
use super::spec::{RopePairs, Spec};
use super::{llama, rope};
use crate::error::Result;

/// See the module.
pub static PHI3: Architecture = Architecture {
    name: "phi3",
    classes: &["Phi3ForCausalLM"],
    model_types: &["phi3"],
    spec,
    names: &Names {
        qkv: Qkv::Rows("layers.{}.self_attn.qkv_proj"),
        gate_up: GateUp::Rows("layers.{}.mlp.gate_up_proj"),
        ..names::LLAMA
    },
    gguf: Some(GgufSide {
        arch: "phi3",
        spec: gguf_spec,
        names: &Names { qkv: Qkv::Rows("blk.{}.attn_qkv"), gate_up: GateUp::Rows("blk.{}.ffn_up"), ..names::GGUF },
    }),
};

fn spec(f: &Fields) -> Result<Spec> {
    let mut spec = Spec { arch: "phi3".into(), ..llama::spec(f)? };
    spec.context = rope::config_context(f, spec.context)?;
    set_windows(&mut spec, f.opt_positions("sliding_window")?, |_| true);
    Ok(spec)
}

fn gguf_spec(f: &Fields) -> Result<Spec> {
    let mut spec = llama::family_gguf_spec(f, "phi3", RopePairs::Half)?;
    if f.get("rope_factors_long.weight").is_some() {
        let original = f.opt_positions("rope.scaling.original_context_length")?;
        spec.context = rope::longrope_context(f, original, spec.context);
    }
    set_windows(&mut spec, f.opt_positions("attention.sliding_window")?, |_| true);
    Ok(spec)
}
