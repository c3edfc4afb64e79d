//! The engine on small random models: ways of running the same tokens agree, and what cannot run is an error.

mod common {
    pub mod random;
}

use common::random::{self, CONTEXT, Kind, MlpKind, PLAIN_LLAMA, VOCAB, distance, tokens};
use lacuna::{
    engine::{CompiledPlan, Engine, InputRule, KvType, LayerPlan, NeuronRule, Options, Session, probe::Probe},
    error::Error,
    model::{
        spec::Act,
        weights::{Mlp, Model},
    },
    reference,
};
use lacuna_core::{
    observer::Observer,
    plan::Selector,
    site::{Point, Proj},
    weight::{Orientation, Weight},
};
use lacuna_kernels::Format;
use std::sync::{Arc, atomic::Ordering};

fn kinds() -> Vec<Kind> {
    let gated = PLAIN_LLAMA;
    vec![
        gated,
        Kind { format: Format::Bf16, ..gated },
        Kind { format: Format::Q8_0, act: Act::Relu, ..gated },
        Kind { window: Some(20), act: Act::GeluTanh, ..gated },
        Kind { mlp: MlpKind::Plain, act: Act::Gelu, classic: true, ..gated },
        Kind { mlp: MlpKind::Experts, ..gated },
        Kind { mlp: MlpKind::Experts, format: Format::Bf16, ..gated },
        Kind { mlp: MlpKind::ReluExperts, ..gated },
        Kind { mlp: MlpKind::ReluExperts, format: Format::Bf16, latent: true, ..gated },
        Kind { latent: true, window: Some(20), ..gated },
        Kind { per_layer: true, ..gated },
        Kind { per_layer: true, format: Format::Bf16, ..gated },
    ]
}

fn engine(model: Model, options: Options) -> Engine {
    Engine::new(Arc::new(model), options).expect("a valid model and options")
}

fn exact() -> Options {
    Options { kv: KvType::F32, threads: 2, ..Options::default() }
}

fn session(model: Model) -> Session {
    engine(model, exact()).session(0).expect("the model's own context")
}

/// Logits of every position: by `score`, and token by token.
fn both_ways(s: &mut Session, ids: &[u32]) -> (Vec<f32>, Vec<f32>) {
    let mut scored = Vec::new();
    s.score(ids, &mut |position, logits| {
        assert_eq!(position * VOCAB, scored.len());
        scored.extend_from_slice(logits);
    })
    .expect("scores");
    s.truncate(0);
    let stepped = ids.iter().flat_map(|&id| s.decode(id).expect("decodes").to_vec()).collect();
    (scored, stepped)
}

/// Bound of the difference from the reference: the arithmetic of the products (see `lacuna_kernels::gemm`).
fn bound(format: Format) -> f32 {
    match format {
        Format::F32 => 1e-4,
        Format::Bf16 => 2e-2,
        _ => 4e-2,
    }
}

#[test]
fn prefill_and_decode_agree_with_the_reference() {
    for (seed, kind) in kinds().into_iter().enumerate() {
        let model = random::model(kind, seed as u64);
        let ids = tokens(140, 1);
        let want = reference::logits(&model, &ids).expect("logits");
        let (scored, stepped) = both_ways(&mut session(model), &ids);
        let (p, d) = (distance(&scored, &want), distance(&stepped, &want));
        println!("{kind:?}: prefill {p:.1e}, decode {d:.1e}");
        if kind.mlp == MlpKind::Experts && kind.format != Format::F32 {
            // Where two experts score nearly the same, rounding may pick the other one: most positions must agree.
            let far = |rows: &[f32]| {
                rows.chunks(VOCAB).zip(want.chunks(VOCAB)).filter(|(a, b)| distance(a, b) > 5e-2).count()
            };
            assert!(far(&scored) <= 14 && far(&stepped) <= 14, "{kind:?}: {} {}", far(&scored), far(&stepped));
            continue;
        }
        assert!(p < bound(kind.format) && d < bound(kind.format), "{kind:?}: prefill {p}, decode {d}");
    }
}

#[test]
fn half_precision_pages_stay_close() {
    let model = random::model(PLAIN_LLAMA, 3);
    let ids = tokens(200, 2);
    let want = reference::logits(&model, &ids).expect("logits");
    for (kv, bound) in [(KvType::F16, 3e-3), (KvType::Bf16, 2e-2)] {
        let mut s = engine(model.clone(), Options { kv, ..exact() }).session(0).expect("a session");
        let (scored, stepped) = both_ways(&mut s, &ids);
        let (p, d) = (distance(&scored, &want), distance(&stepped, &want));
        println!("{kv:?}: prefill {p:.1e}, decode {d:.1e}");
        assert!(p < bound && d < bound, "{kv:?}: prefill {p}, decode {d}");
    }
}

