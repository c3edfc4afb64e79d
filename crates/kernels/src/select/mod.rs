//! Selection: which entries of a vector stay, as a list of positions and a list of values.
//!
//! Every rule ends in one compaction: keep `x_j` where its score exceeds a limit. The score is `|x_j|`, `|x_j| * scale_j`
//! or, signed, `x_j * scale_j`; NaN is kept, so that it surfaces in the product. [`top_k`] and [`moments`] find limits.

mod top;

pub use top::{TopScratch, top_k};

use crate::Isa;

/// Keeps the entries with `|x| > threshold` (strictly) in order.
///
/// `index` and `value` are cleared first and end with the same length.
///
/// # Panics
/// If this CPU lacks `isa`, or `x` has more than `u32::MAX` entries.
pub fn magnitude(isa: Isa, x: &[f32], threshold: f32, index: &mut Vec<u32>, value: &mut Vec<f32>) {
    compact::<false, false>(isa, x, &[], threshold, index, value);
}

/// Keeps the entries that are not exactly zero, in order.
///
/// `index` and `value` are cleared first and end with the same length.
///
/// # Panics
/// As [`magnitude`].
pub fn nonzero(isa: Isa, x: &[f32], index: &mut Vec<u32>, value: &mut Vec<f32>) {
    magnitude(isa, x, 0.0, index, value);
}

/// Keeps the entries with `|x_j| * scale_j > threshold` (strictly) in order; `value` gets the unscaled `x_j`.
///
/// `index` and `value` are cleared first and end with the same length.
///
/// # Panics
/// As [`magnitude`], and if `scale` has another length than `x`.
pub fn scaled(isa: Isa, x: &[f32], scale: &[f32], threshold: f32, index: &mut Vec<u32>, value: &mut Vec<f32>) {
    assert_eq!(x.len(), scale.len(), "one scale per entry");
    compact::<false, true>(isa, x, scale, threshold, index, value);
}

/// Keeps the entries with `x_j > threshold` (signed, strictly) in order.
///
/// `index` and `value` are cleared first and end with the same length.
///
/// # Panics
/// As [`magnitude`].
pub fn above(isa: Isa, x: &[f32], threshold: f32, index: &mut Vec<u32>, value: &mut Vec<f32>) {
    compact::<true, false>(isa, x, &[], threshold, index, value);
}

/// Gathers `x` at the positions of `list`.
///
/// # Panics
/// If a position is not below `x.len()`.
pub fn listed(x: &[f32], list: &[u32], index: &mut Vec<u32>, value: &mut Vec<f32>) {
    index.clear();
    index.extend_from_slice(list);
    value.clear();
    value.extend(list.iter().map(|&i| x[i as usize]));
}

/// Mean and population standard deviation of `|x_j| * scale_j` (`scale` may be absent), or with `signed` of `x_j`
/// itself, in double precision. Zero for an empty vector.
pub fn moments(x: &[f32], scale: Option<&[f32]>, signed: bool) -> (f64, f64) {
    let (mut sum, mut squares) = ([0.0_f64; 8], [0.0_f64; 8]);
    let mut lane = |i: usize, v: f32| {
        let v = f64::from(v);
        sum[i % 8] += v;
        squares[i % 8] += v * v;
    };
    match (scale, signed) {
        (Some(s), _) => x.iter().zip(s).enumerate().for_each(|(i, (x, s))| lane(i, x.abs() * s)),
        (None, false) => x.iter().enumerate().for_each(|(i, x)| lane(i, x.abs())),
        (None, true) => x.iter().enumerate().for_each(|(i, x)| lane(i, *x)),
    }
    let n = x.len().max(1) as f64;
    let mean = sum.iter().sum::<f64>() / n;
    (mean, (squares.iter().sum::<f64>() / n - mean * mean).max(0.0).sqrt())
}

/// The score of one entry.
fn score<const SIGNED: bool, const SCALED: bool>(x: f32, scale: &[f32], i: usize) -> f32 {
    let x = if SIGNED { x } else { x.abs() };
    if SCALED { x * scale[i] } else { x }
}

fn compact<const SIGNED: bool, const SCALED: bool>(
    isa: Isa,
    x: &[f32],
    scale: &[f32],
    threshold: f32,
    index: &mut Vec<u32>,
    value: &mut Vec<f32>,
) {
    assert!(isa.is_available(), "{isa} is not available here");
    assert!(u32::try_from(x.len()).is_ok(), "positions must fit in 32 bits");
    index.clear();
    value.clear();
    match isa {
        // SAFETY: checked above; the callers give as many scales as entries where `SCALED`.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { x86::avx512::<SIGNED, SCALED>(x, scale, threshold, index, value) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::avx2::<SIGNED, SCALED>(x, scale, threshold, index, value) },
        _ => scalar::<SIGNED, SCALED>(x, scale, (0, threshold), index, value),
    }
}

