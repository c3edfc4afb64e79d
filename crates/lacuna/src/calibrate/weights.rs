//! A model's weights as methods see them: dequantised matrices, and column norms that are computed once.

use crate::model::Model;
use lacuna_core::{
    method::Weights,
    plan::Predictor,
    site::Proj,
    tensor::Tensor,
    weight::{Orientation, Weight},
};
use lacuna_kernels::convert::decode_run;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// One number per column.
type Squares = Arc<[f64]>;

/// The weights of one model.
#[derive(Debug)]
pub struct ModelWeights {
    model: Arc<Model>,
    /// Squared norms of the columns of single projections.
    squares: Mutex<BTreeMap<(usize, Proj), Squares>>,
    /// Norms of groups, as tensors.
    norms: Mutex<BTreeMap<(usize, Vec<Proj>), Tensor>>,
}

impl ModelWeights {
    /// The weights of `model`.
    pub fn new(model: Arc<Model>) -> Self {
        Self { model, squares: Mutex::default(), norms: Mutex::default() }
    }

    fn weight(&self, layer: usize, proj: Proj) -> Option<&Weight> {
        Some(&self.model.blocks.get(layer)?.linear(proj)?.weight)
    }

    fn squares(&self, layer: usize, proj: Proj) -> Option<Squares> {
        let weight = self.weight(layer, proj)?;
        let mut known = self.squares.lock().unwrap_or_else(PoisonError::into_inner);
        let made = known.entry((layer, proj)).or_insert_with(|| Arc::from(column_squares(weight)));
        Some(made.clone())
    }
}

/// Squared norms of the columns of `W`, on the dequantised weights, one run at a time.
fn column_squares(weight: &Weight) -> Vec<f64> {
    let m = weight.matrix();
    let mut run = vec![0.0_f32; m.cols()];
    let mut squares = vec![0.0_f64; weight.inputs()];
    for r in 0..m.rows() {
        decode_run(m.format(), m.row(r), &mut run);
        match weight.orientation() {
            Orientation::OutputMajor => {
                squares.iter_mut().zip(&run).for_each(|(s, w)| *s += f64::from(*w) * f64::from(*w));
            }
            _ => squares[r] = run.iter().map(|w| f64::from(*w) * f64::from(*w)).sum(),
        }
    }
    squares
}

/// `W[outputs, inputs]`, dequantised.
fn decoded(weight: &Weight) -> Vec<f32> {
    let (m, outputs, inputs) = (weight.matrix(), weight.outputs(), weight.inputs());
    let mut all = vec![0.0; outputs * inputs];
    let mut run = vec![0.0; m.cols()];
    for r in 0..m.rows() {
        decode_run(m.format(), m.row(r), &mut run);
        match weight.orientation() {
            Orientation::OutputMajor => all[r * inputs..][..inputs].copy_from_slice(&run),
            _ => (0..outputs).for_each(|o| all[o * inputs + r] = run[o]),
        }
    }
    all
}

impl Weights for ModelWeights {
    fn matrix(&self, layer: usize, proj: Proj) -> Option<Vec<f32>> {
        self.weight(layer, proj).map(decoded)
    }

    /// The file's predictor reads the residual stream `x`; here it is changed to read `h = gain * x / rms(x)`, by dividing
    /// its columns by the gain. Without biases its scores scale with its input, so that they keep their signs: at the
    /// threshold zero it names the same neurons. A gain of zero, or a norm with a mean, leaves no such form.
    fn predictor(&self, layer: usize) -> Option<(Predictor, f32)> {
        let block = self.model.blocks.get(layer)?;
        let stored = block.predictor.as_ref().filter(|_| block.mlp_norm.bias.is_none())?;
        let gain = &block.mlp_norm.gain;
        if gain.contains(&0.0) {
            return None;
        }
        let mut fc1 = decoded(&stored.fc1);
        fc1.chunks_exact_mut(gain.len()).for_each(|row| row.iter_mut().zip(gain).for_each(|(w, g)| *w /= g));
        let down = Tensor::matrix(stored.fc1.outputs(), &fc1);
        let up = Tensor::matrix(stored.fc2.outputs(), &decoded(&stored.fc2));
        Some((Predictor { down, up, relu: true }, self.model.spec.predictor_threshold))
    }

    fn column_norms(&self, layer: usize, projs: &[Proj]) -> Option<Tensor> {
        let key = (layer, projs.to_vec());
        if let Some(known) = self.norms.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Some(known.clone());
        }
        let parts: Vec<_> = projs.iter().filter_map(|p| self.squares(layer, *p)).collect();
        let inputs = parts.first()?.len();
        let mut sum = vec![0.0; inputs];
        for part in parts.iter().filter(|p| p.len() == inputs) {
            sum.iter_mut().zip(part.iter()).for_each(|(s, p)| *s += p);
        }
        let norms = Tensor::vector(sum.into_iter().map(|s| s.sqrt() as f32).collect());
        self.norms.lock().unwrap_or_else(PoisonError::into_inner).insert(key, norms.clone());
        Some(norms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LoadOptions, load};
    use lacuna_core::method::column_norms;
    use std::path::Path;

    #[test]
    fn norms_are_those_of_the_dequantised_matrices() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama2");
        let model = Arc::new(load(&dir, &LoadOptions::default()).unwrap());
        let weights = ModelWeights::new(model.clone());
        let width = model.spec.width;
        let all: Vec<_> = [Proj::Q, Proj::K, Proj::V].iter().map(|p| weights.matrix(1, *p).unwrap()).collect();
        let want = column_norms(all.iter().map(Vec::as_slice), width);
        let got = weights.column_norms(1, &[Proj::Q, Proj::K, Proj::V]).unwrap();
        assert!(got.values().iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-5 * b), "{got:?}");
        let one: f32 = weights
            .matrix(0, Proj::Down)
            .unwrap()
            .iter()
            .step_by(model.blocks[0].linear(Proj::Down).unwrap().weight.inputs())
            .map(|w| w * w)
            .sum();
        assert!((weights.column_norms(0, &[Proj::Down]).unwrap().values()[0] - one.sqrt()).abs() < 1e-5);
        assert!(weights.column_norms(99, &[Proj::Q]).is_none());
    }
}
