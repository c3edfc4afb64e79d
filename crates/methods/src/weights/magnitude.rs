//! `magnitude`: drop the smallest weights.
//!
//! Jaiswal et al. (arXiv:2306.03805) measure how far this alone goes: quality stays flat up to a turning point and the free
//! mask is then as good as an expensive one. The score is `|w|`; scores compete within a matrix (as the baseline of the
//! Wanda code does), within each row, or within runs of a pattern. Counts are exact and masks of larger shares contain those
//! of smaller ones. It knows nothing of the inputs: beyond about a third of a small model's weights expect real losses.

use super::tools::{KEEP, OF, check_finite, drop_lowest, select::Scope};
use crate::common::{SPARSITY, switch};
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};

/// Magnitude pruning.
#[derive(Debug)]
pub struct Magnitude;

impl Method for Magnitude {
    fn name(&self) -> &'static str {
        "magnitude"
    }

    fn title(&self) -> &'static str {
        "Magnitude pruning"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter (2023)",
            arxiv: Some("2306.03805"),
        }
    }

    fn summary(&self) -> &'static str {
        "Drops the weights of smallest magnitude, in each matrix or in each row; needs no text."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] =
            &[SPARSITY, KEEP, OF, switch("rows", "compare within rows instead of whole matrices", false)];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Magnitude {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Nothing
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let scope = if params.get("rows") > 0.0 { Scope::Row } else { Scope::Layer };
        drop_lowest(params, layer, layer.weight.iter().map(|w| w.abs()).collect(), scope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::tools::testing::{Case, run};

    fn gaussian_error(given: &[(&str, f64)]) -> f64 {
        let case = Case::random(3, 256, 512, 0);
        let out = run(&Magnitude, given, &case.layer()).unwrap();
        let square = |it: &mut dyn Iterator<Item = f32>| it.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
        let lost = square(&mut case.weight.iter().zip(&out.weight).map(|(a, b)| a - b));
        lost / square(&mut case.weight.iter().copied())
    }

    /// The relative squared error on normal weights is `s - 2 t phi(t)` with `t` the quantile of `(1 + s) / 2`.
    #[test]
    fn errors_on_normal_weights_are_those_of_the_formula() {
        for (given, expected) in [
            (&[("sparsity", 0.5)][..], 0.0713),
            (&[("sparsity", 0.7)], 0.2167),
            (&[("keep", 2.0), ("of", 4.0)], 0.1328),
        ] {
            let error = gaussian_error(given);
            assert!((error / expected - 1.0).abs() < 0.04, "{given:?}: {error}, not {expected}");
        }
    }

    #[test]
    fn masks_are_nested() {
        let case = Case::random(4, 16, 24, 0);
        let kept = |s: f64| run(&Magnitude, &[("sparsity", s)], &case.layer()).unwrap().kept.unwrap();
        let (few, many) = (kept(0.7), kept(0.4));
        assert!(few.iter().zip(&many).all(|(f, m)| !f || *m));
    }
}
