//! The `tokenizer.*` entries of a GGUF header.

use super::{GgufVocab, Tokenizer};
use crate::error::{Error, Result};
use lacuna_core::{
    error::{Error as CoreError, Result as CoreResult},
    format::gguf::{Gguf, Metadata},
    map::LoadMode,
};
use std::path::Path;

impl Tokenizer {
    /// The tokenizer at `path`: a Hugging Face directory, or a GGUF file.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`], [`Gguf::open`] and [`Tokenizer::from_gguf`].
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Self::from_dir(path);
        }
        let name = path.display().to_string();
        let failed = |e: CoreError| Error::Tokenizer { file: name.clone(), problem: e.to_string() };
        let file = Gguf::open(path, LoadMode::Map).map_err(failed)?;
        let vocab = GgufVocab::read(file.metadata()).map_err(failed)?;
        Self::from_gguf(&vocab, &name)
    }
}

impl GgufVocab {
    /// Reads the entries of a header.
    ///
    /// # Errors
    /// No `tokenizer.ggml.model` or `tokens`, or an entry of another type than the format says.
    pub fn read(metadata: &Metadata) -> CoreResult<Self> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let has = |name: &str| metadata.get(&key(name)).is_some();
        let id = |name: &str| -> CoreResult<Option<u32>> {
            // Some converters write -1 (or its unsigned form) where there is no such token.
            let value = metadata.get(&key(name)).and_then(|v| v.as_int());
            if value.is_some_and(|v| v == -1 || v == i64::from(u32::MAX)) || !has(name) {
                return Ok(None);
            }
            metadata.count(&key(name)).map(|n| Some(n as u32))
        };
        let flag = |name: &str| if has(name) { metadata.bool(&key(name)).map(Some) } else { Ok(None) };
        let strings = |name: &str| -> CoreResult<Vec<String>> {
            Ok(metadata.array(&key(name))?.as_strings()?.into_iter().map(str::to_owned).collect())
        };
        let template = "tokenizer.chat_template";
        Ok(Self {
            model: metadata.str(&key("model"))?.to_owned(),
            pre: if has("pre") { Some(metadata.str(&key("pre"))?.to_owned()) } else { None },
            tokens: strings("tokens")?,
            scores: if has("scores") { numbers(metadata, &key("scores"), |v| v.as_float())? } else { Vec::new() },
            types: if has("token_type") {
                numbers(metadata, &key("token_type"), |v| i32::try_from(v.as_int()?).ok())?
            } else {
                Vec::new()
            },
            merges: if has("merges") { strings("merges")? } else { Vec::new() },
            bos: id("bos_token_id")?,
            eos: id("eos_token_id")?,
            eot: id("eot_token_id")?,
            unknown: id("unknown_token_id")?,
            add_bos: flag("add_bos_token")?,
            add_eos: flag("add_eos_token")?,
            add_space_prefix: flag("add_space_prefix")?,
            chat_template: match metadata.get(template) {
                Some(_) => Some(metadata.str(template)?.to_owned()),
                None => None,
            },
        })
    }
}

/// A list of numbers; `of` turns a value into one.
fn numbers<T>(
    metadata: &Metadata,
    key: &str,
    of: impl Fn(&lacuna_core::format::gguf::Value) -> Option<T>,
) -> CoreResult<Vec<T>> {
    let wrong = || CoreError::malformed("an element that is no number", "numbers").in_item(key);
    metadata.array(key)?.iter().map(|v| of(&v?).ok_or_else(wrong)).collect()
}
