//! `lacuna compress`: prune and quantise a model into a smaller one.

use super::eval::read_text;
use crate::report::layers::{Facts, page};
use crate::{
    Outcome,
    open::{self, Place},
    table::Table,
    text::{self, parse_bytes},
};
use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use lacuna::{
    calibrate,
    compress::{self, Calibration, DEFAULT_TOKENS, Goal, LayerReport, Progress, Report, Request, soup},
    model::LoadOptions,
};
use lacuna_core::{
    atomic::write_atomically,
    compress::Sight,
    hash::sha256,
    recipe::{Recipe, Step, parse_short, pattern},
};
use lacuna_methods::{
    registry::{self, Resolved},
    weights::ratios::Ratios,
};
use std::{
    io::{IsTerminal, Write, stderr, stdout},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Arguments of `lacuna compress`.
#[derive(clap::Args)]
pub struct Args {
    /// The model: a Hugging Face directory, a GGUF file or org/name; default: that of the recipe.
    #[arg(value_name = "MODEL")]
    place: Option<String>,
    /// The model, as a flag.
    #[arg(short, long, env = "LACUNA_MODEL", conflicts_with = "place")]
    model: Option<String>,
    /// The method (see `lacuna methods`), or several, one after the other: `wanda,gptq`.
    #[arg(long, value_name = "NAMES", env = "LACUNA_METHOD", required_unless_present_any = ["recipe", "soup", "gguf"])]
    method: Option<String>,
    /// Share of the weights to drop.
    #[arg(long, value_name = "SHARE", env = "LACUNA_SPARSITY")]
    sparsity: Option<f64>,
    /// Where zeros lie: `unstructured`, or N:M such as `2:4`.
    #[arg(long, env = "LACUNA_PATTERN")]
    pattern: Option<String>,
    /// Round to codes of this many bits.
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=8), env = "LACUNA_BITS")]
    bits: Option<u32>,
    /// Columns that share a scale, 0: whole rows; default: the largest of 128, 64, 32 that divides all rows.
    #[arg(long, env = "LACUNA_GROUP")]
    group: Option<u32>,
    /// How the share is spread over layers: uniform, erk, lamp, global, loss (by measured errors), angular (by how far blocks turn
    /// their input) or ecoflap (by how much the loss depends on them).
    #[arg(long, env = "LACUNA_RATIOS")]
    ratios: Option<String>,
    /// The smallest error in this many bytes of weights: bits per matrix are searched, for methods that round.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, conflicts_with = "max_kl", env = "LACUNA_TARGET_BYTES")]
    target_bytes: Option<u64>,
    /// As small as the divergence from the model allows, measured on an eighth of the text that is held out: bits per matrix
    /// are searched for methods that round, the share for others.
    #[arg(long, value_name = "NATS", env = "LACUNA_MAX_KL")]
    max_kl: Option<f64>,
    /// A recipe in TOML: model, text, ratios and methods with all their parameters.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["method", "sparsity", "pattern", "bits", "group"], env = "LACUNA_RECIPE")]
    recipe: Option<PathBuf>,
    /// Instead of compressing: the mean of several outputs with the same zeros (directories).
    #[arg(
        long,
        value_name = "A,B,...",
        value_delimiter = ',',
        conflicts_with_all = ["method", "recipe", "sparsity", "pattern", "bits", "group", "ratios", "target_bytes", "max_kl", "place", "model", "file", "lock", "report"]
    )]
    soup: Vec<PathBuf>,
    /// The calibration text; default: that of the recipe.
    #[arg(short, long, env = "LACUNA_FILE")]
    file: Option<PathBuf>,
    /// Tokens to observe.
    #[arg(short = 'n', long, env = "LACUNA_TOKENS")]
    tokens: Option<usize>,
    /// Decides which parts of a longer text are observed, and what is drawn.
    #[arg(short, long, env = "LACUNA_SEED")]
    seed: Option<u64>,
    /// Where the result goes: a directory, or a file that ends in .gguf for a model that is one.
    #[arg(short, long, value_name = "OUT", env = "LACUNA_OUTPUT")]
    output: PathBuf,
    /// Write a GGUF file of a Hugging Face model (end OUT in .gguf); without a method, the model as it is.
    #[arg(long, env = "LACUNA_GGUF")]
    gguf: bool,
    /// A page with the errors and bytes of every layer (ends in .html).
    #[arg(long, value_name = "FILE", env = "LACUNA_REPORT")]
    report: Option<PathBuf>,
    /// The run must follow from the same model, text and methods as this lacuna.lock.json says.
    #[arg(long, value_name = "FILE", env = "LACUNA_LOCK")]
    lock: Option<PathBuf>,
    /// Threads; default: all cores.
    #[arg(short, long, env = "LACUNA_THREADS")]
    threads: Option<usize>,
    /// Residual streams of the text that take more than this are kept in a file.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "2G", env = "LACUNA_STREAMS_IN_MEMORY")]
    streams_in_memory: u64,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    let start = Instant::now();
    if !args.soup.is_empty() {
        return stir(&args);
    }
    let recipe = match &args.recipe {
        Some(path) => Some(Recipe::parse(&read_text(path)?, &path.display().to_string())?),
        None => None,
    };
    let base = recipe.as_ref().and_then(|r| r.base.clone());
    let name = args.model.clone().or(args.place.clone()).or(base);
    let place = Place::find(name.as_deref())?;
    let Some(model) = place.path() else {
        bail!("which model? The one inside the program is no file; name a directory, a GGUF file or org/name")
    };
    if args.method.is_none() && recipe.is_none() {
        return convert(&args, model, start);
    }
    let steps = steps(&args, recipe.as_ref(), &place)?;
    let ratios = args.ratios.as_ref().or(recipe.as_ref().and_then(|r| r.ratios.as_ref()));
    let ratios = ratios.map_or(Ok(Ratios::Uniform), |r| Ratios::parse(r)).map_err(|e| anyhow!(e))?;
    let measures = args.target_bytes.is_some() || args.max_kl.is_some() || ratios.runs_model();
    let mut calibration = calibration(&args, recipe.as_ref(), &place, &steps, measures)?;
    let request = Request {
        model: model.to_path_buf(),
        output: args.output.clone(),
        gguf: args.gguf,
        ratios,
        goal: goal(&args, &mut calibration)?,
        lock: args.lock.clone(),
        calibration,
        steps,
        seed: seed(&args, recipe.as_ref()),
        threads: args.threads.unwrap_or(0),
        streams_in_memory: args.streams_in_memory,
    };
    let bar = bar();
    let mut out = stdout().lock();
    writeln!(out, "{}", Header)?;
    let mut failed = None;
    let report = compress::compress(&request, &mut |p| match p {
        Progress::Block(done, all) => {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        }
        Progress::Measured(done, all) => {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        }
        Progress::Tried(setting, kl) => {
            bar.suspend(|| eprintln!("tried: {setting}, KL {kl:.4}"));
        }
        Progress::Layer(layer) if args.max_kl.is_none() => {
            let line = bar.suspend(|| writeln!(out, "{}", Line(layer)));
            failed = line.err().or(failed.take());
        }
        Progress::Layer(_) => {}
    })?;
    if args.max_kl.is_some() {
        // Those of the trials were not told.
        report.layers.iter().try_for_each(|l| writeln!(out, "{}", Line(l)))?;
    }
    bar.finish_and_clear();
    if let Some(e) = failed {
        return Err(e.into());
    }
    if let Some(kl) = report.divergence {
        eprintln!("note: KL {kl:.4} on the held-out part of the text");
    }
    report.notes.iter().for_each(|n| eprintln!("note: {n}"));
    if let Some(path) = &args.report {
        write_page(&report, &request, path, start)?;
    }
    write!(out, "{}", summary(&report, start))?;
    writeln!(out, "{}", args.output.display())?;
    Ok(Outcome::Good)
}

