//! Whole runs whose output has more in the container than codes of pairs, and searches over their bits.

use super::{
    tests::{embedded_model, fixture, request, run, text},
    *,
};
use crate::{
    engine::{CompiledPlan, Engine, InputRule, KvType, LayerPlan, Options, bitmaps::BitmapOptions, bitmaps::Packed},
    model::load,
    reference,
};
use lacuna_core::{plan::Selector, weight::Weight};
use std::{fs, sync::Arc};

fn open(path: &Path) -> Arc<Model> {
    Arc::new(load(path, &LoadOptions::default()).unwrap())
}

fn options(plan: Option<CompiledPlan>) -> Options {
    Options { threads: 2, kv: KvType::F32, plan: plan.map(Arc::new), ..Options::default() }
}

/// The engine as it loads, and with what the container holds.
fn both(model: &Arc<Model>, plan: Option<CompiledPlan>) -> (Engine, Engine, Packed) {
    let dense = Engine::new(model.clone(), options(plan)).unwrap();
    let cache = BitmapOptions::for_model(None, &model.hash, 2);
    let (packed, what) = dense.with_bitmaps(&cache, &|_, _| {}).unwrap().expect("a container");
    (dense, packed, what)
}

const IDS: [u32; 12] = [5, 19, 3, 71, 8, 8, 200, 31, 4, 90, 17, 6];

/// Logits of every position by prefill, then by decode.
fn logits(engine: &Engine) -> [Vec<f32>; 2] {
    let (mut many, mut single) = (Vec::new(), Vec::new());
    engine.session(64).unwrap().score(&IDS, &mut |_, row| many.extend_from_slice(row)).unwrap();
    let mut session = engine.session(64).unwrap();
    IDS.iter().for_each(|t| single.extend_from_slice(session.decode(*t).unwrap()));
    [many, single]
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    let (low, high) = a.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / (high - low)
}

fn bytes_per_token(engine: &Engine) -> f64 {
    let mut session = engine.session(64).unwrap();
    for t in IDS {
        session.decode(t).unwrap();
    }
    session.counters().bytes_per_token()
}

#[test]
fn factors_are_read_in_the_place_of_their_product() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (embedded_model(dir.path()), dir.path().join("out"));
    let vocab = open(&model).spec.vocab as u32;
    for (spec, format, bound) in [
        ("casp=0.25", Format::Bf16, 2e-2),
        ("casp=0.25,rtn=8:group=64", Format::Q8_0, 3e-2),
        ("casp=0.25,gptq=4:group=64", Format::Q4_0, 3e-2),
    ] {
        let report = run(&request(&model, &out, spec, Some(text(vocab, 15, 64)))).unwrap();
        let loaded = open(&out);
        let file = loaded.packed.as_ref().expect("a container");
        // Keys are grouped here and stay.
        assert_eq!(file.names().count(), loaded.blocks.len(), "{spec}");
        let (dense, packed, what) = both(&loaded, None);
        assert_eq!((what.low_rank, what.books, what.label().as_str()), (loaded.blocks.len(), 0, "+low rank"), "{spec}");
        let q = &what.model.blocks[1].q.weight;
        let [down, up] = q.factors().expect("two factors");
        assert_eq!((down.format(), up.format(), down.outputs()), (format, format, 32), "{spec}");
        // Bytes: those of the file, the report and the counters.
        let own = |l: &&LayerReport| l.proj == "attn.q";
        assert_eq!(report.layers.iter().filter(own).map(|l| l.bytes.1).sum::<u64>(), file.bytes(), "{spec}");
        let saved = bytes_per_token(&dense) - bytes_per_token(&packed);
        assert_eq!(saved, what.dense_bytes as f64 - what.bytes as f64, "{spec}");
        assert!(what.bytes == file.bytes() && what.bytes * 3 < what.dense_bytes, "{spec}: {what:?}");
        let config = fs::read_to_string(out.join("config.json")).unwrap();
        assert_eq!(config.contains("self_attn.q_proj"), spec.contains(','), "{spec}: what is dense is told");
        for (form, (a, b)) in ["prefill", "decode"].iter().zip(logits(&dense).iter().zip(&logits(&packed))) {
            assert!(apart(a, b) < bound, "{spec} {form}: {}", apart(a, b));
        }
        // Several sessions in one step have the bits that each has alone.
        let mut alone = packed.session(64).unwrap();
        let mut sessions = [packed.session(64).unwrap(), packed.session(64).unwrap()];
        for (i, t) in IDS.iter().enumerate() {
            alone.decode(*t).unwrap();
            let [a, b] = &mut sessions;
            packed.decode_batch(&mut [(a, *t), (b, IDS[IDS.len() - 1 - i])]).unwrap();
        }
        assert_eq!(alone.logits(), sessions[0].logits(), "{spec}");
    }
}

