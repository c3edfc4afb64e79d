//! What the NEON decode kernels share: integer dot products, half-precision scales, and the last group of a row.

use std::arch::aarch64::*;
use std::sync::OnceLock;

/// True if the CPU has the integer dot products of Armv8.2 (Apple M1, Neoverse N1, Cortex-A76 and later). Without them the
/// same sums are made of widening products, with the same bits.
pub(crate) fn has_dot() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| std::arch::is_aarch64_feature_detected!("dotprod"))
}

/// `sum[i] += a[4i] b[4i] + ... + a[4i + 3] b[4i + 3]`.
///
/// # Safety
/// The CPU must have the dot products if `DOT` says so.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) unsafe fn dot<const DOT: bool>(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    if DOT {
        let mut out = sum;
        // SAFETY: the CPU has the instruction, which reads and writes these registers alone. (Its intrinsic is not stable
        // Rust, and the directive lets the assembler take it in functions that do not switch the feature on.)
        unsafe {
            std::arch::asm!(
                ".arch_extension dotprod",
                "sdot {out:v}.4s, {a:v}.16b, {b:v}.16b",
                out = inout(vreg) out, a = in(vreg) a, b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        return out;
    }
    let low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    let high = vpaddlq_s16(vmull_high_s8(a, b));
    vaddq_s32(sum, vpaddq_s32(low, high))
}

/// A number in half precision.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn half(low: u8, high: u8) -> f32 {
    let bits = vdup_n_u16(u16::from_le_bytes([low, high]));
    vgetq_lane_f32::<0>(vcvt_f32_f16(vreinterpret_f16_u16(bits)))
}

/// Four numbers in half precision.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn halves(bytes: &[u8; 8]) -> float32x4_t {
    // SAFETY: the array has eight bytes.
    vcvt_f32_f16(vreinterpret_f16_u8(unsafe { vld1_u8(bytes.as_ptr()) }))
}

/// 16 bytes from `AT` on.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn at<const AT: usize, const N: usize>(bytes: &[u8; N]) -> uint8x16_t {
    const { assert!(AT + 16 <= N) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { vld1q_u8(bytes.as_ptr().add(AT)) }
}

/// 16 codes from `AT` on.
#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn codes<const AT: usize>(q: &[i8; 32]) -> int8x16_t {
    const { assert!(AT + 16 <= 32) };
    // SAFETY: the assertion keeps the read inside the array.
    unsafe { vld1q_s8(q.as_ptr().add(AT)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn both_forms_of_the_dot_product_are_its_definition() {
        let mut random = Random(1);
        let mut bytes = || -> [i8; 16] { std::array::from_fn(|i| if i % 5 == 0 { -128 } else { random.bits() as i8 }) };
        for _ in 0..100 {
            let (a, b) = (bytes(), bytes());
            let want: [i32; 4] =
                std::array::from_fn(|i| 7 + (4 * i..4 * i + 4).map(|j| i32::from(a[j]) * i32::from(b[j])).sum::<i32>());
            let mut got = [[0; 4]; 2];
            // SAFETY: the arrays have 16 bytes, and the instruction is used where the CPU has it.
            unsafe {
                let (a, b, seven) = (vld1q_s8(a.as_ptr()), vld1q_s8(b.as_ptr()), vdupq_n_s32(7));
                vst1q_s32(got[0].as_mut_ptr(), dot::<false>(seven, a, b));
                let second = if has_dot() { dot::<true>(seven, a, b) } else { dot::<false>(seven, a, b) };
                vst1q_s32(got[1].as_mut_ptr(), second);
            }
            assert_eq!(got, [want; 2]);
        }
    }
}
