//! `lacuna calibrate`: observe a text, let the methods plan, store the plan.

use super::eval::read_text;
use crate::{
    Outcome,
    args::LoadArgs,
    open::{self, Ready},
    table::Table,
    text,
};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use lacuna::{
    cache,
    calibrate::{
        self, Resume, Subject,
        percent::ppl_percent,
        search::{GREEDY_STEP, LayerFound, Search, with_share},
        store,
    },
    eval::Window,
};
use lacuna_core::{plan::Plan, recipe::Recipe, statistics::Statistics};
use lacuna_methods::registry::{self, Resolved};
use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write, stderr, stdout},
    path::PathBuf,
};

/// Arguments of `lacuna calibrate`.
#[derive(clap::Args)]
pub struct Args {
    /// The model; default: that of the recipe, or the embedded one.
    #[arg(value_name = "MODEL")]
    place: Option<String>,
    /// The model, as a flag.
    #[arg(short, long, env = "LACUNA_MODEL", conflicts_with = "place")]
    model: Option<String>,
    /// The method (see `lacuna methods`); several, or other parameters: --sparse or --recipe.
    #[arg(long, value_name = "NAME", env = "LACUNA_METHOD", conflicts_with_all = ["sparse", "recipe"])]
    method: Option<String>,
    /// The first parameter of --method: for most the share that is dropped.
    #[arg(long, value_name = "SHARE", requires = "method", env = "LACUNA_SPARSITY")]
    sparsity: Option<f64>,
    /// A recipe in TOML: model, text and methods with all their parameters.
    #[arg(long, value_name = "FILE", conflicts_with = "sparse", env = "LACUNA_RECIPE")]
    recipe: Option<PathBuf>,
    /// How the share is spread over layers and projections; default: as the method does by itself.
    #[arg(long, value_enum, env = "LACUNA_SEARCH")]
    search: Option<Spread>,
    /// Tokens that a search measures errors on.
    #[arg(long, default_value_t = 2048, env = "LACUNA_SEARCH_TOKENS")]
    search_tokens: usize,
    /// Choose the method's first parameter so that the perplexity rises by this many per cent (PPL-p%).
    #[arg(long, value_name = "P", env = "LACUNA_PPL_PERCENT")]
    ppl_percent: Option<f64>,
    /// The calibration text; default: that of the recipe.
    #[arg(short, long, env = "LACUNA_FILE")]
    file: Option<PathBuf>,
    /// Where the plan goes; default: beside the model, where `--sparse` finds it.
    #[arg(short, long, value_name = "PLAN", env = "LACUNA_OUTPUT")]
    output: Option<PathBuf>,
    /// Tokens to observe; default: what the methods ask for.
    #[arg(short = 'n', long, env = "LACUNA_TOKENS")]
    tokens: Option<usize>,
    /// Decides which parts of a longer text are observed.
    #[arg(short, long, env = "LACUNA_SEED")]
    seed: Option<u64>,
    #[command(flatten)]
    load: LoadArgs,
}

/// How a share is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Spread {
    /// The same everywhere.
    Uniform,
    /// TEAL's greedy search within every block (minutes; killed ones go on where they were).
    Greedy,
    /// Every block gets the share at which its relative error is the same for all.
    Cett,
}

/// Everything a calibration works with.
struct Work<'a> {
    args: &'a Args,
    ready: &'a Ready,
    steps: Vec<Resolved>,
    windows: Vec<Vec<u32>>,
    bar: ProgressBar,
}

/// Runs the verb.
pub fn run(mut args: Args) -> Result<Outcome> {
    let recipe = match &args.recipe {
        Some(path) => Some(Recipe::parse(&read_text(path)?, &path.display().to_string())?),
        None => None,
    };
    let steps = steps(&mut args, recipe.as_ref())?;
    let base = recipe.as_ref().and_then(|r| r.base.clone());
    let name = args.model.clone().or(args.place.clone()).or(base);
    let place = open::Place::find(name.as_deref())?;
    let ready = open::ready(name.as_deref(), None, &args.load)?;
    let windows = windows(&args, recipe.as_ref(), &ready, &steps)?;
    let work = Work { args: &args, ready: &ready, steps, windows, bar: bar() };
    let subject = Subject::new(ready.dense.model());
    let resume = Resume::below(cache::root().as_deref(), &subject, &work.windows);
    let (plan, notes) = work.plan(subject, resume.as_ref())?;
    work.bar.finish_and_clear();
    notes.iter().for_each(|n| eprintln!("note: {n}"));
    let path = match &args.output {
        Some(path) => {
            plan.save(path)?;
            path.clone()
        }
        None => store::save(&plan, place.path())?,
    };
    if let Some(resume) = resume {
        resume.clear();
    }
    let mut out = stdout().lock();
    write!(out, "{}", summary(&plan))?;
    writeln!(out, "{} ({} tokens observed)", path.display(), plan.calibration_tokens)?;
    Ok(Outcome::Good)
}

