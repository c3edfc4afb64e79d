//! `lacuna compare`: plans side by side on one model, quality against cost.

use super::{
    doctor::{all_threads, cpu_name},
    eval::read_text,
};
use crate::{
    Outcome,
    args::{Kv, LoadArgs, LoadMode},
    open::{self, Place, Ready},
    report::{self, Form},
    text,
};
use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use lacuna::{
    calibrate,
    compare::{
        self, Event, Planned, Setup,
        items::Maker,
        notes,
        report::{Calibration, Machine, ModelFacts, Point, REPORT_VERSION, Report, TextFacts},
        speed::Race,
        sweep::{Candidate, family_of, sweep},
        task::Task,
        texts,
    },
    eval::Window,
};
use lacuna_core::{hash::sha256, plan::Plan, statistics::Statistics};
use lacuna_kernels::{isa, probe::StreamProbe};
use lacuna_methods::registry::Resolved;
use std::{
    env, fs,
    io::{IsTerminal, Write, stderr, stdout},
    path::{Path, PathBuf},
};

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
    #[arg(short, long, env = "LACUNA_FILE")]
    file: PathBuf,
    /// Another text to calibrate on; then all of -f may be scored.
    #[arg(long, value_name = "FILE", env = "LACUNA_CALIBRATION")]
    calibration: Option<PathBuf>,
    /// Tokens to score.
    #[arg(long, default_value_t = 8192, env = "LACUNA_TOKENS")]
    tokens: usize,
    /// Lines that part documents; default: lines like `<|endoftext|>`, if the text has them.
    #[arg(long, value_name = "MARK", env = "LACUNA_DOCUMENTS")]
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
    /// Where the report goes, by extension: .html, .json, .csv or .md; may be given several times.
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

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    let forms = args.output.iter().map(|p| Form::of(p)).collect::<Result<Vec<_>>>()?;
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
    for (path, form) in args.output.iter().zip(&forms) {
        report::write(&report, *form, path)?;
    }
    store.finish();
    let mut out = stdout().lock();
    write!(out, "{}", report::terminal(&report))?;
    for path in &args.output {
        writeln!(out, "{}", path.display())?;
    }
    Ok(Outcome::Good)
}

/// Bytes of the streaming probe: several times any last-level cache.
const PROBE_BYTES: usize = 512 << 20;

/// What was asked for.
enum Request {
    File(PathBuf),
    Methods(Candidate),
}

fn requests(args: &Args) -> Result<Vec<Request>> {
    let mut list = Vec::new();
    for plan in args.plans.iter().map(|p| p.trim()).filter(|p| !p.is_empty()) {
        list.push(match Path::new(plan) {
            path if path.is_file() => Request::File(path.to_owned()),
            path if path.extension().is_some_and(|e| e == "json") => bail!("{plan}: there is no such plan"),
            _ => Request::Methods(Candidate::parse(plan)?),
        });
    }
    for spec in &args.sparse {
        list.push(Request::Methods(Candidate::parse(spec)?));
    }
    for text in &args.sweep {
        list.extend(sweep(text)?.into_iter().map(Request::Methods));
    }
    if list.is_empty() {
        bail!("nothing to compare: give --sweep teal=0.25..0.7, --sparse SPEC or --plans FILE,FILE");
    }
    let mut seen = Vec::new();
    list.retain(|r| match r {
        Request::File(_) => true,
        Request::Methods(c) => {
            !seen.contains(&c.label) && {
                seen.push(c.label.clone());
                true
            }
        }
    });
    Ok(list)
}

/// The model and its facts.
struct Subject {
    ready: Ready,
    facts: ModelFacts,
    /// ` -m MODEL`, or nothing for the embedded one.
    flag: String,
}

