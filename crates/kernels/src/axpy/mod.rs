//! Decode products in input-major form: a weighted sum of chosen columns of `W`, straight from the stored blocks.
//!
//! Channels whose value is exactly zero are skipped: leaving them out of the index gives the same bits. The others are
//! added in an order that depends on their number alone, so neither the threads nor other sums change a bit.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod groups;
pub mod multi;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(test)]
mod tests;

use crate::{Format, Isa, Matrix, Pool, elementwise, isa};
use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;
use std::ptr;
use std::slice::from_raw_parts_mut;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::AcqRel},
};

/// The columns of a weight `W[out, in]`, one per input channel.
#[derive(Clone, Copy, Debug)]
pub enum Columns<'a> {
    /// `W^T[in, out]`: a run per channel.
    Runs(Matrix<'a>),
    /// Codes per channel, scales per group of channels.
    Groups(groups::Groups<'a>),
}

impl Columns<'_> {
    /// Number of channels.
    pub fn inputs(&self) -> usize {
        match self {
            Self::Runs(m) => m.rows(),
            Self::Groups(g) => g.inputs(),
        }
    }

    /// Length of a channel.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Runs(m) => m.cols(),
            Self::Groups(g) => g.outputs(),
        }
    }

    /// Bytes that a sum over the channels `index` (ascending) reads.
    pub fn bytes_of(&self, index: &[u32]) -> usize {
        match self {
            Self::Runs(m) => index.len() * m.row_bytes(),
            Self::Groups(g) => g.bytes_of(index),
        }
    }
}

impl<'a> From<Matrix<'a>> for Columns<'a> {
    /// Of `W^T[in, out]`.
    fn from(wt: Matrix<'a>) -> Self {
        Self::Runs(wt)
    }
}

/// One product `y = sum_i value[i] * W[:, index[i]]`.
pub struct Job<'a> {
    /// The weight by its columns.
    pub w: Columns<'a>,
    /// Channel numbers, each below `w.inputs()`; ascending order reads memory best.
    pub index: &'a [u32],
    /// What each channel is multiplied with; as many as `index`.
    pub value: &'a [f32],
    /// `w.outputs()` results, overwritten.
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
    let parts = jobs.iter_mut().map(|job| Part::new(isa, job.w, &[(job.index, job.value)], job.y, &mut made)).collect();
    run_parts(isa, pool, parts);
}

fn run_parts(isa: Isa, pool: &Pool, mut parts: Vec<Part>) {
    let mut scratch = SCRATCH.take();
    let wanted = parts.iter().map(Part::scratch).sum();
    if scratch.len() < wanted {
        scratch.resize(wanted, 0.0);
    }
    let mut rest = &mut scratch[..];
    for part in &mut parts {
        rest = part.take_scratch(rest);
    }
    pool.run_parts(&parts, Part::claims, |part, claim| part.run_claim(isa, claim));
    SCRATCH.set(scratch);
}

