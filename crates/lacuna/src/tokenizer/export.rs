//! A Hugging Face tokenizer as the entries of a GGUF file.
//!
//! Byte-level BPE becomes `gpt2`, with the name of the way it cuts words; BPE that falls back to bytes (SentencePiece's, as
//! `tokenizer.json` has it) becomes `llama`, whose scores are the ranks of the merges. The result is held against the
//! original on a set of texts before it is used.

use super::{GgufVocab, Tokenizer, json, pieces::byte_literal, pre};
use crate::error::{Error, Result};
use lacuna_core::format::gguf::{Array, Value};
use serde_json::Value as Json;
use std::{collections::HashMap, path::Path};

/// Kinds of tokens (llama.cpp, `enum llama_token_type`).
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Texts on which both forms must agree.
const PROBES: [&str; 14] = [
    "",
    "a",
    "Once upon a time, there was a little girl named Lily.",
    " leading and  double   spaces ",
    "tabs\tand\nlines\r\n\n  indented\n",
    "I'm sure you'll say it's 12345.678, won't WE'VE",
    "caf\u{e9} na\u{ef}ve \u{201c}quoted\u{201d} \u{2014} dash",
    "\u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c} \u{440}\u{443}\u{441}\u{441}\u{43a}\u{438}\u{439} \u{627}\u{644}\u{639}",
    "\u{1F600}\u{1F468}\u{200d}\u{1F469}\u{200d}\u{1F467} emoji",
    "fn main() { let x_1 = [0; 32]; /* c++ */ }",
    "https://example.com/?q=a&b=%20#top",
    "CamelCase snake_case kebab-case ALLCAPS 3.14e-10",
    "e\u{301} combining, \u{fb01} ligature, \u{a0} no-break",
    "\u{7f}\u{80}\u{ffff}",
];

impl GgufVocab {
    /// The vocabulary of the Hugging Face directory `dir`, filled up to `rows` ids; `None` where there is no
    /// `tokenizer.json`.
    ///
    /// # Errors
    /// Damaged files; tokenizers of other kinds than BPE, with a way of cutting words that GGUF has no name for, or that the
    /// entries do not reproduce.
    pub fn from_dir(dir: &Path, rows: usize) -> Result<Option<Self>> {
        let file = dir.join("tokenizer.json");
        let Some(text) = json::read(&file)? else { return Ok(None) };
        let source = file.display().to_string();
        let error = |problem: String| Error::Tokenizer { file: source.clone(), problem };
        let hf = Tokenizer::from_dir(dir)?;
        hf.check_vocab(rows)?;
        let json: Json = serde_json::from_slice(&text).map_err(|e| error(e.to_string()))?;
        let mut vocab =
            Self::of_json(&json, rows).map_err(|what| error(format!("{what}: a GGUF file cannot hold it")))?;
        vocab.add_special(&hf)?;
        let back = Tokenizer::from_gguf(&vocab, &source)?;
        for text in PROBES {
            let (a, b) = (hf.encode(text, true)?, back.encode(text, true)?);
            if a != b {
                return Err(error(format!(
                    "a GGUF file cannot hold it exactly: {text:?} is {a:?} by tokenizer.json and {b:?} by the entries"
                )));
            }
        }
        Ok(Some(vocab))
    }

