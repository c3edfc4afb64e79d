//! `ecoflap`: blocks on which the loss depends more keep more.
//!
//! ECoFLaP (arXiv:2310.02998; code ylsung/ECoFLaP): the score of a matrix is `|L(W + eps z) - L(W - eps z)| / (2 eps)` for
//! normal noise `z`, summed over batches with a draw each, and that of a block is the sum over its matrices. Every block gets
//! a floor; the rest goes to blocks in proportion to their scores, none above full. The published loop rounds up and corrects
//! with the wrong sign, so that it ends a few weights above its goal; here the kept numbers add up exactly.

/// Kept weights of each group of `sizes` weights: `keep` in all, none below `floor` of its size.
///
/// # Errors
/// The share that cannot be kept: `keep` lies below the floors or above all sizes.
pub fn allocate(scores: &[f64], sizes: &[u64], keep: u64, floor: f64) -> Result<Vec<u64>, String> {
    let floors: Vec<u64> = sizes.iter().map(|n| ((*n as f64 * floor).ceil() as u64).min(*n)).collect();
    let (least, most) = (floors.iter().sum::<u64>(), sizes.iter().sum::<u64>());
    // A target equal to the floor is uniform; the floors' rounding must not get in its way.
    let short = least.saturating_sub(keep);
    if short > sizes.len() as u64 || keep > most {
        return Err(format!("{keep} weights cannot stay: these ratios leave between {least} and {most}"));
    }
    let mut kept: Vec<f64> = floors.iter().map(|f| *f as f64).collect();
    let mut open: Vec<usize> = (0..sizes.len()).filter(|i| floors[*i] < sizes[*i]).collect();
    let mut left = (keep.saturating_sub(least)) as f64;
    while left > 0.0 && !open.is_empty() {
        let total: f64 = open.iter().map(|i| scores[*i]).sum();
        // Without scores, by what is missing.
        let weight = |i: usize| if total > 0.0 { scores[i] / total } else { 1.0 / open.len() as f64 };
        let full: Vec<usize> =
            open.iter().copied().filter(|i| kept[*i] + left * weight(*i) >= sizes[*i] as f64).collect();
        if full.is_empty() {
            open.iter().for_each(|i| kept[*i] += left * weight(*i));
            break;
        }
        for i in full {
            left -= sizes[i] as f64 - kept[i];
            kept[i] = sizes[i] as f64;
            open.retain(|o| *o != i);
        }
    }
    Ok(whole(&kept, sizes, keep))
}

/// Whole numbers near `wanted` that add up to `keep`: the largest remainders go up.
fn whole(wanted: &[f64], sizes: &[u64], keep: u64) -> Vec<u64> {
    let mut kept: Vec<u64> = wanted.iter().zip(sizes).map(|(w, n)| (w.floor().max(0.0) as u64).min(*n)).collect();
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*b].fract().total_cmp(&wanted[*a].fract()));
    let sum: u64 = kept.iter().sum();
    let (mut more, mut less) = (keep.saturating_sub(sum), sum.saturating_sub(keep));
    while more > 0 || less > 0 {
        let before = (more, less);
        for i in &order {
            if more > 0 && kept[*i] < sizes[*i] {
                kept[*i] += 1;
                more -= 1;
            } else if less > 0 && kept[*i] > 0 {
                kept[*i] -= 1;
                less -= 1;
            }
        }
        if (more, less) == before {
            break;
        }
    }
    kept
}

/// Spearman's rank correlation, to tell how far two halves of the draws agree.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |x: &[f64]| -> Vec<f64> {
        x.iter()
            .map(|v| {
                x.iter()
                    .map(|w| {
                        if w < v {
                            1.0
                        } else if w == v {
                            0.5
                        } else {
                            0.0
                        }
                    })
                    .sum()
            })
            .collect()
    };
    let (a, b) = (ranks(a), ranks(b));
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len().max(1) as f64;
    let (ma, mb) = (mean(&a), mean(&b));
    let dot = |x: &[f64], mx: f64, y: &[f64], my: f64| x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum::<f64>();
    let norm = (dot(&a, ma, &a, ma) * dot(&b, mb, &b, mb)).sqrt();
    if norm > 0.0 { dot(&a, ma, &b, mb) / norm } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_exact_and_floors_and_sizes_hold() {
        let sizes = [1000, 77, 4096, 500, 3];
        let all: u64 = sizes.iter().sum();
        for (seed, scores) in [[1.0, 2.0, 3.0, 4.0, 5.0], [0.0; 5], [1e9, 1.0, 1.0, 1.0, 0.0]].iter().enumerate() {
            for (keep, floor) in [(all / 2, 0.4), (all * 9 / 10, 0.8), (all, 0.5), (all * 2 / 5 + 5, 0.4)] {
                let kept = allocate(scores, &sizes, keep, floor).unwrap();
                assert_eq!(kept.iter().sum::<u64>(), keep, "{seed} {keep}");
                let fits = |(k, n): (&u64, &u64)| *k <= *n && *k as f64 >= (*n as f64 * floor).floor() - 1.0;
                assert!(kept.iter().zip(&sizes).all(fits), "{kept:?}");
            }
        }
        assert!(allocate(&[1.0], &[10], 11, 0.1).unwrap_err().contains("cannot stay"));
        assert!(allocate(&[1.0], &[10], 2, 0.5).unwrap_err().contains("between 5 and 10"));
    }

    #[test]
    fn equal_scores_and_sizes_are_uniform_and_so_is_a_floor_at_the_target() {
        assert_eq!(allocate(&[2.0; 4], &[100; 4], 200, 0.4).unwrap(), [50; 4]);
        assert_eq!(allocate(&[1.0, 9.0, 3.0], &[100, 200, 300], 300, 0.5).unwrap(), [50, 100, 150]);
        // By hand: floors 40 + 40, 20 left by 3 : 1.
        assert_eq!(allocate(&[3.0, 1.0], &[100, 100], 100, 0.4).unwrap(), [55, 45]);
        // The first is full at 100; all that is left goes to the second.
        assert_eq!(allocate(&[99.0, 1.0], &[100, 100], 150, 0.4).unwrap(), [100, 50]);
    }

    #[test]
    fn ranks_agree_or_not() {
        assert!((rank_correlation(&[1.0, 5.0, 9.0], &[0.1, 0.2, 7.0]) - 1.0).abs() < 1e-12);
        assert!((rank_correlation(&[1.0, 5.0, 9.0], &[3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        assert_eq!(rank_correlation(&[1.0, 1.0], &[1.0, 2.0]), 0.0);
    }
}
