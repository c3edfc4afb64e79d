//! Exponential functions on lanes. Errors are measured by the tests of this module against f64.

use crate::lanes::Lanes;

/// `e^x` to 2 units in the last place; 0 below `ln 2^-126` (no subnormal results), infinity from about 88.4 on.
///
/// Range reduction by Cody and Waite, polynomial of degree 6 on `[-ln 2 / 2, ln 2 / 2]` (Cephes, `expf.c`).
#[inline(always)]
pub(crate) unsafe fn exp<V: Lanes>(x: V) -> V {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let x = V::splat(128.0).min(x);
        let y = x.fma(V::splat(std::f32::consts::LOG2_E), V::splat(0.5));
        let n = y.sub(y.fract());
        let r = n.fma(V::splat(-0.693_359_4), x);
        let r = n.fma(V::splat(2.121_944_4e-4), r);
        let p = V::splat(1.987_569_1e-4);
        let p = p.fma(r, V::splat(1.398_199_9e-3));
        let p = p.fma(r, V::splat(8.333_452e-3));
        let p = p.fma(r, V::splat(4.166_579_6e-2));
        let p = p.fma(r, V::splat(1.666_666_5e-1));
        let p = p.fma(r, V::splat(0.5));
        let p = p.fma(r.mul(r), r).add(V::splat(1.0));
        p.scale2(y)
    }
}

/// `2^x` for `x < 127` with relative error 2e-7; exactly 1 at 0, and 0 below -126 (including minus infinity).
///
/// Polynomial for `2^f` on [0, 1] through both end points, least maximal relative error (9e-8; own fit).
#[inline(always)]
pub(crate) unsafe fn exp2<V: Lanes>(x: V) -> V {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let f = x.fract();
        let p = V::splat(1.879_318_6e-3).fma(f, V::splat(8.990_995e-3));
        let p = p.fma(f, V::splat(5.581_868e-2));
        let p = p.fma(f, V::splat(2.401_592_7e-1));
        let p = p.fma(f, V::splat(6.931_517e-1));
        p.fma(f, V::splat(1.0)).scale2(x)
    }
}

/// As [`exp2`] with relative error 1.1e-4 (degree 3), for results that are rounded to bf16 (4e-3) afterwards.
#[cfg(any(test, target_arch = "x86_64"))]
#[inline(always)]
pub(crate) unsafe fn exp2_coarse<V: Lanes>(x: V) -> V {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let f = x.fract();
        let p = V::splat(7.826_797e-2).fma(f, V::splat(2.263_076_8e-1));
        let p = p.fma(f, V::splat(6.954_243e-1));
        p.fma(f, V::splat(1.0)).scale2(x)
    }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) unsafe fn sigmoid<V: Lanes>(x: V) -> V {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let one = V::splat(1.0);
        one.div(one.add(exp(V::splat(0.0).sub(x))))
    }
}

/// `tanh x` to 3 units in the last place: an odd polynomial below 0.625 (Cephes, `tanhf.c`), else through `e^2x`.
#[inline(always)]
pub(crate) unsafe fn tanh<V: Lanes>(x: V) -> V {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let (a, one) = (x.abs(), V::splat(1.0));
        let z = x.mul(x);
        let p = V::splat(-5.704_988_7e-3).fma(z, V::splat(2.063_908_8e-2));
        let p = p.fma(z, V::splat(-5.373_971_6e-2));
        let p = p.fma(z, V::splat(1.333_144_2e-1));
        let p = p.fma(z, V::splat(-3.333_328e-1));
        let small = p.mul(z).fma(x, x);
        let large = one.sub(V::splat(2.0).div(exp(a.add(a)).add(one))).copysign(x);
        a.select_lt(V::splat(0.625), small, large)
    }
}

/// `erfc(z) / 2` for `z >= 0`, relative error 2e-6 up to 3 and 1e-5 up to 9: the Chebyshev fit of
/// Press et al., Numerical Recipes, section 6.2 (`erfcc`).
#[inline(always)]
pub(crate) unsafe fn half_erfc<V: Lanes>(z: V) -> V {
    const C: [f32; 9] = [
        -0.822_152_2,
        1.488_515_9,
        -1.135_204,
        0.278_868_06,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ];
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        // Beyond 14 the result is 0 anyway; infinity would give infinity minus infinity below.
        let z = V::splat(14.0).min(z);
        let t = V::splat(1.0).div(V::splat(0.5).fma(z, V::splat(1.0)));
        let mut p = V::splat(0.170_872_77);
        let mut i = 0;
        while i < C.len() {
            p = p.fma(t, V::splat(C[i]));
            i += 1;
        }
        // exp(-z^2 + p): the rounding error of z^2 comes back in first order, or large z lose digits.
        let s = z.mul(z);
        let lost = V::splat(0.0).sub(z).fma(z, s);
        t.mul(exp(p.sub(s).add(lost))).mul(V::splat(0.5))
    }
}

