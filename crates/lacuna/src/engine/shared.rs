//! What all sessions of an engine share.

use super::{compiled::CompiledPlan, kv::BlockPool};
use crate::model::weights::{Linear, Mlp, Model};
use lacuna_core::weight::{Orientation, Weight};
use lacuna_kernels::{Format, Pool, attention::KvType, convert::decode_run};
use std::sync::Arc;

pub(super) struct Shared {
    pub model: Arc<Model>,
    /// The model before its matrices became bitmaps, if some did.
    pub original: Option<Arc<Model>>,
    pub pool: Pool,
    pub kv: KvType,
    pub blocks: Arc<BlockPool>,
    pub prefill_chunk: usize,
    pub plan: Option<Arc<CompiledPlan>>,
    /// Per layer, the router in f32.
    pub routers: Vec<Option<Linear>>,
    /// Bytes that a step of the model as it was would read more than one of `original`, which is not that any more.
    pub saved: u64,
}

/// The routers of a mixture in f32: they are small, and a rounded score can send a token to another expert.
pub(super) fn routers(model: &Model) -> Vec<Option<Linear>> {
    let of = |mlp: &Mlp| match mlp {
        Mlp::Experts { router, .. } | Mlp::ReluExperts { router, .. } => {
            Some(Linear { weight: widened(&router.weight), bias: router.bias.clone() })
        }
        _ => None,
    };
    model.blocks.iter().map(|b| of(&b.mlp)).collect()
}

fn widened(w: &Weight) -> Weight {
    let (m, mut bytes) = (w.matrix(), Vec::new());
    let mut row = vec![0.0; m.cols()];
    for r in 0..m.rows() {
        decode_run(m.format(), m.row(r), &mut row);
        bytes.extend(row.iter().flat_map(|v| v.to_le_bytes()));
    }
    let (outputs, inputs) = (w.outputs(), w.inputs());
    // Runs keep their axis, so both orientations stay what they are.
    let orientation: Orientation = w.orientation();
    Weight::new(Format::F32, orientation, outputs, inputs, bytes.into()).expect("four bytes for every number")
}
