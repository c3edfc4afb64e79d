//! `lacuna compare`: plans side by side on one model, quality against cost.

mod draft;
mod plans;
mod progress;
mod subject;

use crate::{
    Outcome,
    args::Kv,
    report::{self, Form},
};
use anyhow::{Context, Result, bail};
use draft::{draft, load};
use lacuna::compare::{self, Event, Setup, notes, report::Report};
use lacuna_kernels::probe::StreamProbe;
use plans::{plans, requests};
use progress::{Bar, Store};
use std::{
    fs,
    io::{Write, stdout},
    path::{Path, PathBuf},
};
use subject::{Subject, Texts};

/// Arguments of `lacuna compare`.
#[derive(clap::Args)]
pub struct Args {
    /// The model; default: the embedded one.
    #[arg(value_name = "MODEL")]
    place: Option<String>,
    /// The model, as a flag.
    #[arg(short, long, env = "LACUNA_MODEL", conflicts_with = "place")]
    model: Option<String>,
    /// Plans (comma-separated or repeated): files of `calibrate`, or short forms, with `+` between methods.
    #[arg(long, value_name = "PLAN", value_delimiter = ',', env = "LACUNA_PLANS")]
    plans: Vec<String>,
    /// Methods, as for `run` (`relu,teal=0.4`); may be given several times.
    #[arg(long, value_name = "SPEC", env = "LACUNA_SPARSE")]
    sparse: Vec<String>,
    /// Methods over a range of their first parameter; 5 steps where none are given; may be given several times.
    #[arg(long, value_name = "NAME[,NAME...]=LO..HI[:STEPS]", env = "LACUNA_SWEEP")]
    sweep: Vec<String>,
    /// The text: its end is scored, its beginning calibrates.
    #[arg(short, long, env = "LACUNA_FILE", required_unless_present = "from")]
    file: Option<PathBuf>,
    /// Measure nothing: show a stored report (.json) in the forms of -o.
    #[arg(long, value_name = "REPORT", env = "LACUNA_FROM", conflicts_with_all = ["file", "plans", "sparse", "sweep"])]
    from: Option<PathBuf>,
    /// Another text to calibrate on; then all of -f may be scored.
    #[arg(long, value_name = "FILE", env = "LACUNA_CALIBRATION")]
    calibration: Option<PathBuf>,
    /// Tokens to score.
    #[arg(long, default_value_t = 8192, env = "LACUNA_TOKENS")]
    tokens: usize,
    /// Lines that part documents; default: lines like `<|endoftext|>`, if the text has them.
    #[arg(long, value_name = "MARK", env = "LACUNA_DOCUMENTS", allow_hyphen_values = true)]
    documents: Option<String>,
    /// Tokens per window.
    #[arg(short, long, default_value_t = 512, env = "LACUNA_CTX_SIZE")]
    ctx_size: usize,
    /// A task with right answers: `endings` (made from the text), `none`, or a JSON-lines file (LAMBADA, PIQA, or
    /// `query`, `choices`, `gold`).
    #[arg(long, default_value = "endings", env = "LACUNA_TASK")]
    task: String,
    /// Questions of the task at most.
    #[arg(long, default_value_t = 200, env = "LACUNA_TASK_ITEMS")]
    task_items: usize,
    /// Tokens to decode per timed round; 0: no timings.
    #[arg(short = 'n', long, default_value_t = 64, env = "LACUNA_N_GEN")]
    n_gen: usize,
    /// Timed rounds; in each, all plans take turns.
    #[arg(short, long, default_value_t = 9, env = "LACUNA_REPETITIONS")]
    repetitions: usize,
    /// Leave places dense where the plan keeps more than this machine's break-even share, as `run` does; by default plans
    /// are followed everywhere.
    #[arg(long)]
    fall_back: bool,
    /// Where the report goes, by extension: .html, .svg, .json, .csv or .md; may be given several times.
    #[arg(short, long, value_name = "FILE", env = "LACUNA_OUTPUT")]
    output: Vec<PathBuf>,
    /// Store the plans in this folder.
    #[arg(long, value_name = "FOLDER", env = "LACUNA_SAVE_PLANS")]
    save_plans: Option<PathBuf>,
    /// Measure everything again, even what an earlier or interrupted report holds.
    #[arg(long)]
    fresh: bool,
    /// Decides which parts of a long text calibrate, and the questions.
    #[arg(short, long, default_value_t = 0, env = "LACUNA_SEED")]
    seed: u64,
    /// Threads; default: all cores.
    #[arg(short, long, env = "LACUNA_THREADS")]
    threads: Option<usize>,
    /// Type of the KV cache.
    #[arg(long, value_enum, default_value = "f16", env = "LACUNA_KV")]
    kv: Kv,
    /// Skip the measurement of the machine's streaming bandwidth.
    #[arg(long)]
    no_probe: bool,
}

