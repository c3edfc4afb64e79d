//! The factor that the column sweep needs: the upper triangular `U` with `(H + damping)^-1 = U^T U`.
//!
//! The published codes invert `H` and factor the inverse again. The same `U` is the inverse of the upper triangular `R`
//! with `H = R R^T`, and `R` is the ordinary Cholesky factor of `H` with rows and columns in reverse order: one
//! factorisation and one triangular inverse, in double precision.

use super::{DAMPING, refuse};
use faer::{
    Mat, MatMut, Par,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        cholesky::llt::factor,
        triangular_inverse,
        triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place},
    },
};
use lacuna_core::{
    compress::{Inputs, Layer},
    method::MethodError,
};

/// A factored Gram matrix.
pub struct Factor {
    /// `U[inputs, inputs]`, upper triangular, row after row.
    pub upper: Vec<f32>,
    /// Inputs that were never anything but zero.
    pub dead: Vec<bool>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// The Gram matrix and everything else that was seen of a layer's inputs.
///
/// # Errors
/// Nothing was seen, or numbers that are not finite.
pub fn seen<'a>(layer: &Layer<'a>) -> Result<(&'a Inputs, &'a [f64]), MethodError> {
    let Some((inputs, gram)) = layer.seen.and_then(|s| Some((s, s.gram.as_deref()?))) else {
        return refuse(layer, "nothing was seen of its inputs; give a calibration text (-f FILE)");
    };
    let n = layer.inputs;
    if let Some(j) = (0..n).find(|j| !gram[j * n + j].is_finite()) {
        return refuse(
            layer,
            format!("the squares of its input {j} do not add up to a finite number; the model overflows on this text"),
        );
    }
    Ok((inputs, gram))
}

