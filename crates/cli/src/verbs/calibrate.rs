//! `lacuna calibrate`: observe a text, let the methods plan, store the plan.

use super::eval::read_text;
use crate::{Outcome, args::LoadArgs, open, table::Table, text};
use anyhow::{Result, bail};
use indicatif::ProgressBar;
use lacuna::calibrate::{self, Subject, store};
use lacuna_core::plan::Plan;
use lacuna_methods::registry;
use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write, stderr, stdout},
    path::PathBuf,
};

/// Arguments of `lacuna calibrate`.
#[derive(clap::Args)]
pub struct Args {
    /// The model; default: the embedded one.
    #[arg(value_name = "MODEL")]
    place: Option<String>,
    /// The model, as a flag.
    #[arg(short, long, env = "LACUNA_MODEL", conflicts_with = "place")]
    model: Option<String>,
    /// The calibration text.
    #[arg(short, long, env = "LACUNA_FILE")]
    file: PathBuf,
    /// Where the plan goes; default: beside the model, where `--sparse` finds it.
    #[arg(short, long, value_name = "PLAN", env = "LACUNA_OUTPUT")]
    output: Option<PathBuf>,
    /// Tokens to observe; default: what the methods ask for.
    #[arg(short = 'n', long, env = "LACUNA_TOKENS")]
    tokens: Option<usize>,
    /// Decides which parts of a longer text are observed.
    #[arg(short, long, default_value_t = 0, env = "LACUNA_SEED")]
    seed: u64,
    #[command(flatten)]
    load: LoadArgs,
}

/// Runs the verb.
pub fn run(mut args: Args) -> Result<Outcome> {
    let Some(spec) = args.load.sparse.take() else { bail!("which methods? Give --sparse, such as --sparse teal=0.5") };
    let steps = registry::parse(&spec)?;
    let name = args.model.as_deref().or(args.place.as_deref());
    let place = open::Place::find(name)?;
    let ready = open::ready(name, None, &args.load)?;
    let model = ready.dense.model().clone();
    let subject = Subject::new(&model);
    let needed = calibrate::tokens_wanted(&steps, &subject);
    let tokenizer = ready.tokenizer()?;
    let tokens = tokenizer.encode(&read_text(&args.file)?, true)?;
    let wanted = args.tokens.unwrap_or(needed.max(DEFAULT_TOKENS));
    let bos = tokenizer.special().bos.filter(|b| tokens.first() == Some(b));
    let windows = calibrate::windows(&tokens, model.spec.context, wanted, args.seed, bos);
    let bar = if stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let mut session = ready.dense.session(0)?;
    let (plan, notes) = calibrate::calibrate(
        &steps,
        &subject,
        &mut |tokens, observer| {
            session.truncate(0);
            session.observe(tokens, observer)
        },
        &windows,
        |pass, done, all| {
            bar.set_message(format!("pass {}", pass + 1));
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        },
    )?;
    bar.finish_and_clear();
    notes.iter().for_each(|n| eprintln!("note: {n}"));
    let path = match &args.output {
        Some(path) => {
            plan.save(path)?;
            path.clone()
        }
        None => store::save(&plan, place.path())?,
    };
    let mut out = stdout().lock();
    write!(out, "{}", summary(&plan))?;
    writeln!(out, "{} ({} tokens observed)", path.display(), plan.calibration_tokens)?;
    Ok(Outcome::Good)
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
