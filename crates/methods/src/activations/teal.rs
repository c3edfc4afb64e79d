//! `teal`: drop the input channels of small magnitude, at every projection.
//!
//! Liu et al., Training-Free Activation Sparsity in Large Language Models (arXiv:2408.14690). Rule: keep `x_j` where
//! `|x_j| > t`, one threshold `t` per layer and projection, so that its share of the calibration values falls below.
//! Here `t = F^-1(s)` with `F` the distribution of `|x|` (the paper's `F_signed^-1(0.5 + s/2)` assumes symmetry). How
//! the block's share is spread over its projections: by a search where one was run, else by the mean of the published
//! searches (`prior=1`), or evenly (`prior=0`). Reads `(1 - s)` of the bytes; quality falls smoothly to about 50 % on
//! large models, earlier on small ones.

use crate::{
    common::{SPARSITY, input_point, projections, switch, threshold},
    prior::allocation,
};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule},
    site::Site,
    statistics::Observation,
    weight::Orientation,
};

/// TEAL.
#[derive(Debug)]
pub struct Teal;

impl Method for Teal {
    fn name(&self) -> &'static str {
        "teal"
    }

    fn title(&self) -> &'static str {
        "TEAL"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Training-Free Activation Sparsity in Large Language Models (2024)",
            arxiv: Some("2408.14690"),
        }
    }

    fn summary(&self) -> &'static str {
        "Skips the input channels whose magnitude is below a calibrated threshold, at all seven projections of a block."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            SPARSITY,
            switch("prior", "1: spread over the projections as the published searches did on average, 0: evenly", true),
        ];
        PARAMS
    }

    fn layouts(&self) -> &'static [Orientation] {
        &[Orientation::InputMajor]
    }

    fn needs(&self, _: &Params, ctx: PlanContext<'_>) -> Needs {
        let mut observations = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            let points = projections(shape).filter(|p| shape.observed_as(*p) == *p);
            observations.extend(points.map(|p| Observation::magnitudes(input_point(layer, shape, p))));
        }
        Needs { observations, tokens: 20_000 }
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let sparsity = params.get("sparsity");
        let mut entries = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            let prior = allocation(shape, sparsity);
            for proj in projections(shape) {
                let own = if params.get("prior") >= 0.5 { prior[proj as usize] } else { sparsity };
                let dropped = ctx.dropped(layer, proj, own);
                let (selector, kept) = threshold(self, &ctx, input_point(layer, shape, proj), None, dropped)?;
                entries.push(Entry { layer, rule: Rule::inputs(proj, selector), kept: Some(kept) });
            }
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NoWeights, layers};
    use lacuna_core::{method::Budgets, observer::Observer, plan::Cut, site::Proj, statistics::Statistics};

    #[test]
    fn four_vectors_feed_seven_projections() {
        let layers = layers(1, "silu");
        let params = Params::new(&Teal, [("sparsity", 0.5), ("prior", 0.0)]).unwrap();
        let (nothing, mut budgets) = (Statistics::default(), Budgets::default());
        let needs = Teal.needs(
            &params,
            PlanContext { layers: &layers, statistics: &nothing, weights: &NoWeights, budgets: &budgets },
        );
        assert_eq!(needs.observations.len(), 4);
        let mut statistics = Statistics::new(needs.observations.clone());
        for (i, o) in needs.observations.iter().enumerate() {
            let values: Vec<f32> = (1..=1000).map(|j| (i + 1) as f32 * j as f32).collect();
            statistics.observe(o.point, 2, &values);
        }
        budgets.dropped.insert((0, Proj::Up), 0.25);
        let ctx = PlanContext { layers: &layers, statistics: &statistics, weights: &NoWeights, budgets: &budgets };
        let entries = Teal.plan(&params, ctx).unwrap();
        let threshold = |i: usize| match entries[i].rule.selector().cut {
            Cut::Above { threshold } => threshold,
            ref other => panic!("teal plans thresholds, not {other:?}"),
        };
        assert_eq!(entries.len(), 7);
        assert!((threshold(0) - 500.0).abs() < 4.0 && threshold(0) == threshold(1) && threshold(0) == threshold(2));
        assert!((threshold(3) - 1000.0).abs() < 8.0 && (threshold(4) - 1500.0).abs() < 12.0);
        assert!((threshold(6) - 2000.0).abs() < 16.0);
        assert!((threshold(5) - 750.0).abs() < 8.0, "a share from outside goes before the parameter");
    }
}
