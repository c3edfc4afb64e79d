//! Exact top-k: a radix histogram of the scores' upper bits finds the bucket of the k-th largest, a selection within that
//! bucket finds it, and one compaction keeps what is above. Linear time; ties go to the lower position.

use super::{magnitude, scaled};
use crate::Isa;

/// Scores are counted by their upper bits: sign (always 0), exponent and three bits of the fraction.
const SHIFT: u32 = 20;
const BUCKETS: usize = 1 << (31 - SHIFT);

/// Buffers of [`top_k`], reused from call to call.
#[derive(Debug, Default)]
pub struct TopScratch {
    bits: Vec<u32>,
    counts: Vec<u32>,
    bucket: Vec<u32>,
}

/// Keeps the `k` entries with the largest `|x_j| * scale_j` (`scale` may be absent) in order of position; of equal ones
/// those that come first. NaN counts as largest. `value` gets the unscaled `x_j`.
///
/// `index` and `value` are cleared first and end with `min(k, x.len())` entries.
///
/// # Panics
/// As [`super::magnitude`], and if `scale` has another length than `x`.
pub fn top_k(
    isa: Isa,
    x: &[f32],
    scale: Option<&[f32]>,
    k: usize,
    scratch: &mut TopScratch,
    (index, value): (&mut Vec<u32>, &mut Vec<f32>),
) {
    assert!(u32::try_from(x.len()).is_ok(), "positions must fit in 32 bits");
    assert!(scale.is_none_or(|s| s.len() == x.len()), "one scale per entry");
    index.clear();
    value.clear();
    if k == 0 {
        return;
    }
    if k >= x.len() {
        index.extend(0..x.len() as u32);
        value.extend_from_slice(x);
        return;
    }
    scratch.bits.clear();
    match scale {
        Some(s) => scratch.bits.extend(x.iter().zip(s).map(|(x, s)| (x * s).abs().to_bits())),
        None => scratch.bits.extend(x.iter().map(|x| x.abs().to_bits())),
    }
    let (limit, ties) = scratch.kth(k);
    let equal = scratch.bucket.iter().filter(|b| **b == limit).count();
    if equal == ties && limit > 0 && limit <= f32::INFINITY.to_bits() {
        // All ties stay: what exceeds the next smaller number is exactly the k largest.
        let below = f32::from_bits(limit - 1);
        return match scale {
            Some(s) => scaled(isa, x, s, below, index, value),
            None => magnitude(isa, x, below, index, value),
        };
    }
    let mut ties = ties;
    for (i, (&bits, &v)) in scratch.bits.iter().zip(x).enumerate() {
        let tie = bits == limit && ties > 0;
        if bits > limit || tie {
            ties -= usize::from(tie);
            index.push(i as u32);
            value.push(v);
        }
    }
}

impl TopScratch {
    /// The k-th largest number of `bits` (`0 < k < bits.len()`), and how many of its equals belong to the k largest.
    /// Leaves that number's bucket behind.
    fn kth(&mut self, k: usize) -> (u32, usize) {
        let Self { bits, counts, bucket } = self;
        counts.clear();
        counts.resize(BUCKETS, 0);
        bits.iter().for_each(|b| counts[(b >> SHIFT) as usize] += 1);
        let (mut above, mut at) = (0, BUCKETS - 1);
        while above + (counts[at] as usize) < k {
            above += counts[at] as usize;
            at -= 1;
        }
        bucket.clear();
        bucket.extend(bits.iter().copied().filter(|b| (b >> SHIFT) as usize == at));
        let rank = k - above - 1;
        let (larger, &mut limit, _) = bucket.select_nth_unstable_by(rank, |a, b| b.cmp(a));
        let greater = larger.iter().filter(|b| **b > limit).count();
        (limit, k - above - greater)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn run(isa: Isa, x: &[f32], scale: Option<&[f32]>, k: usize) -> Vec<u32> {
        let (mut index, mut value) = (vec![1], vec![2.0]);
        top_k(isa, x, scale, k, &mut TopScratch::default(), (&mut index, &mut value));
        assert!(index.iter().zip(&value).all(|(&i, v)| v.to_bits() == x[i as usize].to_bits()));
        index
    }

    fn sorted(x: &[f32], scale: Option<&[f32]>, k: usize) -> Vec<u32> {
        let key = |i: u32| (x[i as usize] * scale.map_or(1.0, |s| s[i as usize])).abs().to_bits();
        let mut order: Vec<u32> = (0..x.len() as u32).collect();
        order.sort_by_key(|&i| (std::cmp::Reverse(key(i)), i));
        order.truncate(k);
        order.sort_unstable();
        order
    }

    #[test]
    fn equals_a_full_sort_with_ties_zeros_denormals_and_equal_vectors() {
        let mut random = Random(5);
        for n in [0, 1, 2, 15, 16, 17, 64, 255, 1000] {
            let mut x = random.floats(n);
            x.iter_mut().step_by(3).for_each(|v| *v = 0.25);
            x.iter_mut().skip(1).step_by(5).for_each(|v| *v = 0.0);
            x.iter_mut().skip(2).step_by(7).for_each(|v| *v = 1e-42);
            let scale: Vec<f32> = random.floats(n).iter().map(|s| s.abs()).collect();
            for x in [x, vec![0.5; n], vec![0.0; n]] {
                for k in [0, 1, 2, n / 3, n / 2, n.saturating_sub(1), n, n + 1] {
                    for scale in [None, Some(&scale[..])] {
                        let expected = sorted(&x, scale, k);
                        assert_eq!(expected.len(), k.min(n));
                        for isa in crate::isa::available() {
                            assert_eq!(run(isa, &x, scale, k), expected, "{isa} n {n} k {k}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn nan_and_infinity_come_first() {
        let x = [1.0, f32::NAN, 3.0, f32::NEG_INFINITY, f32::NAN];
        for isa in crate::isa::available() {
            assert_eq!(run(isa, &x, None, 2), [1, 4]);
            assert_eq!(run(isa, &x, None, 3), [1, 3, 4]);
            assert_eq!(run(isa, &x, None, 4), [1, 2, 3, 4]);
        }
    }
}
