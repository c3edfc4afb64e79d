//! `slicegpt`: the residual stream in the basis of its principal components before every norm, without the weakest of them.
//!
//! SliceGPT (Ashkboos et al. 2024; code microsoft/TransformerCompression, `rotate.py`). With the Gram matrix `C = X^T X` of the
//! stream before a norm, damped by a hundredth of its mean diagonal, the rows of the basis are the eigenvectors of `C` by falling
//! eigenvalue, in double precision (the paper: with single precision LLaMA-2-7B at 25 % goes from 7.24 to 8.52). What a cut
//! loses of the stream's squares is the sum of the eigenvalues that were cut, exactly.
//!
//! `random=1` turns the kept coordinates among themselves by an orthogonal matrix that is drawn, and the others likewise: the
//! model computes the same, and no coordinate is stronger than others, which roundings to few bits may like.

use super::tools::eigen::{descending, product};
use crate::common::switch;
use faer::Mat;
use lacuna_core::{
    compress::{Basis, Compressor, Rotator, Sight, Stream},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::{Proj, Site},
};
use std::ops::Bound;

/// SliceGPT.
#[derive(Debug)]
pub struct SliceGpt;

impl Method for SliceGpt {
    fn name(&self) -> &'static str {
        "slicegpt"
    }

    fn title(&self) -> &'static str {
        "SliceGPT"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "SliceGPT: Compress Large Language Models by Deleting Rows and Columns (2024)",
            arxiv: Some("2401.15024"),
        }
    }

    fn summary(&self) -> &'static str {
        "Gives the residual stream of every block the basis of its principal components and cuts the weakest off: all matrices become smaller and stay dense. Only Lacuna reads the result."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            ParamSpec {
                name: "sparsity",
                doc: "share of the residual stream's width that is cut off",
                default: 0.25,
                range: (Bound::Included(0.0), Bound::Excluded(1.0)),
            },
            ParamSpec {
                name: "multiple",
                doc: "the width that stays is rounded down to a multiple of this (32: whole blocks of 4- and 8-bit codes; the published code: 8)",
                default: 32.0,
                range: (Bound::Included(1.0), Bound::Included(1024.0)),
            },
            switch(
                "random",
                "1: kept coordinates are turned among themselves by lot, which evens out their sizes",
                false,
            ),
        ];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for SliceGpt {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Gram
    }

    fn applies(&self, _: Proj) -> bool {
        true
    }

    fn rotator(&self) -> Option<&dyn Rotator> {
        Some(self)
    }
}

impl Rotator for SliceGpt {
    fn kept(&self, params: &Params, width: usize) -> usize {
        let (share, multiple) = (params.get("sparsity"), params.get("multiple").max(1.0) as usize);
        if share == 0.0 {
            return width;
        }
        let wanted = ((1.0 - share) * width as f64 + 1e-6) as usize;
        (wanted / multiple * multiple).max(multiple).min(width)
    }

    fn basis(&self, params: &Params, stream: &Stream<'_>) -> Result<Basis, MethodError> {
        let n = stream.width;
        let refuse = |reason: &str| Err(MethodError::Layer { place: stream.place.into(), reason: reason.into() });
        let Some(gram) = stream.gram else {
            return refuse("nothing was seen of the residual stream; give a calibration text (-f FILE)");
        };
        if gram.iter().any(|g| !g.is_finite()) {
            return refuse(
                "the squares of the residual stream do not add up to finite numbers; the model overflows on this text",
            );
        }
        let damping = 0.01 * (0..n).map(|i| gram[i * n + i]).sum::<f64>() / n.max(1) as f64;
        let damped = |i: usize, j: usize| gram[i * n + j] + if i == j { damping } else { 0.0 };
        let Some(eigen) = descending(n, damped) else {
            return refuse(
                "the principal components of the residual stream cannot be computed; use more tokens (--tokens)",
            );
        };
        let energies: Vec<f64> = eigen.values.iter().map(|v| (v - damping).max(0.0)).collect();
        let kept = self.kept(params, n);
        let rows = match params.get("random") > 0.0 {
            false => eigen.rows,
            true => product(n, &turns(n, kept, stream.seed), &eigen.rows),
        };
        Ok(Basis { rows, lost: lost(&energies) })
    }
}

/// Share of the sum of `energies` behind each of them; `n + 1` numbers, from 1 to 0.
fn lost(energies: &[f64]) -> Vec<f64> {
    let mut sums = vec![0.0; energies.len() + 1];
    for (i, e) in energies.iter().enumerate().rev() {
        sums[i] = sums[i + 1] + e;
    }
    let all = if sums[0] > 0.0 { sums[0] } else { 1.0 };
    sums.iter().map(|s| s / all).collect()
}

/// `blockdiag(R, R')` of two orthogonal matrices that are drawn, the first of size `kept`.
fn turns(n: usize, kept: usize, seed: u64) -> Vec<f64> {
    let mut all = vec![0.0; n * n];
    for (start, size) in [(0, kept), (kept, n - kept)].into_iter().filter(|part| part.1 > 0) {
        let q = orthogonal(size, seed.wrapping_add(start as u64));
        for i in 0..size {
            for j in 0..size {
                all[(start + i) * n + start + j] = q[(i, j)];
            }
        }
    }
    all
}

