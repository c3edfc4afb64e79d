//! `teal`: drop the input channels of small magnitude, at every projection.
//!
//! Liu et al., Training-Free Activation Sparsity in Large Language Models (arXiv:2408.14690). Rule: keep `x_j` where
//! `|x_j| > t`, one threshold `t` per layer and projection, so that a share `sparsity` of the calibration values falls
//! below. Here `t = F^-1(sparsity)` with `F` the distribution of `|x|` (the paper's `F_signed^-1(0.5 + s/2)` assumes
//! symmetry), and the same share everywhere (its uniform variant; the greedy search per block is not in this file).
//! Four distinct vectors per block feed seven projections. Reads `(1 - s)` of the bytes; quality falls smoothly to
//! about 50 % on large models, earlier on small ones.

use lacuna_core::{
    method::{Citation, LayerShape, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule, Selector},
    site::{Point, Proj, Site},
    weight::Orientation,
};
use std::ops::Bound;

/// TEAL with uniform thresholds.
#[derive(Debug)]
pub struct Teal;

impl Method for Teal {
    fn name(&self) -> &'static str {
        "teal"
    }

    fn title(&self) -> &'static str {
        "TEAL, uniform thresholds"
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
        const PARAMS: &[ParamSpec] = &[ParamSpec {
            name: "sparsity",
            doc: "share of the input channels that is dropped",
            default: 0.5,
            range: (Bound::Included(0.0), Bound::Excluded(1.0)),
        }];
        PARAMS
    }

    fn layouts(&self) -> &'static [Orientation] {
        &[Orientation::InputMajor]
    }

    fn needs(&self, _: &Params, layers: &[LayerShape]) -> Needs {
        let points = layers.iter().enumerate().flat_map(|(layer, shape)| {
            let own = move |p: &Proj| shape.projection(*p).is_some() && shape.observed_as(*p) == *p;
            Proj::ALL.into_iter().filter(own).map(move |proj| Point::Input { layer, proj })
        });
        Needs { points: points.collect(), tokens: 20_000 }
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let sparsity = params.get("sparsity");
        let mut entries = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            for proj in Proj::ALL.into_iter().filter(|&p| shape.projection(p).is_some()) {
                let point = Point::Input { layer, proj: shape.observed_as(proj) };
                let seen = ctx.statistics.magnitudes(point);
                let seen = seen.ok_or_else(|| MethodError::NoStatistics { method: self.name().into(), point })?;
                let threshold = seen.threshold(sparsity);
                let kept = Some(seen.kept_share(threshold) as f32);
                entries.push(Entry {
                    layer,
                    rule: Rule::Inputs { proj, selector: Selector::Magnitude { threshold } },
                    kept,
                });
            }
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::{method::MlpShape, observer::Observer, statistics::Statistics};

    #[test]
    fn four_vectors_feed_seven_projections() {
        let mlp = MlpShape { inner: 4, gated: true, activation: "silu".into(), exact_zeros: false };
        let layers = [LayerShape { width: 2, query: 2, kv: 2, mlp: Some(mlp) }];
        let params = Params::new(&Teal, [("sparsity", 0.5)]).unwrap();
        let needs = Teal.needs(&params, &layers);
        assert_eq!(needs.points.len(), 4);
        let mut statistics = Statistics::new(needs.points.iter().copied());
        for (i, point) in needs.points.iter().enumerate() {
            let values: Vec<f32> = (1..=1000).map(|j| (i + 1) as f32 * j as f32).collect();
            statistics.observe(*point, 2, &values);
        }
        let entries = Teal.plan(&params, PlanContext { layers: &layers, statistics: &statistics }).unwrap();
        let threshold = |i: usize| match entries[i].rule.selector() {
            Selector::Magnitude { threshold } => threshold,
            Selector::NonZero => panic!("teal plans magnitudes"),
        };
        assert_eq!(entries.len(), 7);
        assert!((threshold(0) - 500.0).abs() < 4.0 && threshold(0) == threshold(1) && threshold(0) == threshold(2));
        assert!((threshold(3) - 1000.0).abs() < 8.0 && (threshold(4) - 1500.0).abs() < 12.0);
        assert!((threshold(6) - 2000.0).abs() < 16.0 && threshold(4) == threshold(5));
    }
}
