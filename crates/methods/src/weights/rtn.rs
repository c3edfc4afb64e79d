//! `rtn`: round to nearest.
//!
//! The baseline of all quantisation: one scale for each group of columns of a row, `scale = max|w| / (2^(bits-1) - 1/2)`,
//! and the nearest code. Zeros stay zeros, since the grid is symmetric, so masks of an earlier step survive, and the scale of
//! a pruned group is that of its survivors. Good at 8 and 4 bits; below, use `gptq`.

use super::tools::{
    GROUP, bits, check_finite,
    grid::{self, Grid},
};
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};

/// Round to nearest.
#[derive(Debug)]
pub struct Rtn;

impl Method for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn title(&self) -> &'static str {
        "Round to nearest"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (2022), whose baseline it is",
            arxiv: Some("2210.17323"),
        }
    }

    fn summary(&self) -> &'static str {
        "Rounds every weight to the nearest code of a symmetric grid with one scale per group; needs no text and keeps zeros."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[bits("bits of a code", 2.0, 4.0), GROUP];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Rtn {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Nothing
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let Some(grid) = Grid::of(params, layer)? else { unreachable!("bits are at least 2 by their range") };
        let mut codes = grid.codes(layer);
        let groups = layer.weight.chunks_exact(grid.group).zip(codes.codes.chunks_exact_mut(grid.group));
        for ((w, c), scale) in groups.zip(&mut codes.scales) {
            *scale = grid.scale(w.iter().copied());
            c.iter_mut().zip(w).for_each(|(c, w)| *c = grid.code(*w, *scale));
        }
        let (weight, kept) = (grid::decode(&codes), layer.kept.map(<[bool]>::to_vec));
        Ok(Changed { weight, kept, codes: Some(codes), books: None, low_rank: None, notes: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::tools::testing::{Case, run};

    #[test]
    fn an_example_by_hand() {
        let mut case = Case::random(1, 1, 4, 0);
        case.weight = vec![0.75, -0.25, 0.0, 0.06];
        let out = run(&Rtn, &[("bits", 4.0), ("group", 2.0)], &case.layer()).unwrap();
        let codes = out.codes.unwrap();
        // Scales 0.75 / 7.5 and 0.06 / 7.5, rounded to 8 significant bits.
        assert_eq!(codes.codes, [7, -2, 0, 7]);
        assert!((codes.scales[0] - 0.1).abs() < 4e-4 && (codes.scales[1] - 0.008).abs() < 3e-5, "{codes:?}");
        assert_eq!(out.weight[1], -2.0 * codes.scales[0]);
    }

    /// Relative squared errors on normal weights (handbook of measured values): 4 bits in groups of 128 lose 1.4 %.
    #[test]
    fn errors_on_normal_weights() {
        let case = Case::random(2, 128, 512, 0);
        let square = |it: &mut dyn Iterator<Item = f32>| it.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
        for (bits, low, high) in [(8.0, 2e-5, 8e-5), (4.0, 0.008, 0.016), (3.0, 0.03, 0.08)] {
            let out = run(&Rtn, &[("bits", bits)], &case.layer()).unwrap();
            let lost = square(&mut case.weight.iter().zip(&out.weight).map(|(a, b)| a - b));
            let share = lost / square(&mut case.weight.iter().copied());
            assert!((low..high).contains(&share), "{bits} bits: {share}");
        }
    }
}
