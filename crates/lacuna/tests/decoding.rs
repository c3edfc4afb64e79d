//! Decoding by guessing: the text of plain decoding, and what each method promises beyond it.

mod common;

use common::shared;
use lacuna::{
    calibrate, embedded,
    engine::{
        Engine, Options, Session, TokenTree,
        break_even::BreakEven,
        compile::{CompileOptions, compile},
        decoding::{Ask, Decoder, Draft, Recycling, RecyclingOptions, Rule},
        generate::{Flow, Generated, Limits, generate_with},
        layouts::LayoutCache,
        sampler::{Sampler, SamplerOptions},
    },
    error::Result,
    model::{LoadOptions, Model, load},
    tokenizer::Tokenizer,
};
use lacuna_kernels::Pool;
use lacuna_methods::registry;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

fn fixtures() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut all: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all
}

fn engine(model: Model) -> Engine {
    Engine::new(Arc::new(model), Options { threads: 2, ..Options::default() }).unwrap()
}

/// `n` tokens behind `prompt`, by any decoder.
fn continued(e: &Engine, decoder: &mut Decoder, prompt: &[u32], sampling: SamplerOptions, n: usize) -> Vec<u32> {
    let mut session = e.session(0).unwrap();
    session.prefill(prompt).unwrap();
    let mut sampler = Sampler::new(sampling).unwrap();
    decoder.begin();
    let mut out = vec![sampler.sample(session.logits())];
    sampler.accept(out[0]);
    while out.len() < n && session.len() < session.context() {
        let last = out[out.len() - 1];
        out.push(decoder.next(&mut session, last, &mut sampler, &|_| false).unwrap());
        assert_eq!(session.len(), prompt.len() + out.len() - 1, "all but the newest token are in the context");
    }
    out
}

fn plain(e: &Engine, prompt: &[u32], sampling: SamplerOptions, n: usize) -> Vec<u32> {
    continued(e, &mut Decoder::plain(), prompt, sampling, n)
}

/// A guess may be anything: wide, deep, right by accident, outside of sense.
struct Anything(u64);

impl Draft for Anything {
    fn draft(&mut self, session: &mut Session, last: u32, ask: &Ask<'_>) -> Result<TokenTree> {
        let mut tree = TokenTree::new(last);
        let mut next = |below: u64| {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % below
        };
        let wanted = 1 + next(ask.most as u64) as usize;
        for _ in 0..4 * wanted {
            let parent = next(tree.len() as u64) as usize;
            if tree.len() < wanted && tree.depth(parent) + 1 < ask.deep {
                // A small range of tokens, so that some guesses are right.
                tree.push(next(session.vocab().min(12) as u64) as u32, parent);
            }
        }
        Ok(tree)
    }
}

fn sampled(seed: u64) -> SamplerOptions {
    SamplerOptions { seed, temp: 1.2, repeat_penalty: 1.1, ..SamplerOptions::default() }
}

#[test]
fn exact_guessing_is_plain_decoding_on_every_architecture() {
    for dir in fixtures() {
        let e = engine(load(&dir, &LoadOptions::default()).unwrap());
        let vocab = e.model().spec.vocab as u32;
        let prompt: Vec<u32> = (0..7).map(|i| (i * 37 + 11) % vocab).collect();
        for sampling in [SamplerOptions::greedy(), sampled(5)] {
            // As far as the context goes: across pages and windows, and to the end.
            let want = plain(&e, &prompt, sampling, 150);
            let options = RecyclingOptions { most: 12, adapt: false };
            for mut decoder in [
                Decoder::token_recycling(options).unwrap(),
                Decoder::token_recycling(RecyclingOptions::default()).unwrap(),
                Decoder::new(Box::new(Anything(3)), false, Rule::Exact, 20).unwrap(),
                Decoder::sparse_steps(5, Rule::Exact).unwrap(),
            ] {
                assert_eq!(continued(&e, &mut decoder, &prompt, sampling, 150), want, "{}", dir.display());
            }
        }
    }
}

#[test]
fn a_second_time_more_guesses_are_right() {
    let dir = fixtures().into_iter().find(|d| d.ends_with("llama3")).unwrap();
    let e = engine(load(&dir, &LoadOptions::default()).unwrap());
    let mut decoder = Decoder::token_recycling(RecyclingOptions { most: 16, adapt: false }).unwrap();
    let first = continued(&e, &mut decoder, &[1, 2, 3], SamplerOptions::greedy(), 60);
    let cold = decoder.stats().accepted_length();
    decoder.reset_stats();
    assert_eq!(continued(&e, &mut decoder, &[1, 2, 3], SamplerOptions::greedy(), 60), first);
    let warm = decoder.stats().accepted_length();
    println!("accepted length {cold:.2}, then {warm:.2}");
    assert!(warm > cold && cold >= 1.0);
}

