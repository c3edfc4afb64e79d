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
        pairs::{Form, Turned},
        rows,
        shared::Shared,
        soft,
        tune::tune,
        vq,
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
        let work = Shared::new(layer, &turned, bits);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        testing::normal,
        weights::{
            kmeans::Kmeans,
            tools::testing::{Case, run},
            wanda::Wanda,
        },
    };
    use lacuna_kernels::Pool;

    #[test]
    fn learning_loses_less_than_clusters() {
        let mut sums = [0.0; 3];
        for seed in 0..4 {
            for (bits, vector) in [(2.0, 2.0), (2.0, 1.0), (3.0, 2.0)] {
                let case = Case::random(500 + seed, 48, 160, 500);
                let all: f64 = case.output_error(&vec![0.0; 48 * 160]);
                let with = |m: &dyn Method, given: &[(&str, f64)]| {
                    let given = [&[("bits", bits), ("vector", vector)], given].concat();
                    let out = run(m, &given, &case.layer()).unwrap();
                    assert_eq!(out.weight, vq::decode(out.books.as_ref().unwrap(), 160));
                    case.output_error(&out.weight) / all
                };
                let learned = with(&Jlcm, &[("steps", 300.0), ("rate", 3e-3)]);
                let (solved, clusters) = (with(&Jlcm, &[("steps", 0.0)]), with(&Kmeans, &[]));
                // Sheet: hardened, not worse than what it began with.
                assert!(learned <= solved * (1.0 + 1e-4), "{seed} {bits} {vector}: {learned} {solved}");
                println!("{seed} {bits} {vector}: learned {learned:.5}, solved {solved:.5}, clusters {clusters:.5}");
                sums.iter_mut().zip([learned, solved, clusters]).for_each(|(s, e)| *s += e);
            }
        }
        assert!(sums[0] < 0.95 * sums[2] && sums[0] < sums[1], "{sums:?}");
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
        for (i, w) in case.weight.iter_mut().enumerate() {
            *w = 0.05 * *w + if i % 256 < 128 { 1.0 } else { -1.0 };
        }
        let out = run(&Jlcm, &[("bits", 2.0), ("steps", 0.0)], &case.layer()).unwrap();
        assert_eq!(out.books.as_ref().unwrap().span, 128);
        assert!(out.books.as_ref().unwrap().of_row.iter().max().unwrap() > &1, "rows share books too");
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
        let work = Shared::new(&layer, &turned, 2);
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
