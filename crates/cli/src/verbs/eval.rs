//! `lacuna eval`: perplexity, and divergence from a dense base, by llama.cpp's protocols.

use crate::{
    Outcome,
    args::LoadArgs,
    open::{self, Ready},
    table::Table,
    text,
};
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use lacuna::{
    eval::{
        Divergence, EngineSource, Perplexity, Protocol, Scoring, Window, divergence, expert_use, experts::CHUNKS,
        perplexity, windows,
    },
    tokenizer::{MAX_TEXT_BYTES, Tokenizer},
};
use serde_json::json;
use std::{
    fs,
    io::{IsTerminal, Write, stderr, stdout},
    path::{Path, PathBuf},
};

/// Arguments of `lacuna eval`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    measure: Measure,
}

#[derive(Subcommand)]
enum Measure {
    /// Perplexity with its error, and bits per byte.
    Ppl(Common),
    /// Kullback-Leibler divergence, top-1 agreement and change of perplexity against a dense base.
    Kld {
        #[command(flatten)]
        common: Common,
        /// The base; default: the same model, dense.
        #[arg(long, value_name = "MODEL", env = "LACUNA_BASE")]
        base: Option<String>,
    },
    /// How many experts a token uses, and how many several tokens use together (mixtures of experts, BlockFFN).
    Experts(Common),
}

#[derive(clap::Args)]
struct Common {
    /// The model; default: the embedded one.
    #[arg(short, long, env = "LACUNA_MODEL")]
    model: Option<String>,
    /// The text.
    #[arg(short, long, env = "LACUNA_FILE")]
    file: PathBuf,
    /// Tokens per window; the second half of each is scored.
    #[arg(short, long, default_value_t = 512, env = "LACUNA_CTX_SIZE")]
    ctx_size: usize,
    /// Windows at most.
    #[arg(long, env = "LACUNA_CHUNKS")]
    chunks: Option<usize>,
    /// Advance windows by this many tokens and score as many (llama.cpp's --ppl-stride).
    #[arg(long, env = "LACUNA_STRIDE")]
    stride: Option<usize>,
    /// Cut the text at lines that consist of this mark; each document is scored alone, behind BOS.
    #[arg(long, value_name = "MARK", conflicts_with = "stride", env = "LACUNA_DOCUMENTS")]
    documents: Option<String>,
    /// Under a plan, decode token by token as in use, instead of masked chunks (the same up to rounding, much faster).
    #[arg(long, env = "LACUNA_STEPS")]
    steps: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    load: LoadArgs,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    match args.measure {
        Measure::Ppl(common) => ppl(&common),
        Measure::Kld { common, base } => kld(&common, base.as_deref()),
        Measure::Experts(common) => experts(&common),
    }
}

fn ppl(args: &Common) -> Result<Outcome> {
    let ready = open::ready_alone(args.model.as_deref(), Some(args.ctx_size), &args.load)?;
    let tokenizer = ready.tokenizer()?;
    let windows = windows_of(args, tokenizer)?;
    let scoring = scoring(args, &ready);
    let mut source = EngineSource::new(&ready.engine, longest(&windows), scoring)?;
    let mut line = Running::new();
    let result = perplexity(&mut source, &windows, Some(tokenizer.pieces()), |p| {
        line.show(p.done, p.total, p.so_far.ppl().0);
    })?;
    line.end();
    let mut out = stdout().lock();
    if args.json {
        let mut value = ppl_json(&result);
        value["plan"] = json!(ready.label());
        value["scoring"] = json!(scoring.describe());
        writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
    } else {
        writeln!(out, "plan           {}", ready.label())?;
        writeln!(out, "scored         {}", scoring.describe())?;
        ppl_lines(&mut out, "", &result)?;
    }
    ready.log_memory();
    Ok(Outcome::Good)
}

