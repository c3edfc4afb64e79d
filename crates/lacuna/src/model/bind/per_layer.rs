//! The weights of per-layer embeddings.

use super::Binder;
use crate::{
    error::Result,
    model::{
        spec::PerLayer,
        weights::{PerLayerBranch, PerLayerInputs},
    },
};

impl Binder<'_> {
    /// What gives the inputs of all blocks.
    pub(super) fn per_layer_inputs(&self) -> Result<Option<PerLayerInputs>> {
        let (n, inputs) = (&self.names.per_layer, self.spec.per_layer_inputs());
        let Some(first) = self.spec.blocks.iter().find_map(|b| b.per_layer) else { return Ok(None) };
        Ok(Some(PerLayerInputs {
            projection: self.linear(n.projection, &[], inputs, self.spec.width)?,
            norm: self.norm(n.norm, &[], first.width)?,
            table: self.source.matrix(&self.name(n.table, &[], "weight"), self.spec.vocab, inputs)?,
        }))
    }

    /// What block `i` makes of its own.
    pub(super) fn per_layer(&self, i: usize, p: PerLayer) -> Result<PerLayerBranch> {
        let (n, width) = (&self.names.per_layer, self.spec.width);
        Ok(PerLayerBranch {
            gate: self.linear(n.gate, &[i], p.width, width)?,
            out: self.linear(n.out, &[i], width, p.width)?,
            norm: self.norm(n.out_norm, &[i], width)?,
        })
    }
}