#[test]
fn a_plan_over_a_pair_reads_it_dense_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (embedded_model(dir.path()), dir.path().join("out"));
    let vocab = open(&model).spec.vocab as u32;
    run(&request(&model, &out, "casp=0.25", Some(text(vocab, 15, 64)))).unwrap();
    let mut loaded = Model::clone(&open(&out));
    let (linear, blocks) = (&mut loaded.blocks[2].q, 6);
    let w = &linear.weight;
    let all = block::decoded(w);
    let turned: Vec<f32> = (0..all.len()).map(|i| all[i % w.outputs() * w.inputs() + i / w.outputs()]).collect();
    let bytes = tensors::numbers(Format::Bf16, &turned).into();
    let weight = Weight::new(Format::Bf16, Orientation::InputMajor, w.outputs(), w.inputs(), bytes).unwrap();
    linear.weight = weight.clone();
    let mut layers = vec![LayerPlan::default(); blocks];
    // Nothing is left out, so that results can be compared.
    layers[2].inputs[Proj::Q as usize] = Some(InputRule::new(Selector::above(0.0), weight));
    let loaded = Arc::new(loaded);
    let (dense, packed, what) = both(&loaded, Some(CompiledPlan { layers, masked: false }));
    assert_eq!(what.low_rank, blocks - 1);
    assert!(what.notes.iter().any(|n| n.contains("layers.2.attn.q") && n.contains("dense")), "{:?}", what.notes);
    for (a, b) in logits(&dense).iter().zip(&logits(&packed)) {
        assert!(apart(a, b) < 2e-2, "{}", apart(a, b));
    }
    let mut masked = [Vec::new(), Vec::new()];
    for (engine, all) in [&dense, &packed].into_iter().zip(&mut masked) {
        engine.session(64).unwrap().score_masked(&IDS, &mut |_, row| all.extend_from_slice(row)).unwrap();
    }
    assert!(apart(&masked[0], &masked[1]) < 2e-2);
}

#[test]
fn damaged_factors_are_told_by_their_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (embedded_model(dir.path()), dir.path().join("out"));
    let vocab = open(&model).spec.vocab as u32;
    run(&request(&model, &out, "casp=0.25", Some(text(vocab, 15, 64)))).unwrap();
    let path = out.join("model.lacuna");
    let good = fs::read(&path).unwrap();
    let refused = || {
        let loaded = open(&out);
        let engine = Engine::new(loaded.clone(), Options::default()).unwrap();
        let cache = BitmapOptions::for_model(None, &loaded.hash, 1);
        engine.with_bitmaps(&cache, &|_, _| {}).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let mut bad = good.clone();
    let last = bad.len() - 100;
    bad[last] ^= 4;
    fs::write(&path, &bad).unwrap();
    let e = refused();
    assert!(e.contains("model.lacuna") && e.contains("layers.") && e.contains("checksum"), "{e}");
    // Pieces that are whole and of another shape.
    let loaded = open(&out);
    let factor = |rows: usize, cols: usize| lacuna_core::pair::Factor {
        format: Some(Format::F32),
        bytes: vec![0; 4 * rows * cols],
    };
    let piece = lacuna_core::pair::pack(8, 256, 2, &factor(2, 256), &factor(8, 2)).unwrap();
    let mut written = Vec::new();
    let packing = lacuna_core::format::packed::Packing::new([("layers.0.attn.q", &piece[..])], &loaded.hash);
    packing.write(&mut written).unwrap();
    fs::write(&path, &written).unwrap();
    let e = refused();
    assert!(e.contains("layers.0.attn.q") && e.contains("two factors of 256 rows") && e.contains("remove"), "{e}");
    // A file of blocks has no place for factors: the product goes there, as before.
    let gguf = dir.path().join("out.gguf");
    let report =
        run(&Request { gguf: true, ..request(&model, &gguf, "casp=0.25", Some(text(vocab, 15, 64))) }).unwrap();
    assert!(report.layers.iter().all(|l| l.bytes.0 == l.bytes.1) && open(&gguf).packed.is_none());
    // Tensors of several projections hold the product too, if codes are written.
    let fused = fixture("phi3");
    for spec in ["casp=0.5", "casp=0.5,rtn=4:group=0"] {
        let out = dir.path().join("fused");
        run(&request(&fused, &out, spec, Some(text(32, 8, 24)))).unwrap();
        assert_eq!(out.join("model.lacuna").exists(), !spec.contains("rtn"), "{spec}");
    }
}

