//! Bamboo (PowerInfer's models after Turbo Sparse, arXiv:2406.05955): a mistral whose MLP is `down(relu(gate x) * relu(up x))`.

use super::arch::{Architecture, GgufSide};
use super::fields::Fields;
use super::spec::{RopePairs, Spec};
use super::{llama, mistral, names};
use crate::error::Result;

/// See the module. Its GGUF files are PowerInfer's.
pub static BAMBOO: Architecture = Architecture {
    name: "bamboo",
    classes: &["BambooForCausalLM"],
    model_types: &["bamboo"],
    spec,
    names: &names::LLAMA,
    gguf: Some(GgufSide { arch: "bamboo", spec: gguf_spec, names: &llama::GGUF }),
};

fn spec(f: &Fields) -> Result<Spec> {
    Ok(on_both_branches((mistral::MISTRAL.spec)(f)?))
}

fn gguf_spec(f: &Fields) -> Result<Spec> {
    Ok(on_both_branches(llama::family_gguf_spec(f, "bamboo", RopePairs::Adjacent)?))
}

fn on_both_branches(mut spec: Spec) -> Spec {
    spec.arch = "bamboo".into();
    spec.blocks.iter_mut().for_each(|b| b.up_act = Some(b.act));
    spec
}
