//! `wina`: drop the input channels whose contribution `|x_j| * ||W[:, j]||` is small, at every projection.
//!
//! Chen et al., WINA (arXiv:2505.19427). The reference code uses the norms only for k and gate; here they are used
//! everywhere, without the paper's rotations (which cost two dense `d x d` products per layer). Projections that read
//! the same vector share one score, `|x_j| * sqrt(sum of their squared norms)`, and so one list and one threshold
//! (`joint=1`); with `joint=0` each has its own. `topk=1` keeps exactly `K` channels and needs no text; the default is a
//! calibrated threshold, which is cheaper and lets hard tokens keep more. On down, the order is that of CETT.

use crate::{
    common::{SPARSITY, input_point, projections, readers, switch, threshold, top},
    prior::allocation,
};
use lacuna_core::{
    method::{Citation, LayerShape, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule},
    site::{Proj, Site},
    statistics::Observation,
    tensor::Tensor,
    weight::Orientation,
};

/// WINA without rotations.
#[derive(Debug)]
pub struct Wina;

/// The norms that score the inputs of `proj`.
fn norms(params: &Params, ctx: &PlanContext<'_>, layer: usize, shape: &LayerShape, proj: Proj) -> Option<Tensor> {
    let joint = params.get("joint") >= 0.5;
    let projs = if joint { readers(shape, proj) } else { vec![proj] };
    ctx.weights.column_norms(layer, &projs)
}

impl Method for Wina {
    fn name(&self) -> &'static str {
        "wina"
    }

    fn title(&self) -> &'static str {
        "WINA, weight-informed input channels"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference (2025)",
            arxiv: Some("2505.19427"),
        }
    }

    fn summary(&self) -> &'static str {
        "Skips the input channels whose magnitude times the norm of their weight column is small, at all seven projections of a block."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            SPARSITY,
            switch("joint", "1: projections that read the same vector share one score and one list", true),
            switch("topk", "1: exactly as many channels for every token, without a calibration text", false),
            switch("prior", "1: spread over the projections as TEAL's published searches did on average", true),
        ];
        PARAMS
    }

    fn layouts(&self) -> &'static [Orientation] {
        &[Orientation::InputMajor]
    }

    fn needs(&self, params: &Params, ctx: PlanContext<'_>) -> Needs {
        if params.get("topk") >= 0.5 {
            return Needs::default();
        }
        let mut observations = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            for proj in projections(shape) {
                let scale = norms(params, &ctx, layer, shape, proj);
                let point = input_point(layer, shape, proj);
                observations.extend(scale.map(|s| Observation::scores(point, s)));
            }
        }
        Needs { observations, tokens: 20_000 }
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let mut entries = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            let shares = self.shares(params, &ctx, layer, shape);
            for proj in projections(shape) {
                let scale = norms(params, &ctx, layer, shape, proj);
                let dropped = shares[proj as usize];
                let (selector, kept) = match params.get("topk") >= 0.5 {
                    true => top(shape.projection(proj).map_or(0, |p| p.1), scale, dropped),
                    false => threshold(self, &ctx, input_point(layer, shape, proj), scale, dropped)?,
                };
                entries.push(Entry { layer, rule: Rule::inputs(proj, selector), kept: Some(kept) });
            }
        }
        Ok(entries)
    }
}

impl Wina {
    /// The share to drop at each projection; those with one list have one share, the mean over their weights.
    fn shares(&self, params: &Params, ctx: &PlanContext<'_>, layer: usize, shape: &LayerShape) -> [f64; 7] {
        let sparsity = params.get("sparsity");
        let prior = allocation(shape, sparsity);
        let own = |p: Proj| {
            let own = if params.get("prior") >= 0.5 { prior[p as usize] } else { sparsity };
            ctx.dropped(layer, p, own)
        };
        let mut shares = Proj::ALL.map(own);
        if params.get("joint") >= 0.5 {
            for proj in projections(shape).filter(|p| shape.observed_as(*p) == *p) {
                let group = readers(shape, proj);
                let weight = |p: &Proj| shape.projection(*p).map_or(0.0, |(o, i)| (o * i) as f64);
                let all: f64 = group.iter().map(weight).sum();
                let mean = group.iter().map(|p| own(*p) * weight(p)).sum::<f64>() / all;
                group.iter().for_each(|p| shares[*p as usize] = mean);
            }
        }
        shares
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Columns, NoWeights, kept_of, layers};
    use lacuna_core::{method::Budgets, statistics::Statistics};

