//! `jlcm`: books and codes that are learned together, several books per layer.
//!
//! Yvinec et al., Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings (arXiv:2309.17361); no code
//! is known, so this is the form that the handbook gives. Neurons of the MLP are put into an order in which neighbours have like
//! distributions (rows of gate and up, columns of down: no other layer notices). Rows share books with rows like them, in
//! one span of columns or in several, whichever leaves less variance in the books. Books begin with weighted k-means. Then the loss of
//! the outputs `tr((W - Q) H (W - Q)^T)` is lowered by steps of Adam over entries and over soft choices among the three nearest
//! entries, whose temperature falls; choices are hardened; and for those the entries are solved for (least squares, conjugate
//! gradients). What was learned is kept where it loses less than the clusters, solved for as well.
//!
//! The paper's books are of single weights (`vector=1`); pairs lose less in the same bytes.

use super::{
    gptvq::{BITS, ROUNDS, VECTOR},
    tools::{
        alike, check_finite,
        factor::seen,
        pairs::{Form, SERVED, Turned, scaled},
        rows,
        soft::{self, Problem},
        tune::{Bound, tune},
        vq::{self, Book, Vector},
    },
};
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Neurons, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};
use std::ops;

/// JLCM.
#[derive(Debug)]
pub struct Jlcm;

/// Steps of the last least squares.
const SOLVE: usize = 30;

impl Method for Jlcm {
    fn name(&self) -> &'static str {
        "jlcm"
    }

    fn title(&self) -> &'static str {
        "Jointly learnable codebooks and mappings"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings (2023)",
            arxiv: Some("2309.17361"),
        }
    }

    fn summary(&self) -> &'static str {
        "Learns small books and the choices among their entries together, by the loss of each layer's outputs; neurons of like distribution share books."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            BITS,
            VECTOR,
            ROUNDS,
            ParamSpec {
                name: "steps",
                doc: "steps of Adam; 0: the clusters, solved for",
                default: 1000.0,
                range: (ops::Bound::Included(0.0), ops::Bound::Included(100_000.0)),
            },
            ParamSpec {
                name: "rate",
                doc: "length of a step, relative to the root of the mean square of the layer's weights",
                default: 1e-3,
                range: (ops::Bound::Excluded(0.0), ops::Bound::Included(1.0)),
            },
        ];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Jlcm {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Gram
    }

    fn order(&self, _: &Params, mlp: &Neurons<'_>) -> Option<Vec<usize>> {
        Some(neurons(mlp))
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let gram = seen(layer)?.1;
        let (bits, size) = (params.get("bits") as usize, params.get("vector") as usize);
        let turned = Turned::new(layer, gram, size);
        let work = Work::new(layer, &turned, bits);
        let found = work.clusters(params.get("rounds") as usize);
        let codes = work.nearest(&found);
        let (mut books, mut loss) = tune(&work.bound(&codes), &found);
        let (mut codes, steps) = (codes, params.get("steps") as usize);
        if steps > 0 {
            let (new, mut learned) =
                soft::learn(&work.problem(&|r, v| work.vector(r, v)), &found, steps, params.get("rate") as f32);
            learned.iter_mut().flatten().for_each(|book| drop(book.round()));
            let (learned, less) = tune(&work.bound(&new), &learned);
            if less < loss {
                (books, codes, loss) = (learned, new, less);
            }
        }
        debug_assert!(loss.is_finite());
        let form = Form { columns: layer.inputs, size, bits, span: work.span };
        let books = form.books(&books, work.of_row, &codes);
        Ok(Changed {
            weight: vq::decode(&books, layer.inputs),
            kept: layer.kept.map(<[bool]>::to_vec),
            codes: None,
            books: Some(books),
            low_rank: None,
            notes: Vec::new(),
        })
    }
}

