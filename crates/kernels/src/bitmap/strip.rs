//! Unpacking a strip of rows from left to right, as matrix products want it: each row goes on where it stopped.

use super::{Bitmap, Cursor};
use crate::Isa;
use std::ops::Range;

/// The places of the rows of one strip.
#[derive(Default)]
pub(crate) struct Strip {
    /// Where the bytes of the matrix begin, and the rows.
    of: (usize, Range<usize>),
    /// The column that is next.
    next: usize,
    cursors: Vec<Cursor>,
}

impl Strip {
    /// Writes columns `cols` of rows `rows` of `w` into `out` in the dense format, row after row. `cols` begins at a
    /// multiple of 256 and ends at one or at the last column.
    pub(crate) fn unpack(&mut self, isa: Isa, w: &Bitmap, rows: Range<usize>, cols: Range<usize>, out: &mut [u8]) {
        let of = (w.data().as_ptr().addr(), rows.clone());
        if cols.start == 0 || cols.start != self.next || of != self.of {
            self.cursors.clear();
            self.cursors.extend(rows.clone().map(|row| Cursor::new(w, row)));
            self.cursors.iter_mut().for_each(|c| c.skip(w, cols.start));
        }
        (self.of, self.next) = (of, cols.end);
        let row = out.len() / rows.len().max(1);
        for (cursor, out) in self.cursors.iter_mut().zip(out.chunks_exact_mut(row.max(1))) {
            cursor.unpack(isa, w, out);
        }
    }
}
