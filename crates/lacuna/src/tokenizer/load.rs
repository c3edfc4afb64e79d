//! The tokenizer that lies beside, or inside, a model's files.

use super::{GgufVocab, Tokenizer, TokenizerFiles};
use crate::{
    embedded,
    error::{Error, Result},
};
use lacuna_core::{
    format::gguf::{Gguf, Metadata},
    map::LoadMode,
};
use std::{ops::RangeInclusive, path::Path};

/// Ids of tokens.
const IDS: RangeInclusive<i64> = 0..=u32::MAX as i64;

impl Tokenizer {
    /// The tokenizer of the model at `path`, a Hugging Face directory or a GGUF file.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`] and [`Tokenizer::from_gguf`], and those of opening a GGUF file.
    pub fn load(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Self::from_dir(path);
        }
        let file = Gguf::open(path, LoadMode::Map)?;
        let vocab = gguf_vocab(file.metadata()).map_err(|e| e.in_file(path))?;
        Self::from_gguf(&vocab, &path.display().to_string())
    }

    /// The tokenizer of the embedded model.
    ///
    /// # Errors
    /// The library was built without one.
    pub fn embedded() -> Result<Self> {
        let file = |name: &str| embedded::file(name).map(|b| b.to_vec());
        let source = embedded::NAME.to_owned();
        let problem = "this build has no embedded model".to_owned();
        let tokenizer = file("tokenizer.json").ok_or(Error::Tokenizer { file: source, problem })?;
        let files = TokenizerFiles {
            tokenizer,
            config: file("tokenizer_config.json"),
            generation: file("generation_config.json"),
            chat_template: file("chat_template.jinja"),
        };
        Self::from_files(&files, embedded::NAME)
    }
}

/// Reads the `tokenizer.*` entries.
fn gguf_vocab(m: &Metadata) -> lacuna_core::Result<GgufVocab> {
    let id = |key: &str| Ok(m.maybe(key, |m, k| m.int(k, IDS))?.map(|i| i as u32));
    let owned = |list: Vec<&str>| list.into_iter().map(str::to_owned).collect::<Vec<_>>();
    let types = m.maybe("tokenizer.ggml.token_type", |m, k| m.ints(k, 0..=i64::from(i32::MAX)))?;
    Ok(GgufVocab {
        model: m.str("tokenizer.ggml.model")?.to_owned(),
        pre: m.maybe("tokenizer.ggml.pre", |m, k| m.str(k))?.map(str::to_owned),
        tokens: owned(m.strings("tokenizer.ggml.tokens")?),
        scores: m.maybe("tokenizer.ggml.scores", |m, k| m.floats(k))?.unwrap_or_default(),
        types: types.unwrap_or_default().into_iter().map(|t| t as i32).collect(),
        merges: owned(m.maybe("tokenizer.ggml.merges", |m, k| m.strings(k))?.unwrap_or_default()),
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        eot: id("tokenizer.ggml.eot_token_id")?,
        unknown: id("tokenizer.ggml.unknown_token_id")?,
        add_bos: m.maybe("tokenizer.ggml.add_bos_token", |m, k| m.bool(k))?,
        add_eos: m.maybe("tokenizer.ggml.add_eos_token", |m, k| m.bool(k))?,
        add_space_prefix: m.maybe("tokenizer.ggml.add_space_prefix", |m, k| m.bool(k))?,
        chat_template: m.maybe("tokenizer.chat_template", |m, k| m.str(k))?.map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn both_forms_of_one_vocabulary_agree() {
        let base = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/models/stories260K");
        if !base.exists() {
            println!("skipped: not present: {}", base.display());
            return;
        }
        let dir = Tokenizer::load(&base.join("hf-f32")).unwrap();
        let gguf = Tokenizer::load(&base.join("gguf/stories260K-f32.gguf")).unwrap();
        for text in ["Once upon a time", "", "caf\u{e9}  \u{4f60}\u{597d}\n"] {
            assert_eq!(dir.encode(text, true).unwrap(), gguf.encode(text, true).unwrap(), "{text:?}");
        }
    }
}
