//! Matrices as codes of pairs of weights: each code names an entry of a small book, two numbers in eight bits.
//!
//! # Layout
//! Pair `16 b + j` of a row is columns `32 b + j` and `32 b + 16 + j`: the two halves of a block of Q4_0, so that the vector
//! that is prepared for Q4_0 serves here too. With `B` bits for a weight (2 to 4) a code has `2 B` bits and a book `4^B`
//! entries. One book serves a span of columns (a multiple of 128) in the rows that name it.
//!
//! | part | bytes |
//! |---|---|
//! | header: `LCBK`, version 1, `B`, two zeros, then as u32: rows, columns, span, books of a span | 24, up to 64 |
//! | which of the books of each span a row uses, u16 | 2 per row, up to a multiple of 64 |
//! | exponents, i8: an entry stands for itself times 2^exponent; by book, then span | 1 per book, up to a multiple of 64 |
//! | books: all first numbers plus 128, then all second ones; by book, then span | `2 * 4^B` per book |
//! | rows: codes as a stream of bits, low bits first | `4 B` per block of 32 columns |
//! | zeros, so that kernels read whole registers | [`PADDING`] |
//!
//! Powers of two make every number exact in BF16, which matrix products and dense copies are computed in. Whatever the codes
//! are, they name an entry; whatever a row names, it is cut to the books there are: damaged bytes give other numbers and
//! never a read outside.
//!
//! # Kernels
//! A product with one vector is in integers, as for Q4_0: codes become bytes by shifts (AVX-512: `vpmultishiftqb`), bytes
//! become weights by permutes of tables that lie in registers or the first cache (16 and 64 entries: one `vpermb` for each of
//! the two numbers; 256: two `vpermi2b`), and meet the codes of the vector in `vpdpbusd`. AVX2 has `pshufb`, once or four
//! times, and reads books of 256 entries number by number. Sums of a span are scaled once. Matrix products unpack a strip of
//! rows to BF16.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod gemv;
mod pack;
mod scalar;
mod strip;
#[cfg(test)]
mod tests;

pub use gemv::{Job, run, run_on};
pub use pack::{Parts, pack};
pub use strip::dense;
pub(crate) use strip::unpack;

use crate::{Format, Isa};

/// Whether a product of codes of `bits` bits with one vector is faster with this instruction set than one of the same numbers
/// in BF16 from memory (`cargo bench --bench gemv -- what=codebook`; figures in docs/benchmarks.md).
pub const fn pays(isa: Isa, bits: usize) -> bool {
    match isa {
        Isa::Avx512 | Isa::Amx => true,
        Isa::Avx2 => bits == 2,
        Isa::Scalar | Isa::Neon => false,
    }
}

/// Zeros at the end of the bytes.
pub const PADDING: usize = 64;

/// What vectors must be prepared for ([`crate::gemv::Operand::prepare`]).
pub const OPERAND: Format = Format::Q4_0;

/// What the numbers are unpacked to: it holds each exactly.
pub const DENSE: Format = Format::Bf16;

/// Columns of a span are a multiple of this.
pub const UNIT: usize = 128;

/// Columns of a block of pairs.
pub const BLOCK: usize = 32;

/// The first bytes.
const MAGIC: [u8; 8] = *b"LCBK\x01\0\0\0";

/// Bytes of the header.
const HEADER: usize = 64;

/// Entries of a book.
pub const fn entries(bits: usize) -> usize {
    1 << (2 * bits)
}

/// Bytes of a row of `cols` columns.
pub const fn row_bytes(bits: usize, cols: usize) -> usize {
    cols.div_ceil(BLOCK) * 4 * bits
}

/// A view of a matrix of `rows` rows and `cols` columns, stored as described above.
#[derive(Clone, Copy, Debug)]
pub struct Codebook<'a> {
    bits: usize,
    rows: usize,
    cols: usize,
    span: usize,
    books: usize,
    of_row: &'a [u8],
    exponents: &'a [u8],
    tables: &'a [u8],
    /// With the padding.
    codes: &'a [u8],
    data: &'a [u8],
}

/// Up to a multiple of 64.
fn padded(bytes: usize) -> Option<usize> {
    bytes.checked_next_multiple_of(64)
}

/// Where the parts begin and everything ends: rows' books, exponents, tables, codes, end.
fn places(bits: usize, rows: usize, cols: usize, books: usize, span: usize) -> Option<[usize; 5]> {
    let all = books.checked_mul(cols.div_ceil(span).max(1))?;
    let exponents = HEADER.checked_add(padded(rows.checked_mul(2)?)?)?;
    let tables = exponents.checked_add(padded(all)?)?;
    let codes = tables.checked_add(all.checked_mul(2 * entries(bits))?)?;
    let end = codes.checked_add(rows.checked_mul(row_bytes(bits, cols))?)?.checked_add(PADDING)?;
    Some([HEADER, exponents, tables, codes, end])
}

impl<'a> Codebook<'a> {
    /// A view of `data`; `None` if its header is not one of `rows` by `cols`, or the bytes are not as many as that takes.
    pub fn new(rows: usize, cols: usize, data: &'a [u8]) -> Option<Self> {
        if data.get(..5)? != &MAGIC[..5] || data.len() < HEADER {
            return None;
        }
        let number = |i: usize| data[8 + 4 * i..].first_chunk().map(|b| u32::from_le_bytes(*b) as usize);
        let bits = usize::from(data[5]);
        let (span, books) = (number(2)?, number(3)?);
        let fits = (2..=4).contains(&bits) && span > 0 && span.is_multiple_of(UNIT) && books > 0;
        if !fits || (number(0)?, number(1)?) != (rows, cols) {
            return None;
        }
        let [of_row, exponents, tables, codes, end] = places(bits, rows, cols, books, span)?;
        if data.len() != end {
            return None;
        }
        Some(Self {
            bits,
            rows,
            cols,
            span,
            books,
            of_row: &data[of_row..exponents],
            exponents: &data[exponents..tables],
            tables: &data[tables..codes],
            codes: &data[codes..],
            data,
        })
    }

    /// Bits of a weight.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All bytes.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Spans of a row.
    fn spans(&self) -> usize {
        self.cols.div_ceil(self.span)
    }

    /// The codes of row `row` and what lies behind them.
    #[inline]
    fn row(&self, row: usize) -> &'a [u8] {
        &self.codes[row * row_bytes(self.bits, self.cols)..]
    }

    /// The number of the first of the books of row `row`, that of its first span.
    #[inline]
    fn first_book(&self, row: usize) -> usize {
        let book = usize::from(u16::from_le_bytes([self.of_row[2 * row], self.of_row[2 * row + 1]]));
        book.min(self.books - 1) * self.spans()
    }

    /// The numbers of book `book`, plus 128: the first ones, then the second ones.
    #[inline]
    fn table(&self, book: usize) -> &'a [u8] {
        let size = 2 * entries(self.bits);
        &self.tables[book * size..][..size]
    }

    /// What the entries of book `book` are multiplied by.
    #[inline]
    fn scale(&self, book: usize) -> f32 {
        let exponent = i32::from(self.exponents[book] as i8);
        f32::from_bits(((exponent + 127).max(0) as u32) << 23)
    }
}