/// The neurons of an MLP in an order in which neighbours have like distributions.
fn neurons(mlp: &Neurons<'_>) -> Vec<usize> {
    let (width, inner) = (mlp.width, mlp.inner);
    let scale = |w: &[f32]| {
        let square: f64 = w.iter().map(|w| f64::from(*w).powi(2)).sum();
        if square > 0.0 { (w.len() as f64 / square).sqrt() as f32 } else { 1.0 }
    };
    let parts: Vec<(&[f32], f32, bool)> = [(mlp.gate, false), (Some(mlp.up), false), (Some(mlp.down), true)]
        .into_iter()
        .filter_map(|(w, columns)| w.map(|w| (w, scale(w), columns)))
        .collect();
    let mut all: Vec<Vec<f32>> = vec![Vec::new(); inner];
    rows::units(mlp.pool, &mut all, 16, |j, out| {
        for (w, scale, columns) in &parts {
            let at = |i: usize| scale * if *columns { w[i * inner + j] } else { w[j * width + i] };
            out.extend(alike::distribution(width, at));
        }
    });
    alike::order(&all, inner / 16, 1)
}

/// A layer whose columns are turned, and how its books are shared.
struct Work<'a> {
    layer: &'a Layer<'a>,
    turned: &'a Turned,
    bits: usize,
    /// Importance of every turned column.
    importance: Vec<f32>,
    /// The Gram matrix over the largest of its diagonal.
    gram: Vec<f32>,
    /// Columns that a book serves.
    span: usize,
    of_row: Vec<u16>,
}