/// The entries of `x` from `first` on.
fn scalar<const SIGNED: bool, const SCALED: bool>(
    x: &[f32],
    scale: &[f32],
    (first, threshold): (usize, f32),
    index: &mut Vec<u32>,
    value: &mut Vec<f32>,
) {
    for (i, &v) in x.iter().enumerate().skip(first) {
        let s = score::<SIGNED, SCALED>(v, scale, i);
        if s > threshold || s.is_nan() {
            index.push(i as u32);
            value.push(v);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::scalar;
    use std::arch::x86_64::*;

    /// Makes room for all of `x` plus one whole register, so that stores need no check.
    fn reserve(x: &[f32], lanes: usize, index: &mut Vec<u32>, value: &mut Vec<f32>) {
        index.reserve(x.len() + lanes);
        value.reserve(x.len() + lanes);
    }

    /// # Safety
    /// With `SCALED`, `scale` is as long as `x`.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512<const SIGNED: bool, const SCALED: bool>(
        x: &[f32],
        scale: &[f32],
        threshold: f32,
        index: &mut Vec<u32>,
        value: &mut Vec<f32>,
    ) {
        reserve(x, 16, index, value);
        let limit = _mm512_set1_ps(threshold);
        let mut position = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        let whole = x.len() / 16 * 16;
        let mut kept = 0;
        for at in (0..whole).step_by(16) {
            // SAFETY: 16 numbers from `at` on lie within `x`, and within `scale` where it is read.
            let (v, s) = unsafe {
                let v = _mm512_loadu_ps(x.as_ptr().add(at));
                let s = if SIGNED { v } else { _mm512_abs_ps(v) };
                (v, if SCALED { _mm512_mul_ps(s, _mm512_loadu_ps(scale.as_ptr().add(at))) } else { s })
            };
            // Not less-or-equal: true for NaN.
            let mask = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(s, limit);
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
        scalar::<SIGNED, SCALED>(x, scale, (whole, threshold), index, value);
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

    /// # Safety
    /// With `SCALED`, `scale` is as long as `x`.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2<const SIGNED: bool, const SCALED: bool>(
        x: &[f32],
        scale: &[f32],
        threshold: f32,
        index: &mut Vec<u32>,
        value: &mut Vec<f32>,
    ) {
        reserve(x, 8, index, value);
        let limit = _mm256_set1_ps(threshold);
        let sign = _mm256_set1_ps(-0.0);
        let whole = x.len() / 8 * 8;
        let mut kept = 0;
        for at in (0..whole).step_by(8) {
            // SAFETY: eight numbers from `at` on lie within `x`, and within `scale` where it is read.
            let (v, s) = unsafe {
                let v = _mm256_loadu_ps(x.as_ptr().add(at));
                let s = if SIGNED { v } else { _mm256_andnot_ps(sign, v) };
                (v, if SCALED { _mm256_mul_ps(s, _mm256_loadu_ps(scale.as_ptr().add(at))) } else { s })
            };
            let mask = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(s, limit)) as usize;
            let lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(LANES[mask] as i64));
            let position = _mm256_add_epi32(lanes, _mm256_set1_epi32(at as i32));
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
        scalar::<SIGNED, SCALED>(x, scale, (whole, threshold), index, value);
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

    #[test]
    fn scaled_and_signed_scores_are_the_same_on_every_isa() {
        let mut random = Random(2);
        for n in (0..40).chain([255, 1000]) {
            let (mut x, mut scale) = (random.floats(n), random.floats(n));
            scale.iter_mut().for_each(|s| *s = s.abs());
            x.iter_mut().step_by(9).for_each(|v| *v = f32::NAN);
            for threshold in [0.0, 0.3] {
                let (mut index, mut value) = (vec![], vec![]);
                let stays = |score: f32| score.is_nan() || score > threshold;
                let all = 0..n as u32;
                let expected: Vec<u32> =
                    all.clone().filter(|&i| stays(x[i as usize].abs() * scale[i as usize])).collect();
                let positive: Vec<u32> = all.filter(|&i| stays(x[i as usize])).collect();
                for isa in crate::isa::available() {
                    scaled(isa, &x, &scale, threshold, &mut index, &mut value);
                    assert_eq!(index, expected, "{isa} {n}");
                    assert!(index.iter().zip(&value).all(|(&i, v)| v.to_bits() == x[i as usize].to_bits()));
                    above(isa, &x, threshold, &mut index, &mut value);
                    assert_eq!(index, positive, "{isa} {n}");
                }
            }
        }
    }

    #[test]
    fn moments_by_hand() {
        assert_eq!(moments(&[1.0, -3.0], None, false), (2.0, 1.0));
        assert_eq!(moments(&[1.0, -3.0], None, true), (-1.0, 2.0));
        assert_eq!(moments(&[1.0, -3.0], Some(&[2.0, 1.0]), false), (2.5, 0.5));
        assert_eq!(moments(&[], None, false), (0.0, 0.0));
        assert_eq!(moments(&[7.0; 100], None, true), (7.0, 0.0), "a constant vector has no spread");
    }
}
