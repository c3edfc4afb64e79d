//! Unpacking a strip of rows from left to right, as matrix products want it: each row goes on where it stopped.

use super::{Bitmap, Cursor};
use crate::Isa;
use std::ops::Range;

/// Bytes that are fetched at once.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// The places of the rows of one strip.
#[derive(Default)]
pub(crate) struct Strip {
    /// Where the bytes of the matrix begin, and the rows.
    of: (usize, Range<usize>),
    /// The column that is next.
    next: usize,
    cursors: Vec<Cursor>,
    /// Bytes that a row has on average between these columns.
    span: usize,
}

/// Rows that are fetched ahead. Where a unit begins is known when the one before has arrived, so a row that must come from
/// memory is a chain of misses.
const AHEAD: usize = 4;

impl Strip {
    /// Goes to columns `cols` of rows `rows` of `w`, which begin at a multiple of 256 and end at one or at the last column.
    pub(crate) fn go_to(&mut self, w: &Bitmap, rows: Range<usize>, cols: Range<usize>) {
        let of = (w.data().as_ptr().addr(), rows.clone());
        if cols.start == 0 || cols.start != self.next || of != self.of {
            self.cursors.clear();
            self.cursors.extend(rows.map(|row| Cursor::new(w, row)));
            self.cursors.iter_mut().for_each(|c| c.skip(w, cols.start));
        }
        (self.of, self.next) = (of, cols.end);
        // No unit takes three bytes per column, whatever the bytes of a damaged matrix add up to.
        self.span = (w.data().len() / w.rows().max(1) * cols.len() / w.cols().max(1)).min(3 * cols.len());
        (0..AHEAD).for_each(|i| self.fetch(w, i));
    }

    /// Fetches the next columns of the `i`-th row, if there is one.
    fn fetch(&self, w: &Bitmap, i: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some(cursor) = self.cursors.get(i) {
            let from = w.data().as_ptr().wrapping_add(cursor.place());
            (0..self.span + LINE).step_by(LINE).for_each(|at| crate::x86::prefetch(from.wrapping_add(at)));
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (w, i);
    }

    /// Writes the columns of the `i`-th of the rows into `out` in the dense format; once for each.
    pub(crate) fn unpack(&mut self, isa: Isa, w: &Bitmap, i: usize, out: &mut [u8]) {
        self.fetch(w, i + AHEAD);
        self.cursors[i].unpack(isa, w, out);
    }
}
