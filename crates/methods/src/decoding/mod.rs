//! Methods that change the decoding loop: several tokens are guessed and checked in one pass.

mod common;
pub mod self_speculation;
pub mod sirius;
pub mod token_recycling;
