//! A mergeable histogram of magnitudes with logarithmic bins, from which thresholds are read.
//!
//! Bins are cut by the float's own bits: 128 equal steps within each power of two from 2^-40 to 2^24, so a bin is at
//! most 0.8 % wide and a value finds its bin with one shift. Memory is constant (64 KiB) however long the text.
//! (HdrHistogram cuts integers the same way; TEAL itself uses linear bins between the 1 % and 99 % quantiles.)

const SUB_BITS: u32 = 7;
const SHIFT: u32 = 23 - SUB_BITS;
const LOW_EXPONENT: u32 = 127 - 40;
const OCTAVES: u32 = 64;
const FIRST: u32 = LOW_EXPONENT << SUB_BITS;
const BINS: usize = (OCTAVES << SUB_BITS) as usize;

/// Counts of `|x|`; exact zeros are counted apart.
#[derive(Clone, Debug, PartialEq)]
pub struct MagnitudeHistogram {
    bins: Vec<u64>,
    zeros: u64,
    total: u64,
}

impl Default for MagnitudeHistogram {
    fn default() -> Self {
        Self { bins: vec![0; BINS], zeros: 0, total: 0 }
    }
}

/// Lower edge of a bin.
fn edge(bin: usize) -> f32 {
    f32::from_bits((bin as u32 + FIRST) << SHIFT)
}

impl MagnitudeHistogram {
    /// Counts `values`, which are finite.
    pub fn add(&mut self, values: &[f32]) {
        for x in values {
            let bits = x.abs().to_bits();
            self.total += 1;
            if bits == 0 {
                self.zeros += 1;
            } else {
                let bin = (bits >> SHIFT).saturating_sub(FIRST) as usize;
                self.bins[bin.min(BINS - 1)] += 1;
            }
        }
    }

    /// Pairs of bin and count for the bins that are not empty, the zeros and the total, for storing.
    pub fn parts(&self) -> (Vec<u64>, u64, u64) {
        let filled = self.bins.iter().enumerate().filter(|(_, count)| **count > 0);
        (filled.flat_map(|(bin, count)| [bin as u64, *count]).collect(), self.zeros, self.total)
    }

    /// The histogram of these parts; `None` if they contradict one another.
    pub fn from_parts(pairs: &[u64], zeros: u64, total: u64) -> Option<Self> {
        let mut h = Self { zeros, total, ..Self::default() };
        let (pairs, rest) = pairs.as_chunks::<2>();
        let mut sum = zeros;
        for [bin, count] in pairs {
            *h.bins.get_mut(usize::try_from(*bin).ok()?)? = *count;
            sum = sum.checked_add(*count)?;
        }
        (rest.is_empty() && sum == total).then_some(h)
    }

    /// Adds the counts of `other`; the order of merging does not matter.
    pub fn merge(&mut self, other: &Self) {
        for (a, b) in self.bins.iter_mut().zip(&other.bins) {
            *a += b;
        }
        self.zeros += other.zeros;
        self.total += other.total;
    }

    /// Values counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Share of values that are not exactly zero (1 if nothing was counted).
    pub fn nonzero_share(&self) -> f64 {
        if self.total == 0 { 1.0 } else { 1.0 - self.zeros as f64 / self.total as f64 }
    }

    /// The threshold `t` at which a share `dropped` of the values has `|x| <= t`, interpolated within its bin.
    /// Zero if the exact zeros alone reach that share, or nothing was counted.
    pub fn threshold(&self, dropped: f64) -> f32 {
        let target = dropped * self.total as f64 - self.zeros as f64;
        if target <= 0.0 {
            return 0.0;
        }
        let mut below = 0.0;
        for (i, &count) in self.bins.iter().enumerate() {
            let count = count as f64;
            if count > 0.0 && below + count >= target {
                let within = ((target - below) / count) as f32;
                return edge(i) + (edge(i + 1) - edge(i)) * within;
            }
            below += count;
        }
        edge(BINS)
    }

    /// Estimated share of values with `|x| > threshold`.
    pub fn kept_share(&self, threshold: f32) -> f64 {
        if self.total == 0 {
            return 1.0;
        }
        if threshold <= 0.0 {
            return self.nonzero_share();
        }
        let mut above = 0.0;
        for (i, &count) in self.bins.iter().enumerate() {
            let (low, high) = (edge(i), edge(i + 1));
            let part = ((high - threshold) / (high - low)).clamp(0.0, 1.0);
            above += count as f64 * f64::from(part);
        }
        above / self.total as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn normal(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed | 1;
        let mut unit = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 11) as f64 / (1u64 << 53) as f64
        };
        (0..n).map(|_| ((0..12).map(|_| unit()).sum::<f64>() - 6.0) as f32).collect()
    }

    #[test]
    fn kept_share_on_its_own_data_is_the_asked_one() {
        let data = normal(200_000, 7);
        let mut h = MagnitudeHistogram::default();
        h.add(&data);
        for dropped in [0.05, 0.25, 0.5, 0.7, 0.9, 0.99] {
            let t = h.threshold(dropped);
            let kept = data.iter().filter(|x| x.abs() > t).count() as f64 / data.len() as f64;
            assert!((kept - (1.0 - dropped)).abs() < 5e-4, "{dropped}: kept {kept}");
            assert!((h.kept_share(t) - kept).abs() < 5e-4);
        }
        assert_eq!(h.threshold(0.0), 0.0);
    }

    #[test]
    fn zeros_reach_a_share_alone() {
        let mut h = MagnitudeHistogram::default();
        h.add(&[0.0, -0.0, 0.0, 4.0]);
        assert_eq!(h.threshold(0.75), 0.0);
        assert!(h.threshold(0.9) >= 4.0 && h.threshold(0.9) <= 4.04);
        assert_eq!(h.nonzero_share(), 0.25);
    }

    #[test]
    fn extremes_find_a_bin() {
        let mut h = MagnitudeHistogram::default();
        h.add(&[f32::MIN_POSITIVE, 1e-42, f32::MAX, 1.0]);
        assert_eq!(h.total(), 4);
    }

    proptest! {
        #[test]
        fn merging_equals_counting_together(a in prop::collection::vec(-1e6f32..1e6, 0..200), b in prop::collection::vec(-1.0f32..1.0, 0..200)) {
            let (mut x, mut y, mut both) = (MagnitudeHistogram::default(), MagnitudeHistogram::default(), MagnitudeHistogram::default());
            x.add(&a);
            y.add(&b);
            both.add(&b);
            both.add(&a);
            x.merge(&y);
            prop_assert_eq!(x, both);
        }

        #[test]
        fn threshold_rises_with_the_dropped_share(v in prop::collection::vec(-9f32..9.0, 1..300), s in 0.0f64..1.0, d in 0.0f64..0.5) {
            let mut h = MagnitudeHistogram::default();
            h.add(&v);
            prop_assert!(h.threshold((s + d).min(1.0)) >= h.threshold(s));
        }
    }
}
