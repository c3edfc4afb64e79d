//! `r-sparse`: exact columns for the large inputs, a low-rank product for all the others.
//!
//! Zhang et al., R-Sparse (arXiv:2504.19449). Of a budget of `1 - s` of a weight's bytes a part `alpha` buys exact columns
//! (scored `|x_j| * ||W[:, j]||`), the rest buys rank: `C = in (1 - s) alpha` columns and
//! `r = (in out (1 - s) - C out) / (in + out)`; what the columns drop passes through the truncation `U V x` (bf16).
//! The paper searches `alpha` per weight, and its released result has `alpha = 1`, which is TEAL, at 193 of 224 weights:
//! rank helps q and k of the first layer. So here the first `layers` layers' q and k get `alpha`, and everything else is
//! plain magnitude. The factors come from subspace iteration on the dequantised weight; memory grows by their size.

use crate::common::{SPARSITY, input_point, projections, threshold};
use lacuna_core::{
    method::{Citation, LayerShape, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, LowRank, Rule},
    site::{Proj, Site},
    statistics::Observation,
    tensor::Tensor,
    weight::Orientation,
};
use std::ops::Bound;

/// R-Sparse.
#[derive(Debug)]
pub struct RSparse;

/// Rounds of the subspace iteration.
const ROUNDS: usize = 6;

/// Whether `proj` of `layer` gets a low-rank part.
fn is_ranked(params: &Params, layer: usize, proj: Proj) -> bool {
    let alpha = params.get("alpha");
    alpha < 1.0
        && params.get("sparsity") > 0.0
        && (layer as f64) < params.get("layers")
        && matches!(proj, Proj::Q | Proj::K)
}

impl Method for RSparse {
    fn name(&self) -> &'static str {
        "r-sparse"
    }

    fn title(&self) -> &'static str {
        "R-Sparse, columns and rank"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference (2025)",
            arxiv: Some("2504.19449"),
        }
    }

    fn summary(&self) -> &'static str {
        "Skips small inputs like TEAL; in q and k of the first layers the skipped ones pass through a low-rank product instead."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            SPARSITY,
            ParamSpec {
                name: "alpha",
                doc: "part of the budget that buys exact columns where there is rank; 1: none anywhere",
                default: 0.2,
                range: (Bound::Included(0.0), Bound::Included(1.0)),
            },
            ParamSpec {
                name: "layers",
                doc: "how many layers from the first get rank at q and k",
                default: 1.0,
                range: (Bound::Included(0.0), Bound::Included(1e4)),
            },
        ];
        PARAMS
    }

    fn layouts(&self) -> &'static [Orientation] {
        &[Orientation::InputMajor]
    }

    fn needs(&self, params: &Params, ctx: PlanContext<'_>) -> Needs {
        let mut observations = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            for proj in projections(shape) {
                let point = input_point(layer, shape, proj);
                observations.push(Observation::magnitudes(point));
                if is_ranked(params, layer, proj) {
                    let norms = ctx.weights.column_norms(layer, &[proj]);
                    observations.extend(norms.map(|n| Observation::scores(point, n)));
                }
            }
        }
        Needs { observations, tokens: 20_000 }
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let mut entries = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            for proj in projections(shape) {
                let dropped = ctx.dropped(layer, proj, params.get("sparsity"));
                let (rule, kept) = if is_ranked(params, layer, proj) && dropped > 0.0 {
                    self.ranked(params, &ctx, (layer, shape, proj), dropped)?
                } else {
                    let (selector, kept) = threshold(self, &ctx, input_point(layer, shape, proj), None, dropped)?;
                    (Rule::inputs(proj, selector), kept)
                };
                entries.push(Entry { layer, rule, kept: Some(kept) });
            }
        }
        Ok(entries)
    }
}

impl RSparse {
    fn ranked(
        &self,
        params: &Params,
        ctx: &PlanContext<'_>,
        (layer, shape, proj): (usize, &LayerShape, Proj),
        dropped: f64,
    ) -> Result<(Rule, f32), MethodError> {
        let alpha = params.get("alpha");
        let point = input_point(layer, shape, proj);
        let missing = || MethodError::NoStatistics { method: self.name().into(), point };
        let (outputs, inputs) = shape.projection(proj).ok_or_else(missing)?;
        let matrix = ctx.weights.matrix(layer, proj).ok_or_else(missing)?;
        let rank = rank(outputs, inputs, dropped, alpha);
        let scale = ctx.weights.column_norms(layer, &[proj]);
        let (selector, kept) = threshold(self, ctx, point, scale, 1.0 - (1.0 - dropped) * alpha)?;
        let (up, down) = truncate(&matrix, inputs, rank);
        let low_rank = Some(LowRank { down: Tensor::matrix(rank, &down), up: Tensor::matrix(outputs, &up) });
        Ok((Rule::Inputs { proj, selector, low_rank }, kept))
    }
}

