//! `drelu`: skip what a ReLU closed on either branch. Exact.
//!
//! Song et al., Turbo Sparse (arXiv:2406.05955): models trained with `h = ReLU(g) * ReLU(u)` have about 90 % zeros in
//! `h`. The gate is computed in full, up only where the gate is open, and the columns of down only where the product is
//! not zero: `(1 + p1 + p)/3` of the MLP's bytes for shares `p1` of open gates and `p` of products. On a model with ReLU
//! on the gate alone the second selection finds nothing more, and it equals `relu`.

use crate::common::{closed_neurons, neuron_magnitudes};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule, Selector, Stage},
    site::{Point, Site},
};

/// Exact skipping on both branches.
#[derive(Debug)]
pub struct DRelu;

impl Method for DRelu {
    fn name(&self) -> &'static str {
        "drelu"
    }

    fn title(&self) -> &'static str {
        "dReLU, exact skipping on both branches"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Turbo Sparse: Achieving LLM SOTA Performance with Minimal Activated Parameters (2024)",
            arxiv: Some("2406.05955"),
        }
    }

    fn summary(&self) -> &'static str {
        "Computes the gate, up where the gate is not zero, and down where their product is not zero. Lossless; for models with ReLU."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[]
    }

    fn needs(&self, _: &Params, ctx: PlanContext<'_>) -> Needs {
        Needs { observations: neuron_magnitudes(&ctx), tokens: 0 }
    }

    fn plan(&self, _: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        closed_neurons(self, &ctx, "cats", |layer| {
            let kept = ctx.statistics.magnitudes(Point::Neurons { layer }).map(|h| h.nonzero_share() as f32);
            let (on, selector) = (Stage::Activated, Selector::non_zero());
            (Rule::Neurons { on, selector, then: Some(Selector::non_zero()) }, kept)
        })
    }
}
