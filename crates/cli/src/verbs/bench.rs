//! `lacuna bench`: llama-bench's tests and row form, with the plan, its density and what was read; also several
//! conversations in one pass, and decoding by guesses.

use super::run::{dense_bytes, kept};
use crate::{
    Outcome,
    args::{Kv, LoadArgs, LoadMode},
    decoding::Spec,
    open::{self, Place},
    sparse,
    table::Table,
    text::{self, mean_sd},
};
use anyhow::{Result, bail};
use clap::ValueEnum;
use lacuna::{
    engine::{
        Engine, Session,
        decoding::DecodingStats,
        sampler::{Rng, Sampler, SamplerOptions},
    },
    tokenizer::Tokenizer,
};
use lacuna_kernels::{isa, probe::StreamProbe};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::{Write, stdout},
    sync::Arc,
    time::Instant,
};

/// Arguments of `lacuna bench`.
#[derive(clap::Args)]
pub struct Args {
    /// Models (comma-separated or repeated): directories, GGUF files, names of the hub cache; default: the embedded one.
    #[arg(short, long, value_delimiter = ',', env = "LACUNA_MODEL")]
    model: Vec<String>,
    /// Prompt lengths to process (pp); 0: none.
    #[arg(short = 'p', long, value_delimiter = ',', default_value = "512", env = "LACUNA_N_PROMPT")]
    n_prompt: Vec<usize>,
    /// Numbers of tokens to generate (tg); 0: none.
    #[arg(short = 'n', long, value_delimiter = ',', default_value = "128", env = "LACUNA_N_GEN")]
    n_gen: Vec<usize>,
    /// Tokens in the context before the test begins.
    #[arg(short = 'd', long, value_delimiter = ',', default_value = "0", env = "LACUNA_N_DEPTH")]
    n_depth: Vec<usize>,
    /// Repetitions.
    #[arg(short, long, default_value_t = 5, env = "LACUNA_REPETITIONS")]
    repetitions: usize,
    /// Numbers of threads; default: all cores.
    #[arg(short, long, value_delimiter = ',', env = "LACUNA_THREADS")]
    threads: Vec<usize>,
    /// Prompt tokens processed together.
    #[arg(short, long, default_value_t = 512, env = "LACUNA_BATCH")]
    batch: usize,
    /// Type of the KV cache.
    #[arg(long, value_enum, default_value = "f16", env = "LACUNA_KV")]
    kv: Kv,
    /// Methods to run, as for `run`; `dense` for none. May be given several times.
    #[arg(long, value_name = "SPEC", env = "LACUNA_SPARSE")]
    sparse: Vec<String>,
    /// Read all matrices as they are: none as bitmaps (done where many zeros make that faster), none from `model.lacuna`.
    #[arg(long, env = "LACUNA_NO_BITMAPS")]
    no_bitmaps: bool,
    /// Conversations that generate together, one token each in a pass; t/s counts the tokens of all.
    #[arg(long, value_delimiter = ',', default_value = "1", env = "LACUNA_STREAMS")]
    streams: Vec<usize>,
    /// Generate greedily behind --draft-prompt instead of random tokens, by guesses as `run --draft` takes them, or
    /// `plain`. Every repetition starts without candidates.
    #[arg(long, value_name = "SPEC", value_delimiter = ',', env = "LACUNA_DRAFT")]
    draft: Vec<Spec>,
    /// The prompt of tests with --draft.
    #[arg(long, value_name = "TEXT", default_value = "Once upon a time", env = "LACUNA_DRAFT_PROMPT")]
    draft_prompt: String,
    /// Most tokens checked in one pass of tests with --draft.
    #[arg(long, value_name = "N", env = "LACUNA_DRAFT_MAX")]
    draft_max: Option<usize>,
    /// Form of the output.
    #[arg(short, long, value_enum, default_value = "md", env = "LACUNA_OUTPUT")]
    output: Output,
    /// Skip the unmeasured first run of each test.
    #[arg(long)]
    no_warmup: bool,
    /// Skip the measurement of the machine's streaming bandwidth before and after.
    #[arg(long)]
    no_probe: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Md,
    Json,
    Jsonl,
    Csv,
}

