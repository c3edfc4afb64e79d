//! Other bases of the residual stream: every norm reads the stream in a basis of its own, which may be cut, and shortcut
//! matrices take the stream from one basis to the next ([`Shortcuts`](crate::model::weights::Shortcuts)).
//!
//! Gains of norms go into the matrices behind them; layer norms become plain ones, for which everything that writes to the
//! stream loses its mean (SliceGPT, section 3.3; models with RMS norms lose none: the published code does that to them too, which
//! is not exact). Then `W_in` becomes `W_in Q`, `W_out` becomes `Q^T W_out`, and the addition `x + f(x)` becomes
//! `x Q_from^T Q_to + f(x)`. The head is cut like everything else, so that one width holds in the whole model, and is no longer
//! the embedding.

mod ends;
mod halves;
mod matrix;
mod walk;

#[cfg(test)]
mod tests;

use super::{
    Plan, Progress, Report, Request, Target,
    block::Runner,
    homes::{Home, homes},
    lock, output, release,
    store::Work,
};
use crate::{
    error::{Error, Result},
    model::{
        Checkpoint, LoadOptions,
        arch::ARCHITECTURES,
        bind::prefix,
        checkpoint::NORM_WIDTH,
        names::fill,
        spec::{BlockSpec, MlpSpec, NormKind, Spec},
    },
};
use lacuna_core::{
    compress::{Rotator, Sight},
    method::MethodError,
    site::Proj,
};
use lacuna_methods::{registry::Resolved, weights::ratios::Ratios};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use walk::Walk;

/// What begins the names of bases, which go on to the next block and are no part of the output.
pub const BASIS: &str = "lacuna.basis.";

/// The step that gives the stream other bases, if one does.
pub fn rotator(steps: &[Resolved]) -> Option<(&Resolved, &'static dyn Rotator)> {
    steps.iter().find_map(|s| Some((s, s.method.compressor()?.rotator()?)))
}

/// An output whose residual stream has a basis in every block.
pub struct Sliced {
    /// Its width before.
    pub before: usize,
    /// What the output computes.
    pub spec: Spec,
    /// Where its projections are stored, by block.
    pub homes: Vec<Vec<Home>>,
    /// Tensors that the output does not have any more: what layer norms added.
    pub gone: BTreeSet<String>,
}

impl Plan<'_> {
    /// The shape of the output, where a step gives the stream other bases.
    pub(super) fn sliced(&self, prefix: &str) -> Option<Sliced> {
        let (step, rotator) = rotator(&self.request.steps)?;
        let before = self.spec.width;
        let width = rotator.kept(&step.params, before);
        let spec = Spec { width, norm_width: Some(before), norm: NormKind::Rms, ..self.spec.clone() };
        let layers = 0..spec.blocks.len();
        let homes = layers.clone().map(|l| homes(self.names, prefix, &spec, l)).collect();
        let of_block = |l: usize| [self.names.attn_norm, self.names.mlp_norm].map(|name| fill(name, &[l]));
        let norms = layers.flat_map(of_block).chain([self.names.final_norm.to_owned()]);
        let gone = norms.map(|name| format!("{prefix}{name}.bias")).collect();
        Some(Sliced { before, spec, homes, gone })
    }

    /// That a step that gives the stream other bases stands alone, on a model in which that can be done.
    pub(super) fn check_rotation(&self) -> Result<()> {
        let Some((step, _)) = rotator(&self.request.steps) else { return Ok(()) };
        let refuse = |reason: &str| {
            Err(MethodError::NotApplicable { method: step.method.name().into(), reason: reason.into() }.into())
        };
        if self.target == Target::Gguf || self.request.gguf {
            let (file, what) = (self.request.output.display().to_string(), "shortcut matrices in a GGUF file".into());
            let remedy = "; start from the Hugging Face directory and write a directory, which Lacuna reads".into();
            return Err(Error::Unsupported { file, what, remedy });
        }
        if self.request.steps.len() > 1 {
            return refuse(
                "it changes the shape of the whole model; run it alone, and compress its output with the other methods",
            );
        }
        if self.request.ratios != Ratios::Uniform {
            return refuse("the residual stream has one width in all blocks; use uniform ratios");
        }
        if self.request.goal.is_some() {
            return refuse("there is no search for its width; give --sparsity");
        }
        if self.spec.norm_width.is_some() {
            return refuse("the residual stream has other bases already; start from the original model");
        }
        if !self.names.attn_post_norm.is_empty()
            || !self.names.mlp_post_norm.is_empty()
            || self.names.gain_offset != 0.0
        {
            return refuse("norms behind attention and MLP have gains that depend on the basis");
        }
        let mixture = |b: &BlockSpec| !matches!(b.mlp, MlpSpec::Gated { .. } | MlpSpec::Plain { .. });
        if self.spec.blocks.iter().any(mixture) {
            return refuse("the experts of a mixture are not reached");
        }
        if self.spec.blocks.iter().any(|b| b.latent.is_some()) {
            return refuse("the matrices of latent attention are not reached");
        }
        if self.spec.per_layer_inputs() > 0 {
            return refuse("per-layer embeddings have a norm behind them, whose gains depend on the basis");
        }
        Ok(())
    }

    /// What a user should know of other bases.
    pub(super) fn rotation_notes(&self) -> Option<String> {
        let sliced = self.sliced.as_ref()?;
        Some(format!(
            "the residual stream has {} of {} coordinates and shortcut matrices in every block: only Lacuna reads this model. \
             `transformers`, llama.cpp and vLLM have no such blocks; `model_type` in config.json begins with `lacuna_` so that they \
             refuse it",
            sliced.spec.width, sliced.before
        ))
    }
}

