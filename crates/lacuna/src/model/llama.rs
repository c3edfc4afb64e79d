//! Llama 2, 3 and 3.x. Rotary positions (linear and llama3 scaling), RMS norm, gated MLP of any activation, optional biases.

use super::arch::{Architecture, GgufSide};
use super::fields::Fields;
use super::names::{self, Names};
use super::shape::Shape;
use super::spec::{Act, RopePairs, Spec};
use super::{act, mixtral, rope};
use crate::error::Result;

/// See the module.
pub static LLAMA: Architecture = Architecture {
    name: "llama",
    classes: &["LlamaForCausalLM"],
    model_types: &["llama"],
    spec,
    names: &names::LLAMA,
    gguf: Some(GgufSide { arch: "llama", spec: gguf_spec, names: &GGUF }),
};

/// Names in GGUF files; Mixtral shares them.
pub const GGUF: Names = names::GGUF;

/// The decoder of a llama-like config.json.
///
/// # Errors
/// Missing or impossible settings.
pub fn spec(f: &Fields) -> Result<Spec> {
    let shape = Shape::from_config(f)?;
    let rope = rope::from_config(f, shape.head_dim)?;
    Ok(shape.decoder("llama", f.epsilon("rms_norm_eps", None)?, rope, act::from_fields(f, "hidden_act", Act::Silu)?))
}

/// The decoder of a llama-like GGUF header with rotary pairs `pairs`.
///
/// # Errors
/// Missing or impossible settings.
pub fn family_gguf_spec(f: &Fields, arch: &str, pairs: RopePairs) -> Result<Spec> {
    let shape = Shape::from_gguf(f)?;
    let rope = rope::from_gguf(f, shape.head_dim, pairs)?;
    let eps = f.epsilon("attention.layer_norm_rms_epsilon", None)?;
    let predictor_threshold = f.number_or("powerinfer.sparse_threshold", 0.0)? as f32;
    Ok(Spec { predictor_threshold, ..shape.decoder(arch, eps, rope, act::from_gguf(f, Act::Silu)?) })
}

/// GGUF calls Llama, Mistral and Mixtral all `llama`: experts make it a Mixtral, a window a Mistral.
fn gguf_spec(f: &Fields) -> Result<Spec> {
    let mut spec = family_gguf_spec(f, "llama", RopePairs::Adjacent)?;
    if f.opt_count("expert_count")?.is_some() {
        mixtral::add_gguf_experts(f, &mut spec)?;
    }
    if let Some(window) = f.opt_positions("attention.sliding_window")? {
        spec.arch = "mistral".into();
        super::shape::set_windows(&mut spec, Some(window), |_| true);
    }
    Ok(spec)
}
