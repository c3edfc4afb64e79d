//! How one run of numbers is stored, and a checked view of a matrix made of such runs.

/// Storage of a contiguous run of numbers. Block formats follow the GGUF definitions (ggml, `ggml-common.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE 754 single precision, little-endian.
    F32,
    /// IEEE 754 half precision, little-endian.
    F16,
    /// The upper 16 bits of a single, little-endian.
    Bf16,
    /// Blocks of 32: f16 scale, 32 signed bytes.
    Q8_0,
    /// Blocks of 32: f16 scale, 16 bytes of two 4-bit codes (element j low, j + 16 high), value `d * (q - 8)`.
    Q4_0,
    /// Super-blocks of 256 in 8 sub-blocks with 6-bit scales and minima: 144 bytes.
    Q4K,
    /// Super-blocks of 256 in 16 sub-blocks with 8-bit scales, 6-bit codes: 210 bytes.
    Q6K,
}

impl Format {
    /// Every format, in the order of the declaration.
    pub const ALL: [Format; 7] =
        [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K];

    /// Numbers in one block; a run must be a multiple of this.
    pub const fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 => 1,
            Format::Q8_0 | Format::Q4_0 => 32,
            Format::Q4K | Format::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::Bf16 => 2,
            Format::Q8_0 => 34,
            Format::Q4_0 => 18,
            Format::Q4K => 144,
            Format::Q6K => 210,
        }
    }

    /// Bytes of a run of `n` numbers; `None` if `n` is not a multiple of the block or the size overflows.
    pub const fn run_bytes(self, n: usize) -> Option<usize> {
        if !n.is_multiple_of(self.block_len()) {
            return None;
        }
        (n / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The name users know (GGUF's).
    pub const fn name(self) -> &'static str {
        match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::Bf16 => "BF16",
            Format::Q8_0 => "Q8_0",
            Format::Q4_0 => "Q4_0",
            Format::Q4K => "Q4_K",
            Format::Q6K => "Q6_K",
        }
    }
}

/// A matrix of `rows` runs of `cols` numbers each, stored one after the other without gaps.
///
/// Output-major weights `W[out, in]` have `rows = out` (dot form); input-major weights `W^T[in, out]` have
/// `rows = in` (axpy form). The bytes need no alignment.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    /// Kept because kernels ask per row, and a division takes as long as reading a hundred bytes.
    row_bytes: usize,
    data: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// A view of `data`; `None` if the length is not exactly that of `rows` runs of `cols` numbers.
    pub fn new(format: Format, rows: usize, cols: usize, data: &'a [u8]) -> Option<Self> {
        let row_bytes = format.run_bytes(cols)?;
        (row_bytes.checked_mul(rows)? == data.len()).then_some(Self { format, rows, cols, row_bytes, data })
    }

    /// How the runs are stored.
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

    /// Bytes of one run.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// All bytes.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// The bytes of run `row`.
    ///
    /// # Panics
    /// If `row` is not below [`Matrix::rows`].
    pub fn row(&self, row: usize) -> &'a [u8] {
        let n = self.row_bytes;
        &self.data[row * n..][..n]
    }
}

/// What remains of `row` after its whole groups of `BYTES`, padded with zeros.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
pub(crate) fn last_group<const BYTES: usize>(row: &[u8]) -> [u8; BYTES] {
    let rest = row.as_chunks::<BYTES>().1;
    let mut group = [0; BYTES];
    group[..rest.len()].copy_from_slice(rest);
    group
}