/// What the part of the budget that buys no columns buys in rank, with the weight's true shape.
fn rank(outputs: usize, inputs: usize, dropped: f64, alpha: f64) -> usize {
    let columns = ((inputs as f64 * (1.0 - dropped) * alpha) as usize).max(1);
    let left = (inputs * outputs) as f64 * (1.0 - dropped) - (columns * outputs) as f64;
    ((left / (inputs + outputs) as f64) as usize).clamp(1, inputs.min(outputs))
}

/// `U [outputs, rank]` and `V [rank, inputs]` with `U V` about the best approximation of `W` of that rank: `U` spans the
/// strongest directions of the outputs, found by subspace iteration from fixed beginnings, and `V = U^T W`.
fn truncate(w: &[f32], inputs: usize, rank: usize) -> (Vec<f32>, Vec<f32>) {
    let outputs = w.len() / inputs;
    // Columns of `U`, one after the other.
    let mut basis: Vec<Vec<f64>> = (0..rank).map(|r| beginning(r as u64 + 1, outputs)).collect();
    orthonormalise(&mut basis);
    let project = |u: &[f64]| -> Vec<f64> {
        let mut v = vec![0.0; inputs];
        for (row, u) in w.chunks_exact(inputs).zip(u) {
            v.iter_mut().zip(row).for_each(|(v, w)| *v += u * f64::from(*w));
        }
        v
    };
    for _ in 0..ROUNDS {
        for u in &mut basis {
            let v = project(u);
            for (u, row) in u.iter_mut().zip(w.chunks_exact(inputs)) {
                *u = row.iter().zip(&v).map(|(w, v)| f64::from(*w) * v).sum();
            }
        }
        orthonormalise(&mut basis);
    }
    let down = basis.iter().flat_map(|u| project(u).into_iter().map(|v| v as f32)).collect();
    let up = (0..outputs).flat_map(|o| basis.iter().map(move |u| u[o] as f32)).collect();
    (up, down)
}

fn beginning(seed: u64, n: usize) -> Vec<f64> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Gram-Schmidt, twice over for precision; what vanishes stays zero.
fn orthonormalise(basis: &mut [Vec<f64>]) {
    for i in 0..basis.len() {
        let (done, rest) = basis.split_at_mut(i);
        let u = &mut rest[0];
        let before = u.iter().map(|x| x * x).sum::<f64>().sqrt();
        for q in done.iter().chain(done.iter()) {
            let dot: f64 = q.iter().zip(u.iter()).map(|(a, b)| a * b).sum();
            u.iter_mut().zip(q).for_each(|(u, q)| *u -= dot * q);
        }
        let norm = u.iter().map(|x| x * x).sum::<f64>().sqrt();
        let factor = if norm > 1e-10 * before { 1.0 / norm } else { 0.0 };
        u.iter_mut().for_each(|u| *u *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(up: &[f32], down: &[f32], rank: usize, inputs: usize) -> Vec<f32> {
        let row =
            |u: &[f32]| (0..inputs).map(|i| (0..rank).map(|r| u[r] * down[r * inputs + i]).sum()).collect::<Vec<f32>>();
        up.chunks_exact(rank).flat_map(row).collect()
    }

    #[test]
    fn full_rank_is_the_weight_and_the_error_falls_with_the_rank() {
        let w = crate::testing::normal(4, 12 * 10);
        let error = |rank| {
            let (up, down) = truncate(&w, 10, rank);
            let p = product(&up, &down, rank, 10);
            p.iter().zip(&w).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt()
        };
        let all: Vec<f32> = (1..=10).map(error).collect();
        assert!(all[9] < 1e-4 && all.array_windows().all(|[a, b]| a > b), "{all:?}");
    }

    #[test]
    fn a_weight_of_low_rank_is_found_exactly() {
        let (a, b) = (crate::testing::normal(1, 16 * 2), crate::testing::normal(2, 2 * 8));
        let w = product(&a, &b, 2, 8);
        let (up, down) = truncate(&w, 8, 2);
        assert!(product(&up, &down, 2, 8).iter().zip(&w).all(|(x, y)| (x - y).abs() < 1e-4));
    }

    #[test]
    fn the_budget_is_never_exceeded() {
        for (outputs, inputs, s, alpha) in [(4096, 4096, 0.5, 0.2), (1024, 4096, 0.5, 0.02), (64, 64, 0.4, 0.7)] {
            let r = rank(outputs, inputs, s, alpha);
            let columns = ((inputs as f64 * (1.0 - s) * alpha) as usize).max(1);
            let touched = columns * outputs + r * (inputs + outputs);
            assert!(touched as f64 <= (1.0 - s) * (inputs * outputs) as f64, "{outputs} {inputs}: {touched}");
        }
        assert_eq!(rank(4096, 4096, 0.5, 0.2), 819, "the figure of the paper's code");
    }
}
