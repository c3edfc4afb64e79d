//! Every architecture against `transformers`: the fixtures of `tools/make_fixtures.py` hold tiny models with the logits
//! that the library computes. `cargo test --release -p lacuna --test parity -- --nocapture` prints the table.

use lacuna::engine::{Engine, KvType, Options};
use lacuna::model::{LoadOptions, Model, load};
use lacuna::reference;
use lacuna_core::format::safetensors::Tensors;
use lacuna_core::map::{LoadMode, open};
use lacuna_kernels::convert::decode_run;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest difference from `transformers`, relative to the range of the logits. All weights of the fixtures (f32, f16,
/// bf16) are exact in both programs, and both compute in f32.
const BOUND: f32 = 1e-4;

fn fixtures() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut all: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    assert!(all.len() >= 25, "only {} fixtures", all.len());
    all
}

struct Expected {
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

fn expected(dir: &Path) -> Expected {
    let file = Tensors::parse(open(dir.join("expected.safetensors"), LoadMode::Read).unwrap()).unwrap();
    let ids = file.bytes(file.get("ids").unwrap()).unwrap();
    let entry = file.get("logits").unwrap();
    let mut logits = vec![0.0; entry.shape.iter().product::<u64>() as usize];
    decode_run(entry.format().unwrap(), &file.bytes(entry).unwrap(), &mut logits);
    Expected { tokens: ids.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect(), logits }
}

/// Largest difference over the range of the expected values.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let (low, high) = expected.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(found.iter().all(|v| v.is_finite()));
    worst / (high - low)
}

fn name(dir: &Path) -> String {
    dir.file_name().unwrap().to_string_lossy().into_owned()
}

fn reference_distance(model: &Model, expected: &Expected) -> f32 {
    distance(&reference::logits(model, &expected.tokens).unwrap(), &expected.logits)
}

#[test]
fn reference_agrees_with_transformers() {
    println!("| fixture | architecture | format | reference, safetensors | reference, gguf |\n|---|---|---|---:|---:|");
    for dir in fixtures() {
        let expected = expected(&dir);
        let model = load(&dir, &LoadOptions::default()).unwrap();
        let d = reference_distance(&model, &expected);
        let gguf = dir.join("model.gguf");
        let g = gguf.exists().then(|| reference_distance(&load(&gguf, &LoadOptions::default()).unwrap(), &expected));
        let shown = g.map_or("-".into(), |g| format!("{g:.1e}"));
        println!("| {} | {} | {} | {d:.1e} | {shown} |", name(&dir), model.spec.arch, model.embed.format().name());
        assert!(d <= BOUND, "{}: {d}", name(&dir));
        assert!(g.is_none_or(|g| g <= BOUND), "{} (gguf): {g:?}", name(&dir));
    }
}

/// Largest difference of the engine's prefill from `transformers`: its products round activations to bf16, or to int8 per
/// 32, where the weights are not f32 or f16 (`lacuna_kernels::gemm`). Decode computes with f32 activations.
fn prefill_bound(format: &str) -> f32 {
    if matches!(format, "F32" | "F16") { BOUND } else { 1e-2 }
}

/// Distances of prefill and of step-by-step decode.
fn engine_distances(model: Model, expected: &Expected) -> (f32, f32) {
    let options = Options { threads: 2, kv: KvType::F32, prefill_chunk: 7, ..Options::default() };
    let engine = Engine::new(Arc::new(model), options).unwrap();
    let mut session = engine.session(0).unwrap();
    let mut scored = Vec::new();
    session.score(&expected.tokens, &mut |_, logits| scored.extend_from_slice(logits)).unwrap();
    session.truncate(0);
    let stepped: Vec<f32> = expected.tokens.iter().flat_map(|&t| session.decode(t).unwrap().to_vec()).collect();
    (distance(&scored, &expected.logits), distance(&stepped, &expected.logits))
}

#[test]
fn engine_agrees_with_transformers() {
    println!("| fixture | format | file | prefill | decode |\n|---|---|---|---:|---:|");
    let mut worst = Vec::new();
    for dir in fixtures() {
        let expected = expected(&dir);
        for file in [dir.clone(), dir.join("model.gguf")].into_iter().filter(|f| f.exists()) {
            let model = load(&file, &LoadOptions::default()).unwrap();
            let format = model.blocks[0].q.weight.format().name();
            let (prefill, decode) = engine_distances(model, &expected);
            let kind = if file.is_dir() { "safetensors" } else { "gguf" };
            println!("| {} | {format} | {kind} | {prefill:.1e} | {decode:.1e} |", name(&dir));
            if prefill > prefill_bound(format) || decode > BOUND {
                worst.push(format!("{} {kind} {format}: prefill {prefill:.1e}, decode {decode:.1e}", name(&dir)));
            }
        }
    }
    assert!(worst.is_empty(), "{worst:#?}");
}
