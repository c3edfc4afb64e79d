//! RMSNorm and LayerNorm.

use super::rows;
use crate::isa::{self, Isa};
use crate::lanes::{Kernel, Lanes, Twin, dispatch};
use crate::pool::Pool;

/// Arguments of one row; `mean` selects LayerNorm.
struct Norm<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    mean: bool,
    /// What the sum of squares is divided by.
    over: usize,
    out: &'a mut [f32],
}

impl Twin for Norm<'_> {
    fn scalar(self) {
        let n = self.x.len() as f64;
        let mean = if self.mean { self.x.iter().map(|&x| f64::from(x)).sum::<f64>() / n } else { 0.0 };
        let variance = self.x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / self.over as f64;
        let factor = 1.0 / (variance + f64::from(self.eps)).sqrt();
        for (i, o) in self.out.iter_mut().enumerate() {
            let y = (f64::from(self.x[i]) - mean) * factor * f64::from(self.gain[i]);
            *o = (y + self.bias.map_or(0.0, |bias| f64::from(bias[i]))) as f32;
        }
    }
}

impl Kernel for Norm<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let n = self.x.len();
        // SAFETY: the caller vouches for the instruction set; `part` keeps every access inside the slices, whose
        // lengths are equal (checked by `norm`).
        unsafe {
            let zero = V::splat(0.0);
            let mean = if self.mean { sum::<V, false>(self.x, 0.0) / n as f32 } else { 0.0 };
            let variance = sum::<V, true>(self.x, mean) / self.over as f32;
            let factor = V::splat(1.0 / (variance + self.eps).sqrt());
            let mean = V::splat(mean);
            for i in (0..n).step_by(V::N) {
                let m = (n - i).min(V::N);
                let gain = V::load_part(self.gain.as_ptr().add(i), m);
                let bias = self.bias.map_or(zero, |bias| V::load_part(bias.as_ptr().add(i), m));
                let x = V::load_part(self.x.as_ptr().add(i), m).sub(mean).mul(factor);
                x.fma(gain, bias).store_part(self.out.as_mut_ptr().add(i), m);
            }
        }
    }
}

/// `sum (x - mean)` or, if `SQUARE`, `sum (x - mean)^2`, in four interleaved partial sums.
#[inline(always)]
unsafe fn sum<V: Lanes, const SQUARE: bool>(x: &[f32], mean: f32) -> f32 {
    // SAFETY: the caller vouches for the instruction set; every load lies inside the slice.
    unsafe {
        let (one, means) = (V::splat(1.0), V::splat(mean));
        let mut acc = [V::splat(0.0); 4];
        let blocks = x.chunks_exact(4 * V::N);
        let rest = blocks.remainder();
        for block in blocks {
            for (k, acc) in acc.iter_mut().enumerate() {
                let y = V::load(block.as_ptr().add(k * V::N)).sub(means);
                *acc = y.fma(if SQUARE { y } else { one }, *acc);
            }
        }
        let mut total = acc[0].add(acc[1]).add(acc[2].add(acc[3])).sum();
        for &x in rest {
            let y = x - mean;
            total += if SQUARE { y * y } else { y };
        }
        total
    }
}

fn norm(isa: Isa, norm: Norm<'_>) {
    let n = norm.x.len();
    assert!(norm.over > 0 || n == 0, "a mean over nothing");
    assert!(norm.gain.len() == n && norm.out.len() == n && norm.bias.is_none_or(|b| b.len() == n), "lengths of a row");
    dispatch(isa, norm);
}

/// `out = x / sqrt(sum(x^2) / over + eps) * gain` for one row (Zhang and Sennrich 2019, where `over` is the length of a row).
/// A row of which some coordinates were cut off keeps the `over` of the whole one (SliceGPT).
///
/// # Panics
/// If the lengths differ, or `over` is 0.
pub fn rms_norm(x: &[f32], gain: &[f32], over: usize, eps: f32, out: &mut [f32]) {
    norm(isa::get(), Norm { x, gain, bias: None, eps, mean: false, over, out });
}

/// [`rms_norm`] of every row of `gain.len()` numbers.
///
/// # Panics
/// If `x` and `out` are not the same whole number of rows.
pub fn rms_norm_rows(pool: &Pool, x: &[f32], gain: &[f32], over: usize, eps: f32, out: &mut [f32]) {
    rows::map(pool, gain.len(), x, out, |x, out| rms_norm(x, gain, over, eps, out));
}

