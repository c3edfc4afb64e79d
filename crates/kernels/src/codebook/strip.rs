//! Unpacking rows to BF16, for matrix products and dense copies.

use super::{BLOCK, Codebook, scalar};
use crate::Isa;
use std::ops::Range;

/// Writes all of `w` into `out` in BF16, row after row.
///
/// # Panics
/// If `out` has not two bytes for each number.
pub fn dense(w: &Codebook, out: &mut [u8]) {
    assert_eq!(out.len(), 2 * w.rows() * w.cols(), "two bytes for each number");
    unpack(crate::isa::get(), w, 0..w.rows(), 0..w.cols(), out);
}

/// Writes columns `cols` of rows `rows` of `w` into `out` in BF16, row after row. `cols` begins at a multiple of 128 and ends
/// at one or at the last column.
pub(crate) fn unpack(isa: Isa, w: &Codebook, rows: Range<usize>, cols: Range<usize>, out: &mut [u8]) {
    assert!(isa.is_available(), "{isa} is not available here");
    assert!(rows.end <= w.rows() && cols.end <= w.cols(), "numbers that are not there");
    for (row, out) in rows.zip(out.chunks_exact_mut((2 * cols.len()).max(1))) {
        let whole = if isa.has_avx512() { cols.len() / super::UNIT * super::UNIT } else { 0 };
        let (first, rest) = out.split_at_mut(2 * whole);
        #[cfg(target_arch = "x86_64")]
        if whole > 0 {
            // SAFETY: the assertion checked that the CPU has this instruction set.
            unsafe { super::avx512::unpack(w, row, cols.start, first) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        debug_assert!(first.is_empty());
        debug_assert!((cols.start + whole).is_multiple_of(BLOCK));
        scalar::unpack(w, row, cols.start + whole, rest);
    }
}