/// The Gram matrix with the damping that it needs, so that it can be factored.
pub struct Damped {
    /// `H[inputs, inputs]`; inputs that were never anything but zero have a diagonal of about 1.
    pub gram: Mat<f64>,
    /// Its lower Cholesky factor.
    pub lower: Mat<f64>,
    /// Inputs that were never anything but zero.
    pub dead: Vec<bool>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// Damps what was seen of the inputs of `layer`.
///
/// # Errors
/// As [`factor()`].
pub fn damped(layer: &Layer<'_>) -> Result<Damped, MethodError> {
    let n = layer.inputs;
    let (result, notes) = with_damping(layer, |at| {
        let gram = Mat::from_fn(n, n, at);
        Some((cholesky(gram.clone(), Par::rayon(0))?, gram))
    })?;
    let ((lower, gram), seen) = (result, seen(layer)?.1);
    Ok(Damped { gram, lower, dead: (0..n).map(|j| seen[j * n + j] <= 0.0).collect(), notes })
}

/// `X` with `A X = B` for the positive definite `at`; `None` if it is none.
pub fn solve(n: usize, at: impl Fn(usize, usize) -> f64, b: &Mat<f64>) -> Option<Mat<f64>> {
    let lower = cholesky(Mat::from_fn(n, n, at), Par::rayon(0))?;
    let mut x = b.clone();
    solve_lower_triangular_in_place(lower.as_ref(), x.as_mut(), Par::rayon(0));
    solve_upper_triangular_in_place(lower.transpose(), x.as_mut(), Par::rayon(0));
    Some(x)
}

/// The lower factor of a positive definite matrix, whose upper triangle is ignored; `None` if it is none.
pub fn cholesky(mut a: Mat<f64>, par: Par) -> Option<Mat<f64>> {
    cholesky_in_place(a.as_mut(), par).then_some(a)
}

/// Whether there is a lower factor, which takes the place of the lower triangle.
fn cholesky_in_place(mut a: MatMut<'_, f64>, par: Par) -> bool {
    let n = a.nrows();
    let mut buffer = MemBuffer::new(factor::cholesky_in_place_scratch::<f64>(n, par, Default::default()));
    let stack = MemStack::new(&mut buffer);
    let done = factor::cholesky_in_place(a.as_mut(), Default::default(), par, stack, Default::default());
    done.is_ok() && (0..n).all(|i| a[(i, i)].is_finite() && a[(i, i)] > 0.0)
}

/// Factors what was seen of the inputs of `layer`.
///
/// # Errors
/// As [`seen`]; a matrix that cannot be factored even with the largest damping.
pub fn factor(layer: &Layer<'_>) -> Result<Factor, MethodError> {
    let n = layer.inputs;
    let (upper, notes) = with_damping(layer, |at| upper(n, at))?;
    let gram = seen(layer)?.1;
    Ok(Factor { upper, dead: (0..n).map(|j| gram[j * n + j] <= 0.0).collect(), notes })
}

/// What `make` gives for the entries of the Gram matrix with the first damping that lets it, and what a user should know.
fn with_damping<T>(
    layer: &Layer<'_>,
    make: impl Fn(&dyn Fn(usize, usize) -> f64) -> Option<T>,
) -> Result<(T, Vec<String>), MethodError> {
    let (inputs, gram) = seen(layer)?;
    let n = layer.inputs;
    let dead: Vec<bool> = (0..n).map(|j| gram[j * n + j] <= 0.0).collect();
    let diagonal = |j: usize| if dead[j] { 1.0 } else { gram[j * n + j] };
    let mean = (0..n).map(diagonal).sum::<f64>() / n.max(1) as f64;
    let mut notes = Vec::new();
    let count = dead.iter().filter(|d| **d).count();
    if count > 0 {
        notes.push(format!(
            "{}: {count} of {n} inputs were zero for all tokens; their weights become zero",
            layer.place
        ));
    }
    for share in DAMPING {
        let at = |i: usize, j: usize| if i == j { diagonal(i) + share * mean } else { gram[i * n + j] };
        if let Some(made) = make(&at) {
            if share > DAMPING[0] {
                notes.push(format!("{}: the Gram matrix needed damping of {share} of its mean diagonal", layer.place));
            }
            return Ok((made, notes));
        }
    }
    let tokens = inputs.tokens;
    refuse(
        layer,
        format!(
            "the Gram matrix of its {n} inputs over {tokens} tokens is singular even with damping; use more calibration tokens (--tokens), or a method that needs no factor, such as wanda or rtn"
        ),
    )
}

/// Columns that lie a multiple of some pages apart meet in the same sets of the caches: a line more between them makes the
/// factorisation of 8,192 inputs half as fast again.
const BETWEEN: usize = 8;

/// Entries of a square of a matrix that is turned at once.
const TURN: usize = 64;

/// `U` for the symmetric positive definite `at`; `None` if it is none.
fn upper(n: usize, at: impl Fn(usize, usize) -> f64) -> Option<Vec<f32>> {
    let last = n.saturating_sub(1);
    // By symmetry the entry of row `last - i`, column `last - j`; this way rows of the Gram matrix are read along.
    let entry = |i: usize, j: usize| if i >= j && i < n { at(last - j, last - i) } else { 0.0 };
    let mut a = Mat::from_fn(n + BETWEEN, n, entry);
    let par = Par::rayon(0);
    if !cholesky_in_place(a.get_mut(..n, ..), par) {
        return None;
    }
    let mut inverse = Mat::<f64>::zeros(n + BETWEEN, n);
    triangular_inverse::invert_lower_triangular(inverse.get_mut(..n, ..), a.get(..n, ..), par);
    drop(a);
    let mut out = vec![0.0_f32; n * n];
    for i0 in (0..n).step_by(TURN) {
        for j0 in (i0..n).step_by(TURN) {
            for i in i0..(i0 + TURN).min(n) {
                for j in j0.max(i)..(j0 + TURN).min(n) {
                    out[i * n + j] = inverse[(last - i, last - j)] as f32;
                }
            }
        }
    }
    (0..n).all(|i| out[i * n + i].is_finite() && out[i * n + i] > 0.0).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    #[test]
    fn inverse_is_the_product_of_the_factor() {
        for n in [1, 2, 7, 65] {
            let x = normal(n as u64, 3 * n * n);
            let gram = |i: usize, j: usize| {
                let sum: f64 = (0..3 * n).map(|t| f64::from(x[t * n + i]) * f64::from(x[t * n + j])).sum();
                sum + if i == j { 0.5 } else { 0.0 }
            };
            let u = upper(n, gram).unwrap();
            for i in 0..n {
                for j in 0..n {
                    // (U^T U H)[i, j]
                    let inverse = |i: usize, k: usize| {
                        (0..=i.min(k)).map(|m| f64::from(u[m * n + i]) * f64::from(u[m * n + k])).sum::<f64>()
                    };
                    let one: f64 = (0..n).map(|k| inverse(i, k) * gram(k, j)).sum();
                    assert!((one - if i == j { 1.0 } else { 0.0 }).abs() < 1e-3, "{n} {i} {j} {one}");
                }
            }
        }
    }

    #[test]
    fn singular_matrices_get_damping_or_are_refused_with_layer_and_remedy() {
        let mut case = crate::weights::tools::testing::Case::random(50, 2, 3, 0);
        // Two inputs that are always equal: singular, and good with the first damping.
        case.seen.gram = Some(vec![2.0, 2.0, 0.0, 2.0, 2.0, 0.0, 0.0, 0.0, 1.0]);
        assert!(super::factor(&case.layer()).is_ok_and(|f| f.notes.is_empty()));
        // No Gram matrix at all, as sums that overflowed in part leave it.
        case.seen.gram = Some(vec![1.0, 9.0, 9.0, 9.0, 1.0, 9.0, 9.0, 9.0, 1.0]);
        let told = super::factor(&case.layer()).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(
            told.starts_with("layers.0.mlp.up: ") && told.contains("singular") && told.contains("--tokens"),
            "{told}"
        );
        // Indefinite by a little: more damping, and a note.
        case.seen.gram = Some(vec![1.0, 1.05, 0.0, 1.05, 1.0, 0.0, 0.0, 0.0, 1.0]);
        assert!(super::factor(&case.layer()).is_ok_and(|f| f.notes[0].contains("damping of 0.1")));
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        assert!(upper(2, |i, j| if i == j { 1.0 } else { 2.0 }).is_none());
        assert!(upper(1, |_, _| f64::NAN).is_none());
        assert!(upper(0, |_, _| 0.0).is_some());
    }
}
