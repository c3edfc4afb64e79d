//! BlockFFN's experts: all ways to store them, what decode reads, and what is refused.

use lacuna::{
    calibrate,
    compress::{Request, compress},
    engine::{Engine, KvType, Options},
    eval::{Window, expert_use},
    model::{
        LoadOptions, Model,
        export::Export,
        load,
        weights::{Linear, Mlp},
    },
};
use lacuna_core::{
    format::safetensors::{Dtype, NewTensor, Tensors, write},
    map::{LoadMode, open},
    observer::Observer,
    site::{Point, Proj},
    statistics::Statistics,
    weight::{Orientation, Weight},
};
use lacuna_methods::{registry, weights::ratios::Ratios};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn engine(model: Model) -> Engine {
    Engine::new(Arc::new(model), Options { threads: 2, kv: KvType::F32, ..Options::default() }).unwrap()
}

fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + 11) % 131).collect()
}

/// Logits of every token, decoded one by one.
fn decoded(engine: &Engine, tokens: &[u32]) -> Vec<f32> {
    let mut session = engine.session(0).unwrap();
    tokens.iter().flat_map(|t| session.decode(*t).unwrap().to_vec()).collect()
}

type Tensor = (Vec<u64>, Vec<u8>);

/// The tensors of a fixture, all F16.
fn tensors(dir: &Path) -> BTreeMap<String, Tensor> {
    let file = Tensors::parse(open(dir.join("model.safetensors"), LoadMode::Read).unwrap()).unwrap();
    file.entries().iter().map(|e| (e.name.clone(), (e.shape.clone(), file.bytes(e).unwrap().to_vec()))).collect()
}

fn store(from: &Path, tensors: &BTreeMap<String, Tensor>) -> (tempfile::TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let list: Vec<NewTensor<'_>> =
        tensors.iter().map(|(name, (shape, data))| NewTensor { name, dtype: Dtype::F16, shape, data }).collect();
    let mut file = fs::File::create(dir.path().join("model.safetensors")).unwrap();
    write(&list, &[], &mut file).unwrap();
    let model = load(dir.path(), &LoadOptions::default()).unwrap();
    (dir, model)
}

/// Rows and columns exchanged, two bytes per number.
fn turned((shape, data): &Tensor) -> Tensor {
    let (rows, cols) = (shape[0] as usize, shape[1] as usize);
    let mut out = Vec::with_capacity(data.len());
    for c in 0..cols {
        (0..rows).for_each(|r| out.extend_from_slice(&data[2 * (r * cols + c)..][..2]));
    }
    (vec![shape[1], shape[0]], out)
}

#[test]
fn every_way_to_store_the_experts_gives_the_same_logits() {
    let tokens = tokens(20);
    // Stacked as BlockMLP has them, under the names of the fastmoe implementation.
    let dir = fixture("blockffn");
    let want = decoded(&engine(load(&dir, &LoadOptions::default()).unwrap()), &tokens);
    let rename = |name: String| match name.rsplit_once(".mlp.") {
        Some((before, part @ ("up_proj" | "down_proj"))) => format!("{before}.mlp.experts.{part}.weight"),
        _ => name,
    };
    let renamed = tensors(&dir).into_iter().map(|(name, t)| (rename(name), t)).collect();
    let (_keep, model) = store(&dir, &renamed);
    assert_eq!(decoded(&engine(model), &tokens), want);
    // One layer of all neurons, and under the names of the megablocks implementation, which stores down as it does up.
    let dir = fixture("blockffn-linear");
    let want = decoded(&engine(load(&dir, &LoadOptions::default()).unwrap()), &tokens);
    let rename = |(name, t): (String, Tensor)| match name.rsplit_once(".mlp.") {
        Some((before, "up_proj")) => (format!("{before}.mlp.mlp.up_proj"), t),
        Some((before, "down_proj")) => (format!("{before}.mlp.mlp.down_proj"), turned(&t)),
        _ => (name, t),
    };
    let (_keep, model) = store(&dir, &tensors(&dir).into_iter().map(rename).collect());
    let Mlp::ReluExperts { experts, .. } = &model.blocks[0].mlp else { panic!("experts") };
    assert_eq!(experts[0].down.weight.orientation(), Orientation::InputMajor);
    let range = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let far = decoded(&engine(model), &tokens).iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far < 1e-5 * range, "{far} of {range}");
}

/// The experts that one token uses, by layer.
struct Active(BTreeMap<usize, Vec<bool>>);

impl Observer for Active {
    fn wants(&self, point: Point) -> bool {
        matches!(point, Point::Experts { .. })
    }

    fn observe(&mut self, point: Point, width: usize, values: &[f32]) {
        let Point::Experts { layer } = point else { return };
        let used = self.0.entry(layer).or_insert_with(|| vec![false; width]);
        values.chunks_exact(width).for_each(|row| used.iter_mut().zip(row).for_each(|(u, v)| *u |= *v != 0.0));
    }
}

fn poisoned(linear: &mut Linear) {
    let w = &linear.weight;
    let bytes: Vec<u8> = [0x00, 0x7e].repeat(w.bytes().len() / 2);
    linear.weight = Weight::new(w.format(), w.orientation(), w.outputs(), w.inputs(), bytes.into()).unwrap();
}