    fn of_json(json: &Json, rows: usize) -> Result<Self, String> {
        let model = &json["model"];
        if model["type"] != "BPE" && !(model["type"].is_null() && model["merges"].is_array()) {
            return Err(format!("a tokenizer of the kind {}", model["type"]));
        }
        let pieces = model["vocab"].as_object().ok_or("no vocabulary of pieces")?;
        let mut tokens: Vec<Option<String>> = vec![None; rows];
        let mut types = vec![NORMAL; rows];
        let id =
            |v: &Json| v.as_u64().map(|n| n as usize).filter(|n| *n < rows).ok_or("an id outside of the embedding");
        for (piece, v) in pieces {
            tokens[id(v)?] = Some(piece.clone());
        }
        let spm = model["byte_fallback"] == true;
        for (token, kind) in tokens.iter().zip(&mut types).filter(|_| spm) {
            if token.as_deref().is_some_and(|t| byte_literal(t).is_some()) {
                *kind = BYTE;
            }
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let at = id(&added["id"])?;
            tokens[at] = added["content"].as_str().map(str::to_owned);
            types[at] = if added["special"] == true { CONTROL } else { USER_DEFINED };
        }
        let unknown = model["unk_token"].as_str().filter(|_| spm);
        let unknown = unknown.and_then(|u| tokens.iter().position(|t| t.as_deref() == Some(u)));
        unknown.into_iter().for_each(|at| types[at] = UNKNOWN);
        let merges = merges(&model["merges"])?;
        let mut vocab = Self { unknown: unknown.map(|n| n as u32), ..Self::default() };
        if spm {
            vocab.model = "llama".into();
            vocab.scores = scores(&tokens, &merges);
            vocab.add_space_prefix = Some(space_prefix(json));
        } else {
            vocab.model = "gpt2".into();
            vocab.pre = Some(rule(json)?.into());
            vocab.merges = merges.into_iter().map(|(a, b)| format!("{a} {b}")).collect();
        }
        for (i, (token, kind)) in tokens.into_iter().zip(&mut types).enumerate() {
            // As llama.cpp's converter names ids without a piece.
            vocab.tokens.push(token.unwrap_or_else(|| {
                *kind = UNUSED;
                format!("[PAD{i}]")
            }));
        }
        vocab.types = types;
        Ok(vocab)
    }

    /// What stands around a text, and the chat template.
    fn add_special(&mut self, hf: &Tokenizer) -> Result<()> {
        let (with, without) = (hf.encode("a", true)?, hf.encode("a", false)?);
        let special = hf.special();
        (self.bos, self.eos, self.eot) = (special.bos, special.eos.first().copied(), special.eos.get(1).copied());
        let more = with.len().saturating_sub(without.len());
        let first = with.first().copied().filter(|id| more > 0 && Some(id) != without.first());
        self.bos = self.bos.or(first);
        self.add_bos = Some(first.is_some() && first == self.bos);
        self.add_eos = Some(more > usize::from(first.is_some()) && with.last().copied() == self.eos);
        self.chat_template = hf.chat_template().map(str::to_owned);
        Ok(())
    }

    /// The metadata pairs of these entries.
    pub fn entries(&self) -> Vec<(String, Value)> {
        let mut all: Vec<(&str, Value)> = vec![("model", Value::String(self.model.clone()))];
        all.extend(self.pre.clone().map(|p| ("pre", Value::String(p))));
        all.push(("tokens", Value::Array(Array::strings(&self.tokens))));
        if !self.scores.is_empty() {
            all.push(("scores", Value::Array(Array::floats(&self.scores))));
        }
        all.push(("token_type", Value::Array(Array::ints(&self.types))));
        if !self.merges.is_empty() {
            all.push(("merges", Value::Array(Array::strings(&self.merges))));
        }
        let ids = [("bos", self.bos), ("eos", self.eos), ("eot", self.eot), ("unknown", self.unknown)];
        let mut pairs: Vec<(String, Value)> =
            all.into_iter().map(|(k, v)| (format!("tokenizer.ggml.{k}"), v)).collect();
        for (name, id) in ids.into_iter().filter_map(|(n, id)| Some((n, id?))) {
            pairs.push((format!("tokenizer.ggml.{name}_token_id"), Value::U32(id)));
        }
        let flags = [
            ("add_bos_token", self.add_bos),
            ("add_eos_token", self.add_eos),
            ("add_space_prefix", self.add_space_prefix),
        ];
        for (name, on) in flags.into_iter().filter_map(|(n, on)| Some((n, on?))) {
            pairs.push((format!("tokenizer.ggml.{name}"), Value::Bool(on)));
        }
        pairs.extend(self.chat_template.clone().map(|t| ("tokenizer.chat_template".into(), Value::String(t))));
        pairs
    }
}

/// Pairs of pieces, in the order in which they are merged.
fn merges(list: &Json) -> Result<Vec<(String, String)>, String> {
    let one = |m: &Json| -> Option<(String, String)> {
        match m {
            Json::Array(pair) => Some((pair.first()?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned())),
            text => text.as_str()?.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
        }
    };
    let all: Option<Vec<_>> = list.as_array().ok_or("no list of merges")?.iter().map(one).collect();
    all.ok_or_else(|| "a merge that is no pair".into())
}