/// Changes the configuration of the model to that of the output.
pub fn configure(config: &mut Value, plan: &Plan<'_>, sliced: &Sliced) {
    config[plan.names.width] = json!(sliced.spec.width);
    config[NORM_WIDTH] = json!(sliced.before);
    config["tie_word_embeddings"] = json!(false);
    // It no longer follows from the width.
    if let (Some(block), true) = (sliced.spec.blocks.first(), config.get("head_dim").is_none_or(Value::is_null)) {
        config["head_dim"] = json!(block.head_dim);
    }
    let arch = ARCHITECTURES.iter().find(|a| a.name == sliced.spec.arch);
    if let (Some(arch), true) = (arch, config.get("architectures").is_none_or(Value::is_null)) {
        config["architectures"] = json!(arch.classes.first().into_iter().collect::<Vec<_>>());
    }
    // Programs that go by this name alone must not load the matrices without their shortcuts.
    let of = config.get("model_type").and_then(Value::as_str).unwrap_or(&sliced.spec.arch);
    config["model_type"] = json!(format!("lacuna_{}", of.strip_prefix("lacuna_").unwrap_or(of)));
}

/// One run over all blocks.
///
/// # Errors
/// As [`super::compress`].
pub fn run(request: &Request, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Report> {
    let options = LoadOptions::default();
    let checkpoint = Checkpoint::open(&request.model, &options)?;
    let mut plan = Plan::new(request, &checkpoint)?;
    let model = Checkpoint::open(&request.model, &options)?.bind()?;
    plan.check_formats(&model)?;
    let files = lock::source_files(&request.model)?;
    lock::check(request, checkpoint.hash(), &files)?;
    let source = &checkpoint.source;
    let prefix = prefix(source, checkpoint.names);
    plan.sliced = plan.sliced(prefix);
    plan.check_space(source)?;
    let work = Work::open(&request.output, &plan.key(&files, None))?;
    let (Some((step, rotator)), Some(sliced)) = (rotator(&request.steps), &plan.sliced) else {
        return Err(Error::Argument { name: "steps", problem: "none of them turns the residual stream".into() });
    };
    let mut hidden = if plan.sight() == Sight::Nothing { None } else { plan.embed(&model, &work.spill())? };
    let runner = Runner::new(&model, 0, model.blocks[0].clone(), request.threads)?;
    let walk = Walk { plan: &plan, model: &model, source, prefix, sliced, step, rotator, runner };
    let mut report = Report::default();
    let mut blocks = Vec::new();
    let mut incoming = walk.first(hidden.as_mut())?;
    let all = model.blocks.len();
    for layer in 0..all {
        progress(Progress::Block(layer, all));
        let (tensors, note) = match work.block(layer) {
            Some((tensors, note)) => {
                report.resumed += 1;
                if let Some(hidden) = &mut hidden {
                    walk.replay(layer, &incoming, &tensors, hidden)?;
                }
                (tensors, note)
            }
            None => {
                let done = walk.block(layer, &incoming, hidden.as_mut())?;
                let layers = plan.with_bytes(layer, source, done.layers, &done.tensors);
                layers.iter().for_each(|l| progress(Progress::Layer(l)));
                work.add(layer, &done.tensors, layers, done.notes)?
            }
        };
        let lost = note.layers.iter().find(|l| l.proj == Proj::Down.name()).and_then(|l| l.output_error);
        incoming = walk.found(&tensors, "out", lost)?;
        release(&model, layer);
        report.layers.extend(note.layers);
        report.notes.extend(note.notes);
        blocks.push(tensors);
    }
    report.notes.extend(plan.rotation_notes());
    drop((walk, hidden));
    progress(Progress::Block(all, all));
    let lock = lock::lock(request, checkpoint.hash(), &files, &report);
    report.bytes = output::write(&plan, &blocks, &lock)?;
    drop(blocks);
    work.remove()?;
    Ok(report)
}
