//! Non-linearities.

use super::map::{Map, MapMul, Op};
use super::math;
use crate::isa::{self, Isa};
use crate::lanes::{Lanes, dispatch};

/// Non-linearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// Exact GELU: `x * (1 + erf(x / sqrt 2)) / 2`.
    Gelu,
    /// The tanh approximation of GELU (Hendrycks and Gimpel 2016).
    GeluTanh,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// `max(x, 0)`, exact; NaN stays NaN.
    Relu,
    /// `max(x, 0)^2`; NaN stays NaN.
    Relu2,
}

impl Activation {
    /// Every kind, in the order of the declaration.
    pub const ALL: [Activation; 6] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::QuickGelu,
        Activation::Relu,
        Activation::Relu2,
    ];
}

#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct Gelu;
#[derive(Clone, Copy)]
struct GeluTanh;
#[derive(Clone, Copy)]
struct QuickGelu;
#[derive(Clone, Copy)]
struct Relu;
#[derive(Clone, Copy)]
struct Relu2;
#[derive(Clone, Copy)]
struct Cap(f32);

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Op for Silu {
    fn plain(self, x: f32) -> f32 {
        (f64::from(x) * sigmoid(f64::from(x))) as f32
    }

    #[inline(always)]
    unsafe fn lanes<V: Lanes>(self, x: V) -> V {
        // SAFETY: the caller vouches for the instruction set.
        unsafe { x.mul(math::sigmoid(x)) }
    }
}

impl Op for Gelu {
    fn plain(self, x: f32) -> f32 {
        let x = f64::from(x);
        (x * math::erfc_f64(-x / std::f64::consts::SQRT_2) / 2.0) as f32
    }

    #[inline(always)]
    unsafe fn lanes<V: Lanes>(self, x: V) -> V {
        // SAFETY: the caller vouches for the instruction set.
        unsafe {
            let tail = math::half_erfc(x.abs().mul(V::splat(std::f32::consts::FRAC_1_SQRT_2)));
            x.mul(x.select_lt(V::splat(0.0), tail, V::splat(1.0).sub(tail)))
        }
    }
}

/// `2 sqrt(2 / pi)` and the cubic coefficient of the approximation: `gelu = x * sigmoid(A (x + B x^3))`.
const A: f32 = 1.595_769;
const B: f32 = 0.044_715;

impl Op for GeluTanh {
    fn plain(self, x: f32) -> f32 {
        let x = f64::from(x);
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        (0.5 * x * (1.0 + inner.tanh())) as f32
    }

    #[inline(always)]
    unsafe fn lanes<V: Lanes>(self, x: V) -> V {
        // SAFETY: the caller vouches for the instruction set.
        unsafe {
            let inner = x.mul(x.mul(x).fma(V::splat(A * B), V::splat(A)));
            x.mul(math::sigmoid(inner))
        }
    }
}

impl Op for QuickGelu {
    fn plain(self, x: f32) -> f32 {
        (f64::from(x) * sigmoid(1.702 * f64::from(x))) as f32
    }

    #[inline(always)]
    unsafe fn lanes<V: Lanes>(self, x: V) -> V {
        // SAFETY: the caller vouches for the instruction set.
        unsafe { x.mul(math::sigmoid(x.mul(V::splat(1.702)))) }
    }
}

impl Op for Relu {
    fn plain(self, x: f32) -> f32 {
        // f32::max would turn NaN into 0.
        if x <= 0.0 { 0.0 } else { x }
    }

    #[inline(always)]
    unsafe fn lanes<V: Lanes>(self, x: V) -> V {
        // SAFETY: the caller vouches for the instruction set.
        unsafe { x.select_lt(V::splat(0.0), V::splat(0.0), x) }
    }
}

impl Op for Relu2 {
    fn plain(self, x: f32) -> f32 {
        Relu.plain(x) * Relu.plain(x)
    }

    #[inline(always)]
    unsafe fn lanes<V: Lanes>(self, x: V) -> V {
        // SAFETY: the caller vouches for the instruction set.
        unsafe {
            let y = Relu.lanes(x);
            y.mul(y)
        }
    }
}

impl Op for Cap {
    fn plain(self, x: f32) -> f32 {
        (f64::from(self.0) * (f64::from(x) / f64::from(self.0)).tanh()) as f32
    }

    #[inline(always)]
    unsafe fn lanes<V: Lanes>(self, x: V) -> V {
        // SAFETY: the caller vouches for the instruction set.
        unsafe { math::tanh(x.div(V::splat(self.0))).mul(V::splat(self.0)) }
    }
}

/// Applies `kind` in place. Error below 1e-6 of the magnitude of the argument; ReLU is exact.
pub fn act(kind: Activation, gate: &mut [f32]) {
    act_with(isa::get(), kind, gate);
}

