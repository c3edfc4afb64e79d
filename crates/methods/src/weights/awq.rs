//! `awq`: inputs that are strong get finer steps.
//!
//! Lin et al., AWQ (arXiv:2306.00978; code mit-han-lab/llm-awq): before rounding to nearest, the columns of all layers that
//! read one vector are multiplied by `s_j = m_j^a` with `m_j` the strength of input `j`, and what makes the vector is divided by
//! it; the exponent `a` is searched on a grid of 20. Then each group's largest magnitude is clipped to the one of ten, down to
//! one half, whose rounding changes the outputs least; not for queries and keys.
//!
//! Differences: `m_j` is the root mean square instead of the mean magnitude, and errors are those of the layers' own outputs by
//! the Gram matrix instead of the block's. Factors are rounded to powers of two, so that scaling alone changes no bit of the
//! model in any type; they are folded into the norm before a layer, so layers that do not follow a norm (o, down) are only
//! clipped. Grids are symmetric.

use super::tools::{
    GROUP, bits, check_finite,
    factor::seen,
    grid::{self, Grid},
    rows,
};
use crate::common::switch;
use lacuna_core::{
    compress::{Changed, Codes, Compressor, Layer, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};

/// AWQ.
#[derive(Debug)]
pub struct Awq;

/// Exponents that are tried, in steps of 1/20.
const EXPONENTS: u32 = 20;
/// Clipped maxima that are tried, in steps of 1/20 down to above one half.
const CLIPS: u32 = 10;
/// Rows that exponents are judged by at most, evenly spread.
const ROWS: usize = 256;

impl Method for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn title(&self) -> &'static str {
        "Activation-aware weight quantization"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (2023)",
            arxiv: Some("2306.00978"),
        }
    }

    fn summary(&self) -> &'static str {
        "Rounds to nearest after scaling strong inputs up and the norm before them down, and clips each group where that helps; no factor of a matrix is needed."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            bits("bits of a code", 2.0, 4.0),
            GROUP,
            switch("scale", "search factors of the inputs", true),
            switch("clip", "search the largest magnitude of every group", true),
        ];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Awq {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Gram
    }

    fn factors(&self, params: &Params, layers: &[Layer<'_>]) -> Result<Option<Vec<f32>>, MethodError> {
        let Some(first) = layers.first().filter(|_| params.get("scale") > 0.0) else { return Ok(None) };
        let (inputs, _) = seen(first)?;
        let strength: Vec<f64> = inputs.squares.iter().map(|s| (s / inputs.tokens.max(1) as f64).sqrt()).collect();
        let mut best: Option<(f64, Vec<f32>)> = None;
        for i in 0..EXPONENTS {
            let factors = powers(&strength, f64::from(i) / f64::from(EXPONENTS));
            let mut error = 0.0;
            for layer in layers {
                error += scaled_error(params, layer, &factors)?;
            }
            if best.as_ref().is_none_or(|b| error < b.0) {
                best = Some((error, factors));
            }
        }
        Ok(best.map(|b| b.1).filter(|f| f.iter().any(|f| *f != 1.0)))
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let Some(grid) = Grid::of(params, layer)? else { unreachable!("bits are at least 2 by their range") };
        let (_, gram) = seen(layer)?;
        let mut codes = nearest(grid, layer, layer.weight);
        let skipped = layer.place.ends_with(".attn.q") || layer.place.ends_with(".attn.k");
        if params.get("clip") > 0.0 && !skipped {
            clip(grid, layer, gram, &mut codes);
        }
        let (weight, kept) = (grid::decode(&codes), layer.kept.map(<[bool]>::to_vec));
        Ok(Changed { weight, kept, codes: Some(codes), books: None, low_rank: None, notes: Vec::new() })
    }
}

