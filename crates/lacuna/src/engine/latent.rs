//! Latent attention (MLA): queries, keys and values of full size from their latents, so that attention and its cache are those of
//! other models. What that costs: per position and layer the cache holds `2 heads (nope + rope)` numbers (values are filled up
//! with zeros to the size of keys) where the latents are `kv_rank + rope`.

use super::{
    forward::{Forward, Site, Workspace, layer_plan, project, sized},
    rows,
};
use crate::model::{
    spec::{BlockSpec, Latent},
    weights::{Block, LatentWeights},
};
use lacuna_core::site::Proj;
use lacuna_kernels::elementwise;

/// Buffers of latent attention; rows of the tokens lie one after the other.
#[derive(Default)]
pub(super) struct LatentBuffers {
    /// Latents of the queries.
    queries: Vec<f32>,
    /// The same, normalised.
    normal_queries: Vec<f32>,
    /// Latents of keys and values, each with the rotated part of the keys behind it.
    down: Vec<f32>,
    /// The latents alone, as they come and normalised.
    compressed: Vec<f32>,
    normal: Vec<f32>,
    /// Per head the rest of a key, then a value.
    expanded: Vec<f32>,
}

impl Forward<'_> {
    /// From the normalised `h` to `q`, `k` and `v`, rotated.
    pub(super) fn latent(
        &mut self,
        layer: usize,
        (weights, latent): (&Block, &LatentWeights),
        (block, l): (&BlockSpec, Latent),
        n: usize,
    ) {
        let pool = &self.shared.pool;
        let place = Site { mode: self.mode, pool, layer, plan: layer_plan(self.plan, layer) };
        let Workspace { h, q, k, v, linears, latent: buffers, .. } = &mut *self.ws;
        let LatentBuffers { queries, normal_queries, down, compressed, normal, expanded } = buffers;
        let q = sized(q, n * block.heads * block.head_dim);
        let down = sized(down, n * (l.kv_rank + l.rope));
        match (&latent.query, l.q_rank) {
            (Some((q_down, gain)), Some(rank)) => {
                let queries = sized(queries, n * rank);
                let parts = [(Proj::Q, q_down, &mut *queries), (Proj::K, &weights.k, &mut *down)];
                project(&place, linears, self.counters, (h, n), parts);
                let normal = sized(normal_queries, n * rank);
                elementwise::rms_norm_rows(pool, queries, &gain.gain, gain.over, l.eps, normal);
                project(&place, linears, self.counters, (normal, n), [(Proj::Q, &weights.q, &mut *q)]);
            }
            _ => {
                let parts = [(Proj::Q, &weights.q, &mut *q), (Proj::K, &weights.k, &mut *down)];
                project(&place, linears, self.counters, (h, n), parts);
            }
        }
        let compressed = sized(compressed, n * l.kv_rank);
        for (to, from) in compressed.chunks_exact_mut(l.kv_rank).zip(down.chunks_exact(l.kv_rank + l.rope)) {
            to.copy_from_slice(&from[..l.kv_rank]);
        }
        let normal = sized(normal, n * l.kv_rank);
        elementwise::rms_norm_rows(pool, compressed, &latent.kv_norm.gain, latent.kv_norm.over, l.eps, normal);
        let expanded = sized(expanded, n * block.heads * (l.nope + l.value));
        project(&place, linears, self.counters, (normal, n), [(Proj::V, &weights.v, &mut *expanded)]);
        for buffer in [k, v] {
            sized(buffer, n * block.heads * block.head_dim);
        }
        self.heads(block, l);
    }

    /// Rotates the ends of the queries, and puts keys and values together.
    fn heads(&mut self, block: &BlockSpec, l: Latent) {
        let pool = &self.shared.pool;
        let Workspace { q, k, v, cos, sin, latent, .. } = &mut *self.ws;
        let LatentBuffers { down, expanded, .. } = &*latent;
        let pairs = block.rope.and_then(|r| Some((r, self.shared.model.spec.ropes.get(r)?.pairs)));
        let rotate = |i: usize, x: &mut [f32]| {
            let Some((r, pairs)) = pairs else { return };
            let at = i * (l.rope / 2)..(i + 1) * (l.rope / 2);
            elementwise::rope(x, l.rope, pairs, &cos[r][at.clone()], &sin[r][at]);
        };
        let width = block.heads * block.head_dim;
        rows::each(pool, q, width, |i, row| {
            row.chunks_exact_mut(block.head_dim).for_each(|head| rotate(i, &mut head[l.nope..]));
        });
        let parts = |i: usize| {
            let row = block.heads * (l.nope + l.value);
            expanded[i * row..(i + 1) * row].chunks_exact(l.nope + l.value)
        };
        rows::each(pool, k, width, |i, row| {
            let end = i * (l.kv_rank + l.rope) + l.kv_rank;
            let mut shared = down[end..end + l.rope].to_vec();
            rotate(i, &mut shared);
            for (head, part) in row.chunks_exact_mut(block.head_dim).zip(parts(i)) {
                head[..l.nope].copy_from_slice(&part[..l.nope]);
                head[l.nope..].copy_from_slice(&shared);
            }
        });
        rows::each(pool, v, width, |i, row| {
            for (head, part) in row.chunks_exact_mut(block.head_dim).zip(parts(i)) {
                head[..l.value].copy_from_slice(&part[l.nope..]);
                head[l.value..].fill(0.0);
            }
        });
    }
}

/// Leaves of attended heads as long as keys what belongs to the values.
pub(super) fn cut_values(block: &BlockSpec, attended: &mut Vec<f32>) {
    let Some(value) = block.latent.map(|l| l.value).filter(|v| *v < block.head_dim) else { return };
    let heads = attended.len() / block.head_dim;
    for head in 1..heads {
        attended.copy_within(head * block.head_dim..head * block.head_dim + value, head * value);
    }
    attended.truncate(heads * value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_lose_what_filled_them_up() {
        let shape = crate::model::shape::Shape {
            vocab: 2,
            width: 4,
            layers: 1,
            heads: 2,
            kv_heads: 2,
            head_dim: 3,
            inner: 4,
            context: 8,
        };
        let rope = crate::model::rope::unscaled(10_000.0, 2, crate::model::spec::RopePairs::Half);
        let mut block = shape.decoder("test", 1e-5, rope, crate::model::spec::Act::Silu).blocks[0].clone();
        let rows: Vec<f32> = (0..12).map(|v| v as f32).collect();
        let mut attended = rows.clone();
        cut_values(&block, &mut attended);
        assert_eq!(attended, rows, "other attention stays");
        block.latent = Some(Latent { q_rank: None, kv_rank: 4, nope: 1, rope: 2, value: 2, eps: 1e-6 });
        cut_values(&block, &mut attended);
        assert_eq!(attended, [0.0, 1.0, 3.0, 4.0, 6.0, 7.0, 9.0, 10.0]);
    }
}
