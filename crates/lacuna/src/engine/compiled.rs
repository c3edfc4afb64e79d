//! A plan bound to the weights it is used on: what decode asks, per layer and projection, and what it counts.

use super::transpose::CopyForm;
use crate::model::weights::Linear;
use lacuna_core::{
    plan::{Cut, Selector, Stage},
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::axpy::groups;

/// Bytes that decode reads of a weight by its channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reads {
    channel: usize,
    /// Of every group of channels that one of them is in; 0 where channels bring their own scales.
    group: usize,
}

/// Channels that share what [`Reads`] counts once.
const GROUP: u32 = 32;

impl Reads {
    /// Of `weight`, or of the copy that is made of an output-major one.
    pub fn of(weight: &Weight) -> Self {
        let (outputs, inputs) = (weight.outputs(), weight.inputs());
        let (form, _) = CopyForm::for_weight(weight);
        let all = form.bytes(outputs, inputs).unwrap_or(outputs * inputs * 4);
        let channel = match form.orientation {
            Orientation::InputGroups => groups::channel_bytes(form.format, outputs).unwrap_or(outputs),
            _ => all / inputs.max(1),
        };
        let groups = inputs.div_ceil(GROUP as usize).max(1);
        Self { channel, group: (all - (channel * inputs).min(all)) / groups }
    }

    /// Bytes for `kept` channels in `groups` groups.
    pub fn bytes(self, kept: Kept) -> u64 {
        kept.channels * self.channel as u64 + kept.groups * self.group as u64
    }
}

/// Channels that stayed, and the groups that they are in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Channels.
    pub channels: u64,
    /// Groups of 32 with one of them at least.
    pub groups: u64,
}

impl Kept {
    /// Of a list of channels, in ascending order.
    pub fn of(index: &[u32]) -> Self {
        let groups = index.chunk_by(|a, b| a / GROUP == b / GROUP).count();
        Self { channels: index.len() as u64, groups: groups as u64 }
    }
}

/// Input channels of one projection are selected; the kept columns are read.
#[derive(Clone, Debug)]
pub struct InputRule {
    /// Which channels stay.
    pub selector: Selector,
    /// The projection's weight: an input-major copy, or for masked passes the weight itself.
    pub weight: Weight,
    /// What its channels read.
    pub reads: Reads,
    /// What the dropped channels pass through: `V`, then `U`.
    pub low_rank: Option<(Linear, Linear)>,
}

impl InputRule {
    /// A rule on an input-major weight.
    pub fn new(selector: Selector, weight: Weight) -> Self {
        let reads = Reads::of(&weight);
        Self { selector, weight, reads, low_rank: None }
    }
}

/// How the neurons of an MLP are chosen.
#[derive(Clone, Debug)]
pub enum ChosenBy {
    /// By the gate (in a plain MLP: by up), before or after its activation.
    Gate(Stage),
    /// By a predictor that reads the input of the MLP: `A`, whether a ReLU follows, `B`.
    Predictor {
        /// `A`, `[rank, width]`.
        down: Linear,
        /// Whether there is a ReLU between.
        relu: bool,
        /// `B`, `[neurons, rank]`.
        up: Linear,
    },
}

/// Neurons of an MLP are selected.
#[derive(Clone, Debug)]
pub struct NeuronRule {
    /// What is looked at.
    pub by: ChosenBy,
    /// Which neurons stay.
    pub selector: Selector,
    /// Which of them stay for down, by their product.
    pub then: Option<Selector>,
    /// The down projection: an input-major copy, or for masked passes the weight itself.
    pub down: Weight,
    /// What its neurons read of down.
    pub reads: Reads,
}

impl NeuronRule {
    /// A rule on the activated gate with an input-major down projection.
    pub fn new(selector: Selector, down: Weight) -> Self {
        let reads = Reads::of(&down);
        Self { by: ChosenBy::Gate(Stage::Activated), selector, then: None, down, reads }
    }

    /// Whether the list is the same for every token, so that the gate is not needed to choose.
    pub(super) fn is_fixed(&self) -> bool {
        matches!(self.selector.cut, Cut::Listed { .. } | Cut::Prompt { .. })
    }