#[test]
fn chunks_threads_and_blocks_do_not_change_a_bit() {
    for kind in kinds() {
        let ids = tokens(170, 3);
        let run = |prefill_chunk, threads| {
            let options = Options { prefill_chunk, threads, ..Options::default() };
            let mut s = engine(random::model(kind, 9), options).session(0).expect("a session");
            let mut all = s.prefill(&ids).expect("prefills").to_vec();
            all.extend_from_slice(s.decode(5).expect("decodes"));
            s.truncate(0);
            s.score(&ids, &mut |_, logits| all.extend_from_slice(logits)).expect("scores");
            all
        };
        let whole = run(512, 1);
        for (chunk, threads) in [(512, 2), (1, 1), (7, 2), (64, 3), (169, 1)] {
            assert!(run(chunk, threads) == whole, "{kind:?}: chunks of {chunk}, {threads} threads");
        }
    }
}

#[test]
fn pages_are_reused_after_truncation() {
    let e = engine(random::model(PLAIN_LLAMA, 4), exact());
    let mut s = e.session(0).expect("a session");
    let (a, b) = (tokens(150, 5), tokens(100, 6));
    s.prefill(&a).expect("prefills");
    s.truncate(70);
    assert_eq!(s.len(), 70);
    let again = s.prefill(&b).expect("prefills").to_vec();
    drop(s);
    let mut fresh = e.session(0).expect("a session");
    let joined: Vec<u32> = a[..70].iter().chain(&b).copied().collect();
    assert_eq!(fresh.prefill(&joined).expect("prefills"), again, "old pages must not shine through");
    fresh.truncate(1000);
    assert_eq!(fresh.len(), 170);
}

/// Rotary positions are computed, so a context may be longer than the one that the model was trained with.
#[test]
fn rotary_models_go_on_behind_their_context() {
    let model = random::model(PLAIN_LLAMA, 5);
    let mut longer = model.clone();
    longer.spec.context = 2 * CONTEXT;
    let ids = tokens(CONTEXT + 3, 4);
    let run = |model: Model| {
        let mut s = engine(model, exact()).session(CONTEXT + 3).expect("rotary positions");
        s.prefill(&ids).expect("prefills").to_vec()
    };
    assert_eq!(run(model), run(longer), "the same as a model made for the length");
}

#[test]
fn what_cannot_run_is_an_error_before_any_work() {
    let e = engine(random::model(PLAIN_LLAMA, 5), exact());
    let mut s = e.session(10).expect("a session");
    let over = s.prefill(&tokens(11, 1)).map(|_| ());
    assert!(matches!(over, Err(Error::Context { tokens: 11, context: 10 })), "{over:?}");
    assert!(s.prefill(&[]).is_err() && s.prefill(&[VOCAB as u32]).is_err() && s.is_empty());
    s.prefill(&tokens(10, 1)).expect("fits");
    assert!(matches!(s.decode(1), Err(Error::Context { tokens: 11, context: 10 })));
    assert_eq!(s.len(), 10);
    let learned = Kind { mlp: MlpKind::Plain, act: Act::Gelu, classic: true, ..PLAIN_LLAMA };
    let learned = engine(random::model(learned, 5), exact());
    assert!(learned.session(CONTEXT).is_ok() && learned.session(CONTEXT + 1).is_err());
    let model = Arc::new(random::model(PLAIN_LLAMA, 5));
    for bad in [Options { prefill_chunk: 0, ..exact() }, Options { threads: 5000, ..exact() }] {
        assert!(matches!(Engine::new(model.clone(), bad), Err(Error::Argument { .. })));
    }
}

#[test]
fn cancelling_ends_the_next_pass_and_can_be_taken_back() {
    let mut s = session(random::model(PLAIN_LLAMA, 6));
    let flag = s.cancel_flag();
    s.prefill(&[1, 2]).expect("prefills");
    flag.store(true, Ordering::Relaxed);
    assert!(matches!(s.decode(1), Err(Error::Cancelled)) && matches!(s.prefill(&[1]), Err(Error::Cancelled)));
    flag.store(false, Ordering::Relaxed);
    s.decode(1).expect("decodes");
    assert_eq!(s.len(), 3);
}