fn kld(args: &Common, base: Option<&str>) -> Result<Outcome> {
    let ready = open::ready(args.model.as_deref(), Some(args.ctx_size), &args.load)?;
    if base.is_none() && ready.plan.is_none() {
        bail!("nothing to compare: give --base MODEL, or --sparse or --plan to compare with the same model dense");
    }
    let other: Option<Ready> = match base {
        Some(name) => {
            let dense = LoadArgs { sparse: None, plan: None, ..args.load.clone() };
            Some(open::ready_alone(Some(name), Some(args.ctx_size), &dense)?)
        }
        None => None,
    };
    let base_engine = other.as_ref().map_or(&ready.dense, |o| &o.engine);
    let tokenizer = ready.tokenizer()?;
    let windows = windows_of(args, tokenizer)?;
    let most = longest(&windows);
    let scoring = scoring(args, &ready);
    let (mut base, mut test) = (
        // The base goes the same way, so that against the same model the plan makes the whole difference.
        EngineSource::new(base_engine, most, if scoring == Scoring::Steps { scoring } else { Scoring::Dense })?,
        EngineSource::new(&ready.engine, most, scoring)?,
    );
    let mut line = Running::new();
    let result = divergence(&mut base, &mut test, &windows, Some(tokenizer.pieces()), |p| {
        line.show(p.done, p.total, p.so_far.kld().value);
    })?;
    line.end();
    let mut out = stdout().lock();
    if args.json {
        let mut value = kld_json(&result);
        value["plan"] = json!(ready.label());
        value["scoring"] = json!(scoring.describe());
        writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
    } else {
        writeln!(out, "plan           {}", ready.label())?;
        writeln!(out, "scored         {}", scoring.describe())?;
        kld_lines(&mut out, &result)?;
    }
    Ok(Outcome::Good)
}

/// Shares of experts that stay unused, by the number of tokens that are looked at together.
fn experts(args: &Common) -> Result<Outcome> {
    let ready = open::ready_alone(args.model.as_deref(), Some(args.ctx_size), &args.load)?;
    let windows = windows_of(args, ready.tokenizer()?)?;
    let terminal = stderr().is_terminal();
    let used = expert_use(&ready.dense, &windows, |done, total| {
        if terminal {
            eprint!("\r[{done}/{total}] ");
        }
    })?;
    if terminal {
        eprintln!();
    }
    let layers: Vec<usize> = (0..ready.dense.model().spec.blocks.len()).filter(|l| used.experts(*l) > 0).collect();
    let mut out = stdout().lock();
    if args.json {
        let of =
            |layer: Option<usize>| CHUNKS.iter().enumerate().map(|(c, _)| used.sparsity(c, layer)).collect::<Vec<_>>();
        let rows: Vec<_> =
            layers.iter().map(|l| json!({"layer": l, "experts": used.experts(*l), "unused": of(Some(*l))})).collect();
        let value = json!({"tokens": used.tokens(), "chunks": CHUNKS, "unused": of(None), "layers": rows});
        writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
        return Ok(Outcome::Good);
    }
    let chunks = CHUNKS.iter().map(|n| if *n == 1 { "1 token:".into() } else { format!("{n} tokens:") });
    let head: Vec<String> = ["layer:".into(), "experts:".into()].into_iter().chain(chunks).collect();
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    let shares = |layer: Option<usize>| {
        (0..CHUNKS.len()).map(|c| text::or_dash(used.sparsity(c, layer).map(text::percent))).collect::<Vec<_>>()
    };
    for l in &layers {
        table.row([l.to_string(), used.experts(*l).to_string()].into_iter().chain(shares(Some(*l))));
    }
    table.row(["all".into(), String::new()].into_iter().chain(shares(None)));
    writeln!(out, "experts that stay unused by a token (TLS) and by several together (CLS); {} tokens", used.tokens())?;
    write!(out, "{table}")?;
    Ok(Outcome::Good)
}

/// How the model is scored: dense, or under its plan.
fn scoring(args: &Common, ready: &Ready) -> Scoring {
    match (&ready.plan, args.steps) {
        (None, _) => Scoring::Dense,
        (Some(_), true) => Scoring::Steps,
        (Some(_), false) => Scoring::Masked,
    }
}

fn windows_of(args: &Common, tokenizer: &Tokenizer) -> Result<Vec<Window>> {
    let text = read_text(&args.file)?;
    if let Some(mark) = &args.documents {
        let parts = windows::split_documents(&text, mark);
        let encoded = parts.iter().map(|p| Ok(tokenizer.encode(p, true)?)).collect::<Result<Vec<_>>>()?;
        let mut list = windows::documents(encoded, args.ctx_size);
        list.truncate(args.chunks.unwrap_or(list.len()));
        if list.is_empty() {
            bail!("{}: no document with at least two tokens", args.file.display());
        }
        return Ok(list);
    }
    let protocol = match args.stride {
        Some(stride) => Protocol::Stride { context: args.ctx_size, stride },
        None => Protocol::Chunks { context: args.ctx_size },
    };
    let tokens = tokenizer.encode(&text, true)?;
    let bos = tokenizer.special().bos.filter(|b| tokens.first() == Some(b));
    Ok(windows::cut(&tokens, protocol, bos, args.chunks)?)
}