impl<'a> Work<'a> {
    fn new(layer: &'a Layer<'a>, turned: &'a Turned, bits: usize) -> Self {
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
            if span > self.span || (spans > 1 && count < spans) {
                continue;
            }
            let of_row = alike::groups(&all, (count / spans).min(rows), self.layer.seed);
            let left = self.variance(span, &of_row);
            if left < best {
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

    fn vector(&self, row: usize, i: usize) -> Vector {
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
    fn clusters(&self, rounds: usize) -> Vec<Vec<Book>> {
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
    fn nearest(&self, books: &[Vec<Book>]) -> Vec<u8> {
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

    fn bound<'b>(&'b self, codes: &'b [u8]) -> Bound<'b> {
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

    fn problem<'b>(&'b self, vector: &'b (dyn Fn(usize, usize) -> Vector + Sync)) -> Problem<'b> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        testing::normal,
        weights::{
            gptvq::Gptvq,
            kmeans::Kmeans,
            tools::testing::{Case, run},
            wanda::Wanda,
        },
    };
    use lacuna_kernels::Pool;

    #[test]
    fn learning_loses_less_than_clusters() {
        let mut better = 0;
        for seed in 0..6 {
            for (bits, vector) in [(2.0, 2.0), (2.0, 1.0), (3.0, 2.0)] {
                let case = Case::random(500 + seed, 48, 160, 500);
                let with = |m: &dyn Method, given: &[(&str, f64)]| {
                    let all = [&[("bits", bits), ("vector", vector)], given].concat();
                    let out = run(m, &all, &case.layer()).unwrap();
                    assert_eq!(out.weight, vq::decode(out.books.as_ref().unwrap(), 160));
                    case.output_error(&out.weight)
                };
                let learned = with(&Jlcm, &[("steps", 300.0), ("rate", 3e-3)]);
                let (solved, clusters) = (with(&Jlcm, &[("steps", 0.0)]), with(&Kmeans, &[]));
                assert!(learned <= solved * (1.0 + 1e-4), "{seed} {bits} {vector}: {learned} {solved}");
                assert!(solved < clusters, "{seed} {bits} {vector}: {solved} {clusters}");
                println!("{seed} {bits} {vector}: {learned} {solved} {clusters} gptvq {}", with(&Gptvq, &[]));
                better += usize::from(learned < 0.8 * solved);
            }
        }
        assert!(better >= 15, "much better in {better} of 18");
    }

    #[test]
    fn zeros_of_a_mask_stay() {
        let case = Case::random(31, 24, 160, 300);
        let pruned = run(&Wanda, &[("sparsity", 0.5)], &case.layer()).unwrap();
        let layer = Layer { weight: &pruned.weight, kept: pruned.kept.as_deref(), ..case.layer() };
        for (bits, vector) in [(2.0, 2.0), (3.0, 2.0), (3.0, 1.0)] {
            let out = run(&Jlcm, &[("bits", bits), ("vector", vector), ("steps", 50.0)], &layer).unwrap();
            let zeros = out.weight.iter().zip(pruned.kept.as_ref().unwrap()).filter(|(_, k)| !**k);
            assert!(zeros.clone().count() == 24 * 80 && zeros.clone().all(|(w, _)| *w == 0.0), "{bits} {vector}");
        }
    }

    /// Columns of two kinds: books serve one of them each.
    #[test]
    fn columns_of_one_kind_share_books() {
        let mut case = Case::random(33, 64, 256, 400);
        case.weight.iter_mut().enumerate().for_each(|(i, w)| *w *= if i % 256 < 128 { 0.02 } else { 1.0 });
        let out = run(&Jlcm, &[("bits", 2.0), ("steps", 0.0)], &case.layer()).unwrap();
        assert_eq!(out.books.as_ref().unwrap().span, 128);
        let small = |w: &[f32]| (0..64 * 256).filter(|i| i % 256 < 128).map(|i| f64::from(w[i])).collect::<Vec<_>>();
        let (a, b) = (small(&case.weight), small(&out.weight));
        let lost: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
        assert!(lost < 0.3 * a.iter().map(|a| a * a).sum::<f64>());
    }

    #[test]
    fn neurons_of_one_kind_come_together() {
        let (width, inner) = (40, 96);
        let strength = |j: usize| [0.1, 1.0, 4.0][j % 3];
        let [mut gate, mut up, mut down] = [1, 2, 3].map(|s| normal(s, width * inner));
        for i in 0..width * inner {
            gate[i] *= strength(i / width);
            up[i] *= strength(i / width);
            down[i] *= strength(i % inner);
        }
        let pool = Pool::new(2);
        let mlp = Neurons {
            place: "",
            width,
            inner,
            gate: Some(&gate),
            up: &up,
            down: &down,
            seen: None,
            keep: inner,
            pool: &pool,
        };
        let order = Jlcm.order(&Params::new(&Jlcm, []).unwrap(), &mlp).unwrap();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..inner).collect::<Vec<_>>());
        assert!((0..inner).all(|i| order[i] % 3 == i / 32), "{order:?}");
    }

    /// The last least squares is that of the normal equations.
    #[test]
    fn entries_are_solved_for() {
        let case = Case::random(41, 6, 32, 100);
        let layer = case.layer();
        let turned = Turned::new(&layer, seen(&layer).unwrap().1, 1);
        let work = Work::new(&layer, &turned, 2);
        let found = work.clusters(10);
        let codes = work.nearest(&found);
        let (_, loss) = tune(&work.bound(&codes), &found);
        // M^T (H x I) M c = M^T (H x I) vec W, with a row of M for every weight.
        let (k, n) = (4, 32);
        assert_eq!(found.len(), 1);
        let member = |r: usize, j: usize, c: usize| f64::from(u8::from(usize::from(codes[r * n + j]) == c));
        let h = |i: usize, j: usize| f64::from(work.gram[i * n + j]);
        let (mut a, mut b) = (vec![0.0; k * k], vec![0.0; k]);
        for r in 0..6 {
            for (i, j) in (0..n * n).map(|x| (x / n, x % n)) {
                for c in 0..k {
                    b[c] += member(r, i, c) * h(i, j) * f64::from(turned.weight[r * n + j]);
                    (0..k).for_each(|d| a[c * k + d] += member(r, i, c) * h(i, j) * member(r, j, d));
                }
            }
        }
        let right = faer::Mat::from_fn(k, 1, |i, _| b[i]);
        let solved = super::super::tools::factor::solve(k, |i, j| a[i * k + j], &right).unwrap();
        let lost = |entry: &dyn Fn(usize) -> f64| -> f64 {
            let d = |r: usize, j: usize| f64::from(turned.weight[r * n + j]) - entry(usize::from(codes[r * n + j]));
            (0..6)
                .flat_map(|r| (0..n * n).map(move |x| (r, x / n, x % n)))
                .map(|(r, i, j)| d(r, i) * h(i, j) * d(r, j))
                .sum()
        };
        let least = lost(&|c| solved[(c, 0)]);
        // Entries have eight bits after that.
        assert!(loss >= least * 0.999 && loss < least * 1.02, "{loss} {least}");
    }
}
