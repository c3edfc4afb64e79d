//! Names of the non-linearities, as `hidden_act` of a config.json writes them.

use super::fields::Fields;
use super::spec::Act;
use crate::error::Result;

/// Every accepted name. Synonyms follow `transformers` (`activations.py`).
const NAMES: &[(&str, Act)] = &[
    ("silu", Act::Silu),
    ("swish", Act::Silu),
    ("gelu", Act::Gelu),
    ("gelu_python", Act::Gelu),
    ("gelu_erf", Act::Gelu),
    ("gelu_new", Act::GeluTanh),
    ("gelu_fast", Act::GeluTanh),
    ("gelu_pytorch_tanh", Act::GeluTanh),
    ("gelu_tanh", Act::GeluTanh),
    ("quick_gelu", Act::QuickGelu),
    ("relu", Act::Relu),
    ("relu2", Act::Relu2),
];

/// The non-linearity that `key` names, or `default` if it is not set.
///
/// # Errors
/// A name that is not known; the message lists those that are.
pub fn from_fields(f: &Fields, key: &str, default: Act) -> Result<Act> {
    let Some(name) = f.opt_text(key)? else { return Ok(default) };
    NAMES.iter().find(|(n, _)| *n == name).map(|(_, act)| *act).ok_or_else(|| {
        let all: Vec<&str> = NAMES.iter().map(|(n, _)| *n).collect();
        f.wrong(key, format!("unknown activation `{name}`; known are {}", all.join(", ")))
    })
}

/// The first of the names of a non-linearity.
pub fn name(act: Act) -> &'static str {
    NAMES.iter().find(|(_, a)| *a == act).map_or("silu", |(n, _)| n)
}

/// The non-linearity of a GGUF file: the architecture's own (in PowerInfer's files ReLU, which they do not say), unless
/// Lacuna's key says otherwise.
///
/// # Errors
/// A name that is not known.
pub fn from_gguf(f: &Fields, default: Act) -> Result<Act> {
    let default = if f.flag_or("powerinfer", false)? { Act::Relu } else { default };
    from_fields(f, "lacuna.hidden_act", default)
}
