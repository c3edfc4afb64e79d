//! The column sweep in pairs: GPTQ's, with the entries of books in the place of a grid. See `gptvq`.

use super::{
    factor::Factor,
    rows,
    sweep::push,
    tune::{Bound, tune},
    vq::{self, Book, Vector},
};
use lacuna_core::compress::{Books, Layer};
use std::ops::Range;

/// Columns that a book serves.
const SPAN: usize = 256;

/// Steps of tuning.
const STEPS: usize = 10;

/// Weights that a book of 2, 3 and 4 bits serves, by the published settings.
pub const SERVED: [usize; 3] = [2048, 8192, 32768];

/// A layer whose columns lie in the order of pairs.
pub struct Turned {
    /// Numbers of a vector, 2 or 1.
    pub size: usize,
    /// `W`.
    pub weight: Vec<f32>,
    /// What an earlier step kept.
    pub kept: Option<Vec<bool>>,
    /// `X^T X`.
    pub gram: Vec<f64>,
    /// First column and columns of every vector.
    pub vectors: Vec<(usize, usize)>,
}

impl Turned {
    /// Turns a layer and what was seen of its inputs.
    pub fn new(layer: &Layer<'_>, gram: &[f64], size: usize) -> Self {
        let n = layer.inputs;
        let (columns, lengths) = vq::order(n, size);
        fn turn<T: Copy>(rows: &[T], columns: &[usize]) -> Vec<T> {
            rows.chunks_exact(columns.len()).flat_map(|row| columns.iter().map(|c| row[*c])).collect()
        }
        let by_rows: Vec<f64> = columns.iter().flat_map(|r| &gram[r * n..][..n]).copied().collect();
        let mut start = 0;
        let place = |length: usize| {
            start += length;
            (start - length, length)
        };
        Self {
            size,
            weight: turn(layer.weight, &columns),
            kept: layer.kept.map(|k| turn(k, &columns)),
            gram: turn(&by_rows, &columns),
            vectors: lengths.into_iter().map(place).collect(),
        }
    }
}

/// The sweep: books of a span, codes of its vectors, errors to the columns behind.
pub struct Sweep<'a> {
    layer: &'a Layer<'a>,
    factor: &'a Factor,
    turned: &'a Turned,
    bits: usize,
    rounds: usize,
    /// Rows that share a book.
    per_book: usize,
    /// By group of rows, then span.
    found: Vec<Vec<Book>>,
    /// The entry of every vector, `[rows, vectors]`.
    codes: Vec<u8>,
}

impl<'a> Sweep<'a> {
    /// A sweep over a turned layer.
    pub fn new(layer: &'a Layer<'a>, factor: &'a Factor, turned: &'a Turned, bits: usize, rounds: usize) -> Self {
        let per_book = (SERVED[bits - 2] / layer.inputs.clamp(1, SPAN)).clamp(1, layer.outputs.max(1));
        let found = vec![Vec::new(); layer.outputs.div_ceil(per_book)];
        let codes = vec![0; layer.outputs * turned.vectors.len()];
        Self { layer, factor, turned, bits, rounds, per_book, found, codes }
    }

    /// Entries of a book: pairs, or single numbers.
    fn entries(&self) -> usize {
        1 << (self.turned.size * self.bits)
    }

    fn vector(&self, w: &[f32], row: usize, (start, length): (usize, usize)) -> Vector {
        let n = self.layer.inputs;
        let kept = |j: usize| self.layer.kept.is_none_or(|k| k[row * n + j]);
        let mut v = Vector { x: [0.0; 2], h: [0.0; 2], free: 0 };
        for (i, j) in (start..start + length).enumerate() {
            let u = self.factor.upper[j * n + j];
            v.h[i] = 1.0 / (u * u);
            if kept(j) {
                (v.x[i], v.free) = (w[j], v.free | 1 << i);
            }
        }
        // A number that is not there takes what comes with the other.
        v.free |= if length == 1 && self.turned.size == 2 && v.free != 0 { 2 } else { 0 };
        v
    }

    /// Sweeps over all columns.
    pub fn run(&mut self) {
        let n = self.layer.inputs;
        let mut w = self.turned.weight.clone();
        rows::each(self.layer.pool, &mut w, n, |_, row| {
            row.iter_mut().zip(&self.factor.dead).filter(|(_, d)| **d).for_each(|(w, _)| *w = 0.0);
        });
        for span in (0..n).step_by(SPAN).map(|s| s..(s + SPAN).min(n)) {
            let inside = |v: &(usize, usize)| span.contains(&v.0);
            let first = self.turned.vectors.iter().position(inside).unwrap_or(0);
            let count = self.turned.vectors.iter().filter(|v| inside(v)).count();
            self.cluster(&w, first..first + count, span.start);
            let errors = self.assign(&mut w, first..first + count, &span);
            push(self.layer, self.factor, &mut w, &errors, span);
        }
    }

    /// The books of a span.
    fn cluster(&mut self, w: &[f32], vectors: Range<usize>, start: usize) {
        let (n, per_book, rows) = (self.layer.inputs, self.per_book, self.layer.outputs);
        let mut found: Vec<Option<Book>> = vec![None; self.found.len()];
        let this: &Self = self;
        rows::units(this.layer.pool, &mut found, 1, |group, out| {
            let own = group * per_book..((group + 1) * per_book).min(rows);
            let all = own
                .flat_map(|r| vectors.clone().map(move |v| this.vector(&w[r * n..][..n], r, this.turned.vectors[v])));
            let all: Vec<Vector> = scaled(all.collect());
            let seed = this.layer.seed ^ ((start as u64) << 32 | group as u64);
            let mut book = vq::kmeans(&all, this.entries(), this.rounds, seed).0;
            book.round();
            *out = Some(book);
        });
        self.found.iter_mut().zip(found).for_each(|(books, new)| books.extend(new));
    }

