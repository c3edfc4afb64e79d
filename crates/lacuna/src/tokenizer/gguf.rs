//! Tokenizers stored inside GGUF files: `tokenizer.ggml.model` is `llama` (SPM with scores) or `gpt2` (byte-level BPE).

use super::{Encoder, Pieces, SpecialIds, Tokenizer, json, pieces, pre, spm};
use crate::error::{Error, Result};
use std::collections::HashMap;
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    models::bpe::{BPE, Vocab},
    normalizers::unicode::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// Kinds of tokens in `tokenizer.ggml.token_type`.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// The `tokenizer.*` entries of a GGUF file; names as in the file, `tokenizer.ggml.` left out.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `model`: `llama` or `gpt2`.
    pub model: String,
    /// `pre`: how byte-level BPE cuts words.
    pub pre: Option<String>,
    /// `tokens`.
    pub tokens: Vec<String>,
    /// `scores`, one per token (SPM).
    pub scores: Vec<f32>,
    /// `token_type`, one per token or none.
    pub types: Vec<i32>,
    /// `merges`: two pieces with a space between (BPE).
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`: ends a turn.
    pub eot: Option<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `add_bos_token`; default: SPM yes, BPE only for the Llama 3 and Tekken families (as llama.cpp).
    pub add_bos: Option<bool>,
    /// `add_eos_token`; default no.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`; default yes (SPM).
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

impl Tokenizer {
    /// The tokenizer of a GGUF file; `source` names the file in messages.
    ///
    /// # Errors
    /// Unknown model or pre-tokenizer (the message lists the known ones), arrays whose lengths differ, ids outside the
    /// vocabulary, merges of pieces that are not in it.
    pub fn from_gguf(vocab: &GgufVocab, source: &str) -> Result<Self> {
        let error = |what: String| Error::Tokenizer { file: source.to_owned(), problem: what };
        check(vocab).map_err(error)?;
        let (encoder, pieces, default_bos) = match vocab.model.as_str() {
            "llama" => spm_encoder(vocab).map_err(error)?,
            "gpt2" => bpe_encoder(vocab).map_err(error)?,
            other => {
                return Err(error(format!(
                    "tokenizer.ggml.model is `{other}`; known: llama, gpt2. A Hugging Face directory of the same model \
                     has a tokenizer.json that can be used instead"
                )));
            }
        };
        let special = special_ids(vocab, default_bos);
        let chat_template = vocab.chat_template.clone();
        Ok(Self { encoder, pieces, special, chat_template, source: source.to_owned() })
    }
}

impl GgufVocab {
    fn kind(&self, id: usize) -> i32 {
        self.types.get(id).copied().unwrap_or(1)
    }

    fn is_control(&self, id: usize) -> bool {
        matches!(self.kind(id), CONTROL | UNKNOWN)
    }

    fn pieces(&self, strip: bool, bytes: fn(&str) -> Vec<u8>) -> Pieces {
        let mut pieces = Pieces::new(strip);
        for (id, token) in self.tokens.iter().enumerate() {
            let literal = matches!(self.kind(id), CONTROL | UNKNOWN | USER_DEFINED);
            let value = if literal { token.clone().into_bytes() } else { bytes(token) };
            pieces.push(&value, self.is_control(id));
        }
        pieces
    }
}

fn check(v: &GgufVocab) -> Result<(), String> {
    let n = v.tokens.len();
    if n == 0 || u32::try_from(n).is_err() {
        return Err(format!("tokenizer.ggml.tokens has {n} entries"));
    }
    for (name, len) in [("scores", v.scores.len()), ("token_type", v.types.len())] {
        if len != 0 && len != n {
            return Err(format!("tokenizer.ggml.{name} has {len} entries, tokenizer.ggml.tokens {n}"));
        }
    }
    for (name, id) in [("bos", v.bos), ("eos", v.eos), ("eot", v.eot), ("unknown", v.unknown)] {
        if let Some(id) = id.filter(|&id| id as usize >= n) {
            return Err(format!("tokenizer.ggml.{name}_token_id is {id}, but there are {n} tokens"));
        }
    }
    Ok(())
}

fn spm_encoder(v: &GgufVocab) -> Result<(Encoder, Pieces, bool), String> {
    if v.scores.is_empty() || v.scores.iter().any(|s| s.is_nan()) {
        return Err("tokenizer.ggml.scores is missing or has a NaN; an SPM vocabulary needs one score per token".into());
    }
    let prefix = v.add_space_prefix.unwrap_or(true);
    let literal = |id: &usize| matches!(v.kind(*id), CONTROL | USER_DEFINED);
    let parts = spm::SpmParts {
        tokens: &v.tokens,
        scores: v.scores.clone(),
        literals: (0..v.tokens.len()).filter(literal).map(|id| (v.tokens[id].clone(), id as u32)).collect(),
        unknown: v.unknown,
        space_prefix: prefix,
    };
    Ok((Encoder::Spm(spm::Spm::new(parts)), v.pieces(prefix, pieces::spm), true))
}