/// `strength^exponent`, the largest times the smallest 1, each the nearest power of two.
fn powers(strength: &[f64], exponent: f64) -> Vec<f32> {
    let raw: Vec<f64> = strength.iter().map(|m| m.powf(exponent).max(1e-4).log2()).collect();
    let (low, high) = raw.iter().fold((f64::MAX, f64::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
    let middle = f64::midpoint(low, high);
    // Beyond these a norm in F16 could lose bits.
    raw.iter().map(|x| (x - middle).round().clamp(-6.0, 6.0).exp2() as f32).collect()
}

fn nearest(grid: Grid, layer: &Layer<'_>, weight: &[f32]) -> Codes {
    let mut codes = grid.codes(layer);
    codes.codes.truncate(weight.len());
    codes.scales.truncate(weight.len() / grid.group);
    let groups = weight.chunks_exact(grid.group).zip(codes.codes.chunks_exact_mut(grid.group));
    for ((w, c), scale) in groups.zip(&mut codes.scales) {
        *scale = grid.scale(w.iter().copied());
        c.iter_mut().zip(w).for_each(|(c, w)| *c = grid.code(*w, *scale));
    }
    codes
}

/// `||(W - Q(W s) / s) X^T||^2` over some rows.
fn scaled_error(params: &Params, layer: &Layer<'_>, factors: &[f32]) -> Result<f64, MethodError> {
    let Some(grid) = Grid::of(params, layer)? else { return Ok(0.0) };
    let (_, gram) = seen(layer)?;
    let n = layer.inputs;
    let step = layer.outputs.div_ceil(ROWS).max(1);
    let some: Vec<f32> = layer.weight.chunks_exact(n).step_by(step).flatten().copied().collect();
    let scaled: Vec<f32> = some.iter().enumerate().map(|(i, w)| w * factors[i % n]).collect();
    let rounded = grid::decode(&nearest(grid, layer, &scaled));
    let mut lost: Vec<f64> =
        some.iter().zip(rounded).enumerate().map(|(i, (w, r))| f64::from(w - r / factors[i % n])).collect();
    // Each row's error takes the place of its first difference.
    rows::each(layer.pool, &mut lost, n, |_, d| d[0] = energy(d, gram, n, 0));
    Ok(lost.iter().step_by(n.max(1)).sum())
}

/// `d^T G d` for the columns from `first` on.
fn energy(d: &[f64], gram: &[f64], n: usize, first: usize) -> f64 {
    let line = |i: usize| gram[(first + i) * n + first..][..d.len()].iter().zip(d).map(|(g, x)| g * x).sum::<f64>();
    d.iter().enumerate().filter(|(_, x)| **x != 0.0).map(|(i, x)| x * line(i)).sum()
}

/// Replaces the codes of every group by those under the best clipped maximum.
fn clip(grid: Grid, layer: &Layer<'_>, gram: &[f64], codes: &mut Codes) {
    let (n, per_row) = (layer.inputs, layer.inputs / grid.group);
    let mut work: Vec<_> = codes.codes.chunks_exact_mut(n).zip(codes.scales.chunks_exact_mut(per_row)).collect();
    rows::units(layer.pool, &mut work, 4, |row, (codes, scales)| {
        for (g, (codes, scale)) in codes.chunks_exact_mut(grid.group).zip(scales.iter_mut()).enumerate() {
            let first = g * grid.group;
            let w = &layer.weight[row * n + first..][..grid.group];
            let error = |codes: &[i8], scale: f32| {
                let lost: Vec<f64> = w.iter().zip(codes).map(|(w, c)| f64::from(w - f32::from(*c) * scale)).collect();
                energy(&lost, gram, n, first)
            };
            let (mut least, whole) = (error(codes, *scale), *scale);
            for i in 1..CLIPS {
                let part = 1.0 - i as f32 / (2 * CLIPS) as f32;
                let clipped = grid.scale(w.iter().map(|w| w * part));
                let tried: Vec<i8> = w.iter().map(|w| grid.code(*w, clipped)).collect();
                let now = error(&tried, clipped);
                if now < least && clipped < whole {
                    (least, *scale) = (now, clipped);
                    codes.copy_from_slice(&tried);
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{
        rtn::Rtn,
        tools::testing::{Case, run},
    };

    fn params(given: &[(&str, f64)]) -> Params {
        Params::new(&Awq, given.iter().copied()).unwrap()
    }

    #[test]
    fn factors_are_powers_of_two_around_one_and_grow_with_the_input() {
        assert_eq!(powers(&[1.0, 4.0, 16.0], 1.0), [0.25, 1.0, 4.0]);
        assert_eq!(powers(&[1.0, 4.0, 16.0], 0.5), [0.5, 1.0, 2.0]);
        assert_eq!(powers(&[0.0, 7.0], 0.0), [1.0, 1.0]);
        assert!(powers(&[1e-9, 1e9], 1.0).iter().all(|f| (1.0 / 64.0..=64.0).contains(f)));
    }

    #[test]
    fn the_chosen_factors_lose_no_more_than_none() {
        let mut better = 0;
        for seed in 0..20 {
            let mut case = Case::random(600 + seed, 16, 64, 200);
            // A few inputs that are far stronger than the others, as language models have them.
            let gram = case.seen.gram.as_mut().unwrap();
            for j in [5, 40] {
                // Once here and once below: the square grows by 30^2.
                gram[j * 65] *= 30.0;
                (0..64).for_each(|i| {
                    (gram[i * 64 + j], gram[j * 64 + i]) = (30.0 * gram[i * 64 + j], 30.0 * gram[j * 64 + i])
                });
            }
            case.seen.squares = (0..64).map(|j| gram[j * 65]).collect();
            let given = params(&[("bits", 3.0), ("group", 32.0)]);
            let layer = case.layer();
            let factors = Awq.factors(&given, &[layer]).unwrap();
            let error = |f: &[f32]| scaled_error(&given, &layer, f).unwrap();
            let plain = error(&[1.0; 64]);
            let chosen = factors.map_or(plain, |f| error(&f));
            assert!(chosen <= plain, "{seed}");
            better += usize::from(chosen < 0.8 * plain);
        }
        assert!(better >= 15, "{better} of 20");
    }

    #[test]
    fn nothing_to_search_is_rounding_to_nearest_and_clips_never_hurt_a_group() {
        let case = Case::random(61, 16, 64, 200);
        let out = |clip: f64| run(&Awq, &[("bits", 3.0), ("group", 32.0), ("clip", clip)], &case.layer()).unwrap();
        assert_eq!(out(0.0), run(&Rtn, &[("bits", 3.0), ("group", 32.0)], &case.layer()).unwrap());
        let gram = case.seen.gram.as_ref().unwrap();
        let errors = |w: &[f32]| -> Vec<f64> {
            let lost: Vec<f64> = case.weight.iter().zip(w).map(|(a, b)| f64::from(a - b)).collect();
            lost.chunks(32).enumerate().map(|(i, d)| energy(d, gram, 64, i % 2 * 32)).collect()
        };
        let (plain, clipped) = (errors(&out(0.0).weight), errors(&out(1.0).weight));
        assert!(plain.iter().zip(&clipped).all(|(p, c)| c <= p));
        assert!(clipped.iter().sum::<f64>() < 0.95 * plain.iter().sum::<f64>());
        // Queries and keys are not clipped.
        let q = Layer { place: "layers.0.attn.q", ..case.layer() };
        assert_eq!(run(&Awq, &[("bits", 3.0), ("group", 32.0)], &q).unwrap(), out(0.0));
    }
}
