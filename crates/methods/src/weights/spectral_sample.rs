//! `spectral-sample`: keep the largest weights, and draw the others so that the matrix is right in the mean.
//!
//! "Neural Network Pruning as Spectrum Preserving Process" (2023) sees pruning as a matrix that keeps its spectrum under fewer
//! entries, and announces truncation with sampling; its rule was not found. This is the classical construction (Achlioptas
//! and McSherry 2007; Drineas and Zouzias 2011) and not the paper's: of `k` entries the largest `beta k` stay as they are, the
//! others are drawn in proportion to their squares and divided by the probability of being drawn, so that the mean over seeds is
//! the matrix itself. Drawing is systematic on a random order, which meets every probability exactly and the count too.
//! Divisors stop at 1/3, which keeps the variance down and costs a bias. Each matrix takes what has the smaller spectral error
//! `||W - S||_2`, the sample or plain magnitude; truncation always has the smaller Frobenius error.

use super::tools::{check_finite, select, share};
use crate::common::SPARSITY;
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Pattern, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};
use std::ops::Bound;

/// Spectral sampling.
#[derive(Debug)]
pub struct SpectralSample;

impl Method for SpectralSample {
    fn name(&self) -> &'static str {
        "spectral-sample"
    }

    fn title(&self) -> &'static str {
        "Spectral sampling"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation { paper: "Neural Network Pruning as Spectrum Preserving Process (2023)", arxiv: None }
    }

    fn summary(&self) -> &'static str {
        "Keeps the largest weights and draws the rest by lot, scaled up; or plain magnitude, where that is nearer in the spectral norm."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            SPARSITY,
            ParamSpec {
                name: "beta",
                doc: "share of the kept weights that are the largest ones; the others are drawn; 1: magnitude",
                default: 0.9,
                range: (Bound::Included(0.0), Bound::Included(1.0)),
            },
            ParamSpec {
                name: "cap",
                doc: "drawn weights grow to this many times their size at most",
                default: 3.0,
                range: (Bound::Included(1.0), Bound::Included(1e6)),
            },
            ParamSpec {
                name: "always",
                doc: "1: the sample, even where magnitude has the smaller spectral error",
                default: 0.0,
                range: (Bound::Included(0.0), Bound::Included(1.0)),
            },
        ];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for SpectralSample {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Nothing
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let mut scores: Vec<f32> = layer.weight.iter().map(|w| w.abs()).collect();
        select::after_earlier(&mut scores, layer.kept);
        let (n, gone) = (scores.len(), select::count(share(params, layer), layer.weight.len()));
        let top = select::mask(layer, &scores, select::Scope::Layer, Pattern::Free, share(params, layer))?;
        let largest = select::masked(layer.weight, &top);
        let keep = n - gone;
        let sample = sampled(layer, &scores, keep, (params.get("beta") * keep as f64) as usize, params.get("cap"));
        let rows = layer.outputs;
        let [of_largest, of_sample] = [&largest, &sample.0].map(|s| spectral_error(layer.weight, s, rows));
        let take = gone > 0 && (params.get("always") > 0.0 || of_sample < of_largest);
        let (weight, kept) = if take { sample } else { (largest, top) };
        let frobenius = layer.weight.iter().zip(&weight).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        let (place, what) = (layer.place, if take { "sampled" } else { "magnitude" });
        let note = format!(
            "{place}: {what}; spectral error {of_sample:.4} of the sample, {of_largest:.4} of magnitude; Frobenius error {frobenius:.4}"
        );
        let notes = if gone > 0 { vec![note] } else { Vec::new() };
        Ok(Changed { weight, kept: Some(kept), codes: None, books: None, low_rank: None, notes })
    }
}