    /// Codes of a span, and the errors of its columns, `[rows, columns]`.
    fn assign(&mut self, w: &mut [f32], vectors: Range<usize>, span: &Range<usize>) -> Vec<f32> {
        let (n, all, width) = (self.layer.inputs, self.turned.vectors.len(), span.len());
        let mut errors = vec![0.0; self.layer.outputs * width];
        let mut codes = std::mem::take(&mut self.codes);
        let this: &Self = self;
        let finders: Vec<_> = this.found.iter().map(|books| books.last().map(Book::finder)).collect();
        let mut work: Vec<_> =
            w.chunks_exact_mut(n).zip(codes.chunks_exact_mut(all)).zip(errors.chunks_exact_mut(width)).collect();
        rows::units(this.layer.pool, &mut work, 8, |row, ((w, codes), errors)| {
            let group = row / this.per_book;
            let (Some(book), Some(finder)) = (this.found[group].last(), &finders[group]) else { return };
            let frozen = this.layer.kept.map(|k| &k[row * n..][..n]);
            for v in vectors.clone() {
                let (start, length) = this.turned.vectors[v];
                let (code, _) = finder.nearest(&this.vector(w, row, (start, length)));
                codes[v] = code as u8;
                for (i, j) in (start..start + length).enumerate() {
                    let value = book.entries[code][i];
                    errors[j - span.start] = (w[j] - value) / this.factor.upper[j * n + j];
                    w[j] = value;
                }
                for j in start..start + length {
                    let (error, u) = (errors[j - span.start], &this.factor.upper[j * n..][..n]);
                    let behind = (start + length..span.end).filter(|i| frozen.is_none_or(|f| f[*i]));
                    behind.for_each(|i| w[i] -= error * u[i]);
                }
            }
        });
        drop(work);
        self.codes = codes;
        errors
    }

    /// Moves the entries to where the outputs change least, if that helps.
    pub fn tune(&mut self, gram: &[f64]) {
        let bound = Bound {
            of_row: &self.of_row(),
            steps: STEPS,
            layer: self.layer,
            weight: &self.turned.weight,
            gram,
            vectors: &self.turned.vectors,
            span: SPAN,
            codes: &self.codes,
        };
        self.found = tune(&bound, &self.found).0;
    }

    /// Which of the books of a span each row uses.
    fn of_row(&self) -> Vec<u16> {
        (0..self.layer.outputs).map(|r| (r / self.per_book) as u16).collect()
    }

    /// Everything in the order of the stored columns.
    pub fn books(&self) -> Books {
        let form = Form { columns: self.layer.inputs, size: self.turned.size, bits: self.bits, span: SPAN };
        form.books(&self.found, self.of_row(), &self.codes)
    }
}

/// How codes of a layer are stored.
#[derive(Clone, Copy)]
pub struct Form {
    /// Columns.
    pub columns: usize,
    /// Numbers of a vector.
    pub size: usize,
    /// Bits of a weight.
    pub bits: usize,
    /// Columns that a book serves.
    pub span: usize,
}

impl Form {
    /// Books (by group of rows, then span), and the entry of every vector (`[rows, vectors]`), in the order of the stored
    /// columns.
    pub fn books(self, found: &[Vec<Book>], of_row: Vec<u16>, codes: &[u8]) -> Books {
        let Self { columns, size, bits, span } = self;
        let per_row = codes.len() / of_row.len().max(1);
        let (mut entries, mut exponents) = (Vec::new(), Vec::new());
        for book in found.iter().flatten() {
            let (rounded, exponent) = book.clone().round();
            exponents.push(exponent);
            match size {
                1 => entries.extend(vq::product(&rounded.iter().map(|e| e[0]).collect::<Vec<_>>())),
                _ => entries.extend(rounded.as_flattened()),
            }
        }
        let rows = codes.chunks_exact(per_row.max(1));
        let codes = rows.flat_map(|row| pair_codes(row, columns, size, bits)).collect();
        Books { bits: bits as u32, span, of_row, entries, exponents, codes }
    }
}

/// Codes of all pairs of a row of `n` columns from those of its vectors.
pub fn pair_codes(codes: &[u8], n: usize, size: usize, bits: usize) -> Vec<u8> {
    let mut codes = codes.iter().copied();
    let mut next = |there: bool| if there { codes.next().unwrap_or(0) } else { 0 };
    let pair = |pair: usize| {
        let first = pair / 16 * 32 + pair % 16;
        let low = next(first < n);
        if size == 2 { low } else { low | next(first + 16 < n) << bits }
    };
    (0..n.div_ceil(32) * 16).map(pair).collect()
}

/// Importances over their mean, so that none is too small for single precision.
pub fn scaled(mut vectors: Vec<Vector>) -> Vec<Vector> {
    let sum: f64 = vectors.iter().flat_map(|v| v.h).map(f64::from).sum();
    let factor = if sum > 0.0 { (2.0 * vectors.len() as f64 / sum) as f32 } else { 1.0 };
    vectors.iter_mut().for_each(|v| v.h = v.h.map(|h| h * factor));
    vectors
}

#[cfg(test)]
mod tests;