fn act_with(isa: Isa, kind: Activation, x: &mut [f32]) {
    match kind {
        Activation::Silu => dispatch(isa, Map(Silu, x)),
        Activation::Gelu => dispatch(isa, Map(Gelu, x)),
        Activation::GeluTanh => dispatch(isa, Map(GeluTanh, x)),
        Activation::QuickGelu => dispatch(isa, Map(QuickGelu, x)),
        Activation::Relu => dispatch(isa, Map(Relu, x)),
        Activation::Relu2 => dispatch(isa, Map(Relu2, x)),
    }
}

/// `out = kind(gate) * up`; the three slices have one length. Errors as for [`act`].
///
/// # Panics
/// If the lengths differ.
pub fn act_mul(kind: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    act_mul_with(isa::get(), kind, gate, up, out);
}

fn act_mul_with(isa: Isa, kind: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!([gate.len(), up.len()], [out.len(); 2], "lengths of gate, up and out");
    match kind {
        Activation::Silu => dispatch(isa, MapMul(Silu, gate, up, out)),
        Activation::Gelu => dispatch(isa, MapMul(Gelu, gate, up, out)),
        Activation::GeluTanh => dispatch(isa, MapMul(GeluTanh, gate, up, out)),
        Activation::QuickGelu => dispatch(isa, MapMul(QuickGelu, gate, up, out)),
        Activation::Relu => dispatch(isa, MapMul(Relu, gate, up, out)),
        Activation::Relu2 => dispatch(isa, MapMul(Relu2, gate, up, out)),
    }
}

/// `x = cap * tanh(x / cap)` in place (logit capping of Gemma 2).
pub fn cap(x: &mut [f32], cap: f32) {
    cap_with(isa::get(), x, cap);
}

fn cap_with(isa: Isa, x: &mut [f32], cap: f32) {
    dispatch(isa, Map(Cap(cap), x));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(n: usize, span: f32) -> Vec<f32> {
        (0..n).map(|i| span * (2.0 * i as f32 / n as f32 - 1.0)).collect()
    }

    #[test]
    fn fast_forms_match_their_twins() {
        for isa in isa::available() {
            for kind in Activation::ALL {
                for (n, span) in [(0, 1.0), (1, 3.0), (5, 1e-3), (37, 8.0), (1003, 20.0), (20_001, 100.0)] {
                    let x = ramp(n, span);
                    let (mut fast, mut plain) = (x.clone(), x.clone());
                    act_with(isa, kind, &mut fast);
                    act_with(Isa::Scalar, kind, &mut plain);
                    for ((x, a), b) in x.iter().zip(&fast).zip(&plain) {
                        assert!((a - b).abs() <= 1e-6 * x.abs(), "{isa} {kind:?} {x}: {a} {b}");
                    }
                    let up = ramp(n, 2.0);
                    let mut out = vec![f32::NAN; n];
                    act_mul_with(isa, kind, &x, &up, &mut out);
                    assert!(out.iter().zip(&fast).zip(&up).all(|((o, g), u)| *o == g * u));
                }
            }
        }
    }

    #[test]
    fn relu_is_exact_and_keeps_nan() {
        for isa in isa::available() {
            let mut x = [-1.5, -0.0, 0.0, 1e-40, 2.5, f32::NEG_INFINITY, f32::INFINITY, -1e-40, 7.0];
            act_with(isa, Activation::Relu, &mut x);
            assert_eq!(x, [0.0, 0.0, 0.0, 1e-40, 2.5, 0.0, f32::INFINITY, 0.0, 7.0]);
            for kind in Activation::ALL {
                let mut x = [f32::NAN; 19];
                act_with(isa, kind, &mut x);
                assert!(x.iter().all(|x| x.is_nan()), "{isa} {kind:?}");
            }
        }
    }

    #[test]
    fn cap_matches_its_twin() {
        for isa in isa::available() {
            for c in [1.0, 30.0, 50.0] {
                let x = ramp(997, 200.0);
                let (mut fast, mut plain) = (x.clone(), x);
                cap_with(isa, &mut fast, c);
                cap_with(Isa::Scalar, &mut plain, c);
                assert!(fast.iter().zip(&plain).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs()), "{isa} {c}");
            }
        }
    }

    #[test]
    fn known_values() {
        // torch.nn.functional: silu(1), gelu(1), gelu(1, approximate='tanh'), quick_gelu(1), relu2(3).
        let known = [
            (Activation::Silu, 1.0, 0.731_058_6),
            (Activation::Gelu, 1.0, 0.841_344_7),
            (Activation::GeluTanh, 1.0, 0.841_192),
            (Activation::QuickGelu, 1.0, 0.845_795_8),
            (Activation::Relu2, 3.0, 9.0),
        ];
        for isa in isa::available() {
            for (kind, x, y) in known {
                let mut v = [x];
                act_with(isa, kind, &mut v);
                assert!((v[0] - y).abs() < 1e-6, "{isa} {kind:?} {}", v[0]);
            }
        }
    }
}
