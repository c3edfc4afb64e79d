//! The exact solution of a layer's least squares on given places.

use super::{factor::cholesky, rows};
use faer::{
    Mat, Par,
    linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place},
};
use lacuna_core::compress::Layer;
use std::sync::{Mutex, PoisonError};

/// Row by row, the weights at the places `kept` with the smallest error: `w_S = w0_S + (C_SS)^-1 C_SR w0_R`. And the rows that
/// were not solved for.
pub fn solved(layer: &Layer<'_>, gram: &Mat<f64>, kept: &[bool]) -> (Vec<f32>, Vec<usize>) {
    let n = layer.inputs;
    let unsolved = Mutex::new(Vec::new());
    let mut weight = layer.weight.to_vec();
    rows::each(layer.pool, &mut weight, n, |r, row| {
        let mask = &kept[r * n..][..n];
        let of = |which: bool| (0..n).filter(|j| mask[*j] == which).collect::<Vec<usize>>();
        let (stay, gone) = (of(true), of(false));
        let lost = |i: usize| gone.iter().map(|j| gram[(stay[i], *j)] * f64::from(row[*j])).sum::<f64>();
        let mut x = Mat::from_fn(stay.len(), 1, |i, _| lost(i));
        // Parts of a positive definite matrix are positive definite; a row that rounding keeps from being factored stays
        // as it was.
        if let Some(lower) = cholesky(Mat::from_fn(stay.len(), stay.len(), |i, j| gram[(stay[i], stay[j])]), Par::Seq) {
            solve_lower_triangular_in_place(lower.as_ref(), x.as_mut(), Par::Seq);
            solve_upper_triangular_in_place(lower.transpose(), x.as_mut(), Par::Seq);
        } else {
            x.fill(0.0);
            unsolved.lock().unwrap_or_else(PoisonError::into_inner).push(r);
        }
        gone.iter().for_each(|j| row[*j] = 0.0);
        stay.iter().enumerate().for_each(|(i, j)| row[*j] = (f64::from(row[*j]) + x[(i, 0)]) as f32);
    });
    let mut unsolved = unsolved.into_inner().unwrap_or_else(PoisonError::into_inner);
    unsolved.sort_unstable();
    (weight, unsolved)
}

/// `notes`, and which rows were left as they were.
pub fn noted(layer: &Layer<'_>, mut notes: Vec<String>, unsolved: &[usize]) -> Vec<String> {
    if let Some(first) = unsolved.first() {
        let (n, rows, place) = (unsolved.len(), layer.outputs, layer.place);
        notes.push(format!(
            "{place}: {n} of {rows} rows (the first: {first}) cannot be solved for and keep their weights at their places; use more \
             calibration tokens (--tokens)"
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::tools::testing::Case;

    #[test]
    fn rows_that_are_not_solved_for_are_told() {
        let case = Case::random(75, 4, 6, 50);
        let kept: Vec<bool> = (0..24).map(|i| i / 6 != 2 || i % 6 < 1).collect();
        // Not positive definite in all places but the first, so that row 2 alone can be solved for.
        let gram = Mat::from_fn(6, 6, |i, j| if i == j && i > 0 { -1.0 } else { f64::from(u8::from(i == j)) });
        let (weight, unsolved) = solved(&case.layer(), &gram, &kept);
        assert_eq!(unsolved, [0, 1, 3]);
        assert_eq!(weight[..6], case.weight[..6]);
        let notes = noted(&case.layer(), Vec::new(), &unsolved);
        assert!(notes[0].contains("3 of 4 rows") && notes[0].contains("layers.0.mlp.up"), "{notes:?}");
        assert!(noted(&case.layer(), Vec::new(), &[]).is_empty());
    }
}
