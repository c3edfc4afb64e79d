//! The model inside the library: the files of `assets/embedded`, a Hugging Face directory (see the card there).

use crate::{
    error::{Error, Result},
    tokenizer::{Tokenizer, TokenizerFiles},
};
use lacuna_core::bytes::Bytes;
use std::sync::Arc;

/// What messages call it.
pub const NAME: &str = "embedded";

/// Name and contents of every file, as the build script found them.
static FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The contents of the file `name`, without a copy; `None` if the library was built without it.
pub fn file(name: &str) -> Option<Bytes> {
    let (_, bytes) = FILES.iter().find(|(n, _)| *n == name)?;
    Some(Bytes::new(Arc::new(*bytes)))
}

/// Whether the library was built with a model.
pub fn exists() -> bool {
    file("config.json").is_some()
}

/// The tokenizer of the embedded model.
///
/// # Errors
/// The library was built without one, or it is damaged.
pub fn tokenizer() -> Result<Tokenizer> {
    let read = |name: &str| file(name).map(|b| b.to_vec());
    let problem = "this build has no embedded model".to_owned();
    let tokenizer = read("tokenizer.json").ok_or(Error::Tokenizer { file: NAME.to_owned(), problem })?;
    let files = TokenizerFiles {
        tokenizer,
        config: read("tokenizer_config.json"),
        generation: read("generation_config.json"),
        chat_template: read("chat_template.jinja"),
    };
    Tokenizer::from_files(&files, NAME)
}
