//! Short vectors of f32, so that one generic body serves every instruction set.
//!
//! A kernel is a struct of its arguments with a generic [`Kernel::run`]; [`on_lanes`] calls it inside a function that
//! has the instruction set switched on, and everything marked `inline(always)` is compiled for that set. Sums have a
//! fixed order per instruction set, so results depend on the set and on nothing else.

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

use crate::isa::Isa;

/// `N` lanes of f32.
///
/// # Safety
/// Every method may only be called on a machine that has the instruction set. Methods with a pointer read or write
/// `N` numbers there (`n <= N` for the `_part` forms), without any alignment.
#[allow(dead_code, reason = "which lanes are used depends on the target")]
pub(crate) trait Lanes: Copy + 'static {
    /// Number of lanes, a power of two.
    const N: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    /// The first `n` lanes from memory, the rest zero.
    unsafe fn load_part(p: *const f32, n: usize) -> Self;
    /// `N` half-precision numbers.
    unsafe fn load_f16(p: *const u16) -> Self;
    /// `N` pairs of bf16 numbers, as the first and the second of each pair.
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self);
    /// A hint that the cache line at `p`, which need not be mapped, is read soon.
    #[inline(always)]
    fn prefetch(_p: *const u8) {}
    unsafe fn store(self, p: *mut f32);
    unsafe fn store_part(self, p: *mut f32, n: usize);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// The larger of two; `b` if either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// The smaller of two; `b` if either is NaN.
    unsafe fn min(self, b: Self) -> Self;
    unsafe fn abs(self) -> Self;
    /// The magnitude of `self` with the sign of `sign`.
    unsafe fn copysign(self, sign: Self) -> Self;
    /// `yes` where `self < b`, else `no` (also for NaN).
    unsafe fn select_lt(self, b: Self, yes: Self, no: Self) -> Self;
    /// `self - floor(self)`; anything finite in [0, 1] outside [-126, 128), NaN for NaN.
    unsafe fn fract(self) -> Self;
    /// `self * 2^floor(x)` for `self` in [1, 2]; 0 for `x` below -126 (including minus infinity), infinity from 128 on.
    unsafe fn scale2(self, x: Self) -> Self;
    unsafe fn sum(self) -> f32;
    /// The largest lane, in the sense of [`Lanes::max`]; a NaN may or may not show.
    unsafe fn max_lane(self) -> f32;
}

/// A body that is compiled for several instruction sets.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// The body; must be `inline(always)`, like everything it calls.
    ///
    /// # Safety
    /// The machine must have the instruction set of `V`.
    unsafe fn run<V: Lanes>(self) -> Self::Out;
}

/// A [`Kernel`] with a plain version beside its body.
pub(crate) trait Twin: Kernel {
    /// The plain version.
    fn scalar(self) -> Self::Out;
}

/// Runs `kernel` with the lanes of `isa`, or its scalar form.
#[inline]
pub(crate) fn dispatch<K: Twin>(isa: Isa, kernel: K) -> K::Out {
    if isa == Isa::Scalar { kernel.scalar() } else { on_lanes(isa, kernel) }
}

/// Runs `kernel` with the lanes of `isa`.
///
/// # Panics
/// If `isa` has no lanes on this kind of machine, as [`Isa::Scalar`].
#[inline]
pub(crate) fn on_lanes<K: Kernel>(isa: Isa, kernel: K) -> K::Out {
    debug_assert!(isa.is_available());
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set was found on this machine.
        Isa::Avx2 => unsafe { on_avx2(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set was found on this machine.
        Isa::Avx512 | Isa::Amx => unsafe { on_avx512(kernel) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: NEON is part of AArch64.
        Isa::Neon => unsafe { kernel.run::<Neon>() },
        _ => panic!("{isa} has no lanes here"),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn on_avx2<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller has the instruction set.
    unsafe { kernel.run::<Avx2>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
unsafe fn on_avx512<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller has the instruction set.
    unsafe { kernel.run::<Avx512>() }
}