fn bpe_encoder(v: &GgufVocab) -> Result<(Encoder, Pieces, bool), String> {
    let name = v.pre.as_deref().unwrap_or("default");
    let rule = pre::find(name).ok_or_else(|| {
        format!("tokenizer.ggml.pre is `{name}`, which is not known; known: {}", pre::known().join(", "))
    })?;
    let mut inner = tokenizers::Tokenizer::new(bpe_model(v, rule.ignore_merges)?);
    if rule.nfc {
        inner.with_normalizer(Some(NormalizerWrapper::from(NFC))).map_err(|e| e.to_string())?;
    }
    let mut steps = Vec::new();
    for regex in rule.splits {
        let pattern = SplitPattern::Regex((*regex).to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(|e| e.to_string())?;
        steps.push(PreTokenizerWrapper::from(split));
    }
    steps.push(PreTokenizerWrapper::from(ByteLevel::new(false, false, false)));
    inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    let added = |want: i32, special: bool| {
        let ids = (0..v.tokens.len()).filter(move |&id| v.kind(id) == want && !v.tokens[id].is_empty());
        ids.map(move |id| AddedToken::from(v.tokens[id].clone(), special).normalized(false)).collect::<Vec<_>>()
    };
    inner.add_special_tokens(added(CONTROL, true)).map_err(|e| e.to_string())?;
    inner.add_tokens(added(USER_DEFINED, false)).map_err(|e| e.to_string())?;
    let default_bos = matches!(name, "llama3" | "llama-v3" | "llama-bpe" | "tekken");
    let encoder = Encoder::Pipeline { inner: Box::new(inner), template: false };
    Ok((encoder, v.pieces(false, pieces::byte_level), default_bos))
}

fn bpe_model(v: &GgufVocab, ignore_merges: bool) -> Result<BPE, String> {
    let mut ids: HashMap<&str, u32> = HashMap::with_capacity(v.tokens.len());
    for (token, id) in v.tokens.iter().zip(0u32..) {
        ids.entry(token).or_insert(id);
    }
    let vocab: Vocab = ids.iter().map(|(t, &id)| ((*t).to_owned(), id)).collect();
    let mut merges = Vec::with_capacity(v.merges.len());
    for (i, merge) in v.merges.iter().enumerate() {
        let (a, b) =
            merge.split_once(' ').ok_or_else(|| format!("tokenizer.ggml.merges[{i}] is {merge:?}: no space"))?;
        let joined = [a, b].concat();
        if let Some(missing) = [a, b, &joined].into_iter().find(|p| !ids.contains_key(*p)) {
            return Err(format!("tokenizer.ggml.merges[{i}] is {merge:?}: {missing:?} is not in the vocabulary"));
        }
        merges.push((a.to_owned(), b.to_owned()));
    }
    let builder = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(ignore_merges);
    builder.build().map_err(|e| e.to_string())
}

fn special_ids(v: &GgufVocab, default_bos: bool) -> SpecialIds {
    let named = |(id, token): (usize, &String)| {
        (v.is_control(id) && json::END_OF_TURN.contains(&token.as_str())).then_some(id as u32)
    };
    let eos = v.eos.into_iter().chain(v.eot).chain(v.tokens.iter().enumerate().filter_map(named)).collect();
    SpecialIds {
        bos: v.bos,
        eos: json::unique(eos),
        add_bos: v.add_bos.unwrap_or(default_bos),
        add_eos: v.add_eos.unwrap_or(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bpe() -> GgufVocab {
        let mut tokens: Vec<String> = ["<|end|>", "a", "b", "c", "\u{120}", "ab", "\u{120}a"].map(String::from).into();
        tokens.push("<tool>".into());
        GgufVocab {
            model: "gpt2".into(),
            pre: Some("gpt-2".into()),
            types: vec![3, 1, 1, 1, 1, 1, 1, 4],
            merges: vec!["a b".into(), "\u{120} a".into()],
            eos: Some(0),
            tokens,
            ..GgufVocab::default()
        }
    }

    #[test]
    fn bpe_merges_in_order_and_finds_special_literals() {
        let t = Tokenizer::from_gguf(&bpe(), "x.gguf").expect("a valid vocabulary");
        assert_eq!(t.encode("abc ab<|end|>a<tool>", true).expect("encodes"), [5, 3, 4, 5, 0, 1, 7]);
        assert_eq!(t.decode(&[5, 3, 4, 5, 0, 1, 7]), "abc aba<tool>");
        assert!(t.is_eos(0) && !t.is_eos(1));
    }

    #[test]
    fn errors_name_the_entry() {
        let message = |v: &GgufVocab| Tokenizer::from_gguf(v, "x.gguf").expect_err("a broken vocabulary").to_string();
        let mut v = bpe();
        v.pre = Some("martian".into());
        assert!(message(&v).contains("`martian`") && message(&v).contains("llama-bpe"), "{}", message(&v));
        let mut v = bpe();
        v.model = "t5".into();
        assert!(message(&v).contains("`t5`"));
        let mut v = bpe();
        v.merges.push("a zz".into());
        assert!(message(&v).contains("merges[2]"));
        let mut v = bpe();
        v.bos = Some(8);
        assert!(message(&v).contains("bos_token_id is 8"));
        let mut v = bpe();
        v.types.pop();
        assert!(message(&v).contains("token_type has 7"));
        let mut v = bpe();
        v.model = "llama".into();
        assert!(message(&v).contains("scores"));
    }

    #[test]
    fn a_vocabulary_larger_than_the_model_is_refused_with_both_numbers() {
        let t = Tokenizer::from_gguf(&bpe(), "x.gguf").expect("a valid vocabulary");
        assert!(t.check_vocab(8).is_ok() && t.check_vocab(9).is_ok());
        let message = t.check_vocab(7).expect_err("too large").to_string();
        assert!(message.contains(" 8 ids") && message.contains(" 7 rows"), "{message}");
    }
}
