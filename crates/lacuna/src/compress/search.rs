//! The smallest model whose divergence from the dense one is within a bound: whole runs at several settings, each measured
//! on a part of the text that no run observes.
//!
//! Where a step rounds, the setting is the number of bytes, spread over the matrices by measured errors; otherwise it is
//! the share that is dropped, spread by the ratios. Both are bisected: divergence rises with what is taken away, up to noise
//! that is far smaller than a step.

use super::{
    Choices, Found, Plan, Progress, Report, Request, Target,
    choices::{Curves, Measured},
    run,
    store::beside,
};
use crate::{
    engine::{Engine, Options},
    error::{Error, Result},
    eval::{EngineSource, Scoring, Window, divergence},
    model::{Checkpoint, LoadOptions, Model, load, source::Source},
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Runs of the bisection.
const HALVINGS: u32 = 7;

/// Largest share that is tried.
const MOST: f64 = 0.9;

/// Shares at which errors are measured for loss-based ratios.
const GRID: [f64; 6] = [0.15, 0.3, 0.45, 0.6, 0.75, 0.9];

/// What is tried.
enum Knob {
    /// A number of bytes; with the shares that are dropped besides.
    Bytes(Curves, Choices),
    /// A share; with what its ratios go by.
    Share(Measured),
}

/// Compresses as far as the divergence on `held_out` stays within `most`.
///
/// # Errors
/// As [`super::compress`]; a bound that cannot be kept, with the smallest divergence that was reached.
pub fn by_divergence(
    request: &Request,
    most: f64,
    held_out: &[Vec<u32>],
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report> {
    let checkpoint = Checkpoint::open(&request.model, &LoadOptions::default())?;
    let plan = Plan::new(request, &checkpoint)?;
    let model = Checkpoint::open(&request.model, &LoadOptions::default())?.bind()?;
    plan.check_formats(&model)?;
    super::lock::check(request, checkpoint.hash(), &super::lock::source_files(&request.model)?)?;
    let trial = Trial::new(&request.output, plan.target)?;
    let knob = plan.knob(&model, &checkpoint.source, &beside(&request.output, "lacuna-spill")?, progress)?;
    let dense = Arc::new(model);
    let measured = |setting: f64| -> Result<f64> {
        let (next, choices) = plan.at(&knob, &dense, setting)?;
        let next = Request { output: trial.path.clone(), lock: None, ..next };
        run(&next, Some(Found { choices: &choices, divergence: None, asked: request }), progress)?;
        let kl = kl(&dense, &trial.path, held_out, request.threads)?;
        progress(Progress::Tried(&knob.name(setting), kl));
        Ok(kl)
    };
    let (setting, found) = bisect(knob.ends(), most, measured)?;
    drop(trial);
    let (last, choices) = plan.at(&knob, &dense, setting)?;
    // It was checked for the request itself, whose share the search has changed.
    let last = Request { lock: None, ..last };
    run(&last, Some(Found { choices: &choices, divergence: Some(found), asked: request }), progress)
}

/// The hardest setting between the ends (gentlest, hardest) whose divergence is at most `most`, and that divergence.
fn bisect(
    (gentlest, hardest): (f64, f64),
    most: f64,
    mut measured: impl FnMut(f64) -> Result<f64>,
) -> Result<(f64, f64)> {
    let first = measured(hardest)?;
    if first <= most {
        return Ok((hardest, first));
    }
    let (mut good, mut bad, mut found) = (gentlest, hardest, None);
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(good, bad);
        match measured(middle)? {
            kl if kl <= most => (good, found) = (middle, Some(kl)),
            _ => bad = middle,
        }
    }
    let last = match found {
        Some(kl) => kl,
        None => measured(gentlest)?,
    };
    if last <= most {
        return Ok((good, last));
    }
    let problem = format!("{most} cannot be kept: the smallest divergence that these methods leave is {last:.4}");
    Err(Error::Argument { name: "max-kl", problem })
}

impl Knob {
    /// The settings that take the least and the most away.
    fn ends(&self) -> (f64, f64) {
        match self {
            Self::Bytes(curves, _) => {
                let (least, most) = curves.range();
                (most as f64, least as f64)
            }
            Self::Share(_) => (0.0, MOST),
        }
    }

    fn name(&self, setting: f64) -> String {
        match self {
            Self::Bytes(..) => format!("{} bytes", setting as u64),
            Self::Share(_) => format!("sparsity {setting:.4}"),
        }
    }
}

impl Plan<'_> {
    fn knob(
        &self,
        model: &Model,
        source: &Source,
        spill: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Knob> {
        if self.rounds() {
            let shares = self.shares(model, source, spill, progress)?;
            return Ok(Knob::Bytes(self.curves(model, source, &shares, spill, progress)?, shares));
        }
        Ok(Knob::Share(self.measured((model, source), &GRID, spill, progress)?))
    }

    /// The request of one setting, and what it decides.
    fn at(&self, knob: &Knob, model: &Model, setting: f64) -> Result<(Request, Choices)> {
        let mut next = self.request.clone();
        match knob {
            Knob::Bytes(curves, shares) => {
                let mut choices = shares.clone();
                self.choose_bits(curves, setting as u64, &mut choices)?;
                Ok((next, choices))
            }
            Knob::Share(measured) => {
                for step in next.steps.iter_mut().filter(|s| s.has("sparsity")) {
                    *step = step.with("sparsity", setting)?;
                }
                let choices = self.spread(model, measured, setting)?;
                Ok((next, choices))
            }
        }
    }
}

/// The mean divergence of the model at `path` from `dense`.
fn kl(dense: &Arc<Model>, path: &Path, held_out: &[Vec<u32>], threads: usize) -> Result<f64> {
    let window = |tokens: &Vec<u32>| Window { tokens: tokens.clone(), first: 0, begins_text: true };
    let windows: Vec<Window> = held_out.iter().filter(|w| w.len() > 1).map(window).collect();
    let longest = windows.iter().map(|w| w.tokens.len()).max().unwrap_or(0);
    let engine = |model: Arc<Model>| Engine::new(model, Options { threads, ..Options::default() });
    let base = engine(dense.clone())?;
    let test = engine(Arc::new(load(path, &LoadOptions::default())?))?;
    let (mut base, mut test) =
        (EngineSource::new(&base, longest, Scoring::Dense)?, EngineSource::new(&test, longest, Scoring::Dense)?);
    Ok(divergence(&mut base, &mut test, &windows, None, |_| {})?.kld().value)
}

/// The place of the outputs that are only measured; they are removed at the end.
struct Trial {
    path: PathBuf,
}

impl Trial {
    fn new(output: &Path, target: Target) -> Result<Self> {
        let path = beside(output, if target == Target::Gguf { "lacuna-trial.gguf" } else { "lacuna-trial" })?;
        let trial = Self { path };
        trial.remove();
        Ok(trial)
    }

    fn remove(&self) {
        let _ = if self.path.is_dir() { fs::remove_dir_all(&self.path) } else { fs::remove_file(&self.path) };
        let mut lock = self.path.clone().into_os_string();
        lock.push(format!(".{}", super::lock::NAME));
        let _ = fs::remove_file(lock);
        // Of a run that was stopped.
        let _ = beside(&self.path, "lacuna-work").map(fs::remove_dir_all);
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bisection_ends_at_the_hardest_setting_that_is_good() {
        let mut tried = 0;
        let (at, kl) = bisect((0.0, 1.0), 0.25, |s| {
            tried += 1;
            Ok(s * s)
        })
        .unwrap();
        assert!(at <= 0.5 && at > 0.5 - 1.0 / 64.0 && kl == at * at && tried == 8, "{at}");
        // A sudden fall, as magnitude pruning has at its turning point.
        let cliff = |s: f64| Ok(if s > 0.37 { 9.0 } else { 0.01 });
        assert!((bisect((0.0, 0.9), 0.05, cliff).unwrap().0 - 0.37).abs() < 0.9 / 128.0);
        assert_eq!(bisect((0.0, 1.0), 2.0, Ok).unwrap(), (1.0, 1.0));
        // Only the gentlest is good, and not even that.
        assert_eq!(bisect((8.0, 2.0), 1.0, |s| Ok(9.0 - s)).unwrap(), (8.0, 1.0));
        let none = bisect((8.0, 2.0), 0.5, |s| Ok(9.0 - s)).unwrap_err().to_string();
        assert!(none.contains("smallest divergence that these methods leave is 1.0000"), "{none}");
    }
}
