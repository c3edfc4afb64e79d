//! Decode products of matrices in layouts of their own: the threads' shares of the rows, for one vector or several.

use super::{CLAIM_BYTES, CLAIMS, Operand, WIDE};
use crate::{Isa, Pool};

/// Bytes of weights that are used for all vectors before the next ones are read: they stay in the second cache.
const BLOCK_BYTES: usize = 64 << 10;

/// A matrix whose kernels compute runs of rows.
pub(crate) trait Runs: Copy + Sync {
    /// Rows, columns and bytes in all.
    fn size(&self) -> (usize, usize, usize);
    /// What vectors must be prepared for.
    fn operand(&self) -> crate::Format;
    /// Rows `first ..` times `x`, as many as `y` has room for. `isa` is available.
    fn compute(&self, isa: Isa, first: usize, x: &Operand, y: &mut [f32]);
}

/// Matrix, vectors, and a row of results per vector.
pub(crate) type Product<'a, W> = (W, &'a [&'a Operand], &'a mut [f32]);

/// Computes all products in one parallel region.
///
/// # Panics
/// If the lengths of one do not fit together, a vector was not prepared for its matrix, or this CPU lacks `isa`.
pub(crate) fn run_on<'a, W: Runs + 'a>(isa: Isa, pool: &Pool, products: Vec<Product<'a, W>>) {
    assert!(isa.is_available(), "{isa} is not available here");
    let bytes: usize = products.iter().map(|p| p.0.size().2).sum();
    let claim_bytes = (bytes / (CLAIMS * pool.threads())).clamp(CLAIM_BYTES.0, CLAIM_BYTES.1);
    let parts: Vec<_> = products.into_iter().map(|p| Part::new(p, claim_bytes)).collect();
    pool.run_parts(&parts, Part::claims, |part, claim| part.run_claim(isa, claim));
}

/// A product cut into claims.
struct Part<'a, W> {
    w: W,
    rows: usize,
    x: &'a [&'a Operand],
    y: *mut f32,
    per_claim: usize,
    /// Rows that are used for all vectors before the next ones.
    per_block: usize,
}

// SAFETY: `y` comes from an exclusive borrow that lives as long as the region, and claims write disjoint parts of it.
unsafe impl<W: Sync> Sync for Part<'_, W> {}

impl<'a, W: Runs> Part<'a, W> {
    fn new((w, x, y): Product<'a, W>, claim_bytes: usize) -> Self {
        let (rows, cols, bytes) = w.size();
        assert_eq!(y.len(), rows * x.len(), "results and rows differ in number");
        for x in x {
            assert_eq!(x.len(), cols, "vector and rows differ in length");
            assert!(x.serves(w.operand()), "the vector was not prepared for {}", w.operand().name());
        }
        let row = (bytes / rows.max(1)).max(1);
        let run = |bytes: usize| (bytes / row).next_multiple_of(WIDE).max(WIDE);
        let per_block = if x.len() == 1 { usize::MAX } else { run(BLOCK_BYTES) };
        Self { w, rows, x, y: y.as_mut_ptr(), per_claim: run(claim_bytes), per_block }
    }

    fn claims(&self) -> usize {
        self.rows.div_ceil(self.per_claim)
    }

    fn run_claim(&self, isa: Isa, claim: usize) {
        let (mut start, end) = (claim * self.per_claim, ((claim + 1) * self.per_claim).min(self.rows));
        while start < end {
            let len = self.per_block.min(end - start);
            for (i, x) in self.x.iter().enumerate() {
                // SAFETY: `start + len` is at most the number of rows, and there are as many rows of results as
                // vectors; every claim runs once and covers its own rows, so the slices do not overlap.
                let y = unsafe { std::slice::from_raw_parts_mut(self.y.add(i * self.rows + start), len) };
                self.w.compute(isa, start, x, y);
            }
            start += len;
        }
    }
}