impl Subject {
    fn open(name: Option<&str>, args: &Args) -> Result<Self> {
        let load = LoadArgs {
            threads: args.threads,
            kv: args.kv,
            cache_type_k: None,
            cache_type_v: None,
            sparse: None,
            plan: None,
            memory: None,
            load_mode: LoadMode::Map,
            check_tensors: false,
            batch: 512,
            model_name: None,
        };
        let place = Place::find(name)?;
        let checkpoint = place.open(&open::load_options(&load, None))?;
        let tensors = checkpoint.source.tensors.values();
        let bytes = tensors.clone().map(|t| t.bytes.len() as u64).sum();
        let parameters = tensors.map(|t| t.shape.iter().map(|n| *n as u64).product::<u64>()).sum();
        let architecture = checkpoint.spec.arch.clone();
        drop(checkpoint);
        let ready = open::ready(name, Some(0), &load)?;
        let model = ready.dense.model();
        let kv = format!("{:?}", args.kv).to_lowercase();
        let facts = ModelFacts {
            name: place.label(),
            hash: model.hash.clone(),
            architecture,
            parameters,
            bytes,
            layers: model.blocks.len(),
            kv,
        };
        let flag = name.map_or(String::new(), |n| format!(" -m {}", text::shell(n)));
        Ok(Self { ready, facts, flag })
    }

    fn context(&self, args: &Args) -> usize {
        args.ctx_size.min(self.ready.dense.model().spec.context)
    }
}

/// The texts, divided and cut.
struct Texts {
    test: String,
    mark: Option<String>,
    sha256: String,
    /// File, its hash, and the part that calibrates.
    calibration: (PathBuf, String, String),
    windows: Vec<Window>,
    cut: String,
}

impl Texts {
    fn read(args: &Args, subject: &Subject) -> Result<Self> {
        let whole = read_text(&args.file)?;
        let mark = args.documents.clone().or_else(|| texts::mark(&whole).map(str::to_owned));
        let sha = sha256(whole.as_bytes());
        let (calibration, test) = match &args.calibration {
            Some(path) => {
                let text = read_text(path)?;
                ((path.clone(), sha256(text.as_bytes()), text), whole)
            }
            None => {
                // A token has about four bytes, and chunks score only their second half.
                let bytes = args.tokens.saturating_mul(if mark.is_some() { 6 } else { 10 });
                let parts = texts::divide(&whole, mark.as_deref(), bytes);
                ((args.file.clone(), sha.clone(), parts.calibration.to_owned()), parts.test.to_owned())
            }
        };
        let tokenizer = subject.ready.tokenizer()?;
        let (windows, cut) = texts::scored(&test, mark.as_deref(), tokenizer, subject.context(args), args.tokens)?;
        Ok(Self { test, mark, sha256: sha, calibration, windows, cut })
    }

    /// The task, or why there is none.
    fn task(&self, args: &Args, subject: &Subject) -> Result<Result<Task, String>> {
        let maker = Maker {
            tokenizer: subject.ready.tokenizer()?,
            context: subject.context(args),
            most: args.task_items,
            seed: args.seed,
        };
        Ok(match args.task.as_str() {
            "none" => Err("No task was asked for (--task none).".to_owned()),
            "endings" => maker.endings(&texts::passages(&self.test, self.mark.as_deref()))?.ok_or_else(|| {
                "No task: the scored text has too few passages with a last sentence; --task FILE gives one.".to_owned()
            }),
            file => Ok(maker.file(Path::new(file))?),
        })
    }

    /// What is timed: the first window that is long enough, or the longest.
    fn race(&self, args: &Args) -> Option<Race<'_>> {
        const PROMPT: usize = 8;
        if args.n_gen == 0 {
            return None;
        }
        let wanted = PROMPT + args.n_gen;
        let enough = self.windows.iter().find(|w| w.tokens.len() >= wanted);
        let window = enough.or_else(|| self.windows.iter().max_by_key(|w| w.tokens.len()))?;
        let (prompt, tokens) = window.tokens.split_at(PROMPT.min(window.tokens.len() / 2));
        Some(Race { prompt, tokens: &tokens[..tokens.len().min(args.n_gen)], rounds: args.repetitions })
    }
}

