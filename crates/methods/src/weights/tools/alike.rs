//! Rows (or neurons) of like distribution: each is described by quantiles of its numbers, and those are clustered. What shares
//! a book then has like numbers, and few books serve many rows.

use super::vq::Draw;

/// Quantiles of a row.
const QUANTILES: usize = 16;

/// Numbers of a row that are sorted at most, evenly spread.
const SAMPLE: usize = 256;

/// Clusters at most; within one, rows are ordered by size.
const CLUSTERS: usize = 64;

/// Rounds of clustering.
const ROUNDS: usize = 25;

/// The distribution of `n` numbers.
pub fn distribution(n: usize, at: impl Fn(usize) -> f32) -> Vec<f32> {
    let step = n.div_ceil(SAMPLE).max(1);
    let mut sample: Vec<f32> = (0..n).step_by(step).map(at).collect();
    sample.sort_by(f32::total_cmp);
    let last = sample.len().saturating_sub(1);
    (0..QUANTILES).map(|q| sample.get(q * last / (QUANTILES - 1)).copied().unwrap_or(0.0)).collect()
}

fn energy(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum()
}

fn far(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// The cluster of each of `all`; clusters are numbered by rising energy.
fn clusters(all: &[Vec<f32>], k: usize, seed: u64) -> Vec<usize> {
    let mut draw = Draw(seed);
    let mut centres: Vec<Vec<f32>> = Vec::with_capacity(k);
    let mut distance = vec![1.0; all.len()];
    for _ in 0..k {
        let mut left = draw.unit() * distance.iter().sum::<f64>();
        let found = distance.iter().position(|d| {
            left -= d;
            left < 0.0
        });
        let centre = &all[found.unwrap_or(0)];
        let first = centres.is_empty();
        distance.iter_mut().zip(all).for_each(|(d, x)| {
            let new = far(x, centre);
            *d = if first { new } else { d.min(new) };
        });
        centres.push(centre.clone());
    }
    let mut of = vec![usize::MAX; all.len()];
    for _ in 0..ROUNDS {
        let nearest = |x: &Vec<f32>| {
            let by = |a: &usize, b: &usize| far(x, &centres[*a]).total_cmp(&far(x, &centres[*b]));
            (0..centres.len()).min_by(by).unwrap_or(0)
        };
        let next: Vec<usize> = all.iter().map(nearest).collect();
        if next == of {
            break;
        }
        of = next;
        for (c, centre) in centres.iter_mut().enumerate() {
            let own: Vec<&Vec<f32>> = all.iter().zip(&of).filter(|(_, o)| **o == c).map(|(x, _)| x).collect();
            if !own.is_empty() {
                let mean = |q: usize| (own.iter().map(|x| f64::from(x[q])).sum::<f64>() / own.len() as f64) as f32;
                *centre = (0..centre.len()).map(mean).collect();
            }
        }
    }
    let mut rank: Vec<usize> = (0..centres.len()).collect();
    rank.sort_by(|a, b| energy(&centres[*a]).total_cmp(&energy(&centres[*b])).then(a.cmp(b)));
    let mut number = vec![0; rank.len()];
    rank.iter().enumerate().for_each(|(i, c)| number[*c] = i);
    of.into_iter().map(|c| number.get(c).copied().unwrap_or(0)).collect()
}

/// `all` in an order in which neighbours are alike, and the cluster of each in that order.
fn ordered(all: &[Vec<f32>], k: usize, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let of = clusters(all, k.clamp(1, CLUSTERS), seed);
    let mut order: Vec<usize> = (0..all.len()).collect();
    let key = |i: usize| (of[i], energy(&all[i]));
    order.sort_by(|a, b| key(*a).0.cmp(&key(*b).0).then(key(*a).1.total_cmp(&key(*b).1)).then(a.cmp(b)));
    let clusters = order.iter().map(|i| of[*i]).collect();
    (order, clusters)
}

/// An order of `all` in which neighbours are alike.
pub fn order(all: &[Vec<f32>], k: usize, seed: u64) -> Vec<usize> {
    ordered(all, k, seed).0
}

/// Which of `count` groups (none of them empty, if there are as many rows) each of `all` is in. A cluster has as many groups as
/// its share of the rows, one at least where `count` allows.
pub fn groups(all: &[Vec<f32>], count: usize, seed: u64) -> Vec<u16> {
    let n = all.len();
    let count = count.clamp(1, n.max(1));
    let (order, clusters) = ordered(all, count, seed);
    // Ends of clusters in the order, as groups: each end is as near to its share as leaves one group to each row or cluster.
    let mut of = vec![0_u16; n];
    let ends: Vec<usize> = (1..=n).filter(|i| *i == n || clusters[*i] != clusters[i - 1]).collect();
    let (mut start, mut first) = (0, 0);
    for (i, end) in ends.iter().enumerate() {
        let (behind, left) = (ends.len() - 1 - i, count - first);
        let rows = end - start;
        let fair = ((left * rows) as f64 / (n - start) as f64).round() as usize;
        let own = if behind == 0 { left } else { fair.clamp(1, left.saturating_sub(behind).max(1)) }.min(rows);
        let own = own.max(left.saturating_sub(n - end)).min(rows);
        for (j, row) in order[start..*end].iter().enumerate() {
            of[*row] = (first + j * own / rows).min(count - 1) as u16;
        }
        (start, first) = (*end, first + own);
    }
    of
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    fn rows(n: usize, cols: usize, scale: impl Fn(usize) -> f32) -> Vec<Vec<f32>> {
        let w = normal(3, n * cols);
        (0..n).map(|r| distribution(cols, |j| w[r * cols + j] * scale(r))).collect()
    }

    #[test]
    fn rows_of_one_kind_come_together() {
        let all = rows(60, 200, |r| [0.1, 1.0, 5.0][r % 3]);
        let order = order(&all, 3, 1);
        assert!((0..60).all(|i| order[i] % 3 == i / 20), "{order:?}");
        let groups = groups(&all, 6, 1);
        let pure =
            |g: u16| (0..60).filter(|r| groups[*r] == g).map(|r| r % 3).collect::<std::collections::BTreeSet<_>>();
        assert!((0..6).all(|g| pure(g).len() == 1), "{groups:?}");
    }

    #[test]
    fn every_group_has_rows() {
        for n in [1, 2, 7, 40, 100] {
            for count in [1, 2, 3, 7, 39, 100] {
                let groups = groups(&rows(n, 50, |r| if r == 5 { 40.0 } else { 1.0 + (r % 4) as f32 }), count, 2);
                let used: std::collections::BTreeSet<u16> = groups.iter().copied().collect();
                let most = count.min(n);
                assert!(used.len() == most && usize::from(*used.last().unwrap()) == most - 1, "{n} {count}: {used:?}");
            }
        }
    }

    #[test]
    fn quantiles_of_a_row() {
        let one = distribution(31, |i| (30 - i) as f32);
        assert_eq!((one[0], one[15], one.len()), (0.0, 30.0, 16));
        assert!(one.windows(2).all(|w| w[0] <= w[1]));
        assert_eq!(distribution(0, |_| 1.0), vec![0.0; 16]);
        assert_eq!(distribution(1, |_| 2.0), vec![2.0; 16]);
    }
}
