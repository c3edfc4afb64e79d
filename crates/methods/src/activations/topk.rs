//! `topk`: keep the k neurons of a MLP whose activated gate is largest.
//!
//! Li et al., The Lazy Neuron Phenomenon (arXiv:2210.06313), whose Top-k Transformer keeps the k largest entries of
//! `ReLU(W_1 x)` per token, without rescaling; models trained so run as they were trained. Without training it is CATS
//! with a fixed count instead of a threshold (Sirius' authors found that thresholds drift between tasks). Exact
//! selection per token, ties to the lower neuron. Needs no calibration text.

use crate::common::{SPARSITY, mlp_layers, not_applicable, top};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule},
    site::{Proj, Site},
    weight::Orientation,
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

    fn layouts(&self) -> &'static [Orientation] {
        &[Orientation::OutputMajor, Orientation::InputMajor]
    }

    fn needs(&self, _: &Params, _: PlanContext<'_>) -> Needs {
        Needs::default()
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let mut entries = Vec::new();
        for (layer, inner) in mlp_layers(&ctx) {
            let (selector, kept) = top(inner, None, ctx.dropped(layer, Proj::Up, params.get("sparsity")));
            entries.push(Entry { layer, rule: Rule::neurons(selector), kept: Some(kept) });
        }
        if entries.is_empty() {
            return not_applicable(self, "it has no MLP outside experts");
        }
        Ok(entries)
    }
}
