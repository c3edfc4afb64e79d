//! From a stored plan to what decode follows: which entries pay, which weights are needed input-major, and the model
//! with those weights in place, so that prefill reads the same copy and the original's pages stay untouched.

use super::{
    break_even::BreakEven,
    compiled::{ChosenBy, CompiledPlan, InputRule, LayerPlan, NeuronRule, Reads},
    layouts::{LayoutCache, Wanted},
    transpose::CopyForm,
};
use crate::{
    error::Result,
    model::weights::{Linear, Mlp, Model},
};
use lacuna_core::{
    method::MethodError,
    plan::{Cut, Entry, Plan, Rule, Selector},
    site::Proj,
    tensor::Tensor,
    weight::{Orientation, Weight},
};
use lacuna_kernels::Pool;
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// Where copies are kept, and from which kept share on dense is faster.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Converted layouts.
    pub cache: LayoutCache,
    /// The dense fall-back.
    pub break_even: BreakEven,
    /// For masked passes only: no input-major copies are made, and decode saves nothing.
    pub masked: bool,
}

impl CompileOptions {
    /// The user's cache for the model of this hash, and what was measured on this machine with `threads`.
    pub fn for_model(root: Option<&Path>, hash: &str, threads: usize) -> Self {
        Self { cache: LayoutCache::new(root, hash), break_even: BreakEven::load(root, threads), masked: false }
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
struct Place<'p> {
    layer: usize,
    /// The projection that is read by columns.
    proj: Proj,
    /// Which expert's; 0 where there are none.
    expert: usize,
    rule: &'p Rule,
}

impl<'p> Place<'p> {
    /// The places of one entry: one, or one per expert.
    fn all(entry: &'p Entry, model: &Model) -> Result<Vec<Self>, MethodError> {
        let Entry { layer, rule, .. } = entry;
        let proj = columns_of(rule);
        let block = &model.blocks[*layer];
        let reaches = match (&block.mlp, rule) {
            (Mlp::Experts { .. }, Rule::Neurons { selector, .. }) => !matches!(selector.cut, Cut::Prompt { .. }),
            _ => block.linear(proj).is_some(),
        };
        if !reaches {
            let place = rule.place();
            let reason = format!("layer {layer} has no {place} for it (an MLP without gate, or experts)");
            return Err(not_applicable(reason));
        }
        Ok((0..block.parts(proj).len()).map(|expert| Self { layer: *layer, proj, expert, rule }).collect())
    }

    fn weight<'m>(&self, model: &'m Model) -> &'m Weight {
        &model.blocks[self.layer].parts(self.proj)[self.expert].weight
    }
}

/// Binds `plan` to `model`. Missing layouts are made by the threads of `pool`, with `progress(done, all)` called from
/// them.
///
/// # Errors
/// The plan was made for another model, names a projection that a layer does not have, or holds vectors that do not fit.
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
        let all = Place::all(entry, model)?;
        let weight = all.first().map(|p| p.weight(model));
        match weight.and_then(|w| dense_share((plan, entry), (model, w), &options.break_even)) {
            Some(reason) => notes.add(reason, entry),
            None => places.extend(all),
        }
    }
    let weights = match options.masked {
        true => places.iter().map(|p| p.weight(model).clone()).collect(),
        false => channel_weights(model, &places, options, pool, progress, &mut notes),
    };
    let mut changed = Model::clone(model);
    let mut layers = vec![LayerPlan::default(); model.blocks.len()];
    for (place, weight) in places.iter().zip(weights) {
        set_rule(&mut layers[place.layer], place, model, weight.clone())?;
        if let Some(linear) = changed.blocks[place.layer].part_mut(place.proj, place.expert) {
            linear.weight = weight;
        }
    }
    let notes = notes.lines();
    notes.iter().for_each(|n| tracing::info!("{n}"));
    let plan = CompiledPlan { layers, masked: options.masked };
    Ok(Compiled { model: Arc::new(changed), plan: Arc::new(plan), notes })
}

