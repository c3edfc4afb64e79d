//! Matrices without their zeros: one bit per position, and the values whose bit is set packed behind.
//!
//! # Layout
//! A row is a chain of units, each a run of columns:
//!
//! | values | columns | bytes of a unit with `n` values |
//! |---|---:|---|
//! | BF16 | 64 | mask (8), values (`2 n`) |
//! | Q8_0 | 128 | two masks (16), four f16 scales (8), codes plus 128 (`n0 + n1`) |
//! | Q4_0 | 128 | two masks (16), four f16 scales (8), codes in nibbles (`max(n0, n1)`) |
//!
//! Bit `i` of a BF16 mask is column `i` of the unit. Block formats take the order of Q4_0 blocks instead, so that one integer
//! product and one set of scales serve a whole unit: the first mask covers columns 0 to 15 of each of the four blocks, the
//! second columns 16 to 31. In Q4_0 the values of the first lie in low nibbles, those of the second in high ones. Scales are
//! those of the blocks of 32, so the numbers are exactly the dense ones; columns behind the last are zeros. Units have no
//! padding between them: where the next one begins follows from the bits that are set, a chain of some ten cycles that
//! several rows side by side hide.
//!
//! All rows lie in one piece of bytes: `rows + 1` offsets (u64, little-endian, from the start of the piece), the rows, and
//! [`PADDING`] zeros that let kernels read whole registers.
//!
//! # Bytes
//! With a share `s` of zeros a weight takes `2 (1 - s) + 1/8` bytes in BF16, `(1 - s) + 3/16` in Q8_0, and about
//! `(1 - s)/2 + 3/16` in Q4_0 plus what its two halves differ by (0.018 at 50 %): less than dense above 6.25 %, 12.5 % and 28 %.
//!
//! N:M patterns need no layout of their own: 2:4 takes one bit per weight either as a bitmap or as pairs of two-bit
//! positions, 4:8 takes 1 as a bitmap and 1.5 as positions. Their units have equal sizes, and the halves of Q4_0 no
//! difference.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod gemv;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod scalar;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod shuffles;
mod strip;
#[cfg(test)]
mod tests;

pub use gemv::{Job, run, run_on};
pub use pack::{Cursor, pack, packed_bytes};
pub(crate) use strip::Strip;

use crate::Format;

/// Zeros at the end of the bytes: at least what the largest unit reads from its start on.
pub const PADDING: usize = 192;

/// Bytes of an offset.
const OFFSET: usize = 8;

/// The formats whose values can be packed.
pub const FORMATS: [Format; 3] = [Format::Bf16, Format::Q8_0, Format::Q4_0];

/// Columns of a unit; `None` for formats without such a layout.
pub const fn unit(format: Format) -> Option<usize> {
    match format {
        Format::Bf16 => Some(64),
        Format::Q8_0 | Format::Q4_0 => Some(128),
        Format::F32 | Format::F16 | Format::Q4K | Format::Q6K => None,
    }
}

/// What vectors must be prepared for ([`crate::gemv::Operand::prepare`]) to be multiplied with values of `format`.
pub const fn operand(format: Format) -> Format {
    match format {
        // The order of its blocks is that of the units.
        Format::Q8_0 => Format::Q4_0,
        other => other,
    }
}

/// A view of a matrix of `rows` runs of `cols` numbers, stored as described above.
#[derive(Clone, Copy, Debug)]
pub struct Bitmap<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    data: &'a [u8],
}

impl<'a> Bitmap<'a> {
    /// A view of `data`; `None` if the format has no such layout, `cols` is no multiple of its block, or the bytes are too
    /// few for the offsets and the padding. Damage beyond that is not looked for: kernels check every place that they read,
    /// and give NaN for rows that lead outside.
    pub fn new(format: Format, rows: usize, cols: usize, data: &'a [u8]) -> Option<Self> {
        unit(format)?;
        let least = rows.checked_add(1)?.checked_mul(OFFSET)?.checked_add(PADDING)?;
        (cols.is_multiple_of(format.block_len()) && data.len() >= least).then_some(Self { format, rows, cols, data })
    }

    /// How the values are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Number of runs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a run.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All bytes.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Where row `row` begins in [`Bitmap::data`], as its offset says (which may be wrong).
    fn start(&self, row: usize) -> usize {
        let at = self.data[row * OFFSET..].first_chunk().map_or(u64::MAX, |b| u64::from_le_bytes(*b));
        usize::try_from(at).unwrap_or(usize::MAX)
    }

    /// Where rows `row`, `row + stretch`, `row + 2 stretch`... begin.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline(always)]
    fn far<const R: usize>(&self, row: usize, stretch: usize) -> [usize; R] {
        std::array::from_fn(|k| self.start(row + k * stretch))
    }

    /// The last place where a unit may begin, so that all reads of it are inside the bytes.
    fn limit(&self) -> usize {
        self.data.len() - PADDING
    }

    /// Where the unit behind that at `at` begins; beyond everything if that is outside.
    fn next(&self, at: usize) -> usize {
        if at > self.limit() {
            return usize::MAX;
        }
        let (first, second) = (mask(&self.data[at..]), mask(&self.data[at + 8..]));
        at + pack::unit_bytes(self.format, [first, second].map(|m| m.count_ones() as usize))
    }

    /// Units of a row.
    fn units(&self) -> usize {
        unit(self.format).map_or(0, |n| self.cols.div_ceil(n))
    }
}

/// Eight bytes as a mask.
fn mask(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}
