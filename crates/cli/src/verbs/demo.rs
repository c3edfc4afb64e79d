//! `lacuna` without a verb: one story told twice by the embedded model, dense and sparse, and the two compared.

use super::run::{Printer, kept};
use crate::{
    Outcome,
    args::{Kv, LoadArgs, LoadMode},
    open,
    table::Table,
    text,
};
use anyhow::Result;
use lacuna::{
    engine::{
        Counters, Engine,
        generate::{Generated, Limits, generate},
        sampler::{Sampler, SamplerOptions},
    },
    eval::{Divergence, EngineSource, Scoring, divergence, windows},
    tokenizer::Tokenizer,
};
use std::{
    io::{Write, stdout},
    time::Instant,
};

/// What the story begins with.
const PROMPT: &str = "Once upon a time, there was a little fox who";
/// Runs of each kind that are timed.
const ROUNDS: usize = 7;
/// Tokens of the story.
const LENGTH: usize = 160;
/// Text that both are measured on: three stories written for this purpose, so that no training data is repeated.
const TEXT: &str = include_str!("demo.txt");
/// Stories in [`TEXT`] are parted by lines of this.
const MARK: &str = "---";

/// Runs the demo.
pub fn run() -> Result<Outcome> {
    let args = LoadArgs {
        threads: None,
        kv: Kv::F16,
        cache_type_k: None,
        cache_type_v: None,
        sparse: Some("relu".to_owned()),
        plan: None,
        memory: None,
        load_mode: LoadMode::Map,
        check_tensors: false,
        no_bitmaps: false,
        batch: 512,
        model_name: None,
    };
    let ready = open::ready(None, None, &args)?;
    let tokenizer = ready.tokenizer()?;
    let spec = &ready.dense.model().spec;
    let mut out = stdout();
    writeln!(out, "The embedded model: {} layers, {} wide, ReLU-gated.\n", spec.blocks.len(), spec.width)?;
    writeln!(out, "Dense, every weight is read for every token:\n")?;
    let (dense, dense_counters) = tell(&ready.dense, tokenizer)?;
    writeln!(out, "\nSparse, neurons whose gate is closed are not read:\n")?;
    let (sparse, sparse_counters) = tell(&ready.engine, tokenizer)?;
    let rates = race(&[&ready.dense, &ready.engine], &dense.tokens)?;
    let quality = compare(&ready.dense, &ready.engine, tokenizer)?;
    let runs = [("dense", rates[0], &dense_counters), (ready.label(), rates[1], &sparse_counters)];
    write!(out, "\n{}", speeds(&runs))?;
    write!(out, "\n{}", differences(&quality))?;
    if dense.tokens == sparse.tokens {
        writeln!(out, "\nBoth stories are the same: what was skipped was exactly zero.")?;
    }
    Ok(Outcome::Good)
}

/// Streams the story and returns what came out.
fn tell(engine: &Engine, tokenizer: &Tokenizer) -> Result<(Generated, Counters)> {
    let mut session = engine.session(0)?;
    let mut sampler = Sampler::new(SamplerOptions { seed: 7, temp: 0.7, ..SamplerOptions::default() })?;
    let limits = Limits { max_tokens: LENGTH, ..Limits::default() };
    let prompt = tokenizer.encode(PROMPT, true)?;
    let mut printer = Printer::default();
    printer.show(PROMPT);
    let told = generate(&mut session, tokenizer, &prompt, &mut sampler, &limits, &mut |t| printer.show(t))?;
    printer.end()?;
    Ok((told, session.counters().clone()))
}

/// Tokens per second of each engine over the same story: medians of short runs that take turns, because the speed of a
/// shared machine drifts.
fn race(engines: &[&Engine; 2], story: &[u32]) -> Result<[f64; 2]> {
    let mut sessions = [engines[0].session(0)?, engines[1].session(0)?];
    let mut seconds = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (session, times) in sessions.iter_mut().zip(&mut seconds) {
            session.truncate(0);
            session.decode(story[0])?;
            let start = Instant::now();
            for &token in &story[1..] {
                session.decode(token)?;
            }
            times.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(seconds.map(|mut times| {
        times.sort_by(f64::total_cmp);
        (story.len() - 1) as f64 / times[times.len() / 2]
    }))
}

fn compare(dense: &Engine, sparse: &Engine, tokenizer: &Tokenizer) -> Result<Divergence> {
    let encode = |part: &str| tokenizer.encode(part, true);
    let documents = windows::split_documents(TEXT, MARK).into_iter().map(encode).collect::<Result<Vec<_>, _>>()?;
    let windows = windows::documents(documents, dense.model().spec.context);
    let mut base = EngineSource::new(dense, 0, Scoring::Steps)?;
    let mut test = EngineSource::new(sparse, 0, Scoring::Steps)?;
    Ok(divergence(&mut base, &mut test, &windows, Some(tokenizer.pieces()), |_| {})?)
}

fn speeds(runs: &[(&str, f64, &Counters)]) -> Table {
    let mut table = Table::new(&["run", "t/s:", "read per token:", "kept"]);
    for (name, rate, counters) in runs {
        let shares: Vec<_> = kept(counters).into_iter().map(|(s, k)| format!("{s} {}", text::percent(k))).collect();
        table.row([
            (*name).to_owned(),
            format!("{rate:.1}"),
            text::bytes(counters.bytes_per_token() as u64),
            if shares.is_empty() { "everything".to_owned() } else { shares.join(", ") },
        ]);
    }
    table
}

fn differences(d: &Divergence) -> Table {
    let mut table = Table::new(&["sparse against dense", "value:"]);
    let (dense, sparse) = (d.base.ppl().0, d.test.ppl().0);
    table.row(["tokens compared".to_owned(), d.count().to_string()]);
    table.row(["perplexity, dense".to_owned(), format!("{dense:.4}")]);
    table.row(["perplexity, sparse".to_owned(), format!("{sparse:.4}")]);
    table.row(["KL divergence, mean".to_owned(), format!("{:.2e}", d.kld().value)]);
    table.row(["KL divergence, 99 %".to_owned(), format!("{:.2e}", d.kld_quantile(0.99))]);
    table.row(["same most likely token".to_owned(), text::percent(d.same_top().value)]);
    table
}