/// [`rms_norm`] in place.
///
/// # Panics
/// If the lengths differ.
pub fn rms_norm_in_place(x: &mut [f32], gain: &[f32], eps: f32) {
    assert_eq!(x.len(), gain.len(), "lengths of a row");
    let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let factor = (1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt()) as f32;
    x.iter_mut().zip(gain).for_each(|(x, gain)| *x = *x * factor * gain);
}

/// `out = (x - mean) / sqrt(variance + eps) * gain + bias` for one row (Ba et al. 2016).
///
/// # Panics
/// If the lengths differ.
pub fn layer_norm(x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    norm(isa::get(), Norm { x, gain, bias, eps, mean: true, over: x.len(), out });
}

/// [`layer_norm`] of every row of `gain.len()` numbers.
///
/// # Panics
/// If `x` and `out` are not the same whole number of rows, or `bias` has another length than `gain`.
pub fn layer_norm_rows(pool: &Pool, x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    rows::map(pool, gain.len(), x, out, |x, out| layer_norm(x, gain, bias, eps, out));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, shift: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin() * (1.0 + (i % 7) as f32) + shift).collect()
    }

    #[test]
    fn fast_forms_match_their_twins() {
        for isa in isa::available() {
            for n in [1, 2, 7, 16, 63, 64, 65, 576, 2048, 4097] {
                for (mean, shift) in [(false, 0.0), (false, 2.0), (true, 0.0), (true, 5.0)] {
                    let (x, gain, bias) = (wave(n, shift), wave(n, 1.0), wave(n, -0.5));
                    for bias in [None, Some(&bias[..])] {
                        let run = |isa| {
                            let mut out = vec![f32::NAN; n];
                            let over = if mean { n } else { n + n / 3 };
                            norm(isa, Norm { x: &x, gain: &gain, bias, eps: 1e-5, mean, over, out: &mut out });
                            out
                        };
                        // One row's sums carry an error of some n/64 roundings; a row of one number is all eps.
                        let scale = if n == 1 { 2e-4 } else { 4e-6 };
                        for (a, b) in run(isa).iter().zip(run(Isa::Scalar)) {
                            assert!((a - b).abs() <= scale * (1.0 + b.abs()), "{isa} {n} {mean}: {a} {b}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rows_and_in_place_agree_with_one_row() {
        let (n, width) = (13, 96);
        let (x, gain) = (wave(n * width, 0.3), wave(width, 1.0));
        let mut out = vec![0.0; n * width];
        for threads in [1, 2] {
            let pool = Pool::new(threads);
            rms_norm_rows(&pool, &x, &gain, width, 1e-6, &mut out);
            for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                let mut one = vec![0.0; width];
                rms_norm(x, &gain, width, 1e-6, &mut one);
                assert_eq!(one, out);
                one.copy_from_slice(x);
                rms_norm_in_place(&mut one, &gain, 1e-6);
                assert!(one.iter().zip(out).all(|(a, b)| (a - b).abs() <= 1e-6 * (1.0 + b.abs())));
            }
            layer_norm_rows(&pool, &x, &gain, None, 1e-6, &mut out);
            let mut one = vec![0.0; width];
            layer_norm(&x[width..2 * width], &gain, None, 1e-6, &mut one);
            assert_eq!(one, out[width..2 * width]);
        }
    }

    #[test]
    fn zeros_that_are_cut_off_change_nothing() {
        let (mut x, gain) = (wave(96, 0.0), wave(96, 1.0));
        x[70..].fill(0.0);
        let (mut whole, mut cut) = (vec![0.0; 96], vec![0.0; 70]);
        rms_norm(&x, &gain, 96, 1e-5, &mut whole);
        rms_norm(&x[..70], &gain[..70], 96, 1e-5, &mut cut);
        assert!(whole.iter().zip(&cut).all(|(a, b)| (a - b).abs() <= 2e-6 * (1.0 + b.abs())));
        rms_norm(&x[..70], &gain[..70], 70, 1e-5, &mut cut);
        assert!((whole[3] - cut[3]).abs() > 0.01 * cut[3].abs());
    }

    #[test]
    fn nan_stays() {
        for isa in isa::available() {
            let (mut x, gain) = (wave(40, 0.0), wave(40, 1.0));
            x[11] = f32::NAN;
            let mut out = vec![0.0; 40];
            norm(isa, Norm { x: &x, gain: &gain, bias: None, eps: 1e-5, mean: false, over: 40, out: &mut out });
            assert!(out.iter().all(|x| x.is_nan()), "{isa}");
        }
    }
}
