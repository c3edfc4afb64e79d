//! From `--sparse` or `--plan` to an engine that skips.

use crate::{args::LoadArgs, open::Place};
use anyhow::{Result, anyhow};
use lacuna::{
    cache,
    calibrate::{self, Subject, store},
    engine::{
        Engine, Options,
        compile::{CompileOptions, compile},
    },
};
use lacuna_core::{plan::Plan, statistics::Statistics};
use lacuna_methods::registry;

/// An engine with a plan, and the plan's name.
pub struct Sparse {
    /// The engine.
    pub engine: Engine,
    /// The methods and their parameters.
    pub label: String,
}

/// What `args` ask for on the model of `dense`; `None` if nothing.
///
/// # Errors
/// Unknown methods, a plan for another model, a method that needs a calibration that was never made.
pub fn apply(args: &LoadArgs, place: &Place, dense: &Engine) -> Result<Option<Sparse>> {
    let model = dense.model();
    let plan = match (&args.plan, &args.sparse) {
        (Some(path), _) => Plan::load(path, &model.hash, model.blocks.len())?,
        (None, Some(spec)) => plan_of(spec, args, place, dense)?,
        (None, None) => return Ok(None),
    };
    with_plan(&plan, dense).map(Some)
}

/// The engine that follows `plan`, with the threads and cache type of `dense`.
///
/// # Errors
/// As [`compile`].
pub fn with_plan(plan: &Plan, dense: &Engine) -> Result<Sparse> {
    let model = dense.model();
    let options = CompileOptions::for_model(cache::root().as_deref(), &model.hash, dense.threads());
    let compiled = compile(plan, model, &options, dense.pool(), &|done, all| {
        tracing::debug!("input-major weights: {done} of {all}");
    })?;
    let options = Options {
        threads: dense.threads(),
        kv: dense.kv(),
        prefill_chunk: dense.prefill_chunk(),
        plan: Some(compiled.plan),
    };
    Ok(Sparse { engine: Engine::new(compiled.model, options)?, label: plan.method.clone() })
}

/// The plan of a short form: stored beside the model, or made at once where no method needs a calibration.
fn plan_of(spec: &str, args: &LoadArgs, place: &Place, dense: &Engine) -> Result<Plan> {
    let model = dense.model();
    let steps = registry::parse(spec)?;
    let label = calibrate::label(&steps);
    if let Some((plan, path)) = store::find(place.path(), &label, &model.hash, model.blocks.len())? {
        tracing::info!("plan {}", path.display());
        return Ok(plan);
    }
    let subject = Subject::new(model);
    if calibrate::tokens_wanted(&steps, &subject) > 0 {
        let name = args.model_name.as_deref().map(|m| format!(" -m {m}")).unwrap_or_default();
        return Err(anyhow!(
            "`{label}` needs a calibration, and none is stored for this model; make it once with \
             `lacuna calibrate{name} --sparse {spec} -f TEXT`"
        ));
    }
    let (plan, notes) = calibrate::plan(&steps, &subject, &Statistics::default())?;
    notes.iter().for_each(|n| tracing::warn!("{n}"));
    Ok(plan)
}
