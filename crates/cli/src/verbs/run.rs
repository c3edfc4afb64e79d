//! `lacuna run`: continue a prompt.

use crate::{
    Outcome,
    args::{LoadArgs, SamplingArgs},
    decoding::{self, DecodingArgs},
    open::{self, Ready},
    text,
};
use anyhow::{Context, Result, bail};
use lacuna::engine::{
    Counters, Engine, Session,
    generate::{Finish, Flow, Generated, Limits, generate_with},
    sampler::Sampler,
};
use lacuna_core::site::Proj;
use std::{
    fs,
    io::{self, IsTerminal, Read, Write, stderr, stdin, stdout},
    path::PathBuf,
};

/// Arguments of `lacuna run`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face directory, a GGUF file, or a name in the local hub cache; default: the embedded model.
    #[arg(value_name = "MODEL")]
    place: Option<String>,
    /// The prompt, after the model.
    #[arg(value_name = "PROMPT", conflicts_with_all = ["prompt", "file"])]
    words: Option<String>,
    /// The model, as a flag; then the first plain word is the prompt.
    #[arg(short, long, env = "LACUNA_MODEL")]
    model: Option<String>,
    /// The prompt.
    #[arg(short, long, env = "LACUNA_PROMPT", conflicts_with = "file")]
    prompt: Option<String>,
    /// A file that holds the prompt; `-` is the standard input.
    #[arg(short, long, env = "LACUNA_FILE")]
    file: Option<PathBuf>,
    /// Tokens to generate; -1: until the model ends or the context is full.
    #[arg(short = 'n', long = "predict", default_value_t = 128, allow_negative_numbers = true, env = "LACUNA_PREDICT")]
    predict: i64,
    /// Context in tokens; 0: the model's own. Default: the model's own, at most 4096.
    #[arg(short, long, env = "LACUNA_CTX_SIZE")]
    ctx_size: Option<usize>,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    decoding: DecodingArgs,
}

/// Runs the verb.
pub fn run(mut args: Args) -> Result<Outcome> {
    if args.model.is_some() {
        if args.words.is_some() {
            bail!("two models: `-m` and a plain word; with `-m` the plain word is the prompt");
        }
        args.words = args.place.take();
    }
    let model = args.model.as_deref().or(args.place.as_deref());
    let prompt = prompt(&args)?;
    let mut sampler = Sampler::new(args.sampling.options())?;
    let ready = open::ready_alone(model, args.ctx_size, &args.load)?;
    let tokenizer = ready.tokenizer()?;
    let tokens = tokenizer.encode(&prompt, true)?;
    if tokens.is_empty() {
        bail!("the prompt is empty and this model has no token that begins a text; give one with -p");
    }
    let mut session = ready.session()?;
    let limits = Limits {
        max_tokens: usize::try_from(args.predict).unwrap_or(usize::MAX),
        stop: args.sampling.stop.clone(),
        ignore_eos: args.sampling.ignore_eos,
    };
    let mut decoder = args.decoding.decoder(ready.plan.is_some(), ready.decoding.as_ref())?;
    let mut printer = Printer::default();
    printer.show(&prompt);
    let show = &mut |t: &str| printer.show(t);
    let out = generate_with(&mut decoder, &mut session, tokenizer, &tokens, &mut sampler, &limits, show)?;
    printer.end()?;
    report(&ready, &session, &out)?;
    ready.log_memory();
    if let Some(line) = decoding::report(decoder.stats()) {
        eprintln!("{line}");
    }
    Ok(Outcome::Good)
}

fn prompt(args: &Args) -> Result<String> {
    if let Some(path) = &args.file {
        if path.as_os_str() == "-" {
            return io::read_to_string(stdin()).context("reading the prompt from the standard input");
        }
        let limit = lacuna::tokenizer::MAX_TEXT_BYTES as u64;
        let mut text = String::new();
        let file = fs::File::open(path).with_context(|| format!("{}", path.display()))?;
        file.take(limit + 1).read_to_string(&mut text).with_context(|| format!("{}", path.display()))?;
        return Ok(text);
    }
    Ok(args.prompt.clone().or(args.words.clone()).unwrap_or_default())
}

/// Writes pieces of text to stdout at once, and remembers if nobody reads it any more.
#[derive(Default)]
pub struct Printer {
    failed: Option<io::Error>,
}

impl Printer {
    /// Shows `text`.
    pub fn show(&mut self, text: &str) -> Flow {
        let mut out = stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => Flow::Continue,
            Err(e) => {
                self.failed = Some(e);
                Flow::Stop
            }
        }
    }

    /// Ends the line.
    ///
    /// # Errors
    /// What went wrong while writing.
    pub fn end(self) -> io::Result<()> {
        match self.failed {
            Some(e) => Err(e),
            None => writeln!(stdout()),
        }
    }
}

/// The closing lines on stderr: speeds, bytes, what was kept.
pub fn report(ready: &Ready, session: &Session, out: &Generated) -> io::Result<()> {
    let mut err = stderr().lock();
    if stderr().is_terminal() {
        writeln!(err)?;
    }
    let prefill = out.prompt_tokens as f64 / out.prefill.as_secs_f64().max(1e-9);
    let end = match out.finish {
        Finish::Stop => "the model ended",
        Finish::Length => "-n reached",
        Finish::Context => "the context is full (raise -c)",
        Finish::Cancelled => "stopped",
    };
    writeln!(
        err,
        "prompt {} tokens, {prefill:.1} t/s; generated {} tokens, {:.1} t/s ({end})",
        out.prompt_tokens,
        out.tokens.len(),
        out.tokens_per_second(),
    )?;
    let counters = session.counters();
    let decoded = out.tokens.len().saturating_sub(1);
    if counters.steps > 0 && decoded > 0 {
        let read = (counters.weight_bytes + counters.kv_bytes) as f64 / decoded as f64;
        write!(err, "read {} per token", text::bytes(read as u64))?;
        if ready.plan.is_some() || ready.engine.has_bitmaps() {
            let begin = session.len().saturating_sub(decoded);
            let dense = dense_bytes(&ready.dense, begin, session.len());
            write!(err, ", {} of dense", text::percent(read / dense))?;
        }
        writeln!(err)?;
        let kept = kept(counters);
        if !kept.is_empty() {
            let parts: Vec<_> = kept.iter().map(|(site, share)| format!("{site} {}", text::percent(*share))).collect();
            writeln!(err, "kept {}", parts.join(", "))?;
        }
    }
    Ok(())
}

/// Bytes that the dense engine reads per decoded token on average, from a context of `begin` tokens to one of `end`.
pub fn dense_bytes(dense: &Engine, begin: usize, end: usize) -> f64 {
    (dense.bytes_per_token(begin + 1) + dense.bytes_per_token(end)) as f64 / 2.0
}

/// Share that stayed, per place where something was skipped.
pub fn kept(counters: &Counters) -> Vec<(String, f64)> {
    let inputs = Proj::ALL.into_iter().map(|p| (format!("{p} inputs"), counters.input(p)));
    let all = inputs.chain([("mlp neurons".to_owned(), counters.neurons())]);
    all.filter(|(_, c)| c.total > 0).map(|(site, c)| (site, c.share())).collect()
}
