//! Methods that change the decoding loop: several tokens are guessed and checked in one pass.

pub mod self_speculation;
pub mod sirius;
pub mod token_recycling;

use lacuna_core::{method::ParamSpec, plan::MAX_CHECKED};
use std::ops::Bound;

/// Tokens that the plan writes between two dense passes; 16 in Sirius, where a pass over 16 tokens costs little more
/// than one over a single token. On few cores it does not.
const BLOCK: ParamSpec = ParamSpec {
    name: "block",
    doc: "most tokens checked in one dense pass; all but the first are written by the plan",
    default: 8.0,
    range: (Bound::Included(1.0), Bound::Included(MAX_CHECKED as f64)),
};