/// Searches over bits choose among those of books.
#[test]
fn bits_of_books_are_searched() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (embedded_model(dir.path()), dir.path().join("out"));
    let vocab = open(&model).spec.vocab as u32;
    let asked = |goal| {
        let request = request(&model, &out, "kmeans=2:rounds=1", Some(text(vocab, 15, 64)));
        run(&Request { goal: Some(goal), ..request })
    };
    let all = |bits: u32| {
        let spec = format!("kmeans={bits}:rounds=1");
        run(&request(&model, &out, &spec, Some(text(vocab, 15, 64)))).unwrap().bytes.1
    };
    let (two, four) = (all(2), all(4));
    let e = asked(Goal::Bytes(1000)).unwrap_err().to_string();
    let least: u64 = e.split(' ').filter_map(|w| w.parse().ok()).next_back().unwrap();
    assert_eq!(least, two, "{e}");
    let budget = (two + four) / 2;
    let report = asked(Goal::Bytes(budget)).unwrap();
    let widths: std::collections::BTreeSet<_> = report.layers.iter().map(|l| l.bits).collect();
    assert!(widths.len() > 1 && report.bytes.1 <= budget && report.bytes.1 > two, "{widths:?} {:?}", report.bytes);
    // What stays dense is no piece of the container.
    let pieces = report.layers.iter().filter(|l| l.bits.is_some()).count();
    assert_eq!(open(&out).packed.as_ref().map_or(0, |p| p.names().count()), pieces);
}

/// Neurons in another order: what is not rounded computes the same, and what is has codes.
#[test]
fn neurons_of_like_distribution_lie_together() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["opt", "phi3", "qwen3"] {
        let (model, out) = (fixture(name), dir.path().join(name));
        let asked = request(&model, &out, "jlcm=2:steps=0", Some(text(32, 8, 24)));
        // Room for everything: nothing is rounded.
        let report = run(&Request { goal: Some(Goal::Bytes(1 << 30)), ..asked.clone() }).unwrap();
        assert!(report.layers.iter().all(|l| l.bits.is_none()), "{name}");
        let (dense, moved) = (open(&model), open(&out));
        let [a, b] = [&dense, &moved].map(|m| reference::logits(m, &[1, 9, 4, 30, 2, 17]).unwrap());
        assert!(apart(&a, &b) < 1e-5, "{name}: {}", apart(&a, &b));
        let up = |m: &Model| block::decoded(&m.blocks[0].linear(Proj::Up).unwrap().weight);
        assert_ne!(up(&dense), up(&moved), "{name}");
        let report = run(&asked).unwrap();
        assert!(report.layers.iter().all(|l| l.bits == Some(2) && l.output_error.is_some_and(|e| e < 0.5)), "{name}");
        assert!(reference::logits(&open(&out), &[1, 2, 3]).unwrap().iter().all(|x| x.is_finite()), "{name}");
    }
}

#[test]
fn learned_books_are_read_and_lose_less_than_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (embedded_model(dir.path()), dir.path().join("out"));
    let vocab = open(&model).spec.vocab as u32;
    let error = |spec: &str| {
        let report = run(&request(&model, &out, spec, Some(text(vocab, 15, 64)))).unwrap();
        report.layers.iter().filter_map(|l| l.output_error).sum::<f64>()
    };
    let (clusters, learned) = (error("kmeans=3:rounds=5"), error("jlcm=3:rounds=5:steps=30:rate=0.01"));
    assert!(learned < 0.8 * clusters, "{learned} {clusters}");
    let loaded = open(&out);
    let (dense, packed, what) = both(&loaded, None);
    assert!(what.books == loaded.packed.as_ref().unwrap().names().count() && what.low_rank == 0);
    for (a, b) in logits(&dense).iter().zip(&logits(&packed)) {
        assert!(apart(a, b) < 2e-2, "{}", apart(a, b));
    }
}
