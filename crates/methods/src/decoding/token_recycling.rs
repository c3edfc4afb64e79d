//! `token-recycling`: guess by the candidates that earlier passes gave for the same tokens, and check a small tree of
//! guesses in one pass.
//!
//! Luo et al., Turning Trash into Treasure (arXiv:2408.08696): a table holds the 8 most likely successors of every token
//! as they were last seen. The published tree of 80 nodes is for GPUs; here the tree grows best first by the measured
//! frequency of each rank and stops where a further node costs more time than it brings. The text stays the same.

use lacuna_core::{
    method::{Citation, Method, ParamSpec, Params},
    plan::{Accept, Decoding, DraftSource, MAX_CHECKED},
    site::Site,
};
use std::ops::Bound;

/// Token Recycling.
#[derive(Debug)]
pub struct TokenRecycling;

impl Method for TokenRecycling {
    fn name(&self) -> &'static str {
        "token-recycling"
    }

    fn title(&self) -> &'static str {
        "Token Recycling"
    }

    fn site(&self) -> Site {
        Site::Decoding
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling (2024)",
            arxiv: Some("2408.08696"),
        }
    }

    fn summary(&self) -> &'static str {
        "Guesses the next tokens by the most likely successors seen earlier and checks a small tree of them in one pass."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[ParamSpec {
            name: "nodes",
            doc: "most tokens checked in one pass, the known first one included",
            default: 16.0,
            range: (Bound::Included(1.0), Bound::Included(MAX_CHECKED as f64)),
        }]
    }

    fn decoding(&self, params: &Params) -> Option<Decoding> {
        let most = params.get("nodes") as usize;
        Some(Decoding { draft: DraftSource::TokenRecycling, accept: Accept::Exact, most })
    }
}