    /// Whether all rows of the first projection are computed before neurons are chosen.
    pub(super) fn reads_gate(&self) -> bool {
        matches!(self.by, ChosenBy::Gate(_)) && !self.is_fixed()
    }

    /// Bytes of the predictor, 0 without one.
    pub(super) fn predictor_bytes(&self) -> u64 {
        match &self.by {
            ChosenBy::Gate(_) => 0,
            ChosenBy::Predictor { down, up, .. } => (down.weight.bytes().len() + up.weight.bytes().len()) as u64,
        }
    }

    /// Whether decode can follow it: down can be read by neurons.
    pub(super) fn by_channels(&self) -> bool {
        self.down.orientation() != Orientation::OutputMajor
    }
}

/// What one layer skips.
#[derive(Clone, Debug, Default)]
pub struct LayerPlan {
    /// Per projection, in the order of [`Proj::ALL`].
    pub inputs: [Option<InputRule>; 7],
    /// The neurons of the MLP; goes before rules on `up` and `down`.
    pub neurons: Option<NeuronRule>,
    /// The neurons of each expert of a mixture; empty where they are dense.
    pub experts: Vec<NeuronRule>,
}

impl LayerPlan {
    /// The rule on the inputs of `proj`.
    pub fn input(&self, proj: Proj) -> Option<&InputRule> {
        self.inputs[proj as usize].as_ref()
    }
}

/// What every layer skips while decoding; prefill is dense unless a rule is part of what the model computes.
#[derive(Clone, Debug, Default)]
pub struct CompiledPlan {
    /// One per block of the model.
    pub layers: Vec<LayerPlan>,
    /// Made for masked passes only (measures of quality): the weights stay as they are, and nothing is saved.
    pub masked: bool,
}

impl CompiledPlan {
    /// Whether a rule is part of what the model computes, so that no pass may go without the plan.
    pub(super) fn is_of_the_model(&self) -> bool {
        self.layers.iter().flat_map(|l| l.inputs.iter().flatten()).any(|rule| rule.selector.unit)
    }
}

/// How much of one site was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SiteCount {
    /// Entries that stayed.
    pub kept: u64,
    /// Entries in all.
    pub total: u64,
}

impl SiteCount {
    /// Share that stayed, 1 where nothing was counted.
    pub fn share(&self) -> f64 {
        if self.total == 0 { 1.0 } else { self.kept as f64 / self.total as f64 }
    }

    pub(super) fn add(&mut self, kept: usize, total: usize) {
        self.kept += kept as u64;
        self.total += total as u64;
    }
}

/// What one layer's decode steps used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerCounts {
    /// Input channels per projection, in the order of [`Proj::ALL`].
    pub inputs: [SiteCount; 7],
    /// Neurons.
    pub neurons: SiteCount,
}

/// What the decode steps of a session have used so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Decode steps.
    pub steps: u64,
    /// Bytes of weights that they read.
    pub weight_bytes: u64,
    /// Bytes of keys and values that they read.
    pub kv_bytes: u64,
    /// Kept and total entries, one per block; zero where no rule applies.
    pub layers: Vec<LayerCounts>,
}

impl Counters {
    pub(super) fn new(layers: usize) -> Self {
        Self { layers: vec![LayerCounts::default(); layers], ..Self::default() }
    }

    /// Bytes that a step read on average.
    pub fn bytes_per_token(&self) -> f64 {
        if self.steps == 0 { 0.0 } else { (self.weight_bytes + self.kv_bytes) as f64 / self.steps as f64 }
    }

    /// Entries of one projection's inputs over all layers.
    pub fn input(&self, proj: Proj) -> SiteCount {
        self.sum(|l| l.inputs[proj as usize])
    }

    /// Neurons over all layers.
    pub fn neurons(&self) -> SiteCount {
        self.sum(|l| l.neurons)
    }

    fn sum(&self, of: impl Fn(&LayerCounts) -> SiteCount) -> SiteCount {
        self.layers
            .iter()
            .map(of)
            .fold(SiteCount::default(), |a, b| SiteCount { kept: a.kept + b.kept, total: a.total + b.total })
    }
}
