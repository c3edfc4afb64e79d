//! `patch`: tiles that are dense or 2:4.
//!
//! PATCH (2025; code Paramathic/patch) gives every 128x128 tile of a matrix the choice between dense and 2:4, so that the share
//! of zeros can be anything up to one half while every tile suits hardware or a kernel. The paper learns the choice over a
//! thousand million tokens; this is the form without training: under Wanda's score (`|W_ij| * ||X_j||`) each tile has a mask
//! and a loss, the sum of the squared scores it would drop, and the tiles that lose most stay dense. All full tiles are worth
//! the same, so taking them by loss is the best choice. Weights are not updated; `gptq` behind it makes up for rounding only.

use super::tools::{
    check_finite,
    select::{self, after_earlier},
    wanda_scores,
};
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Pattern, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};
use std::ops::Bound;

/// PATCH without training.
#[derive(Debug)]
pub struct Patch;

impl Method for Patch {
    fn name(&self) -> &'static str {
        "patch"
    }

    fn title(&self) -> &'static str {
        "PATCH without training"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation { paper: "PATCH: Learnable Tile-level Hybrid Sparsity for LLMs (2025)", arxiv: None }
    }

    fn summary(&self) -> &'static str {
        "Leaves the tiles dense that would lose most and makes all others 2:4, by Wanda's score: any share of zeros up to one half."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            ParamSpec {
                name: "zeros",
                doc: "share of zeros; twice this share of the tiles is 2:4",
                default: 0.35,
                range: (Bound::Included(0.0), Bound::Included(0.5)),
            },
            ParamSpec {
                name: "tile",
                doc: "rows and columns of a tile",
                default: 128.0,
                range: (Bound::Included(4.0), Bound::Included(4096.0)),
            },
        ];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Patch {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Norms
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let mut scores = wanda_scores(layer)?;
        // Runs of four must not cross tiles.
        let (n, side) = (layer.inputs, (params.get("tile") as usize).next_multiple_of(4));
        after_earlier(&mut scores, layer.kept);
        let mut kept = select::mask(layer, &scores, select::Scope::Row, Pattern::Runs { keep: 2, of: 4 }, 0.5)?;
        let across = n.div_ceil(side);
        let tile = |i: usize| i / n / side * across + i % n / side;
        let (mut losses, mut sizes) = (vec![0.0_f64; across * layer.outputs.div_ceil(side)], Vec::new());
        sizes.resize(losses.len(), 0_usize);
        for (i, (s, k)) in scores.iter().zip(&kept).enumerate() {
            sizes[tile(i)] += 1;
            losses[tile(i)] += if *k { 0.0 } else { f64::from(s.max(0.0)).powi(2) };
        }
        let dense = dense_tiles(&losses, &sizes, 1.0 - 2.0 * params.get("zeros"));
        let before = |i: usize| layer.kept.is_none_or(|k| k[i]);
        kept.iter_mut().enumerate().for_each(|(i, k)| *k = (*k || dense[tile(i)]) && before(i));
        let weight = select::masked(layer.weight, &kept);
        Ok(Changed { weight, kept: Some(kept), codes: None, books: None, low_rank: None, notes: Vec::new() })
    }
}

/// The tiles with the largest losses per weight, as many as fit into `share` of all weights; of equal ones the first.
fn dense_tiles(losses: &[f64], sizes: &[usize], share: f64) -> Vec<bool> {
    let density = |i: usize| losses[i] / sizes[i].max(1) as f64;
    let mut order: Vec<usize> = (0..losses.len()).collect();
    order.sort_by(|a, b| density(*b).total_cmp(&density(*a)));
    let mut left = select::count(share.clamp(0.0, 1.0), sizes.iter().sum());
    let mut dense = vec![false; losses.len()];
    for i in order {
        if sizes[i] > left {
            break;
        }
        left -= sizes[i];
        dense[i] = true;
    }
    dense
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{
        tools::testing::{Case, run},
        wanda::Wanda,
    };

    fn kept(case: &Case, zeros: f64, side: f64) -> Vec<bool> {
        run(&Patch, &[("zeros", zeros), ("tile", side)], &case.layer()).unwrap().kept.unwrap()
    }

    #[test]
    fn every_tile_is_dense_or_2_of_4_and_the_share_is_met() {
        let case = Case::random(40, 16, 32, 100);
        for (zeros, dense) in [(0.0, 8), (0.125, 6), (0.25, 4), (0.5, 0), (0.3, 3)] {
            let kept = kept(&case, zeros, 8.0);
            let tile =
                |t: usize| (0..64).map(|i| kept[(t / 4 * 8 + i / 8) * 32 + t % 4 * 8 + i % 8]).collect::<Vec<_>>();
            let whole = (0..8).map(tile).filter(|t| t.iter().all(|k| *k)).count();
            let halves = |t: &Vec<bool>| t.chunks(4).all(|run| run.iter().filter(|k| **k).count() == 2);
            assert_eq!((whole, (0..8).map(tile).filter(halves).count()), (dense, 8 - dense), "{zeros}");
        }
    }

    #[test]
    fn without_dense_tiles_it_is_wanda() {
        let case = Case::random(41, 12, 40, 100);
        let wanda = run(&Wanda, &[("keep", 2.0), ("of", 4.0)], &case.layer()).unwrap();
        assert_eq!(kept(&case, 0.5, 16.0), wanda.kept.unwrap());
        assert!(kept(&case, 0.0, 16.0).iter().all(|k| *k));
    }

    #[test]
    fn the_loss_falls_as_more_tiles_are_dense() {
        let case = Case::random(42, 32, 64, 200);
        let loss = |zeros: f64| {
            let kept = kept(&case, zeros, 8.0);
            let dropped = kept.iter().enumerate().filter(|(_, k)| !**k);
            dropped.map(|(i, _)| f64::from(case.weight[i]).powi(2) * case.seen.squares[i % 64]).sum::<f64>()
        };
        let losses: Vec<f64> = (0..=10).map(|i| loss(0.05 * f64::from(i))).collect();
        assert!(losses.is_sorted() && losses[0] == 0.0 && losses[10] > losses[5], "{losses:?}");
    }

    #[test]
    fn of_tiles_the_costliest_stay() {
        assert_eq!(dense_tiles(&[1.0, 4.0, 3.0, 2.0], &[4, 4, 4, 4], 0.5), [false, true, true, false]);
        // The last tile is smaller: its loss counts per weight.
        assert_eq!(dense_tiles(&[4.0, 2.0], &[8, 2], 0.5), [false, true]);
        assert_eq!(dense_tiles(&[0.0, 0.0], &[4, 4], 1.0), [true, true]);
    }
}