/// The error function's complement in f64, for the scalar twins: Taylor series below 3, continued fraction above
/// (Abramowitz and Stegun 7.1.6 and 7.1.14).
pub(crate) fn erfc_f64(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc_f64(-x);
    }
    if x < 3.0 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term > sum * 1e-17 {
            n += 1.0;
            term *= 2.0 * x * x / (2.0 * n + 1.0);
            sum += term;
        }
        return 1.0 - 2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum;
    }
    let fraction = (1..=60).rev().fold(x, |f, k| x + f64::from(k) / 2.0 / f);
    (-x * x).exp() / (fraction * std::f64::consts::PI.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa;
    use crate::lanes::{Kernel, Twin, dispatch};

    #[derive(Clone, Copy)]
    enum F {
        Exp,
        Exp2,
        Exp2Coarse,
        Tanh,
        HalfErfc,
        Sigmoid,
    }

    struct Eval<'a>(F, &'a mut [f32]);

    impl Twin for Eval<'_> {
        fn scalar(self) {
            for x in self.1 {
                *x = reference(self.0, *x) as f32;
            }
        }
    }

    impl Kernel for Eval<'_> {
        type Out = ();

        #[inline(always)]
        unsafe fn run<V: Lanes>(self) {
            for x in self.1.chunks_mut(V::N) {
                // SAFETY: the caller vouches for the instruction set; the chunk has at most `N` numbers.
                unsafe {
                    let y = V::load_part(x.as_ptr(), x.len());
                    let y = match self.0 {
                        F::Exp => exp(y),
                        F::Exp2 => exp2(y),
                        F::Exp2Coarse => exp2_coarse(y),
                        F::Tanh => tanh(y),
                        F::HalfErfc => half_erfc(y),
                        F::Sigmoid => sigmoid(y),
                    };
                    y.store_part(x.as_mut_ptr(), x.len());
                }
            }
        }
    }

    fn reference(f: F, x: f32) -> f64 {
        let x = f64::from(x);
        match f {
            F::Exp => x.exp(),
            F::Exp2 | F::Exp2Coarse => x.exp2(),
            F::Tanh => x.tanh(),
            F::HalfErfc => erfc_f64(x) / 2.0,
            F::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        }
    }

    /// The largest relative error of `f` on `[from, to]`, over all instruction sets.
    fn worst(f: F, from: f32, to: f32) -> f64 {
        let n = 200_003;
        let x: Vec<f32> = (0..n).map(|i| from + (to - from) * (i as f32 / (n - 1) as f32)).collect();
        let errors = isa::available().into_iter().flat_map(|isa| {
            let mut y = x.clone();
            dispatch(isa, Eval(f, &mut y));
            let error = |(&x, y): (&f32, f32)| ((f64::from(y) - reference(f, x)) / reference(f, x)).abs();
            x.iter().zip(y).filter(|(x, _)| **x != 0.0).map(error).collect::<Vec<_>>()
        });
        errors.fold(0.0, f64::max)
    }

    #[test]
    fn relative_errors() {
        const ULP: f64 = 1.2e-7;
        assert!(worst(F::Exp, -87.0, 88.3) < 2.0 * ULP);
        assert!(worst(F::Exp, -1.0, 1.0) < 1.5 * ULP);
        assert!(worst(F::Exp2, -125.9, 0.0) < 2.0e-7);
        assert!(worst(F::Exp2Coarse, -125.9, 0.0) < 1.1e-4);
        assert!(worst(F::Tanh, -12.0, 12.0) < 3.0 * ULP);
        assert!(worst(F::Tanh, -0.01, 0.01) < ULP);
        assert!(worst(F::HalfErfc, 0.0, 3.0) < 2e-6);
        assert!(worst(F::HalfErfc, 3.0, 9.0) < 1e-5);
        assert!(worst(F::Sigmoid, -80.0, 80.0) < 3.0 * ULP);
    }

    #[test]
    fn special_values() {
        let cases = [
            (F::Exp, f32::NEG_INFINITY, 0.0),
            (F::Exp, -1000.0, 0.0),
            (F::Exp, 0.0, 1.0),
            (F::Exp, 1000.0, f32::INFINITY),
            (F::Exp, f32::INFINITY, f32::INFINITY),
            (F::Exp2, f32::NEG_INFINITY, 0.0),
            (F::Exp2, -1e30, 0.0),
            (F::Exp2, 0.0, 1.0),
            (F::Exp2Coarse, f32::NEG_INFINITY, 0.0),
            (F::Exp2Coarse, 0.0, 1.0),
            (F::Tanh, f32::INFINITY, 1.0),
            (F::Tanh, f32::NEG_INFINITY, -1.0),
            (F::HalfErfc, f32::INFINITY, 0.0),
            (F::HalfErfc, 1e10, 0.0),
        ];
        for isa in isa::available() {
            for (f, x, y) in cases {
                let mut v = [x; 3];
                dispatch(isa, Eval(f, &mut v));
                assert_eq!(v, [y; 3], "{isa} {x}");
            }
            for f in [F::Exp, F::Exp2, F::Exp2Coarse, F::Tanh, F::HalfErfc, F::Sigmoid] {
                let mut v = [f32::NAN; 17];
                dispatch(isa, Eval(f, &mut v));
                assert!(v.iter().all(|x| x.is_nan()), "{isa}");
            }
        }
    }

    #[test]
    fn erfc_has_its_known_values() {
        // Abramowitz and Stegun, table 7.1: erf(0.5), erf(1), erf(2); and erfc(4).
        let known = [(0.5, 1.0 - 0.520_499_877_8), (1.0, 1.0 - 0.842_700_792_9), (2.0, 1.0 - 0.995_322_265_0)];
        for (x, y) in known {
            assert!((erfc_f64(x) - y).abs() < 1e-10);
            assert!((erfc_f64(-x) - (2.0 - y)).abs() < 1e-10);
        }
        assert!((erfc_f64(4.0) / 1.541_725_790e-8 - 1.0).abs() < 1e-9);
        assert!((erfc_f64(3.0 - 1e-9) / erfc_f64(3.0 + 1e-9) - 1.0).abs() < 1e-7);
    }
}
