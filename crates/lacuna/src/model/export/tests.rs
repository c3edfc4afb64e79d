//! What is written is read as the same model: every fixture whose architecture GGUF has, and real vocabularies.

use super::*;
use crate::{
    model::{load, spec::RopePairs},
    reference,
    tokenizer::Tokenizer,
};
use lacuna_core::{
    format::gguf::{Gguf, TensorType},
    map::LoadMode,
};
use std::path::PathBuf;

fn fixtures() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut all: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let (low, high) = a.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / (high - low)
}

#[test]
fn what_is_written_computes_the_same_logits() {
    let dir = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (1..24).collect();
    let (mut written, mut refused) = (Vec::new(), Vec::new());
    for fixture in fixtures() {
        let name = fixture.file_name().unwrap().to_string_lossy().into_owned();
        let out = dir.path().join(format!("{name}.gguf"));
        match Export::new(&fixture) {
            Ok(export) => export.write(&out).unwrap(),
            Err(e) => {
                refused.push(format!("{name}: {e}"));
                continue;
            }
        }
        let (hf, gguf) =
            (load(&fixture, &LoadOptions::default()).unwrap(), load(&out, &LoadOptions::default()).unwrap());
        let d = distance(&reference::logits(&hf, &tokens).unwrap(), &reference::logits(&gguf, &tokens).unwrap());
        println!("{name}: {d:.1e} of the range");
        assert!(d < 2e-5, "{name}: {d}");
        if gguf.spec.ropes.first().is_some_and(|r| r.pairs == RopePairs::Half) {
            assert_eq!(hf.blocks[0].k.weight.matrix().data(), gguf.blocks[0].k.weight.matrix().data(), "{name}");
        }
        written.push(name);
    }
    refused.iter().for_each(|r| println!("{r}"));
    for name in [
        "bamboo",
        "gemma2",
        "gemma3",
        "gpt-neox",
        "gpt2",
        "llama-relu",
        "llama2",
        "llama2-linear",
        "llama3",
        "mistral",
        "mixtral",
        "phi3",
        "phi3-longrope",
        "qwen2",
        "qwen3",
    ] {
        assert!(written.iter().any(|w| w == name), "{name} was refused: {refused:?}");
    }
    assert!(refused.iter().any(|r| r.starts_with("opt: ") && r.contains("`opt`")), "{refused:?}");
    assert!(refused.iter().any(|r| r.starts_with("qwen3-moe-mixed: ")), "{refused:?}");
}

#[test]
fn settings_that_do_not_fit_the_tensors_are_refused_before_anything_is_written() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama2");
    let settings = ["num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "intermediate_size"];
    for (key, factor) in settings.into_iter().flat_map(|k| [(k, 2), (k, 1000)]) {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&fixture).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
            std::fs::copy(&entry, dir.path().join(entry.file_name().unwrap())).unwrap();
        }
        let file = dir.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        config[key] = (config[key].as_u64().unwrap() * factor).into();
        std::fs::write(&file, config.to_string()).unwrap();
        assert!(Export::new(dir.path()).is_err(), "{key} times {factor}");
    }
}

#[test]
fn the_tensors_are_those_of_the_published_converter() {
    // Files that `gguf` (Python) wrote of the same models: `tools/make_fixtures.py`.
    let dir = tempfile::tempdir().unwrap();
    let mut compared = 0;
    for fixture in fixtures().into_iter().filter(|f| f.join("model.gguf").exists()) {
        let (theirs, out) = (fixture.join("model.gguf"), dir.path().join("out.gguf"));
        Export::new(&fixture).unwrap().write(&out).unwrap();
        let (theirs, ours) = (Gguf::open(&theirs, LoadMode::Map).unwrap(), Gguf::open(&out, LoadMode::Read).unwrap());
        if theirs.is_powerinfer() {
            continue;
        }
        for t in theirs.tensors() {
            let o = ours.get(t.name).unwrap_or_else(|| panic!("{}: {}", fixture.display(), t.name));
            assert_eq!(t.dims, o.dims, "{}: {}", fixture.display(), t.name);
            if t.kind == o.kind && !t.name.starts_with("rope_f") {
                assert!(*theirs.bytes(&t).unwrap() == *ours.bytes(&o).unwrap(), "{}: {}", fixture.display(), t.name);
                compared += 1;
            }
            assert!(t.dims.len() > 1 || o.kind == TensorType::F32, "{}", t.name);
        }
    }
    assert!(compared > 50, "{compared}");
}

#[test]
fn vocabularies_of_trained_models() {
    for (model, kind) in [("lacuna-stories", "gpt2"), ("stories260K/hf-bf16", "llama")] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/models").join(model);
        if !path.exists() {
            println!("skipped: not present: {}", path.display());
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out.gguf");
        Export::new(&path).unwrap().write(&out).unwrap();
        let (hf, gguf) = (Tokenizer::open(&path).unwrap(), Tokenizer::open(&out).unwrap());
        let text =
            "One day, a little girl named Lily found a needle in her room. \u{201c}Ow!\u{201d} she said.\n\nThe end.";
        for part in (0..text.len()).filter(|i| text.is_char_boundary(*i)).map(|i| &text[i..]) {
            assert_eq!(hf.encode(part, true).unwrap(), gguf.encode(part, true).unwrap(), "{part:?}");
        }
        assert_eq!(hf.special().bos, gguf.special().bos);
        assert_eq!(hf.special().eos, gguf.special().eos);
        let file = Gguf::open(&out, LoadMode::Map).unwrap();
        assert_eq!(file.metadata().str("tokenizer.ggml.model").unwrap(), kind);
    }
}
