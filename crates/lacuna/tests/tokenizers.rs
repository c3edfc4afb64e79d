//! Tokenizers of the shared models: ids stated in their README, and the two forms of one vocabulary.

mod common;

use common::{shared, stories};
use lacuna::tokenizer::{GgufVocab, MAX_TEXT_BYTES, Tokenizer, TokenizerFiles};

const HARD: [&str; 6] =
    ["", "a\tb  c", "caf\u{e9} \u{4f60}\u{597d}", "\u{201c}quoted\u{201d} \u{1F600}!", " leading", "trailing \n\n"];

#[test]
fn hugging_face_and_gguf_forms_give_the_same_ids() {
    let (Some(hf), Some(gguf)) =
        (shared("models/stories260K/hf-f32"), shared("models/stories260K/gguf/stories260K-f32.gguf"))
    else {
        return;
    };
    let hf = Tokenizer::open(&hf).expect("a valid directory");
    let gguf = Tokenizer::open(&gguf).expect("a valid file");
    assert_eq!(hf.encode("Once upon a time", true).expect("encodes"), [1, 403, 407, 261, 378]);
    let stories = stories(150);
    for text in HARD.into_iter().chain(stories.iter().map(String::as_str)) {
        let ids = hf.encode(text, true).expect("encodes");
        let other = gguf.encode(text, true).expect("encodes");
        // llama.cpp gives the empty text no space piece; `tokenizers` neither.
        assert_eq!(ids, other, "{text:?}");
        assert_eq!(hf.decode(&ids), text, "{ids:?}");
        assert_eq!(gguf.decode(&ids), text, "{ids:?}");
    }
    assert_eq!((hf.special().bos, gguf.special().bos), (Some(1), Some(1)));
    assert!(hf.is_eos(2) && gguf.is_eos(2));
    assert!(hf.check_vocab(512).is_ok());
    assert!(hf.check_vocab(511).is_err());
}

#[test]
fn byte_level_bpe_round_trips_and_has_the_stated_ids() {
    let Some(dir) = shared("models/lacuna-stories") else { return };
    let t = Tokenizer::open(&dir).expect("a valid directory");
    assert_eq!(t.encode("Once upon a time", true).expect("encodes"), [0, 433, 447, 259, 405]);
    assert_eq!(t.encode("Once upon a time", false).expect("encodes"), [433, 447, 259, 405]);
    let stories = stories(100);
    for text in HARD.into_iter().chain(stories.iter().map(String::as_str)) {
        let ids = t.encode(text, true).expect("encodes");
        assert_eq!(t.decode(&ids), text);
        let mut stream = t.stream(&[]);
        let parts: String = ids.iter().map(|&id| stream.push(id)).collect();
        assert_eq!(parts + &stream.finish(), text);
    }
    assert_eq!(t.special().eos, [0]);
}

#[test]
fn decoding_agrees_with_the_tokenizers_crate() {
    for dir in ["models/lacuna-stories", "models/stories260K/hf-f32"] {
        let Some(dir) = shared(dir) else { return };
        let ours = Tokenizer::open(&dir).expect("a valid directory");
        let theirs = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).expect("a valid file");
        for text in HARD {
            let ids = ours.encode(text, true).expect("encodes");
            assert_eq!(ours.decode(&ids), theirs.decode(&ids, true).expect("decodes"));
        }
    }
}

#[test]
fn damaged_files_are_errors_that_name_the_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let open = || Tokenizer::open(dir.path()).map(|_| ()).expect_err("no tokenizer").to_string();
    assert!(open().contains("tokenizer.json"));
    for bad in [
        "",
        "{",
        "[]",
        "{\"version\": \"1.0\"}",
        "{\"model\": {\"type\": \"BPE\", \"vocab\": {}, \"merges\": [\"a b\"]}}",
    ] {
        std::fs::write(dir.path().join("tokenizer.json"), bad).expect("a file");
        assert!(open().contains("tokenizer.json"), "{bad}");
    }
}

/// The vocabulary of a byte-level `tokenizer.json` as a GGUF file would store it.
fn as_gguf(json: &serde_json::Value) -> GgufVocab {
    let vocab = json["model"]["vocab"].as_object().expect("a vocabulary");
    let mut tokens = vec![String::new(); vocab.len()];
    vocab.iter().for_each(|(piece, id)| tokens[id.as_u64().expect("an id") as usize] = piece.clone());
    let merge = |m: &serde_json::Value| match m {
        serde_json::Value::Array(pair) => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        text => text.as_str().expect("a merge").to_owned(),
    };
    let mut types = vec![1; tokens.len()];
    types[0] = 3;
    GgufVocab {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        types,
        merges: json["model"]["merges"].as_array().expect("merges").iter().map(merge).collect(),
        bos: Some(0),
        eos: Some(0),
        add_bos: Some(true),
        tokens,
        ..GgufVocab::default()
    }
}

#[test]
fn byte_level_bpe_from_gguf_entries_gives_the_ids_of_tokenizer_json() {
    let Some(dir) = shared("models/lacuna-stories") else { return };
    let hf = Tokenizer::open(&dir).expect("a valid directory");
    let text = std::fs::read_to_string(dir.join("tokenizer.json")).expect("readable text");
    let vocab = as_gguf(&serde_json::from_str(&text).expect("valid JSON"));
    let gguf = Tokenizer::from_gguf(&vocab, "x.gguf").expect("a valid vocabulary");
    let stories = stories(300);
    let marked = "a story<|endoftext|>another";
    for text in HARD.into_iter().chain([marked]).chain(stories.iter().map(String::as_str)) {
        let ids = hf.encode(text, true).expect("encodes");
        assert_eq!(gguf.encode(text, true).expect("encodes"), ids, "{text:?}");
        assert_eq!(gguf.decode(&ids), hf.decode(&ids));
    }
}

#[test]
fn a_cut_tokenizer_is_an_error_wherever_it_is_cut() {
    let Some(dir) = shared("models/stories260K/hf-f32") else { return };
    let whole = std::fs::read(dir.join("tokenizer.json")).expect("readable");
    let end = whole.trim_ascii_end().len();
    for cut in (0..end).step_by(61).chain([end - 1]) {
        let files = TokenizerFiles { tokenizer: whole[..cut].to_vec(), ..TokenizerFiles::default() };
        assert!(Tokenizer::from_files(&files, "cut.json").is_err_and(|e| e.to_string().contains("cut.json")), "{cut}");
    }
}

#[test]
fn a_text_that_is_too_long_is_refused_with_both_numbers() {
    let Some(dir) = shared("models/stories260K/hf-f32") else { return };
    let t = Tokenizer::open(&dir).expect("a valid directory");
    let message = t.encode(&" ".repeat(MAX_TEXT_BYTES + 1), true).expect_err("too long").to_string();
    assert!(message.contains(&MAX_TEXT_BYTES.to_string()) && message.contains(&(MAX_TEXT_BYTES + 1).to_string()));
}
