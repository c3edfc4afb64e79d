//! The weights of latent attention.

use super::Binder;
use crate::{
    error::Result,
    model::{
        spec::{BlockSpec, Latent},
        weights::{LatentWeights, Linear},
    },
};

impl Binder<'_> {
    /// Query, latent of keys and values, expansion; see [`crate::model::weights::Block`].
    pub(super) fn latent(&self, i: usize, b: &BlockSpec, l: Latent) -> Result<([Linear; 3], LatentWeights)> {
        let (n, width, queries) = (&self.names.latent, self.spec.width, b.heads * b.head_dim);
        let (q, query) = match l.q_rank {
            None => (self.linear(n.q, &[i], queries, width)?, None),
            Some(rank) => {
                let down = self.linear(n.q_down, &[i], rank, width)?;
                (self.linear(n.q_up, &[i], queries, rank)?, Some((down, self.norm(n.q_norm, &[i], rank)?)))
            }
        };
        let k = self.linear(n.kv_down, &[i], l.kv_rank + l.rope, width)?;
        let v = self.linear(n.kv_up, &[i], b.heads * (l.nope + l.value), l.kv_rank)?;
        Ok(([q, k, v], LatentWeights { query, kv_norm: self.norm(n.kv_norm, &[i], l.kv_rank)? }))
    }
}
