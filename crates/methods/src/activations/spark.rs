//! `spark`: keep the neurons whose gate lies far above the mean of its own vector.
//!
//! Spark Transformer (arXiv:2506.06644): instead of sorting, cut at `mean(z) + std(z) * Q(1 - k/d)` of the gate's
//! pre-activations `z`, with `Q` the normal quantile: linear time, no calibration, no stored numbers. The paper's models
//! are trained with the soft form `max(z - cut, 0)`; for other models this is the hard mask (a soft one would change what
//! stays). The kept share is `k/d` only where `z` is about normal: heavy tails keep more or less, which the counters of
//! `bench` show. Small negative gates are dropped first, so on SiLU it keeps the open half before anything else.

use crate::common::{SPARSITY, neurons, top};
use lacuna_core::{
    method::{Citation, Method, MethodError, ParamSpec, Params, PlanContext},
    plan::{Cut, Entry, Rule, Selector, Stage},
    site::{Proj, Site},
};

/// Statistical top-k.
#[derive(Debug)]
pub struct Spark;

/// The quantile of the standard normal distribution: Acklam's rational approximation, relative error below 1.2e-9.
pub(crate) fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e+01,
        2.209460984245205e+02,
        -2.759285104469687e+02,
        1.383_577_518_672_69e2,
        -3.066479806614716e+01,
        2.506628277459239e+00,
    ];
    const B: [f64; 5] = [
        -5.447609879822406e+01,
        1.615858368580409e+02,
        -1.556989798598866e+02,
        6.680131188771972e+01,
        -1.328068155288572e+01,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-03,
        -3.223964580411365e-01,
        -2.400758277161838e+00,
        -2.549732539343734e+00,
        4.374664141464968e+00,
        2.938163982698783e+00,
    ];
    const D: [f64; 4] = [7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e+00, 3.754408661907416e+00];
    let poly = |c: &[f64], x: f64| c.iter().fold(0.0, |sum, c| sum * x + c);
    let tail = |p: f64| {
        let q = (-2.0 * p.ln()).sqrt();
        poly(&C, q) / (poly(&D, q) * q + 1.0)
    };
    if p < 0.02425 {
        tail(p)
    } else if p > 1.0 - 0.02425 {
        -tail(1.0 - p)
    } else {
        let q = p - 0.5;
        poly(&A, q * q) * q / (poly(&B, q * q) * q * q + 1.0)
    }
}

impl Method for Spark {
    fn name(&self) -> &'static str {
        "spark"
    }

    fn title(&self) -> &'static str {
        "Spark, statistical top-k"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Spark Transformer: Reactivating Sparsity in FFN and Attention (2025)",
            arxiv: Some("2506.06644"),
        }
    }

    fn summary(&self) -> &'static str {
        "Keeps the neurons whose gate exceeds mean + std * Q(sparsity) of the token's own gates; no calibration, linear time."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[SPARSITY]
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        neurons(self, &ctx, |layer, shape| {
            let dropped = ctx.dropped(layer, Proj::Up, params.get("sparsity"));
            let rule = if dropped <= 0.0 {
                Rule::neurons(top(shape.inner, None, 0.0).0)
            } else {
                let multiple = normal_quantile(dropped) as f32;
                let selector = Selector { scale: None, unit: false, cut: Cut::Gaussian { multiple } };
                Rule::Neurons { on: Stage::Gate, selector, then: None }
            };
            Ok((rule, Some((1.0 - dropped) as f32)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_kernels::select::moments;

    #[test]
    fn quantiles_of_the_normal_distribution() {
        for (p, q) in
            [(0.5, 0.0), (0.95, 1.644854), (0.92, 1.405072), (0.05, -1.644854), (0.999, 3.090232), (0.01, -2.326348)]
        {
            assert!((normal_quantile(p) - q).abs() < 1e-5, "{p}: {}", normal_quantile(p));
        }
    }

    #[test]
    fn normal_gates_keep_their_share_wherever_they_lie() {
        for (shift, scale) in [(0.0, 1.0), (3.0, 0.2), (-1.0, 40.0)] {
            let x: Vec<f32> = crate::testing::normal(3, 16384).iter().map(|v| shift + scale * v).collect();
            for keep in [0.08, 0.25, 0.5] {
                let (mean, std) = moments(&x, None, true);
                let cut = mean + std * normal_quantile(1.0 - keep);
                let share = x.iter().filter(|v| f64::from(**v) > cut).count() as f64 / x.len() as f64;
                assert!((share / keep - 1.0).abs() < 0.1, "{shift} {scale} {keep}: {share}");
            }
        }
    }
}