/// Averages several outputs.
fn stir(args: &Args) -> Result<Outcome> {
    let report = soup(&args.soup, &args.output)?;
    let mut out = stdout().lock();
    writeln!(
        out,
        "the mean of {} models: {} tensors, {} bytes; {} have a mask, with {} zeros",
        args.soup.len(),
        report.tensors,
        report.bytes,
        report.masked,
        text::percent(report.zeros)
    )?;
    writeln!(out, "{}", args.output.display())?;
    Ok(Outcome::Good)
}

/// `--gguf` alone: the model as a GGUF file.
fn convert(args: &Args, model: &Path, start: Instant) -> Result<Outcome> {
    let other = [
        ("--sparsity", args.sparsity.is_some()),
        ("--pattern", args.pattern.is_some()),
        ("--bits", args.bits.is_some()),
        ("--group", args.group.is_some()),
        ("--target-bytes", args.target_bytes.is_some()),
        ("--max-kl", args.max_kl.is_some()),
    ];
    if let Some((flag, _)) = other.iter().find(|(_, given)| *given) {
        bail!("{flag} needs a method: give --method NAME beside --gguf");
    }
    let (bytes, notes) = compress::convert(model, &args.output)?;
    notes.iter().for_each(|n| eprintln!("note: {n}"));
    let mut out = stdout().lock();
    writeln!(out, "{} of weights in {:.1} s", text::bytes(bytes), start.elapsed().as_secs_f64())?;
    writeln!(out, "{}", args.output.display())?;
    Ok(Outcome::Good)
}