/// Experts that no token of a text uses may hold anything: they are neither read nor computed, in decode and in prefill.
#[test]
fn inactive_experts_are_not_touched_and_active_ones_are_counted() {
    for name in ["blockffn", "blockffn-linear"] {
        let model = load(&fixture(name), &LoadOptions::default()).unwrap();
        let mut inactive = 0;
        for token in [5, 17, 90] {
            let mut active = Active(BTreeMap::new());
            engine(model.clone()).session(0).unwrap().observe(&[token], &mut active).unwrap();
            let mut bad = model.clone();
            let mut bytes = 0;
            for (layer, block) in bad.blocks.iter_mut().enumerate() {
                let Mlp::ReluExperts { experts, .. } = &mut block.mlp else { panic!("experts") };
                for (expert, used) in experts.iter_mut().zip(&active.0[&layer]) {
                    if *used {
                        bytes += expert.up.weight.bytes().len() + expert.down.weight.bytes().len();
                        continue;
                    }
                    inactive += 1;
                    poisoned(&mut expert.up);
                    poisoned(&mut expert.down);
                }
            }
            let (good, bad) = (engine(model.clone()), engine(bad));
            assert_eq!(decoded(&bad, &[token]), decoded(&good, &[token]), "{name}: decode");
            let prefilled = |e: &Engine| e.session(0).unwrap().prefill(&[token]).unwrap().to_vec();
            assert_eq!(prefilled(&bad), prefilled(&good), "{name}: prefill");
            let mut session = good.session(0).unwrap();
            session.decode(token).unwrap();
            let all: usize = model
                .blocks
                .iter()
                .map(|b| match &b.mlp {
                    Mlp::ReluExperts { experts, .. } => {
                        experts.iter().map(|e| e.up.weight.bytes().len() + e.down.weight.bytes().len()).sum::<usize>()
                    }
                    _ => 0,
                })
                .sum();
            let counters = session.counters();
            let saved = good.bytes_per_token(1) - counters.weight_bytes - counters.kv_bytes;
            // Routers count as they lie in memory, in F32.
            let routers: u64 = model
                .blocks
                .iter()
                .map(|b| match &b.mlp {
                    Mlp::ReluExperts { router, .. } => router.weight.bytes().len() as u64,
                    _ => 0,
                })
                .sum();
            assert_eq!(saved + routers, (all - bytes) as u64, "{name}: what is not read");
            let share: f64 = active.0.values().map(|u| u.iter().filter(|u| **u).count() as f64 / u.len() as f64).sum();
            assert!((counters.neurons().share() - share / active.0.len() as f64).abs() < 1e-9, "{name}");
        }
        assert!(inactive > 10, "{name}: about half are, {inactive}");
    }
}

#[test]
fn the_sparsity_of_tokens_is_what_decode_leaves_out() {
    let e = engine(load(&fixture("blockffn"), &LoadOptions::default()).unwrap());
    let tokens = tokens(60);
    let mut session = e.session(0).unwrap();
    tokens.iter().for_each(|t| drop(session.decode(*t).unwrap().to_vec()));
    let window = Window { tokens, first: 0, begins_text: true };
    let used = expert_use(&e, std::slice::from_ref(&window), |_, _| {}).unwrap();
    let kept = session.counters().neurons().share();
    let unused = used.sparsity(0, None).unwrap();
    assert!((1.0 - unused - kept).abs() < 1e-9, "{unused} unused, {kept} kept");
    let all: Vec<f64> = (0..6).filter_map(|c| used.sparsity(c, None)).collect();
    assert!(all.len() == 6 && all.windows(2).all(|w| w[1] <= w[0] + 0.02), "{all:?}");
    let dense = engine(load(&fixture("llama2"), &LoadOptions::default()).unwrap());
    let problem = expert_use(&dense, &[window], |_, _| {}).unwrap_err().to_string();
    assert!(problem.contains("`llama` has no experts"), "{problem}");
}

/// What latent attention has no projections for is left alone by every method, and what cannot be written is refused by name.
#[test]
fn methods_reach_what_is_there_and_other_verbs_refuse() {
    for name in ["minicpm3", "blockffn"] {
        let model = Arc::new(load(&fixture(name), &LoadOptions::default()).unwrap());
        let subject = calibrate::Subject::new(&model);
        let e = Engine::new(model.clone(), Options { threads: 2, ..Options::default() }).unwrap();
        let windows = [tokens(48)];
        let mut planned = 0;
        for method in registry::METHODS.iter().filter(|m| m.compressor().is_none()) {
            let steps = registry::parse(method.name()).unwrap();
            let mut forward = |t: &[u32], o: &mut dyn Observer| e.session(0)?.observe(t, o);
            let mut statistics = Statistics::default();
            let gathered =
                calibrate::gather(&steps, &subject, &mut forward, &windows, &mut statistics, &mut |_, _, _| {});
            match gathered.and_then(|()| Ok(calibrate::plan(&steps, &subject, &statistics)?)) {
                Ok((plan, _)) => {
                    plan.check(model.blocks.len()).unwrap();
                    let reached = |p: &Proj| subject.layers[0].projection(*p).is_some();
                    let all = plan.entries.iter().all(|e| e.rule.covers().iter().all(reached));
                    assert!(all, "{name} {}", method.name());
                    planned += usize::from(!plan.entries.is_empty());
                }
                Err(e) => println!("{name} {}: {e}", method.name()),
            }
        }
        assert!(planned >= 3, "{name}: {planned} methods plan something");
        let refused = Export::new(&fixture(name)).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains("writing the architecture") && refused.contains("as GGUF"), "{refused}");
        let out = tempfile::tempdir().unwrap();
        let request = Request {
            model: fixture(name),
            output: out.path().join("out"),
            gguf: false,
            steps: registry::parse("magnitude=0.5").unwrap(),
            ratios: Ratios::Uniform,
            goal: None,
            lock: None,
            calibration: None,
            seed: 7,
            threads: 2,
            streams_in_memory: 1 << 30,
        };
        let refused = compress(&request, &mut |_| {}).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains(if name == "blockffn" { "BlockFFN" } else { "latent attention" }), "{refused}");
    }
}
