//! How a share that is wanted for a whole block is spread over its projections where no search was run.
//!
//! The mean over the 32 layers of Llama-3-8B of TEAL's released greedy allocations (FasterDecoding/TEAL,
//! models/*/lookup): o, q and down are sparsified more, v and up least. Rows between are interpolated, and the result is
//! shifted so that the mean over this block's own weights is the wanted share.

use lacuna_core::{method::LayerShape, site::Proj};

/// Share of the block, then q, k, v, o, gate, up, down.
const TABLE: [(f64, [f64; 7]); 5] = [
    (0.0, [0.0; 7]),
    (0.25, [0.33, 0.23, 0.19, 0.36, 0.24, 0.17, 0.30]),
    (0.50, [0.59, 0.43, 0.36, 0.62, 0.51, 0.40, 0.54]),
    (0.65, [0.71, 0.57, 0.46, 0.75, 0.66, 0.58, 0.69]),
    (1.0, [1.0; 7]),
];

/// The share to drop at each projection (in the order of [`Proj::ALL`]) so that `share` of the block's weights is.
pub fn allocation(shape: &LayerShape, share: f64) -> [f64; 7] {
    let upper = TABLE.iter().position(|row| row.0 >= share).unwrap_or(TABLE.len() - 1).max(1);
    let ((low, a), (high, b)) = (TABLE[upper - 1], TABLE[upper]);
    let t = (share - low) / (high - low);
    let mut shares: [f64; 7] = std::array::from_fn(|i| a[i] + t * (b[i] - a[i]));
    let weights = Proj::ALL.map(|p| shape.projection(p).map_or(0.0, |(o, i)| (o * i) as f64));
    let all: f64 = weights.iter().sum();
    // Clamping at the ends moves the mean a little; a few rounds settle it.
    for _ in 0..20 {
        let mean = shares.iter().zip(weights).map(|(s, w)| s * w).sum::<f64>() / all;
        shares.iter_mut().for_each(|s| *s = (*s + share - mean).clamp(0.0, 0.99));
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::method::MlpShape;

    #[test]
    fn the_mean_over_the_weights_is_the_wanted_share() {
        let mlp = MlpShape { inner: 14336, gated: true, activation: "silu".into(), exact_zeros: false };
        let llama = LayerShape { width: 4096, query: 4096, kv: 1024, mlp: Some(mlp), experts: None };
        for share in [0.0, 0.1, 0.25, 0.4, 0.5, 0.65, 0.9, 0.95] {
            let a = allocation(&llama, share);
            let weights = Proj::ALL.map(|p| llama.projection(p).map_or(0.0, |(o, i)| (o * i) as f64));
            let mean = a.iter().zip(weights).map(|(s, w)| s * w).sum::<f64>() / weights.iter().sum::<f64>();
            assert!((mean - share).abs() < 1e-6, "{share}: {mean} {a:?}");
        }
        let half = allocation(&llama, 0.5);
        assert!((half[0] - 0.59).abs() < 0.03 && half[2] < half[1] && half[5] < half[6], "{half:?}");
    }
}
