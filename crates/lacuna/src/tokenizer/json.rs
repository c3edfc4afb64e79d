//! Tokenizers of Hugging Face directories: `tokenizer.json` beside `tokenizer_config.json`, `generation_config.json`
//! and `chat_template.jinja`.

use super::{Encoder, Pieces, SpecialIds, Tokenizer, pieces};
use crate::error::{Error, Result};
use serde_json::Value;
use std::{fs, path::Path};

/// Largest file read here, in bytes (the largest known `tokenizer.json` have about 35 MB).
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Literals that end a turn in the chat formats of the field (llama.cpp keeps the same kind of list).
pub(super) const END_OF_TURN: [&str; 8] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|end_of_turn|>",
];

/// The files that make a tokenizer, as bytes.
#[derive(Clone, Debug, Default)]
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// `tokenizer_config.json`: names of BOS and EOS, chat template.
    pub config: Option<Vec<u8>>,
    /// `generation_config.json`: all ids that end a text.
    pub generation: Option<Vec<u8>>,
    /// `chat_template.jinja`; goes before the template of `tokenizer_config.json`.
    pub chat_template: Option<Vec<u8>>,
}

impl Tokenizer {
    /// The tokenizer of a Hugging Face directory.
    ///
    /// # Errors
    /// No readable `tokenizer.json`, a damaged file, or a decoder that is neither byte-level nor SPM-like.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let must = dir.join("tokenizer.json");
        let tokenizer = read(&must)?.ok_or_else(|| fail(&must, "is not there; a tokenizer is needed to run text"))?;
        let files = TokenizerFiles {
            tokenizer,
            config: read(&dir.join("tokenizer_config.json"))?,
            generation: read(&dir.join("generation_config.json"))?,
            chat_template: read(&dir.join("chat_template.jinja"))?,
        };
        Self::from_files(&files, &must.display().to_string())
    }

    /// The tokenizer of files in memory; `source` names them in messages.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`].
    pub fn from_files(files: &TokenizerFiles, source: &str) -> Result<Self> {
        let error = |what: String| Error::Tokenizer { file: source.to_owned(), problem: what };
        let mut inner = pipeline(&files.tokenizer).map_err(error)?;
        inner.with_truncation(None).map_err(|e| error(e.to_string()))?;
        inner.with_padding(None);
        let decoder = serde_json::to_value(inner.get_decoder()).map_err(|e| error(e.to_string()))?;
        let style = Style::of(&decoder).ok_or_else(|| {
            error(format!("decoder {decoder} is not supported; byte-level and SPM-like decoders are"))
        })?;
        let pieces = table(&inner, style).map_err(error)?;
        let config = parse(files.config.as_deref(), source, "tokenizer_config.json")?;
        let generation = parse(files.generation.as_deref(), source, "generation_config.json")?;
        let special = special_ids(&inner, &config, &generation);
        let chat_template = match &files.chat_template {
            Some(bytes) => Some(
                String::from_utf8(bytes.clone())
                    .map_err(|e| error(format!("chat_template.jinja is not UTF-8: {e}")))?,
            ),
            None => template(&config),
        };
        let encoder = Encoder::Pipeline { inner: Box::new(inner), template: true };
        Ok(Self { encoder, pieces, special, chat_template, source: source.to_owned() })
    }
}

/// Builds the pipeline of `tokenizer.json`. The `tokenizers` crate (0.23) panics on some damaged files (`expect` in
/// `decoders/mod.rs`): broken JSON is found before it sees them, and what is left becomes an error here.
fn pipeline(json: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    serde_json::from_slice::<serde::de::IgnoredAny>(json).map_err(|e| e.to_string())?;
    match std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json)) {
        Ok(built) => built.map_err(|e| e.to_string()),
        Err(_) => Err("a section has a form that the tokenizers library does not take".into()),
    }
}

fn fail(path: &Path, what: &str) -> Error {
    Error::Tokenizer { file: path.display().to_string(), problem: what.to_owned() }
}

pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let meta = match fs::metadata(path) {
        Ok(m) => m,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(path, &format!("cannot be read: {e}"))),
    };
    if meta.len() > MAX_FILE_BYTES {
        return Err(fail(path, &format!("has {} bytes, more than the {MAX_FILE_BYTES} allowed", meta.len())));
    }
    fs::read(path).map(Some).map_err(|e| fail(path, &format!("cannot be read: {e}")))
}

