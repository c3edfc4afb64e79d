//! `wina-rotation`: the residual stream in bases in which the columns of key and gate are orthogonal.
//!
//! WINA (2025; code microsoft/wina, `utils/tensor_transform.py`) ranks an input by its magnitude times the norm of its column,
//! which is the best choice where columns are orthogonal. Its code makes those of k and of gate so: with `K = U S V^T` the stream
//! before the attention gets the basis `V`, with the gate's before the MLP, exactly. Here `V` comes from the eigenvectors
//! of `K^T K`, in double precision. The price is a dense product with a square matrix at each of the two additions to the stream.

use super::tools::eigen::{descending, gram};
use lacuna_core::{
    compress::{Basis, Compressor, Rotator, Sight, Stream},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::{Proj, Site},
};

/// WINA's rotation.
#[derive(Debug)]
pub struct WinaRotation;

impl Method for WinaRotation {
    fn name(&self) -> &'static str {
        "wina-rotation"
    }

    fn title(&self) -> &'static str {
        "WINA's rotation"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference (2025)",
            arxiv: Some("2505.19427"),
        }
    }

    fn summary(&self) -> &'static str {
        "Turns the residual stream of every block so that the columns of key and gate are orthogonal, exactly and without dropping anything: what `wina` then plans on. Only Lacuna reads the result."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[]
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for WinaRotation {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Nothing
    }

    fn rotator(&self) -> Option<&dyn Rotator> {
        Some(self)
    }
}

impl Rotator for WinaRotation {
    fn kept(&self, _: &Params, width: usize) -> usize {
        width
    }

    /// That of the key; before the MLP that of the gate, or of up where there is none; before the head the stream's own.
    fn basis(&self, _: &Params, stream: &Stream<'_>) -> Result<Basis, MethodError> {
        let n = stream.width;
        let refuse = |reason: &str| Err(MethodError::Layer { place: stream.place.into(), reason: reason.into() });
        let rows = match [Proj::K, Proj::Gate, Proj::Up].into_iter().find_map(|p| (stream.reader)(p)) {
            None => (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect(),
            Some(w) if w.iter().any(|x| !x.is_finite()) => return refuse("a weight is not a finite number"),
            Some(w) => {
                let gram = gram(&w, n);
                match descending(n, |i, j| gram[(i, j)]) {
                    Some(eigen) => eigen.rows,
                    None => return refuse("the singular vectors of its weights cannot be computed"),
                }
            }
        };
        Ok(Basis { rows, lost: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    #[test]
    fn columns_become_orthogonal() {
        // Fewer rows than columns, as grouped keys have, and more.
        for (outputs, n) in [(10, 24), (60, 24)] {
            let w = normal(5, outputs * n);
            let reader = |p: Proj| (p == Proj::Gate).then(|| w.clone());
            let stream = Stream { place: "layers.0.mlp", width: n, gram: None, reader: &reader, seed: 0 };
            let params = Params::new(&WinaRotation, []).unwrap();
            let q = WinaRotation.basis(&params, &stream).unwrap().rows;
            let turned: Vec<f64> = w
                .chunks_exact(n)
                .flat_map(|row| {
                    (0..n).map(|i| (0..n).map(|j| f64::from(row[j]) * q[i * n + j]).sum()).collect::<Vec<f64>>()
                })
                .collect();
            let dot = |a: usize, b: usize| turned.chunks_exact(n).map(|r| r[a] * r[b]).sum::<f64>();
            for a in 0..n {
                for b in 0..a {
                    assert!(dot(a, b).abs() < 1e-10 * dot(0, 0), "{a} {b}");
                }
            }
            assert!((1..n).all(|a| dot(a, a) <= dot(a - 1, a - 1) + 1e-9));
        }
        let stream = Stream { place: "head", width: 3, gram: None, reader: &|_| None, seed: 0 };
        let own = WinaRotation.basis(&Params::new(&WinaRotation, []).unwrap(), &stream).unwrap();
        assert_eq!(own.rows, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
    }
}
