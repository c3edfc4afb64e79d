//! Products of matrices in single precision, by the kernels of prefill.

use lacuna_kernels::{Format, Matrix, Pool, gemm};

/// `X W^T` for the rows of `x[_, k]` and `w[_, k]`.
pub fn times(pool: &Pool, x: &[f32], k: usize, w: &[f32]) -> Vec<f32> {
    let (m, n) = (x.len() / k, w.len() / k);
    let bytes: Vec<u8> = w.iter().flat_map(|v| v.to_le_bytes()).collect();
    let w = Matrix::new(Format::F32, n, k, &bytes).expect("n rows of k numbers are as many bytes");
    let mut input = gemm::Input::new();
    input.prepare(pool, x, m, k, &[Format::F32]);
    let mut y = vec![0.0; m * n];
    let job = gemm::Job { w: gemm::Weights::OutputMajor(w), x: &input, y: &mut y, accumulate: false };
    gemm::run(pool, &mut [job]);
    y
}

/// The columns of `x[rows, columns]` as rows.
pub fn turned(x: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| x.iter().skip(c).step_by(columns).copied()).collect()
}

/// Subtracts its mean from every row of `n` numbers.
pub fn centre(x: &mut [f32], n: usize) {
    for row in x.chunks_exact_mut(n) {
        let mean = (row.iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64) as f32;
        row.iter_mut().for_each(|v| *v -= mean);
    }
}

/// `sum x^2`.
pub fn squares(x: &[f32]) -> f64 {
    x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_turns_and_means() {
        let pool = Pool::new(2);
        let (x, w) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, -1.0, 2.0, 2.0, 2.0]);
        assert_eq!(times(&pool, &x, 3, &w), [-2.0, 12.0, -2.0, 30.0]);
        assert_eq!(turned(&x, 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        let mut y = x;
        centre(&mut y, 3);
        assert_eq!((y, squares(&y)), ([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0], 4.0));
    }
}