/// Scores by which merging the best pair first gives the order of the merges: minus the rank of the first merge that makes a
/// piece. Pieces that no merge makes never compete.
fn scores(tokens: &[Option<String>], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (a, b) in merges {
        let next = ranks.len() + 1;
        ranks.entry(format!("{a}{b}")).or_insert(next);
    }
    let rank = |t: &Option<String>| t.as_ref().and_then(|t| ranks.get(t)).copied();
    tokens.iter().map(|t| rank(t).map_or(0.0, |r| -(r as f32))).collect()
}

/// Whether a space goes before a text.
fn space_prefix(json: &Json) -> bool {
    let parts = |section: &Json, list: &str| -> Vec<Json> {
        section[list].as_array().cloned().unwrap_or_else(|| vec![section.clone()])
    };
    let prepends = |p: &Json| p["type"] == "Prepend";
    let metaspace = |p: &Json| {
        p["type"] == "Metaspace"
            && (p["prepend_scheme"] == "always" || p["prepend_scheme"] == "first" || p["add_prefix_space"] == true)
    };
    parts(&json["normalizer"], "normalizers").iter().any(prepends)
        || parts(&json["pre_tokenizer"], "pretokenizers").iter().any(metaspace)
}

/// The name of the way in which words are cut.
fn rule(json: &Json) -> Result<&'static str, String> {
    let section = &json["pre_tokenizer"];
    let parts = section["pretokenizers"].as_array().cloned().unwrap_or_else(|| vec![section.clone()]);
    let (mut splits, mut levels) = (Vec::new(), 0);
    for part in &parts {
        match part["type"].as_str() {
            Some("Split") if part["behavior"] == "Isolated" && part["invert"] != true => {
                match &part["pattern"]["Regex"] {
                    Json::String(regex) => splits.push(regex.clone()),
                    _ => return Err(format!("words cut at {}", part["pattern"])),
                }
            }
            Some("Digits") if part["individual_digits"] == true => splits.push(pre::ONE_DIGIT.to_owned()),
            Some("ByteLevel") if part["add_prefix_space"] != true => {
                levels += 1;
                if part["use_regex"] != false {
                    splits.push(pre::GPT2.to_owned());
                }
            }
            _ => return Err(format!("words cut by {}", part["type"])),
        }
    }
    let nfc = match json["normalizer"]["type"].as_str() {
        None => false,
        Some("NFC") => true,
        Some(other) => return Err(format!("texts normalised by {other}")),
    };
    let name = pre::name_of(&splits, json["model"]["ignore_merges"] == true, nfc).filter(|_| levels == 1);
    name.ok_or_else(|| {
        let shown: String = splits.join(" then ").chars().take(120).collect();
        format!("words cut at `{shown}`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ids_without_a_piece_and_kinds_of_tokens() {
        let json = json!({
            "added_tokens": [{"id": 0, "content": "<|end|>", "special": true}, {"id": 5, "content": "<tool>", "special": false}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"<|end|>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
        });
        let v = GgufVocab::of_json(&json, 7).unwrap();
        assert_eq!(v.tokens, ["<|end|>", "a", "b", "ab", "[PAD4]", "<tool>", "[PAD6]"]);
        assert_eq!(v.types, [CONTROL, NORMAL, NORMAL, NORMAL, UNUSED, USER_DEFINED, UNUSED]);
        assert_eq!((v.pre.as_deref(), &v.merges[..]), (Some("gpt-2"), &["a b".to_owned()][..]));
        assert!(GgufVocab::of_json(&json, 5).is_err(), "an id outside");
        let mut other = json.clone();
        other["pre_tokenizer"] = json!({"type": "Whitespace"});
        assert!(GgufVocab::of_json(&other, 7).unwrap_err().contains("Whitespace"));
        other["model"]["type"] = json!("Unigram");
        assert!(GgufVocab::of_json(&other, 7).unwrap_err().contains("Unigram"));
    }

    #[test]
    fn scores_follow_the_merges() {
        let tokens = ["a", "b", "c", "ab", "bc", "abc"].map(|t| Some(t.to_owned()));
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let merges = [pair("b", "c"), pair("a", "b"), pair("a", "bc"), pair("ab", "c")];
        assert_eq!(scores(&tokens, &merges), [0.0, 0.0, 0.0, -2.0, -1.0, -3.0]);
    }
}
