//! Mixtral: Mistral with a mixture of gated experts for an MLP; the shares of the kept experts are made to sum to one.

use super::arch::Architecture;
use super::fields::Fields;
use super::llama;
use super::names::{self, Experts, Names};
use super::shape::set_windows;
use super::spec::{MlpSpec, Spec};
use crate::error::Result;

/// See the module. Its GGUF files are of the architecture `llama`.
pub static MIXTRAL: Architecture = Architecture {
    name: "mixtral",
    classes: &["MixtralForCausalLM"],
    model_types: &["mixtral"],
    spec,
    names: &Names {
        router: "layers.{}.block_sparse_moe.gate",
        experts: Experts::Each(
            "layers.{}.block_sparse_moe.experts.{}.w1",
            "layers.{}.block_sparse_moe.experts.{}.w3",
            "layers.{}.block_sparse_moe.experts.{}.w2",
        ),
        ..names::LLAMA
    },
    gguf: None,
};

fn spec(f: &Fields) -> Result<Spec> {
    let mut spec = Spec { arch: "mixtral".into(), ..llama::spec(f)? };
    let mlp = experts(f, "num_local_experts", "num_experts_per_tok", f.count("intermediate_size")?, true)?;
    spec.blocks.iter_mut().for_each(|b| b.mlp = mlp.clone());
    set_windows(&mut spec, f.opt_positions("sliding_window")?, |_| true);
    Ok(spec)
}

/// A mixture whose number of experts and of active experts stand under the two keys.
///
/// # Errors
/// Missing sizes, or more active experts than there are.
pub fn experts(f: &Fields, all: &str, kept: &str, inner: usize, normalise: bool) -> Result<MlpSpec> {
    let (experts, active) = (f.count(all)?, f.count(kept)?);
    if active > experts {
        return Err(f.wrong(kept, format!("{active} active experts of {experts}")));
    }
    Ok(MlpSpec::Experts { experts, active, inner, normalise })
}

/// Turns a llama of a GGUF file into a Mixtral.
///
/// # Errors
/// As [`experts`].
pub fn add_gguf_experts(f: &Fields, spec: &mut Spec) -> Result<()> {
    spec.arch = "mixtral".into();
    let inner = f.uniform_count("expert_feed_forward_length")?.or(f.uniform_count("feed_forward_length")?);
    let inner = inner.ok_or_else(|| f.wrong("feed_forward_length", "is missing"))?;
    let mlp = experts(f, "expert_count", "expert_used_count", inner, true)?;
    spec.blocks.iter_mut().for_each(|b| b.mlp = mlp.clone());
    Ok(())
}
