//! Whole runs that drop neurons, spread shares by running the model, cut ranks, and averages of their outputs.

use super::{
    block::decoded,
    tests::{fixture, request, run, text, tree, zeros},
    *,
};
use crate::{model::load, reference};
use std::fs;

fn open(path: &Path) -> Model {
    load(path, &LoadOptions::default()).unwrap()
}

fn rows(model: &Model, layer: usize, proj: Proj) -> Vec<Vec<f32>> {
    let weight = &model.blocks[layer].linear(proj).unwrap().weight;
    decoded(weight).chunks_exact(weight.inputs()).map(<[f32]>::to_vec).collect()
}

/// The dense model with zeros in the columns of down of all neurons whose row of up is not in `small`.
fn masked(dense: &Model, small: &Model) -> Model {
    let mut masked = dense.clone();
    for layer in 0..dense.blocks.len() {
        let left = rows(small, layer, Proj::Up);
        let gone: Vec<bool> = rows(dense, layer, Proj::Up).iter().map(|r| !left.contains(r)).collect();
        let linear = masked.blocks[layer].linear_mut(Proj::Down).unwrap();
        let (outputs, inputs) = (linear.weight.outputs(), linear.weight.inputs());
        let mut all = decoded(&linear.weight);
        all.iter_mut().enumerate().filter(|(i, _)| gone[i % inputs]).for_each(|(_, w)| *w = 0.0);
        let bytes = tensors::numbers(Format::F32, &all).into();
        linear.weight =
            lacuna_core::weight::Weight::new(Format::F32, Orientation::OutputMajor, outputs, inputs, bytes).unwrap();
    }
    masked
}

fn agree(a: &Model, b: &Model, what: &str) {
    let tokens = [1, 9, 4, 30, 2, 17];
    let [a, b] = [a, b].map(|m| reference::logits(m, &tokens).unwrap());
    let range = a.iter().fold(0.0_f32, |r, x| r.max(x.abs()));
    let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-5 * range, "{what}: {worst} of {range}");
}

#[test]
fn dropped_neurons_make_files_smaller_and_are_what_masking_is() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama2", "phi3", "gpt2", "opt", "gpt-neox", "gemma2", "llama2-bf16"] {
        let (model, out) = (fixture(name), dir.path().join(name));
        let spec = "cfsp=0.5:compensate=0:multiple=8";
        let report = run(&request(&model, &out, spec, Some(text(32, 8, 24)))).unwrap();
        let (dense, small) = (open(&model), open(&out));
        let width = |m: &Model| m.blocks[0].linear(Proj::Down).unwrap().weight.inputs();
        assert_eq!(width(&small), ((width(&dense) as f64 / 16.0).round() * 8.0) as usize, "{name}");
        assert!(report.bytes.1 < report.bytes.0, "{name}");
        let told: u64 = report.layers.iter().map(|l| l.bytes.0 - l.bytes.1).sum();
        let biases = report.bytes.0 - report.bytes.1 - told;
        assert!(biases as usize <= 4 * dense.blocks.len() * width(&dense), "{name}: {biases}");
        assert!(report.notes.iter().any(|n| n.contains("loads everywhere")), "{name}");
        agree(&masked(&dense, &small), &small, name);
        // Attention is untouched.
        assert_eq!(rows(&dense, 1, Proj::O), rows(&small, 1, Proj::O), "{name}");
    }
    let (model, out) = (fixture("phi3").join("model.gguf"), dir.path().join("out.gguf"));
    run(&request(&model, &out, "cfsp=0.5:compensate=0:multiple=8", Some(text(32, 8, 24)))).unwrap();
    let (dense, small) = (open(&model), open(&out));
    assert!(fs::metadata(&out).unwrap().len() < fs::metadata(&model).unwrap().len());
    agree(&masked(&dense, &small), &small, "gguf");
}