/// Writes the page of errors and bytes.
fn write_page(report: &Report, request: &Request, path: &Path, start: Instant) -> Result<()> {
    let model = request.model.file_name().unwrap_or_default().to_string_lossy();
    let labels: Vec<String> = request.steps.iter().map(Resolved::label).collect();
    let facts = Facts { model: &model, methods: &labels.join(", "), seconds: start.elapsed().as_secs_f64() };
    let page = page(report, &facts);
    write_atomically(path, Some(page.len() as u64), |out| out.write_all(page.as_bytes()))
        .with_context(|| format!("{}", path.display()))
}

fn seed(args: &Args, recipe: Option<&Recipe>) -> u64 {
    args.seed.or(recipe.and_then(|r| r.calibration.as_ref()).map(|c| c.seed)).unwrap_or(0)
}

/// The methods that the recipe or the flags name.
fn steps(args: &Args, recipe: Option<&Recipe>, place: &Place) -> Result<Vec<Resolved>> {
    let mut steps = match (recipe, &args.method) {
        (Some(recipe), _) => recipe.steps.clone(),
        (None, Some(names)) => parse_short(names)?,
        (None, None) => bail!("which method? Give --method sparsegpt --sparsity 0.5, or --recipe FILE"),
    };
    let mut given: Vec<(&str, String, f64)> = Vec::new();
    given.extend(args.sparsity.map(|s| ("--sparsity", "sparsity".into(), s)));
    given.extend(args.bits.map(|b| ("--bits", "bits".into(), f64::from(b))));
    given.extend(args.group.map(|g| ("--group", "group".into(), f64::from(g))));
    if let Some(text) = &args.pattern {
        let both = pattern(text).map_err(|e| anyhow!("--pattern: {e}"))?;
        given.extend(both.into_iter().map(|(name, value)| ("--pattern", name, value)));
    }
    for (flag, name, value) in &given {
        let mut taken = false;
        for step in &mut steps {
            if takes(step, name)? {
                step.params.push((name.clone(), *value));
                taken = true;
            }
        }
        if !taken {
            let able: Vec<_> = registry::METHODS
                .iter()
                .filter(|m| m.compressor().is_some() && m.params().iter().any(|p| p.name == name))
                .map(|m| m.name())
                .collect();
            bail!("{flag}: no method here takes it; those that do are {} (--method NAME,NAME)", able.join(", "));
        }
    }
    if let Some(group) = default_group(place, &steps)? {
        for step in &mut steps {
            if takes(step, "group")? && !step.params.iter().any(|p| p.0 == "group") {
                step.params.push(("group".into(), group));
            }
        }
    }
    Ok(steps.iter().map(registry::resolve).collect::<Result<_, _>>()?)
}

fn takes(step: &Step, name: &str) -> Result<bool> {
    Ok(registry::find(&step.method)?.params().iter().any(|p| p.name == name))
}

/// The largest usual group that divides the rows of all layers, where a step rounds; whole rows where none does.
fn default_group(place: &Place, steps: &[Step]) -> Result<Option<f64>> {
    let mut rounds = false;
    for step in steps {
        rounds |= takes(step, "group")?;
    }
    if !rounds {
        return Ok(None);
    }
    let spec = place.open(&LoadOptions::default())?.spec;
    let shapes = calibrate::layer_shapes(&spec);
    let widths: Vec<usize> =
        shapes.iter().flat_map(|s| [Some(s.width), Some(s.query), s.mlp.as_ref().map(|m| m.inner)]).flatten().collect();
    let group = [128, 64, 32].into_iter().find(|g| widths.iter().all(|w| w.is_multiple_of(*g)));
    Ok(Some(group.unwrap_or(0) as f64))
}

