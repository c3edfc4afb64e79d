//! `relu`: skip the neurons that a ReLU closed. Exact: what is skipped is multiplied by zero in the dense pass.
//!
//! Observation: Li et al., The Lazy Neuron Phenomenon (arXiv:2210.06313); models made for it: ProSparse
//! (arXiv:2402.13516). The gate is computed in full, then only the rows of up and the columns of down whose gate is
//! not zero: with a kept share p the MLP reads (1 + 2p)/3 of its bytes. Fails (and says so) on activations that never
//! return exact zeros.

use lacuna_core::{
    method::{Citation, LayerShape, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule, Selector},
    site::{Point, Site},
    weight::Orientation,
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

    fn layouts(&self) -> &'static [Orientation] {
        &[Orientation::OutputMajor, Orientation::InputMajor]
    }

    fn needs(&self, _: &Params, layers: &[LayerShape]) -> Needs {
        let points = (0..layers.len()).filter(|&l| layers[l].mlp.is_some()).map(|layer| Point::Neurons { layer });
        Needs { points: points.collect(), tokens: 0 }
    }

    fn plan(&self, _: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let cannot = |reason| Err(MethodError::NotApplicable { method: self.name().into(), reason });
        let mut entries = Vec::new();
        for (layer, shape) in ctx.layers.iter().enumerate() {
            let Some(mlp) = &shape.mlp else { continue };
            if !mlp.exact_zeros {
                return cannot(format!(
                    "its activation is `{}`, which never returns exact zeros; `relu` needs relu or relu2 (use `teal` here)",
                    mlp.activation
                ));
            }
            let kept = ctx.statistics.magnitudes(Point::Neurons { layer }).map(|h| h.nonzero_share() as f32);
            entries.push(Entry { layer, rule: Rule::Neurons { selector: Selector::NonZero }, kept });
        }
        if entries.is_empty() {
            return cannot("it has no MLP outside experts".into());
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::{method::MlpShape, statistics::Statistics};

    fn layer(activation: &str, exact_zeros: bool) -> LayerShape {
        let mlp = MlpShape { inner: 4, gated: true, activation: activation.into(), exact_zeros };
        LayerShape { width: 2, query: 2, kv: 2, mlp: Some(mlp) }
    }

    #[test]
    fn reports_the_share_it_saw_and_plans_without_one() {
        let layers = [layer("relu", true), layer("relu2", true)];
        let params = Params::new(&Relu, []).unwrap();
        let mut statistics = Statistics::new(Relu.needs(&params, &layers).points);
        let plan = |s: &Statistics| Relu.plan(&params, PlanContext { layers: &layers, statistics: s }).unwrap();
        assert_eq!(plan(&statistics)[1].kept, None);
        use lacuna_core::observer::Observer;
        statistics.observe(Point::Neurons { layer: 1 }, 4, &[0.0, 1.0, 0.0, 0.0]);
        assert_eq!((plan(&statistics)[0].kept, plan(&statistics)[1].kept), (None, Some(0.25)));
    }

    #[test]
    fn refuses_smooth_activations() {
        let layers = [layer("silu", false)];
        let params = Params::new(&Relu, []).unwrap();
        let e = Relu.plan(&params, PlanContext { layers: &layers, statistics: &Statistics::default() }).unwrap_err();
        assert!(e.to_string().contains("`silu`"), "{e}");
    }
}
