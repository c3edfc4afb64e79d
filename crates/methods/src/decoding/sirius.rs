//! `sirius`: correct a sparse model by dense passes over the tokens it wrote.
//!
//! Zhou et al., Sirius (arXiv:2409.03856): the plan of the other methods writes a block of tokens; one dense pass
//! overwrites their keys and values, keeps the beginning whose probabilities (at temperature 0.6, as in the published
//! code) reach a threshold, and gives the token behind it. Not lossless.

use super::BLOCK;
use lacuna_core::{
    method::{Citation, Method, ParamSpec, Params},
    plan::{Accept, Decoding, DraftSource},
    site::Site,
};
use std::ops::Bound;

/// Sirius.
#[derive(Debug)]
pub struct Sirius;

impl Method for Sirius {
    fn name(&self) -> &'static str {
        "sirius"
    }

    fn title(&self) -> &'static str {
        "Sirius"
    }

    fn site(&self) -> Site {
        Site::Decoding
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Sirius: Contextual Sparsity with Correction for Efficient LLMs (2024)",
            arxiv: Some("2409.03856"),
        }
    }

    fn summary(&self) -> &'static str {
        "The sparse model writes a block of tokens; one dense pass rewrites its cache and keeps those that are likely enough."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[
            ParamSpec {
                name: "threshold",
                doc: "least probability of a token that stays, by the dense model at temperature 0.6",
                default: 0.05,
                range: (Bound::Included(0.0), Bound::Included(1.0)),
            },
            BLOCK,
        ]
    }

    fn decoding(&self, params: &Params) -> Option<Decoding> {
        let accept = Accept::Threshold { probability: params.get("threshold") as f32 };
        Some(Decoding { draft: DraftSource::Plan, accept, most: params.get("block") as usize })
    }
}