/// What is searched for; for a divergence, every eighth window of the text is held out.
fn goal(args: &Args, text: &mut Option<Calibration>) -> Result<Option<Goal>> {
    if let Some(bytes) = args.target_bytes {
        return Ok(Some(Goal::Bytes(bytes)));
    }
    let Some(most) = args.max_kl else { return Ok(None) };
    let Some(text) = text else { bail!("--max-kl measures on a text; give one (-f FILE)") };
    let (mut held_out, mut observed) = (Vec::new(), Vec::new());
    let all = text.windows.len();
    for (i, window) in std::mem::take(&mut text.windows).into_iter().enumerate() {
        if i % 8 == 7 || (all < 8 && i + 1 == all) { held_out.push(window) } else { observed.push(window) }
    }
    if observed.is_empty() {
        bail!(
            "--max-kl: the text has a single window of tokens, none can be held out; give a longer text, or more --tokens"
        );
    }
    text.windows = observed;
    Ok(Some(Goal::Divergence { most, held_out }))
}

/// The windows of the calibration text; none where no text is given, or where nothing looks at one.
fn calibration(
    args: &Args,
    recipe: Option<&Recipe>,
    place: &Place,
    steps: &[Resolved],
    measures: bool,
) -> Result<Option<Calibration>> {
    let of_recipe = recipe.and_then(|r| r.calibration.as_ref());
    let Some(file) = args.file.as_ref().or(of_recipe.map(|c| &c.file)) else { return Ok(None) };
    let blind = steps.iter().all(|s| s.method.compressor().is_none_or(|c| c.sight(&s.params) == Sight::Nothing));
    if blind && !measures {
        eprintln!("note: these methods look at weights alone; {} is not read", file.display());
        return Ok(None);
    }
    let checkpoint = place.open(&LoadOptions::default())?;
    let tokenizer = open::tokenizer(place, &checkpoint)?;
    let content = read_text(file)?;
    let tokens = tokenizer.encode(&content, true)?;
    let wanted = args.tokens.or(of_recipe.and_then(|c| c.tokens)).unwrap_or(DEFAULT_TOKENS);
    let bos = tokenizer.special().bos.filter(|b| tokens.first() == Some(b));
    let windows = calibrate::windows(&tokens, checkpoint.spec.context, wanted, seed(args, recipe), bos);
    if windows.is_empty() {
        bail!("{}: no text in it", file.display());
    }
    Ok(Some(Calibration { windows, sha256: sha256(content.as_bytes()), available: tokens.len() }))
}

fn bar() -> ProgressBar {
    let bar = if stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("blocks {wide_bar} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar
}

/// Titles of the lines that tell each finished layer.
struct Header;

impl std::fmt::Display for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:<22} {:>13} {:>4} {:>8} {:>12} {:>12}",
            "layer", "shape", "bits", "zeros", "weight error", "output error"
        )
    }
}

/// One finished layer.
struct Line<'a>(&'a LayerReport);

impl std::fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let l = self.0;
        let bits = l.bits.map_or("-".into(), |b| b.to_string());
        let zeros = l.zeros as f64 / (l.outputs * l.inputs).max(1) as f64;
        let output = l.output_error.map_or("-".into(), |e| format!("{e:.5}"));
        let (name, shape) = (format!("layers.{}.{}", l.layer, l.proj), format!("{}x{}", l.outputs, l.inputs));
        write!(f, "{name:<22} {shape:>13} {bits:>4} {:>8} {:>12.5} {output:>12}", text::percent(zeros), l.weight_error)
    }
}

fn seconds(time: Duration) -> String {
    if time.is_zero() { "-".into() } else { format!("{:.1} s", time.as_secs_f64()) }
}

fn summary(report: &Report, start: Instant) -> Table {
    let mut table = Table::new(&["layers", "dropped:", "weights before:", "after:", "time:", "observing:", "solving:"]);
    table.row([
        report.layers.len().to_string(),
        text::percent(report.sparsity()),
        text::bytes(report.bytes.0),
        text::bytes(report.bytes.1),
        seconds(start.elapsed()),
        seconds(report.spent.observing),
        seconds(report.spent.solving),
    ]);
    table
}
