//! How much memory a model will take, known from its header before anything is loaded.

use super::spec::{MlpSpec, Spec};
use crate::error::{Error, Result};

/// Tokens that one prefill step works on; decides the size of the scratch buffers.
pub const CHUNK: usize = 512;

/// Bytes by purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Weights in the form they are kept in (of a mapped file: once every page was touched).
    pub weights: u64,
    /// Keys and values of a full context.
    pub kv: u64,
    /// Activations of one prefill step, and the logits.
    pub scratch: u64,
}

impl MemoryEstimate {
    /// The estimate for `weights` bytes of weights, a context of `context` positions, and `kv_bytes` bytes per cached number.
    pub fn new(spec: &Spec, weights: u64, context: usize, kv_bytes: usize) -> Self {
        let cached: u64 = spec.blocks.iter().map(|b| 2 * (b.kv_heads * b.head_dim) as u64).sum();
        let kv = cached.saturating_mul(context as u64).saturating_mul(kv_bytes as u64);
        let widest = spec.blocks.iter().map(|b| {
            let inner = match b.mlp {
                MlpSpec::Gated { inner } | MlpSpec::Plain { inner } | MlpSpec::Experts { inner, .. } => inner,
            };
            2 * b.heads * b.head_dim + 2 * b.kv_heads * b.head_dim + 2 * inner
        });
        let row = widest.max().unwrap_or(0) + 3 * spec.width;
        let tokens = CHUNK.min(context);
        let scratch = 4 * (row as u64).saturating_mul(tokens as u64).saturating_add(spec.vocab as u64);
        Self { weights, kv, scratch }
    }

    /// The sum.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv).saturating_add(self.scratch)
    }

    /// Refuses what is above `limit`.
    ///
    /// # Errors
    /// [`Error::Memory`] with the parts of the estimate.
    pub fn within(&self, limit: u64) -> Result<()> {
        if self.total() <= limit {
            return Ok(());
        }
        let detail = format!("weights {}, keys and values {}, scratch {}", self.weights, self.kv, self.scratch);
        Err(Error::Memory { need: self.total(), limit, detail })
    }
}