#[test]
fn numbers_that_are_none_are_errors_that_name_the_position() {
    let mut model = random::model(PLAIN_LLAMA, 7);
    model.final_norm.gain[3] = f32::NAN;
    let mut s = session(model);
    assert!(matches!(s.prefill(&[1, 2, 3]), Err(Error::BadLogits { position: 2, .. })));
    assert!(matches!(s.decode(4), Err(Error::BadLogits { position: 3, .. })));
}

/// Input-major copy of a float weight.
fn transposed(w: &Weight) -> Weight {
    let size = w.format().block_bytes();
    let mut bytes = Vec::with_capacity(w.bytes().len());
    for i in 0..w.inputs() {
        for o in 0..w.outputs() {
            bytes.extend_from_slice(&w.bytes()[(o * w.inputs() + i) * size..][..size]);
        }
    }
    Weight::new(w.format(), Orientation::InputMajor, w.outputs(), w.inputs(), bytes.into()).expect("the same length")
}

fn plan(model: &Model, selector: Selector, neurons: bool) -> CompiledPlan {
    let layers = model.blocks.iter().map(|block| {
        let mut layer = LayerPlan::default();
        for proj in Proj::ALL {
            let covered = neurons && matches!(proj, Proj::Gate | Proj::Up | Proj::Down);
            if let (false, Some(linear)) = (covered, block.linear(proj)) {
                layer.inputs[proj as usize] = Some(InputRule::new(selector.clone(), transposed(&linear.weight)));
            }
        }
        if let (true, Mlp::Gated(g)) = (neurons, &block.mlp) {
            layer.neurons = Some(NeuronRule::new(Selector::non_zero(), transposed(&g.down.weight)));
        }
        layer
    });
    CompiledPlan { layers: layers.collect(), masked: false }
}

#[test]
fn a_plan_that_keeps_everything_that_matters_is_dense() {
    for neurons in [false, true] {
        let model = random::model(Kind { act: Act::Relu, ..PLAIN_LLAMA }, 8);
        let compiled = Arc::new(plan(&model, Selector::above(0.0), neurons));
        let e = engine(model, exact());
        let sparse = e.with_plan(Some(compiled)).expect("a fitting plan");
        let (mut a, mut b) = (e.session(0).expect("a session"), sparse.session(0).expect("a session"));
        for id in tokens(60, 7) {
            let want = a.decode(id).expect("decodes").to_vec();
            assert!(distance(b.decode(id).expect("decodes"), &want) < 1e-4);
        }
        assert_eq!(a.counters().weight_bytes / 60, e.bytes_per_token(0));
        assert!(b.counters().weight_bytes < a.counters().weight_bytes);
        assert_eq!(a.counters().kv_bytes, b.counters().kv_bytes);
        let (kept, q) = (b.counters().neurons().share(), b.counters().input(Proj::Q).share());
        assert!(q == 1.0 && if neurons { (0.2..0.8).contains(&kept) } else { kept == 1.0 }, "{kept} {q}");
    }
}

#[test]
fn thresholds_skip_and_change_the_result() {
    let model = random::model(PLAIN_LLAMA, 8);
    let compiled = Arc::new(plan(&model, Selector::above(0.3), false));
    let e = engine(model, exact()).with_plan(Some(compiled)).expect("a fitting plan");
    let mut s = e.session(0).expect("a session");
    s.prefill(&tokens(5, 1)).expect("prefills");
    assert_eq!(s.counters().steps, 0, "prefill is dense and does not count");
    let ids = tokens(30, 2);
    ids.iter().for_each(|&id| assert_eq!(s.decode(id).expect("decodes").len(), VOCAB));
    let c = s.counters();
    assert!(c.steps == 30 && c.input(Proj::Q).share() < 0.9 && c.input(Proj::Down).share() < 0.5, "{c:?}");
    assert!(c.bytes_per_token() < e.bytes_per_token(20) as f64);
}

#[test]
fn plans_for_other_models_are_refused() {
    let e = engine(random::model(PLAIN_LLAMA, 8), exact());
    let mut short = plan(e.model(), Selector::non_zero(), false);
    short.layers.pop();
    let mut crossed = plan(e.model(), Selector::non_zero(), false);
    crossed.layers[1].inputs.swap(Proj::Q as usize, Proj::Down as usize);
    for bad in [short, crossed] {
        assert!(matches!(e.with_plan(Some(Arc::new(bad))), Err(Error::Argument { name: "plan", .. })));
    }
}

