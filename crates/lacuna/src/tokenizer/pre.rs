//! How byte-level BPE cuts text into words before merging, by the name that GGUF files store in `tokenizer.ggml.pre`.
//! The expressions are those of the models' own `tokenizer.json` files (and of llama.cpp's `llama-vocab.cpp`).

/// One way of cutting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PreTokenizer {
    /// Expressions applied one after the other; what they match and what lies between are words.
    pub splits: &'static [&'static str],
    /// Whole words of the vocabulary are taken as they are, without merging.
    pub ignore_merges: bool,
    /// Text is brought to Unicode form NFC first.
    pub nfc: bool,
}

pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const ONE_DIGIT: &str = r"\p{N}";

const fn plain(splits: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { splits, ignore_merges: false, nfc: false }
}

/// Every name that is understood.
const TABLE: &[(&str, PreTokenizer)] = &[
    ("default", plain(&[GPT2])),
    ("gpt-2", plain(&[GPT2])),
    ("gpt2", plain(&[GPT2])),
    ("gpt-neox", plain(&[GPT2])),
    ("olmo", plain(&[GPT2])),
    ("phi-2", plain(&[GPT2])),
    ("mpt", plain(&[GPT2])),
    ("jina-es", plain(&[GPT2])),
    ("smollm", plain(&[ONE_DIGIT, GPT2])),
    ("starcoder", plain(&[ONE_DIGIT, GPT2])),
    ("refact", plain(&[ONE_DIGIT, GPT2])),
    ("command-r", plain(&[ONE_DIGIT, GPT2])),
    ("llama3", PreTokenizer { splits: &[LLAMA3], ignore_merges: true, nfc: false }),
    ("llama-v3", PreTokenizer { splits: &[LLAMA3], ignore_merges: true, nfc: false }),
    ("llama-bpe", PreTokenizer { splits: &[LLAMA3], ignore_merges: true, nfc: false }),
    ("dbrx", plain(&[LLAMA3])),
    ("smaug-bpe", plain(&[LLAMA3])),
    ("qwen2", PreTokenizer { splits: &[QWEN2], ignore_merges: false, nfc: true }),
    ("deepseek-r1-qwen", PreTokenizer { splits: &[QWEN2], ignore_merges: false, nfc: true }),
    ("stablelm2", plain(&[QWEN2])),
    ("gpt-4o", plain(&[GPT4O])),
    ("llama4", plain(&[GPT4O])),
    ("tekken", PreTokenizer { splits: &[TEKKEN], ignore_merges: true, nfc: false }),
];

/// The cutting rule of that name.
pub(super) fn find(name: &str) -> Option<PreTokenizer> {
    TABLE.iter().find(|(n, _)| *n == name).map(|(_, p)| *p)
}

/// The name of a cutting rule; the first where several have it.
pub(super) fn name_of(splits: &[String], ignore_merges: bool, nfc: bool) -> Option<&'static str> {
    let same = |p: &PreTokenizer| p.splits == splits && (p.ignore_merges, p.nfc) == (ignore_merges, nfc);
    TABLE.iter().skip(1).find(|(_, p)| same(p)).map(|(n, _)| *n)
}

/// Names of the pre-tokenizers that GGUF files may ask for.
pub fn known() -> Vec<&'static str> {
    TABLE.iter().map(|(n, _)| *n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{
        PreTokenizedString, PreTokenizer as _, SplitDelimiterBehavior,
        pre_tokenizers::split::{Split, SplitPattern},
    };

    fn words(name: &str, text: &str) -> Vec<String> {
        let mut cut = PreTokenizedString::from(text);
        for regex in find(name).expect("a known name").splits {
            let pattern = SplitPattern::Regex((*regex).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).expect("a valid expression");
            split.pre_tokenize(&mut cut).expect("text can be cut");
        }
        let parts = cut.get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
        parts.into_iter().map(|(s, _, _)| s.to_owned()).collect()
    }

    #[test]
    fn every_expression_compiles_and_loses_nothing() {
        let text = "It's 12345 o'clock,\r\n\n  don't   PANIC!! caf\u{e9} \u{4f60}\u{597d} x_1 \t end ";
        for name in known() {
            assert_eq!(words(name, text).concat(), text, "{name}");
        }
    }

    #[test]
    fn digits_and_contractions_are_cut_as_the_models_do() {
        assert_eq!(words("gpt-2", "it's 12345"), ["it", "'s", " 12345"]);
        assert_eq!(words("llama-bpe", "IT'S 12345"), ["IT", "'S", " ", "123", "45"]);
        assert_eq!(words("qwen2", "a 12\n\n b"), ["a", " ", "1", "2", "\n\n", " b"]);
        assert_eq!(words("starcoder", "a 12"), ["a", " ", "1", "2"]);
        assert!(find("no-such").is_none());
    }
}
