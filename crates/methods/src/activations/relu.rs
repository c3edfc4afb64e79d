//! `relu`: skip the neurons that a ReLU closed. Exact: what is skipped is multiplied by zero in the dense pass.
//!
//! Observation: Li et al., The Lazy Neuron Phenomenon (arXiv:2210.06313); models made for it: ProSparse
//! (arXiv:2402.13516). The gate is computed in full, then only the rows of up and the columns of down whose gate is
//! not zero: with a kept share p the MLP reads (1 + 2p)/3 of its bytes. Fails (and says so) on activations that never
//! return exact zeros.

use crate::common::{closed_neurons, mlp_layers, neuron_magnitudes};
use lacuna_core::{
    firing::{Firing, Sampling},
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule, Selector},
    site::{Point, Site},
    statistics::Observation,
};

/// Whole patterns of activity are kept of these tokens, for the report.
const SAMPLING: Sampling = Sampling { every: 4, most: 1024 };
/// What the report calls hot: the neurons that make this part of all activity.
const HOT: f64 = 0.8;
/// The report looks for neurons that fire together among so many of the hottest of a layer.
const HOTTEST: usize = 256;
/// They do if both are active at this part of the tokens at which one is.
const OVERLAP: f64 = 0.5;

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
        let mut observations = neuron_magnitudes(&ctx);
        observations.extend(mlp_layers(&ctx).map(|(layer, _)| Observation::firing(Point::Neurons { layer }, SAMPLING)));
        Needs { observations, tokens: 0 }
    }

    fn plan(&self, _: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        closed_neurons(self, &ctx, "teal", |layer| {
            let kept = ctx.statistics.magnitudes(Point::Neurons { layer }).map(|h| h.nonzero_share() as f32);
            (Rule::neurons(Selector::non_zero()), kept)
        })
    }

    fn report(&self, _: &Params, ctx: PlanContext<'_>, _: &[Entry]) -> Vec<String> {
        let layers = mlp_layers(&ctx).filter_map(|(layer, _)| ctx.statistics.firing(Point::Neurons { layer }));
        let layers: Vec<&Firing> = layers.collect();
        if layers.is_empty() {
            return Vec::new();
        }
        let hot: Vec<f64> = layers.iter().map(|f| 100.0 * f.hot_share(HOT)).collect();
        let (low, high) = hot.iter().fold((f64::MAX, 0.0_f64), |(l, h), x| (l.min(*x), h.max(*x)));
        let mean = hot.iter().sum::<f64>() / hot.len() as f64;
        let groups: Vec<_> = layers.iter().flat_map(|f| f.groups(HOTTEST, OVERLAP)).collect();
        let members: usize = groups.iter().map(Vec::len).sum();
        let largest = groups.iter().map(Vec::len).max().unwrap_or(0);
        vec![
            format!(
                "hot neurons: {mean:.1} % of a layer's neurons make {:.0} % of its activity ({low:.1} to {high:.1} % by layer)",
                100.0 * HOT
            ),
            format!(
                "firing together: of the {HOTTEST} hottest neurons of each layer, {members} are in {} groups (largest: \
                 {largest}) that pairs with half of their tokens in common link",
                groups.len()
            ),
        ]
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
        let entries = plan(&statistics);
        let report = Relu.report(&params, ctx(&layers, &statistics, &budgets), &entries);
        assert!(report[0].starts_with("hot neurons: 25.0 %"), "{report:?}");
        assert!(report[1].contains(" 0 are in 0 groups"), "{report:?}");
        assert_eq!(
            Relu.report(&params, ctx(&layers, &Statistics::default(), &budgets), &entries),
            Vec::<String>::new()
        );
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
