//! Selection: which entries of a vector stay, as a list of positions and a list of values.

use crate::Isa;

/// Keeps the entries with `|x| > threshold` (strictly) in order; NaN is kept, so that it surfaces in the product.
///
/// `index` and `value` are cleared first and end with the same length.
///
/// # Panics
/// If this CPU lacks `isa`, or `x` has more than `u32::MAX` entries.
pub fn magnitude(isa: Isa, x: &[f32], threshold: f32, index: &mut Vec<u32>, value: &mut Vec<f32>) {
    assert!(isa.is_available(), "{isa} is not available here");
    assert!(u32::try_from(x.len()).is_ok(), "positions must fit in 32 bits");
    index.clear();
    value.clear();
    match isa {
        // SAFETY: checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { x86::magnitude_avx512(x, threshold, index, value) },
        // SAFETY: checked above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::magnitude_avx2(x, threshold, index, value) },
        _ => magnitude_scalar(x, 0, threshold, index, value),
    }
}

/// Keeps the entries that are not exactly zero, in order; NaN is kept.
///
/// `index` and `value` are cleared first and end with the same length.
///
/// # Panics
/// As [`magnitude`].
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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::magnitude_scalar;
    use std::arch::x86_64::*;

    /// Makes room for all of `x` plus one whole register, so that stores need no check.
    fn reserve(x: &[f32], lanes: usize, index: &mut Vec<u32>, value: &mut Vec<f32>) {
        index.reserve(x.len() + lanes);
        value.reserve(x.len() + lanes);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn magnitude_avx512(x: &[f32], threshold: f32, index: &mut Vec<u32>, value: &mut Vec<f32>) {
        reserve(x, 16, index, value);
        let limit = _mm512_set1_ps(threshold);
        let mut position = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        let (whole, rest) = x.as_chunks::<16>();
        let mut kept = 0;
        for x in whole {
            // SAFETY: the array has 16 numbers.
            let v = unsafe { _mm512_loadu_ps(x.as_ptr()) };
            // Not less-or-equal: true for NaN.
            let mask = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(_mm512_abs_ps(v), limit);
            // SAFETY: `kept` is at most the numbers seen before, and there is room for all of them and 16 more. A
            // compression in registers and a whole store is faster than a compressing store on Zen.
            unsafe {
                _mm512_storeu_si512(index.as_mut_ptr().add(kept).cast(), _mm512_maskz_compress_epi32(mask, position));
                _mm512_storeu_ps(value.as_mut_ptr().add(kept), _mm512_maskz_compress_ps(mask, v));
            }
            kept += mask.count_ones() as usize;
            position = _mm512_add_epi32(position, _mm512_set1_epi32(16));
        }
        // SAFETY: the first `kept` entries were written above and lie within the capacity.
        unsafe {
            index.set_len(kept);
            value.set_len(kept);
        }
        magnitude_scalar(rest, x.len() - rest.len(), threshold, index, value);
    }

    /// For each mask of eight lanes the lanes that are set, in order, one per byte.
    static LANES: [u64; 256] = {
        let mut table = [0_u64; 256];
        let mut mask = 0;
        while mask < 256 {
            let (mut lane, mut shift) = (0, 0);
            while lane < 8 {
                if mask >> lane & 1 == 1 {
                    table[mask] |= (lane as u64) << shift;
                    shift += 8;
                }
                lane += 1;
            }
            mask += 1;
        }
        table
    };

    #[target_feature(enable = "avx2")]
    pub(super) fn magnitude_avx2(x: &[f32], threshold: f32, index: &mut Vec<u32>, value: &mut Vec<f32>) {
        reserve(x, 8, index, value);
        let limit = _mm256_set1_ps(threshold);
        let sign = _mm256_set1_ps(-0.0);
        let (whole, rest) = x.as_chunks::<8>();
        let mut kept = 0;
        for (i, x) in whole.iter().enumerate() {
            // SAFETY: the array has eight numbers.
            let v = unsafe { _mm256_loadu_ps(x.as_ptr()) };
            let mask = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(_mm256_andnot_ps(sign, v), limit)) as usize;
            let lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(LANES[mask] as i64));
            let position = _mm256_add_epi32(lanes, _mm256_set1_epi32((i * 8) as i32));
            // SAFETY: `kept` is at most the numbers seen before, and there is room for all of them and eight more.
            unsafe {
                _mm256_storeu_si256(index.as_mut_ptr().add(kept).cast(), position);
                _mm256_storeu_ps(value.as_mut_ptr().add(kept), _mm256_permutevar8x32_ps(v, lanes));
            }
            kept += mask.count_ones() as usize;
        }
        // SAFETY: the first `kept` entries were written above and lie within the capacity.
        unsafe {
            index.set_len(kept);
            value.set_len(kept);
        }
        magnitude_scalar(rest, x.len() - rest.len(), threshold, index, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn select(isa: Isa, x: &[f32], threshold: f32) -> (Vec<u32>, Vec<u32>) {
        let (mut index, mut value) = (vec![9; 3], vec![9.0; 7]);
        magnitude(isa, x, threshold, &mut index, &mut value);
        (index, value.into_iter().map(f32::to_bits).collect())
    }

    #[test]
    fn every_isa_keeps_the_same() {
        let mut random = Random(1);
        for n in (0..70).chain([255, 256, 1000]) {
            let mut x = random.floats(n);
            x.iter_mut().step_by(5).for_each(|v| *v = f32::NAN);
            x.iter_mut().step_by(7).for_each(|v| *v = -0.0);
            x.iter_mut().step_by(11).for_each(|v| *v = -0.5);
            for threshold in [0.0, 0.5, 2.0] {
                let expected = select(Isa::Scalar, &x, threshold);
                let kept = x.iter().filter(|v| v.is_nan() || v.abs() > threshold).count();
                assert_eq!(expected.0.len(), kept);
                for isa in crate::isa::available() {
                    assert_eq!(select(isa, &x, threshold), expected, "{isa} {n} {threshold}");
                }
            }
        }
    }

    #[test]
    fn the_limit_itself_is_dropped_and_infinity_stays() {
        for isa in crate::isa::available() {
            let x = [0.5, -0.5, 0.50001, f32::INFINITY, f32::NEG_INFINITY, 0.0, f32::MIN_POSITIVE, 1e-45];
            assert_eq!(select(isa, &x, 0.5).0, [2, 3, 4]);
            assert_eq!(select(isa, &x, 0.0).0, [0, 1, 2, 3, 4, 6, 7]);
        }
    }
}
