//! Moves the entries of all books of a layer, codes fixed, to where the outputs change least: the minimum of
//! `tr((W - Q) H (W - Q)^T)`, which is quadratic in the entries. Conjugate gradients with the diagonal as preconditioner.

use super::vq::Book;
use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use lacuna_core::compress::Layer;

/// A layer whose codes are found.
pub struct Bound<'a> {
    /// The layer.
    pub layer: &'a Layer<'a>,
    /// `W` before anything was rounded, its columns in the order of the vectors.
    pub weight: &'a [f32],
    /// `X^T X` in that order.
    pub gram: &'a [f64],
    /// First column and columns of every vector.
    pub vectors: &'a [(usize, usize)],
    /// Columns that a book serves.
    pub span: usize,
    /// Which of the books of a span each row uses.
    pub of_row: &'a [u16],
    /// The entry of every vector, `[rows, vectors]`.
    pub codes: &'a [u8],
    /// Most steps.
    pub steps: usize,
}

impl Bound<'_> {
    /// Runs `f(row, column, group of rows, span, entry, number of the entry)` for every weight.
    fn each(&self, mut f: impl FnMut(usize, usize, usize, usize, usize, usize)) {
        for (row, codes) in self.codes.chunks_exact(self.vectors.len().max(1)).enumerate() {
            for ((start, length), code) in self.vectors.iter().zip(codes) {
                for i in 0..*length {
                    f(row, start + i, usize::from(self.of_row[row]), start / self.span, usize::from(*code), i);
                }
            }
        }
    }

    /// The matrix that numbers for entries make.
    fn spread(&self, entries: &Numbers) -> Vec<f32> {
        let n = self.layer.inputs;
        let mut out = vec![0.0; self.layer.outputs * n];
        self.each(|row, j, group, span, code, i| out[row * n + j] = entries.0[group][span][code][i]);
        out
    }

    /// Sums of a matrix over the weights of every entry; nothing where an entry is pinned to zero.
    fn gather(&self, matrix: &[f32], books: &[Vec<Book>]) -> Numbers {
        let n = self.layer.inputs;
        let mut out = Numbers::zeros(books);
        self.each(|row, j, group, span, code, i| {
            if books[group][span].free[code] >> i & 1 == 1 {
                out.0[group][span][code][i] += matrix[row * n + j];
            }
        });
        out
    }
}

/// A number for every number of every entry: `[group][span][entry][2]`.
#[derive(Clone)]
struct Numbers(Vec<Vec<Vec<[f32; 2]>>>);

impl Numbers {
    fn zeros(books: &[Vec<Book>]) -> Self {
        Self(books.iter().map(|g| g.iter().map(|b| vec![[0.0; 2]; b.entries.len()]).collect()).collect())
    }

    fn of(books: &[Vec<Book>]) -> Self {
        Self(books.iter().map(|g| g.iter().map(|b| b.entries.clone()).collect()).collect())
    }

    fn iter(&self) -> impl Iterator<Item = &f32> {
        self.0.iter().flatten().flatten().flatten()
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut f32> {
        self.0.iter_mut().flatten().flatten().flatten()
    }

    fn dot(&self, other: &Self) -> f64 {
        self.iter().zip(other.iter()).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    /// `self += factor * other`.
    fn add(&mut self, factor: f64, other: &Self) {
        self.iter_mut().zip(other.iter()).for_each(|(a, b)| *a += (factor * f64::from(*b)) as f32);
    }
}

/// Tunes `books` (by group of rows, then span), whose rounded entries the codes of `bound` were found with. Gives the better of
/// them and the new ones, rounded to eight bits, and the loss `tr((W - Q) H (W - Q)^T)` over the largest of the diagonal of `H`.
pub fn tune(bound: &Bound<'_>, books: &[Vec<Book>]) -> (Vec<Vec<Book>>, f64) {
    let (n, rows) = (bound.layer.inputs, bound.layer.outputs);
    let most = (0..n).map(|j| bound.gram[j * n + j]).fold(f64::MIN_POSITIVE, f64::max);
    let gram: Vec<f32> = bound.gram.iter().map(|g| (g / most) as f32).collect();
    let times = |a: &[f32]| {
        let mut out = vec![0.0_f32; rows * n];
        let (a, g) = (MatRef::from_row_major_slice(a, rows, n), MatRef::from_row_major_slice(&gram, n, n));
        matmul(MatMut::from_row_major_slice_mut(&mut out, rows, n), Accum::Replace, a, g, 1.0, Par::rayon(0));
        out
    };
    let lost = |entries: &Numbers| {
        let q = bound.spread(entries);
        let d: Vec<f32> = bound.weight.iter().zip(&q).map(|(w, q)| w - q).collect();
        let h = times(&d);
        let loss = d.iter().zip(&h).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        (loss, h)
    };
    let mut entries = Numbers::of(books);
    let (before, h) = lost(&entries);
    let weights: Vec<f32> = (0..rows * n).map(|i| gram[i % n * (n + 1)] + 1e-9).collect();
    let diagonal = bound.gather(&weights, books);
    let solved = |r: &Numbers| {
        let mut z = r.clone();
        z.iter_mut().zip(diagonal.iter()).for_each(|(z, d)| *z = if *d > 0.0 { *z / d } else { 0.0 });
        z
    };
    let mut r = bound.gather(&h, books);
    let mut z = solved(&r);
    let (mut p, mut rz) = (z.clone(), r.dot(&z));
    for _ in 0..bound.steps {
        let d = bound.spread(&p);
        let dh = times(&d);
        let curve: f64 = d.iter().zip(&dh).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        if !(curve > 0.0 && rz > 1e-12 * before) {
            break;
        }
        let step = rz / curve;
        entries.add(step, &p);
        r.add(-step, &bound.gather(&dh, books));
        z = solved(&r);
        let next = r.dot(&z);
        let mut new = z.clone();
        new.add(next / rz, &p);
        (p, rz) = (new, next);
    }
    let mut tuned = books.to_vec();
    for (book, entries) in tuned.iter_mut().flatten().zip(entries.0.into_iter().flatten()) {
        book.entries = entries;
        book.round();
    }
    let after = lost(&Numbers::of(&tuned)).0;
    if after < before { (tuned, after) } else { (books.to_vec(), before) }
}
