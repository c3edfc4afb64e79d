//! The list of architectures, and how a file finds its own.

use super::fields::Fields;
use super::names::Names;
use super::spec::Spec;
use super::{
    bamboo, gemma2, gemma3, gpt_neox, gpt2, llama, minicpm, mistral, mixtral, opt, phi3, qwen2, qwen3, qwen3_moe,
    tinystories_ple,
};
use crate::error::{Error, Result};

/// One architecture: how its files are recognised, read and bound.
pub struct Architecture {
    /// Its name in Lacuna.
    pub name: &'static str,
    /// Entries of `architectures` in config.json.
    pub classes: &'static [&'static str],
    /// `model_type` in config.json.
    pub model_types: &'static [&'static str],
    /// What it computes, from a config.json.
    pub spec: fn(&Fields) -> Result<Spec>,
    /// Tensor names in Hugging Face checkpoints.
    pub names: &'static Names,
    /// The GGUF side; `None` where GGUF has no such architecture, or files it under another one's name.
    pub gguf: Option<GgufSide>,
}

/// An architecture in GGUF files.
pub struct GgufSide {
    /// `general.architecture`.
    pub arch: &'static str,
    /// What it computes, from the metadata.
    pub spec: fn(&Fields) -> Result<Spec>,
    /// Tensor names.
    pub names: &'static Names,
}

/// What `architecture` is in GGUF files: some are there under another one's name, whose reader knows them apart.
pub fn gguf_side(architecture: &Architecture) -> Option<&'static GgufSide> {
    let own = ARCHITECTURES.iter().find(|a| a.name == architecture.name)?;
    match own.name {
        "mistral" | "mixtral" => llama::LLAMA.gguf.as_ref(),
        _ => own.gguf.as_ref(),
    }
}

/// Every architecture. This is the only list; adding one means one file and one line.
pub static ARCHITECTURES: &[&Architecture] = &[
    &llama::LLAMA,
    &mistral::MISTRAL,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &gemma2::GEMMA2,
    &gemma3::GEMMA3,
    &phi3::PHI3,
    &opt::OPT,
    &gpt2::GPT2,
    &gpt_neox::GPT_NEOX,
    &mixtral::MIXTRAL,
    &qwen3_moe::QWEN3_MOE,
    &bamboo::BAMBOO,
    &minicpm::MINICPM,
    &minicpm::MINICPM3,
    &tinystories_ple::TINYSTORIES_PLE,
];

/// The architecture of a config.json: by `architectures`, else by `model_type`.
///
/// # Errors
/// [`Error::Architecture`] with the list of supported ones.
pub fn of_config(f: &Fields) -> Result<&'static Architecture> {
    let class = f.get("architectures").and_then(|a| a.get(0)).and_then(|c| c.as_str());
    let model_type = f.opt_text("model_type")?;
    let known = |a: &&&Architecture| match class {
        Some(c) => a.classes.contains(&c),
        None => model_type.is_some_and(|t| a.model_types.contains(&t)),
    };
    ARCHITECTURES.iter().find(known).copied().ok_or_else(|| Error::Architecture {
        file: f.file.clone(),
        found: class.or(model_type).unwrap_or("(none named)").chars().take(80).collect(),
        supported: ARCHITECTURES.iter().flat_map(|a| a.classes).copied().collect::<Vec<_>>().join(", "),
    })
}

/// The GGUF side of the architecture that `general.architecture` names.
///
/// # Errors
/// [`Error::Architecture`] with the list of supported ones.
pub fn of_gguf(file: &str, arch: &str) -> Result<&'static GgufSide> {
    let sides = || ARCHITECTURES.iter().filter_map(|a| a.gguf.as_ref());
    sides().find(|s| s.arch == arch).ok_or_else(|| Error::Architecture {
        file: file.into(),
        found: arch.chars().take(80).collect(),
        supported: sides().map(|s| s.arch).collect::<Vec<_>>().join(", "),
    })
}
