//! `cats`: drop the neurons of a gated MLP whose activated gate is small.
//!
//! Lee et al., CATS (arXiv:2404.08763). The gate is computed in full; neuron `i` stays where `|act(g_i)| > t`, one
//! threshold per layer: the quantile of `|act(g)|` over calibration text. Row `i` of up and column `i` of down are
//! read for kept neurons only, `(1 + 2p)/3` of the MLP's bytes for a kept share `p`; attention is untouched.
//! The paper: Mistral-7B and Llama2-7B within 1-2 % of dense at 50 %. With ReLU and `t = 0` it is exact.

use crate::common::{SPARSITY, neuron_magnitudes, neurons, threshold};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Entry, Rule},
    site::{Point, Proj, Site},
};

/// CATS.
#[derive(Debug)]
pub struct Cats;

impl Method for Cats {
    fn name(&self) -> &'static str {
        "cats"
    }

    fn title(&self) -> &'static str {
        "CATS, thresholded gates"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models (2024)",
            arxiv: Some("2404.08763"),
        }
    }

    fn summary(&self) -> &'static str {
        "Computes the gate, then only the rows of up and columns of down of neurons whose activated gate exceeds a calibrated threshold."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[SPARSITY]
    }

    fn needs(&self, _: &Params, ctx: PlanContext<'_>) -> Needs {
        Needs { observations: neuron_magnitudes(&ctx), tokens: 20_000 }
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        neurons(self, &ctx, |layer, _| {
            let dropped = ctx.dropped(layer, Proj::Up, params.get("sparsity"));
            let (selector, kept) = threshold(self, &ctx, Point::Neurons { layer }, None, dropped)?;
            Ok((Rule::neurons(selector), Some(kept)))
        })
    }
}
