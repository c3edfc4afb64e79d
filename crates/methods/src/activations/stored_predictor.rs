//! `stored-predictor`: the neurons that predictors in the model's own file call active.
//!
//! Song et al., PowerInfer (arXiv:2312.12456): its GGUF files (magic `PWRI`) carry, per layer, `fc1 [rank, width]` and
//! `fc2 [neurons, rank]`; a neuron is active where `fc2 relu(fc1 x)` reaches the file's threshold, and only the rows and
//! columns of active neurons are read. Nothing is trained here: `predictor` does that for files without them. The placing of
//! hot neurons on a faster device is not part of this method.
//!
//! The reference feeds `x`, the residual stream before the norm of the MLP (`llm_build_ffn_sparse` in its llama.cpp). A norm
//! divides by a positive number, and the network has no biases, so its scores keep their signs: at the published threshold
//! of zero the norm's output serves as well. Other thresholds are refused.

use crate::common::{mlp_layers, not_applicable};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Cut, Entry, Predictor, Rule, Selector},
    site::{Point, Proj, Site},
    statistics::{Gather, Observation},
};

/// PowerInfer's predictors.
#[derive(Debug)]
pub struct StoredPredictor;

/// Sampled tokens, from which the kept share is estimated.
const TOKENS: usize = 256;

fn point(ctx: &PlanContext<'_>, layer: usize) -> Point {
    Point::Input { layer, proj: ctx.layers[layer].observed_as(Proj::Up) }
}

impl Method for StoredPredictor {
    fn name(&self) -> &'static str {
        "stored-predictor"
    }

    fn title(&self) -> &'static str {
        "Predictors of PowerInfer files"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "PowerInfer: Fast Large Language Model Serving with a Consumer-grade GPU (2023)",
            arxiv: Some("2312.12456"),
        }
    }

    fn summary(&self) -> &'static str {
        "Reads only the neurons, gates included, that the predictors in a PowerInfer GGUF file call active."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[]
    }

    fn needs(&self, _: &Params, ctx: PlanContext<'_>) -> Needs {
        let rows =
            |(layer, _)| Observation { point: point(&ctx, layer), gather: Gather::Rows { every: 7, most: TOKENS } };
        Needs { observations: mlp_layers(&ctx).map(rows).collect(), tokens: 0 }
    }

    fn plan(&self, _: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let mut entries = Vec::new();
        for (layer, _) in mlp_layers(&ctx) {
            let Some((predictor, threshold)) = ctx.weights.predictor(layer) else {
                let reason = format!("layer {layer} brings no predictor; `predictor` trains one");
                return not_applicable(self, reason);
            };
            if threshold != 0.0 {
                return not_applicable(
                    self,
                    format!("its file asks for scores of {threshold}; only zero can be followed"),
                );
            }
            // The reference keeps scores of zero, selectors keep what lies above.
            let selector = Selector { scale: None, unit: false, cut: Cut::Above { threshold: -f32::MIN_POSITIVE } };
            let rows = ctx.statistics.rows(point(&ctx, layer));
            let kept = rows.map(|r| kept_share(&predictor, &r.values));
            entries.push(Entry { layer, rule: Rule::Predicted { predictor, selector, then: None }, kept });
        }
        if entries.is_empty() {
            return not_applicable(self, "it has no MLP outside experts");
        }
        Ok(entries)
    }
}

/// Share of the neurons with scores of at least zero, over rows of inputs.
fn kept_share(predictor: &Predictor, rows: &[f32]) -> f32 {
    let (fc1, fc2) = (predictor.down.to_f32(), predictor.up.to_f32());
    let (rank, width) = (predictor.down.shape()[0], predictor.down.shape()[1]);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let (mut kept, mut all) = (0_u64, 0_u64);
    for x in rows.chunks_exact(width) {
        let hidden: Vec<f32> = fc1.chunks_exact(width).map(|w| dot(w, x).max(0.0)).collect();
        kept += fc2.chunks_exact(rank).filter(|w| dot(w, &hidden) >= 0.0).count() as u64;
        all += (fc2.len() / rank) as u64;
    }
    kept as f32 / all.max(1) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NoWeights, layers};
    use lacuna_core::{
        method::{Budgets, Weights},
        statistics::Statistics,
        tensor::Tensor,
    };

    struct Stored(f32);

    impl Weights for Stored {
        fn matrix(&self, _: usize, _: Proj) -> Option<Vec<f32>> {
            None
        }

        fn column_norms(&self, _: usize, _: &[Proj]) -> Option<Tensor> {
            None
        }

        fn predictor(&self, _: usize) -> Option<(Predictor, f32)> {
            let signs: Vec<f32> = (0..8).map(|i| if i % 4 == 0 { 1.0 } else { -1.0 }).collect();
            let fc1: Vec<f32> = vec![1.0; 8];
            Some((Predictor { down: Tensor::matrix(1, &fc1), up: Tensor::matrix(8, &signs), relu: true }, self.0))
        }
    }

    fn plan(weights: &dyn Weights) -> Result<Vec<Entry>, MethodError> {
        let (layers, budgets, statistics) = (layers(2, "relu"), Budgets::default(), Statistics::default());
        let params = Params::new(&StoredPredictor, []).unwrap();
        StoredPredictor
            .plan(&params, PlanContext { layers: &layers, statistics: &statistics, weights, budgets: &budgets })
    }

    #[test]
    fn files_without_predictors_and_other_thresholds_are_refused() {
        assert!(plan(&NoWeights).unwrap_err().to_string().contains("`predictor` trains one"));
        assert!(plan(&Stored(0.4)).unwrap_err().to_string().contains("0.4"));
        assert_eq!(plan(&Stored(0.0)).unwrap().len(), 2);
    }

    #[test]
    fn the_share_counts_scores_of_zero() {
        let (predictor, _) = Stored(0.0).predictor(0).unwrap();
        assert_eq!(kept_share(&predictor, &[1.0; 8]), 0.25, "positive scores of every fourth neuron");
        assert_eq!(kept_share(&predictor, &[-1.0; 8]), 1.0, "a closed hidden layer scores zero everywhere");
    }
}
