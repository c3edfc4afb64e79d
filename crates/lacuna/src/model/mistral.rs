//! Mistral: a llama whose attention sees a sliding window of positions in every block (where the configuration sets one).

use super::arch::Architecture;
use super::fields::Fields;
use super::shape::set_windows;
use super::spec::Spec;
use super::{llama, names};
use crate::error::Result;

/// See the module. Its GGUF files are of the architecture `llama`.
pub static MISTRAL: Architecture = Architecture {
    name: "mistral",
    classes: &["MistralForCausalLM"],
    model_types: &["mistral"],
    spec,
    names: &names::LLAMA,
    gguf: None,
};

fn spec(f: &Fields) -> Result<Spec> {
    let mut spec = Spec { arch: "mistral".into(), ..llama::spec(f)? };
    set_windows(&mut spec, f.opt_positions("sliding_window")?, |_| true);
    Ok(spec)
}
