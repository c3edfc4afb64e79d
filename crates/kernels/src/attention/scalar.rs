//! The readable twin of all attention kernels: one query at a time, sums in f64.

use super::page::{Layout, get};
use super::{Cache, Spec};

/// Attention of one query at position `at` over the positions it sees; `q` and `out` hold `heads * head_dim`.
///
/// `out = sum_j softmax_j(cap(scale * q . k_j)) v_j` over the last `window` positions up to `at`
/// (Vaswani et al. 2017, equation 1; score capping as in Gemma 2).
pub(super) fn row(spec: &Spec, cache: &Cache<'_>, at: usize, q: &[f32], out: &mut [f32]) {
    let layout = cache.layout(spec);
    let first = spec.first_visible(at);
    let group = spec.heads / spec.kv_heads;
    let heads = q.chunks_exact(spec.head_dim).zip(out.chunks_exact_mut(spec.head_dim));
    for (head, (q, out)) in heads.enumerate() {
        let run = |j: usize| layout.split(cache.pages[j / cache.page_len], head / group);
        let score = |j: usize| score(spec, &layout, run(j).0, j % cache.page_len, q);
        let scores: Vec<f64> = (first..=at).map(score).collect();
        // f64::max would hide a NaN.
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, &s| if s <= m { m } else { s });
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (i, o) in out.iter_mut().enumerate() {
            let value = |j: usize| f64::from(get(cache.ty, run(j).1, layout.value(j % cache.page_len, i)));
            let total: f64 = weights.iter().enumerate().map(|(j, w)| w * value(first + j)).sum();
            *o = (total / sum) as f32;
        }
    }
}

fn score(spec: &Spec, layout: &Layout, keys: &[u8], slot: usize, q: &[f32]) -> f64 {
    let product = |(i, &x): (usize, &f32)| f64::from(x) * f64::from(get(layout.ty, keys, layout.key(slot, i)));
    let s = q.iter().enumerate().map(product).sum::<f64>() * f64::from(spec.scale);
    match spec.cap {
        Some(cap) => f64::from(cap) * (s / f64::from(cap)).tanh(),
        None => s,
    }
}
