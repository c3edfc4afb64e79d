//! From parts to bytes.

use super::{BLOCK, HEADER, MAGIC, PADDING, UNIT, entries, places, row_bytes};

/// A matrix in parts.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// Bits of a weight, 2 to 4.
    pub bits: usize,
    /// Columns.
    pub cols: usize,
    /// Columns that a book serves.
    pub span: usize,
    /// Which of the books of each span a row uses, one per row.
    pub of_row: &'a [u16],
    /// `[books, spans, 4^bits, 2]`.
    pub entries: &'a [i8],
    /// `[books, spans]`.
    pub exponents: &'a [i8],
    /// `[rows, 16 * blocks of columns]`.
    pub codes: &'a [u8],
}

/// The bytes of a matrix; `None` if the parts do not fit together, or a row names a book that is not there.
pub fn pack(p: &Parts<'_>) -> Option<Vec<u8>> {
    let fits = (2..=4).contains(&p.bits) && p.span > 0 && p.span.is_multiple_of(UNIT) && p.cols > 0;
    if !fits {
        return None;
    }
    let (rows, size, spans) = (p.of_row.len(), entries(p.bits), p.cols.div_ceil(p.span));
    let books = p.exponents.len() / spans;
    let pairs = p.cols.div_ceil(BLOCK) * 16;
    let fits = books > 0
        && p.exponents.len() == books * spans
        && p.entries.len() == p.exponents.len() * size * 2
        && p.codes.len() == rows * pairs
        && p.of_row.iter().all(|b| usize::from(*b) < books)
        && p.codes.iter().all(|c| usize::from(*c) < size);
    if !fits {
        return None;
    }
    let [of_row, exponents, tables, codes, end] = places(p.bits, rows, p.cols, books, p.span)?;
    let mut out = MAGIC.to_vec();
    out[5] = p.bits as u8;
    for number in [rows, p.cols, p.span, books] {
        out.extend(u32::try_from(number).ok()?.to_le_bytes());
    }
    out.resize(of_row.max(HEADER), 0);
    out.extend(p.of_row.iter().flat_map(|b| b.to_le_bytes()));
    out.resize(exponents, 0);
    out.extend(p.exponents.iter().map(|e| *e as u8));
    out.resize(tables, 0);
    for book in p.entries.as_chunks::<2>().0.chunks_exact(size) {
        out.extend(book.iter().map(|e| e[0] as u8 ^ 0x80));
        out.extend(book.iter().map(|e| e[1] as u8 ^ 0x80));
    }
    debug_assert_eq!(out.len(), codes);
    for row in p.codes.chunks_exact(pairs) {
        stream(p.bits, row, &mut out);
    }
    debug_assert_eq!(out.len() + PADDING, end);
    debug_assert_eq!(pairs / 16 * 4 * p.bits, row_bytes(p.bits, p.cols));
    out.resize(end, 0);
    Some(out)
}

/// Appends codes of `2 bits` bits, low bits first.
fn stream(bits: usize, codes: &[u8], out: &mut Vec<u8>) {
    let (mut held, mut n) = (0_u32, 0);
    for code in codes {
        held |= u32::from(*code) << n;
        n += 2 * bits;
        while n >= 8 {
            out.push(held as u8);
            held >>= 8;
            n -= 8;
        }
    }
}
