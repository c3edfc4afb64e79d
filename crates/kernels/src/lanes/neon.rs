//! Lanes of NEON (4).

use std::arch::aarch64::*;

use super::Lanes;

/// 4 lanes.
#[derive(Clone, Copy)]
pub(crate) struct Neon(pub float32x4_t);

// SAFETY comment for the implementation: NEON is part of AArch64, and the pointers are good for the lanes named by the
// trait's contract.
impl Lanes for Neon {
    const N: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { vdupq_n_f32(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see above; through bytes, since `p` need not be aligned.
        Self(unsafe { vreinterpretq_f32_u8(vld1q_u8(p.cast())) })
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        let mut x = [0.0f32; 4];
        // SAFETY: see above.
        unsafe {
            std::ptr::copy_nonoverlapping(p.cast::<u8>(), x.as_mut_ptr().cast(), 4 * n);
            Self::load(x.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: see above.
        Self(unsafe { vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
        // SAFETY: see above.
        unsafe {
            let x = vreinterpretq_u32_u8(vld1q_u8(p.cast()));
            let high = vandq_u32(x, vdupq_n_u32(0xffff_0000));
            (Self(vreinterpretq_f32_u32(vshlq_n_u32::<16>(x))), Self(vreinterpretq_f32_u32(high)))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see above.
        unsafe { vst1q_u8(p.cast(), vreinterpretq_u8_f32(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        let mut x = [0.0f32; 4];
        // SAFETY: see above.
        unsafe {
            self.store(x.as_mut_ptr());
            std::ptr::copy_nonoverlapping(x.as_ptr().cast::<u8>(), p.cast(), 4 * n);
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vaddq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vsubq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vmulq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vdivq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vfmaq_f32(c.0, self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vbslq_f32(vcgtq_f32(self.0, b.0), self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vbslq_f32(vcltq_f32(self.0, b.0), self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vabsq_f32(self.0) })
    }
    #[inline(always)]
    unsafe fn copysign(self, sign: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vbslq_f32(vdupq_n_u32(0x8000_0000), sign.0, self.0) })
    }
    #[inline(always)]
    unsafe fn select_lt(self, b: Self, yes: Self, no: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { vbslq_f32(vcltq_f32(self.0, b.0), yes.0, no.0) })
    }
    #[inline(always)]
    unsafe fn fract(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let x = Self::splat(128.0).min(Self::splat(-127.0).max(self)).0;
            Self(vsubq_f32(x, vrndmq_f32(x)))
        }
    }
    #[inline(always)]
    unsafe fn scale2(self, x: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let clamped = Self::splat(128.0).min(Self::splat(-126.0).max(x)).0;
            // 2^128 has the bit pattern of infinity. A NaN becomes some number here; the NaN in `self` survives.
            let bits = vaddq_s32(vcvtq_s32_f32(vrndmq_f32(clamped)), vdupq_n_s32(127));
            let power = vreinterpretq_f32_s32(vshlq_n_s32::<23>(bits));
            x.select_lt(Self::splat(-126.0), Self::splat(0.0), Self(vmulq_f32(self.0, power)))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe { vaddvq_f32(self.0) }
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        // SAFETY: see above.
        unsafe { vmaxvq_f32(self.0) }
    }
}
