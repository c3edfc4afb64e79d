//! `self-speculation`: the model guesses for itself, sparse; the dense model checks.
//!
//! The exact-match mode of Sirius (Zhou et al., arXiv:2409.03856): the plan of the other methods writes a block of
//! tokens, one dense pass over the block overwrites their keys and values and keeps what dense decoding would have
//! chosen. The text is that of dense decoding, whatever the plan.

use super::BLOCK;
use lacuna_core::{
    method::{Citation, Method, ParamSpec, Params},
    plan::{Accept, Decoding, DraftSource},
    site::Site,
};

/// Self-speculation by a sparse plan.
#[derive(Debug)]
pub struct SelfSpeculation;

impl Method for SelfSpeculation {
    fn name(&self) -> &'static str {
        "self-speculation"
    }

    fn title(&self) -> &'static str {
        "Self-speculation by a sparse plan"
    }

    fn site(&self) -> Site {
        Site::Decoding
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Sirius: Contextual Sparsity with Correction for Efficient LLMs (2024), its exact-match mode",
            arxiv: Some("2409.03856"),
        }
    }

    fn summary(&self) -> &'static str {
        "The sparse model writes a block of tokens; one dense pass checks it and keeps what dense decoding would choose."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[BLOCK]
    }

    fn decoding(&self, params: &Params) -> Option<Decoding> {
        let most = params.get("block") as usize;
        Some(Decoding { draft: DraftSource::Plan, accept: Accept::Exact, most })
    }
}
