//! `relu`: skip the neurons that a ReLU closed. Exact: what is skipped is multiplied by zero in the dense pass.
//!
//! Observation: Li et al., The Lazy Neuron Phenomenon (arXiv:2210.06313); models made for it: ProSparse
//! (arXiv:2402.13516). The gate is computed in full, then only the rows of up and the columns of down whose gate is
//! not zero: with a kept share p the MLP reads (1 + 2p)/3 of its bytes. Fails (and says so) on activations that never
//! return exact zeros.

use crate::common::{closed_neurons, neuron_magnitudes};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule, Selector},
    site::{Point, Site},
};

/// Exact neuron skipping.
#[derive(Debug)]
pub struct Relu;

impl Method for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn title(&self) -> &'static str {
        "Exact ReLU neuron skipping"
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
        "Computes the gate, then only the rows of up and the columns of down whose gate is not zero. Lossless; for models with ReLU or squared ReLU."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[]
    }

    fn needs(&self, _: &Params, ctx: PlanContext<'_>) -> Needs {
        Needs { observations: neuron_magnitudes(&ctx), tokens: 0 }
    }

    fn plan(&self, _: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        closed_neurons(self, &ctx, "teal", |layer| {
            let kept = ctx.statistics.magnitudes(Point::Neurons { layer }).map(|h| h.nonzero_share() as f32);
            (Rule::neurons(Selector::non_zero()), kept)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NoWeights, layers};
    use lacuna_core::{
        method::{Budgets, LayerShape},
        observer::Observer,
        statistics::Statistics,
    };

    #[test]
    fn reports_the_share_it_saw_and_plans_without_one() {
        let (layers, budgets) = (layers(2, "relu"), Budgets::default());
        let params = Params::new(&Relu, []).unwrap();
        fn ctx<'a>(layers: &'a [LayerShape], statistics: &'a Statistics, budgets: &'a Budgets) -> PlanContext<'a> {
            PlanContext { layers, statistics, weights: &NoWeights, budgets }
        }
        let wanted = Relu.needs(&params, ctx(&layers, &Statistics::default(), &budgets)).observations;
        let mut statistics = Statistics::new(wanted);
        let plan = |s: &Statistics| Relu.plan(&params, ctx(&layers, s, &budgets)).unwrap();
        assert_eq!(plan(&statistics)[1].kept, None);
        statistics.observe(Point::Neurons { layer: 1 }, 4, &[0.0, 1.0, 0.0, 0.0]);
        assert_eq!((plan(&statistics)[0].kept, plan(&statistics)[1].kept), (None, Some(0.25)));
    }

    #[test]
    fn refuses_smooth_activations() {
        let (layers, budgets, nothing) = (layers(1, "silu"), Budgets::default(), Statistics::default());
        let params = Params::new(&Relu, []).unwrap();
        let ctx = PlanContext { layers: &layers, statistics: &nothing, weights: &NoWeights, budgets: &budgets };
        let e = Relu.plan(&params, ctx).unwrap_err();
        assert!(e.to_string().contains("`silu`"), "{e}");
    }
}
