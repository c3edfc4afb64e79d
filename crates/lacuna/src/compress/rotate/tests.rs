//! Whole runs that turn and cut the residual stream.

use super::{
    super::{
        block::decoded,
        compress,
        tests::{embedded_model, fixture, request, run, text, tree},
    },
    matrix::{centre, times},
    *,
};
use crate::{
    engine::{Engine, KvType, LayerPlan, Options, probe::Probe},
    model::{Demand, Model, load, spec::NormKind},
    reference,
};
use lacuna_core::{
    format::safetensors::{self, Dtype, NewTensor},
    map::LoadMode,
};
use lacuna_kernels::{Pool, convert::decode_run};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

fn open(path: &Path) -> Model {
    load(path, &LoadOptions::default()).unwrap()
}

const TOKENS: [u32; 9] = [1, 9, 4, 30, 2, 17, 99, 4, 55];

/// Largest difference over the largest magnitude.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let range = a.iter().fold(0.0_f32, |r, x| r.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / range
}

fn logits(model: &Model) -> Vec<f32> {
    reference::logits(model, &TOKENS).unwrap()
}

/// The fixture `name` by `spec`, in `dir`.
fn made(name: &str, spec: &str, dir: &Path) -> (PathBuf, Report) {
    let out = dir.join(format!("{name}-{}", spec.replace([':', '=', '.'], "-")));
    let report = run(&request(&fixture(name), &out, spec, Some(text(131, 8, 48)))).unwrap();
    (out, report)
}

#[test]
fn nothing_cut_is_the_same_function_in_any_basis() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "llama2",
        "llama3",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
        "gpt2",
        "opt",
        "gpt-neox",
        "gpt-neox-serial",
        "minicpm",
    ] {
        // In F32, so that nothing is rounded.
        let wide = dir.path().join(name);
        rewritten(&fixture(name), &wide, |_, dtype, _, _| *dtype = Dtype::F32);
        let dense = open(&wide);
        for spec in ["slicegpt=0", "slicegpt=0:random=1", "wina-rotation"] {
            let out = dir.path().join("out");
            let report = run(&request(&wide, &out, spec, Some(text(131, 8, 48)))).unwrap();
            let turned = open(&out);
            let worst = distance(&logits(&dense), &logits(&turned));
            assert!(worst < 1e-4, "{name} {spec}: {worst}");
            assert_eq!((turned.spec.norm, turned.spec.width), (NormKind::Rms, dense.spec.width));
            assert!(report.sparsity() == 0.0 && report.layers.iter().all(|l| l.weight_error < 1e-5));
            // It is another basis.
            let k = |m: &Model| decoded(&m.blocks[1].k.weight);
            assert!(distance(&k(&dense), &k(&turned)) > 0.1, "{name} {spec}");
            let q = decoded(&turned.blocks[0].shortcuts.as_ref().unwrap().attn.weight);
            let n = turned.spec.width;
            let squared = times(&Pool::new(1), &q, n, &q);
            let identity: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
            assert!(distance(&identity, &squared) < 1e-5, "{name} {spec}");
        }
    }
}

#[test]
fn layer_norm_of_anything_is_a_plain_norm_of_what_lost_its_mean() {
    let n = 33;
    let x: Vec<f32> = (0..4 * n).map(|i| ((i * 37 % 101) as f32 - 40.0) / 9.0).collect();
    let (mut a, mut b, mut centred) = (vec![0.0; 4 * n], vec![0.0; 4 * n], x.clone());
    centre(&mut centred, n);
    let (pool, gain) = (Pool::new(1), vec![1.0; n]);
    lacuna_kernels::elementwise::layer_norm_rows(&pool, &x, &gain, None, 1e-5, &mut a);
    lacuna_kernels::elementwise::rms_norm_rows(&pool, &centred, &gain, n, 1e-5, &mut b);
    assert!(distance(&a, &b) < 1e-6);
}

#[test]
fn columns_of_key_and_gate_become_orthogonal() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama2", "llama3", "opt"] {
        let model = open(&made(name, "wina-rotation", dir.path()).0);
        for block in &model.blocks {
            let mlp = block.linear(Proj::Gate).or(block.linear(Proj::Up)).unwrap();
            for linear in [&block.k, mlp] {
                let (w, n) = (decoded(&linear.weight), linear.weight.inputs());
                let dot =
                    |a: usize, b: usize| w.chunks_exact(n).map(|r| f64::from(r[a]) * f64::from(r[b])).sum::<f64>();
                let most = (0..n).map(|j| dot(j, j)).fold(0.0, f64::max);
                assert!((0..n).all(|a| (0..a).all(|b| dot(a, b).abs() < 1e-5 * most)), "{name}");
            }
        }
    }
}

