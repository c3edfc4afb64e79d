//! The one error type of this crate. Every message names what is wrong, where, and what to do next.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a path and a stream of tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file is damaged, or the system refused.
    #[error(transparent)]
    Core(#[from] lacuna_core::error::Error),
    /// A file could not be read or written.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A path is neither a model directory nor a GGUF file.
    #[error("{}: no model here: {problem}", file.display())]
    NoModel {
        /// What was given.
        file: PathBuf,
        /// What is missing, and what was expected.
        problem: String,
    },
    /// A setting of a configuration is missing, has the wrong type or an impossible value.
    #[error("{file}: `{key}`: {problem}")]
    Config {
        /// The file (with `[gguf metadata]` where the settings live in a GGUF header).
        file: String,
        /// The setting.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// No file of `model/` knows this architecture.
    #[error("{file}: architecture `{found}` is not supported; supported are: {supported}")]
    Architecture {
        /// The file that names it.
        file: String,
        /// The name.
        found: String,
        /// All names that would do.
        supported: String,
    },
    /// A known architecture with a feature that is not implemented.
    #[error("{file}: {what} is not supported{remedy}")]
    Unsupported {
        /// The file that asks for it.
        file: String,
        /// The feature.
        what: String,
        /// What to do instead, starting with `; `, or empty.
        remedy: String,
    },
    /// A tensor that the architecture needs is not in the file.
    #[error("{file}: tensor `{tensor}` is missing; is the download complete and the configuration that of this model?")]
    MissingTensor {
        /// The file or directory.
        file: String,
        /// The name looked for.
        tensor: String,
    },
    /// A tensor does not have the shape that the configuration implies.
    #[error("{file}: tensor `{tensor}` has shape {found:?}, but the configuration asks for {expected:?}")]
    Shape {
        /// The file or directory.
        file: String,
        /// The tensor.
        tensor: String,
        /// Shape by the configuration, outermost first.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{file}: tensor `{tensor}` holds {value} at index {index}; the file is damaged or was written by a diverged run"
    )]
    NotFinite {
        /// The file or directory.
        file: String,
        /// The tensor.
        tensor: String,
        /// Flat index of the first such number.
        index: usize,
        /// The number.
        value: f32,
    },
    /// A model needs more memory than it may take.
    #[error(
        "the model needs about {need} bytes ({detail}), but the limit is {limit}; use a shorter context, a smaller KV type or a smaller file"
    )]
    Memory {
        /// Bytes by the estimate.
        need: u64,
        /// Bytes allowed.
        limit: u64,
        /// How the need splits up.
        detail: String,
    },
    /// More tokens than the context holds; found before any work.
    #[error("{tokens} tokens do not fit into a context of {context}; raise the context (-c) or shorten the text")]
    Context {
        /// Tokens asked for.
        tokens: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// A tokenizer could not be read, or does not belong to the model.
    #[error("{file}: tokenizer: {problem}")]
    Tokenizer {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A chat template failed.
    #[error("{file}: chat template: {problem}")]
    Template {
        /// The file.
        file: String,
        /// What is wrong, with its line.
        problem: String,
    },
    /// A forward pass gave a logit that is not a number.
    #[error(
        "the logits at position {position} hold {value}; the weights are damaged (--check-tensors finds the tensor), or overflow in this arithmetic (try LACUNA_ISA=scalar)"
    )]
    BadLogits {
        /// Position of the token in the context.
        position: usize,
        /// The first such logit.
        value: f32,
    },
    /// A recipe, a method, its calibration or a plan.
    #[error(transparent)]
    Method(#[from] lacuna_core::method::MethodError),
    /// The caller asked to stop.
    #[error("stopped on request")]
    Cancelled,
    /// A model was not found in the hub cache, or could not be fetched.
    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),
    /// An argument of a library call has no meaning.
    #[error("`{name}`: {problem}")]
    Argument {
        /// The argument.
        name: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl Error {
    /// An I/O error of `file`, for `map_err`.
    pub fn io(file: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { file: file.to_path_buf(), source }
    }

    /// An error of the setting `key` in `file`.
    pub fn config(file: &str, key: &str, problem: impl Into<String>) -> Self {
        Self::Config { file: file.into(), key: key.into(), problem: problem.into() }
    }
}
