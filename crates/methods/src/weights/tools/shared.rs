//! Books that rows of like distribution share, in one span of columns or in several; see `jlcm`.

use super::{
    alike,
    pairs::{SERVED, Turned, scaled},
    rows,
    soft::Problem,
    tune::Bound,
    vq::{self, Book, Vector},
};
use lacuna_core::compress::Layer;

/// Steps of the last least squares.
const SOLVE: usize = 30;

/// A layer whose columns are turned, and how its books are shared.
pub struct Shared<'a> {
    layer: &'a Layer<'a>,
    turned: &'a Turned,
    bits: usize,
    /// Importance of every turned column.
    importance: Vec<f32>,
    /// The Gram matrix over the largest of its diagonal.
    pub gram: Vec<f32>,
    /// Columns that a book serves.
    pub span: usize,
    /// Which of the books of a span each row uses.
    pub of_row: Vec<u16>,
}

impl<'a> Shared<'a> {
    /// Decides how books of `bits` bits are shared.
    pub fn new(layer: &'a Layer<'a>, turned: &'a Turned, bits: usize) -> Self {
        let n = layer.inputs;
        let most = (0..n).map(|j| turned.gram[j * n + j]).fold(f64::MIN_POSITIVE, f64::max);
        let gram: Vec<f32> = turned.gram.iter().map(|g| (g / most) as f32).collect();
        // Inputs that are always zero count for a little, so that their weights keep something.
        let importance = (0..n).map(|j| gram[j * n + j].max(1e-9)).collect();
        let mut work =
            Self { layer, turned, bits, importance, gram, span: n.next_multiple_of(128), of_row: Vec::new() };
        work.share();
        work
    }

    /// Decides which rows and columns share a book: of the ways with as many books, the one whose books have the least
    /// variance.
    fn share(&mut self) {
        let (n, rows) = (self.layer.inputs, self.layer.outputs);
        let count = (n * rows / SERVED[self.bits - 2]).clamp(1, usize::from(u16::MAX));
        let mut all: Vec<Vec<f32>> = vec![Vec::new(); rows];
        rows::units(self.layer.pool, &mut all, 16, |r, out| {
            *out = alike::distribution(n, |j| self.layer.weight[r * n + j]);
        });
        let mut best = f64::INFINITY;
        for span in [self.span, 512, 256, 128] {
            let spans = n.div_ceil(span);
            // Nearly as many books as there may be: each that is missing costs more than variance tells.
            if span > self.span || 10 * (count / spans * spans) < 9 * count {
                continue;
            }
            let of_row = alike::groups(&all, (count / spans).min(rows), self.layer.seed);
            let left = self.variance(span, &of_row);
            if self.of_row.is_empty() || left < 0.97 * best {
                (best, self.span, self.of_row) = (left, span, of_row);
            }
        }
    }

    /// `sum h (w - mean)^2` within the books.
    fn variance(&self, span: usize, of_row: &[u16]) -> f64 {
        let (n, spans) = (self.layer.inputs, self.layer.inputs.div_ceil(span));
        let groups = of_row.iter().max().map_or(0, |g| usize::from(*g) + 1);
        let mut sums = vec![[0.0_f64; 3]; groups * spans];
        for (row, group) in self.turned.weight.chunks_exact(n.max(1)).zip(of_row) {
            for (j, w) in row.iter().enumerate() {
                let (h, w) = (f64::from(self.importance[j]), f64::from(*w));
                let sum = &mut sums[usize::from(*group) * spans + j / span];
                *sum = [sum[0] + h, sum[1] + h * w, sum[2] + h * w * w];
            }
        }
        sums.iter().filter(|s| s[0] > 0.0).map(|[h, hw, hww]| hww - hw * hw / h).sum()
    }

    /// Vector `i` of a row.
    pub fn vector(&self, row: usize, i: usize) -> Vector {
        let (n, (start, length)) = (self.layer.inputs, self.turned.vectors[i]);
        let mut v = Vector { x: [0.0; 2], h: [0.0; 2], free: 0 };
        for (k, j) in (start..start + length).enumerate() {
            v.h[k] = self.importance[j];
            if self.turned.kept.as_ref().is_none_or(|kept| kept[row * n + j]) {
                (v.x[k], v.free) = (self.turned.weight[row * n + j], v.free | 1 << k);
            }
        }
        // A number that is not there takes what comes with the other.
        v.free |= if length == 1 && self.turned.size == 2 && v.free != 0 { 2 } else { 0 };
        v
    }

    /// Books by group of rows, then span.
    pub fn clusters(&self, rounds: usize) -> Vec<Vec<Book>> {
        let (rows, spans) = (self.layer.outputs, self.layer.inputs.div_ceil(self.span));
        let groups = self.of_row.iter().max().map_or(0, |g| usize::from(*g) + 1);
        let mut found: Vec<Option<Book>> = vec![None; groups * spans];
        rows::units(self.layer.pool, &mut found, 1, |at, out| {
            let (group, span) = (at / spans, at % spans);
            let inside = |v: &usize| self.turned.vectors[*v].0 / self.span == span;
            let own: Vec<usize> = (0..self.turned.vectors.len()).filter(inside).collect();
            let of_group = (0..rows).filter(|r| usize::from(self.of_row[*r]) == group);
            let all = of_group.flat_map(|r| own.iter().map(move |v| (r, *v))).map(|(r, v)| self.vector(r, v));
            let all = scaled(all.collect());
            let mut book = vq::kmeans(&all, 1 << (self.turned.size * self.bits), rounds, self.layer.seed ^ at as u64).0;
            book.round();
            *out = Some(book);
        });
        let found: Vec<Book> = found.into_iter().flatten().collect();
        found.chunks(spans.max(1)).map(<[Book]>::to_vec).collect()
    }

    /// The entry nearest to every vector.
    pub fn nearest(&self, books: &[Vec<Book>]) -> Vec<u8> {
        let finders: Vec<Vec<_>> = books.iter().map(|g| g.iter().map(Book::finder).collect()).collect();
        let mut codes = vec![0; self.layer.outputs * self.turned.vectors.len()];
        rows::each(self.layer.pool, &mut codes, self.turned.vectors.len(), |row, codes| {
            for (i, code) in codes.iter_mut().enumerate() {
                let finder = &finders[usize::from(self.of_row[row])][self.turned.vectors[i].0 / self.span];
                *code = finder.nearest(&self.vector(row, i)).0 as u8;
            }
        });
        codes
    }

    /// The layer with codes, for tuning.
    pub fn bound<'b>(&'b self, codes: &'b [u8]) -> Bound<'b> {
        Bound {
            layer: self.layer,
            weight: &self.turned.weight,
            gram: &self.turned.gram,
            vectors: &self.turned.vectors,
            span: self.span,
            of_row: &self.of_row,
            codes,
            steps: SOLVE,
        }
    }

    /// The layer as learning takes it; `vector` is [`Shared::vector`].
    pub fn problem<'b>(&'b self, vector: &'b (dyn Fn(usize, usize) -> Vector + Sync)) -> Problem<'b> {
        Problem {
            pool: self.layer.pool,
            weight: &self.turned.weight,
            gram: &self.gram,
            vectors: &self.turned.vectors,
            span: self.span,
            of_row: &self.of_row,
            vector,
        }
    }
}
