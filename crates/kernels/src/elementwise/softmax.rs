//! Softmax, its normaliser, and the largest element.

use super::math;
use crate::isa::{self, Isa};
use crate::lanes::{Kernel, Lanes, Twin, dispatch};

/// The largest number, or NaN if there is one; minus infinity for none.
fn max(x: &[f32]) -> f32 {
    // A comparison with NaN is false, so that NaN replaces the maximum and then nothing replaces NaN.
    x.iter().fold(f32::NEG_INFINITY, |m, &x| if x <= m || m.is_nan() { m } else { x })
}

/// `x = exp(x - shift)` if `STORE`; the sum of these.
struct Exp<'a, const STORE: bool>(&'a mut [f32], f32);

impl<const STORE: bool> Twin for Exp<'_, STORE> {
    fn scalar(self) -> f32 {
        let mut sum = 0.0;
        for x in self.0 {
            let y = (f64::from(*x) - f64::from(self.1)).exp();
            sum += y;
            if STORE {
                *x = y as f32;
            }
        }
        sum as f32
    }
}

impl<const STORE: bool> Kernel for Exp<'_, STORE> {
    type Out = f32;

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> f32 {
        // SAFETY: the caller vouches for the instruction set; each chunk has `N` numbers, the remainder fewer.
        unsafe {
            let shift = V::splat(self.1);
            let mut sum = V::splat(0.0);
            let mut chunks = self.0.chunks_exact_mut(V::N);
            for x in &mut chunks {
                let y = math::exp(V::load(x.as_ptr()).sub(shift));
                sum = sum.add(y);
                if STORE {
                    y.store(x.as_mut_ptr());
                }
            }
            let mut total = sum.sum();
            let rest = chunks.into_remainder();
            let mut last = [0.0; 64];
            math::exp(V::load_part(rest.as_ptr(), rest.len()).sub(shift)).store(last.as_mut_ptr());
            for (x, y) in rest.iter_mut().zip(last) {
                total += y;
                if STORE {
                    *x = y;
                }
            }
            total
        }
    }
}

/// `x = exp(x) / sum exp(x)` in place, the maximum subtracted first. A NaN makes all results NaN, as does an infinite
/// maximum; an empty slice stays empty.
pub fn softmax(x: &mut [f32]) {
    softmax_with(isa::get(), x);
}

fn softmax_with(isa: Isa, x: &mut [f32]) {
    let max = max(x);
    let factor = 1.0 / dispatch(isa, Exp::<true>(x, max));
    x.iter_mut().for_each(|x| *x *= factor);
}

/// `ln sum exp(x)`, the maximum subtracted first; minus infinity for an empty slice, NaN if one is in it.
pub fn log_sum_exp(x: &[f32]) -> f32 {
    log_sum_exp_with(isa::get(), x)
}

fn log_sum_exp_with(isa: Isa, x: &[f32]) -> f32 {
    let max = max(x);
    if max.is_infinite() {
        return max;
    }
    // Pieces on the stack, since the kernel wants to own what it reads; f64 keeps a long sum exact.
    let mut piece = [0.0; 1024];
    let sum: f64 = x
        .chunks(piece.len())
        .map(|x| {
            let piece = &mut piece[..x.len()];
            piece.copy_from_slice(x);
            f64::from(dispatch(isa, Exp::<false>(piece, max)))
        })
        .sum();
    (f64::from(max) + sum.ln()) as f32
}

/// Index of the largest number, the lowest one among equals; `None` if there is a NaN or nothing at all.
pub fn argmax(x: &[f32]) -> Option<usize> {
    let mut best = 0;
    for (i, &value) in x.iter().enumerate() {
        if value.is_nan() {
            return None;
        }
        if value > x[best] {
            best = i;
        }
    }
    (!x.is_empty()).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, span: f32) -> Vec<f32> {
        (0..n).map(|i| span * (i as f32 * 1.7).sin()).collect()
    }

    #[test]
    fn fast_forms_match_their_twins() {
        for isa in isa::available() {
            for n in [1, 2, 15, 16, 17, 100, 1023, 1024, 1025, 40_001] {
                for span in [0.0, 1.0, 30.0, 1000.0] {
                    let x = wave(n, span);
                    let (mut fast, mut plain) = (x.clone(), x.clone());
                    softmax_with(isa, &mut fast);
                    softmax_with(Isa::Scalar, &mut plain);
                    // exp of a difference of 60 carries 60 roundings of the difference at most.
                    assert!(fast.iter().zip(&plain).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs() + 1e-30), "{isa} {n}");
                    assert!((fast.iter().map(|&x| f64::from(x)).sum::<f64>() - 1.0).abs() < 1e-5);
                    let (a, b) = (log_sum_exp_with(isa, &x), log_sum_exp_with(Isa::Scalar, &x));
                    assert!((a - b).abs() <= 1e-6 * (1.0 + b.abs()), "{isa} {n} {span}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn special_values() {
        for isa in isa::available() {
            let mut x = [1.0, f32::NAN, 2.0, f32::NEG_INFINITY];
            softmax_with(isa, &mut x);
            assert!(x.iter().all(|x| x.is_nan()));
            let mut x = [1.0, f32::NEG_INFINITY, 1.0];
            softmax_with(isa, &mut x);
            assert_eq!(x, [0.5, 0.0, 0.5]);
            softmax_with(isa, &mut []);
            assert_eq!(log_sum_exp_with(isa, &[]), f32::NEG_INFINITY);
            assert_eq!(log_sum_exp_with(isa, &[f32::NEG_INFINITY; 5]), f32::NEG_INFINITY);
            assert!(log_sum_exp_with(isa, &[0.0, f32::NAN]).is_nan());
            assert!((log_sum_exp_with(isa, &[1000.0; 8]) - (1000.0 + 8f32.ln())).abs() < 1e-3);
        }
    }

    #[test]
    fn argmax_takes_the_first_and_reports_nan() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), Some(1));
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), Some(0));
        assert_eq!(argmax(&[1.0, f32::NAN]), None);
        assert_eq!(argmax(&[]), None);
    }
}