fn parse(bytes: Option<&[u8]>, source: &str, name: &str) -> Result<Value> {
    let Some(bytes) = bytes else { return Ok(Value::Null) };
    serde_json::from_slice(bytes)
        .map_err(|e| Error::Tokenizer { file: source.to_owned(), problem: format!("{name} beside it: {e}") })
}

/// How a piece becomes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    ByteLevel,
    Spm { strip: bool },
}

impl Style {
    /// Reads the `decoder` section.
    fn of(decoder: &Value) -> Option<Self> {
        match decoder["type"].as_str()? {
            "ByteLevel" => Some(Self::ByteLevel),
            "Metaspace" => {
                let never = decoder["prepend_scheme"] == "never" || decoder["add_prefix_space"] == false;
                Some(Self::Spm { strip: !never })
            }
            "Sequence" => Self::of_sequence(decoder["decoders"].as_array()?),
            _ => None,
        }
    }

    fn of_sequence(parts: &[Value]) -> Option<Self> {
        let mut strip = false;
        for part in parts {
            match part["type"].as_str()? {
                "ByteLevel" if parts.len() == 1 => return Some(Self::ByteLevel),
                "Replace" if part["pattern"]["String"] == "\u{2581}" && part["content"] == " " => {}
                "ByteFallback" | "Fuse" => {}
                "Strip" if part["content"] == " " && part["stop"] == 0 => strip = part["start"] == 1,
                "Metaspace" => return Self::of(part),
                _ => return None,
            }
        }
        Some(Self::Spm { strip })
    }
}

/// The bytes of every id. Ids without a piece (holes) stay empty.
fn table(inner: &tokenizers::Tokenizer, style: Style) -> Result<Pieces, String> {
    let vocab = inner.get_vocab(true);
    let len = vocab.values().max().map_or(0, |&id| id as usize + 1);
    if len > 4 * vocab.len() + 1024 {
        return Err(format!("highest id {} for a vocabulary of {} pieces", len - 1, vocab.len()));
    }
    let mut by_id: Vec<&str> = vec![""; len];
    for (piece, &id) in &vocab {
        by_id[id as usize] = piece;
    }
    let added = inner.get_added_tokens_decoder();
    let mut pieces = Pieces::new(style == Style::Spm { strip: true });
    for (piece, id) in by_id.into_iter().zip(0u32..) {
        let literal = added.get(&id);
        let bytes = match (literal, style) {
            (Some(token), _) => token.content.clone().into_bytes(),
            (None, Style::ByteLevel) => pieces::byte_level(piece),
            (None, Style::Spm { .. }) => pieces::spm(piece),
        };
        pieces.push(&bytes, literal.is_some_and(|t| t.special));
    }
    Ok(pieces)
}

/// A token's literal, written as a string or as an object with `content`.
fn literal(config: &Value, key: &str) -> Option<String> {
    let v = &config[key];
    v.as_str().or_else(|| v["content"].as_str()).map(str::to_owned)
}

fn special_ids(inner: &tokenizers::Tokenizer, config: &Value, generation: &Value) -> SpecialIds {
    let id_of = |text: &str| inner.token_to_id(text);
    let mut eos: Vec<u32> = literal(config, "eos_token").and_then(|t| id_of(&t)).into_iter().collect();
    let listed = match &generation["eos_token_id"] {
        Value::Array(ids) => ids.clone(),
        other => vec![other.clone()],
    };
    eos.extend(listed.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
    let added = inner.get_added_tokens_decoder();
    let is_control = |id: &u32| added.get(id).is_some_and(|t| t.special);
    eos.extend(END_OF_TURN.iter().filter_map(|t| id_of(t)).filter(is_control));
    let bos = literal(config, "bos_token")
        .and_then(|t| id_of(&t))
        .or_else(|| generation["bos_token_id"].as_u64().and_then(|id| u32::try_from(id).ok()));
    SpecialIds { bos, eos: unique(eos), add_bos: false, add_eos: false }
}

/// `ids` without repetitions, in their order.
pub(super) fn unique(ids: Vec<u32>) -> Vec<u32> {
    let mut out = Vec::with_capacity(ids.len());
    ids.into_iter().for_each(|id| {
        if !out.contains(&id) {
            out.push(id)
        }
    });
    out
}

/// The chat template of `tokenizer_config.json`: a string, or a list of named ones of which `default` counts.
fn template(config: &Value) -> Option<String> {
    match &config["chat_template"] {
        Value::String(s) => Some(s.clone()),
        Value::Array(list) => {
            list.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str()).map(str::to_owned)
        }
        _ => None,
    }
}