/// Collects everything.
#[derive(Default, PartialEq, Debug)]
struct All(Vec<(Point, usize, Vec<f32>)>);

impl Observer for All {
    fn wants(&self, _: Point) -> bool {
        true
    }

    fn observe(&mut self, point: Point, width: usize, values: &[f32]) {
        self.0.push((point, width, values.to_vec()));
    }
}

#[test]
fn observers_see_the_points_of_the_reference() {
    for kind in kinds().into_iter().filter(|k| k.format == Format::F32) {
        let model = random::model(kind, 11);
        let ids = tokens(12, 4);
        let mut want = All::default();
        reference::observed_logits(&model, &ids, &mut want).expect("logits");
        let mut s = session(model);
        let mut found = All::default();
        s.observe(&ids, &mut found).expect("observes");
        s.truncate(11);
        let mut step = All::default();
        s.decode_observed(ids[11], &mut step).expect("decodes");
        let order = |all: &All| all.0.iter().map(|e| (e.0, e.1)).collect::<Vec<_>>();
        assert_eq!(order(&found), order(&want), "{kind:?}");
        assert_eq!(order(&step), order(&want), "{kind:?}");
        for ((f, s), w) in found.0.iter().zip(&step.0).zip(&want.0) {
            assert!(distance(&f.2, &w.2) < 1e-4, "{kind:?} {}", w.0);
            // The neurons of experts are in the order of the experts, not of the tokens.
            if w.2.len() == 12 * w.1 {
                assert!(distance(&s.2, &w.2[11 * w.1..]) < 1e-4, "{kind:?} {}", w.0);
            }
        }
    }
}

/// Collects everything up to a point.
struct UpTo(Point, All);

impl Observer for UpTo {
    fn wants(&self, _: Point) -> bool {
        true
    }

    fn ends(&self, point: Point) -> bool {
        point == self.0
    }

    fn observe(&mut self, point: Point, width: usize, values: &[f32]) {
        self.1.observe(point, width, values);
    }
}

#[test]
fn single_blocks_end_where_the_observer_says() {
    let plain = Kind { mlp: MlpKind::Plain, act: Act::Gelu, classic: true, ..PLAIN_LLAMA };
    for kind in [PLAIN_LLAMA, plain, Kind { per_layer: true, ..PLAIN_LLAMA }] {
        let engine = engine(random::model(kind, 12), exact());
        let mut probe = Probe::new(&engine);
        let x = probe.embed(&tokens(9, 5)).expect("tokens of the vocabulary");
        let mut all = All::default();
        let whole = probe.observed(1, &x, &mut all).expect("rows of the stream").to_vec();
        for end in [Proj::Q, Proj::V, Proj::O, Proj::Up, Proj::Down].map(|proj| Point::Input { layer: 1, proj }) {
            let mut seen = UpTo(end, All::default());
            probe.observed(1, &x, &mut seen).expect("rows of the stream");
            let last = all.0.iter().position(|p| p.0 == end).expect("a point of this block");
            assert!(seen.1.0 == all.0[..=last], "{kind:?} {end}");
            assert_eq!(
                probe.block(1, &x, None).expect("rows of the stream"),
                whole,
                "{kind:?}: the next pass is whole"
            );
        }
    }
}

#[test]
fn per_layer_embeddings_must_be_of_the_rows_they_are_used_for() {
    let engine = engine(random::model(Kind { per_layer: true, ..PLAIN_LLAMA }, 13), exact());
    let mut probe = Probe::new(&engine);
    let (long, short) = (tokens(9, 6), tokens(4, 7));
    let x = probe.embed(&long).expect("tokens of the vocabulary");
    let right = probe.block(0, &x, None).expect("rows of the stream").to_vec();
    probe.over(&short).expect("tokens of the vocabulary");
    assert!(probe.block(0, &x, None).is_err_and(|e| e.to_string().contains("per-layer embeddings")));
    probe.over(&tokens(9, 8)).expect("tokens of the vocabulary");
    assert_ne!(probe.block(0, &x, None).expect("rows of the stream"), right, "other tokens, other inputs");
    probe.over(&long).expect("tokens of the vocabulary");
    assert_eq!(probe.block(0, &x, None).expect("rows of the stream"), right);
}
