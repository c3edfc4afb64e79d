//! Several weighted sums over one input-major matrix: a channel that more than one of them uses comes from memory once.
//!
//! Each sum goes over its own channels in their order, so it has the bits that [`super::run`] gives for it alone; the
//! union of the channels is never computed with.

use super::{Channels, accumulate, slice_cols};
use crate::{Isa, Matrix, Pool, isa};

/// Bytes of weights that all sums use before the next ones are read: they stay in the second cache.
const BLOCK_BYTES: usize = 256 << 10;

/// The sums `y_k = sum_i value_k[i] * WT[index_k[i], :]`.
pub struct Job<'a> {
    /// `[in, out]`: a row per input channel.
    pub wt: Matrix<'a>,
    /// For each sum its channel numbers, each below `wt.rows()` (only ascending ones are shared well), and their values.
    pub x: &'a [(&'a [u32], &'a [f32])],
    /// `x.len()` rows of `wt.cols()` results, overwritten.
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
    let parts: Vec<_> = jobs.iter_mut().map(|job| Part::new(job, pool.threads())).collect();
    let claims = parts.iter().map(Part::claims).sum();
    pool.run(claims, &|_, mut claim| {
        for part in &parts {
            if claim < part.claims() {
                return part.run_claim(isa, claim);
            }
            claim -= part.claims();
        }
    });
}

/// A job cut into slices of outputs.
struct Part<'a> {
    wt: Matrix<'a>,
    x: &'a [(&'a [u32], &'a [f32])],
    y: *mut f32,
    per_claim: usize,
}

// SAFETY: `y` comes from an exclusive borrow that lives as long as the region, and claims write disjoint parts of it.
unsafe impl Sync for Part<'_> {}

impl<'a> Part<'a> {
    fn new(job: &'a mut Job, threads: usize) -> Self {
        let (rows, cols) = (job.wt.rows(), job.wt.cols());
        assert_eq!(job.y.len(), cols * job.x.len(), "results and columns differ in number");
        for (index, value) in job.x {
            assert_eq!(index.len(), value.len(), "channels and values differ in number");
            assert!(index.iter().all(|&i| (i as usize) < rows), "a channel number is not below {rows}");
        }
        Self { wt: job.wt, x: job.x, y: job.y.as_mut_ptr(), per_claim: slice_cols(&job.wt, threads) }
    }

    fn claims(&self) -> usize {
        self.wt.cols().div_ceil(self.per_claim.max(1))
    }

    fn run_claim(&self, isa: Isa, claim: usize) {
        let cols = self.wt.cols();
        let first = claim * self.per_claim;
        let len = self.per_claim.min(cols - first);
        let piece = (self.wt.row_bytes() * len / cols.max(1)).max(1);
        let step = if self.x.len() == 1 { self.wt.rows() } else { (BLOCK_BYTES / piece).max(1) };
        let mut at = vec![0; self.x.len()];
        let mut end = 0;
        for i in 0..self.x.len() {
            self.results(i, first, len).fill(0.0);
        }
        while at.iter().zip(self.x).any(|(at, (index, _))| *at < index.len()) {
            end += step as u32;
            for (i, ((index, value), at)) in self.x.iter().zip(&mut at).enumerate() {
                let n = index[*at..].iter().take_while(|&&c| c < end).count();
                let (index, value) = (&index[*at..*at + n], &value[*at..*at + n]);
                accumulate(isa, &Channels { wt: self.wt, index, value }, first, self.results(i, first, len));
                *at += n;
            }
        }
    }

    /// Results `first..first + len` of sum `i`.
    #[allow(clippy::mut_from_ref, reason = "claims share the part and write disjoint slices")]
    fn results(&self, i: usize, first: usize, len: usize) -> &mut [f32] {
        // SAFETY: `first + len` is at most the number of columns, and there are as many rows of results as sums; every
        // claim runs once, covers its own columns and drops each slice before it takes the next.
        unsafe { std::slice::from_raw_parts_mut(self.y.add(i * self.wt.cols() + first), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, stored};
    use crate::{Format, axpy};

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
                    run_on(isa, &Pool::new(2), &mut [Job { wt, x: &x, y: &mut y }]);
                    for ((index, value), y) in lists.iter().zip(y.chunks_exact(cols)) {
                        let mut want = vec![f32::NAN; cols];
                        axpy::run_on(isa, &Pool::new(1), &mut [axpy::Job { wt, index, value, y: &mut want }]);
                        let same = y.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same, "{format:?} {isa} {rows} x {cols}, {} channels", index.len());
                    }
                }
            }
        }
    }
}
