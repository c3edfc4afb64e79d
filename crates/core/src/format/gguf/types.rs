//! The types of tensors that ggml knows.

use crate::{
    error::{Error, Result},
    size::{Size, cap},
};
use lacuna_kernels::Format;

const REQUANTISE: &str = "Re-quantise the model, for example `llama-quantize --allow-requantize IN OUT Q4_K_M`, or get a Q4_K_M or Q8_0 file";

/// How the numbers of a tensor are stored (ggml, `ggml.h`; the gaps in the numbering are types that were removed).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are ggml's")]
#[allow(non_camel_case_types)]
pub enum TensorType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ2_XXS,
    IQ2_XS,
    IQ3_XXS,
    IQ1_S,
    IQ4_NL,
    IQ3_S,
    IQ2_S,
    IQ4_XS,
    I8,
    I16,
    I32,
    I64,
    F64,
    IQ1_M,
    BF16,
    TQ1_0,
    TQ2_0,
    MXFP4,
    NVFP4,
    Q1_0,
}

use TensorType as T;

/// Type, number in the file, name, numbers per block, bytes per block (gguf-py, `GGML_QUANT_SIZES`).
const TABLE: [(TensorType, u32, &str, u64, u64); 34] = [
    (T::F32, 0, "F32", 1, 4),
    (T::F16, 1, "F16", 1, 2),
    (T::Q4_0, 2, "Q4_0", 32, 18),
    (T::Q4_1, 3, "Q4_1", 32, 20),
    (T::Q5_0, 6, "Q5_0", 32, 22),
    (T::Q5_1, 7, "Q5_1", 32, 24),
    (T::Q8_0, 8, "Q8_0", 32, 34),
    (T::Q8_1, 9, "Q8_1", 32, 40),
    (T::Q2_K, 10, "Q2_K", 256, 84),
    (T::Q3_K, 11, "Q3_K", 256, 110),
    (T::Q4_K, 12, "Q4_K", 256, 144),
    (T::Q5_K, 13, "Q5_K", 256, 176),
    (T::Q6_K, 14, "Q6_K", 256, 210),
    (T::Q8_K, 15, "Q8_K", 256, 292),
    (T::IQ2_XXS, 16, "IQ2_XXS", 256, 66),
    (T::IQ2_XS, 17, "IQ2_XS", 256, 74),
    (T::IQ3_XXS, 18, "IQ3_XXS", 256, 98),
    (T::IQ1_S, 19, "IQ1_S", 256, 50),
    (T::IQ4_NL, 20, "IQ4_NL", 32, 18),
    (T::IQ3_S, 21, "IQ3_S", 256, 110),
    (T::IQ2_S, 22, "IQ2_S", 256, 82),
    (T::IQ4_XS, 23, "IQ4_XS", 256, 136),
    (T::I8, 24, "I8", 1, 1),
    (T::I16, 25, "I16", 1, 2),
    (T::I32, 26, "I32", 1, 4),
    (T::I64, 27, "I64", 1, 8),
    (T::F64, 28, "F64", 1, 8),
    (T::IQ1_M, 29, "IQ1_M", 256, 56),
    (T::BF16, 30, "BF16", 1, 2),
    (T::TQ1_0, 34, "TQ1_0", 256, 54),
    (T::TQ2_0, 35, "TQ2_0", 256, 66),
    (T::MXFP4, 39, "MXFP4", 32, 17),
    (T::NVFP4, 40, "NVFP4", 64, 36),
    (T::Q1_0, 41, "Q1_0", 128, 18),
];

impl TensorType {
    /// Every type, in ggml's order.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// The type numbered `id` in a file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a number that is no type known here.
    pub fn parse(id: u32) -> Result<Self> {
        let row = TABLE.iter().find(|row| row.1 == id);
        row.map(|row| row.0).ok_or_else(|| Error::unsupported(format!("tensor type number {id}"), REQUANTISE))
    }

    /// Its number in a file.
    pub fn id(self) -> u32 {
        TABLE[self as usize].1
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].2
    }

    /// Numbers in one block.
    pub fn block_len(self) -> usize {
        TABLE[self as usize].3 as usize
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        TABLE[self as usize].4 as usize
    }

    /// Bytes of a tensor with these axes, fastest first.
    ///
    /// # Errors
    /// If there are more than 2^40 numbers, or the fastest axis is no multiple of the block.
    pub fn size(self, dims: &[u64]) -> Result<Size> {
        let (_, _, name, block, bytes) = TABLE[self as usize];
        let elements = Size::product(dims.iter().copied())?;
        Error::check_limit("the number of elements", elements.0, cap::ELEMENTS)?;
        let row = dims.first().copied().unwrap_or(1);
        if !row.is_multiple_of(block) {
            return Err(Error::malformed(format!("{name} rows of {row} numbers"), format!("a multiple of {block}")));
        }
        Ok(elements.exactly_over(Size(block))?.times(Size(bytes))?)
    }

    /// The kernel format that is the same, bit for bit.
    pub fn format(self) -> Option<Format> {
        Format::ALL.into_iter().find(|f| f.name() == self.name())
    }

    /// The type of a kernel format.
    pub fn of(format: Format) -> Self {
        TABLE.iter().find(|row| row.2 == format.name()).map(|row| row.0).expect("every kernel format is a ggml type")
    }

    /// The error for a type that cannot be computed with.
    pub(super) fn unsupported(self) -> Error {
        Error::unsupported(format!("type {} as a weight", self.name()), REQUANTISE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_agrees_with_the_kernels() {
        for (i, t) in TensorType::all().enumerate() {
            assert_eq!((t as usize, format!("{t:?}"), TensorType::parse(t.id()).unwrap()), (i, t.name().to_owned(), t));
        }
        for f in Format::ALL {
            let t = TensorType::of(f);
            assert_eq!((t.format(), t.block_len(), t.block_bytes()), (Some(f), f.block_len(), f.block_bytes()));
        }
        assert!(TensorType::parse(4).is_err() && TensorType::parse(u32::MAX).is_err());
    }

    #[test]
    fn sizes() {
        assert_eq!(T::Q4_K.size(&[512, 3, 1, 1]).unwrap(), Size(6 * 144));
        assert!(T::Q4_K.size(&[128, 2]).is_err());
        assert!(T::F32.size(&[1 << 40, 2]).is_err());
        assert!(T::F32.size(&[1 << 32, 1 << 32, 1 << 32]).is_err());
    }
}
