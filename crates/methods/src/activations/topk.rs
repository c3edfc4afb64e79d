//! `topk`: keep the k neurons of a MLP whose activated gate is largest.
//!
//! Li et al., The Lazy Neuron Phenomenon (arXiv:2210.06313), whose Top-k Transformer keeps the k largest entries of
//! `ReLU(W_1 x)` per token, without rescaling; models trained so run as they were trained. Without training it is CATS
//! with a fixed count instead of a threshold (Sirius' authors found that thresholds drift between tasks). Exact
//! selection per token, ties to the lower neuron. Needs no calibration text.

use crate::common::{SPARSITY, neurons, top};
use lacuna_core::{
    method::{Citation, Method, MethodError, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule},
    site::{Proj, Site},
};

/// Top-k neurons.
#[derive(Debug)]
pub struct TopK;

impl Method for TopK {
    fn name(&self) -> &'static str {
        "topk"
    }

    fn title(&self) -> &'static str {
        "Top-k neurons"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers (2022)",
            arxiv: Some("2210.06313"),
        }
    }

    fn summary(&self) -> &'static str {
        "Computes the gate, then only the rows of up and columns of down of the k neurons with the largest activated gate."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[SPARSITY]
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        neurons(self, &ctx, |layer, shape| {
            let (selector, kept) = top(shape.inner, None, ctx.dropped(layer, Proj::Up, params.get("sparsity")));
            Ok((Rule::neurons(selector), Some(kept)))
        })
    }
}