    fn entries(weights: &dyn lacuna_core::method::Weights, spec: &[(&str, f64)]) -> Vec<Entry> {
        let params = Params::new(&Wina, spec.iter().copied()).unwrap();
        let (statistics, budgets) = (Statistics::default(), Budgets::default());
        Wina.plan(
            &params,
            PlanContext { layers: &layers(1, "silu"), statistics: &statistics, weights, budgets: &budgets },
        )
        .unwrap()
    }

    const TOP: [(&str, f64); 3] = [("sparsity", 0.5), ("topk", 1.0), ("prior", 0.0)];

    #[test]
    fn equal_norms_give_the_mask_of_plain_magnitude() {
        let x = [0.1, -3.0, 2.0, 0.5, -0.2, 1.0, 0.0, -0.7];
        let q = &entries(&Columns(vec![2.0; 8]), &TOP)[0];
        assert_eq!(kept_of(q.rule.selector(), &x), [1, 2, 5, 7]);
        let none = &entries(&NoWeights, &TOP)[0];
        assert_eq!(kept_of(none.rule.selector(), &x), [1, 2, 5, 7]);
    }

    #[test]
    fn scaling_a_column_up_and_its_input_down_changes_nothing() {
        let x = [0.1, -3.0, 2.0, 0.5, -0.2, 1.0, 0.0, -0.7];
        let norms = [1.0, 0.2, 3.0, 0.7, 9.0, 0.4, 5.0, 1.5];
        let a = &entries(&Columns(norms.to_vec()), &TOP)[0];
        let factor = [2.0, 0.5, 4.0, 8.0, 0.25, 1.0, 2.0, 0.125];
        let y: Vec<f32> = x.iter().zip(factor).map(|(x, f)| x / f).collect();
        let b = &entries(&Columns(norms.iter().zip(factor).map(|(n, f)| n * f).collect()), &TOP)[0];
        assert_eq!(kept_of(a.rule.selector(), &x), kept_of(b.rule.selector(), &y));
    }

    /// For columns at right angles no choice of K columns leaves a smaller error than WINA's (brute force over all).
    #[test]
    fn orthogonal_columns_make_it_optimal() {
        let x = [0.3, -1.0, 2.0, 0.5, -0.2, 1.1, 0.05, -0.7];
        let norms = [1.0_f32, 0.2, 0.3, 0.7, 9.0, 0.4, 5.0, 1.5];
        let error = |kept: &[u32]| -> f32 {
            (0..8).filter(|i| !kept.contains(i)).map(|i| (x[i as usize] * norms[i as usize]).powi(2)).sum()
        };
        for k in 1..8_u32 {
            let spec = [("sparsity", 1.0 - f64::from(k) / 8.0), ("topk", 1.0), ("prior", 0.0)];
            let kept = kept_of(entries(&Columns(norms.to_vec()), &spec)[0].rule.selector(), &x);
            let best = (0..256_u32)
                .filter(|m| m.count_ones() == k)
                .map(|m| error(&(0..8).filter(|i| m >> i & 1 == 1).collect::<Vec<_>>()))
                .fold(f32::INFINITY, f32::min);
            assert_eq!(kept.len(), k as usize);
            assert!(error(&kept) <= best + 1e-6, "{k}: {} against {best}", error(&kept));
        }
    }

    #[test]
    fn joint_scores_share_one_selector_and_own_scores_do_not() {
        let joint = entries(&Columns(vec![1.0; 8]), &TOP);
        assert_eq!(joint[0].rule.selector(), joint[1].rule.selector());
        let own = entries(&Columns(vec![1.0; 8]), &[("topk", 1.0), ("joint", 0.0)]);
        assert_ne!(own[0].rule.selector(), own[2].rule.selector(), "q and v have other shares by the prior");
    }
}
