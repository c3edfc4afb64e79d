//! Eigenvectors of symmetric matrices in double precision: orthonormal bases, strongest direction first.

use faer::{Mat, Side};

/// Eigenvalues and eigenvectors.
pub struct Eigen {
    /// Descending.
    pub values: Vec<f64>,
    /// `[n, n]`: row `i` is the eigenvector of `values[i]`.
    pub rows: Vec<f64>,
}

/// Decomposes the symmetric `[n, n]` matrix `at`, of which the lower triangle is read; `None` if that does not converge or a
/// number is not finite.
pub fn descending(n: usize, at: impl Fn(usize, usize) -> f64) -> Option<Eigen> {
    let matrix = Mat::from_fn(n, n, at);
    let eigen = matrix.self_adjoint_eigen(Side::Lower).ok()?;
    let (u, s) = (eigen.U(), eigen.S());
    let values: Vec<f64> = (0..n).rev().map(|i| s[i]).collect();
    let rows: Vec<f64> = (0..n).rev().flat_map(|i| (0..n).map(move |j| (j, i))).map(|(j, i)| u[(j, i)]).collect();
    (values.iter().chain(&rows).all(|x| x.is_finite())).then_some(Eigen { values, rows })
}

/// `W^T W` of `W[outputs, n]`.
pub fn gram(w: &[f32], n: usize) -> Mat<f64> {
    let w = Mat::from_fn(w.len() / n, n, |i, j| f64::from(w[i * n + j]));
    w.transpose() * &w
}

/// `A B` for row-major `a[n, n]` and `b[n, n]`.
pub fn product(n: usize, a: &[f64], b: &[f64]) -> Vec<f64> {
    let of = |m: &[f64]| Mat::from_fn(n, n, |i, j| m[i * n + j]);
    let c = of(a) * of(b);
    (0..n * n).map(|i| c[(i / n, i % n)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    #[test]
    fn vectors_are_orthonormal_and_values_descend() {
        for n in [1, 2, 7, 40] {
            let w = normal(n as u64, 3 * n * n);
            let g = gram(&w, n);
            let Eigen { values, rows } = descending(n, |i, j| g[(i, j)]).unwrap();
            assert!(values.windows(2).all(|v| v[0] >= v[1]), "{values:?}");
            for i in 0..n {
                for j in 0..n {
                    let dot: f64 = (0..n).map(|k| rows[i * n + k] * rows[j * n + k]).sum();
                    assert!((dot - f64::from(i == j)).abs() < 1e-10);
                    // Q G Q^T is the diagonal of the values.
                    let at = |k: usize| (0..n).map(|l| g[(k, l)] * rows[j * n + l]).sum::<f64>();
                    let entry: f64 = (0..n).map(|k| rows[i * n + k] * at(k)).sum();
                    let expected = if i == j { values[i] } else { 0.0 };
                    assert!((entry - expected).abs() < 1e-10 * values[0].max(1.0), "{i} {j}: {entry} {expected}");
                }
            }
        }
        assert!(descending(2, |_, _| f64::NAN).is_none());
    }

    #[test]
    fn products() {
        assert_eq!(product(2, &[1.0, 2.0, 3.0, 4.0], &[0.0, 1.0, 1.0, 0.0]), [2.0, 1.0, 4.0, 3.0]);
    }
}
