//! Selection: which entries of a vector stay, as a list of positions and a list of values.

use crate::Isa;

/// Keeps the entries with `|x| > threshold` (strictly) in order; NaN is kept, so that it surfaces in the product.
///
/// `index` and `value` are cleared first and end with the same length.
pub fn magnitude(isa: Isa, x: &[f32], threshold: f32, index: &mut Vec<u32>, value: &mut Vec<f32>) {
    let _ = isa;
    index.clear();
    value.clear();
    magnitude_scalar(x, 0, threshold, index, value);
}

/// Keeps the entries that are not exactly zero, in order; NaN is kept.
///
/// `index` and `value` are cleared first and end with the same length.
pub fn nonzero(isa: Isa, x: &[f32], index: &mut Vec<u32>, value: &mut Vec<f32>) {
    magnitude(isa, x, 0.0, index, value);
}

fn magnitude_scalar(x: &[f32], first: usize, threshold: f32, index: &mut Vec<u32>, value: &mut Vec<f32>) {
    for (i, &v) in x.iter().enumerate() {
        if v.abs() > threshold || v.is_nan() {
            index.push((first + i) as u32);
            value.push(v);
        }
    }
}
