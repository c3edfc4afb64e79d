//! Everything that is one pass over a row: norms, softmax, rotary embedding, activations, addition.
//!
//! Slices in, slices out. The functions pick the instruction set of [`crate::isa::get`]; each has a plain twin that
//! computes in f64, with which the tests compare.

mod activation;
mod map;
pub(crate) mod math;
mod norm;
mod rope;
mod rows;
mod softmax;

pub use activation::{Activation, act, act_mul, cap};
pub use norm::{layer_norm, layer_norm_rows, rms_norm, rms_norm_in_place, rms_norm_rows};
pub use rope::{RopePairs, rope, rope_table};
pub use softmax::{argmax, log_sum_exp, softmax};

/// `x += y`.
///
/// # Panics
/// If the lengths differ.
pub fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "lengths of the summands");
    // The compiler vectorises this loop with the baseline instruction set, which is enough: it waits for memory.
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