/// One result; the names are llama-bench's where it has them.
#[derive(Serialize)]
struct Row {
    model_filename: String,
    model_type: String,
    model_size: u64,
    model_n_params: u64,
    backend: String,
    n_threads: usize,
    n_batch: usize,
    type_k: String,
    type_v: String,
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    n_streams: usize,
    draft: Option<String>,
    test: String,
    plan: String,
    /// Bytes read per decoded token over those of the dense model.
    density: Option<f64>,
    kept: BTreeMap<String, f64>,
    bytes_per_token: Option<f64>,
    gb_per_s: Option<f64>,
    /// Bandwidth of a plain streaming read on the same threads, measured before and after, in GB/s.
    stream_gb_per_s: Option<[f64; 2]>,
    stream_share: Option<f64>,
    /// Tokens per checking pass, and bytes of weights per token over those of one pass.
    accepted_length: Option<f64>,
    effective_density: Option<f64>,
    avg_ns: u64,
    stddev_ns: u64,
    avg_ts: f64,
    stddev_ts: f64,
    samples_ns: Vec<u64>,
    samples_ts: Vec<f64>,
}

/// A test: a prompt, or tokens to generate, at a depth.
#[derive(Clone, Copy)]
struct Test<'a> {
    prompt: usize,
    generate: usize,
    depth: usize,
    streams: usize,
    draft: Option<&'a Spec>,
}

impl Test<'_> {
    fn name(&self) -> String {
        let mut base = if self.prompt > 0 { format!("pp{}", self.prompt) } else { format!("tg{}", self.generate) };
        if self.streams > 1 {
            base += &format!(" x{}", self.streams);
        }
        if let Some(draft) = &self.draft {
            base += &format!(" {draft}");
        }
        if self.depth > 0 { format!("{base} @ d{}", self.depth) } else { base }
    }

    /// Tokens of one conversation.
    fn tokens(&self) -> usize {
        self.prompt + self.generate
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    if args.repetitions == 0 {
        bail!("`-r 0`: at least one repetition is needed");
    }
    let tests = tests(&args);
    if args.streams.contains(&0) {
        bail!("`--streams 0`: at least one conversation is needed");
    }
    if !args.draft.is_empty() && args.n_depth.iter().any(|d| *d > 0) {
        bail!("tests with --draft begin behind their prompt: leave out -d");
    }
    if tests.is_empty() {
        bail!("nothing to measure: -p and -n are both 0");
    }
    let models: Vec<Option<&str>> =
        if args.model.is_empty() { vec![None] } else { args.model.iter().map(|m| Some(m.as_str())).collect() };
    let mut rows = Vec::new();
    for name in models {
        bench_model(&args, name, &tests, &mut rows)?;
    }
    print_all(args.output, &rows)?;
    Ok(Outcome::Good)
}

fn tests(args: &Args) -> Vec<Test<'_>> {
    let mut list = Vec::new();
    for &depth in &args.n_depth {
        let base = Test { prompt: 0, generate: 0, depth, streams: 1, draft: None };
        if args.draft.is_empty() {
            list.extend(args.n_prompt.iter().map(|&prompt| Test { prompt, ..base }));
        }
        for &generate in &args.n_gen {
            let streams = args.streams.iter().map(|&streams| Test { generate, streams, ..base });
            let drafts = args.draft.iter().map(|draft| Test { generate, draft: Some(draft), ..base });
            list.extend(drafts.chain(streams.filter(|_| args.draft.is_empty())));
        }
    }
    list.retain(|t| t.tokens() > 0);
    list
}

fn load_args(args: &Args, threads: Option<usize>, sparse: Option<String>) -> LoadArgs {
    LoadArgs {
        threads,
        kv: args.kv,
        cache_type_k: None,
        cache_type_v: None,
        sparse,
        plan: None,
        memory: None,
        load_mode: LoadMode::Map,
        check_tensors: false,
        no_bitmaps: args.no_bitmaps,
        batch: args.batch,
        model_name: None,
    }
}