#[test]
fn nothing_to_drop_is_the_model_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (fixture("opt"), dir.path().join("out"));
    run(&request(&model, &out, "cfsp=0", Some(text(32, 8, 24)))).unwrap();
    let (dense, same) = (open(&model), open(&out));
    for proj in [Proj::Up, Proj::Down] {
        assert_eq!(rows(&dense, 0, proj), rows(&same, 0, proj));
    }
    agree(&dense, &same, "identity");
}

#[test]
fn budgets_by_block_leave_zeros_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (fixture("llama2"), dir.path().join("out"));
    let asked = request(&model, &out, "cfsp=0.5:multiple=1", Some(text(32, 8, 24)));
    let report = run(&Request { ratios: Ratios::Angular, ..asked }).unwrap();
    let (dense, sparse) = (open(&model), open(&out));
    let inner = rows(&dense, 0, Proj::Up).len();
    let live: Vec<usize> = (0..2)
        .map(|l| {
            let up = rows(&sparse, l, Proj::Up);
            assert_eq!(up.len(), inner);
            let live = up.iter().take_while(|r| r.iter().any(|w| *w != 0.0)).count();
            assert!(up[live..].iter().flatten().all(|w| *w == 0.0), "those that stay come first");
            assert!(rows(&sparse, l, Proj::Down).iter().all(|r| r[live..].iter().all(|w| *w == 0.0)));
            live
        })
        .collect();
    assert!(live[0] != live[1] && live.iter().sum::<usize>().abs_diff(inner) <= 1, "{live:?} of {inner}");
    assert!(report.bytes.0 == report.bytes.1 && report.notes.iter().any(|n| n.contains("saves nothing")));
}

#[test]
fn neurons_are_dropped_alone_and_where_there_are_some() {
    let dir = tempfile::tempdir().unwrap();
    let error = |model: &Path, spec: &str, ratios: Ratios| {
        let asked = request(model, &dir.path().join("out"), spec, Some(text(32, 8, 24)));
        run(&Request { ratios, ..asked }).unwrap_err().to_string()
    };
    assert!(error(&fixture("llama2"), "cfsp=0.5,rtn=4:group=2", Ratios::Uniform).contains("run it alone"));
    assert!(error(&fixture("mixtral"), "cfsp=0.5", Ratios::Uniform).contains("experts"));
    assert!(error(&fixture("llama2"), "cfsp=0.5", Ratios::Loss).contains("use uniform or angular ratios"));
    let none = request(&fixture("llama2"), &dir.path().join("out"), "magnitude=0.5", None);
    assert!(run(&Request { ratios: Ratios::Angular, ..none }).unwrap_err().to_string().contains("-f FILE"));
}

#[test]
fn blocks_that_matter_more_keep_more() {
    let dir = tempfile::tempdir().unwrap();
    for (i, ratios) in [Ratios::Angular, Ratios::Ecoflap].into_iter().enumerate() {
        for spec in ["wanda=0.5", "magnitude=0.5"] {
            let out = dir.path().join(format!("{i}-{spec}"));
            let asked = request(&fixture("llama2"), &out, spec, Some(text(32, 8, 24)));
            let report = run(&Request { ratios, ..asked }).unwrap();
            assert!((report.sparsity() - 0.5).abs() < 0.02, "{spec}: {}", report.sparsity());
            let shares = zeros(&open(&out));
            assert!((shares[0] - shares[7]).abs() > 1e-3, "{spec}: the blocks differ: {shares:?}");
            assert!(shares[..7].iter().all(|s| (s - shares[0]).abs() < 0.03), "{spec}: {shares:?}");
            assert_eq!(
                ratios == Ratios::Ecoflap,
                report.notes.iter().any(|n| n.contains("rank correlation")),
                "{spec}"
            );
        }
    }
}

