//! `casp`: queries and keys of low rank, because attention forgives errors of its logits.
//!
//! CASP (arXiv:2503.05936; code vbdi/casp): for the Gram matrix `C = S S^T` of the inputs, `W S = U Sigma V^T` is cut to rank
//! `k = rho R C / (R + C)` (down to a multiple of 32, where that is one, for the formats of blocks), and `W` becomes `A B` with
//! `A = U_k Sigma_k^(1/2)` and `B = Sigma_k^(1/2) V_k^T S^-1`: of all matrices of that rank the one whose outputs on
//! the text change least. The published loop gives queries and keys the same factors; here each has its own. Keys of grouped
//! attention have so few rows that hardly a rank would be left: they stay as they are (a method that rounds may follow).
//!
//! A step that rounds behind it rounds the factors. The other half of the paper is bits by influence: with such a step and
//! `--target-bytes` errors count by how far a block turns the residual stream.

use super::tools::{
    check_finite,
    factor::{Damped, damped},
    refuse,
};
use faer::{Mat, Par, linalg::triangular_solve::solve_upper_triangular_in_place};
use lacuna_core::{
    compress::{Changed, Compressor, Layer, LowRank, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::{Proj, Site},
};
use std::ops::Bound;

/// CASP.
#[derive(Debug)]
pub struct Casp;

impl Method for Casp {
    fn name(&self) -> &'static str {
        "casp"
    }

    fn title(&self) -> &'static str {
        "CASP"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "CASP: Compression of Large Multimodal Models Based on Attention Sparsity (2025)",
            arxiv: Some("2503.05936"),
        }
    }

    fn summary(&self) -> &'static str {
        "Gives queries and keys a low rank, as two small matrices that are read in their place, and weighs the errors of blocks by their influence where bits are chosen."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[ParamSpec {
            name: "rho",
            doc: "numbers of the two factors over those of the matrix",
            default: 0.25,
            range: (Bound::Excluded(0.0), Bound::Included(4.0)),
        }];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Casp {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Gram
    }

    fn applies(&self, proj: Proj) -> bool {
        matches!(proj, Proj::Q | Proj::K)
    }

    fn weighs_blocks(&self) -> bool {
        true
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let (rows, cols) = (layer.outputs, layer.inputs);
        let damped = damped(layer)?;
        let kept = layer.kept.map(<[bool]>::to_vec);
        let same = |notes| plain(layer.weight.to_vec(), kept.clone(), notes);
        // Fewer rows than inputs: grouped keys.
        if rows < cols && params.get("rho") < 1.0 {
            let note = format!("{}: {rows} outputs of {cols} inputs have no rank to spare; left as it is", layer.place);
            return Ok(same(vec![note]));
        }
        let rank = rank(rows, cols, params.get("rho"));
        if rank >= rows.min(cols) {
            return Ok(same(damped.notes));
        }
        let Some((factors, share)) = low_rank(layer, &damped, rank) else {
            return refuse(layer, "its singular values cannot be computed; use more calibration tokens (--tokens)");
        };
        let mut notes = damped.notes;
        let (rank_of, lost) = (rows.min(cols), 100.0 * share);
        notes.push(format!("{}: rank {rank} of {rank_of}, {lost:.2} % of the outputs' energy is lost", layer.place));
        let mut weight = factors.product();
        let Some(mask) = &kept else {
            let [down, up] = [factors.down, factors.up].map(|f| plain(f, None, Vec::new()));
            let pair = Box::new(LowRank { rank, down, up });
            let fewer = rank * (rows + cols) < rows * cols;
            return Ok(Changed { low_rank: fewer.then_some(pair), ..plain(weight, None, notes) });
        };
        // With the zeros of an earlier step in it no product is left.
        weight.iter_mut().zip(mask).filter(|(_, k)| !**k).for_each(|(w, _)| *w = 0.0);
        Ok(plain(weight, kept, notes))
    }
}

fn plain(weight: Vec<f32>, kept: Option<Vec<bool>>, notes: Vec<String>) -> Changed {
    Changed { weight, kept, codes: None, books: None, low_rank: None, notes }
}

/// Most ranks whose factors have at most `rho` times the numbers of the matrix.
fn rank(rows: usize, cols: usize, rho: f64) -> usize {
    let rank = ((rows as f64 * cols as f64 * rho / (rows + cols) as f64) as usize).max(1);
    if rank >= 32 && rank < rows.min(cols) { rank / 32 * 32 } else { rank }
}

/// `B[rank, inputs]` and `A[outputs, rank]`.
struct Factors {
    rank: usize,
    down: Vec<f32>,
    up: Vec<f32>,
}

impl Factors {
    fn product(&self) -> Vec<f32> {
        let (rank, cols) = (self.rank, self.down.len() / self.rank);
        let a = Mat::from_fn(self.up.len() / rank, rank, |i, j| f64::from(self.up[i * rank + j]));
        let b = Mat::from_fn(rank, cols, |i, j| f64::from(self.down[i * cols + j]));
        let w = &a * &b;
        (0..w.nrows() * cols).map(|i| w[(i / cols, i % cols)] as f32).collect()
    }
}