#[test]
fn what_was_cut_runs_alike_in_every_mode_and_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama2", "gpt2", "gpt-neox", "llama2-bf16"] {
        let (out, report) = made(name, "slicegpt=0.4:multiple=8", dir.path());
        let model = Arc::new(open(&out));
        let before = open(&fixture(name)).spec.width;
        assert_eq!((model.spec.width, model.spec.norm_width), (24, Some(before)), "{name}");
        assert!(report.sparsity() > 0.4 && report.notes.iter().any(|n| n.contains("only Lacuna reads")), "{name}");
        let expected = logits(&model);
        let last = &expected[expected.len() - model.spec.vocab..];
        let engine = Engine::new(model.clone(), Options { threads: 2, kv: KvType::F32, ..Options::default() }).unwrap();
        // Prefill of BF16 weights rounds activations.
        let near = if name.ends_with("bf16") { 2e-2 } else { 1e-4 };
        let mut prefilled = engine.session(0).unwrap();
        assert!(distance(last, prefilled.prefill(&TOKENS).unwrap()) < near, "{name}: prefill");
        let mut decoded = engine.session(0).unwrap();
        let mut other = engine.session(0).unwrap();
        for token in &TOKENS[..8] {
            decoded.decode(*token).unwrap();
            other.decode(*token).unwrap();
        }
        let before = decoded.counters().weight_bytes;
        engine.decode_batch(&mut [(&mut decoded, TOKENS[8]), (&mut other, 3)]).unwrap();
        assert!(distance(last, decoded.logits()) < near, "{name}: batch");
        let mut alone = engine.session(0).unwrap();
        TOKENS.iter().for_each(|t| drop(alone.decode(*t).unwrap().to_vec()));
        assert_eq!(alone.logits(), decoded.logits(), "{name}");
        // What a step reads, and what the model says that it reads.
        let step = alone.counters().weight_bytes - before;
        let shortcuts: u64 = model.blocks.iter().map(|b| b.shortcuts.as_ref().unwrap().bytes()).sum();
        assert!(shortcuts > 0 && step == engine.bytes_per_token(0), "{name}: {step} {}", engine.bytes_per_token(0));
        let mut probe = Probe::new(&engine);
        let mut x = probe.embed(&TOKENS).unwrap();
        for layer in 0..model.blocks.len() {
            x = probe.block(layer, &x, Some(&LayerPlan::default())).unwrap().to_vec();
        }
        assert!(distance(&expected, &probe.logits(&x).unwrap()) < near, "{name}: masked");
        let demand = Demand { context: 16, kv: KvType::F32, batch: 16, threads: 1 };
        let checkpoint = Checkpoint::open(&out, &LoadOptions::default()).unwrap();
        assert!(checkpoint.memory(&demand).weights + 4096 > report.bytes.1, "{name}");
    }
}

/// A copy of the model `from` whose tensors went through `change`.
fn rewritten(from: &Path, to: &Path, change: impl Fn(&str, &mut Dtype, &mut Vec<f32>, &[u64])) {
    fs::create_dir_all(to).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let model = safetensors::Model::open(from, LoadMode::Map).unwrap();
    let mut all = Vec::new();
    for name in model.names() {
        let (entry, bytes) = model.require(name).unwrap();
        let format = entry.dtype.format().unwrap();
        let mut values = vec![0.0; entry.shape.iter().product::<u64>() as usize];
        decode_run(format, &bytes, &mut values);
        let mut dtype = entry.dtype;
        change(name, &mut dtype, &mut values, &entry.shape);
        let data = super::super::tensors::numbers(dtype.format().unwrap(), &values);
        all.push((name.to_owned(), dtype, entry.shape.clone(), data));
    }
    let new: Vec<NewTensor<'_>> =
        all.iter().map(|(name, dtype, shape, data)| NewTensor { name, dtype: *dtype, shape, data }).collect();
    let mut file = fs::File::create(to.join("model.safetensors")).unwrap();
    safetensors::write(&new, &[], &mut file).unwrap();
}

