//! The trained models of ../shared/models against the figures of their README: perplexity, agreement of file formats,
//! greedy text. Skipped where the models are not present.

use lacuna::engine::{Engine, KvType, Options};
use lacuna::model::{LoadOptions, Model, load};
use lacuna::reference;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::Tokenizer;

fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: not present: {}", path.display());
    None
}

fn open(path: &Path) -> Model {
    load(path, &LoadOptions { check_tensors: true, ..LoadOptions::default() }).unwrap()
}

fn stories() -> Option<String> {
    shared("data/tinystories-sample/stories.txt").map(|file| std::fs::read_to_string(file).unwrap())
}

fn split(text: &str) -> Vec<&str> {
    text.split("<|endoftext|>").map(str::trim).filter(|s| !s.is_empty()).collect()
}

/// Perplexity of stories encoded on their own and cut to 512 tokens, over all predicted tokens: the README's protocol.
fn perplexity(stories: &[&str], tokenizer: &Tokenizer, mut logits: impl FnMut(&[u32]) -> Vec<f32>) -> f64 {
    let vocab = tokenizer.get_vocab_size(true);
    let (mut loss, mut tokens) = (0.0_f64, 0_usize);
    for story in stories {
        let ids = tokenizer.encode(*story, true).unwrap();
        let ids = &ids.get_ids()[..ids.len().min(512)];
        let logits = logits(&ids[..ids.len() - 1]);
        assert_eq!(logits.len(), (ids.len() - 1) * vocab);
        for (row, next) in logits.chunks_exact(vocab).zip(&ids[1..]) {
            let max = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
            let sum: f64 = row.iter().map(|v| (f64::from(*v) - max).exp()).sum();
            loss -= f64::from(row[*next as usize]) - max - sum.ln();
            tokens += 1;
        }
    }
    (loss / tokens as f64).exp()
}

fn greedy(model: &Model, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..n {
        let logits = reference::logits(model, &ids).unwrap();
        let last = &logits[logits.len() - model.spec.vocab..];
        let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
        ids.push(best as u32);
    }
    ids[prompt.len()..].to_vec()
}

fn tokenizer(dir: &Path) -> Tokenizer {
    Tokenizer::from_file(dir.join("tokenizer.json")).unwrap()
}

const IDS: [u32; 10] = [1, 403, 407, 261, 378, 200, 42, 300, 7, 511];

