//! Compressed models in `transformers` (with `compressed-tensors` where there are codes): the same logits as Lacuna's.
//! `tools/check_compressed.py` does that side; without Python or its packages the test says so and passes.

use lacuna::{
    compress::{Calibration, Goal, Request, compress},
    model::{LoadOptions, load},
    reference,
};
use lacuna_methods::{registry, weights::ratios::Ratios};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Largest difference relative to the range of the logits; all weights are exact in both programs, and both compute in f32.
const BOUND: f32 = 1e-4;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(vocab: usize) -> Calibration {
    let token = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % vocab as u32;
    let windows = (0..16).map(|w| (0..64).map(|t| token(w * 64 + t + 1)).collect()).collect();
    Calibration { windows, sha256: "of a text".into(), available: 1024 }
}

/// Logits by `transformers`; `None` where something it needs is not installed.
fn transformers(model: &Path, tokens: &[u32]) -> Option<Vec<f32>> {
    let python = std::env::var("LACUNA_PYTHON").unwrap_or_else(|_| "python3".into());
    let out = model.with_extension("logits");
    let mut command = Command::new(&python);
    command.arg(repository().join("tools/check_compressed.py")).arg(model).arg(&out);
    command.args(tokens.iter().map(u32::to_string)).env("HF_HUB_OFFLINE", "1");
    let Ok(result) = command.output() else {
        println!("skipped: not present: {python}");
        return None;
    };
    if result.status.code() == Some(3) {
        println!("skipped: {}", String::from_utf8_lossy(&result.stdout).trim());
        return None;
    }
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let bytes = fs::read(&out).expect("the tool wrote the logits");
    Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

#[test]
fn transformers_computes_the_same_logits() {
    let embedded = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/embedded");
    if !embedded.is_dir() {
        println!("skipped: not present: {}", embedded.display());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vocab = load(&embedded, &LoadOptions::default()).unwrap().spec.vocab;
    let tokens: Vec<u32> = (1..24).map(|i| i * 37 % vocab as u32).collect();
    let searched = "rtn=4:group=64 in 6000000 bytes";
    let specs =
        ["sparsegpt=0.5", "wanda=0.5,gptq=4:group=64", "rtn=8:group=0", "cfsp=0.5:multiple=8", "gptvq=3:rounds=5"];
    for spec in specs.into_iter().chain([searched]) {
        let output = dir.path().join(spec.replace([',', '=', ':', ' '], "-"));
        let (spec, bytes) = spec.strip_suffix(" bytes").and_then(|s| s.split_once(" in ")).unwrap_or((spec, ""));
        let request = Request {
            model: embedded.clone(),
            output: output.clone(),
            gguf: false,
            steps: registry::parse(spec).unwrap(),
            ratios: Ratios::Uniform,
            goal: bytes.parse().ok().map(Goal::Bytes),
            lock: None,
            calibration: Some(text(vocab)),
            seed: 0,
            threads: 0,
            streams_in_memory: 1 << 30,
        };
        let report = compress(&request, &mut |_| {}).unwrap();
        if request.goal.is_some() {
            // Codes of several widths, one group of the configuration for each.
            let widths: BTreeSet<_> = report.layers.iter().map(|l| l.bits).collect();
            let config = fs::read_to_string(output.join("config.json")).unwrap();
            assert!(widths.len() > 1 && config.contains("group_1"), "{widths:?}");
        }
        let own = reference::logits(&load(&output, &LoadOptions::default()).unwrap(), &tokens).unwrap();
        let Some(theirs) = transformers(&output, &tokens) else { continue };
        let (low, high) = theirs.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
        let worst = own.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / (high - low);
        println!("{spec}: {worst:.2e} of the range");
        assert!(own.len() == theirs.len() && worst < BOUND, "{spec}: {worst}");
    }
}
