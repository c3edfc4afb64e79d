//! What skipping costs: perplexity and divergence from the dense model, by llama.cpp's protocols so that figures compare.
//!
//! [`windows`] cuts a text into the windows of a protocol, [`source`] is where logits come from, [`perplexity()`] and
//! [`divergence()`] measure. Everything is streamed: no file of base logits is written.

pub mod divergence;
pub mod experts;
pub mod perplexity;
pub mod source;
pub mod windows;

pub use divergence::{Divergence, divergence};
pub use experts::{ExpertUse, expert_use};
pub use perplexity::{Perplexity, perplexity};
pub use source::{EngineSource, LogSoftmax, LogitSource, Scoring};
pub use windows::{Protocol, Window};
