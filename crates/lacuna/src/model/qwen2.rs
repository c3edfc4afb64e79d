//! Qwen2 and Qwen2.5: a llama with biases on query, key and value, and (rarely) a sliding window in the upper blocks.

use super::arch::{Architecture, GgufSide};
use super::fields::Fields;
use super::llama;
use super::names::{self, Names};
use super::shape::{set_windows, sliding_blocks};
use super::spec::{RopePairs, Spec};
use crate::error::Result;

/// See the module.
pub static QWEN2: Architecture = Architecture {
    name: "qwen2",
    classes: &["Qwen2ForCausalLM"],
    model_types: &["qwen2"],
    spec: |f| spec(f, "qwen2"),
    names: &Names { qkv_biased: true, ..names::LLAMA },
    gguf: Some(GgufSide {
        arch: "qwen2",
        spec: |f| llama::family_gguf_spec(f, "qwen2", RopePairs::Half),
        names: &Names { qkv_biased: true, ..names::GGUF },
    }),
};

/// A llama with Qwen's rule for windows: where `use_sliding_window` is set, blocks from `max_window_layers` on slide.
///
/// # Errors
/// Missing or impossible settings.
pub fn spec(f: &Fields, arch: &str) -> Result<Spec> {
    let mut spec = Spec { arch: arch.into(), ..llama::spec(f)? };
    if f.flag_or("use_sliding_window", false)? {
        let layers = spec.blocks.len();
        let full = f.opt_number("max_window_layers")?.unwrap_or(layers as f64);
        let slides = sliding_blocks(f, layers, |i| i as f64 >= full)?;
        set_windows(&mut spec, f.opt_positions("sliding_window")?, |i| slides[i]);
    }
    Ok(spec)
}