#[test]
fn ranks_are_cut_of_queries_alone_and_bits_follow_influence() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (fixture("gpt-neox"), dir.path().join("out"));
    run(&request(&model, &out, "casp=0.5", Some(text(32, 8, 24)))).unwrap();
    let (dense, low) = (open(&model), open(&out));
    for (proj, same) in [(Proj::Q, false), (Proj::K, false), (Proj::V, true), (Proj::Up, true)] {
        assert_eq!(rows(&dense, 0, proj) == rows(&low, 0, proj), same, "{proj}");
    }
    let codes = dir.path().join("codes");
    let mut asked = request(&model, &codes, "casp=0.5,rtn=4:group=0", Some(text(32, 8, 24)));
    let all: u64 = fs::read_dir(&model)
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| e.path().extension().is_some_and(|x| x == "safetensors"))
        .map(|e| e.metadata().unwrap().len())
        .sum();
    asked.goal = Some(Goal::Bytes(all * 3 / 4));
    let report = run(&asked).unwrap();
    assert!(report.bytes.1 <= all * 3 / 4);
}

#[test]
fn a_soup_is_the_mean_under_the_same_mask() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("llama2");
    let make = |name: &str, spec: &str, seed: usize| {
        let out = dir.path().join(name);
        let mut words = text(32, 8, 24);
        words.windows.iter_mut().flatten().for_each(|t| *t = (*t * 7 + seed as u32) % 32);
        run(&request(&model, &out, spec, Some(words))).unwrap();
        out
    };
    // Equal places, other texts.
    let [a, b] = [("a", 0), ("b", 5)].map(|(name, seed)| make(name, "chita=0.5:steps=0", seed));
    let out = dir.path().join("soup");
    let report = soup(&[a.clone(), b.clone()], &out).unwrap();
    assert!(report.masked >= 14 && (report.zeros - 0.5).abs() < 0.01, "{report:?}");
    let [ma, mb, mean] = [&a, &b, &out].map(|p| open(p));
    assert_ne!(rows(&ma, 1, Proj::Up), rows(&mb, 1, Proj::Up));
    for (layer, proj) in [(0, Proj::Q), (1, Proj::Down)] {
        let of = |m: &Model| rows(m, layer, proj).concat();
        for ((a, b), m) in of(&ma).into_iter().zip(of(&mb)).zip(of(&mean)) {
            assert_eq!(m, ((f64::from(a) + f64::from(b)) / 2.0) as f32);
            assert_eq!((a == 0.0, b == 0.0), (m == 0.0, m == 0.0));
        }
    }
    // Equal models are their own mean.
    let again = dir.path().join("again");
    soup(&[a.clone(), a.clone(), a.clone()], &again).unwrap();
    assert_eq!(tree(&again)["model.safetensors"], tree(&a)["model.safetensors"]);
    // Other masks.
    let other = make("other", "wanda=0.5", 0);
    let left = fs::read_dir(dir.path()).unwrap().count();
    let refused = |models: &[PathBuf]| soup(models, &dir.path().join("none")).unwrap_err().to_string();
    let e = refused(&[a.clone(), other]);
    assert!(e.contains("layers.0.") && e.contains("its zeros are others"), "{e}");
    assert!(refused(std::slice::from_ref(&a)).contains("two models"));
    assert!(refused(&[a.clone(), fixture("phi3").join("model.gguf")]).contains("no Hugging Face directory"));
    let e = refused(&[a.clone(), fixture("llama3")]);
    assert!(e.contains("llama3") && e.contains("config.json") && e.contains("` is "), "{e}");
    // A number that is none.
    let broken = dir.path().join("broken");
    fs::create_dir(&broken).unwrap();
    tree(&a).iter().for_each(|(name, bytes)| fs::write(broken.join(name), bytes).unwrap());
    let mut bytes = fs::read(broken.join("model.safetensors")).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(broken.join("model.safetensors"), bytes).unwrap();
    let left = left + 1;
    let e = refused(&[a.clone(), broken]);
    assert!(e.contains("tensor `") && e.contains("broken") && e.contains("NaN"), "{e}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), left);
}