#[test]
fn a_stream_of_low_rank_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    // All that writes to the stream writes to 20 of its 48 coordinates.
    rewritten(&fixture("llama2"), &model, |name, _, values, shape| {
        let last = shape[shape.len() - 1] as usize;
        let wide = name.contains("embed_tokens");
        let rows = name.contains("o_proj.weight") || name.contains("down_proj.weight");
        values
            .iter_mut()
            .enumerate()
            .filter(|(i, _)| wide && i % last >= 20 || rows && i / last >= 20)
            .for_each(|(_, w)| *w = 0.0);
    });
    let out = dir.path().join("out");
    let report = run(&request(&model, &out, "slicegpt=0.5:multiple=8", Some(text(131, 8, 48)))).unwrap();
    let (dense, cut) = (open(&model), open(&out));
    assert_eq!(cut.spec.width, 24);
    let worst = distance(&logits(&dense), &logits(&cut));
    assert!(worst < 1e-4, "{worst}");
    assert!(report.layers.iter().filter_map(|l| l.output_error).all(|e| e < 1e-9));
    assert!(report.bytes.1 < report.bytes.0);
}

#[test]
fn the_more_is_cut_the_further_it_is_off() {
    let dir = tempfile::tempdir().unwrap();
    let model = embedded_model(dir.path());
    let dense = open(&model);
    let vocab = dense.spec.vocab;
    let tokens: Vec<u32> = (1..17).map(|i| i * 37 % vocab as u32).collect();
    let expected = reference::logits(&dense, &tokens).unwrap();
    let softmax = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
        row.iter().map(|x| f64::from(x - max) - sum.ln()).collect::<Vec<f64>>()
    };
    let kl = |found: &[f32]| {
        let rows = expected.chunks_exact(vocab).zip(found.chunks_exact(vocab));
        let row =
            |(a, b): (&[f32], &[f32])| softmax(a).iter().zip(softmax(b)).map(|(a, b)| a.exp() * (a - b)).sum::<f64>();
        rows.map(row).sum::<f64>() / tokens.len() as f64
    };
    let mut last = -1e-9;
    let mut lost = -1.0;
    for (i, share) in [0.0, 0.1, 0.3, 0.6].into_iter().enumerate() {
        let out = dir.path().join(format!("out{i}"));
        let report =
            run(&request(&model, &out, &format!("slicegpt={share}"), Some(text(vocab as u32, 16, 64)))).unwrap();
        let found = kl(&reference::logits(&open(&out), &tokens).unwrap());
        let sum: f64 = report.layers.iter().filter_map(|l| l.output_error).sum();
        assert!(found > last && sum > lost, "{share}: KL {found} after {last}, lost {sum} after {lost}");
        // Weights in BF16, shortcuts in F16.
        assert!(share > 0.0 || found < 2e-3, "{found}");
        (last, lost) = (found, sum);
    }
}

#[test]
fn killed_runs_go_on_and_end_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for (name, spec) in [("llama2", "slicegpt=0.4:multiple=8:random=1"), ("gpt-neox", "slicegpt=0.4:multiple=8")] {
        let (whole, undisturbed) = made(name, spec, dir.path());
        let broken = dir.path().join("broken");
        let mut request = request(&fixture(name), &broken, spec, Some(text(131, 8, 48)));
        let mut left = undisturbed.layers.len() / 2 + 1;
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            compress(&request, &mut |p| {
                if let Progress::Layer(_) = p {
                    left -= 1;
                    assert!(left > 0, "killed");
                }
            })
        }));
        assert!(killed.is_err() && !broken.exists());
        request.streams_in_memory = 0;
        let resumed = run(&request).unwrap();
        assert_eq!(tree(&whole), tree(&broken));
        assert!(resumed.resumed == 1 && resumed.layers == undisturbed.layers);
        fs::remove_dir_all(&broken).unwrap();
    }
}

#[test]
fn outputs_take_the_other_methods() {
    let dir = tempfile::tempdir().unwrap();
    let (cut, _) = made("llama2", "slicegpt=0.3:multiple=32", dir.path());
    let out = dir.path().join("out");
    run(&request(&cut, &out, "gptq=8:group=2", Some(text(131, 8, 48)))).unwrap();
    let (a, b) = (open(&cut), open(&out));
    assert_eq!((b.spec.width, b.spec.norm_width), (32, Some(48)));
    let worst = distance(&logits(&a), &logits(&b));
    assert!(worst > 0.0 && worst < 0.05, "{worst}");
}