/// Bytes of the streaming probe: several times any last-level cache, little beside a model.
const PROBE_BYTES: usize = 512 << 20;

fn bench_model(args: &Args, name: Option<&str>, tests: &[Test<'_>], rows: &mut Vec<Row>) -> Result<()> {
    let probe = (!args.no_probe && tests.iter().any(|t| t.generate > 0)).then(|| StreamProbe::new(PROBE_BYTES));
    let stream = probe.as_ref();
    let place = Place::find(name)?;
    let checkpoint = place.open(&open::load_options(&load_args(args, None, None), None))?;
    let facts = Facts::of(&place, &checkpoint);
    let most = tests.iter().map(|t| t.depth + t.tokens()).max().unwrap_or(0);
    open::context(Some(most), &checkpoint.spec)?;
    let tokenizer = (!args.draft.is_empty()).then(|| open::tokenizer(&place, &checkpoint)).transpose()?;
    let model = Arc::new(checkpoint.bind()?);
    let threads = if args.threads.is_empty() { vec![None] } else { args.threads.iter().copied().map(Some).collect() };
    let plans = if args.sparse.is_empty() { vec!["dense".to_owned()] } else { args.sparse.clone() };
    for count in threads {
        let load = load_args(args, count, None);
        let (dense, packed) = sparse::with_bitmaps(&load, Engine::new(model.clone(), open::options(&load)?)?)?;
        let unplanned = packed.map_or("dense".to_owned(), |p| format!("dense {}", p.label()));
        for spec in &plans {
            let spec = Some(spec.clone()).filter(|s| s != "dense");
            let load = LoadArgs { model_name: name.map(str::to_owned), ..load_args(args, count, spec) };
            let (engine, plan) = match sparse::apply(&load, &place, &dense)? {
                Some(sparse) => (sparse.engine, sparse.label),
                None => (dense.clone(), unplanned.clone()),
            };
            for test in tests {
                let tokenizer = tokenizer.as_ref();
                let case = Case { args, facts: &facts, engine: &engine, plan: &plan, stream, tokenizer };
                let row = bench_test(&case, *test)?;
                if args.output == Output::Jsonl {
                    writeln!(stdout(), "{}", serde_json::to_string(&row)?)?;
                }
                rows.push(row);
            }
        }
    }
    Ok(())
}

struct Facts {
    file: String,
    kind: String,
    size: u64,
    params: u64,
}

impl Facts {
    fn of(place: &Place, checkpoint: &lacuna::model::Checkpoint) -> Self {
        let tensors = checkpoint.source.tensors.values();
        let size = tensors.clone().map(|t| t.loaded_bytes()).sum();
        let params = tensors.clone().map(|t| t.shape.iter().map(|n| *n as u64).product::<u64>()).sum();
        let mut by_format = BTreeMap::new();
        for t in tensors {
            *by_format.entry(t.format.name()).or_insert(0) += t.loaded_bytes();
        }
        let format = by_format.into_iter().max_by_key(|(_, n)| *n).map_or("-", |(f, _)| f);
        let file = place.path().map_or_else(|| place.label(), |p| p.display().to_string());
        Self { file, kind: format!("{} {} {format}", checkpoint.spec.arch, text::count(params)), size, params }
    }
}

/// What stays the same over the tests of one engine.
struct Case<'a> {
    args: &'a Args,
    facts: &'a Facts,
    engine: &'a Engine,
    plan: &'a str,
    stream: Option<&'a StreamProbe>,
    tokenizer: Option<&'a Tokenizer>,
}

/// What the repetitions of a test gave.
struct Measured {
    seconds: Vec<f64>,
    /// Bytes read per generated token.
    bytes: Option<f64>,
    kept: BTreeMap<String, f64>,
    stats: Option<DecodingStats>,
}

