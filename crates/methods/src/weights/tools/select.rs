//! Which entries of a matrix stay, by their scores. Counts are exact; of equal scores those stay that come first.

use super::{refuse, rows};
use lacuna_core::{
    compress::{Layer, Pattern},
    method::MethodError,
};
use lacuna_kernels::Pool;

/// Within which part of a matrix scores compete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All entries of the matrix.
    Layer,
    /// The entries of each row.
    Row,
}

/// Entries to drop of `n` at a share: the largest whole number that is not above it. A share that is a rounded quotient
/// (`0.7 * 10 = 7.000000001`, `0.6 * 10 = 5.999999999`) counts as the quotient.
pub fn count(share: f64, n: usize) -> usize {
    ((share * n as f64 + 1e-6).floor() as usize).min(n)
}

/// Marks the `n - drop` largest of `scores`.
pub fn keep_largest(scores: &[f32], drop: usize, kept: &mut [bool]) {
    kept.fill(true);
    if drop == 0 {
        return;
    }
    if drop >= scores.len() {
        kept.fill(false);
        return;
    }
    let mut sorted = scores.to_vec();
    let (_, edge, _) = sorted.select_nth_unstable_by(drop - 1, f32::total_cmp);
    let edge = *edge;
    let mut left = drop;
    for (k, s) in kept.iter_mut().zip(scores) {
        if s.total_cmp(&edge).is_lt() {
            *k = false;
            left -= 1;
        }
    }
    for (k, s) in kept.iter_mut().zip(scores).rev() {
        if left == 0 {
            break;
        }
        if s.total_cmp(&edge).is_eq() {
            *k = false;
            left -= 1;
        }
    }
}

/// Marks in every run of `of` scores the `keep` largest; a last, shorter run stays whole.
pub fn keep_of_runs(scores: &[f32], keep: usize, of: usize, kept: &mut [bool]) {
    kept.fill(true);
    for (s, k) in scores.chunks_exact(of).zip(kept.chunks_exact_mut(of)) {
        keep_largest(s, of - keep, k);
    }
}

/// The mask of a layer with these `scores`, which must not be negative (no -0.0 either).
///
/// # Errors
/// A pattern whose runs do not divide the rows.
pub fn mask(
    layer: &Layer<'_>,
    scores: &[f32],
    scope: Scope,
    pattern: Pattern,
    share: f64,
) -> Result<Vec<bool>, MethodError> {
    check_runs(layer, pattern)?;
    let (pool, cols) = (layer.pool, layer.inputs);
    let mut kept = vec![true; scores.len()];
    match (pattern, scope) {
        (Pattern::Free, Scope::Layer) => keep_largest(scores, count(share, scores.len()), &mut kept),
        (Pattern::Free, Scope::Row) => by_row(pool, scores, cols, &mut kept, |s, k| {
            keep_largest(s, count(share, cols), k);
        }),
        (Pattern::Runs { keep, of }, _) => by_row(pool, scores, cols, &mut kept, |s, k| keep_of_runs(s, keep, of, k)),
    }
    Ok(kept)
}

fn by_row(pool: &Pool, scores: &[f32], cols: usize, kept: &mut [bool], f: impl Fn(&[f32], &mut [bool]) + Sync) {
    rows::each(pool, kept, cols, |row, k| f(&scores[row * cols..][..cols], k));
}

/// That runs of a pattern fill rows.
///
/// # Errors
/// The layer, its columns and what would do.
pub fn check_runs(layer: &Layer<'_>, pattern: Pattern) -> Result<(), MethodError> {
    match pattern {
        Pattern::Runs { keep, of } if keep == 0 || keep >= of => {
            refuse(layer, format!("pattern {keep}:{of}: of each run at least one and not all must stay"))
        }
        Pattern::Runs { keep, of } if !layer.inputs.is_multiple_of(of) => {
            let columns = layer.inputs;
            refuse(
                layer,
                format!(
                    "pattern {keep}:{of} needs rows of whole runs, and {columns} columns are none; use a run that divides them, or unstructured"
                ),
            )
        }
        _ => Ok(()),
    }
}

/// The weights with what is not kept set to zero.
pub fn masked(weight: &[f32], kept: &[bool]) -> Vec<f32> {
    weight.iter().zip(kept).map(|(w, k)| if *k { *w } else { 0.0 }).collect()
}

/// Scores with those of entries that an earlier step dropped below all others, so that they are dropped again first.
pub fn after_earlier(scores: &mut [f32], kept: Option<&[bool]>) {
    if let Some(kept) = kept {
        scores.iter_mut().zip(kept).filter(|(_, k)| !**k).for_each(|(s, _)| *s = -1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(scores: &[f32], drop: usize) -> Vec<usize> {
        let mut mask = vec![true; scores.len()];
        keep_largest(scores, drop, &mut mask);
        mask.iter().enumerate().filter(|(_, k)| **k).map(|(i, _)| i).collect()
    }

    #[test]
    fn of_equal_scores_the_first_stay() {
        assert_eq!(kept(&[1.0, 2.0, 1.0, 1.0], 2), [0, 1]);
        assert_eq!(kept(&[0.0; 5], 3), [0, 1]);
        assert_eq!(kept(&[3.0, 1.0, 2.0], 0), [0, 1, 2]);
        assert!(kept(&[3.0, 1.0], 2).is_empty() && kept(&[], 0).is_empty());
    }

    #[test]
    fn counts_are_those_of_the_share() {
        assert_eq!([0.0, 0.3, 0.5, 0.7, 0.6].map(|s| count(s, 10)), [0, 3, 5, 7, 6]);
        assert_eq!((count(0.5, 7), count(1.0, 7), count(1.0 / 3.0, 9)), (3, 7, 3));
    }

    #[test]
    fn runs_keep_their_number() {
        let mut mask = vec![true; 10];
        keep_of_runs(&[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 9.0, 9.0], 2, 4, &mut mask);
        assert_eq!(mask, [false, true, true, false, true, true, false, false, true, true]);
    }
}
