//! Text from the shared models: the greedy samples of their README, and what must not change it.

mod common;

use common::shared;
use lacuna::{
    chat::{ChatTemplate, Message},
    engine::{
        Engine, KvType, Options,
        generate::{Finish, Flow, Generated, Limits, generate},
        sampler::{Sampler, SamplerOptions},
    },
    model::{LoadOptions, load},
    tokenizer::Tokenizer,
};
use std::{path::Path, sync::Arc};

const PROMPT: &str = "Once upon a time";

struct Loaded {
    engine: Engine,
    tokenizer: Tokenizer,
}

fn open(path: &Path, options: Options) -> Loaded {
    let model = load(path, &LoadOptions::default()).expect("a valid model");
    let tokenizer = Tokenizer::open(path).expect("a valid tokenizer");
    tokenizer.check_vocab(model.spec.vocab).expect("the model's own tokenizer");
    Loaded { engine: Engine::new(Arc::new(model), options).expect("valid options"), tokenizer }
}

fn run(m: &Loaded, sampling: SamplerOptions, limits: &Limits) -> (Generated, String) {
    let mut session = m.engine.session(0).expect("a session");
    let mut sampler = Sampler::new(sampling).expect("valid options");
    let prompt = m.tokenizer.encode(PROMPT, true).expect("encodes");
    let mut shown = String::new();
    let out = generate(&mut session, &m.tokenizer, &prompt, &mut sampler, limits, &mut |text| {
        shown.push_str(text);
        Flow::Continue
    })
    .expect("generates");
    assert_eq!(out.text, shown);
    (out, shown)
}

/// The README shows the samples with their line ends as spaces.
fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

fn limits(max_tokens: usize) -> Limits {
    Limits { max_tokens, ..Limits::default() }
}

#[test]
fn greedy_text_of_stories260k_is_that_of_its_readme() {
    const WANT: &str = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a \
        big, red ball. She wanted to play with it, but it was too high. Lily's mom said, \"Lily, let's go to the park.\" \
        Lily was sad and didn't know what to do.";
    for (part, exact) in [
        ("hf-f32", true),
        ("gguf/stories260K-f32.gguf", true),
        ("hf-bf16", true),
        ("gguf/stories260K-f16.gguf", true),
        ("gguf/stories260K-q8_0.gguf", false),
        ("gguf/stories260K-q4_0.gguf", false),
    ] {
        let Some(path) = shared(&format!("models/stories260K/{part}")) else { return };
        let m = open(&path, Options::default());
        let (out, text) = run(&m, SamplerOptions::greedy(), &limits(120));
        println!("{part}: {text}");
        let want = if exact { WANT } else { ", there was a little" };
        assert!(one_line(&text).starts_with(want), "{part}: {text}");
        assert_eq!((out.finish, out.tokens.len(), out.prompt_tokens), (Finish::Length, 120, 5));
    }
}

#[test]
fn greedy_text_of_the_distilled_models_is_that_of_their_readme() {
    let begin = ", there was a little girl named Lily. She loved to play outside in the sun. One day, she saw a big, scary \
        dog. The dog was barking and jumping around. Lily was scared and ";
    for (name, end) in [
        (
            "lacuna-stories",
            "didn't know what to do. Lily's mom saw her and said, \"Don't worry, we can get you a new dog.",
        ),
        (
            "lacuna-stories-relu",
            "ran away. Lily ran to her mom and said, \"Mommy, I'm scared. I don't want to go home.\"",
        ),
    ] {
        let Some(path) = shared(&format!("models/{name}")) else { return };
        let m = open(&path, Options { kv: KvType::F32, ..Options::default() });
        let (_, text) = run(&m, SamplerOptions::greedy(), &limits(100));
        assert!(one_line(&text).starts_with(&format!("{begin}{end}")), "{name}: {text}");
    }
}

#[test]
fn a_seed_gives_the_same_text_at_any_number_of_threads_and_chunk() {
    let Some(path) = shared("models/lacuna-stories") else { return };
    let sampling = |seed| SamplerOptions { seed, ..SamplerOptions::default() };
    let text = |seed, threads, prefill_chunk| {
        let m = open(&path, Options { threads, prefill_chunk, ..Options::default() });
        run(&m, sampling(seed), &limits(80)).1
    };
    let one = text(1, 1, 512);
    assert_eq!(one, text(1, 2, 512));
    assert_eq!(one, text(1, 3, 2));
    assert_ne!(one, text(2, 1, 512));
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let Some(path) = shared("models/stories260K/hf-f32") else { return };
    let m = open(&path, Options::default());
    let whole = run(&m, SamplerOptions::greedy(), &limits(60)).1;
    for stop in [" girl named", "y. S", ","] {
        let limits = Limits { stop: vec![stop.into(), "never found".into()], ..limits(60) };
        let (out, text) = run(&m, SamplerOptions::greedy(), &limits);
        let at = whole.find(stop).expect("the story has it");
        assert_eq!((text.as_str(), out.finish), (&whole[..at], Finish::Stop));
    }
}

#[test]
fn the_context_and_the_callback_end_generation() {
    let Some(path) = shared("models/stories260K/hf-f32") else { return };
    let m = open(&path, Options::default());
    let prompt = m.tokenizer.encode(PROMPT, true).expect("encodes");
    let mut session = m.engine.session(8).expect("a session");
    let mut sampler = Sampler::new(SamplerOptions::greedy()).expect("valid options");
    let mut go = |_: &str| Flow::Continue;
    let out = generate(&mut session, &m.tokenizer, &prompt, &mut sampler, &limits(60), &mut go).expect("generates");
    assert_eq!((out.finish, out.tokens.len(), session.len()), (Finish::Context, 4, 8));
    let over = generate(&mut session, &m.tokenizer, &prompt, &mut sampler, &limits(60), &mut go);
    assert!(over.is_err_and(|e| e.to_string().contains("13 tokens") && e.to_string().contains("context of 8")));
    session.truncate(0);
    let mut stop = |_: &str| Flow::Stop;
    let out = generate(&mut session, &m.tokenizer, &prompt, &mut sampler, &limits(60), &mut stop).expect("generates");
    assert_eq!((out.finish, out.tokens.len()), (Finish::Cancelled, 1));
}

#[test]
fn a_model_without_a_template_gets_chatml() {
    let Some(path) = shared("models/lacuna-stories") else { return };
    let tokenizer = Tokenizer::open(&path).expect("a valid tokenizer");
    let template = ChatTemplate::of(&tokenizer, None).expect("a template");
    assert!(template.is_fallback());
    let ids = template.encode(&tokenizer, &[Message::new("user", "Hi")], true).expect("encodes");
    assert_eq!(ids[0], 0, "the tokenizer adds BOS, since the template does not");
    assert!(tokenizer.decode(&ids).ends_with("<|im_start|>assistant\n"));
}