impl Args {
    /// The text; the parser asks for it wherever something is measured.
    fn file(&self) -> &Path {
        self.file.as_deref().unwrap_or(Path::new(""))
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    let forms = args.output.iter().map(|p| Form::of(p)).collect::<Result<Vec<_>>>()?;
    if let Some(path) = &args.from {
        let stored = Report::parse(&fs::read(path).with_context(|| path.display().to_string())?);
        let Some(report) = stored else { bail!("{}: not a report of this version of the program", path.display()) };
        return show(&report, &args.output, &forms);
    }
    if args.n_gen > 0 && args.repetitions == 0 {
        bail!("`-r 0`: at least one round is needed; -n 0 skips the timings");
    }
    let requests = requests(&args)?;
    let name = args.model.as_deref().or(args.place.as_deref());
    let subject = Subject::open(name, &args)?;
    let texts = Texts::read(&args, &subject)?;
    let (plans, calibration) = plans(&args, &subject, &texts, requests)?;
    let task = texts.task(&args, &subject)?;
    let mut draft = draft(&args, &subject, &texts, &task)?;
    draft.text.calibration = calibration;
    let mut store = Store::new(&args);
    let mut bar = Bar::new(plans.len());
    let probe = (!args.no_probe && args.n_gen > 0).then(|| StreamProbe::new(PROBE_BYTES));
    let stream = || probe.as_ref().map(|p| p.read(subject.ready.dense.pool()) / 1e9);
    let (before, load_before) = (stream(), load());
    let setup = Setup {
        dense: &subject.ready.dense,
        tokenizer: subject.ready.tokenizer()?,
        windows: &texts.windows,
        task: task.as_ref().ok(),
        race: texts.race(&args),
        fall_back: args.fall_back,
        command: format!("lacuna run{}", subject.flag),
        known: &store.known(),
    };
    let measured = compare::run(&setup, &plans, &mut |event| {
        bar.show(event);
        if let Event::Measured(dense, points) = event {
            store.save(&Report { dense: dense.clone(), points: points.to_vec(), ..draft.clone() });
        }
    })?;
    bar.end();
    let mut report = Report { dense: measured.dense, points: measured.points, ..draft };
    report.machine.stream_gb_per_s = before.zip(stream()).map(|(a, b)| [a, b]);
    report.machine.load = load_before.zip(load()).map(|(a, b)| [a, b]);
    report.notes = notes::notes(&report).into_iter().chain(report.notes).collect();
    let outcome = show(&report, &args.output, &forms)?;
    store.finish();
    Ok(outcome)
}

/// Writes the report in all forms and prints the table.
fn show(report: &Report, paths: &[PathBuf], forms: &[Form]) -> Result<Outcome> {
    for (path, form) in paths.iter().zip(forms) {
        report::write(report, *form, path)?;
    }
    let mut out = stdout().lock();
    write!(out, "{}", report::terminal(report))?;
    for path in paths {
        writeln!(out, "{}", path.display())?;
    }
    Ok(Outcome::Good)
}

/// Bytes of the streaming probe: several times any last-level cache.
const PROBE_BYTES: usize = 512 << 20;
