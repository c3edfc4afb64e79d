//! Qwen3-MoE: Qwen3 with a mixture of gated experts in all blocks, or in those that `decoder_sparse_step` and
//! `mlp_only_layers` leave.

use super::arch::{Architecture, GgufSide};
use super::fields::Fields;
use super::names::{self, Experts, Names};
use super::spec::{RopePairs, Spec};
use super::{llama, mixtral, qwen2};
use crate::error::Result;

/// See the module.
pub static QWEN3_MOE: Architecture = Architecture {
    name: "qwen3_moe",
    classes: &["Qwen3MoeForCausalLM"],
    model_types: &["qwen3_moe"],
    spec,
    names: &Names {
        qk_normed: true,
        experts: Experts::Each(
            "layers.{}.mlp.experts.{}.gate_proj",
            "layers.{}.mlp.experts.{}.up_proj",
            "layers.{}.mlp.experts.{}.down_proj",
        ),
        ..names::LLAMA
    },
    gguf: Some(GgufSide { arch: "qwen3moe", spec: gguf_spec, names: &Names { qk_normed: true, ..names::GGUF } }),
};

fn spec(f: &Fields) -> Result<Spec> {
    let mut spec = qwen2::spec(f, "qwen3_moe")?;
    let normalise = f.flag_or("norm_topk_prob", false)?;
    let count = if f.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let mlp = mixtral::experts(f, count, "num_experts_per_tok", f.count("moe_intermediate_size")?, normalise)?;
    let (step, dense) = (f.count_or("decoder_sparse_step", 1)?, f.indices("mlp_only_layers")?);
    for (i, block) in spec.blocks.iter_mut().enumerate() {
        if (i + 1) % step == 0 && !dense.contains(&i) {
            block.mlp = mlp.clone();
        }
    }
    Ok(spec)
}

fn gguf_spec(f: &Fields) -> Result<Spec> {
    let mut spec = llama::family_gguf_spec(f, "qwen3moe", RopePairs::Half)?;
    mixtral::add_gguf_experts(f, &mut spec)?;
    spec.arch = "qwen3_moe".into();
    Ok(spec)
}
