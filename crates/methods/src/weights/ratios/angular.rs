//! `angular`: blocks that turn the residual stream further keep more.
//!
//! CFSP (2024; code wyxscir/CFSP, `lib/prune.py`): the importance of a block is `arccos(cos(x_in, x_out)) / pi`; keep ratios
//! are in proportion to `sigmoid(z)` for `z = (I - mean I) * SCALE`. The code sums the importance over its 128 sequences of
//! 1024 tokens and divides by 10^4; here it is a mean over tokens and the scale has that number of tokens in it, so budgets
//! do not depend on the length of the text.

/// 128 * 1024 tokens over 10^4.
const SCALE: f64 = 13.1072;

/// The share to drop of each block, `target` in the mean, for the mean angle of each over pi.
pub fn shares(importance: &[f64], target: f64) -> Vec<f64> {
    let n = importance.len().max(1) as f64;
    let mean = |of: &[f64]| of.iter().sum::<f64>() / n;
    let middle = mean(importance);
    let gates: Vec<f64> = importance.iter().map(|i| 1.0 / (1.0 + (-(i - middle) * SCALE).exp())).collect();
    let (average, most) = (mean(&gates), gates.iter().copied().fold(0.0, f64::max));
    let keep = 1.0 - target;
    if average <= 0.0 || keep <= 0.0 {
        return vec![target; importance.len()];
    }
    // Nobody keeps more than everything: deviations shrink until the largest keep ratio is `keep + target / 1.05`.
    let shrink = if most > average && most / average * keep >= 1.0 {
        average * (1.0 / keep - 1.0) / ((most - average) * 1.05)
    } else {
        1.0
    };
    gates.iter().map(|g| 1.0 - (1.0 + (g - average) * shrink / average) * keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_the_target_and_equal_blocks_are_equal() {
        for target in [0.0, 0.1, 0.3, 0.5, 0.8] {
            for importance in [[0.1; 4], [0.3, 0.1, 0.05, 0.2], [0.9, 0.0, 0.0, 0.0]] {
                let shares = shares(&importance, target);
                assert!((shares.iter().sum::<f64>() / 4.0 - target).abs() < 1e-12, "{shares:?}");
                assert!(shares.iter().all(|s| (-1e-12..1.0).contains(s)), "{target}: {shares:?}");
                if importance == [0.1; 4] {
                    assert!(shares.iter().all(|s| (s - target).abs() < 1e-12));
                } else if target > 0.0 {
                    assert!(shares[0] < shares[1], "what turns further keeps more");
                }
            }
        }
    }

    #[test]
    fn the_largest_keep_ratio_is_held_as_published() {
        let shares = shares(&[0.9, 0.0, 0.0, 0.0], 0.2);
        assert!((1.0 - shares[0] - (0.8 + 0.2 / 1.05)).abs() < 1e-12, "{shares:?}");
    }
}
