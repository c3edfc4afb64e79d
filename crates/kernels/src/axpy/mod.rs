//! Decode products in input-major form: a weighted sum of chosen rows of `W^T`, straight from the stored blocks.
//!
//! Channels whose value is exactly zero are skipped: leaving them out of the index gives the same bits. The others are
//! added in an order that depends on their number alone, so neither the threads nor other sums change a bit.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod multi;
mod scalar;
#[cfg(test)]
mod tests;

use crate::{Format, Isa, Matrix, Pool, elementwise, isa};
use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;
use std::slice::from_raw_parts_mut;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel};

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
    let parts = jobs.iter_mut().map(|job| Part::new(job.wt, &[(job.index, job.value)], job.y)).collect();
    run_parts(isa, pool, parts);
}

fn run_parts(isa: Isa, pool: &Pool, mut parts: Vec<Part>) {
    assert!(isa.is_available(), "{isa} is not available here");
    let mut scratch = SCRATCH.take();
    let wanted = parts.iter().map(Part::scratch).sum();
    if scratch.len() < wanted {
        scratch.resize(wanted, 0.0);
    }
    let mut rest = &mut scratch[..];
    for part in &mut parts {
        rest = part.take_scratch(rest);
    }
    let claims = parts.iter().map(Part::claims).sum();
    pool.run(claims, &|_, mut claim| {
        for part in &parts {
            if claim < part.claims() {
                return part.run_claim(isa, claim);
            }
            claim -= part.claims();
        }
    });
    SCRATCH.set(scratch);
}

thread_local! {
    /// Partial sums, kept from call to call.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Outputs per slice are a multiple of this: whole blocks of every format, whole cache lines of `y`.
const ALIGN: usize = 256;
/// Most outputs of a slice: their sums stay in the first cache.
const SLICE: usize = 4096;
/// Fewest channels of a chunk: their bytes are large against the sums that are kept for it.
const CHUNK: usize = 256;
/// Claims that a job is cut into at most, unless it has more slices.
const CLAIMS: usize = 8;

/// Bytes of weights that all sums of a job use before the next ones are read: they stay in the second cache.
const SHARED: usize = 256 << 10;

/// One sum of a job; the channels whose value is zero are left out.
struct Sum<'a> {
    index: Cow<'a, [u32]>,
    value: Cow<'a, [f32]>,
    chunks: usize,
    y: *mut f32,
    /// The sums of each chunk, if there are several.
    partial: *mut f32,
}

impl<'a> Sum<'a> {
    fn new(wt: &Matrix, (index, value): (&'a [u32], &'a [f32]), slices: usize, y: &mut [f32]) -> Self {
        assert_eq!(index.len(), value.len(), "channels and values differ in number");
        let rows = wt.rows();
        assert!(index.iter().all(|&i| (i as usize) < rows), "a channel number is not below {rows}");
        let (mut index, mut value) = (Cow::Borrowed(index), Cow::Borrowed(value));
        if value.contains(&0.0) {
            let live = index.iter().zip(&*value).filter(|&(_, &value)| value != 0.0);
            let (some_index, some_value) = live.unzip();
            (index, value) = (Cow::Owned(some_index), Cow::Owned(some_value));
        }
        let chunks = (index.len() / CHUNK).min(CLAIMS / slices.max(1)).max(1);
        Self { index, value, chunks, y: y.as_mut_ptr(), partial: std::ptr::null_mut() }
    }

    /// Where the sums of `chunk` go in a matrix of `cols` columns.
    fn target(&self, chunk: usize, cols: usize) -> *mut f32 {
        // `wrapping_add` asks for no proof here: whoever writes there gives one.
        if self.chunks == 1 { self.y } else { self.partial.wrapping_add(chunk * cols) }
    }
}

/// Sums over one matrix, cut into slices of outputs, and these into chunks of channels: rows stay long, which memory
/// reads best. The cut of a sum depends on it alone, and its chunks are added in order, so neither the threads nor
/// the other sums change a bit.
struct Part<'a> {
    wt: Matrix<'a>,
    sums: Vec<Sum<'a>>,
    /// Claims per slice: the most chunks of a sum.
    per_slice: usize,
    /// Claims that are not done, per slice.
    left: Vec<AtomicUsize>,
}

// SAFETY: the pointers come from exclusive borrows that live as long as the region. Claims write disjoint parts of
// them; the chunks of a slice are added up by the claim that finds all others of the slice done.
unsafe impl Sync for Part<'_> {}

impl<'a> Part<'a> {
    /// `y` has a row per sum.
    fn new(wt: Matrix<'a>, x: &[(&'a [u32], &'a [f32])], y: &'a mut [f32]) -> Self {
        let cols = wt.cols();
        assert_eq!(y.len(), cols * x.len(), "results and columns differ in number");
        let slices = cols.div_ceil(SLICE);
        let rows = y.chunks_exact_mut(cols.max(1));
        let sums: Vec<_> = x.iter().zip(rows).map(|(&x, y)| Sum::new(&wt, x, slices, y)).collect();
        let per_slice = sums.iter().map(|s| s.chunks).max().unwrap_or(0);
        let left = (0..slices).map(|_| AtomicUsize::new(per_slice)).collect();
        Self { wt, sums, per_slice, left }
    }

    fn scratch(&self) -> usize {
        self.sums.iter().filter(|s| s.chunks > 1).map(|s| s.chunks * self.wt.cols()).sum()
    }

