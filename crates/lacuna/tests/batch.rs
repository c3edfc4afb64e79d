//! A token's logits do not depend on what is computed beside it: batches of sessions, and trees of guesses.

mod common {
    pub mod random;
}

use common::random::{self, Kind, MlpKind, PLAIN_LLAMA, distance, tokens};
use lacuna::{
    engine::{CompiledPlan, Engine, InputRule, KV_BLOCK, KvType, LayerPlan, NeuronRule, Options, Session, TokenTree},
    error::Error,
    model::{
        LoadOptions, load,
        spec::Act,
        weights::{Gated, Mlp, Model},
    },
};
use lacuna_core::{
    plan::Selector,
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::Format;
use std::{path::Path, sync::Arc};

fn kinds() -> Vec<Kind> {
    let gated = PLAIN_LLAMA;
    vec![
        gated,
        Kind { format: Format::Bf16, ..gated },
        Kind { format: Format::F16, window: Some(20), ..gated },
        Kind { format: Format::Q8_0, act: Act::Relu, ..gated },
        Kind { format: Format::Q4_0, ..gated },
        Kind { mlp: MlpKind::Plain, act: Act::Gelu, classic: true, ..gated },
        Kind { act: Act::Relu, drelu: true, ..gated },
        Kind { mlp: MlpKind::Experts, drelu: true, ..gated },
        Kind { mlp: MlpKind::Experts, format: Format::Q8_0, ..gated },
        Kind { mlp: MlpKind::ReluExperts, ..gated },
        Kind { mlp: MlpKind::ReluExperts, format: Format::Q8_0, latent: true, ..gated },
        Kind { format: Format::Bf16, latent: true, ..gated },
        Kind { format: Format::Q8_0, per_layer: true, ..gated },
    ]
}

fn engine(model: Model, threads: usize, kv: KvType) -> Engine {
    Engine::new(Arc::new(model), Options { threads, kv, ..Options::default() }).expect("a valid model and options")
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

/// Thresholds on the inputs of attention; on the neurons of the MLP, or its inputs.
fn plan(model: &Model, neurons: bool) -> CompiledPlan {
    let selector = Selector::above(0.3);
    let layers = model.blocks.iter().map(|block| {
        let mut layer = LayerPlan::default();
        for proj in Proj::ALL {
            let covered = neurons && matches!(proj, Proj::Gate | Proj::Up | Proj::Down);
            if let (false, Some(linear)) = (covered, block.linear(proj)) {
                layer.inputs[proj as usize] = Some(InputRule::new(selector.clone(), transposed(&linear.weight)));
            }
        }
        let rule = |g: &Gated| NeuronRule::new(Selector::non_zero(), transposed(&g.down.weight));
        match (neurons, &block.mlp) {
            (true, Mlp::Gated(g)) => layer.neurons = Some(rule(g)),
            (true, Mlp::Experts { experts, .. }) => layer.experts = experts.iter().map(rule).collect(),
            _ => {}
        }
        layer
    });
    CompiledPlan { layers: layers.collect(), masked: false }
}

/// Every kind dense, and some with plans.
fn engines() -> Vec<(String, Engine)> {
    let mut all = Vec::new();
    for (seed, kind) in kinds().into_iter().enumerate() {
        let model = random::model(kind, seed as u64);
        all.push((format!("{kind:?}"), engine(model, 1 + seed % 2, KvType::F16)));
    }
    for (neurons, mlp) in [(false, MlpKind::Gated), (true, MlpKind::Gated), (true, MlpKind::Experts)] {
        let model = random::model(Kind { act: Act::Relu, mlp, ..PLAIN_LLAMA }, 50);
        let plan = Arc::new(plan(&model, neurons));
        let sparse = engine(model, 2, KvType::F32).with_plan(Some(plan)).expect("a fitting plan");
        all.push((format!("plan, {mlp:?}, neurons: {neurons}"), sparse));
    }
    all
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits())
}

fn begun(e: &Engine, prompt: &[u32]) -> Session {
    let mut s = e.session(0).expect("a session");
    s.prefill(prompt).expect("prefills");
    s
}

#[test]
fn sessions_in_a_batch_have_the_bits_they_have_alone() {
    for (name, e) in engines() {
        // Lengths on both sides of a page's end and of the window.
        let prompts: Vec<Vec<u32>> = [3, 63, 64, 130, 7].iter().map(|&n| tokens(n, n as u64)).collect();
        let mut sessions: Vec<Session> = prompts.iter().map(|p| begun(&e, p)).collect();
        let mut alone: Vec<Session> = prompts.iter().map(|p| begun(&e, p)).collect();
        for step in 0..6u32 {
            // The batch changes from step to step: members come, go and change their order.
            let members: Vec<usize> = (0..5).filter(|i| (i + step) % 4 != 0).map(|i| i as usize).collect();
            let token = |i: usize| (i as u32 * 11 + step * 5) % random::VOCAB as u32;
            let mut rows: Vec<_> = sessions.iter_mut().enumerate().filter(|(i, _)| members.contains(i)).collect();
            if step % 2 == 1 {
                rows.reverse();
            }
            let mut rows: Vec<_> = rows.into_iter().map(|(i, s)| (s, token(i))).collect();
            e.decode_batch(&mut rows).expect("decodes");
            for i in members {
                let want = alone[i].decode(token(i)).expect("decodes");
                assert!(same_bits(sessions[i].logits(), want), "{name}: session {i}, step {step}");
            }
        }
        let steps = |s: &[Session]| s.iter().map(|s| (s.counters().steps, s.counters().kv_bytes)).collect::<Vec<_>>();
        assert_eq!(steps(&sessions), steps(&alone));
        let bytes = |s: &[Session]| s.iter().map(|s| s.counters().weight_bytes).sum::<u64>();
        assert!(bytes(&sessions) <= bytes(&alone), "{name}: a batch reads no more than its members");
    }
}

/// Branches of different depth; two nodes hold the same token.
fn tree() -> TokenTree {
    let mut t = TokenTree::new(5);
    let a = t.push(9, 0);
    let b = t.push(10, 0);
    let c = t.push(11, a);
    t.push(12, a);
    let d = t.push(9, b);
    t.push(13, c);
    t.push(14, d);
    t
}

/// Path from a root to `node`.
fn path(t: &TokenTree, node: usize) -> Vec<usize> {
    let mut path = vec![node];
    while let Some(p) = t.parent(path[path.len() - 1]) {
        path.push(p);
    }
    path.reverse();
    path
}

#[test]
fn every_node_of_a_tree_has_the_bits_of_plain_decoding() {
    for (name, e) in engines() {
        for n in [1, 61, 62, 64, 150] {
            let prompt = tokens(n, 3);
            let t = tree();
            for node in 0..t.len() {
                let (mut s, mut plain) = (begun(&e, &prompt), begun(&e, &prompt));
                s.verify(&t, false).expect("verifies");
                assert_eq!(s.len(), n);
                for &i in &path(&t, node) {
                    let want = plain.decode(t.tokens()[i]).expect("decodes").to_vec();
                    assert!(same_bits(s.node_logits(i), &want), "{name}: node {i} behind {n}");
                    assert!(same_bits(s.accept(i).expect("continues the path"), &want));
                }
                assert_eq!(s.len(), plain.len());
                // What was accepted is now the context: plain steps and further trees go on from it.
                assert!(same_bits(s.decode(20).expect("decodes"), plain.decode(20).expect("decodes")), "{name} {n}");
                s.verify(&TokenTree::chain(&[1, 2]), false).expect("verifies");
                s.accept(0).expect("the root");
                plain.decode(1).expect("decodes");
                assert!(same_bits(s.decode(7).expect("decodes"), plain.decode(7).expect("decodes")), "{name} {n}");
            }
        }
    }
}

#[test]
fn a_dense_check_ignores_the_plan_and_overwrites_its_keys_and_values() {
    let model = random::model(Kind { act: Act::Relu, ..PLAIN_LLAMA }, 51);
    let plan = Arc::new(plan(&model, false));
    let dense = engine(model, 2, KvType::F32);
    let sparse = dense.with_plan(Some(plan)).expect("a fitting plan");
    let prompt = tokens(60, 1);
    let (mut s, mut plain) = (begun(&sparse, &prompt), begun(&dense, &prompt));
    let ids = [3, 1, 4, 1, 5, 9];
    let drafted: Vec<f32> = ids.iter().flat_map(|&id| s.decode(id).expect("decodes").to_vec()).collect();
    s.truncate(60);
    s.verify(&TokenTree::chain(&ids), true).expect("verifies");
    let mut differs = false;
    for (i, (&id, drafted)) in ids.iter().zip(drafted.chunks_exact(random::VOCAB)).enumerate() {
        let want = plain.decode(id).expect("decodes");
        differs |= distance(drafted, want) > 1e-3;
        assert!(same_bits(s.accept(i).expect("the chain"), want), "token {i}");
    }
    assert!(differs, "the plan must have changed something");
    // The next dense step sees the keys and values of the dense pass alone.
    s.verify(&TokenTree::new(2), true).expect("verifies");
    assert!(same_bits(s.node_logits(0), plain.decode(2).expect("decodes")));
}

#[test]
fn every_architecture_keeps_its_bits() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for entry in std::fs::read_dir(dir).expect("the fixtures") {
        let dir = entry.expect("an entry").path();
        let e = engine(load(&dir, &LoadOptions::default()).expect("a fixture"), 1, KvType::F16);
        let vocab = e.model().spec.vocab as u32;
        let prompt: Vec<u32> = (0..9).map(|i| (i * 37 + 11) % vocab).collect();
        let mut t = TokenTree::new(1);
        let a = t.push(2, 0);
        let b = t.push(3, 0);
        let c = t.push(4, b);
        t.push(5, a);
        let (mut s, mut plain) = (begun(&e, &prompt), begun(&e, &prompt));
        s.verify(&t, false).expect("verifies");
        for i in [0, b, c] {
            let want = plain.decode(t.tokens()[i]).expect("decodes");
            assert!(same_bits(s.accept(i).expect("continues"), want), "{}", dir.display());
        }
        let mut other = begun(&e, &prompt[..4]);
        e.decode_batch(&mut [(&mut other, 1), (&mut s, 6)]).expect("decodes");
        assert!(same_bits(s.logits(), plain.decode(6).expect("decodes")), "{}", dir.display());
    }
}

