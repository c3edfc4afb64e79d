//! `fatrelu`: ReLU with a small positive cut: skip the neurons whose ReLU output is at most `t`.
//!
//! Song et al., ProSparse (arXiv:2402.13516): after training, `FATReLU(z) = z if z > t else 0` with one small `t` for all
//! layers raises the sparsity a little (88.1 to 89.3 % on their 7B) at no loss. `t = 0` is `relu`, exactly. Only for
//! models with ReLU or squared ReLU.

use crate::common::{closed_neurons, neuron_magnitudes};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule, Selector},
    site::{Point, Site},
};
use std::ops::Bound;

/// FATReLU.
#[derive(Debug)]
pub struct FatRelu;

impl Method for FatRelu {
    fn name(&self) -> &'static str {
        "fatrelu"
    }

    fn title(&self) -> &'static str {
        "FATReLU, ReLU with a positive cut"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models (2024)",
            arxiv: Some("2402.13516"),
        }
    }

    fn summary(&self) -> &'static str {
        "Skips the neurons whose ReLU output does not exceed a small threshold; for models with ReLU or squared ReLU."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[ParamSpec {
            name: "threshold",
            doc: "outputs of the activation up to this are skipped",
            default: 0.01,
            range: (Bound::Included(0.0), Bound::Included(1e6)),
        }];
        PARAMS
    }

    fn needs(&self, _: &Params, ctx: PlanContext<'_>) -> Needs {
        Needs { observations: neuron_magnitudes(&ctx), tokens: 0 }
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        let threshold = params.get("threshold") as f32;
        closed_neurons(self, &ctx, "cats", |layer| {
            let kept = ctx.statistics.magnitudes(Point::Neurons { layer }).map(|h| h.kept_share(threshold) as f32);
            (Rule::neurons(Selector::above(threshold)), kept)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NoWeights, kept_of, layers, planned};

    #[test]
    fn zero_is_relu_and_sparsity_never_falls_with_the_threshold() {
        let data = |_: Point, width: usize| {
            let mut v = crate::testing::normal(5, width * 300);
            v.iter_mut().for_each(|x| *x = x.max(0.0));
            v
        };
        let mut last = 1.0;
        for t in [0.0, 0.01, 0.1, 0.5, 3.0] {
            let e = planned(&FatRelu, &[("threshold", t)], &layers(1, "relu"), &NoWeights, data);
            assert!(e[0].kept.unwrap() <= last, "{t}");
            last = e[0].kept.unwrap();
            if t == 0.0 {
                assert_eq!(kept_of(e[0].rule.selector(), &[0.0, 1e-30, 0.0, 2.0]), [1, 3]);
            }
        }
        assert!(last < 0.01);
    }
}