/// The `sure` largest of `scores` as they are, and as many others by lot as `keep` leaves. Entries with a negative score (an
/// earlier step dropped them) are drawn only where nothing else is left, as zeros.
fn sampled(layer: &Layer<'_>, scores: &[f32], keep: usize, sure: usize, cap: f64) -> (Vec<f32>, Vec<bool>) {
    let mut kept = vec![true; scores.len()];
    select::keep_largest(scores, scores.len() - sure, &mut kept);
    let rest: Vec<usize> = (0..scores.len()).filter(|i| !kept[*i]).collect();
    let squares: Vec<f64> = rest.iter().map(|i| f64::from(scores[*i].max(0.0)).powi(2)).collect();
    let chances = chances(&squares, keep - sure);
    let mut lots = Lots(layer.seed);
    let mut order: Vec<usize> = (0..rest.len()).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, (lots.next() * (i + 1) as f64) as usize);
    }
    let mut weight = select::masked(layer.weight, &kept);
    let (mut at, mut drawn) = (lots.next(), 0);
    let mut sum = 0.0;
    for i in order {
        sum += chances[i];
        // Rounding must not take one too many.
        if sum > at && drawn < keep - sure {
            at += 1.0;
            drawn += 1;
            kept[rest[i]] = true;
            weight[rest[i]] = layer.weight[rest[i]] * (1.0 / chances[i]).min(cap) as f32;
        }
    }
    // Nor one too few: the largest that were not drawn.
    let mut missing: Vec<usize> = rest.into_iter().filter(|i| !kept[*i]).collect();
    missing.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    for i in missing.into_iter().take(keep - sure - drawn) {
        kept[i] = true;
        weight[i] = layer.weight[i];
    }
    let before = |i: usize| layer.kept.is_none_or(|k| k[i]);
    kept.iter_mut().enumerate().for_each(|(i, k)| *k &= before(i));
    weight.iter_mut().zip(&kept).filter(|(_, k)| !**k).for_each(|(w, _)| *w = 0.0);
    (weight, kept)
}

/// Probabilities in proportion to `squares`, none above 1, of sum `draw`.
fn chances(squares: &[f64], draw: usize) -> Vec<f64> {
    let mut sure = vec![false; squares.len()];
    loop {
        let taken = sure.iter().filter(|s| **s).count();
        let open: f64 = squares.iter().zip(&sure).filter(|(_, s)| !**s).map(|(q, _)| q).sum();
        let scale = if open > 0.0 { draw.saturating_sub(taken) as f64 / open } else { 0.0 };
        let over: Vec<usize> = (0..squares.len()).filter(|i| !sure[*i] && squares[*i] * scale >= 1.0).collect();
        if over.is_empty() {
            return squares.iter().zip(&sure).map(|(q, s)| if *s { 1.0 } else { q * scale }).collect();
        }
        over.into_iter().for_each(|i| sure[i] = true);
    }
}

/// Numbers from 0 to 1 (SplitMix64).
struct Lots(u64);

