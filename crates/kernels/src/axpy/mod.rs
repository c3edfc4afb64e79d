//! Decode products in input-major form: a weighted sum of chosen rows of `W^T`, straight from the stored blocks.
//!
//! Every output is the sum over the channels in the order of the index, one multiply-add each, so it depends neither
//! on the threads nor on the slices. Channels whose value is exactly zero are skipped: leaving them out of the index
//! gives the same bits.

mod scalar;
#[cfg(test)]
mod tests;

use crate::{Isa, Matrix, Pool, isa};

/// One product `y = sum_i value[i] * WT[index[i], :]`.
pub struct Job<'a> {
    /// `[in, out]`: a row per input channel.
    pub wt: Matrix<'a>,
    /// Channel numbers, each below `wt.rows()`; ascending order reads memory best.
    pub index: &'a [u32],
    /// What each channel is multiplied with; as many as `index`.
    pub value: &'a [f32],
    /// `wt.cols()` results, overwritten.
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

/// Outputs per slice are a multiple of this: whole blocks of every format, whole cache lines of `y`.
const ALIGN: usize = 256;

/// A job cut into slices of outputs.
struct Part<'a> {
    channels: Channels<'a>,
    y: *mut f32,
    per_claim: usize,
}

// SAFETY: `y` comes from an exclusive borrow that lives as long as the region, and claims write disjoint parts of it.
unsafe impl Sync for Part<'_> {}

/// What is summed.
#[derive(Clone, Copy)]
struct Channels<'a> {
    wt: Matrix<'a>,
    index: &'a [u32],
    value: &'a [f32],
}

impl<'a> Part<'a> {
    fn new(job: &'a mut Job, threads: usize) -> Self {
        let cols = job.wt.cols();
        assert_eq!(job.index.len(), job.value.len(), "channels and values differ in number");
        assert_eq!(job.y.len(), cols, "results and columns differ in number");
        let rows = job.wt.rows();
        assert!(job.index.iter().all(|&i| (i as usize) < rows), "a channel number is not below {rows}");
        let per_claim = cols.div_ceil(slices(threads)).next_multiple_of(ALIGN);
        let channels = Channels { wt: job.wt, index: job.index, value: job.value };
        Self { channels, y: job.y.as_mut_ptr(), per_claim }
    }

    fn claims(&self) -> usize {
        self.channels.wt.cols().div_ceil(self.per_claim.max(1))
    }

    fn run_claim(&self, isa: Isa, claim: usize) {
        let first = claim * self.per_claim;
        let len = self.per_claim.min(self.channels.wt.cols() - first);
        // SAFETY: `first + len` is at most the number of columns, which is the length of `y`; every claim runs once
        // and covers its own columns, so the slices do not overlap.
        let y = unsafe { std::slice::from_raw_parts_mut(self.y.add(first), len) };
        compute(isa, &self.channels, first, y);
    }
}

/// Slices a job is cut into: one for a lone thread, else some per thread, so that a slow thread holds up little.
fn slices(threads: usize) -> usize {
    if threads == 1 { 1 } else { 4 * threads }
}

/// Outputs `first..first + y.len()`.
fn compute(isa: Isa, channels: &Channels, first: usize, y: &mut [f32]) {
    let _ = isa;
    y.fill(0.0);
    for (&channel, &value) in channels.index.iter().zip(channels.value) {
        if value != 0.0 {
            scalar::add(channels.wt.format(), slice(&channels.wt, channel, first, y.len()), value, y);
        }
    }
}

/// The bytes of columns `first..first + len` of one channel; `first` is a multiple of [`ALIGN`].
fn slice<'a>(wt: &Matrix<'a>, channel: u32, first: usize, len: usize) -> &'a [u8] {
    let format = wt.format();
    let at = |n: usize| n / format.block_len() * format.block_bytes();
    &wt.row(channel as usize)[at(first)..at(first + len)]
}
