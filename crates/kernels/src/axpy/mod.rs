//! Decode products in input-major form: a weighted sum of chosen rows of `W^T`, straight from the stored blocks.
//!
//! Every output is the sum over the channels in the order of the index, one multiply-add each, so it depends neither
//! on the threads nor on the slices. Channels whose value is exactly zero are skipped: leaving them out of the index
//! gives the same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod multi;
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
        let per_claim = slice_cols(&job.wt, threads);
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

/// Columns per claim: a few slices per thread, so that a slow thread holds up little, but pieces of a row that are long
/// enough to read well and short enough that the pieces of two groups of channels stay in the first cache.
fn slice_cols(wt: &Matrix, threads: usize) -> usize {
    let cols_of = |bytes: usize| bytes * wt.cols() / wt.row_bytes().max(1);
    let wanted = wt.cols().div_ceil(2 * threads);
    wanted.clamp(cols_of(PIECE_BYTES.0), cols_of(PIECE_BYTES.1)).next_multiple_of(ALIGN).max(ALIGN)
}

/// Shortest and longest piece of a row in one claim, in bytes.
const PIECE_BYTES: (usize, usize) = (512, 2048);

/// Outputs `first..first + y.len()`.
fn compute(isa: Isa, channels: &Channels, first: usize, y: &mut [f32]) {
    y.fill(0.0);
    accumulate(isa, channels, first, y);
}

/// Adds the channels to the outputs `first..first + y.len()`.
fn accumulate(isa: Isa, channels: &Channels, first: usize, y: &mut [f32]) {
    let live = Live { channels, first, len: y.len(), at: 0 };
    match isa {
        // SAFETY: `run_on` has checked that the CPU has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512::add(channels.wt.format(), live, y) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::add(channels.wt.format(), live, y) },
        _ => live.for_each(|(row, value)| scalar::add(channels.wt.format(), row, value, y)),
    }
}

/// The channels whose value is not zero: their bytes of the slice and their values, in order.
struct Live<'a> {
    channels: &'a Channels<'a>,
    first: usize,
    len: usize,
    at: usize,
}

impl<'a> Iterator for Live<'a> {
    type Item = (&'a [u8], f32);

    fn next(&mut self) -> Option<Self::Item> {
        let Channels { wt, index, value } = self.channels;
        while let Some(&value) = value.get(self.at) {
            let channel = index[self.at];
            self.at += 1;
            if value != 0.0 {
                return Some((slice(wt, channel, self.first, self.len), value));
            }
        }
        None
    }
}

/// Channels that a kernel adds in one pass over the outputs.
#[cfg(target_arch = "x86_64")]
struct Group<'a, const C: usize> {
    rows: [&'a [u8]; C],
    value: [f32; C],
    len: usize,
}

#[cfg(target_arch = "x86_64")]
impl<'a, const C: usize> Group<'a, C> {
    /// The next channels, up to `C`; fewer only at the end.
    fn take(live: &mut Live<'a>) -> Self {
        let mut group = Self { rows: [&[]; C], value: [0.0; C], len: 0 };
        for (row, value) in live.take(C) {
            group.rows[group.len] = row;
            group.value[group.len] = value;
            group.len += 1;
        }
        group
    }
}

/// The bytes of columns `first..first + len` of one channel; `first` is a multiple of [`ALIGN`].
fn slice<'a>(wt: &Matrix<'a>, channel: u32, first: usize, len: usize) -> &'a [u8] {
    let format = wt.format();
    let at = |n: usize| n / format.block_len() * format.block_bytes();
    &wt.row(channel as usize)[at(first)..at(first + len)]
}
