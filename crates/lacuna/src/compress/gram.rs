//! Gram matrices `X^T X` of the vectors that enter a layer, added up in blocks of tokens by the matrix kernels: products in
//! single precision over at most 512 tokens, sums in double precision. Only the upper triangle is computed.

use lacuna_core::{compress::Inputs, observer::Observer, site::Point};
use lacuna_kernels::{Format, Matrix, Pool, gemm};
use std::sync::{Mutex, PoisonError};

/// Tokens of one product.
const TOKENS: usize = 512;
/// Rows of one product.
const ROWS: usize = 512;

/// Gathers what compressors see of the inputs of some points of one block.
pub struct Gather<'a> {
    pool: &'a Pool,
    gram: bool,
    /// What was seen, by point.
    pub seen: Vec<(Point, Inputs)>,
    /// The first point that held a number that is not finite.
    pub broken: Option<(Point, f32)>,
}

impl<'a> Gather<'a> {
    /// Nothing seen yet at `points` of these widths; with `gram`, Gram matrices are added up.
    pub fn new(pool: &'a Pool, points: impl IntoIterator<Item = (Point, usize)>, gram: bool) -> Self {
        let empty = |n: usize| Inputs { tokens: 0, squares: vec![0.0; n], gram: gram.then(|| vec![0.0; n * n]) };
        Self { pool, gram, seen: points.into_iter().map(|(p, n)| (p, empty(n))).collect(), broken: None }
    }

    /// Fills the lower triangles, and takes the squares from the diagonals.
    pub fn finish(mut self) -> Vec<(Point, Inputs)> {
        for (_, inputs) in &mut self.seen {
            let n = inputs.squares.len();
            let Some(gram) = &mut inputs.gram else { continue };
            for i in 0..n {
                for j in 0..i {
                    gram[i * n + j] = gram[j * n + i];
                }
                inputs.squares[i] = gram[i * n + i];
            }
        }
        self.seen
    }
}

impl Observer for Gather<'_> {
    fn wants(&self, point: Point) -> bool {
        self.seen.iter().any(|s| s.0 == point)
    }

    fn observe(&mut self, point: Point, width: usize, values: &[f32]) {
        let Some((_, inputs)) = self.seen.iter_mut().find(|s| s.0 == point) else { return };
        if let Some(bad) = values.iter().find(|x| !x.is_finite()) {
            self.broken.get_or_insert((point, *bad));
            return;
        }
        inputs.tokens += (values.len() / width) as u64;
        match &mut inputs.gram {
            Some(gram) if self.gram => {
                values.chunks(TOKENS * width).for_each(|x| add(self.pool, gram, width, x));
            }
            _ => {
                for row in values.chunks_exact(width) {
                    inputs.squares.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x) * f64::from(*x));
                }
            }
        }
    }
}

/// Adds the upper triangle of `X^T X` for rows `x` of `n` numbers to `gram[n, n]`.
fn add(pool: &Pool, gram: &mut [f64], n: usize, x: &[f32]) {
    let tokens = x.len() / n;
    let mut turned = vec![0.0_f32; n * tokens];
    for (t, row) in x.chunks_exact(n).enumerate() {
        row.iter().enumerate().for_each(|(j, v)| turned[j * tokens + t] = *v);
    }
    let bytes: Vec<u8> = turned.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut input = gemm::Input::new();
    let mut product = Vec::new();
    for (first, gram) in (0..n).step_by(ROWS).zip(gram.chunks_mut(ROWS * n)) {
        let (rows, behind) = (gram.len() / n, n - first);
        input.prepare(pool, &turned[first * tokens..][..rows * tokens], rows, tokens, &[Format::F32]);
        let w =
            Matrix::new(Format::F32, behind, tokens, &bytes[4 * first * tokens..]).expect("all rows from the first on");
        product.resize(rows * behind, 0.0);
        gemm::run(
            pool,
            &mut [gemm::Job { w: gemm::Weights::OutputMajor(w), x: &input, y: &mut product, accumulate: false }],
        );
        let parts: Vec<_> = gram.chunks_exact_mut(n).map(Mutex::new).collect();
        pool.run(rows, &|_, r| {
            // Each row is taken by one task, so the lock is never waited for.
            let mut row = parts[r].lock().unwrap_or_else(PoisonError::into_inner);
            let sums = row[first..].iter_mut().zip(&product[r * behind..]);
            sums.for_each(|(g, p)| *g += f64::from(*p));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::site::Proj;

    #[test]
    fn is_the_product_with_its_transpose() {
        let pool = Pool::new(2);
        let point = Point::Input { layer: 0, proj: Proj::Down };
        for (n, tokens) in [(1, 1), (33, 700), (600, 40)] {
            let x: Vec<f32> = (0..n * tokens).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
            let mut with = Gather::new(&pool, [(point, n)], true);
            let mut without = Gather::new(&pool, [(point, n)], false);
            for part in x.chunks(n * 300) {
                with.observe(point, n, part);
                without.observe(point, n, part);
            }
            let (with, without) = (with.finish().remove(0).1, without.finish().remove(0).1);
            let gram = with.gram.unwrap();
            for (i, j) in [(0, 0), (n - 1, 0), (n / 2, n - 1), (n - 1, n - 1), (n / 3, n / 2)] {
                let exact: f64 = x.chunks_exact(n).map(|r| f64::from(r[i]) * f64::from(r[j])).sum();
                assert!((gram[i * n + j] - exact).abs() < 1e-4 * tokens as f64, "{n} {i} {j}");
            }
            assert!(with.squares.iter().zip(&without.squares).all(|(a, b)| (a - b).abs() < 1e-4 * tokens as f64));
            assert_eq!((with.tokens, without.gram), (tokens as u64, None));
        }
    }

    #[test]
    fn numbers_that_are_none_are_told() {
        let pool = Pool::new(1);
        let point = Point::Input { layer: 0, proj: Proj::Q };
        let mut g = Gather::new(&pool, [(point, 2)], true);
        g.observe(point, 2, &[1.0, f32::INFINITY]);
        assert_eq!(g.broken, Some((point, f32::INFINITY)));
        assert!(g.wants(point) && !g.wants(Point::Head));
    }
}
