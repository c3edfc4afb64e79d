//! How much depends on each block: how far it turns the residual stream, and how the loss moves with noise on its weights.

use super::{
    Plan, Progress,
    block::{Runner, decoded},
};
use crate::{
    engine::{Engine, KvType, Options, probe::Probe},
    error::{Error, Result},
    eval::LogSoftmax,
    model::{Model, weights::Block},
};
use lacuna_core::{
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::Format;
use lacuna_methods::weights::ratios::ecoflap::rank_correlation;
use std::{path::Path, sync::Arc};

/// Step of the noise, as ECoFLaP's code has it.
const EPSILON: f32 = 1e-3;
/// Draws of noise per matrix, each on a text of its own.
const DRAWS: usize = 16;
/// Tokens of each text at most.
const TOKENS: usize = 128;

/// The mean over tokens of `arccos(cos(x_in, x_out)) / pi` for every block of the dense model.
///
/// # Errors
/// No text; what the engine says.
pub fn angles(
    plan: &Plan<'_>,
    model: &Model,
    spill: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<f64>> {
    let Some(mut hidden) = plan.embed(model, spill)? else { return Err(no_text()) };
    let (width, all) = (model.spec.width, model.blocks.len());
    let mut angles = Vec::new();
    for (layer, block) in model.blocks.iter().enumerate() {
        progress(Progress::Measured(layer, all));
        let runner = Runner::new(model, layer, block.clone(), plan.request.threads)?;
        let (mut sum, mut tokens) = (0.0, 0);
        for i in 0..hidden.len() {
            let x = hidden.get(i)?;
            let y = runner.run(&x, hidden.tokens(i))?;
            for (a, b) in x.chunks_exact(width).zip(y.chunks_exact(width)) {
                sum += angle(a, b);
                tokens += 1;
            }
            hidden.set(i, &y)?;
        }
        angles.push(sum / f64::from(tokens.max(1)));
        super::release(model, layer);
    }
    progress(Progress::Measured(all, all));
    Ok(angles)
}

/// The angle between two vectors over pi; 0 if one of them is zero.
fn angle(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { (dot(a, b) / norms).clamp(-1.0, 1.0).acos() / std::f64::consts::PI } else { 0.0 }
}

/// ECoFLaP's score of every block, and how far two halves of the draws agree on the order of the blocks: the sums over matrices
/// and draws of `|L(W + eps z) - L(W - eps z)| / (2 eps)`, for the projections that `wanted` names.
///
/// # Errors
/// No text, or one without two tokens in a row; what the engine says.
pub fn scores(
    plan: &Plan<'_>,
    model: &Model,
    wanted: &dyn Fn(Proj) -> bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(Vec<f64>, f64)> {
    let windows = plan.request.calibration.as_ref().map_or(&[][..], |c| &c.windows[..]);
    let windows: Vec<&[u32]> = windows.iter().map(|w| &w[..w.len().min(TOKENS)]).filter(|w| w.len() > 1).collect();
    if windows.is_empty() {
        return Err(no_text());
    }
    let all = model.blocks.len();
    let threads = plan.request.threads;
    let options = Options { threads, kv: KvType::F32, ..Options::default() };
    let mut whole = Probe::new(&Engine::new(Arc::new(model.clone()), options)?);
    let mut halves = [vec![0.0; all], vec![0.0; all]];
    for draw in 0..DRAWS {
        progress(Progress::Measured(draw, DRAWS));
        let tokens = windows[draw * windows.len() / DRAWS];
        let mut x = whole.embed(tokens)?;
        for (layer, block) in model.blocks.iter().enumerate() {
            for proj in Proj::ALL.into_iter().filter(|p| wanted(*p)) {
                let Some(linear) = block.linear(proj) else { continue };
                let weight = decoded(&linear.weight);
                let seed = plan.request.seed ^ ((draw as u64) << 32 | (layer as u64) << 8 | proj as u64);
                let mut loss = |w: &[f32]| -> Result<f64> {
                    let mut y = Runner::new(model, layer, with(block, proj, w), threads)?.run(&x, tokens)?;
                    for next in layer + 1..all {
                        y = whole.block(next, &y, None)?.to_vec();
                    }
                    negative_log_likelihood(&whole.logits(&y)?, tokens, model.spec.vocab)
                };
                halves[draw % 2][layer] += slope(&weight, EPSILON, seed, &mut loss)?;
            }
            x = whole.block(layer, &x, None)?.to_vec();
        }
    }
    progress(Progress::Measured(DRAWS, DRAWS));
    let agreement = rank_correlation(&halves[0], &halves[1]);
    Ok((halves[0].iter().zip(&halves[1]).map(|(a, b)| a + b).collect(), agreement))
}

fn no_text() -> Error {
    Error::Argument { name: "ratios", problem: "these ratios run the model over a text; give one (-f FILE)".into() }
}

/// `|L(w + eps z) - L(w - eps z)| / (2 eps)` for normal `z` that follows from the seed; `w` itself is not touched.
fn slope(w: &[f32], epsilon: f32, seed: u64, loss: &mut dyn FnMut(&[f32]) -> Result<f64>) -> Result<f64> {
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z: Vec<f32> = (0..w.len()).map(|_| noise.next()).collect();
    let moved = |sign: f32| -> Vec<f32> { w.iter().zip(&z).map(|(w, z)| w + sign * epsilon * z).collect() };
    let difference = loss(&moved(1.0))? - loss(&moved(-1.0))?;
    Ok(difference.abs() / (2.0 * f64::from(epsilon)))
}

/// Normal numbers: SplitMix64 and the transformation of Box and Muller.
struct Noise(u64);

impl Noise {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn next(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.unit()).cos()) as f32
    }
}

/// The block with other numbers in one projection, in single precision.
fn with(block: &Block, proj: Proj, weight: &[f32]) -> Block {
    let mut block = block.clone();
    if let Some(linear) = block.linear_mut(proj) {
        let (outputs, inputs) = (linear.weight.outputs(), linear.weight.inputs());
        let bytes: Vec<u8> = weight.iter().flat_map(|w| w.to_le_bytes()).collect();
        linear.weight = Weight::new(Format::F32, Orientation::OutputMajor, outputs, inputs, bytes.into())
            .expect("as many numbers as before");
    }
    block
}

/// The mean over positions of the negative logarithm of the next token's probability.
fn negative_log_likelihood(logits: &[f32], tokens: &[u32], vocab: usize) -> Result<f64> {
    let mut sum = 0.0;
    for (row, next) in logits.chunks_exact(vocab).zip(&tokens[1..]) {
        sum -= LogSoftmax::new(row)?.of(row[*next as usize]);
    }
    Ok(sum / (tokens.len() - 1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_by_hand() {
        assert_eq!(angle(&[1.0, 0.0], &[2.0, 0.0]), 0.0);
        assert!((angle(&[1.0, 0.0], &[0.0, 3.0]) - 0.5).abs() < 1e-12);
        assert!((angle(&[1.0, 1.0], &[-1.0, -1.0]) - 1.0).abs() < 1e-6);
        assert_eq!(angle(&[0.0, 0.0], &[1.0, 1.0]), 0.0);
    }

    /// For `L = 1/2 w^T A w` the mean of the squared slopes is `||A w||^2`.
    #[test]
    fn slopes_of_a_quadratic_have_the_length_of_its_gradient() {
        let a = [[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]];
        let w = [0.7_f32, -1.2, 0.4];
        let product = |w: &[f32]| a.map(|row| row.iter().zip(w).map(|(a, w)| a * f64::from(*w)).sum::<f64>());
        let mut loss = |w: &[f32]| Ok(0.5 * product(w).iter().zip(w).map(|(p, w)| p * f64::from(*w)).sum::<f64>());
        let draws = 4000;
        let squares: f64 = (0..draws).map(|s| slope(&w, 1e-3, s, &mut loss).unwrap().powi(2)).sum();
        let exact: f64 = product(&w).iter().map(|g| g * g).sum();
        // A squared normal number has the deviation sqrt(2); five standard errors.
        let bound = 5.0 * (2.0 / draws as f64).sqrt();
        assert!((squares / draws as f64 / exact - 1.0).abs() < bound, "{} {exact}", squares / draws as f64);
    }

    #[test]
    fn noise_is_normal() {
        let mut noise = Noise(3);
        let z: Vec<f64> = (0..20_000).map(|_| f64::from(noise.next())).collect();
        let mean = |f: &dyn Fn(f64) -> f64| z.iter().map(|x| f(*x)).sum::<f64>() / z.len() as f64;
        assert!(mean(&|x| x).abs() < 0.04 && (mean(&|x| x * x) - 1.0).abs() < 0.05);
        assert!((mean(&|x| x.powi(4)) - 3.0).abs() < 0.4 && mean(&|x| x.powi(3)).abs() < 0.2);
    }
}