/// What masked passes need for one layer: the rules of `entries`, on the weights as they are, without any fall-back.
///
/// # Errors
/// As [`compile`].
pub fn masked_layer(entries: &[Entry], model: &Model, layer: usize) -> Result<LayerPlan> {
    let mut rules = LayerPlan::default();
    for entry in entries.iter().filter(|e| e.layer == layer) {
        for place in Place::all(entry, model)? {
            set_rule(&mut rules, &place, model, place.weight(model).clone())?;
        }
    }
    Ok(rules)
}

/// Puts one rule into its layer, with its vectors checked against the weight.
fn set_rule(layer: &mut LayerPlan, place: &Place<'_>, model: &Model, weight: Weight) -> Result<(), MethodError> {
    let (outputs, inputs) = (weight.outputs(), weight.inputs());
    let at = |problem: String| not_applicable(format!("layer {}, {}: it {problem}", place.layer, place.rule.place()));
    place.rule.selector().check_width(inputs).map_err(at)?;
    let reads = Reads::of(&weight);
    match place.rule {
        Rule::Inputs { proj, selector, low_rank } => {
            let low_rank = match low_rank {
                None => None,
                Some(l) => {
                    let rank = l.down.shape().first().copied().unwrap_or(0);
                    Some((linear(&l.down, rank, inputs).map_err(at)?, linear(&l.up, outputs, rank).map_err(at)?))
                }
            };
            let rule = InputRule { selector: selector.clone(), weight, reads, low_rank };
            layer.inputs[*proj as usize] = Some(rule);
        }
        Rule::Neurons { on, selector, then } => {
            let by = ChosenBy::Gate(*on);
            let rule = neuron_rule(by, (selector, then), weight, reads).map_err(at)?;
            match model.blocks[place.layer].mlp {
                Mlp::Experts { .. } => layer.experts.push(rule),
                _ => layer.neurons = Some(rule),
            }
        }
        Rule::Predicted { predictor, selector, then } => {
            let rank = predictor.down.shape().first().copied().unwrap_or(0);
            let width = predictor.down.shape().get(1).copied().unwrap_or(0);
            let by = ChosenBy::Predictor {
                down: linear(&predictor.down, rank, width).map_err(at)?,
                relu: predictor.relu,
                up: linear(&predictor.up, inputs, rank).map_err(at)?,
            };
            if width != outputs {
                return Err(at(format!("has a predictor of width {width} for a model of width {outputs}")));
            }
            layer.neurons = Some(neuron_rule(by, (selector, then), weight, reads).map_err(at)?);
        }
    }
    Ok(())
}

fn neuron_rule(
    by: ChosenBy,
    (selector, then): (&Selector, &Option<Selector>),
    down: Weight,
    reads: Reads,
) -> Result<NeuronRule, String> {
    then.as_ref().map_or(Ok(()), |t| t.check_width(down.inputs()))?;
    Ok(NeuronRule { by, selector: selector.clone(), then: then.clone(), down, reads })
}

/// A matrix of the plan as a linear layer of the expected shape.
fn linear(tensor: &Tensor, outputs: usize, inputs: usize) -> Result<Linear, String> {
    let wrong = || format!("has a matrix of shape {:?} where [{outputs}, {inputs}] is needed", tensor.shape());
    let format = tensor.dtype().and_then(|d| d.format()).ok_or_else(wrong)?;
    if tensor.shape() != [outputs, inputs] || outputs == 0 || inputs == 0 {
        return Err(wrong());
    }
    let weight = Weight::new(format, Orientation::OutputMajor, outputs, inputs, tensor.bytes()).ok_or_else(wrong)?;
    Ok(Linear { weight, bias: None })
}

fn not_applicable(reason: String) -> MethodError {
    MethodError::NotApplicable { method: "(plan)".into(), reason }
}

fn check(plan: &Plan, model: &Model) -> Result<(), MethodError> {
    if plan.model != model.hash {
        let (plan, model) = (plan.model.clone(), model.hash.clone());
        return Err(MethodError::OtherModel { path: "(in memory)".into(), plan, model });
    }
    plan.check(model.blocks.len()).map_err(|reason| MethodError::Plan { path: "(in memory)".into(), reason })
}

