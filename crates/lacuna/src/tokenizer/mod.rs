//! Text to token ids and back: one [`Tokenizer`] for `tokenizer.json` and for the vocabularies inside GGUF files.
//!
//! Encoding follows the file (byte-level BPE through the `tokenizers` crate, or SPM with scores in `spm`). Decoding is
//! the same for all of them: every id stands for a run of bytes ([`Pieces`]), so streaming can cut anywhere and hold
//! back what is not yet a whole character.

mod export;
mod gguf;
mod json;
mod metadata;
mod pieces;
mod pre;
mod spm;
mod stream;

pub use gguf::GgufVocab;
pub use json::TokenizerFiles;
pub use pieces::Pieces;
pub use pre::known as known_pre_tokenizers;
pub use stream::TextStream;

use crate::error::{Error, Result};
use spm::Spm;
use std::fmt;

/// Longest text that [`Tokenizer::encode`] takes at once, in bytes; cut longer ones at a line end.
pub const MAX_TEXT_BYTES: usize = 64 << 20;

/// How text becomes ids.
enum Encoder {
    /// `tokenizers` pipeline; `template` says whether its post-processor adds the special tokens.
    Pipeline { inner: Box<tokenizers::Tokenizer>, template: bool },
    /// SentencePiece unigram-scored merges.
    Spm(Spm),
}

/// Ids that mean something beyond text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Starts a text.
    pub bos: Option<u32>,
    /// Ends a text; the first is the file's own, the others end a turn of a conversation.
    pub eos: Vec<u32>,
    /// Whether [`Tokenizer::encode`] puts `bos` in front (SPM and GGUF only; `tokenizer.json` has its own template).
    pub add_bos: bool,
    /// Whether it puts the first `eos` behind.
    pub add_eos: bool,
}

/// A vocabulary with its rules.
pub struct Tokenizer {
    encoder: Encoder,
    pieces: Pieces,
    special: SpecialIds,
    chat_template: Option<String>,
    source: String,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({}, {} ids)", self.source, self.pieces.len())
    }
}

impl Tokenizer {
    /// Ids of `text`. With `special`, the tokens that the file puts around a text (usually BOS) are added. Literals of
    /// special tokens inside the text become those tokens, as in `transformers` and in llama.cpp's prompt parsing.
    ///
    /// # Errors
    /// Text longer than [`MAX_TEXT_BYTES`], or a character that the vocabulary cannot express.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(self.error(format!(
                "the text has {} bytes, more than the {MAX_TEXT_BYTES} taken at once; cut it at a line end",
                text.len()
            )));
        }
        let mut ids = match &self.encoder {
            Encoder::Pipeline { inner, template } => {
                let encoding = inner.encode_fast(text, special && *template).map_err(|e| self.error(e.to_string()))?;
                encoding.get_ids().to_vec()
            }
            Encoder::Spm(spm) => spm.encode(text, &self.pieces).map_err(|e| self.error(e))?,
        };
        if special {
            if let (true, Some(bos)) = (self.special.add_bos, self.special.bos) {
                ids.insert(0, bos);
            }
            if let (true, Some(&eos)) = (self.special.add_eos, self.special.eos.first()) {
                ids.push(eos);
            }
        }
        Ok(ids)
    }

    /// Text of `ids`, special tokens left out; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream(&[]);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id));
        }
        text.push_str(&stream.finish());
        text
    }

    /// Decodes one id after the other. `before` are the ids that precede them: where they hold text, the first piece
    /// keeps its leading space.
    pub fn stream(&self, before: &[u32]) -> TextStream<'_> {
        let fresh = before.iter().all(|&id| self.pieces.is_special(id));
        TextStream::new(&self.pieces, fresh)
    }

    /// Checks that every id has a row in a model of `vocab` rows.
    ///
    /// # Errors
    /// The tokenizer has more ids than the model: it belongs to another model.
    pub fn check_vocab(&self, vocab: usize) -> Result<()> {
        if self.pieces.len() > vocab {
            return Err(self.error(format!(
                "it has {} ids, but the model's embedding has {vocab} rows: this tokenizer belongs to another model",
                self.pieces.len()
            )));
        }
        Ok(())
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there are no ids.
    pub fn is_empty(&self) -> bool {
        self.pieces.len() == 0
    }

    /// BOS, EOS and their rules.
    pub fn special(&self) -> &SpecialIds {
        &self.special
    }

    /// Whether `id` ends a text or a turn.
    pub fn is_eos(&self, id: u32) -> bool {
        self.special.eos.contains(&id)
    }

    /// The bytes of every id.
    pub fn pieces(&self) -> &Pieces {
        &self.pieces
    }

    /// Literal of a special token (`<s>`), as templates want it.
    pub fn literal(&self, id: u32) -> String {
        String::from_utf8_lossy(self.pieces.bytes(id)).into_owned()
    }

    /// The model's chat template (Jinja), if it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Where it was read from.
    pub fn source(&self) -> &str {
        &self.source
    }

    fn error(&self, what: String) -> Error {
        Error::Tokenizer { file: self.source.clone(), problem: what }
    }
}
