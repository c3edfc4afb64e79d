//! Several weighted sums over the columns of one matrix: a channel that more than one of them uses comes from memory once.
//!
//! Each sum goes over its own channels as it does alone, so it has the bits that [`super::run`] gives; the sums take
//! turns with the same weights, and the union of the channels is never computed with.

use super::{Columns, Made, Part, run_parts};
use crate::{Isa, Pool, isa};

/// The sums `y_k = sum_i value_k[i] * W[:, index_k[i]]`.
pub struct Job<'a> {
    /// The weight by its columns.
    pub w: Columns<'a>,
    /// For each sum its channel numbers, each below `w.inputs()` (only ascending ones are shared well), and their values.
    pub x: &'a [(&'a [u32], &'a [f32])],
    /// `x.len()` rows of `w.outputs()` results, overwritten.
    pub y: &'a mut [f32],
}

/// Computes all jobs in one parallel region.
///
/// # Panics
/// If the lengths of a job do not fit together or a channel number is too large.
pub fn run(pool: &Pool, jobs: &mut [Job]) {
    run_on(isa::get(), pool, jobs);
}

/// [`run`] with the instruction set chosen by the caller.
///
/// # Panics
/// As [`run`], and if this CPU lacks `isa`.
pub fn run_on(isa: Isa, pool: &Pool, jobs: &mut [Job]) {
    assert!(isa.is_available(), "{isa} is not available here");
    let mut made = Made::default();
    let parts = jobs.iter_mut().map(|job| Part::new(isa, job.w, job.x, job.y, &mut made)).collect();
    run_parts(isa, pool, parts);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, stored};
    use crate::{Format, Matrix, axpy};

    #[test]
    fn every_sum_has_the_bits_it_has_alone() {
        let mut random = Random(21);
        for format in Format::ALL {
            for (rows, cols) in [(1, 256), (700, 256 * 3), (2100, 512)] {
                let bytes = stored(format, rows * cols, &mut random);
                let wt = Matrix::new(format, rows, cols, &bytes).unwrap();
                let mut lists: Vec<(Vec<u32>, Vec<f32>)> = [1, 2, 5, 1000]
                    .map(|m| {
                        let index: Vec<u32> = (0..rows as u32).filter(|i| i % m == 0).collect();
                        let value = random.floats(index.len());
                        (index, value)
                    })
                    .into();
                // An empty list, and one that does not ascend.
                lists.push((vec![], vec![]));
                lists.push((vec![rows as u32 - 1, 0], vec![0.5, -2.0]));
                for isa in isa::available() {
                    let x: Vec<(&[u32], &[f32])> = lists.iter().map(|(i, v)| (&i[..], &v[..])).collect();
                    let mut y = vec![f32::NAN; x.len() * cols];
                    run_on(isa, &Pool::new(2), &mut [Job { w: wt.into(), x: &x, y: &mut y }]);
                    for ((index, value), y) in lists.iter().zip(y.chunks_exact(cols)) {
                        let mut want = vec![f32::NAN; cols];
                        axpy::run_on(isa, &Pool::new(1), &mut [axpy::Job { w: wt.into(), index, value, y: &mut want }]);
                        let same = y.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same, "{format:?} {isa} {rows} x {cols}, {} channels", index.len());
                    }
                }
            }
        }
    }
}
