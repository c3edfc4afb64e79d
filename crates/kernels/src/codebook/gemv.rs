//! Decode products: the threads' shares of the rows.

use super::{Codebook, OPERAND};
use crate::gemv::Operand;
use crate::{Isa, Pool, isa};

/// Least and most bytes of weights that one claim reads, as in the dense products.
const CLAIM_BYTES: (usize, usize) = (8 << 10, 128 << 10);
/// Claims per thread that a region is cut into, within these limits.
const CLAIMS: usize = 16;
/// Most rows that a kernel computes side by side.
pub(super) const WIDE: usize = 4;
/// Bytes of weights that are used for all vectors before the next ones are read: they stay in the second cache.
const BLOCK_BYTES: usize = 64 << 10;

/// The products `y_i = W x_i` of some vectors. Each result has the bits that it has alone.
pub struct Job<'a> {
    /// `[out, in]`.
    pub w: Codebook<'a>,
    /// Vectors of `w.cols()` numbers, prepared for [`OPERAND`].
    pub x: &'a [&'a Operand],
    /// `x.len()` rows of `w.rows()` results, overwritten.
    pub y: &'a mut [f32],
}

/// Computes all jobs in one parallel region.
///
/// # Panics
/// If the lengths of a job do not fit together, or a vector was not prepared for its format.
pub fn run(pool: &Pool, jobs: &mut [Job]) {
    run_on(isa::get(), pool, jobs);
}

/// [`run`] with the instruction set chosen by the caller.
///
/// # Panics
/// As [`run`], and if this CPU lacks `isa`.
pub fn run_on(isa: Isa, pool: &Pool, jobs: &mut [Job]) {
    assert!(isa.is_available(), "{isa} is not available here");
    let bytes: usize = jobs.iter().map(|j| j.w.data().len()).sum();
    let claim_bytes = (bytes / (CLAIMS * pool.threads())).clamp(CLAIM_BYTES.0, CLAIM_BYTES.1);
    let parts: Vec<_> = jobs.iter_mut().map(|job| Part::new(job, claim_bytes)).collect();
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

/// A job cut into claims.
struct Part<'a> {
    w: Codebook<'a>,
    x: &'a [&'a Operand],
    y: *mut f32,
    per_claim: usize,
    /// Rows that are used for all vectors before the next ones.
    per_block: usize,
}

// SAFETY: `y` comes from an exclusive borrow that lives as long as the region, and claims write disjoint parts of it.
unsafe impl Sync for Part<'_> {}

impl<'a> Part<'a> {
    fn new(job: &'a mut Job, claim_bytes: usize) -> Self {
        let w = job.w;
        assert_eq!(job.y.len(), w.rows() * job.x.len(), "results and rows differ in number");
        for x in job.x {
            assert_eq!(x.len(), w.cols(), "vector and rows differ in length");
            assert!(x.serves(OPERAND), "the vector was not prepared for codebooks");
        }
        let row = w.data().len() / w.rows().max(1);
        let rows = |bytes: usize| (bytes / row.max(1)).next_multiple_of(WIDE).max(WIDE);
        let per_block = if job.x.len() == 1 { usize::MAX } else { rows(BLOCK_BYTES) };
        Self { w, x: job.x, y: job.y.as_mut_ptr(), per_claim: rows(claim_bytes), per_block }
    }

    fn claims(&self) -> usize {
        self.w.rows().div_ceil(self.per_claim)
    }

    fn run_claim(&self, isa: Isa, claim: usize) {
        let (mut start, end) = (claim * self.per_claim, ((claim + 1) * self.per_claim).min(self.w.rows()));
        while start < end {
            let len = self.per_block.min(end - start);
            for (i, x) in self.x.iter().enumerate() {
                // SAFETY: `start + len` is at most the number of rows, and there are as many rows of results as
                // vectors; every claim runs once and covers its own rows, so the slices do not overlap.
                let y = unsafe { std::slice::from_raw_parts_mut(self.y.add(i * self.w.rows() + start), len) };
                compute(isa, &self.w, start, x, y);
            }
            start += len;
        }
    }
}

/// Rows `first ..` of `w` with `x`, as many as `y` has room for.
fn compute(isa: Isa, w: &Codebook, first: usize, x: &Operand, y: &mut [f32]) {
    match isa {
        // SAFETY: `run_on` has checked that the CPU has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { super::avx512::compute(w, first, x, y) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { super::avx2::compute(w, first, x, y) },
        _ => {
            for (i, y) in y.iter_mut().enumerate() {
                *y = super::scalar::dot(w, first + i, x);
            }
        }
    }
}
