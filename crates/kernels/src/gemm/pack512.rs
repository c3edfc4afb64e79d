//! AVX-512 packing of activations: 16 rows are transposed once, and every layout is derived from the transposed form,
//! in which a register holds one input of 16 rows.

use std::arch::x86_64::*;

use super::LANES;
use super::input::{GROUP, STEP, SUM_GROUP};
use super::transpose::transpose_registers;

/// The int8 part of a step: codes, scales, sums of codes.
pub(crate) type Int8<'a> = (&'a mut [i8], &'a mut [f32], &'a mut [i32]);

/// Packs [`STEP`] inputs of 16 rows into the layouts asked for. Twins: `pack_f32`, `pack_bf16`, `pack_int8` of `input`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
pub(crate) fn pack(
    rows: &[[f32; STEP]; LANES],
    f32s: Option<&mut [f32]>,
    bf16s: Option<&mut [u16]>,
    int8: Option<Int8<'_>>,
) {
    let inputs = transposed(rows);
    if let Some(out) = f32s {
        assert!(out.len() >= STEP * LANES);
        for (k, x) in inputs.iter().enumerate() {
            // SAFETY: inside `out` by the assertion.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(k * LANES), *x) };
        }
    }
    if let Some(out) = bf16s {
        assert!(out.len() >= STEP * LANES);
        pack_bf16(&inputs, out);
    }
    if let Some((codes, scales, sums)) = int8 {
        assert!(codes.len() >= STEP * LANES && scales.len() >= STEP / GROUP * LANES);
        assert!(sums.len() >= STEP / SUM_GROUP * LANES);
        for g in 0..STEP / GROUP {
            let (codes, sums) = (&mut codes[g * GROUP * LANES..], &mut sums[g * GROUP / SUM_GROUP * LANES..]);
            pack_int8(&inputs[g * GROUP..][..GROUP], codes, &mut scales[g * LANES..], sums);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: &[[f32; STEP]; LANES]) -> [__m512; STEP] {
    let mut inputs = [_mm512_setzero_ps(); STEP];
    for (part, inputs) in inputs.chunks_exact_mut(16).enumerate() {
        // SAFETY: 16 numbers of the row from `part * 16` on.
        let square =
            std::array::from_fn(|lane| unsafe { _mm512_loadu_si512(rows[lane].as_ptr().add(part * 16).cast()) });
        for (input, line) in inputs.iter_mut().zip(transpose_registers(square)) {
            *input = _mm512_castsi512_ps(line);
        }
    }
    inputs
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_bf16(inputs: &[__m512; STEP], out: &mut [u16]) {
    // Words 0, 16, 1, 17 ..: the even and the odd input of each row side by side.
    let pairs: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: 64 bytes each; lines stay inside `out`, whose length the caller checked.
    unsafe {
        let order = _mm512_loadu_si512(pairs.as_ptr().cast());
        for (p, pair) in inputs.chunks_exact(2).enumerate() {
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(pair[1], pair[0]));
            let line = _mm512_permutexvar_epi16(order, both);
            _mm512_storeu_si512(out.as_mut_ptr().add(p * 2 * LANES).cast(), line);
        }
    }
}

/// One group of 32 inputs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn pack_int8(inputs: &[__m512], codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    let mut amax = _mm512_setzero_ps();
    let mut bad = 0;
    for x in inputs {
        amax = _mm512_max_ps(_mm512_abs_ps(*x), amax);
        // NaN (quiet 0x01, signalling 0x80) and infinities (0x08, 0x10).
        bad |= _mm512_fpclass_ps_mask::<0x99>(*x);
    }
    let scale = _mm512_div_ps(amax, _mm512_set1_ps(127.0));
    let normal = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(scale, _mm512_set1_ps(f32::MIN_POSITIVE));
    let inverse = _mm512_maskz_div_ps(normal & !bad, _mm512_set1_ps(1.0), scale);
    let stored = _mm512_mask_mov_ps(scale, bad, _mm512_set1_ps(f32::NAN));
    // SAFETY: the caller checked the lengths.
    unsafe { _mm512_storeu_ps(scales.as_mut_ptr(), stored) };
    let byte = _mm512_set1_epi32(0xff);
    for (h, half) in inputs.chunks_exact(SUM_GROUP).enumerate() {
        let mut sum = _mm512_setzero_si512();
        for (q, quad) in half.chunks_exact(4).enumerate() {
            let c: [__m512i; 4] = std::array::from_fn(|i| _mm512_cvtps_epi32(_mm512_mul_ps(quad[i], inverse)));
            sum = _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_add_epi32(c[0], c[1]), _mm512_add_epi32(c[2], c[3])));
            let low =
                _mm512_or_si512(_mm512_and_si512(c[0], byte), _mm512_slli_epi32::<8>(_mm512_and_si512(c[1], byte)));
            let high = _mm512_slli_epi32::<16>(_mm512_and_si512(c[2], byte));
            let line = _mm512_or_si512(_mm512_or_si512(low, high), _mm512_slli_epi32::<24>(c[3]));
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(codes.as_mut_ptr().add((h * SUM_GROUP + q * 4) * LANES).cast(), line) };
        }
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().add(h * LANES).cast(), sum) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::input::{pack_bf16, pack_f32, pack_int8};
    use crate::isa::{self, Isa};

    #[test]
    fn packs_like_the_twins() {
        if !isa::available().contains(&Isa::Avx512) {
            return println!("skipped: no AVX-512 here");
        }
        let value = |lane: usize, k: usize| ((lane * 67 + k * 31) % 101) as f32 / 7.0 - 6.5;
        let mut rows: [[f32; 64]; 16] = std::array::from_fn(|lane| std::array::from_fn(|k| value(lane, k)));
        rows[3] = [0.0; 64];
        rows[5][40] = f32::NAN;
        let (mut a, mut b) = ((vec![0f32; 1024], vec![0u16; 1024]), (vec![0f32; 1024], vec![0u16; 1024]));
        let mut fast = (vec![0i8; 1024], vec![0f32; 32], vec![0i32; 64]);
        let mut slow = fast.clone();
        // SAFETY: AVX-512 was found above.
        unsafe { super::pack(&rows, Some(&mut a.0), Some(&mut a.1), Some((&mut fast.0, &mut fast.1, &mut fast.2))) };
        pack_f32(Isa::Scalar, &rows, &mut b.0);
        pack_bf16(Isa::Scalar, &rows, &mut b.1);
        pack_int8(Isa::Scalar, &rows, &mut slow.0, &mut slow.1, &mut slow.2);
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&a.0) == bits(&b.0) && a.1 == b.1, "f32 and bf16");
        for lane in 0..16 {
            for g in 0..2 {
                let at = g * 16 + lane;
                let same = fast.1[at].to_bits() == slow.1[at].to_bits();
                assert!(same || (fast.1[at].is_nan() && slow.1[at].is_nan()), "scale {lane} {g}");
                if !fast.1[at].is_nan() {
                    let of = |v: &[i8]| (0..8).flat_map(|q| v[((g * 8 + q) * 16 + lane) * 4..][..4].to_vec()).collect();
                    let (f, s): (Vec<i8>, Vec<i8>) = (of(&fast.0), of(&slow.0));
                    assert_eq!(f, s, "codes {lane} {g}");
                    assert!((0..2).all(|h| fast.2[(g * 2 + h) * 16 + lane] == slow.2[(g * 2 + h) * 16 + lane]));
                }
            }
        }
    }
}