/// The factors of rank `rank`, and the share of `||W S||^2` that was cut.
fn low_rank(layer: &Layer<'_>, damped: &Damped, rank: usize) -> Option<(Factors, f64)> {
    let (rows, cols) = (layer.outputs, layer.inputs);
    let w = Mat::from_fn(rows, cols, |i, j| f64::from(layer.weight[i * cols + j]));
    // Above the diagonal the factor holds what was there before.
    let s = Mat::from_fn(cols, cols, |i, j| if i >= j { damped.lower[(i, j)] } else { 0.0 });
    let svd = (&w * &s).thin_svd().ok()?;
    let (u, v, sigma) = (svd.U(), svd.V(), svd.S());
    let values: Vec<f64> = (0..rows.min(cols)).map(|i| sigma[i]).collect();
    let energy = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>();
    let all = energy(&values);
    let cut = if all > 0.0 { energy(&values[rank..]) / all } else { 0.0 };
    // B = Sigma_k^(1/2) V_k^T S^-1, as the transposed solution of S^T B^T = V_k Sigma_k^(1/2).
    let mut b = Mat::from_fn(cols, rank, |i, j| v[(i, j)] * values[j].max(0.0).sqrt());
    solve_upper_triangular_in_place(s.transpose(), b.as_mut(), Par::rayon(0));
    let down: Vec<f32> = (0..rank * cols).map(|i| b[(i % cols, i / cols)] as f32).collect();
    let up: Vec<f32> =
        (0..rows * rank).map(|i| (u[(i / rank, i % rank)] * values[i % rank].max(0.0).sqrt()) as f32).collect();
    let finite = down.iter().chain(&up).all(|w| w.is_finite());
    finite.then_some((Factors { rank, down, up }, cut))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::tools::testing::{Case, run};

    /// `||(W - V) S||^2` with the damped Gram matrix.
    fn error(case: &Case, damped: &Damped, weight: &[f32], n: usize) -> f64 {
        let rows = case.weight.chunks_exact(n).zip(weight.chunks_exact(n));
        rows.map(|(a, b)| {
            let d: Vec<f64> = a.iter().zip(b).map(|(a, b)| f64::from(a - b)).collect();
            (0..n * n).map(|i| d[i / n] * damped.gram[(i / n, i % n)] * d[i % n]).sum::<f64>()
        })
        .sum()
    }

    #[test]
    fn what_is_lost_are_the_singular_values_that_were_cut() {
        let case = Case::random(90, 24, 20, 100);
        let damped = damped(&case.layer()).unwrap();
        let zero = vec![0.0; 480];
        for rank in [1, 5, 12, 20] {
            let (factors, share) = low_rank(&case.layer(), &damped, rank).unwrap();
            let lost = error(&case, &damped, &factors.product(), 20) / error(&case, &damped, &zero, 20);
            assert!((lost - share).abs() < 1e-6, "{rank}: {lost} {share}");
        }
        let (whole, share) = low_rank(&case.layer(), &damped, 20).unwrap();
        assert!(share == 0.0 && whole.product().iter().zip(&case.weight).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn the_text_helps() {
        let case = Case::random(91, 24, 20, 100);
        let with = low_rank(&case.layer(), &damped(&case.layer()).unwrap(), 5).unwrap().0.product();
        let mut plain = case.clone();
        plain.seen.gram = Some((0..400).map(|i| if i % 21 == 0 { 1.0 } else { 0.0 }).collect());
        let without = low_rank(&plain.layer(), &damped(&plain.layer()).unwrap(), 5).unwrap().0.product();
        assert!(case.output_error(&with) < 0.98 * case.output_error(&without));
    }

    #[test]
    fn ranks_fit_and_grouped_keys_stay() {
        let case = Case::random(92, 40, 40, 150);
        let out = run(&Casp, &[("rho", 0.25)], &case.layer()).unwrap();
        assert!(out.notes[0].contains("rank 5 of 40"), "{:?}", out.notes);
        let pair = out.low_rank.unwrap();
        assert_eq!((pair.down.weight.len(), pair.up.weight.len()), (5 * 40, 40 * 5));
        let factors = Factors { rank: 5, down: pair.down.weight, up: pair.up.weight };
        assert_eq!(factors.product(), out.weight);
        // Sheet: k (R + C) <= rho R C.
        for (rows, cols, rho) in [(256, 256, 0.25), (1024, 1024, 0.25), (600, 300, 0.5), (100, 90, 0.3), (3, 3, 0.1)] {
            let k = rank(rows, cols, rho);
            assert!(k == 1 || (k * (rows + cols)) as f64 <= rho * (rows * cols) as f64, "{rows} {cols} {rho}: {k}");
            assert!(k < 32 || k.is_multiple_of(32));
        }
        let mask: Vec<bool> = (0..1600).map(|i| i % 3 > 0).collect();
        let masked = run(&Casp, &[], &Layer { kept: Some(&mask), ..case.layer() }).unwrap();
        assert!(masked.low_rank.is_none(), "zeros in the middle of a product");
        let grouped = Case::random(93, 10, 40, 150);
        let out = run(&Casp, &[], &grouped.layer()).unwrap();
        assert_eq!(out.weight, grouped.weight);
        assert!(out.notes[0].contains("no rank to spare"));
        assert!(Casp.applies(Proj::K) && !Casp.applies(Proj::V));
    }
}
