//! `cfsp`: drop whole neurons of the MLPs, by what enters and leaves them.
//!
//! CFSP (2024; code wyxscir/CFSP) ranks the neurons of each MLP by one pass over a text, and gives blocks budgets by how far
//! they turn the residual stream (`--ratios angular`). The paper combines the norms of a neuron's three weight vectors with
//! the norm `s_j` of its activation. The published code normalises each weight matrix per neuron before it takes means over
//! the width, so that every weight term becomes the same constant and `s_j` alone decides: `form=0` here. `form=1` is the
//! score as it was meant, `(n(|D_:j| s_j) + n(|U_j:|) + n(|G_j:|)) s_j` with sums of magnitudes over their mean by neuron.
//!
//! What dropped neurons gave is taken over by the others: `D' = D_K + D_R C_RK (C_KK + d)^-1` for the Gram matrix `C` of the
//! activations. The damping `d` pulls towards the old weights, so the error is never above the one without this step.

use super::tools::{DAMPING, factor::solve};
use crate::common::SPARSITY;
use faer::Mat;
use lacuna_core::{
    compress::{Compressor, Inputs, NeuronPruner, Neurons, Pruned, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::{Proj, Site},
};
use std::ops::Bound;

/// CFSP.
#[derive(Debug)]
pub struct Cfsp;

impl Method for Cfsp {
    fn name(&self) -> &'static str {
        "cfsp"
    }

    fn title(&self) -> &'static str {
        "CFSP"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information (2024)",
            arxiv: None,
        }
    }

    fn summary(&self) -> &'static str {
        "Drops whole neurons of the MLPs and lets the others make up for them: the model really becomes smaller, and stays dense."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            SPARSITY,
            ParamSpec {
                name: "form",
                doc: "score of a neuron: 1: weights and activation, 0: activation alone, as the published code computes",
                default: 1.0,
                range: (Bound::Included(0.0), Bound::Included(1.0)),
            },
            ParamSpec {
                name: "compensate",
                doc: "1: kept columns of down take over what dropped neurons gave, by least squares; 0: they stay as they are",
                default: 1.0,
                range: (Bound::Included(0.0), Bound::Included(1.0)),
            },
            ParamSpec {
                name: "multiple",
                doc: "neurons that stay are rounded to a multiple of this",
                default: 32.0,
                range: (Bound::Included(1.0), Bound::Included(1024.0)),
            },
        ];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Cfsp {
    fn sight(&self, params: &Params) -> Sight {
        if params.get("compensate") > 0.0 { Sight::Gram } else { Sight::Norms }
    }

    fn applies(&self, proj: Proj) -> bool {
        matches!(proj, Proj::Gate | Proj::Up | Proj::Down)
    }

    fn neurons(&self) -> Option<&dyn NeuronPruner> {
        Some(self)
    }
}

impl NeuronPruner for Cfsp {
    fn keep(&self, params: &Params, inner: usize, share: f64) -> usize {
        let multiple = params.get("multiple").max(1.0);
        let wanted = (1.0 - share) * inner as f64;
        let rounded = ((wanted / multiple).round() * multiple).max(multiple) as usize;
        if share == 0.0 { inner } else { rounded.min(inner) }
    }

