//! From what was asked for to plans: files are read, methods plan from one calibration pass that they share.

use super::{
    Args,
    progress::Bar,
    subject::{Subject, Texts},
};
use crate::text;
use anyhow::{Result, bail};
use lacuna::{
    calibrate,
    compare::{
        Planned,
        report::Calibration,
        sweep::{Candidate, family_of, short, sweep},
    },
};
use lacuna_core::{observer::Observer, plan::Plan, statistics::Statistics};
use lacuna_methods::registry::Resolved;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What was asked for.
pub(super) enum Request {
    File(PathBuf),
    Methods(Candidate),
}

pub(super) fn requests(args: &Args) -> Result<Vec<Request>> {
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

/// The plans of all requests: files are read, methods plan from one calibration pass that they share.
pub(super) fn plans(
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
    let wanted = calibrate::tokens_wanted(&steps, &seen);
    let statistics =
        if wanted > 0 { observe(args, subject, texts, (&steps, &seen, wanted))? } else { Statistics::default() };
    let calibration = (wanted > 0).then(|| Calibration {
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
pub(super) fn command(args: &Args, subject: &Subject, plan: &Plan, calibrated: bool) -> Result<String> {
    let flag = &subject.flag;
    if let Some(folder) = &args.save_plans {
        fs::create_dir_all(folder)?;
        let path = folder.join(format!("plan-{}.json", plan.method.replace([',', '=', ':'], "-")));
        plan.save(&path)?;
        return Ok(format!("lacuna run{flag} --plan {}", text::shell(&path.to_string_lossy())));
    }
    let spec = text::shell(&short(&plan.method));
    let file = args.calibration.as_deref().unwrap_or(args.file()).display().to_string();
    let first = format!("lacuna calibrate{flag} --sparse {spec} -f {} && ", text::shell(&file));
    Ok(format!("{}lacuna run{flag} --sparse {spec}", if calibrated { first.as_str() } else { "" }))
}

pub(super) fn observe(
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
    let mut forward = |tokens: &[u32], observer: &mut dyn Observer| {
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