/// The plans of all requests: files are read, methods plan from one calibration pass that they share.
fn plans(
    args: &Args,
    subject: &Subject,
    texts: &Texts,
    requests: Vec<Request>,
) -> Result<(Vec<Planned>, Option<Calibration>)> {
    let model = subject.ready.dense.model().clone();
    let seen = calibrate::Subject::new(&model);
    let steps = requests.iter().filter_map(|r| match r {
        Request::Methods(c) => Some(c.steps.clone()),
        Request::File(_) => None,
    });
    let steps = steps.collect::<Vec<_>>().concat();
    let tokens = calibrate::tokens_wanted(&steps, &seen);
    let statistics =
        if tokens > 0 { observe(args, subject, texts, (&steps, &seen, tokens))? } else { Statistics::default() };
    let calibration = (tokens > 0).then(|| Calibration {
        file: texts.calibration.0.display().to_string(),
        sha256: texts.calibration.1.clone(),
        tokens: statistics.tokens() as usize,
    });
    let mut list = Vec::new();
    for request in requests {
        let (plan, family, value, command) = match request {
            Request::File(path) => {
                let plan = Plan::load(&path, &model.hash, model.blocks.len())?;
                let (family, value) = family_of(&plan.method);
                (
                    plan,
                    family,
                    value,
                    format!("lacuna run{} --plan {}", subject.flag, text::shell(&path.to_string_lossy())),
                )
            }
            Request::Methods(c) => {
                let (plan, notes) = calibrate::plan(&c.steps, &seen, &statistics)?;
                notes.iter().for_each(|n| tracing::info!("{}: {n}", c.label));
                let command = command(args, subject, &plan, calibrate::tokens_wanted(&c.steps, &seen) > 0)?;
                (plan, c.family, c.value, command)
            }
        };
        list.push(Planned { plan, family, value, command });
    }
    Ok((list, calibration))
}

/// How a user gets an engine with this plan; stores it where that was asked for.
fn command(args: &Args, subject: &Subject, plan: &Plan, calibrated: bool) -> Result<String> {
    let flag = &subject.flag;
    if let Some(folder) = &args.save_plans {
        fs::create_dir_all(folder)?;
        let path = folder.join(format!("plan-{}.json", plan.method.replace([',', '=', ':'], "-")));
        plan.save(&path)?;
        return Ok(format!("lacuna run{flag} --plan {}", text::shell(&path.to_string_lossy())));
    }
    let spec = text::shell(&plan.method);
    let file = args.calibration.as_ref().unwrap_or(&args.file).display().to_string();
    let first = format!("lacuna calibrate{flag} --sparse {spec} -f {} && ", text::shell(&file));
    Ok(format!("{}lacuna run{flag} --sparse {spec}", if calibrated { first.as_str() } else { "" }))
}

fn observe(
    args: &Args,
    subject: &Subject,
    texts: &Texts,
    (steps, seen, wanted): (&[Resolved], &calibrate::Subject, usize),
) -> Result<Statistics> {
    let tokenizer = subject.ready.tokenizer()?;
    let tokens = tokenizer.encode(&texts.calibration.2, true)?;
    if tokens.len() < 2 {
        bail!("{}: nothing is left of it to calibrate on; give --calibration FILE", texts.calibration.0.display());
    }
    let bos = tokenizer.special().bos.filter(|b| tokens.first() == Some(b));
    let context = subject.ready.dense.model().spec.context;
    let windows = calibrate::windows(&tokens, context, wanted, args.seed, bos);
    let mut session = subject.ready.dense.session(0)?;
    let bar = Bar::new(0);
    let mut forward = |tokens: &[u32], observer: &mut dyn lacuna_core::observer::Observer| {
        session.truncate(0);
        session.observe(tokens, observer)
    };
    let mut statistics = Statistics::default();
    calibrate::gather(steps, seen, &mut forward, &windows, &mut statistics, &mut |_, done, all| {
        bar.set("observing the calibration text", done, all);
    })?;
    bar.end();
    Ok(statistics)
}

/// The report before anything is measured.
fn draft(args: &Args, subject: &Subject, texts: &Texts, task: &Result<Task, String>) -> Result<Report> {
    let scored = texts.windows.iter().map(Window::predictions).sum();
    let pieces = subject.ready.tokenizer()?.pieces();
    let bytes = texts.windows.iter().flat_map(|w| &w.tokens[w.first + 1..]).map(|t| pieces.bytes(*t).len()).sum();
    let threads = subject.ready.dense.threads();
    let machine = Machine {
        cpu: cpu_name().unwrap_or_else(|| "unknown processor".into()),
        isa: isa::get().name().into(),
        cores: all_threads(),
        threads,
        cache_bytes: last_cache(),
        stream_gb_per_s: None,
        load: None,
    };
    let text = TextFacts {
        file: args.file.display().to_string(),
        sha256: texts.sha256.clone(),
        tokens: scored,
        bytes,
        windows: texts.windows.len(),
        cut: texts.cut.clone(),
        calibration: None,
    };
    Ok(Report {
        version: REPORT_VERSION,
        program: env!("CARGO_PKG_VERSION").into(),
        date: text::utc_now(),
        command: env::args().map(|a| text::shell(&a)).collect::<Vec<_>>().join(" "),
        seed: args.seed,
        machine,
        model: subject.facts.clone(),
        text,
        task: task.as_ref().ok().map(|t| t.facts.clone()),
        protocol: protocol(args),
        dense: Point::default(),
        points: Vec::new(),
        notes: task.as_ref().err().cloned().into_iter().collect(),
    })
}

