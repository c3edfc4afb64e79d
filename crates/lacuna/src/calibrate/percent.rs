//! PPL-p%: the share (or error) at which a method's perplexity rises by exactly p %.
//!
//! Luo et al., Sparsing Law (arXiv:2411.02335): instead of comparing methods at one sparsity, compare the sparsity they
//! reach at one harm. Every second window decides, the others tell how much it is on text that did not.

use crate::{
    engine::{
        Engine,
        break_even::BreakEven,
        compile::{CompileOptions, compile},
        layouts::LayoutCache,
    },
    error::{Error, Result},
    eval::{EngineSource, Scoring, Window, perplexity},
};
use lacuna_core::plan::Plan;

/// Steps of the bisection.
const STEPS: usize = 12;

/// What was found.
#[derive(Clone, Debug)]
pub struct Percent {
    /// The value of the method's first parameter.
    pub value: f64,
    /// Its plan.
    pub plan: Plan,
    /// Perplexity over that of the dense model, on the windows that decided.
    pub ratio: f64,
    /// The same on the others; `None` if there is only one window.
    pub held_out: Option<f64>,
}

/// Bisects `make`'s argument within 0 to `most` for the largest value whose perplexity is at most `1 + percent / 100`
/// times the dense one. `progress(step, steps, value, ratio)`.
///
/// # Errors
/// What `make` or passes return, and a percentage that is not positive.
pub fn ppl_percent(
    engine: &Engine,
    windows: &[Window],
    (percent, most): (f64, f64),
    make: &mut dyn FnMut(f64) -> Result<Plan>,
    progress: &mut dyn FnMut(usize, usize, f64, f64),
) -> Result<Percent> {
    if !(percent.is_finite() && percent > 0.0) || windows.is_empty() {
        let problem = format!("{percent} is not a positive percentage, or there is no text");
        return Err(Error::Argument { name: "ppl_percent", problem });
    }
    let pick = |odd: usize| windows.iter().skip(odd).step_by(2).cloned().collect::<Vec<_>>();
    let (own, others) = (pick(0), pick(1));
    let nll = |engine: &Engine, windows: &[Window], scoring: Scoring| -> Result<f64> {
        let p = perplexity(&mut EngineSource::new(engine, 0, scoring)?, windows, None, |_| {})?;
        Ok(p.nll / p.count.max(1) as f64)
    };
    let sparse = |plan: &Plan| -> Result<Engine> {
        let options =
            CompileOptions { cache: LayoutCache::new(None, ""), break_even: BreakEven::never_dense(), masked: true };
        let compiled = compile(plan, engine.model(), &options, engine.pool(), &|_, _| {})?;
        engine.with_plan(Some(compiled.plan))
    };
    let dense = nll(engine, &own, Scoring::Dense)?;
    let (mut low, mut high) = (0.0, most);
    let mut best = (0.0, make(0.0)?, 1.0);
    for step in 0..STEPS {
        let value = if step == 0 { most } else { 0.5 * (low + high) };
        let plan = make(value)?;
        let ratio = (nll(&sparse(&plan)?, &own, Scoring::Masked)? - dense).exp();
        progress(step + 1, STEPS, value, ratio);
        if ratio <= 1.0 + percent / 100.0 {
            (low, best) = (value, (value, plan, ratio));
        } else {
            high = value;
        }
        if high - low < 1e-3 {
            break;
        }
    }
    let held_out = match others.is_empty() {
        true => None,
        false => {
            Some((nll(&sparse(&best.1)?, &others, Scoring::Masked)? - nll(engine, &others, Scoring::Dense)?).exp())
        }
    };
    Ok(Percent { value: best.0, plan: best.1, ratio: best.2, held_out })
}