    fn prune(&self, params: &Params, mlp: &Neurons<'_>) -> Result<Pruned, MethodError> {
        let refuse = |reason: &str| Err(MethodError::Layer { place: mlp.place.into(), reason: reason.into() });
        let Some(seen) = mlp.seen else {
            return refuse("nothing was seen of its neurons; give a calibration text (-f FILE)");
        };
        let parts = [mlp.gate.unwrap_or_default(), mlp.up, mlp.down];
        if parts.iter().any(|w| w.iter().any(|x| !x.is_finite())) {
            return refuse("a weight is not a finite number");
        }
        if seen.squares.iter().any(|s| !s.is_finite()) {
            return refuse(
                "the squares of its neurons do not add up to finite numbers; the model overflows on this text",
            );
        }
        let scores = scores(mlp, seen, params.get("form") > 0.0);
        let mut order: Vec<usize> = (0..mlp.inner).collect();
        // The sort is stable: of equal neurons the first stay.
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let mut kept = vec![false; mlp.inner];
        order.iter().take(mlp.keep).for_each(|j| kept[*j] = true);
        let mut down = mlp.down.to_vec();
        down.chunks_exact_mut(mlp.inner).for_each(|row| {
            row.iter_mut().zip(&kept).filter(|(_, k)| !**k).for_each(|(w, _)| *w = 0.0);
        });
        if let (Some(gram), true) = (&seen.gram, params.get("compensate") > 0.0 && mlp.keep < mlp.inner) {
            let Some(change) = compensation(mlp, gram, &kept) else {
                return refuse(
                    "the Gram matrix of its kept neurons is singular even with damping; use more calibration tokens (--tokens), or compensate=0",
                );
            };
            let columns = kept.iter().enumerate().filter(|(_, k)| **k).map(|(j, _)| j);
            for (i, j) in columns.enumerate() {
                for r in 0..mlp.width {
                    down[r * mlp.inner + j] += change[(i, r)] as f32;
                }
            }
        }
        Ok(Pruned { kept, down, notes: Vec::new() })
    }
}

/// The score of every neuron, not negative.
fn scores(mlp: &Neurons<'_>, seen: &Inputs, weights: bool) -> Vec<f64> {
    let activation: Vec<f64> = seen.squares.iter().map(|s| s.max(0.0).sqrt()).collect();
    if !weights {
        return activation;
    }
    let by_row = |w: &[f32]| -> Vec<f64> {
        w.chunks_exact(mlp.width).map(|row| row.iter().map(|x| f64::from(x.abs())).sum()).collect()
    };
    let mut down = vec![0.0_f64; mlp.inner];
    for row in mlp.down.chunks_exact(mlp.inner) {
        down.iter_mut().zip(row).for_each(|(d, w)| *d += f64::from(w.abs()));
    }
    down.iter_mut().zip(&activation).for_each(|(d, s)| *d *= s);
    let over_mean = |mut of: Vec<f64>| {
        let mean = of.iter().sum::<f64>() / of.len().max(1) as f64;
        of.iter_mut().for_each(|x| *x /= if mean > 0.0 { mean } else { 1.0 });
        of
    };
    let mut sum = over_mean(down);
    for part in [Some(mlp.up), mlp.gate].into_iter().flatten() {
        sum.iter_mut().zip(over_mean(by_row(part))).for_each(|(s, n)| *s += n);
    }
    sum.iter().zip(&activation).map(|(s, a)| s * a).collect()
}

