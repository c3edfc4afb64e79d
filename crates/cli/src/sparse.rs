//! From `--sparse` or `--plan` to an engine that skips.

use crate::{args::LoadArgs, open::Place};
use anyhow::{Result, anyhow};
use lacuna::{
    cache,
    calibrate::{self, Subject, store},
    engine::{
        Engine, Options,
        bitmaps::{BitmapOptions, Packed},
        compile::{CompileOptions, compile},
    },
    model::Model,
};
use lacuna_core::{plan::Plan, statistics::Statistics};
use lacuna_methods::registry;
use std::sync::Arc;

/// An engine with a plan, and the plan's name.
pub struct Sparse {
    /// The engine.
    pub engine: Engine,
    /// The methods and their parameters.
    pub label: String,
}

/// The plan that `args` ask for on `model`; `None` if nothing.
///
/// # Errors
/// Unknown methods, a plan for another model, a method that needs a calibration that was never made.
pub fn plan(args: &LoadArgs, place: &Place, model: &Arc<Model>) -> Result<Option<Plan>> {
    Ok(match (&args.plan, &args.sparse) {
        (Some(path), _) => Some(Plan::load(path, &model.hash, model.blocks.len())?),
        (None, Some(spec)) => Some(plan_of(spec, args, place, model)?),
        (None, None) => None,
    })
}

/// The engine that [`plan`] makes of `dense`; `None` without a plan.
///
/// # Errors
/// As [`plan`] and [`with_plan`].
pub fn apply(args: &LoadArgs, place: &Place, dense: &Engine) -> Result<Option<Sparse>> {
    plan(args, place, dense.model())?.map(|plan| with_plan(&plan, dense)).transpose()
}

/// `dense` with bitmaps where matrices have many zeros, unless a flag keeps them dense; the engine as it is where that
/// does not pay.
///
/// # Errors
/// As the engine's.
pub fn with_bitmaps(args: &LoadArgs, engine: Engine) -> Result<(Engine, Option<Packed>)> {
    if args.no_bitmaps {
        return Ok((engine, None));
    }
    let model = engine.model();
    let options = BitmapOptions::for_model(cache::root().as_deref(), &model.hash, engine.threads()).for_size(model);
    let progress = |done, all| tracing::debug!("bitmaps: {done} of {all}");
    Ok(match engine.with_bitmaps(&options, &progress)? {
        Some((packed, what)) => (packed, Some(what)),
        None => (engine, None),
    })
}

/// The engine that follows `plan`, with the threads and cache type of `dense`, and with bitmaps if it has some.
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
    let engine = Engine::new(compiled.model, options)?;
    let packed = match dense.has_bitmaps() {
        true => {
            let options = BitmapOptions::for_model(cache::root().as_deref(), &model.hash, dense.threads());
            let options = options.for_size(model);
            engine.with_bitmaps(&options, &|_, _| {})?
        }
        false => None,
    };
    let label = packed.as_ref().map_or(plan.method.clone(), |(_, p)| format!("{} {}", plan.method, p.label()));
    let engine = packed.map_or(engine, |(packed, _)| packed);
    Ok(Sparse { engine, label })
}

/// The plan of a short form: stored beside the model, or made at once where no method needs a calibration.
fn plan_of(spec: &str, args: &LoadArgs, place: &Place, model: &Arc<Model>) -> Result<Plan> {
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
