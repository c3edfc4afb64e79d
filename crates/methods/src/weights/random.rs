//! `random`: drop weights by lot.
//!
//! Liu et al. (arXiv:2202.02643) train networks under random masks and find that how many weights a layer keeps matters more
//! than which. On a trained model it destroys quality: it is the floor for comparisons. The published code draws each weight
//! on its own, so counts vary; here they are exact, and a mask follows from its seed alone.

use super::tools::{KEEP, OF, check_finite, drop_lowest, select::Scope};
use crate::common::SPARSITY;
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};

/// Random pruning.
#[derive(Debug)]
pub struct Random;

impl Method for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn title(&self) -> &'static str {
        "Random pruning"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training (2022)",
            arxiv: Some("2202.02643"),
        }
    }

    fn summary(&self) -> &'static str {
        "Drops weights by lot, an exact number of each matrix: the floor that every other method must beat."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[SPARSITY, KEEP, OF]
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Random {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Nothing
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let lots = (0..layer.weight.len() as u64).map(|i| lot(layer.seed, i));
        drop_lowest(params, layer, lots.collect(), Scope::Layer)
    }
}

/// A number from 0 to 1 for each entry, from a counter (SplitMix64's finaliser), so that masks need not be stored.
fn lot(seed: u64, i: u64) -> f32 {
    let mut x = seed.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 40) as f32 / (1 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::tools::testing::{Case, run};

    #[test]
    fn the_mask_follows_from_the_seed_and_not_from_the_weights() {
        let case = Case::random(5, 40, 30, 0);
        let mask = |seed: u64, scale: f32| {
            let weight: Vec<f32> = case.weight.iter().map(|w| w * scale).collect();
            run(&Random, &[("sparsity", 0.3)], &Layer { seed, weight: &weight, ..case.layer() }).unwrap().kept
        };
        assert_eq!(mask(1, 1.0), mask(1, -7.0));
        assert_ne!(mask(1, 1.0), mask(2, 1.0));
        let by_row: Vec<usize> = mask(1, 1.0).unwrap().chunks(30).map(|r| r.iter().filter(|k| **k).count()).collect();
        assert!(by_row.iter().all(|n| (10..=29).contains(n)), "{by_row:?}");
    }
}
