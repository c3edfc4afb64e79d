//! `wanda`: drop what is small and meets small inputs.
//!
//! Sun et al., Wanda (arXiv:2306.11695): the score of a weight is `|W_ij| * ||X_j||_2`, the norm of input `j` over the
//! calibration tokens, and scores compete within a row or a run of a pattern. Blocks are pruned one after the other, on the
//! outputs of pruned predecessors. Rescaling inputs against weights does not change the mask, unlike magnitude's. An input
//! that was always zero, or a text that says nothing, leaves magnitude to decide among the zeros. Above about 60 % use
//! `sparsegpt`, or ratios.

use super::tools::{KEEP, OF, check_finite, drop_lowest, select::Scope, wanda_scores};
use crate::common::SPARSITY;
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};

/// Wanda.
#[derive(Debug)]
pub struct Wanda;

impl Method for Wanda {
    fn name(&self) -> &'static str {
        "wanda"
    }

    fn title(&self) -> &'static str {
        "Wanda"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "A Simple and Effective Pruning Approach for Large Language Models (2023)",
            arxiv: Some("2306.11695"),
        }
    }

    fn summary(&self) -> &'static str {
        "Drops in each row the weights with the smallest product of magnitude and input norm; one pass over a text, no update of the others."
    }

    fn params(&self) -> &'static [ParamSpec] {
        &[SPARSITY, KEEP, OF]
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Wanda {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Norms
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        drop_lowest(params, layer, wanda_scores(layer)?, Scope::Row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::magnitude::Magnitude;
    use crate::weights::tools::testing::{Case, run};

    #[test]
    fn equal_norms_are_magnitude_by_row() {
        let mut case = Case::random(6, 12, 20, 0);
        case.seen.squares = vec![3.0; 20];
        let by_rows = run(&Magnitude, &[("sparsity", 0.45), ("rows", 1.0)], &case.layer()).unwrap();
        assert_eq!(run(&Wanda, &[("sparsity", 0.45)], &case.layer()).unwrap().kept, by_rows.kept);
    }

    #[test]
    fn rescaling_inputs_against_weights_leaves_the_mask() {
        let case = Case::random(7, 12, 20, 100);
        let d: Vec<f32> = (0..20).map(|j| [0.25, 2.0, 16.0][j % 3]).collect();
        let mut other = case.clone();
        other.weight.iter_mut().enumerate().for_each(|(i, w)| *w /= d[i % 20]);
        other.seen.squares.iter_mut().zip(&d).for_each(|(s, d)| *s *= f64::from(*d) * f64::from(*d));
        let mask = |c: &Case| run(&Wanda, &[("sparsity", 0.6)], &c.layer()).unwrap().kept;
        assert_eq!(mask(&case), mask(&other));
        let by_magnitude = |c: &Case| run(&Magnitude, &[("sparsity", 0.6)], &c.layer()).unwrap().kept;
        assert_ne!(by_magnitude(&case), by_magnitude(&other));
    }
}
