//! `gptq`: rounding with compensation.
//!
//! Frantar et al., GPTQ (arXiv:2210.17323): SparseGPT's sweep with rounding instead of dropping. A group's scale is found when
//! the sweep reaches it, on weights that already carry the errors before it. Entries that an earlier step dropped stay zero:
//! they take over no errors, so masks survive exactly. Symmetric grid, columns in their own order.

use super::tools::{
    GROUP, bits, check_finite,
    factor::factor,
    grid::Grid,
    sweep::{Aim, sweep},
};
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};

/// GPTQ.
#[derive(Debug)]
pub struct Gptq;

impl Method for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn title(&self) -> &'static str {
        "GPTQ"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (2022)",
            arxiv: Some("2210.17323"),
        }
    }

    fn summary(&self) -> &'static str {
        "Rounds weights column by column and lets the columns behind make up for the error; keeps every zero of an earlier step."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[bits("bits of a code", 2.0, 4.0), GROUP];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Gptq {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Gram
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let grid = Grid::of(params, layer)?;
        Ok(sweep(layer, &factor(layer)?, Aim { drop: None, grid }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{
        rtn::Rtn,
        tools::testing::{Case, run},
        wanda::Wanda,
    };

    #[test]
    fn inputs_that_do_not_hang_together_leave_rounding_to_nearest() {
        let mut case = Case::random(20, 12, 40, 0);
        case.seen.gram = Some((0..1600).map(|i| if i % 41 == 0 { 5.0 } else { 0.0 }).collect());
        let given = [("bits", 3.0), ("group", 20.0)];
        assert_eq!(run(&Gptq, &given, &case.layer()).unwrap(), run(&Rtn, &given, &case.layer()).unwrap());
    }

    #[test]
    fn outputs_change_less_than_by_rounding_to_nearest() {
        let better = (0..100).filter(|seed| {
            let case = Case::random(100 + seed, 8, 64, 200);
            let error = |m: &dyn Method| {
                case.output_error(&run(m, &[("bits", 3.0), ("group", 32.0)], &case.layer()).unwrap().weight)
            };
            error(&Gptq) <= error(&Rtn)
        });
        let better = better.count();
        assert!(better >= 95, "only {better} of 100 layers");
    }

    #[test]
    fn zeros_of_a_mask_stay_and_a_full_mask_changes_nothing() {
        let case = Case::random(21, 16, 160, 300);
        let pruned = run(&Wanda, &[("sparsity", 0.5)], &case.layer()).unwrap();
        let layer = Layer { weight: &pruned.weight, kept: pruned.kept.as_deref(), ..case.layer() };
        let out = run(&Gptq, &[("group", 32.0)], &layer).unwrap();
        assert_eq!(out.kept, pruned.kept);
        let zeros = out.weight.iter().zip(pruned.kept.as_ref().unwrap()).filter(|(_, k)| !**k);
        assert!(zeros.clone().count() == 16 * 80 && zeros.clone().all(|(w, _)| *w == 0.0));
        let all = vec![true; case.weight.len()];
        let full = run(&Gptq, &[("group", 32.0)], &Layer { kept: Some(&all), ..case.layer() }).unwrap();
        assert_eq!(full.weight, run(&Gptq, &[("group", 32.0)], &case.layer()).unwrap().weight);
    }

    #[test]
    fn rows_of_zeros_and_dead_inputs_give_zeros() {
        let mut case = Case::random(22, 4, 32, 100);
        case.weight[..32].fill(0.0);
        if let Some(gram) = &mut case.seen.gram {
            (0..32).for_each(|i| (gram[3 * 32 + i], gram[i * 32 + 3]) = (0.0, 0.0));
        }
        let out = run(&Gptq, &[("group", 0.0)], &case.layer()).unwrap();
        assert!(out.weight[..32].iter().all(|w| *w == 0.0) && (0..4).all(|r| out.weight[r * 32 + 3] == 0.0));
        assert!(out.notes[0].contains("1 of 32 inputs"), "{:?}", out.notes);
    }

    #[test]
    fn many_bits_give_the_weights_back() {
        let case = Case::random(23, 8, 64, 200);
        let out = run(&Gptq, &[("bits", 8.0), ("group", 16.0)], &case.layer()).unwrap();
        assert!(
            out.weight.iter().zip(&case.weight).all(|(a, b)| (a - b).abs() < 0.1),
            "steps of about 0.02, and what they push on"
        );
    }
}
