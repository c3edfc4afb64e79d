//! `core-neurons`: the neurons that the prompt used most, for the whole answer.
//!
//! The cheap baseline that CoreMatching (arXiv:2505.19235) calls core neurons and GRIFFIN (arXiv:2404.01365) selects per
//! prompt: prefill runs dense and notes how strongly each neuron answered (the square of `act(g) u`, relative to the
//! token's own norm, summed over tokens; with `norms=1` weighted by the norm of its column of down, which the sheet
//! recommends over counting signs). Decode keeps the strongest share and nothing else: no selection per token, one list
//! per layer and prompt. A longer conversation adds to the sums. Nothing is calibrated.

use crate::common::{SPARSITY, mlp_layers, not_applicable, switch};
use lacuna_core::{
    method::{Citation, Method, MethodError, ParamSpec, Params, PlanContext},
    plan::{Cut, Entry, Rule, Selector},
    site::{Proj, Site},
};

/// Neurons by prompt.
#[derive(Debug)]
pub struct CoreNeurons;

impl Method for CoreNeurons {
    fn name(&self) -> &'static str {
        "core-neurons"
    }

    fn title(&self) -> &'static str {
        "Core neurons of the prompt"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning (2025)",
            arxiv: Some("2505.19235"),
        }
    }

    fn summary(&self) -> &'static str {
        "Keeps, for a whole answer, the neurons that the prompt used most; one list per prompt, no selection per token."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] =
            &[SPARSITY, switch("norms", "1: weigh neurons with the norms of down's columns", true)];
        PARAMS
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let mut entries = Vec::new();
        for (layer, inner) in mlp_layers(&ctx) {
            let dropped = ctx.dropped(layer, Proj::Up, params.get("sparsity"));
            let count = ((inner as f64 * (1.0 - dropped)).round() as usize).clamp(1, inner);
            let norms = (params.get("norms") >= 0.5).then(|| ctx.weights.column_norms(layer, &[Proj::Down])).flatten();
            let selector = Selector { scale: norms, unit: false, cut: Cut::Prompt { count } };
            entries.push(Entry { layer, rule: Rule::neurons(selector), kept: Some(count as f32 / inner as f32) });
        }
        if entries.is_empty() {
            return not_applicable(self, "it has no MLP outside experts");
        }
        Ok(entries)
    }
}
