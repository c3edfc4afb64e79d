//! From a stored plan to what decode follows: which entries pay, which weights are needed input-major, and the model
//! with those weights in place, so that prefill reads the same copy and the original's pages stay untouched.

use super::{
    break_even::BreakEven,
    compiled::{CompiledPlan, InputRule, LayerPlan, NeuronRule},
    layouts::{LayoutCache, Wanted},
    transpose::input_major_format,
};
use crate::{
    error::Result,
    model::weights::{Mlp, Model},
};
use lacuna_core::{
    method::MethodError,
    plan::{Entry, Plan, Rule, Selector},
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Format, Pool};
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// Where copies are kept, and from which kept share on dense is faster.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Converted layouts.
    pub cache: LayoutCache,
    /// The dense fall-back.
    pub break_even: BreakEven,
}

impl CompileOptions {
    /// The user's cache for the model of this hash, and what was measured on this machine with `threads`.
    pub fn for_model(root: Option<&Path>, hash: &str, threads: usize) -> Self {
        Self { cache: LayoutCache::new(root, hash), break_even: BreakEven::load(root, threads) }
    }
}

/// A plan on a model, ready for an engine.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The model with input-major weights where the plan reads columns. Use it for the engine that follows the plan.
    pub model: Arc<Model>,
    /// What decode follows.
    pub plan: Arc<CompiledPlan>,
    /// What a user should know: dense fall-backs and weights that were quantised again.
    pub notes: Vec<String>,
}

/// One sparse place after the fall-back.
struct Place {
    layer: usize,
    /// The projection that is read by columns.
    proj: Proj,
    selector: Selector,
    /// Whether the rule is on neurons (`proj` is then down).
    neurons: bool,
}

/// Binds `plan` to `model`. Missing layouts are made by the threads of `pool`, with `progress(done, all)` called from
/// them.
///
/// # Errors
/// The plan was made for another model, or names a projection that a layer does not have.
pub fn compile(
    plan: &Plan,
    model: &Arc<Model>,
    options: &CompileOptions,
    pool: &Pool,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Compiled> {
    check(plan, model)?;
    let mut notes = Notes::default();
    let mut places = Vec::new();
    for entry in &plan.entries {
        let place = place(entry, model)?;
        match dense_share(entry, weight_of(model, &place)?, &options.break_even) {
            Some(reason) => notes.add(reason, entry),
            None => places.push(place),
        }
    }
    let weights = input_major_weights(model, &places, options, pool, progress, &mut notes)?;
    let mut changed = Model::clone(model);
    let mut layers = vec![LayerPlan::default(); model.blocks.len()];
    for (place, weight) in places.iter().zip(weights) {
        if let Some(linear) = changed.blocks[place.layer].linear_mut(place.proj) {
            linear.weight = weight.clone();
        }
        let layer = &mut layers[place.layer];
        if place.neurons {
            layer.neurons = Some(NeuronRule { selector: place.selector, down: weight });
        } else {
            layer.inputs[place.proj as usize] = Some(InputRule { selector: place.selector, weight });
        }
    }
    let notes = notes.lines();
    notes.iter().for_each(|n| tracing::info!("{n}"));
    Ok(Compiled { model: Arc::new(changed), plan: Arc::new(CompiledPlan { layers }), notes })
}

fn check(plan: &Plan, model: &Model) -> Result<(), MethodError> {
    if plan.model != model.hash {
        let (plan, model) = (plan.model.clone(), model.hash.clone());
        return Err(MethodError::OtherModel { path: "(in memory)".into(), plan, model });
    }
    plan.check(model.blocks.len()).map_err(|reason| MethodError::Plan { path: "(in memory)".into(), reason })
}

fn place(entry: &Entry, model: &Model) -> Result<Place, MethodError> {
    let layer = entry.layer;
    let gated = matches!(model.blocks[layer].mlp, Mlp::Gated(_));
    Ok(match entry.rule {
        Rule::Inputs { proj, selector } => Place { layer, proj, selector, neurons: false },
        // In a plain MLP the activated neurons are the inputs of down; up must be computed anyway.
        Rule::Neurons { selector } => Place { layer, proj: Proj::Down, selector, neurons: gated },
    })
}

fn weight_of<'m>(model: &'m Model, place: &Place) -> Result<&'m Weight, MethodError> {
    let linear = model.blocks[place.layer].linear(place.proj);
    linear.map(|l| &l.weight).ok_or_else(|| MethodError::NotApplicable {
        method: "(plan)".into(),
        reason: format!("layer {} has no single {} (an MLP without gate, or experts)", place.layer, place.proj),
    })
}

/// Why an entry does not pay, if it does not.
fn dense_share(entry: &Entry, weight: &Weight, break_even: &BreakEven) -> Option<String> {
    let (format, _) = copy_format(weight);
    let limit = break_even.share(format);
    entry.kept.filter(|k| *k > limit)?;
    let place = match entry.rule {
        Rule::Inputs { proj, .. } => proj.name(),
        Rule::Neurons { .. } => "neurons",
    };
    Some(format!("{place} stays dense: more than {limit:.2} is kept, the break-even share of {}", format.name()))
}

fn copy_format(weight: &Weight) -> (Format, Option<String>) {
    match weight.orientation() {
        Orientation::InputMajor => (weight.format(), None),
        Orientation::OutputMajor => input_major_format(weight.format(), weight.outputs()),
    }
}

/// The weight of every place in input-major form, in their order.
fn input_major_weights(
    model: &Model,
    places: &[Place],
    options: &CompileOptions,
    pool: &Pool,
    progress: &(dyn Fn(usize, usize) + Sync),
    notes: &mut Notes,
) -> Result<Vec<Weight>> {
    let mut wanted = Vec::new();
    let mut weights = Vec::with_capacity(places.len());
    for place in places {
        let weight = weight_of(model, place)?;
        if let Some(note) = copy_format(weight).1 {
            notes.count(format!("{}: {note}", place.proj), place.layer, None);
        }
        if weight.orientation() == Orientation::OutputMajor {
            wanted.push(Wanted { layer: place.layer, proj: place.proj, weight });
        }
        weights.push(weight.clone());
    }
    let mut copies = options.cache.input_major(&wanted, pool, progress).into_iter();
    for weight in weights.iter_mut().filter(|w| w.orientation() == Orientation::OutputMajor) {
        *weight = copies.next().expect("one copy was made for every output-major weight");
    }
    Ok(weights)
}

/// Notes with the layers they hold for, so that a user reads a line per kind and not one per matrix.
#[derive(Default)]
struct Notes(BTreeMap<String, Vec<(usize, Option<f32>)>>);

impl Notes {
    fn add(&mut self, text: String, entry: &Entry) {
        self.count(text, entry.layer, entry.kept);
    }

    fn count(&mut self, text: String, layer: usize, kept: Option<f32>) {
        self.0.entry(text).or_default().push((layer, kept));
    }

    fn lines(self) -> Vec<String> {
        let line = |(text, layers): (String, Vec<(usize, Option<f32>)>)| {
            let shown = layers.iter().take(8).map(|(layer, kept)| match kept {
                Some(k) => format!("{layer} (kept {k:.2})"),
                None => layer.to_string(),
            });
            let rest = if layers.len() > 8 { format!(", and {} more", layers.len() - 8) } else { String::new() };
            format!("{text}; layers {}{rest}", shown.collect::<Vec<_>>().join(", "))
        };
        self.0.into_iter().map(line).collect()
    }
}