fn bench_test(case: &Case<'_>, test: Test<'_>) -> Result<Row> {
    let Case { args, facts, engine, .. } = case;
    let probe = || case.stream.filter(|_| test.generate > 0).map(|p| p.read(engine.pool()) / 1e9);
    let before = probe();
    let Measured { seconds, bytes, kept, stats } = match (test.draft, case.tokenizer) {
        (Some(draft), Some(tokenizer)) => guess(case, test, draft, tokenizer)?,
        _ => replay(case, test)?,
    };
    let stream = before.zip(probe()).map(|(a, b)| [a, b]);
    let speeds: Vec<f64> = seconds.iter().map(|s| (test.tokens() * test.streams) as f64 / s).collect();
    let nanos: Vec<f64> = seconds.iter().map(|s| s * 1e9).collect();
    let ((avg_ts, stddev_ts), (avg_ns, stddev_ns)) = (mean_sd(&speeds), mean_sd(&nanos));
    let gb_per_s = bytes.map(|b| b * avg_ts / 1e9);
    let kv = format!("{:?}", args.kv).to_lowercase();
    Ok(Row {
        model_filename: facts.file.clone(),
        model_type: facts.kind.clone(),
        model_size: facts.size,
        model_n_params: facts.params,
        backend: format!("CPU {}", isa::get()),
        n_threads: engine.threads(),
        n_batch: args.batch,
        type_k: kv.clone(),
        type_v: kv,
        n_prompt: test.prompt,
        n_gen: test.generate,
        n_depth: test.depth,
        n_streams: test.streams,
        draft: test.draft.map(|d| d.to_string()),
        test: test.name(),
        plan: case.plan.to_owned(),
        density: bytes.map(|b| b / dense_bytes(engine, test.depth, test.depth + test.generate)),
        kept,
        bytes_per_token: bytes,
        gb_per_s,
        stream_gb_per_s: stream,
        stream_share: stream.zip(gb_per_s).map(|([a, b], used)| used / ((a + b) / 2.0)),
        accepted_length: stats.map(|s| s.accepted_length()),
        effective_density: stats.map(|s| s.effective_density()),
        avg_ns: avg_ns as u64,
        stddev_ns: stddev_ns as u64,
        avg_ts,
        stddev_ts,
        samples_ns: nanos.iter().map(|n| *n as u64).collect(),
        samples_ts: speeds,
    })
}

/// Random tokens, given: prompts, or steps of one or more conversations.
fn replay(case: &Case<'_>, test: Test<'_>) -> Result<Measured> {
    let Case { args, engine, .. } = case;
    let mut rng = Rng::new(test.tokens() as u64);
    let vocab = engine.model().spec.vocab as u64;
    let mut random = |n: usize| (0..n).map(|_| (rng.next_u64() % vocab) as u32).collect::<Vec<_>>();
    let filling = random(test.depth);
    let mut sessions = Vec::new();
    let mut tokens = Vec::new();
    for _ in 0..test.streams {
        let mut session = engine.session(test.depth + test.tokens())?;
        if test.depth > 0 {
            session.prefill(&filling)?;
        }
        sessions.push(session);
        tokens.push(random(test.tokens()));
    }
    if !args.no_warmup {
        once(engine, &mut sessions, test, &tokens)?;
    }
    sessions.iter_mut().for_each(Session::reset_counters);
    let seconds =
        (0..args.repetitions).map(|_| once(engine, &mut sessions, test, &tokens)).collect::<Result<Vec<f64>>>()?;
    let read: u64 = sessions.iter().map(|s| s.counters().weight_bytes + s.counters().kv_bytes).sum();
    let decoded = args.repetitions * test.generate * test.streams;
    let bytes = (test.generate > 0).then(|| read as f64 / decoded as f64);
    let kept = sessions.first().map(|s| kept(s.counters()).into_iter().collect()).unwrap_or_default();
    Ok(Measured { seconds, bytes, kept, stats: None })
}

