//! Layers for the tests of methods.

use crate::testing::normal;
use lacuna_core::{
    compress::{Changed, Inputs, Layer},
    method::{Method, MethodError, Params},
};
use lacuna_kernels::Pool;
use std::sync::LazyLock;

static POOL: LazyLock<Pool> = LazyLock::new(|| Pool::new(3));

/// A random layer with inputs that hang together.
#[derive(Clone)]
pub struct Case {
    outputs: usize,
    inputs: usize,
    pub weight: Vec<f32>,
    pub seen: Inputs,
}

impl Case {
    /// `tokens` 0: the Gram matrix is absent.
    pub fn random(seed: u64, outputs: usize, inputs: usize, tokens: usize) -> Self {
        let noise = normal(seed + 1000, tokens * inputs);
        // Neighbours share a part, and channels have other strengths.
        let x: Vec<f64> = (0..tokens * inputs)
            .map(|i| {
                let (t, j) = (i / inputs, i % inputs);
                let near = noise[t * inputs + (j + 1) % inputs];
                f64::from(noise[i] + 0.8 * near) * (0.3 + (j * 7 % 11) as f64 / 5.0)
            })
            .collect();
        let mut gram = vec![0.0; inputs * inputs];
        for row in x.chunks_exact(inputs) {
            for (i, a) in row.iter().enumerate() {
                gram[i * inputs..][..inputs].iter_mut().zip(row).for_each(|(g, b)| *g += a * b);
            }
        }
        let squares = (0..inputs).map(|j| gram[j * inputs + j]).collect();
        let gram = (tokens > 0).then_some(gram);
        Self {
            outputs,
            inputs,
            weight: normal(seed, outputs * inputs),
            seen: Inputs { tokens: tokens as u64, squares, gram },
        }
    }

    pub fn layer(&self) -> Layer<'_> {
        Layer {
            place: "layers.0.mlp.up",
            outputs: self.outputs,
            inputs: self.inputs,
            weight: &self.weight,
            kept: None,
            seen: Some(&self.seen),
            sparsity: None,
            seed: 0,
            pool: &POOL,
        }
    }

    /// `||(W - V) X^T||^2`.
    pub fn output_error(&self, weight: &[f32]) -> f64 {
        let n = self.inputs;
        let gram = self.seen.gram.as_ref().expect("tokens");
        let rows = self.weight.chunks_exact(n).zip(weight.chunks_exact(n));
        rows.map(|(a, b)| {
            let d: Vec<f64> = a.iter().zip(b).map(|(a, b)| f64::from(a - b)).collect();
            (0..n).map(|i| d[i] * (0..n).map(|j| gram[i * n + j] * d[j]).sum::<f64>()).sum::<f64>()
        })
        .sum()
    }
}

/// What a method makes of a layer; parameters not given have their defaults, groups that of a row.
pub fn run(method: &dyn Method, given: &[(&str, f64)], layer: &Layer<'_>) -> Result<Changed, MethodError> {
    let group = method.params().iter().any(|p| p.name == "group") && given.iter().all(|g| g.0 != "group");
    let given = given.iter().copied().chain(group.then_some(("group", 0.0)));
    let params = Params::new(method, given)?;
    method.compressor().expect("a method that changes weights").compress(&params, layer)
}