/// The orthogonal factor of a matrix of normal numbers, with the signs that make it uniform (Mezzadri 2007).
fn orthogonal(n: usize, seed: u64) -> Mat<f64> {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    // SplitMix64.
    let mut unit = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    };
    // Box and Muller.
    let mut normal = || (-2.0 * (1.0 - unit()).ln()).sqrt() * (std::f64::consts::TAU * unit()).cos();
    let qr = Mat::from_fn(n, n, |_, _| normal()).qr();
    let (q, r) = (qr.compute_thin_Q(), qr.thin_R());
    Mat::from_fn(n, n, |i, j| q[(i, j)] * r[(j, j)].signum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    fn params(given: &[(&str, f64)]) -> Params {
        Params::new(&SliceGpt, given.iter().copied()).unwrap()
    }

    fn basis(given: &[(&str, f64)], gram: Option<&[f64]>, width: usize) -> Result<Basis, MethodError> {
        let stream = Stream { place: "layers.2.mlp", width, gram, reader: &|_| None, seed: 3 };
        SliceGpt.basis(&params(given), &stream)
    }

    /// Rows of `n` numbers in a space of `rank` directions.
    fn data(n: usize, rank: usize, tokens: usize) -> Vec<f64> {
        let (a, b) = (normal(1, tokens * rank), normal(2, rank * n));
        let at = |t: usize, j: usize| (0..rank).map(|r| f64::from(a[t * rank + r]) * f64::from(b[r * n + j])).sum();
        (0..tokens * n).map(|i| at(i / n, i % n)).collect()
    }

    fn gram(x: &[f64], n: usize) -> Vec<f64> {
        let entry = |i: usize| x.chunks_exact(n).map(|r| r[i / n] * r[i % n]).sum();
        (0..n * n).map(entry).collect()
    }

    /// `||x - P x||^2` summed over rows, for the projector on the first `kept` rows of the basis.
    fn cut(x: &[f64], rows: &[f64], n: usize, kept: usize) -> f64 {
        let row = |x: &[f64]| {
            let along = |i: usize| (0..n).map(|j| rows[i * n + j] * x[j]).sum::<f64>();
            let mut rest = x.to_vec();
            for i in 0..kept {
                let a = along(i);
                rest.iter_mut().zip(&rows[i * n..]).for_each(|(r, q)| *r -= a * q);
            }
            rest.iter().map(|r| r * r).sum::<f64>()
        };
        x.chunks_exact(n).map(row).sum()
    }

    #[test]
    fn bases_are_orthogonal_and_a_cut_loses_the_eigenvalues_behind_it() {
        let n = 24;
        let x = data(n, n, 200);
        let gram = gram(&x, n);
        let all: f64 = x.iter().map(|x| x * x).sum();
        for random in [0.0, 1.0] {
            let Basis { rows, lost } =
                basis(&[("random", random), ("sparsity", 0.5), ("multiple", 8.0)], Some(&gram), n).unwrap();
            for i in 0..n {
                for j in 0..n {
                    let dot: f64 = (0..n).map(|k| rows[i * n + k] * rows[j * n + k]).sum();
                    assert!((dot - f64::from(i == j)).abs() < 1e-10);
                }
            }
            assert!(lost.windows(2).all(|l| l[0] >= l[1]) && lost[n] == 0.0 && (lost[0] - 1.0).abs() < 1e-12);
            // Turned by lot, only the cut itself is where it was.
            for kept in if random > 0.0 { 8..9 } else { 0..n + 1 } {
                let share = cut(&x, &rows, n, kept) / all;
                assert!((share - lost[kept]).abs() < 1e-10, "{kept}: {share} {}", lost[kept]);
            }
        }
        let turned = |seed| {
            let stream = Stream { place: "head", width: n, gram: Some(&gram), reader: &|_| None, seed };
            SliceGpt.basis(&params(&[("random", 1.0)]), &stream).unwrap().rows
        };
        assert!(turned(1) == turned(1) && turned(1) != turned(2));
    }

    #[test]
    fn a_stream_of_low_rank_is_kept_whole() {
        let n = 32;
        let x = data(n, 7, 100);
        let out = basis(&[("sparsity", 0.75), ("multiple", 8.0)], Some(&gram(&x, n)), n).unwrap();
        let all: f64 = x.iter().map(|x| x * x).sum();
        assert!(cut(&x, &out.rows, n, 8) < 1e-18 * all && out.lost[8] < 1e-12);
    }

    #[test]
    fn widths_are_multiples() {
        let kept =
            |share, multiple, width| SliceGpt.kept(&params(&[("sparsity", share), ("multiple", multiple)]), width);
        assert_eq!(kept(0.25, 32.0, 4096), 3072);
        assert_eq!(kept(0.3, 8.0, 256), 176);
        assert_eq!(kept(0.1, 32.0, 256), 224);
        assert_eq!(kept(0.0, 32.0, 100), 100);
        assert_eq!((kept(0.9, 32.0, 64), kept(0.5, 64.0, 48)), (32, 48));
    }

    #[test]
    fn refuses_what_it_cannot_see() {
        let e = basis(&[], None, 4).unwrap_err().to_string();
        assert!(e.contains("layers.2.mlp") && e.contains("-f FILE"), "{e}");
        let e = basis(&[], Some(&[f64::NAN; 16]), 4).unwrap_err().to_string();
        assert!(e.contains("layers.2.mlp") && e.contains("overflows"), "{e}");
        // Nothing but zeros: any basis does.
        assert!(basis(&[], Some(&[0.0; 16]), 4).unwrap().lost.iter().all(|l| *l == 0.0));
    }
}
