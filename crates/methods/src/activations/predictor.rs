//! `predictor`: a small network per layer predicts which neurons matter; only their rows and columns are read.
//!
//! Liu et al., Deja Vu (arXiv:2310.17157); PowerInfer (arXiv:2312.12456) puts a ReLU between the two layers, as here:
//! `score = B relu(A h)` with `h` the input of the MLP, rank `rank`. Trained here on sampled tokens of the calibration
//! text with Adam and the weighted cross entropy of Deja Vu's code; a neuron counts as active if its gate is open (ReLU),
//! or else if it is among the largest `1 - sparsity` of its token. The kept neurons are the `K` with the largest scores,
//! or with `recall=0.99` those above the score that keeps this share of the active ones.
//! Unlike thresholds on the gate it saves the gate too: about `p` of the MLP's bytes plus the predictor's. Recall and
//! precision on tokens that were not trained on are reported. Built for ReLU models; on others recall is what it is.

use crate::{
    common::{SPARSITY, mlp_layers, not_applicable},
    train::{Example, Trained, train},
};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Cut, Entry, Predictor as Matrices, Rule, Selector},
    site::{Point, Proj, Site},
    statistics::{Gather, Observation, Rows},
    tensor::Tensor,
};
use std::ops::Bound;

/// Predicted neurons.
#[derive(Debug)]
pub struct Predictor;

/// Most sampled tokens per layer.
const TOKENS: usize = 4000;

/// Most sampled numbers over all layers: 4 GiB.
const NUMBERS: usize = 1 << 30;

/// Every third token, as many as fit into the memory for all layers.
fn sample(ctx: &PlanContext<'_>) -> Gather {
    let per_token: usize = mlp_layers(ctx).map(|(layer, inner)| ctx.layers[layer].width + inner).sum();
    Gather::Rows { every: 3, most: (NUMBERS / per_token.max(1)).clamp(1, TOKENS) }
}

/// The pairs of one layer: inputs of the MLP, and activated gates.
fn pairs<'a>(ctx: &PlanContext<'a>, layer: usize) -> Option<(&'a Rows, &'a Rows)> {
    let proj = ctx.layers[layer].observed_as(Proj::Up);
    Some((ctx.statistics.rows(Point::Input { layer, proj })?, ctx.statistics.rows(Point::Neurons { layer })?))
}

impl Method for Predictor {
    fn name(&self) -> &'static str {
        "predictor"
    }

    fn title(&self) -> &'static str {
        "Low-rank predictors of active neurons"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time (2023)",
            arxiv: Some("2310.17157"),
        }
    }

    fn summary(&self) -> &'static str {
        "Trains a small predictor per layer and reads only the neurons it names, their gates included; best on ReLU models."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            ParamSpec { default: 0.8, ..SPARSITY },
            ParamSpec {
                name: "rank",
                doc: "hidden numbers of the predictor; 0: a quarter of the width, at most 256",
                default: 0.0,
                range: (Bound::Included(0.0), Bound::Included(4096.0)),
            },
            ParamSpec {
                name: "epochs",
                doc: "passes over the sampled tokens",
                default: 10.0,
                range: (Bound::Included(0.0), Bound::Included(1000.0)),
            },
            ParamSpec {
                name: "recall",
                doc: "0: exactly K neurons per token; above: a score that keeps this share of the active ones",
                default: 0.0,
                range: (Bound::Included(0.0), Bound::Excluded(1.0)),
            },
        ];
        PARAMS
    }

    fn needs(&self, _: &Params, ctx: PlanContext<'_>) -> Needs {
        let mut observations = Vec::new();
        for (layer, _) in mlp_layers(&ctx) {
            let proj = ctx.layers[layer].observed_as(Proj::Up);
            let points = [Point::Input { layer, proj }, Point::Neurons { layer }];
            observations.extend(points.map(|point| Observation { point, gather: sample(&ctx) }));
        }
        Needs { observations, tokens: 12_000 }
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let mut entries = Vec::new();
        for (layer, inner) in mlp_layers(&ctx) {
            let dropped = ctx.dropped(layer, Proj::Up, params.get("sparsity"));
            if dropped <= 0.0 {
                let selector = Selector::top(inner);
                entries.push(Entry { layer, rule: Rule::neurons(selector), kept: Some(1.0) });
                continue;
            }
            let point = Point::Neurons { layer };
            let missing = || MethodError::NoStatistics { method: self.name().into(), point };
            let example = self.example(&ctx, layer, dropped).ok_or_else(missing)?;
            let rank = match params.get("rank") as usize {
                0 => (example.inputs.width / 4).clamp(1, 256),
                r => r,
            };
            let trained = train(&example, rank, params.get("epochs") as usize);
            let count = ((inner as f64 * (1.0 - dropped)).round() as usize).clamp(1, inner);
            let (cut, kept) = match params.get("recall") {
                0.0 => (Cut::Top { count }, count as f64 / inner as f64),
                recall => trained.threshold(&example, recall),
            };
            let matrices = Matrices {
                down: Tensor::matrix(rank, &trained.down),
                up: Tensor::matrix(inner, &trained.up),
                relu: true,
            };
            let selector = Selector { scale: None, unit: false, cut };
            let rule = Rule::Predicted { predictor: matrices, selector, then: None };
            entries.push(Entry { layer, rule, kept: Some(kept as f32) });
        }
        if entries.is_empty() {
            return not_applicable(self, "it has no MLP outside experts");
        }
        Ok(entries)
    }

    fn report(&self, params: &Params, ctx: PlanContext<'_>, entries: &[Entry]) -> Vec<String> {
        let line = |entry: &Entry| {
            let Rule::Predicted { predictor, selector, .. } = &entry.rule else { return None };
            let dropped = ctx.dropped(entry.layer, Proj::Up, params.get("sparsity"));
            let example = self.example(&ctx, entry.layer, dropped)?;
            let trained = Trained { down: predictor.down.to_f32(), up: predictor.up.to_f32() };
            let (recall, precision, kept) = trained.quality(&example, &selector.cut);
            Some(format!(
                "layer {}: predictor recall {recall:.3}, precision {precision:.3}, keeps {kept:.3} (tokens not trained on)",
                entry.layer
            ))
        };
        entries.iter().filter_map(line).collect()
    }
}

impl Predictor {
    fn example<'a>(&self, ctx: &PlanContext<'a>, layer: usize, dropped: f64) -> Option<Example<'a>> {
        let (inputs, neurons) = pairs(ctx, layer)?;
        let exact = ctx.layers[layer].mlp.as_ref().is_some_and(|m| m.exact_zeros);
        let active = ((neurons.width as f64 * (1.0 - dropped)).round() as usize).clamp(1, neurons.width);
        Some(Example { inputs, neurons, active: (!exact).then_some(active) })
    }
}