#[test]
fn the_table_holds_the_largest_logits_and_nothing_else_changes() {
    let dir = fixtures().into_iter().find(|d| d.ends_with("llama2")).unwrap();
    let e = engine(load(&dir, &LoadOptions::default()).unwrap());
    let mut session = e.session(0).unwrap();
    session.prefill(&[3, 4]).unwrap();
    let mut r = Recycling::new(RecyclingOptions { most: 8, adapt: false });
    r.remember(5, &[6, 7]);
    r.remember(9, &[1]);
    let sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
    let ask = Ask { most: 8, deep: 100, sampler: &sampler, ends: &|_| false };
    let tree = r.draft(&mut session, 5, &ask).unwrap();
    assert_eq!((tree.tokens(), session.len()), (&[5, 6, 7][..], 2));
    session.verify(&tree, false).unwrap();
    r.checked(&session, &tree, std::time::Duration::from_millis(1));
    for node in 0..3 {
        let logits = session.node_logits(node);
        let mut ids: Vec<u32> = (0..session.vocab() as u32).collect();
        ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        assert_eq!(r.candidates(tree.tokens()[node]), &ids[..8]);
    }
    assert_eq!(r.candidates(9), [1]);
    // Behind a token that ends a text, and beyond the room, nothing is guessed.
    let ends = Ask { ends: &|id| id == r.candidates(5)[0], ..ask };
    let first = r.candidates(5)[0];
    let tree = Recycling::draft(&mut clone_of(&r, &[5, first]), &mut session, 5, &ends).unwrap();
    assert!(tree.first_child(tree.child(Some(0), first)).is_none());
}

/// A new table with some rows of another.
fn clone_of(r: &Recycling, tokens: &[u32]) -> Recycling {
    let mut new = Recycling::new(RecyclingOptions { most: 8, adapt: false });
    tokens.iter().for_each(|&t| new.remember(t, r.candidates(t)));
    new
}

/// The model with a plan of `spec`, and the same weights without it.
fn with_plan(model: Model, spec: &str, prompt: &[u32]) -> (Engine, Engine) {
    let model = Arc::new(model);
    let steps = registry::parse(spec).unwrap();
    let subject = calibrate::Subject::new(&model);
    let dense = Engine::new(model.clone(), Options::default()).unwrap();
    let mut session = dense.session(0).unwrap();
    let mut forward = |tokens: &[u32], observer: &mut dyn lacuna_core::observer::Observer| {
        session.truncate(0);
        session.observe(tokens, observer)
    };
    let (plan, _) = calibrate::calibrate(&steps, &subject, &mut forward, &[prompt.to_vec()], |_, _, _| {}).unwrap();
    let options =
        CompileOptions { cache: LayoutCache::new(None, ""), break_even: BreakEven::never_dense(), masked: false };
    let compiled = compile(&plan, &model, &options, &Pool::new(2), &|_, _| {}).unwrap();
    let options = Options { threads: 2, ..Options::default() };
    let dense = Engine::new(compiled.model, options).unwrap();
    (dense.with_plan(Some(compiled.plan)).unwrap(), dense)
}

fn fixture(name: &str) -> Model {
    let dir = fixtures().into_iter().find(|d| d.ends_with(name)).unwrap();
    load(&dir, &LoadOptions::default()).unwrap()
}

#[test]
fn exact_self_speculation_is_dense_decoding_for_any_plan() {
    let prompt = [1, 5, 9, 2, 6];
    for (name, spec) in [("llama3", "teal=0.5"), ("llama-relu", "relu"), ("gpt2", "teal=0.7"), ("mistral", "teal=0.9")]
    {
        let (sparse, dense) = with_plan(fixture(name), spec, &prompt);
        for sampling in [SamplerOptions::greedy(), sampled(8)] {
            let want = plain(&dense, &prompt, sampling, 80);
            for n in [1, 4, 9] {
                let mut decoder = Decoder::sparse_steps(n, Rule::Exact).unwrap();
                assert_eq!(continued(&sparse, &mut decoder, &prompt, sampling, 80), want, "{name} {spec} {n}");
                assert!(decoder.stats().accepted_length() <= n as f64);
            }
            // A threshold with blocks of one token is dense decoding too.
            let mut one = Decoder::sparse_steps(1, Rule::Threshold(0.1)).unwrap();
            assert_eq!(continued(&sparse, &mut one, &prompt, sampling, 80), want);
        }
    }
}

#[test]
fn a_plan_that_keeps_everything_fills_every_block() {
    let prompt = [1, 5, 9];
    let (sparse, dense) = with_plan(fixture("llama3"), "teal=0", &prompt);
    let want = plain(&dense, &prompt, SamplerOptions::greedy(), 1 + 6 * 10);
    for rule in [Rule::Exact, Rule::Threshold(0.0), Rule::Threshold(0.05)] {
        let mut decoder = Decoder::sparse_steps(6, rule).unwrap();
        let out = continued(&sparse, &mut decoder, &prompt, SamplerOptions::greedy(), 1 + 6 * 10);
        assert_eq!((out, decoder.stats().accepted_length()), (want.clone(), 6.0), "{rule:?}");
    }
}