/// The methods that the flags or the recipe name.
fn steps(args: &mut Args, recipe: Option<&Recipe>) -> Result<Vec<Resolved>> {
    if let Some(recipe) = recipe {
        return Ok(recipe.steps.iter().map(registry::resolve).collect::<Result<_, _>>()?);
    }
    let spec = match (&args.method, args.sparsity) {
        (Some(method), Some(share)) => format!("{method}={share}"),
        (Some(method), None) => method.clone(),
        (None, _) => match args.load.sparse.take() {
            Some(spec) => spec,
            None => {
                bail!("which methods? Give --method teal --sparsity 0.5, or --sparse relu,teal=0.5, or --recipe FILE")
            }
        },
    };
    Ok(registry::parse(&spec)?)
}

/// The windows of the calibration text.
fn windows(args: &Args, recipe: Option<&Recipe>, ready: &Ready, steps: &[Resolved]) -> Result<Vec<Vec<u32>>> {
    let model = ready.dense.model();
    let of_recipe = recipe.and_then(|r| r.calibration.as_ref());
    let file = args.file.as_ref().or(of_recipe.map(|c| &c.file));
    let file = file.context("which text? Give -f FILE (or `file` below [calibration] in the recipe)")?;
    let needed = calibrate::tokens_wanted(steps, &Subject::new(model));
    let tokenizer = ready.tokenizer()?;
    let tokens = tokenizer.encode(&read_text(file)?, true)?;
    let wanted = args.tokens.or(of_recipe.and_then(|c| c.tokens)).unwrap_or(needed.max(DEFAULT_TOKENS));
    let seed = args.seed.or(of_recipe.map(|c| c.seed)).unwrap_or(0);
    let bos = tokenizer.special().bos.filter(|b| tokens.first() == Some(b));
    let windows = calibrate::windows(&tokens, model.spec.context, wanted, seed, bos);
    if windows.is_empty() {
        bail!("{}: no text in it", file.display());
    }
    Ok(windows)
}