/// Runs the test from its depth on and returns the seconds.
fn once(engine: &Engine, sessions: &mut [Session], test: Test<'_>, tokens: &[Vec<u32>]) -> Result<f64> {
    sessions.iter_mut().for_each(|s| s.truncate(test.depth));
    let start = Instant::now();
    match sessions {
        [session] if test.prompt > 0 => drop(session.prefill(&tokens[0])?.len()),
        [session] => {
            for &token in &tokens[0] {
                session.decode(token)?;
            }
        }
        _ => {
            for i in 0..test.generate {
                let mut rows: Vec<_> = sessions.iter_mut().zip(tokens).map(|(s, t)| (s, t[i])).collect();
                engine.decode_batch(&mut rows)?;
            }
        }
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Greedy text behind the prompt, by `draft`.
fn guess(case: &Case<'_>, test: Test<'_>, draft: &Spec, tokenizer: &Tokenizer) -> Result<Measured> {
    let Case { args, engine, .. } = case;
    let prompt = tokenizer.encode(&args.draft_prompt, true)?;
    let mut session = engine.session(0)?;
    let most = session.context().saturating_sub(prompt.len());
    if test.generate > most {
        bail!("-n {}: only {most} positions are left behind the prompt", test.generate);
    }
    let mut stats = DecodingStats::default();
    let mut once = || -> Result<f64> {
        session.truncate(0);
        let mut decoder = draft.decoder(args.draft_max, !case.plan.starts_with("dense"))?;
        let mut sampler = Sampler::new(SamplerOptions::greedy())?;
        let mut last = sampler.sample(session.prefill(&prompt)?);
        let start = Instant::now();
        for _ in 0..test.generate {
            last = decoder.next(&mut session, last, &mut sampler, &|_| false)?;
        }
        stats = *decoder.stats();
        Ok(start.elapsed().as_secs_f64())
    };
    if !args.no_warmup {
        once()?;
    }
    let seconds = (0..args.repetitions).map(|_| once()).collect::<Result<Vec<f64>>>()?;
    let runs = args.repetitions + usize::from(!args.no_warmup);
    let counters = session.counters();
    let bytes = (counters.weight_bytes + counters.kv_bytes) as f64 / (runs * test.generate) as f64;
    let stats = Some(stats).filter(|s| s.passes > 0);
    Ok(Measured { seconds, bytes: Some(bytes), kept: kept(counters).into_iter().collect(), stats })
}

fn print_all(form: Output, rows: &[Row]) -> Result<()> {
    let mut out = stdout().lock();
    match form {
        Output::Jsonl => {}
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(rows)?)?,
        Output::Md => write!(out, "{}", markdown(rows))?,
        Output::Csv => {
            for (i, row) in rows.iter().enumerate() {
                let value = serde_json::to_value(row)?;
                let fields = value.as_object().into_iter().flatten();
                let (names, cells): (Vec<_>, Vec<_>) = fields.map(|(k, v)| (text::csv_field(k), cell(v))).unzip();
                if i == 0 {
                    writeln!(out, "{}", names.join(","))?;
                }
                writeln!(out, "{}", cells.join(","))?;
            }
        }
    }
    Ok(())
}

fn cell(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(s) => text::csv_field(s),
        serde_json::Value::Number(n) => n.to_string(),
        other => text::csv_field(&other.to_string()),
    }
}

fn markdown(rows: &[Row]) -> String {
    let mut table = Table::new(&[
        "model",
        "size:",
        "params:",
        "backend",
        "threads:",
        "plan",
        "density:",
        "test:",
        "per pass:",
        "t/s:",
        "MB/token:",
        "GB/s:",
        "of stream:",
    ]);
    for r in rows {
        table.row([
            r.model_type.clone(),
            text::bytes(r.model_size),
            text::count(r.model_n_params),
            r.backend.clone(),
            r.n_threads.to_string(),
            r.plan.clone(),
            text::or_dash(r.density.map(text::percent)),
            r.test.clone(),
            text::or_dash(r.accepted_length.map(|l| format!("{l:.2}"))),
            format!("{:.2} ± {:.2}", r.avg_ts, r.stddev_ts),
            text::or_dash(r.bytes_per_token.map(|b| format!("{:.2}", b / 1e6))),
            text::or_dash(r.gb_per_s.map(|g| format!("{g:.1}"))),
            text::or_dash(r.stream_share.map(text::percent)),
        ]);
    }
    table.to_string()
}