#[test]
fn a_threshold_of_zero_never_rolls_back_and_still_rewrites() {
    let prompt = [1, 5, 9];
    let (sparse, dense) = with_plan(fixture("llama3"), "teal=0.8", &prompt);
    let mut decoder = Decoder::sparse_steps(6, Rule::Threshold(0.0)).unwrap();
    let mut session = sparse.session(0).unwrap();
    session.prefill(&prompt).unwrap();
    let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
    let mut out = vec![sampler.sample(session.logits())];
    for _ in 0..30 {
        let last = out[out.len() - 1];
        out.push(decoder.next(&mut session, last, &mut sampler, &|_| false).unwrap());
    }
    assert_eq!(decoder.stats().accepted_length(), 6.0);
    assert!(decoder.stats().effective_density() < 1.0, "{:?}", decoder.stats());
    // A dense run over the same tokens has the same keys and values: the next dense step has the same bits.
    let mut only = dense.session(0).unwrap();
    only.prefill(&prompt).unwrap();
    out[..30].iter().for_each(|&id| drop(only.decode(id).unwrap().to_vec()));
    session.verify(&TokenTree::new(out[30]), true).unwrap();
    assert_eq!(session.node_logits(0), only.decode(out[30]).unwrap());
}

struct Told {
    out: Generated,
    density: f64,
    length: f64,
}

fn tell(e: &Engine, tokenizer: &Tokenizer, decoder: &mut Decoder, sampling: SamplerOptions, stop: &[String]) -> Told {
    let mut session = e.session(0).unwrap();
    let mut sampler = Sampler::new(sampling).unwrap();
    let prompt = tokenizer.encode("Once upon a time", true).unwrap();
    let limits = Limits { max_tokens: 200, stop: stop.to_vec(), ignore_eos: false };
    decoder.reset_stats();
    let mut go = |_: &str| Flow::Continue;
    let out = generate_with(decoder, &mut session, tokenizer, &prompt, &mut sampler, &limits, &mut go).unwrap();
    assert_eq!(session.len(), prompt.len() + out.tokens.len() - 1, "the last token is not in the context");
    Told { out, density: decoder.stats().effective_density(), length: decoder.stats().accepted_length() }
}

#[test]
fn the_embedded_model_tells_the_same_story() {
    if !embedded::exists() {
        return println!("skipped: no embedded model in this build");
    }
    let model = lacuna::model::Checkpoint::embedded(&LoadOptions::default()).unwrap().bind().unwrap();
    let tokenizer = embedded::tokenizer().unwrap();
    let (sparse, dense) = with_plan(model, "relu", &[1, 2, 3]);
    let mut recycling = Decoder::token_recycling(RecyclingOptions::default()).unwrap();
    for (sampling, stop) in
        [(SamplerOptions::greedy(), vec![]), (sampled(3), vec![]), (sampled(4), vec!["the ".into()])]
    {
        for e in [&dense, &sparse] {
            let want = tell(e, &tokenizer, &mut Decoder::plain(), sampling, &stop);
            let got = tell(e, &tokenizer, &mut recycling, sampling, &stop);
            assert_eq!((&got.out.text, &got.out.tokens), (&want.out.text, &want.out.tokens));
            println!("token recycling: {:.2} tokens per pass", got.length);
        }
        let want = tell(&dense, &tokenizer, &mut Decoder::plain(), sampling, &stop);
        let mut own = Decoder::sparse_steps(8, Rule::Exact).unwrap();
        let got = tell(&sparse, &tokenizer, &mut own, sampling, &stop);
        assert_eq!(got.out.tokens, want.out.tokens);
        println!("sparse steps: {:.2} tokens per pass, effective density {:.3}", got.length, got.density);
    }
}

#[test]
fn trained_models_lie_between_sparse_and_dense() {
    let Some(path) = shared("models/lacuna-stories") else { return };
    let tokenizer = Tokenizer::open(&path).unwrap();
    let text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sun.";
    let calibration = tokenizer.encode(text, true).unwrap();
    let (sparse, dense) = with_plan(load(&path, &LoadOptions::default()).unwrap(), "teal=0.5", &calibration);
    let want = tell(&dense, &tokenizer, &mut Decoder::plain(), SamplerOptions::greedy(), &[]);
    let mut exact = Decoder::sparse_steps(8, Rule::Exact).unwrap();
    let got = tell(&sparse, &tokenizer, &mut exact, SamplerOptions::greedy(), &[]);
    assert_eq!(got.out.tokens, want.out.tokens);
    let mut sirius = Decoder::sparse_steps(8, Rule::Threshold(0.05)).unwrap();
    let loose = tell(&sparse, &tokenizer, &mut sirius, SamplerOptions::greedy(), &[]);
    println!(
        "exact {:.2} per check, density {:.3}; sirius {:.2}, {:.3}",
        got.length, got.density, loose.length, loose.density
    );
    assert!(loose.length >= got.length && loose.length <= 8.0 && loose.density <= got.density);
    let mut recycling = Decoder::token_recycling(RecyclingOptions { most: 16, adapt: false }).unwrap();
    let told = tell(&dense, &tokenizer, &mut recycling, SamplerOptions::greedy(), &[]);
    assert_eq!(told.out.tokens, want.out.tokens);
    println!("token recycling: {:.2} tokens per pass", told.length);
    assert!(told.length > 1.2);
}