#[test]
fn what_cannot_be_turned_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |request: &Request| {
        let e = compress(request, &mut |_| {}).unwrap_err().to_string();
        assert!(!request.output.exists(), "{e}");
        e
    };
    let some = || Some(text(131, 8, 48));
    let out = dir.path().join("out");
    for (model, spec, needles) in [
        ("mixtral", "slicegpt", ["experts", "mixture"]),
        ("gemma2", "slicegpt", ["norms behind", "basis"]),
        ("llama2", "slicegpt,rtn=8:group=2", ["run it alone", "other methods"]),
        ("llama2", "magnitude=0.5,wina-rotation", ["run it alone", "wina-rotation"]),
    ] {
        let e = refused(&request(&fixture(model), &out, spec, some()));
        assert!(needles.iter().all(|n| e.contains(n)), "{model} {spec}: {e}");
    }
    let e = refused(&request(&fixture("llama2"), &out, "slicegpt", None));
    assert!(e.contains("-f FILE"), "{e}");
    let e = refused(&Request { ratios: Ratios::Angular, ..request(&fixture("llama2"), &out, "slicegpt", some()) });
    assert!(e.contains("uniform"), "{e}");
    let gguf = dir.path().join("out.gguf");
    let e = refused(&request(&fixture("phi3").join("model.gguf"), &gguf, "slicegpt", some()));
    assert!(e.contains("GGUF") && e.contains("Hugging Face directory"), "{e}");
    let e = refused(&Request { gguf: true, ..request(&fixture("llama2"), &gguf, "slicegpt", some()) });
    assert!(e.contains("GGUF"), "{e}");
    let (cut, _) = made("llama2", "slicegpt=0.3:multiple=8", dir.path());
    let e = refused(&request(&cut, &out, "wina-rotation", None));
    assert!(e.contains("original model"), "{e}");
    let e = crate::compress::convert(&cut, &gguf).unwrap_err().to_string();
    assert!(e.contains(NORM_WIDTH) && e.contains("original model") && !gguf.exists(), "{e}");
    let e = crate::compress::soup(&[cut.clone(), cut], &out).unwrap_err().to_string();
    assert!(e.contains("no mean") && !out.exists(), "{e}");
}

#[test]
fn damaged_outputs_are_errors_with_names() {
    let dir = tempfile::tempdir().unwrap();
    let (cut, _) = made("llama2", "slicegpt=0.3:multiple=8", dir.path());
    let config: Value = serde_json::from_slice(&fs::read(cut.join("config.json")).unwrap()).unwrap();
    assert_eq!(
        (config["model_type"].as_str(), config["tie_word_embeddings"].as_bool()),
        (Some("lacuna_llama"), Some(false))
    );
    let bad = dir.path().join("bad");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut changed = config.clone();
        change(&mut changed);
        rewritten(&cut, &bad, |_, _, _, _| {});
        fs::write(bad.join("config.json"), changed.to_string()).unwrap();
        load(&bad, &LoadOptions::default()).unwrap_err().to_string()
    };
    let e = with(&|c| drop(c.as_object_mut().unwrap().remove(NORM_WIDTH)));
    assert!(e.contains(NORM_WIDTH) && e.contains("attn_shortcut_Q"), "{e}");
    let e = with(&|c| c[NORM_WIDTH] = json!(16));
    assert!(e.contains(NORM_WIDTH) && e.contains("below the width 32"), "{e}");
    let e = with(&|c| c[NORM_WIDTH] = json!("wide"));
    assert!(e.contains(NORM_WIDTH) && e.contains("whole number"), "{e}");
    let e = with(&|c| c["hidden_size"] = json!(24));
    assert!(e.contains("[131, 32]") && e.contains("[131, 24]"), "{e}");
    // Every shortcut, missing or of another shape.
    let model = safetensors::Model::open(&cut, LoadMode::Map).unwrap();
    let shortcuts: Vec<String> = model.names().filter(|n| n.contains("shortcut")).map(str::to_owned).collect();
    assert_eq!(shortcuts.len(), 4);
    for name in &shortcuts {
        let write = |shape: Option<Vec<u64>>| {
            let all: Vec<_> = model.names().map(|n| (n, model.require(n).unwrap())).collect();
            let kept = all.iter().filter(|(n, _)| n != name || shape.is_some());
            let new: Vec<NewTensor<'_>> = kept
                .map(|(n, (entry, bytes))| {
                    let shape = shape.as_deref().filter(|_| n == name).unwrap_or(&entry.shape);
                    NewTensor { name: n, dtype: entry.dtype, shape, data: bytes }
                })
                .collect();
            fs::write(bad.join("config.json"), config.to_string()).unwrap();
            let mut file = fs::File::create(bad.join("model.safetensors")).unwrap();
            safetensors::write(&new, &[], &mut file).unwrap();
            load(&bad, &LoadOptions::default()).unwrap_err().to_string()
        };
        let e = write(None);
        assert!(e.contains(name.as_str()) && e.contains("missing"), "{e}");
        let e = write(Some(vec![64, 16]));
        assert!(e.contains(name.as_str()) && e.contains("[64, 16]") && e.contains("[32, 32]"), "{e}");
    }
}
