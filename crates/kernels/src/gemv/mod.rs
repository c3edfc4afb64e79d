//! Decode products: one vector with the rows of a matrix, straight from the stored blocks.
//!
//! The result of a row depends on nothing but the row, the vector and the instruction set: not on the threads, the
//! chunks, or which other rows are computed. Float formats compute in f32 on widened weights; block formats take
//! exact integer dot products per block with the int8 form of the vector ([`Operand`]) and scale them in f32.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod multi;
#[cfg(target_arch = "x86_64")]
mod multi512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod operand;
pub(crate) mod runs;
mod scalar;
#[cfg(test)]
mod tests;

pub use operand::Operand;
pub(crate) use scalar::q4k_scales;

#[cfg(target_arch = "x86_64")]
use crate::x86::Ahead;
use crate::{Isa, Matrix, Pool, isa};

/// Least and most bytes of weights that one claim reads: large against the cost of a claim (some 20 ns) and against
/// what is fetched beyond its end, small against a region.
const CLAIM_BYTES: (usize, usize) = (8 << 10, 128 << 10);
/// Claims per thread that a region is cut into, within these limits.
const CLAIMS: usize = 16;
/// Most rows that a kernel computes side by side.
pub(crate) const WIDE: usize = 4;

/// One product `y = W x`.
pub struct Job<'a> {
    /// `[out, in]`: a row per entry of `y`.
    pub w: Matrix<'a>,
    /// A vector of `w.cols()` numbers, prepared for the format of `w`.
    pub x: &'a Operand,
    /// `w.rows()` results, overwritten.
    pub y: &'a mut [f32],
}

/// One product with chosen rows: `y[i] = W[rows[i]] · x`.
pub struct RowsJob<'a> {
    /// `[out, in]`.
    pub w: Matrix<'a>,
    /// Row numbers, each below `w.rows()`; ascending order reads memory best.
    pub rows: &'a [u32],
    /// A vector of `w.cols()` numbers, prepared for the format of `w`.
    pub x: &'a Operand,
    /// `rows.len()` results, overwritten.
    pub y: &'a mut [f32],
}

/// Computes all jobs in one parallel region.
///
/// # Panics
/// If the lengths of a job do not fit together, or its vector was not prepared for its format.
pub fn run(pool: &Pool, jobs: &mut [Job]) {
    run_on(isa::get(), pool, jobs);
}

/// [`run`] with the instruction set chosen by the caller.
///
/// # Panics
/// As [`run`], and if this CPU lacks `isa`.
pub fn run_on(isa: Isa, pool: &Pool, jobs: &mut [Job]) {
    let parts = jobs.iter_mut().map(|job| Part::new(&job.w, None, job.x, job.y)).collect();
    run_parts(isa, pool, parts);
}

/// Computes chosen rows of all jobs in one parallel region. Each result has the bits that [`run`] would give.
///
/// # Panics
/// As [`run`], and if a row number is too large.
pub fn run_rows(pool: &Pool, jobs: &mut [RowsJob]) {
    run_rows_on(isa::get(), pool, jobs);
}

/// [`run_rows`] with the instruction set chosen by the caller.
///
/// # Panics
/// As [`run_rows`], and if this CPU lacks `isa`.
pub fn run_rows_on(isa: Isa, pool: &Pool, jobs: &mut [RowsJob]) {
    let parts = jobs.iter_mut().map(|job| Part::new(&job.w, Some(job.rows), job.x, job.y)).collect();
    run_parts(isa, pool, parts);
}

/// A job cut into claims.
struct Part<'a> {
    rows: Rows<'a>,
    x: &'a Operand,
    y: *mut f32,
    per_claim: usize,
}

// SAFETY: `y` comes from an exclusive borrow that lives as long as the region, and claims write disjoint parts of it.
unsafe impl Sync for Part<'_> {}

impl<'a> Part<'a> {
    fn new(w: &Matrix<'a>, index: Option<&'a [u32]>, x: &'a Operand, y: &'a mut [f32]) -> Self {
        let rows = Rows { w: *w, index, start: 0, len: index.map_or(w.rows(), <[u32]>::len) };
        assert_eq!(y.len(), rows.len, "results and rows differ in number");
        assert_eq!(x.len(), w.cols(), "vector and rows differ in length");
        assert!(x.serves(w.format()), "the vector was not prepared for {}", w.format().name());
        Self { rows, x, y: y.as_mut_ptr(), per_claim: WIDE }
    }

    /// Rows times bytes.
    fn bytes(&self) -> usize {
        self.rows.len * self.rows.w.row_bytes()
    }

    fn cut(&mut self, claim_bytes: usize) {
        self.per_claim = (claim_bytes / self.rows.w.row_bytes().max(1)).next_multiple_of(WIDE).max(WIDE);
    }

    fn claims(&self) -> usize {
        self.rows.len.div_ceil(self.per_claim)
    }

    fn run_claim(&self, isa: Isa, claim: usize) {
        let start = claim * self.per_claim;
        let len = self.per_claim.min(self.rows.len - start);
        // SAFETY: `start + len` is at most the number of rows, which is the length of `y`; every claim runs once and
        // covers its own rows, so the slices do not overlap.
        let y = unsafe { std::slice::from_raw_parts_mut(self.y.add(start), len) };
        compute(isa, &Rows { start, len, ..self.rows }, self.x, y);
    }
}

fn run_parts(isa: Isa, pool: &Pool, mut parts: Vec<Part>) {
    assert!(isa.is_available(), "{isa} is not available here");
    let bytes: usize = parts.iter().map(Part::bytes).sum();
    let claim_bytes = (bytes / (CLAIMS * pool.threads())).clamp(CLAIM_BYTES.0, CLAIM_BYTES.1);
    parts.iter_mut().for_each(|part| part.cut(claim_bytes));
    pool.run_parts(&parts, Part::claims, |part, claim| part.run_claim(isa, claim));
}

/// The rows of one claim, in order.
#[derive(Clone, Copy)]
struct Rows<'a> {
    w: Matrix<'a>,
    index: Option<&'a [u32]>,
    start: usize,
    len: usize,
}

impl<'a> Rows<'a> {
    /// The bytes of the claim's row `i`.
    #[inline(always)]
    fn get(&self, i: usize) -> &'a [u8] {
        let i = self.start + i;
        self.w.row(self.index.map_or(i, |index| index[i] as usize))
    }

    /// The bytes of the row that comes `i` after the claim's first, if there is one: to prefetch beyond the claim.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn peek(&self, i: usize) -> Option<&'a [u8]> {
        let i = self.start + i;
        let row = match self.index {
            Some(index) => *index.get(i)? as usize,
            None => i,
        };
        (row < self.w.rows()).then(|| self.w.row(row))
    }

    /// Rows `i`, `i + stretch`, `i + 2 stretch`..., and behind each the one that comes next.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn far<const R: usize>(&self, i: usize, stretch: usize) -> Ahead<'a, R> {
        let rows: [_; R] = std::array::from_fn(|k| self.get(i + k * stretch));
        Ahead::new(rows, std::array::from_fn(|k| self.peek(i + 1 + k * stretch).unwrap_or(rows[k])))
    }
}

fn compute(isa: Isa, rows: &Rows, x: &Operand, y: &mut [f32]) {
    match isa {
        // SAFETY: `run_parts` has checked that the CPU has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512::compute(rows, x, y) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::compute(rows, x, y) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::compute(rows, x, y),
        _ => {
            for (i, y) in y.iter_mut().enumerate() {
                *y = scalar::dot(rows.w.format(), rows.get(i), x);
            }
        }
    }
}