/// The projection of a rule that is read by columns.
fn columns_of(rule: &Rule) -> Proj {
    match rule {
        Rule::Inputs { proj, .. } => *proj,
        Rule::Neurons { .. } | Rule::Predicted { .. } => Proj::Down,
    }
}

/// Why an entry of a plan does not pay, if it does not. Projections of one vector are followed together or not at all: a part of
/// them dense and a part sparse costs a region of its own, and both forms of the vector.
fn dense_share(
    (plan, entry): (&Plan, &Entry),
    (model, weight): (&Model, &Weight),
    break_even: &BreakEven,
) -> Option<String> {
    if entry.rule.selector().unit {
        return None;
    }
    let block = &model.blocks[entry.layer];
    let company: Vec<_> = match entry.rule {
        Rule::Inputs { proj, .. } => {
            let reads_the_same = |e: &&Entry| {
                e.layer == entry.layer
                    && matches!(e.rule, Rule::Inputs { proj: other, .. } if of_one_vector(proj, other))
                    && block.linear(columns_of(&e.rule)).is_some()
            };
            plan.entries.iter().filter(reads_the_same).collect()
        }
        _ => vec![entry],
    };
    let (mut all, mut kept) = (0.0, 0.0);
    for e in &company {
        let weight = block.linear(columns_of(&e.rule)).map_or(weight, |l| &l.weight);
        let bytes = weight.bytes().len() as f32;
        all += bytes;
        kept += bytes * (e.kept? + low_rank_share(&e.rule, weight));
    }
    let format = CopyForm::for_weight(weight).0.format;
    let limit = break_even.share(format);
    let place = entry.rule.place();
    let together = if company.len() > 1 { " on average of what reads the same vector" } else { "" };
    let reason = format!("more than {limit:.2} is kept{together}, the break-even share of {}", format.name());
    (kept > limit * all).then(|| format!("{place} stays dense: {reason}"))
}

/// Whether two projections read the same vector.
fn of_one_vector(a: Proj, b: Proj) -> bool {
    let group = |p| match p {
        Proj::Q | Proj::K | Proj::V => 0,
        Proj::O => 1,
        Proj::Gate | Proj::Up => 2,
        Proj::Down => 3,
    };
    group(a) == group(b)
}

/// Bytes of a rule's low-rank part relative to those of the weight.
fn low_rank_share(rule: &Rule, weight: &Weight) -> f32 {
    let Rule::Inputs { low_rank: Some(l), .. } = rule else { return 0.0 };
    (l.down.bytes().len() + l.up.bytes().len()) as f32 / weight.bytes().len().max(1) as f32
}

/// The weight of every place by its channels, in their order.
fn channel_weights(
    model: &Model,
    places: &[Place<'_>],
    options: &CompileOptions,
    pool: &Pool,
    progress: &(dyn Fn(usize, usize) + Sync),
    notes: &mut Notes,
) -> Vec<Weight> {
    let mut wanted = Vec::new();
    let mut weights = Vec::with_capacity(places.len());
    for place in places {
        let weight = place.weight(model);
        if let Some(note) = CopyForm::for_weight(weight).1 {
            notes.count(format!("{}: {note}", place.proj), place.layer, None);
        }
        if weight.orientation() == Orientation::OutputMajor {
            let expert = matches!(model.blocks[place.layer].mlp, Mlp::Experts { .. }).then_some(place.expert);
            wanted.push(Wanted { layer: place.layer, expert, proj: place.proj, weight });
        }
        weights.push(weight.clone());
    }
    let mut copies = options.cache.by_channels(&wanted, pool, progress).into_iter();
    for weight in weights.iter_mut().filter(|w| w.orientation() == Orientation::OutputMajor) {
        *weight = copies.next().expect("one copy was made for every output-major weight");
    }
    weights
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