impl Lots {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Power iterations of the spectral norm.
const ITERATIONS: usize = 20;

/// `||A - B||_2` of matrices of `rows` rows, from below, by power iterations.
pub fn spectral_error(a: &[f32], b: &[f32], rows: usize) -> f64 {
    let cols = a.len() / rows.max(1);
    let e: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let mut lots = Lots(1);
    let mut x: Vec<f64> = (0..cols).map(|_| lots.next() - 0.5).collect();
    let norm = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>().sqrt();
    let mut found = 0.0;
    for _ in 0..ITERATIONS {
        let length = norm(&x);
        if length <= 0.0 {
            return 0.0;
        }
        x.iter_mut().for_each(|v| *v /= length);
        let y: Vec<f64> =
            e.chunks_exact(cols).map(|row| row.iter().zip(&x).map(|(w, v)| f64::from(*w) * v).sum()).collect();
        found = norm(&y);
        x.fill(0.0);
        for (row, y) in e.chunks_exact(cols).zip(&y) {
            x.iter_mut().zip(row).for_each(|(v, w)| *v += f64::from(*w) * y);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{
        magnitude::Magnitude,
        tools::testing::{Case, run},
    };

    #[test]
    fn all_sure_is_magnitude() {
        let case = Case::random(80, 20, 30, 0);
        let ours = run(&SpectralSample, &[("sparsity", 0.5), ("beta", 1.0), ("always", 1.0)], &case.layer()).unwrap();
        let magnitude = run(&Magnitude, &[("sparsity", 0.5)], &case.layer()).unwrap();
        assert_eq!((ours.weight, ours.kept), (magnitude.weight, magnitude.kept));
    }

    /// Without the cap, the mean over seeds is the matrix: each entry within 5 standard errors, all together within 3.
    #[test]
    fn the_mean_over_seeds_is_the_matrix() {
        let case = Case::random(81, 6, 10, 0);
        let (draws, given) = (4000, [("sparsity", 0.4), ("beta", 0.5), ("cap", 1e6), ("always", 1.0)]);
        let (mut sums, mut squares) = (vec![0.0; 60], vec![0.0; 60]);
        for seed in 0..draws {
            let out = run(&SpectralSample, &given, &Layer { seed, ..case.layer() }).unwrap();
            assert_eq!(out.kept.unwrap().iter().filter(|k| **k).count(), 36);
            for (i, w) in out.weight.iter().enumerate() {
                sums[i] += f64::from(*w);
                squares[i] += f64::from(*w).powi(2);
            }
        }
        let n = draws as f64;
        let mut chi = 0.0;
        let mut drawn = 0;
        for i in 0..60 {
            let mean = sums[i] / n;
            let error = ((squares[i] / n - mean * mean).max(0.0) / n).sqrt();
            let off = (mean - f64::from(case.weight[i])).abs();
            if error > 1e-9 {
                drawn += 1;
                chi += (off / error).powi(2);
            }
            assert!(off <= 5.0 * error + 1e-5, "{i}: {mean} {} {error}", case.weight[i]);
        }
        assert!(drawn > 20 && chi < f64::from(drawn) + 3.0 * (2.0 * f64::from(drawn)).sqrt(), "{chi} of {drawn}");
    }

    #[test]
    fn chances_add_up_and_stop_at_one() {
        let c = chances(&[100.0, 1.0, 1.0, 2.0], 2);
        assert_eq!(c, [1.0, 0.25, 0.25, 0.5]);
        assert_eq!(chances(&[1.0, 1.0], 2), [1.0, 1.0]);
        assert_eq!(chances(&[0.0, 0.0], 1), [0.0, 0.0]);
    }

    #[test]
    fn the_norm_is_that_of_the_singular_values() {
        let case = Case::random(82, 64, 64, 0);
        let zero = vec![0.0; 64 * 64];
        let matrix = faer::Mat::from_fn(64, 64, |i, j| f64::from(case.weight[i * 64 + j]));
        let largest = matrix.singular_values().unwrap()[0];
        let found = spectral_error(&case.weight, &zero, 64);
        let frobenius = case.weight.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
        assert!(found <= largest * (1.0 + 1e-6) && found > 0.95 * largest && found < frobenius, "{found} {largest}");
        assert_eq!(spectral_error(&zero, &zero, 64), 0.0);
    }

    #[test]
    fn the_nearer_one_is_taken() {
        let case = Case::random(83, 48, 96, 0);
        let out = run(&SpectralSample, &[("sparsity", 0.6)], &case.layer()).unwrap();
        let magnitude = run(&Magnitude, &[("sparsity", 0.6)], &case.layer()).unwrap();
        let error = |w: &[f32]| spectral_error(&case.weight, w, 48);
        assert!(error(&out.weight) <= error(&magnitude.weight));
        assert!(out.notes[0].starts_with("layers.0.mlp.up: ") && out.notes[0].contains("spectral error"));
    }
}
