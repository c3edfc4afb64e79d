//! What all sessions of an engine share.

use super::{
    compiled::{CompiledPlan, NeuronRule},
    kv::BlockPool,
};
use crate::model::weights::Model;
use lacuna_kernels::{Pool, attention::KvType};
use std::sync::Arc;

pub(super) struct Shared {
    pub model: Arc<Model>,
    pub pool: Pool,
    pub kv: KvType,
    pub blocks: Arc<BlockPool>,
    pub prefill_chunk: usize,
    pub plan: Option<Arc<CompiledPlan>>,
}

impl Shared {
    /// The rule on the neurons of a layer.
    pub fn neuron_rule(&self, layer: usize) -> Option<&NeuronRule> {
        self.plan.as_ref()?.layers.get(layer)?.neurons.as_ref()
    }
}
