//! Qwen3: Qwen2 without the biases and with an RMS norm on every query and key head.

use super::arch::{Architecture, GgufSide};
use super::names::{self, Names};
use super::spec::RopePairs;
use super::{llama, qwen2};

/// See the module.
pub static QWEN3: Architecture = Architecture {
    name: "qwen3",
    classes: &["Qwen3ForCausalLM"],
    model_types: &["qwen3"],
    spec: |f| qwen2::spec(f, "qwen3"),
    names: &Names { qk_normed: true, ..names::LLAMA },
    gguf: Some(GgufSide {
        arch: "qwen3",
        spec: |f| llama::family_gguf_spec(f, "qwen3", RopePairs::Half),
        names: &Names { qk_normed: true, ..names::GGUF },
    }),
};