fn protocol(args: &Args) -> Vec<String> {
    let mut list = vec![
        "Quality: the plan and the dense model decode the same text in lockstep, token by token.".to_owned(),
        "Bytes: weights, keys and values that decode read on that text.".to_owned(),
    ];
    list.push(if args.fall_back {
        "Places that keep more than this machine's break-even share are left dense, as `run` does (--fall-back)."
            .to_owned()
    } else {
        "Plans are followed everywhere; `run` leaves places dense where that is faster (compare with --fall-back)."
            .to_owned()
    });
    if args.n_gen > 0 {
        list.push(format!(
            "Speed: {} rounds behind one that warms up; in each, all engines decode the same {} tokens of the text in turns. Shown \
             are the median and the quartiles; speed-ups are ratios within a round.",
            args.repetitions, args.n_gen
        ));
    }
    list
}

fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// Bytes of the largest cache that the first core sees.
fn last_cache() -> Option<u64> {
    let size = |i: usize| fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size")).ok();
    (0..8).filter_map(size).filter_map(|t| text::parse_bytes(t.trim()).ok()).max()
}

/// Finished points on disk, so that an interrupted comparison goes on where it stopped.
struct Store {
    partial: Option<PathBuf>,
    sources: Vec<PathBuf>,
}

impl Store {
    fn new(args: &Args) -> Self {
        let partial = args.output.first().map(|p| {
            let mut name = p.as_os_str().to_owned();
            name.push(".partial.json");
            PathBuf::from(name)
        });
        let reports = args.output.iter().filter(|p| p.extension().is_some_and(|e| e == "json")).cloned();
        let sources = if args.fresh { Vec::new() } else { reports.chain(partial.clone()).collect() };
        Self { partial, sources }
    }

    fn known(&self) -> Vec<Point> {
        let reports = self.sources.iter().filter_map(|p| Report::parse(&fs::read(p).ok()?));
        reports.flat_map(|r| [vec![r.dense], r.points].concat()).collect()
    }

    fn save(&mut self, report: &Report) {
        let Some(path) = &self.partial else { return };
        if let Err(e) = report::write(report, Form::Json, path) {
            tracing::warn!("finished points are not kept: {e:#}");
            self.partial = None;
        }
    }

    fn finish(&self) {
        if let Some(path) = &self.partial {
            // Gone already, or it stays and is read again: both are fine.
            let _ = fs::remove_file(path);
        }
    }
}

/// One bar on a terminal; elsewhere one line per plan.
struct Bar {
    bar: ProgressBar,
    plans: usize,
}

impl Bar {
    fn new(plans: usize) -> Self {
        let bar = if stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{msg:50} {wide_bar} {pos}/{len} {eta}") {
            bar.set_style(style);
        }
        Self { bar, plans }
    }

    fn set(&self, what: &str, done: usize, all: usize) {
        self.bar.set_message(what.to_owned());
        self.bar.set_length(all as u64);
        self.bar.set_position(done as u64);
    }

    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Quality(label, done, all) => self.set(&format!("{label}: scoring"), done, all),
            Event::Task(label, done, all) => self.set(&format!("{label}: asking"), done, all),
            Event::Race(done, all) => self.set("timing, all plans in turns", done, all),
            Event::Measured(dense, points) => {
                let Some(p) = points.last() else { return };
                let line = format!(
                    "[{}/{}] {}: {:+.4} bits/byte, KL {:.4}, {} of dense bytes",
                    points.len(),
                    self.plans,
                    p.label,
                    p.quality.change.value,
                    p.quality.kld.value,
                    text::percent(p.cost.bytes_per_token / dense.cost.bytes_per_token)
                );
                if self.bar.is_hidden() { eprintln!("{line}") } else { self.bar.println(line) }
            }
        }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}
