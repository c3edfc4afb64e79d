//! A plan bound to the weights it is used on: what decode asks, per layer and projection, and what it counts.

use lacuna_core::{plan::Selector, site::Proj, weight::Weight};

/// Input channels of one projection are selected; the kept columns are read.
#[derive(Clone, Debug)]
pub struct InputRule {
    /// Which channels stay.
    pub selector: Selector,
    /// Input-major copy of the projection's weight.
    pub weight: Weight,
}

/// Neurons of a gated MLP are selected on the activated gate.
#[derive(Clone, Debug)]
pub struct NeuronRule {
    /// Which neurons stay.
    pub selector: Selector,
    /// Input-major copy of the down projection; rows of up are read in place.
    pub down: Weight,
}

/// What one layer skips.
#[derive(Clone, Debug, Default)]
pub struct LayerPlan {
    /// Per projection, in the order of [`Proj::ALL`].
    pub inputs: [Option<InputRule>; 7],
    /// The neurons of the MLP; goes before rules on `up` and `down`.
    pub neurons: Option<NeuronRule>,
}

impl LayerPlan {
    /// The rule on the inputs of `proj`.
    pub fn input(&self, proj: Proj) -> Option<&InputRule> {
        self.inputs[proj as usize].as_ref()
    }
}

/// What every layer skips while decoding; prefill is dense.
#[derive(Clone, Debug, Default)]
pub struct CompiledPlan {
    /// One per block of the model.
    pub layers: Vec<LayerPlan>,
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
