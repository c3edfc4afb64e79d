//! What the methods here share: which scores stay, grids of codes, the factor of a Gram matrix, the column sweep.

pub mod alike;
pub mod eigen;
pub mod exact;
pub mod factor;
pub mod grid;
pub mod pairs;
pub mod rows;
pub mod select;
pub mod shared;
pub mod soft;
pub mod solve;
pub mod sweep;
pub mod tune;
pub mod vq;

#[cfg(test)]
pub mod testing;

use lacuna_core::{
    compress::{Changed, Layer, Pattern},
    method::{MethodError, ParamSpec, Params},
};
use select::Scope;
use std::ops::Bound;

/// Damping that is tried one after the other, as a share of the mean of the diagonal.
pub const DAMPING: [f64; 3] = [0.01, 0.1, 1.0];

/// The parameter of a pattern's runs: how many of each stay.
pub const KEEP: ParamSpec = ParamSpec {
    name: "keep",
    doc: "entries that stay of each run of a pattern (2 of 2:4); in recipes `pattern = \"2:4\"` sets both",
    default: 0.0,
    range: (Bound::Included(0.0), Bound::Included(63.0)),
};

/// The parameter of a pattern's runs: how long they are.
pub const OF: ParamSpec = ParamSpec {
    name: "of",
    doc: "entries of each run of a pattern (4 of 2:4); 0: zeros lie anywhere",
    default: 0.0,
    range: (Bound::Included(0.0), Bound::Included(64.0)),
};

/// Columns that share a scale.
pub const GROUP: ParamSpec = ParamSpec {
    name: "group",
    doc: "columns that share a scale; 0: whole rows",
    default: 128.0,
    range: (Bound::Included(0.0), Bound::Included(65536.0)),
};

/// Bits of a code; `default` is what the method takes by itself.
pub const fn bits(doc: &'static str, low: f64, default: f64) -> ParamSpec {
    ParamSpec { name: "bits", doc, default, range: (Bound::Included(low), Bound::Included(8.0)) }
}

/// The share to drop of a layer.
pub fn share(params: &Params, layer: &Layer<'_>) -> f64 {
    layer.sparsity.unwrap_or_else(|| params.get("sparsity"))
}

/// Drops the entries with the lowest of `scores` (which must not be negative), as the parameters `sparsity`, `keep` and `of`
/// say; those of an earlier step count first.
///
/// # Errors
/// A pattern that does not fit.
pub fn drop_lowest(
    params: &Params,
    layer: &Layer<'_>,
    mut scores: Vec<f32>,
    scope: Scope,
) -> Result<Changed, MethodError> {
    select::after_earlier(&mut scores, layer.kept);
    let mut kept = select::mask(layer, &scores, scope, Pattern::of(params), share(params, layer))?;
    // A run may have lost more before than its pattern takes.
    layer.kept.into_iter().for_each(|before| kept.iter_mut().zip(before).for_each(|(k, b)| *k &= b));
    let weight = select::masked(layer.weight, &kept);
    Ok(Changed { weight, kept: Some(kept), codes: None, books: None, low_rank: None, notes: Vec::new() })
}

/// Wanda's scores: magnitude times the norm of the input over all tokens, divided by the largest norm; magnitudes where
/// every input was zero.
///
/// # Errors
/// Nothing was seen of the inputs, or their squares are not finite.
pub fn wanda_scores(layer: &Layer<'_>) -> Result<Vec<f32>, MethodError> {
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
    let norm = |s: &f64| if most == 0.0 { 1.0 } else { (s / most).sqrt() as f32 };
    let norms: Vec<f32> = seen.squares.iter().map(norm).collect();
    Ok(layer.weight.iter().enumerate().map(|(i, w)| w.abs() * norms[i % layer.inputs]).collect())
}

/// An error that names the layer.
pub fn refuse<T>(layer: &Layer<'_>, reason: impl Into<String>) -> Result<T, MethodError> {
    Err(MethodError::Layer { place: layer.place.into(), reason: reason.into() })
}

/// That all weights are finite numbers.
///
/// # Errors
/// The first that is not, by row and column.
pub fn check_finite(layer: &Layer<'_>) -> Result<(), MethodError> {
    match layer.weight.iter().position(|w| !w.is_finite()) {
        None => Ok(()),
        Some(i) => {
            let (row, column) = (i / layer.inputs, i % layer.inputs);
            refuse(layer, format!("the weight at row {row}, column {column} is {}", layer.weight[i]))
        }
    }
}