/// A text file, not larger than a tokenizer takes.
///
/// # Errors
/// Not there, too large, or not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let name = || path.display().to_string();
    let size = fs::metadata(path).with_context(name)?.len();
    if size > MAX_TEXT_BYTES as u64 {
        let most = text::bytes(MAX_TEXT_BYTES as u64);
        bail!("{}: {} are more than the {most} taken at once; cut the file", name(), text::bytes(size));
    }
    fs::read_to_string(path).with_context(name)
}

fn longest(windows: &[Window]) -> usize {
    windows.iter().map(|w| w.tokens.len()).max().unwrap_or(0)
}

/// The running value: one line that is written over on a terminal, one line per window elsewhere.
struct Running {
    terminal: bool,
}

impl Running {
    fn new() -> Self {
        Self { terminal: stderr().is_terminal() }
    }

    fn show(&mut self, done: usize, total: usize, value: f64) {
        if self.terminal {
            eprint!("\r[{done}/{total}] {value:.4} ");
        } else {
            eprintln!("[{done}/{total}] {value:.4}");
        }
    }

    fn end(&self) {
        if self.terminal {
            eprintln!();
        }
    }
}

fn ppl_lines(out: &mut impl Write, of: &str, p: &Perplexity) -> Result<()> {
    let (ppl, error) = p.ppl();
    writeln!(out, "perplexity{of:<5}{ppl:.4} ± {error:.4}")?;
    if let Some(bits) = p.bits_per_byte() {
        writeln!(out, "bits/byte{of:<6}{bits:.4}")?;
    }
    writeln!(out, "tokens{of:<9}{} scored", p.count)?;
    Ok(())
}

fn ppl_json(p: &Perplexity) -> serde_json::Value {
    let (ppl, error) = p.ppl();
    json!({"ppl": ppl, "ppl_error": error, "bits_per_byte": p.bits_per_byte(), "tokens": p.count, "bytes": p.bytes})
}

fn kld_lines(out: &mut impl Write, d: &Divergence) -> Result<()> {
    ppl_lines(out, "", &d.test)?;
    let (base, error) = d.base.ppl();
    writeln!(out, "base           {base:.4} ± {error:.4}")?;
    let ratio = d.ppl_ratio();
    writeln!(out, "ratio          {:.6} ± {:.6}", ratio.value, ratio.error)?;
    let kld = d.kld();
    writeln!(out, "KL mean        {:.6} ± {:.6}", kld.value, kld.error)?;
    for (name, q) in [("median", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("max", 1.0)] {
        writeln!(out, "KL {name:<12}{:.6}", d.kld_quantile(q))?;
    }
    let rms = d.delta_p_rms();
    writeln!(out, "RMS of dp      {:.3} ± {:.3} %", 100.0 * rms.value, 100.0 * rms.error)?;
    let top = d.same_top();
    writeln!(out, "same top-1     {:.3} ± {:.3} %", 100.0 * top.value, 100.0 * top.error)?;
    Ok(())
}

fn kld_json(d: &Divergence) -> serde_json::Value {
    let (ratio, kld, top, rms) = (d.ppl_ratio(), d.kld(), d.same_top(), d.delta_p_rms());
    json!({
        "test": ppl_json(&d.test),
        "base": ppl_json(&d.base),
        "ppl_ratio": ratio.value,
        "ppl_ratio_error": ratio.error,
        "kld_mean": kld.value,
        "kld_mean_error": kld.error,
        "kld_median": d.kld_quantile(0.5),
        "kld_p90": d.kld_quantile(0.9),
        "kld_p99": d.kld_quantile(0.99),
        "kld_max": d.kld_quantile(1.0),
        "delta_p_rms": rms.value,
        "same_top": top.value,
        "same_top_error": top.error,
        "tokens": d.count(),
    })
}