    /// Takes [`Part::scratch`] numbers and returns the others.
    fn take_scratch<'b>(&mut self, mut rest: &'b mut [f32]) -> &'b mut [f32] {
        for sum in self.sums.iter_mut().filter(|s| s.chunks > 1) {
            let (own, others) = rest.split_at_mut(sum.chunks * self.wt.cols());
            (sum.partial, rest) = (own.as_mut_ptr(), others);
        }
        rest
    }

    fn claims(&self) -> usize {
        self.left.len() * self.per_slice
    }

    fn run_claim(&self, isa: Isa, claim: usize) {
        let (slice, claim) = (claim / self.per_slice, claim % self.per_slice);
        let cols = self.wt.cols();
        let width = cols.div_ceil(self.left.len()).next_multiple_of(ALIGN);
        let first = (slice * width).min(cols);
        let len = width.min(cols - first);
        // SAFETY: `first + len` is at most the number of columns, which is the length of each row of results and of
        // each chunk's sums; every chunk is in one claim, which runs once, and a claim covers its own columns.
        let place = |start: *mut f32| unsafe { from_raw_parts_mut(start.add(first), len) };
        let mut work = Vec::with_capacity(self.sums.len());
        for sum in &self.sums {
            for chunk in (0..sum.chunks).filter(|chunk| chunk * self.per_slice / sum.chunks == claim) {
                let out = place(sum.target(chunk, cols));
                out.fill(0.0);
                work.push((Channels::new(self, sum, chunk, (first, len)), out));
            }
        }
        let most = work.iter().map(|(channels, _)| channels.len() * channels.bytes).max().unwrap_or(0);
        let steps = if work.len() > 1 { most.div_ceil(SHARED).max(1) } else { 1 };
        for step in 0..steps {
            for (channels, out) in &mut work {
                channels.step = (step, steps);
                accumulate(isa, channels, out);
            }
        }
        if self.left[slice].fetch_sub(1, AcqRel) == 1 {
            for sum in self.sums.iter().filter(|s| s.chunks > 1) {
                // All other claims of this slice are done and touch nothing any more.
                let y = place(sum.y);
                y.fill(0.0);
                (0..sum.chunks).for_each(|chunk| elementwise::add(y, place(sum.target(chunk, cols))));
            }
        }
    }
}

/// The bytes of one slice of outputs in all channels, and their values; none is zero.
struct Channels<'a> {
    format: Format,
    data: &'a [u8],
    index: &'a [u32],
    value: &'a [f32],
    stride: usize,
    start: usize,
    bytes: usize,
    /// Which of how many steps is to be done: several sums take turns with the same weights.
    step: (usize, usize),
}

impl<'a> Channels<'a> {
    /// A chunk of a sum in columns `first..first + len`; `first` is a multiple of [`ALIGN`].
    fn new(part: &Part<'a>, sum: &'a Sum<'a>, chunk: usize, (first, len): (usize, usize)) -> Self {
        let format = part.wt.format();
        let at = |n: usize| n / format.block_len() * format.block_bytes();
        let (start, bytes) = (at(first), at(len));
        let (data, stride) = (part.wt.data(), part.wt.row_bytes());
        let cut = |chunk: usize| chunk * sum.index.len() / sum.chunks;
        let (index, value) = (&sum.index[cut(chunk)..cut(chunk + 1)], &sum.value[cut(chunk)..cut(chunk + 1)]);
        Self { format, data, index, value, stride, start, bytes, step: (0, 1) }
    }

    fn len(&self) -> usize {
        self.index.len()
    }

    /// This step's share of `n` groups.
    fn groups(&self, n: usize) -> Range<usize> {
        let (step, steps) = self.step;
        n * step / steps..n * (step + 1) / steps
    }

    /// The channels after `done`, which no group holds: the last step's.
    #[cfg(target_arch = "x86_64")]
    fn rest(&self, done: usize) -> Range<usize> {
        let last = self.step.0 + 1 == self.step.1;
        if last { done..self.len() } else { 0..0 }
    }

    /// The bytes of channel `i` of the list.
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [u8] {
        &self.data[self.index[i] as usize * self.stride + self.start..][..self.bytes]
    }

    /// Channels `i`, `i + stretch`, `i + 2 stretch`...: far apart, because hardware prefetchers follow one stream per
    /// page and short rows that are adjacent share pages. Past the stretch it is the last group again.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn far<const C: usize>(&self, i: usize, stretch: usize) -> Group<'a, C> {
        let at = |k: usize| i.min(stretch - 1) + k * stretch;
        Group { rows: std::array::from_fn(|k| self.row(at(k))), value: std::array::from_fn(|k| self.value[at(k)]) }
    }
}

/// Channels that a kernel adds in one pass over the outputs.
#[cfg(target_arch = "x86_64")]
struct Group<'a, const C: usize> {
    rows: [&'a [u8]; C],
    value: [f32; C],
}

/// Adds the channels of a step to `y`.
fn accumulate(isa: Isa, channels: &Channels, y: &mut [f32]) {
    match isa {
        // SAFETY: `run_on` has checked that the CPU has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512::add(channels, y) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::add(channels, y) },
        _ => {
            for i in channels.groups(channels.len()) {
                scalar::add(channels.format, channels.row(i), channels.value[i], y);
            }
        }
    }
}
