//! `wanda`: drop what is small and meets small inputs.
//!
//! Sun et al., Wanda (arXiv:2306.11695): the score of a weight is `|W_ij| * ||X_j||_2`, the norm of input `j` over the
//! calibration tokens, and scores compete within a row or a run of a pattern. Blocks are pruned one after the other, on the
//! outputs of pruned predecessors. Rescaling inputs against weights does not change the mask, unlike magnitude's. An input
//! that was always zero, or a text that says nothing, leaves magnitude to decide among the zeros. Above about 60 % use
//! `sparsegpt`, or ratios.

use super::tools::{
    KEEP, OF, check_finite, refuse,
    select::{self, Scope},
    share,
};
use crate::common::SPARSITY;
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Pattern, Sight},
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
        let norms = norms(layer)?;
        let n = layer.inputs;
        let mut scores: Vec<f32> = layer.weight.iter().enumerate().map(|(i, w)| w.abs() * norms[i % n]).collect();
        select::after_earlier(&mut scores, layer.kept);
        let kept = select::mask(layer, &scores, Scope::Row, Pattern::of(params), share(params, layer))?;
        let weight = select::masked(layer.weight, &kept);
        Ok(Changed { weight, kept: Some(kept), codes: None, notes: Vec::new() })
    }
}

/// The norm of each input over all tokens, divided by the largest; all 1 where every input was zero.
fn norms(layer: &Layer<'_>) -> Result<Vec<f32>, MethodError> {
    let Some(seen) = layer.seen else {
        return refuse(layer, "nothing was seen of its inputs; give a calibration text (-f FILE)");
    };
    if let Some(j) = seen.squares.iter().position(|s| !s.is_finite()) {
        return refuse(
            layer,
            format!("the squares of its input {j} do not add up to a finite number; the model overflows on this text"),
        );
    }
    let most = seen.squares.iter().copied().fold(0.0, f64::max);
    if most == 0.0 {
        return Ok(vec![1.0; layer.inputs]);
    }
    Ok(seen.squares.iter().map(|s| (s / most).sqrt() as f32).collect())
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