#[test]
fn what_cannot_run_is_an_error_before_any_work() {
    let (e, other) =
        (engine(random::model(PLAIN_LLAMA, 5), 1, KvType::F32), engine(random::model(PLAIN_LLAMA, 5), 1, KvType::F32));
    let (mut a, mut b) = (e.session(4).expect("a session"), other.session(0).expect("a session"));
    assert!(matches!(e.decode_batch(&mut []), Err(Error::Argument { name: "sessions", .. })));
    assert!(matches!(e.decode_batch(&mut [(&mut a, 1), (&mut b, 1)]), Err(Error::Argument { .. })));
    assert!(e.decode_batch(&mut [(&mut a, 7000)]).is_err() && a.is_empty());
    assert!(matches!(a.verify(&TokenTree::chain(&[1; 5]), false), Err(Error::Context { tokens: 5, context: 4 })));
    assert!(a.verify(&TokenTree::chain(&[]), false).is_err());
    assert!(a.accept(0).is_err(), "nothing was checked");
    let mut siblings = TokenTree::new(1);
    (0..6).for_each(|i| assert_eq!(siblings.push(i, 0), 1 + i as usize));
    a.verify(&siblings, false).expect("seven tokens, but only two deep");
    assert!(a.accept(3).is_err(), "its parent was not accepted");
    a.accept(0).expect("the root");
    a.accept(3).expect("its child");
    assert!(a.accept(4).is_err(), "a sibling");
    assert_eq!(a.len(), 2);
    a.truncate(1);
    assert!(a.accept(5).is_err() && a.len() == 1, "the tree is settled");
    a.decode(1).expect("decodes");
}