/// What is added to the kept columns of down, `[kept, width]`: the solution of `(C_KK + d) X = C_KR D_R^T`.
fn compensation(mlp: &Neurons<'_>, gram: &[f64], kept: &[bool]) -> Option<Mat<f64>> {
    let n = mlp.inner;
    let of = |which: bool| (0..n).filter(|j| kept[*j] == which).collect::<Vec<usize>>();
    let (kept, dropped) = (of(true), of(false));
    let c = Mat::from_fn(kept.len(), dropped.len(), |i, j| gram[kept[i] * n + dropped[j]]);
    let d = Mat::from_fn(dropped.len(), mlp.width, |j, r| f64::from(mlp.down[r * n + dropped[j]]));
    let lost = &c * &d;
    let mean = kept.iter().map(|j| gram[j * n + j]).sum::<f64>() / kept.len().max(1) as f64;
    // Neurons that never fired have nothing to take over; their diagonal must not be zero.
    let least = if mean > 0.0 { mean } else { 1.0 };
    DAMPING.into_iter().find_map(|share| {
        let at = |i: usize, j: usize| gram[kept[i] * n + kept[j]] + if i == j { share * least } else { 0.0 };
        solve(kept.len(), at, &lost)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{testing::normal, weights::tools::testing::Case};
    use lacuna_kernels::Pool;

    const INNER: usize = 40;
    const WIDTH: usize = 12;

    fn pruned(case: &Case, keep: usize, given: &[(&str, f64)]) -> Pruned {
        let pool = Pool::new(2);
        let (gate, up) = (normal(7, INNER * WIDTH), normal(8, INNER * WIDTH));
        let mlp = Neurons {
            place: "layers.0.mlp",
            width: WIDTH,
            inner: INNER,
            gate: Some(&gate),
            up: &up,
            down: &case.weight,
            seen: Some(&case.seen),
            keep,
            pool: &pool,
        };
        Cfsp.prune(&Params::new(&Cfsp, given.iter().copied()).unwrap(), &mlp).unwrap()
    }

    #[test]
    fn the_published_form_ranks_by_activation_alone() {
        let case = Case::random(60, WIDTH, INNER, 200);
        let out = pruned(&case, 10, &[("form", 0.0), ("compensate", 0.0)]);
        let least = (0..INNER).filter(|j| out.kept[*j]).map(|j| case.seen.squares[j]).fold(f64::MAX, f64::min);
        assert!((0..INNER).filter(|j| !out.kept[*j]).all(|j| case.seen.squares[j] <= least));
        assert_eq!(out.kept.iter().filter(|k| **k).count(), 10);
        assert_ne!(out.kept, pruned(&case, 10, &[("compensate", 0.0)]).kept, "weights matter in the other form");
    }

    /// The score of the second form, computed for one neuron of an MLP of width 1 by hand.
    #[test]
    fn scores_by_hand() {
        let pool = Pool::new(1);
        let seen = Inputs { tokens: 1, squares: vec![4.0, 9.0], gram: None };
        let (gate, up, down) = ([1.0, -3.0], [2.0, 2.0], [-1.0, 2.0]);
        let mlp = Neurons {
            place: "",
            width: 1,
            inner: 2,
            gate: Some(&gate),
            up: &up,
            down: &down,
            seen: None,
            keep: 1,
            pool: &pool,
        };
        // |D| s: 2, 6, mean 4; |U|: 2, 2; |G|: 1, 3, mean 2.
        assert_eq!(scores(&mlp, &seen, true), [(0.5 + 1.0 + 0.5) * 2.0, (1.5 + 1.0 + 1.5) * 3.0]);
        assert_eq!(scores(&Neurons { gate: None, ..mlp }, &seen, true), [1.5 * 2.0, 2.5 * 3.0]);
        assert_eq!(scores(&mlp, &seen, false), [2.0, 3.0]);
    }

    #[test]
    fn least_squares_lose_less_and_never_more() {
        for (seed, keep) in [(61, 30), (62, 20), (63, 4), (64, 39)] {
            let case = Case::random(seed, WIDTH, INNER, 300);
            let with = pruned(&case, keep, &[]);
            let without = pruned(&case, keep, &[("compensate", 0.0)]);
            assert_eq!(with.kept, without.kept);
            let (a, b) = (case.output_error(&with.down), case.output_error(&without.down));
            assert!(a < 0.98 * b, "{keep}: {a} {b}");
        }
    }

    #[test]
    fn neurons_that_never_fire_go_first_and_cost_nothing() {
        let mut case = Case::random(65, WIDTH, INNER, 300);
        let gram = case.seen.gram.as_mut().unwrap();
        for j in [3, 17, 18] {
            (0..INNER).for_each(|i| (gram[i * INNER + j], gram[j * INNER + i]) = (0.0, 0.0));
            case.seen.squares[j] = 0.0;
        }
        let out = pruned(&case, INNER - 3, &[]);
        assert!([3, 17, 18].iter().all(|j| !out.kept[*j]));
        assert!(case.output_error(&out.down) < 1e-9 * case.output_error(&vec![0.0; WIDTH * INNER]));
        assert_eq!(pruned(&case, INNER, &[]).down, case.weight, "nothing to drop changes nothing");
    }

    #[test]
    fn what_stays_is_a_multiple() {
        let keep = |inner: usize, share: f64, multiple: f64| {
            Cfsp.keep(&Params::new(&Cfsp, [("multiple", multiple)]).unwrap(), inner, share)
        };
        assert_eq!([keep(704, 0.2, 32.0), keep(704, 0.5, 32.0), keep(704, 0.5, 1.0)], [576, 352, 352]);
        assert_eq!(
            [keep(100, 0.0, 32.0), keep(100, 0.01, 32.0), keep(100, 0.99, 32.0), keep(20, 0.9, 32.0)],
            [100, 96, 32, 20]
        );
    }
}