fn worst(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The bounds are the differences that `transformers` finds between the same files (README, last column), doubled.
#[test]
fn stories260k_is_the_same_model_in_every_file() {
    let Some(dir) = shared("models/stories260K") else { return };
    let reference = reference::logits(&open(&dir.join("hf-f32")), &IDS).unwrap();
    let cases = [
        ("gguf/stories260K-f32.gguf", 1e-3),
        ("gguf/stories260K-f16.gguf", 0.03),
        ("hf-bf16", 0.6),
        ("gguf/stories260K-q8_0.gguf", 0.5),
        ("gguf/stories260K-q4_0.gguf", 10.0),
    ];
    for (file, bound) in cases {
        let model = open(&dir.join(file));
        let d = worst(&reference::logits(&model, &IDS).unwrap(), &reference);
        println!("stories260K/{file}: largest logit difference {d:.2e}");
        assert!(d <= bound, "{file}: {d}");
    }
}

/// Per-layer embeddings: the logits of the last position that the model's own PyTorch code gives (`golden.txt`: the number of
/// tokens, the tokens, the logits), by the reference and by the engine at once and token by token.
#[test]
fn per_layer_embeddings_give_the_golden_logits() {
    let Some(dir) = shared("models/tinystories-ple-3.6M") else { return };
    let golden = std::fs::read_to_string(dir.join("golden.txt")).unwrap();
    let mut lines = golden.lines();
    let count: usize = lines.next().unwrap().trim().parse().unwrap();
    let ids: Vec<u32> = lines.next().unwrap().split_whitespace().map(|t| t.parse().unwrap()).collect();
    let expected: Vec<f32> = lines.map(|l| l.trim().parse().unwrap()).collect();
    let model = Arc::new(open(&dir));
    assert_eq!((ids.len(), expected.len()), (count, model.spec.vocab));
    let all = reference::logits(&model, &ids).unwrap();
    let options = Options { kv: KvType::F32, ..Options::default() };
    let engine = Engine::new(model, options).unwrap();
    let (mut at_once, mut step_by_step) = (engine.session(0).unwrap(), engine.session(0).unwrap());
    let prefilled = at_once.prefill(&ids).unwrap().to_vec();
    let mut decoded = Vec::new();
    for id in &ids {
        decoded = step_by_step.decode(*id).unwrap().to_vec();
    }
    let reference = &all[all.len() - expected.len()..];
    for (name, logits) in [("reference", reference), ("prefill", &prefilled), ("decode", &decoded)] {
        let d = worst(logits, &expected);
        println!("{name}: largest difference {d:.1e}");
        assert!(d < 1e-4, "{name}: {d}");
    }
}

/// The first stories, and the first of the last 300, by the reference: the figures that `transformers` 5.23 gives for the
/// same texts with the same weights in f32.
#[test]
fn perplexities_are_those_of_transformers() {
    let Some(text) = stories() else { return };
    let stories = split(&text);
    let late = &stories[stories.len() - 300..][..4];
    let cases = [
        ("stories260K/hf-f32", &stories[..12], 5.073_00),
        ("lacuna-stories", late, 5.488_17),
        ("lacuna-stories-relu", late, 5.668_59),
    ];
    for (name, stories, expected) in cases {
        let Some(dir) = shared(&format!("models/{name}")) else { return };
        let model = open(&dir);
        let found = perplexity(stories, &tokenizer(&dir), |ids| reference::logits(&model, ids).unwrap());
        println!("{name}: perplexity {found:.5}, transformers {expected}");
        assert!((found / expected - 1.0).abs() <= 2e-5, "{name}: {found}");
    }
}

/// All figures of the README (200 stories from the start, 300 from the end) by the engine. Minutes on a busy machine: runs
/// where LACUNA_SLOW_TESTS is set.
#[test]
fn perplexities_are_those_of_the_readme() {
    if std::env::var_os("LACUNA_SLOW_TESTS").is_none() {
        println!("skipped: slow (set LACUNA_SLOW_TESTS)");
        return;
    }
    let Some(text) = stories() else { return };
    let stories = split(&text);
    let (start, end) = (&stories[..200], &stories[stories.len() - 300..]);
    let cases = [
        ("stories260K/hf-f32", "stories260K/hf-f32", start, 4.0047, 0.0002),
        ("stories260K/gguf/stories260K-q8_0.gguf", "stories260K/hf-f32", start, 4.0076, 0.01),
        ("stories260K/gguf/stories260K-q4_0.gguf", "stories260K/hf-f32", start, 4.3842, 0.02),
        ("lacuna-stories", "lacuna-stories", end, 11.132, 0.02),
        ("lacuna-stories-relu", "lacuna-stories-relu", end, 11.808, 0.02),
    ];
    for (file, tokens, stories, expected, tolerance) in cases {
        let (Some(path), Some(dir)) = (shared(&format!("models/{file}")), shared(&format!("models/{tokens}"))) else {
            return;
        };
        let options = Options { kv: KvType::F32, ..Options::default() };
        let engine = Engine::new(Arc::new(open(&path)), options).unwrap();
        let found = perplexity(stories, &tokenizer(&dir), |ids| {
            let mut logits = Vec::new();
            engine.session(512).unwrap().score(ids, &mut |_, row| logits.extend_from_slice(row)).unwrap();
            logits
        });
        println!("{file}: perplexity {found:.4}, README {expected}");
        assert!((found - expected).abs() <= tolerance, "{file}: {found}");
    }
}

#[test]
fn greedy_text_is_that_of_the_readme() {
    let cases: [(&str, &[u32], &str); 4] = [
        (
            "models/stories260K/hf-f32",
            &[1, 403, 407, 261, 378],
            "there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball.",
        ),
        (
            "models/lacuna-stories",
            &[0, 433, 447, 259, 405],
            "there was a little girl named Lily. She loved to play outside in the sun. One day, she saw a big, scary dog.",
        ),
        (
            "models/lacuna-stories-relu",
            &[0, 433, 447, 259, 405],
            "there was a little girl named Lily. She loved to play outside in the sun. One day, she saw a big, scary dog.",
        ),
        (
            "models/tinystories-ple-3.6M",
            &[433, 447, 259, 405],
            "there was a little girl named Lily. She loved to play with her toys and her favorite toy was a big, red ball.",
        ),
    ];
    for (path, prompt, expected) in cases {
        let Some(dir) = shared(path) else { return };
        let ids = greedy(&open(&dir), prompt, if path.contains("260K") { 48 } else { 32 });
        let text = tokenizer(&dir).decode(&ids, true).unwrap();
        println!("{path}: {text}");
        assert!(text.contains(expected), "{path}: {text}");
    }
}