#[test]
fn a_session_that_begins_with_blocks_of_another_has_the_same_bits() {
    for (name, e) in engines() {
        if e.follows_prompts() {
            continue;
        }
        let prompt = tokens(150, 9);
        let mut first = begun(&e, &prompt);
        let blocks = first.blocks();
        assert_eq!(blocks.len(), 150 / KV_BLOCK, "{name}");
        let (used, mut second) = (e.blocks_in_use(), e.session(0).expect("a session"));
        second.begin_with(&blocks).expect("they fit");
        assert_eq!((second.len(), e.blocks_in_use()), (128, used), "{name}: nothing is copied");
        second.prefill(&prompt[128..]).expect("prefills");
        assert!(same_bits(second.logits(), first.logits()), "{name}");
        // Both write behind the same blocks; then one of them into a shared block.
        for t in [3, 5, 8] {
            let want = first.decode(t).expect("decodes").to_vec();
            assert!(same_bits(second.decode(t).expect("decodes"), &want), "{name}");
        }
        let (mut third, mut alone) = (e.session(0).expect("a session"), begun(&e, &prompt[..100]));
        third.begin_with(&blocks).expect("they fit");
        third.truncate(100);
        let want = alone.decode(7).expect("decodes").to_vec();
        assert!(same_bits(third.decode(7).expect("decodes"), &want), "{name}");
        assert!(same_bits(second.decode(1).expect("decodes"), first.decode(1).expect("decodes")), "{name}");
        assert!(first.begin_with(&blocks).is_err(), "{name}: not empty");
        drop((first, second, third, alone, blocks));
        assert_eq!(e.blocks_in_use(), 0, "{name}");
    }
}