thread_local! {
    /// Partial sums, kept from call to call.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Outputs per slice are a multiple of this: whole blocks of every format, whole cache lines of `y`.
const ALIGN: usize = 256;
/// Most outputs of a slice: their sums stay in the second cache. Shorter slices keep them in the first one and lose more
/// than that: a channel's bytes come in pieces then, and hardware prefetchers run on into those of later slices (4096
/// instead: Q4_0 at 0.6 of the streaming rate in place of 0.85, for 8192 outputs and more).
const SLICE: usize = 16384;
/// Fewest channels of a chunk: their bytes are large against the sums that are kept for it.
const CHUNK: usize = 256;
/// Claims that a job is cut into at most, unless it has more slices.
const CLAIMS: usize = 8;

/// Bytes of weights that all sums of a job use before the next ones are read: they stay in the second cache.
const SHARED: usize = 256 << 10;

/// What a sum adds up: the channels whose value is not zero.
enum Terms<'a> {
    /// Channels and their values.
    Runs(Matrix<'a>, Cow<'a, [u32]>, Cow<'a, [f32]>),
    /// Channels by groups, with their values in integers.
    Groups(groups::Groups<'a>, Arc<groups::Operand>),
}

/// Values in integers that projections of one input share: the list, its format, and what was made of them.
type Made<'a> = Vec<(&'a [u32], &'a [f32], Format, Arc<groups::Operand>)>;

impl<'a> Terms<'a> {
    fn new(isa: Isa, w: Columns<'a>, index: &'a [u32], value: &'a [f32], made: &mut Made<'a>) -> Self {
        if let Columns::Groups(w) = w {
            let same =
                |m: &&(&[u32], &[f32], Format, _)| ptr::eq(m.0, index) && ptr::eq(m.1, value) && m.2 == w.format();
            if let Some((.., operand)) = made.iter().find(same) {
                return Self::Groups(w, operand.clone());
            }
        }
        let list = (index, value);
        let (mut index, mut value) = (Cow::Borrowed(index), Cow::Borrowed(value));
        if value.contains(&0.0) {
            let live = index.iter().zip(&*value).filter(|&(_, &value)| value != 0.0);
            let (some_index, some_value) = live.unzip();
            (index, value) = (Cow::Owned(some_index), Cow::Owned(some_value));
        }
        match w {
            Columns::Runs(wt) => Self::Runs(wt, index, value),
            Columns::Groups(w) => {
                let operand = Arc::new(groups::Operand::new(isa, &w, &index, &value));
                made.push((list.0, list.1, w.format(), operand.clone()));
                Self::Groups(w, operand)
            }
        }
    }

    /// How many there are to cut into chunks, and the chunks that pay.
    fn len(&self) -> (usize, usize) {
        match self {
            Self::Runs(_, index, _) => (index.len(), index.len() / CHUNK),
            Self::Groups(_, x) => (x.len(), x.channels() / CHUNK),
        }
    }
}

/// One sum of a job.
struct Sum<'a> {
    terms: Terms<'a>,
    chunks: usize,
    y: *mut f32,
    /// The sums of each chunk, if there are several.
    partial: *mut f32,
}

impl<'a> Sum<'a> {
    fn new(
        (isa, w): (Isa, Columns<'a>),
        (index, value): (&'a [u32], &'a [f32]),
        slices: usize,
        y: &mut [f32],
        made: &mut Made<'a>,
    ) -> Self {
        assert_eq!(index.len(), value.len(), "channels and values differ in number");
        let inputs = w.inputs();
        assert!(index.iter().all(|&i| (i as usize) < inputs), "a channel number is not below {inputs}");
        let terms = Terms::new(isa, w, index, value, made);
        let (parts, chunks) = terms.len();
        let chunks = chunks.min(CLAIMS / slices.max(1)).min(parts).max(1);
        Self { terms, chunks, y: y.as_mut_ptr(), partial: ptr::null_mut() }
    }

    /// The terms of `chunk`.
    fn range(&self, chunk: usize) -> Range<usize> {
        let cut = |chunk: usize| chunk * self.terms.len().0 / self.chunks;
        cut(chunk)..cut(chunk + 1)
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
    w: Columns<'a>,
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
    fn new(isa: Isa, w: Columns<'a>, x: &[(&'a [u32], &'a [f32])], y: &'a mut [f32], made: &mut Made<'a>) -> Self {
        let cols = w.outputs();
        assert_eq!(y.len(), cols * x.len(), "results and columns differ in number");
        let slices = cols.div_ceil(SLICE);
        let rows = y.chunks_exact_mut(cols.max(1));
        let sums: Vec<_> = x.iter().zip(rows).map(|(&x, y)| Sum::new((isa, w), x, slices, y, made)).collect();
        let per_slice = sums.iter().map(|s| s.chunks).max().unwrap_or(0);
        let left = (0..slices).map(|_| AtomicUsize::new(per_slice)).collect();
        Self { w, sums, per_slice, left }
    }

    fn scratch(&self) -> usize {
        self.sums.iter().filter(|s| s.chunks > 1).map(|s| s.chunks * self.w.outputs()).sum()
    }

    /// Takes [`Part::scratch`] numbers and returns the others.
    fn take_scratch<'b>(&mut self, mut rest: &'b mut [f32]) -> &'b mut [f32] {
        for sum in self.sums.iter_mut().filter(|s| s.chunks > 1) {
            let (own, others) = rest.split_at_mut(sum.chunks * self.w.outputs());
            (sum.partial, rest) = (own.as_mut_ptr(), others);
        }
        rest
    }

    fn claims(&self) -> usize {
        self.left.len() * self.per_slice
    }

    fn run_claim(&self, isa: Isa, claim: usize) {
        let (slice, claim) = (claim / self.per_slice, claim % self.per_slice);
        let cols = self.w.outputs();
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
                work.push((Work::new(sum, chunk, (first, len)), out));
            }
        }
        let most = work.iter().map(|(work, _)| work.bytes()).max().unwrap_or(0);
        let steps = if work.len() > 1 { most.div_ceil(SHARED).max(1) } else { 1 };
        for step in 0..steps {
            for (work, out) in &mut work {
                work.add(isa, (step, steps), out);
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

/// A chunk of a sum in one slice of outputs.
enum Work<'a> {
    Runs(Channels<'a>),
    Groups { w: groups::Groups<'a>, x: &'a groups::Operand, range: Range<usize>, first: usize, len: usize },
}

impl<'a> Work<'a> {
    /// Outputs `first..first + len`; `first` is a multiple of [`ALIGN`].
    fn new(sum: &'a Sum<'a>, chunk: usize, (first, len): (usize, usize)) -> Self {
        let range = sum.range(chunk);
        match &sum.terms {
            Terms::Runs(wt, index, value) => {
                Self::Runs(Channels::new(*wt, &index[range.clone()], &value[range], (first, len)))
            }
            Terms::Groups(w, x) => Self::Groups { w: *w, x, range, first, len },
        }
    }

    /// Bytes of codes, about.
    fn bytes(&self) -> usize {
        match self {
            Self::Runs(channels) => channels.len() * channels.bytes,
            Self::Groups { w, range, len, .. } => {
                range.len() * groups::GROUP * w.row_bytes() * len / w.outputs().max(1)
            }
        }
    }

    /// Adds one of several steps to `y`.
    fn add(&mut self, isa: Isa, step: (usize, usize), y: &mut [f32]) {
        match self {
            Self::Runs(channels) => {
                channels.step = step;
                accumulate(isa, channels, y);
            }
            Self::Groups { w, x, range, first, .. } => {
                let cut = |n: usize| range.start + range.len() * n / step.1;
                groups::add(isa, w, x, cut(step.0)..cut(step.0 + 1), *first, y);
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
    /// Channels in columns `first..first + len`; `first` is a multiple of [`ALIGN`].
    fn new(wt: Matrix<'a>, index: &'a [u32], value: &'a [f32], (first, len): (usize, usize)) -> Self {
        let format = wt.format();
        let at = |n: usize| n / format.block_len() * format.block_bytes();
        let (start, bytes) = (at(first), at(len));
        Self { format, data: wt.data(), index, value, stride: wt.row_bytes(), start, bytes, step: (0, 1) }
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
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
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
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline(always)]
    fn far<const C: usize>(&self, i: usize, stretch: usize) -> Group<'a, C> {
        let at = |k: usize| i.min(stretch - 1) + k * stretch;
        Group { rows: std::array::from_fn(|k| self.row(at(k))), value: std::array::from_fn(|k| self.value[at(k)]) }
    }
}

/// Channels that a kernel adds in one pass over the outputs.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
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
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::add(channels, y),
        _ => {
            for i in channels.groups(channels.len()) {
                scalar::add(channels.format, channels.row(i), channels.value[i], y);
            }
        }
    }
}