impl Work<'_> {
    fn plan(&self, mut subject: Subject, resume: Option<&Resume>) -> Result<(Plan, Vec<String>)> {
        let statistics = self.observe(&subject, resume)?;
        if let Some(percent) = self.args.ppl_percent {
            return self.percent(percent, subject, &statistics);
        }
        let Some(spread) = self.args.search else { return Ok(calibrate::plan(&self.steps, &subject, &statistics)?) };
        let search_windows = self.search_windows();
        let search = self.search(&subject, &statistics, &search_windows)?;
        let share = search.step.params.get("sparsity");
        let (budgets, note) = match spread {
            Spread::Uniform => (Search::everywhere(&subject, share), None),
            Spread::Cett => {
                let curves = search.curves(&mut |done, all| self.show("searching", done, all))?;
                let (budgets, error) = curves.equal_error(share);
                (budgets, Some(format!("every block errs by {:.2} % of its output", 100.0 * error)))
            }
            Spread::Greedy => {
                let stored = cache::root().map(|r| r.join("searches").join(format!("{}.json", search.name())));
                let mut show = |done, all| self.show("searching", done, all);
                let (budgets, found) = search.greedy((share, GREEDY_STEP), stored.as_deref(), &mut show)?;
                (budgets, Some(gain(&found)))
            }
        };
        subject.budgets = budgets;
        let (mut plan, mut notes) = calibrate::plan(&self.steps, &subject, &statistics)?;
        plan.method += &format!("+{}", spread.name());
        notes.extend(note);
        Ok((plan, notes))
    }

    /// Passes over the text; a killed one goes on where it was.
    fn observe(&self, subject: &Subject, resume: Option<&Resume>) -> Result<Statistics> {
        let mut statistics = Statistics::default();
        let mut session = self.ready.dense.session(0)?;
        let mut forward = |tokens: &[u32], observer: &mut dyn lacuna_core::observer::Observer| {
            session.truncate(0);
            session.observe(tokens, observer)
        };
        let mut show = |pass: usize, done, all| self.show(&format!("observing, pass {}", pass + 1), done, all);
        calibrate::gather_resumable(
            &self.steps,
            subject,
            &mut forward,
            &self.windows,
            (&mut statistics, resume),
            &mut show,
        )?;
        Ok(statistics)
    }

    fn search<'a>(
        &'a self,
        subject: &'a Subject,
        statistics: &'a Statistics,
        windows: &'a [Vec<u32>],
    ) -> Result<Search<'a>> {
        let [step] = &self.steps[..] else { bail!("--search takes one method; the others can follow in --sparse") };
        with_share(step, 0.5)?;
        Ok(Search { step, subject, statistics, engine: &self.ready.dense, windows })
    }

    /// The first windows, of `--search-tokens` tokens in all.
    fn search_windows(&self) -> Vec<Vec<u32>> {
        let mut left = self.args.search_tokens.max(8);
        let cut = |w: &Vec<u32>| {
            let part = w[..w.len().min(left)].to_vec();
            left -= part.len();
            part
        };
        self.windows.iter().map(cut).filter(|w| w.len() >= 8).collect()
    }

    fn percent(&self, percent: f64, mut subject: Subject, statistics: &Statistics) -> Result<(Plan, Vec<String>)> {
        let [step] = &self.steps[..] else { bail!("--ppl-percent takes one method") };
        let Some(first) = step.method.params().first() else {
            bail!("`{}` has no parameter to choose", step.method.name())
        };
        let search_windows = self.search_windows();
        let curves = match self.args.search {
            Some(Spread::Greedy) => {
                bail!("--ppl-percent with --search greedy would search anew for every value; use cett")
            }
            Some(Spread::Cett) => {
                let search = self.search(&subject, statistics, &search_windows)?;
                Some(search.curves(&mut |done, all| self.show("searching", done, all))?)
            }
            _ => None,
        };
        let most = match first.range.1 {
            std::ops::Bound::Included(x) => x.min(1.0),
            _ => 0.98,
        };
        let mut make = |value: f64| {
            let given = step.params.iter().map(|(n, v)| (n, if n == first.name { value } else { v }));
            let params = lacuna_core::method::Params::new(step.method, given)?;
            if self.args.search == Some(Spread::Uniform) {
                subject.budgets = Search::everywhere(&subject, value);
            }
            if let Some(curves) = &curves {
                subject.budgets = curves.equal_error(value).0;
            }
            let steps = [Resolved { method: step.method, params }];
            Ok(calibrate::plan(&steps, &subject, statistics)?.0)
        };
        let windows: Vec<Window> =
            self.windows.iter().map(|w| Window { tokens: w.clone(), first: 0, begins_text: false }).collect();
        let mut show = |done, all, value: f64, ratio: f64| {
            self.show(&format!("{} {value:.3}: perplexity x {ratio:.4}", first.name), done, all);
        };
        let found = ppl_percent(&self.ready.dense, &windows, (percent, most), &mut make, &mut show)?;
        let held_out = found
            .held_out
            .map_or("no other windows".into(), |r| format!("{:+.2} % on other windows", 100.0 * (r - 1.0)));
        let note =
            format!("{} {:.4}: perplexity {:+.2} %, {held_out}", first.name, found.value, 100.0 * (found.ratio - 1.0));
        let mut plan = found.plan;
        if let Some(spread) = self.args.search {
            plan.method += &format!("+{}", spread.name());
        }
        Ok((plan, vec![note]))
    }

    fn show(&self, what: &str, done: usize, all: usize) {
        self.bar.set_message(what.to_owned());
        self.bar.set_length(all as u64);
        self.bar.set_position(done as u64);
    }
}

impl Spread {
    fn name(self) -> &'static str {
        match self {
            Spread::Uniform => "uniform",
            Spread::Greedy => "greedy",
            Spread::Cett => "cett",
        }
    }
}

/// What greedy gained over the same share everywhere, and where it did not.
fn gain(found: &[LayerFound]) -> String {
    let ratios: Vec<f64> = found.iter().map(|f| f.errors.0 / f.errors.1.max(f64::MIN_POSITIVE)).collect();
    let mean = ratios.iter().sum::<f64>() / ratios.len().max(1) as f64;
    let best = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let worse = ratios.iter().filter(|r| **r > 1.0).count();
    format!(
        "block error against uniform shares: {mean:.3} on average, {best:.3} at best, worse in {worse} of {} blocks",
        found.len()
    )
}

fn bar() -> ProgressBar {
    let bar = if stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{msg:45} {wide_bar} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar
}

/// Observed where the methods need none: enough for the kept shares in the report.
const DEFAULT_TOKENS: usize = 2048;

/// Mean kept share per place over the layers.
fn summary(plan: &Plan) -> Table {
    let mut places: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for entry in &plan.entries {
        let place = entry.rule.place();
        places.entry(place).or_default().extend(entry.kept.map(f64::from));
    }
    let mut table = Table::new(&["place", "kept:", "lowest:", "highest:"]);
    for (place, shares) in places {
        let mean = (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64);
        let low = shares.iter().copied().reduce(f64::min);
        let high = shares.iter().copied().reduce(f64::max);
        let cells = [mean, low, high].map(|s| text::or_dash(s.map(text::percent)));
        table.row([place.to_owned()].into_iter().chain(cells));
    }
    table
}