#[test]
fn a_prompt_has_the_same_bits_in_whatever_parts_it_comes() {
    for (name, e) in engines() {
        // Positions that are learned end earlier.
        let context = if e.session(600).is_ok() { 600 } else { 300 };
        let mut short = 0;
        for n in [1, 3, 4, 5, 64, 66, 70, 513, 516, 517].into_iter().filter(|n| *n <= context - 2) {
            let prompt = tokens(n, n as u64);
            let fresh = || e.session(context).expect("a session");
            let (mut whole, mut parts, mut kept, mut dense) = (fresh(), fresh(), fresh(), fresh());
            whole.prompt(&prompt).expect("fits");
            assert_eq!(whole.counters().weight_bytes, 0, "{name}, {n}: prompts are not counted");
            let cut = whole.matrix_part(n).min(n - 1);
            short += usize::from(whole.matrix_part(n) < n);
            for part in prompt[..cut].chunks(100) {
                parts.score(part, &mut |_, _| {}).expect("fits");
            }
            parts.prompt(&prompt[cut..]).expect("fits");
            let blocks = whole.blocks();
            let (some, matrix) = (&blocks[..blocks.len().min((n - 1) / KV_BLOCK)], whole.matrix_part(n));
            kept.begin_with(if e.follows_prompts() { &[] } else { some }).expect("they fit");
            kept.prompt(&prompt[kept.len()..]).expect("fits");
            for other in [&mut parts, &mut kept] {
                assert!(same_bits(other.logits(), whole.logits()), "{name}, {n} tokens");
            }
            let near = distance(dense.prefill(&prompt).expect("fits"), whole.logits());
            assert!(near < 8e-2 || name.contains("Experts"), "{name}, {n} tokens: {near}");
            assert!(matrix < n || near == 0.0, "{name}, {n} tokens: nothing was short");
            let want = whole.decode(7).expect("decodes").to_vec();
            for other in [&mut parts, &mut kept] {
                assert!(same_bits(other.decode(7).expect("decodes"), &want), "{name}, {n} tokens, and a step");
            }
        }
        assert_eq!(short, if context == 600 { 5 } else { 3 }, "{name}");
    }
}
