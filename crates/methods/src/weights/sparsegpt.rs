//! `sparsegpt`: least squares per layer, swept over columns.
//!
//! Frantar and Alistarh, SparseGPT (arXiv:2301.00774): with `U` the factor of the inverse Gram matrix, an entry's score is
//! `(w / u_jj)^2`; its removal costs an error `w / u_jj` that the columns behind take over along row `j` of `U`. Scores
//! compete within blocks of 128 columns and all rows, or within runs of a pattern, always on weights that already carry the
//! errors before them. With `bits`, survivors are rounded to a symmetric grid in the same sweep, and what rounding costs is
//! taken over too. The sweep is the one that `gptq` uses.

use super::tools::{
    GROUP, KEEP, OF, bits, check_finite,
    factor::factor,
    grid::Grid,
    select, share,
    sweep::{Aim, sweep},
};
use crate::common::SPARSITY;
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Pattern, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};

/// SparseGPT.
#[derive(Debug)]
pub struct SparseGpt;

impl Method for SparseGpt {
    fn name(&self) -> &'static str {
        "sparsegpt"
    }

    fn title(&self) -> &'static str {
        "SparseGPT"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (2023)",
            arxiv: Some("2301.00774"),
        }
    }

    fn summary(&self) -> &'static str {
        "Drops weights column by column and lets the others make up for the error, through the inverse Gram matrix of the inputs; can round to codes in the same sweep."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] =
            &[SPARSITY, KEEP, OF, bits("also round to codes of this many bits; 0: no", 0.0, 0.0), GROUP];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for SparseGpt {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Gram
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let pattern = Pattern::of(params);
        select::check_runs(layer, pattern)?;
        let grid = Grid::of(params, layer)?;
        let share = share(params, layer);
        if share == 0.0 && pattern == Pattern::Free && grid.is_none() {
            let (weight, kept) = (layer.weight.to_vec(), layer.kept.map(<[bool]>::to_vec));
            return Ok(Changed { weight, kept, codes: None, books: None, low_rank: None, notes: Vec::new() });
        }
        Ok(sweep(layer, &factor(layer)?, Aim { drop: Some((share, pattern)), grid }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::magnitude::Magnitude;
    use crate::weights::tools::testing::{Case, run};

    #[test]
    fn nothing_to_drop_changes_nothing() {
        let case = Case::random(8, 12, 20, 100);
        assert_eq!(run(&SparseGpt, &[("sparsity", 0.0)], &case.layer()).unwrap().weight, case.weight);
    }

    /// One row, two inputs: dropping `w_0` moves `w_1` by `-w_0 [H^-1]_10 / [H^-1]_00`.
    #[test]
    fn two_inputs_have_the_closed_form() {
        let mut case = Case::random(9, 1, 2, 0);
        (case.weight, case.seen.gram) = (vec![0.1, 1.0], Some(vec![2.0, 0.8, 0.8, 1.0]));
        let out = run(&SparseGpt, &[("sparsity", 0.5)], &case.layer()).unwrap();
        let damping = 0.01 * 1.5;
        let (a, b) = (2.0 + damping, 1.0 + damping);
        let determinant = a * b - 0.64;
        let (inverse_00, inverse_10) = (b / determinant, -0.8 / determinant);
        let expected = 1.0 - 0.1 * inverse_10 / inverse_00;
        assert_eq!(out.kept, Some(vec![false, true]));
        assert!((f64::from(out.weight[1]) - expected).abs() < 1e-6, "{} {expected}", out.weight[1]);
    }

    #[test]
    fn inputs_of_equal_strength_that_do_not_hang_together_leave_magnitude() {
        let mut case = Case::random(10, 12, 20, 0);
        case.seen.gram = Some((0..400).map(|i| if i % 21 == 0 { 5.0 } else { 0.0 }).collect());
        let out = run(&SparseGpt, &[("sparsity", 0.5)], &case.layer()).unwrap();
        assert_eq!(out, run(&Magnitude, &[("sparsity", 0.5)], &case.layer()).unwrap());
    }

    #[test]
    fn outputs_change_less_than_under_the_same_mask_without_an_update() {
        let case = Case::random(11, 40, 200, 600);
        for given in [&[("sparsity", 0.5)][..], &[("keep", 2.0), ("of", 4.0)]] {
            let out = run(&SparseGpt, given, &case.layer()).unwrap();
            let same = select::masked(&case.weight, out.kept.as_ref().unwrap());
            let magnitude = run(&Magnitude, given, &case.layer()).unwrap();
            let error = case.output_error(&out.weight);
            assert!(error < 0.9 * case.output_error(&same), "{given:?}");
            assert!(error < 0.9 * case.output_error(&magnitude.weight), "{given:?}");
        }
    }

    #[test]
    fn order_of_rows_does_not_matter_under_a_pattern() {
        let case = Case::random(12, 6, 40, 100);
        let given = [("keep", 2.0), ("of", 4.0)];
        let all = run(&SparseGpt, &given, &case.layer()).unwrap().weight;
        let last = Layer { outputs: 1, weight: &case.weight[200..], ..case.layer() };
        assert_eq!(run(&SparseGpt, &given, &last).unwrap().weight, all[200..]);
    }

    #[test]
    fn joint_rounding_beats_rounding_afterwards() {
        let case = Case::random(13, 64, 256, 800);
        let joint = run(&SparseGpt, &[("sparsity", 0.5), ("bits", 3.0)], &case.layer()).unwrap();
        let pruned = run(&SparseGpt, &[("sparsity", 0.5)], &case.layer()).unwrap();
        let after = Layer { weight: &pruned.weight, kept: pruned.kept.as_deref(), ..case.layer() };
        let rounded = run(&crate::weights::rtn::Rtn, &[("bits", 3.0)], &after).unwrap();
        assert!(case.output_error(&joint.weight) < case.output_error(&rounded.weight));
    }
}
