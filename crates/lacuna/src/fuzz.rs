//! Bodies of the fuzz targets of this crate, as ordinary functions: the targets in `fuzz/` and the tests call the same
//! code. Those of the file formats are in [`lacuna_core::format::fuzz`].

use crate::{
    chat::{ChatTemplate, Message},
    tokenizer::{GgufVocab, Tokenizer, TokenizerFiles},
};
use lacuna_core::{bytes::Bytes, format::gguf::Gguf};

/// Letters of several lengths in UTF-8, spaces, and what looks like special tokens.
const TEXT: &str = "Hello,  wörld! 你好 \u{1F98A}\n<s>[INST]<|im_start|> 12345 \u{200d}\u{fffd}";

/// `input` as a `tokenizer.json`.
pub fn tokenizer_json(input: &[u8]) {
    let files = TokenizerFiles { tokenizer: input.to_vec(), config: None, generation: None, chat_template: None };
    if let Ok(tokenizer) = Tokenizer::from_files(&files, "fuzz") {
        round(&tokenizer);
    }
}

/// `input` as a GGUF file with a vocabulary.
pub fn gguf_tokenizer(input: &[u8]) {
    let Ok(file) = Gguf::parse(Bytes::from(input.to_vec())) else { return };
    let Ok(vocab) = GgufVocab::read(file.metadata()) else { return };
    if let Ok(tokenizer) = Tokenizer::from_gguf(&vocab, "fuzz") {
        round(&tokenizer);
    }
}

/// `input` as a chat template.
pub fn chat_template(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let Ok(template) = ChatTemplate::new(text, "<s>".into(), "</s>".into(), "fuzz", None) else { return };
    let turns = [Message::new("system", "Be brief."), Message::new("user", TEXT), Message::new("assistant", "")];
    for count in 0..=turns.len() {
        let _ = template.render(&turns[..count], count % 2 == 0);
    }
}

/// Uses everything that loading promised to have checked.
fn round(tokenizer: &Tokenizer) {
    for special in [false, true] {
        let Ok(ids) = tokenizer.encode(TEXT, special) else { continue };
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.len()), "an id outside the vocabulary");
        let _ = tokenizer.decode(&ids);
    }
    let _ = (tokenizer.special(), tokenizer.chat_template());
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::format::gguf::{Array, Value, Writer};

    /// `bytes` whole, cut at about `most` places, and with a byte replaced there.
    fn damaged(bytes: &[u8], target: fn(&[u8]), most: usize) {
        target(bytes);
        for at in (0..bytes.len()).step_by((bytes.len() / most).max(1)) {
            target(&bytes[..at]);
            let mut changed = bytes.to_vec();
            changed[at] = changed[at].wrapping_mul(31).wrapping_add(7);
            target(&changed);
        }
    }

    /// A header without tensors and with a small vocabulary.
    fn vocabulary(model: &str) -> Vec<u8> {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
        tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
        tokens.extend(["h", "e", "l", "o", "he", "ll", "hell", "\u{2581}"].map(String::from));
        let n = tokens.len();
        let kinds: Vec<i32> = (0..n)
            .map(|i| {
                if i < 3 {
                    3
                } else if i < 259 {
                    6
                } else {
                    1
                }
            })
            .collect();
        let scores: Vec<f32> = (0..n).map(|i| -(i as f32)).collect();
        let mut writer = Writer::new();
        let text = |t: &str| Value::String(t.to_owned());
        writer.set("tokenizer.ggml.model", text(model)).set("tokenizer.ggml.pre", text("llama-bpe"));
        writer.set("tokenizer.ggml.tokens", Value::Array(Array::strings(&tokens)));
        writer.set("tokenizer.ggml.scores", Value::Array(Array::floats(&scores)));
        writer.set("tokenizer.ggml.token_type", Value::Array(Array::ints(&kinds)));
        writer.set("tokenizer.ggml.merges", Value::Array(Array::strings(["h e", "l l", "he ll"])));
        writer.set("tokenizer.ggml.bos_token_id", Value::U32(1));
        let mut bytes = Vec::new();
        writer.write(&mut bytes, |_, _, _| Ok(())).expect("memory takes it");
        bytes
    }

    #[test]
    fn damaged_tokenizers_are_errors_or_tokenizers() {
        let json = crate::embedded::file("tokenizer.json").expect("the embedded model");
        damaged(&json, tokenizer_json, 12);
        for model in ["llama", "gpt2", "t5"] {
            damaged(&vocabulary(model), gguf_tokenizer, 200);
        }
    }

    #[test]
    fn templates_of_noise_are_errors_or_templates() {
        let seed =
            "{% for m in messages %}{{ bos_token ~ m['content'] | trim }}{% set x = m.role %}{% endfor %}{{ x }}";
        damaged(seed.as_bytes(), chat_template, seed.len());
        for at in 0..seed.len() {
            for with in ["{", "}", "%", "'", "|", "(", "[", "*", "0", "~"] {
                chat_template(format!("{}{with}{}", &seed[..at], &seed[at + 1..]).as_bytes());
            }
        }
    }
}
