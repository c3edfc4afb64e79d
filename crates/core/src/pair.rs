//! A matrix as the product of two smaller ones, `W = A B`: the bytes of both in one piece.
//!
//! | part | bytes |
//! |---|---|
//! | header: `LPAR`, version 1, kind of `B`, kind of `A`, zero, then as u32: rows, columns, rank, then as u64: bytes of `B`, of `A` | 36, up to 64 |
//! | `B`, `rank` rows of `columns` | up to a multiple of 64 |
//! | `A`, `rows` rows of `rank` | up to a multiple of 64 |
//!
//! Kinds: 0 F32, 1 F16, 2 BF16, 3 Q8_0, 4 Q4_0, 32 codes of pairs ([`lacuna_kernels::codebook`]).

use crate::{
    bytes::Bytes,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Format, codebook};

/// The first bytes; also what tells a piece of this kind from others.
pub const MAGIC: [u8; 5] = *b"LPAR\x01";

const HEADER: usize = 64;

const PLAIN: [Format; 5] = [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4_0];

const BOOKS: u8 = 32;

/// One factor, ready to be put into a piece.
#[derive(Clone, Debug)]
pub struct Factor {
    /// The format of its rows; `None`: codes of pairs.
    pub format: Option<Format>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

fn kind(format: Option<Format>) -> Option<u8> {
    match format {
        None => Some(BOOKS),
        Some(f) => PLAIN.iter().position(|p| *p == f).map(|i| i as u8),
    }
}

fn factor(kind: u8, outputs: usize, inputs: usize, bytes: Bytes) -> Option<Weight> {
    if kind == BOOKS {
        return Weight::new(codebook::DENSE, Orientation::Codebook, outputs, inputs, bytes);
    }
    Weight::new(*PLAIN.get(usize::from(kind))?, Orientation::OutputMajor, outputs, inputs, bytes)
}

/// The piece of `A` (`[rows, rank]`) and `B` (`[rank, columns]`); `None` for a format that no piece holds, or for sizes that
/// do not fit.
pub fn pack(rows: usize, columns: usize, rank: usize, down: &Factor, up: &Factor) -> Option<Vec<u8>> {
    let mut out = MAGIC.to_vec();
    out.extend([kind(down.format)?, kind(up.format)?, 0]);
    for number in [rows, columns, rank] {
        out.extend(u32::try_from(number).ok()?.to_le_bytes());
    }
    for part in [down, up] {
        out.extend((part.bytes.len() as u64).to_le_bytes());
    }
    out.resize(HEADER, 0);
    for part in [down, up] {
        out.extend(&part.bytes);
        out.resize(out.len().next_multiple_of(64), 0);
    }
    parse(rows, columns, &Bytes::from(out.clone()))?;
    Some(out)
}

/// `B` and `A` of a piece for a matrix of `rows` by `columns`; `None` if `bytes` are no such piece.
pub fn parse(rows: usize, columns: usize, bytes: &Bytes) -> Option<[Weight; 2]> {
    if bytes.get(..5)? != MAGIC || bytes.len() < HEADER {
        return None;
    }
    let number = |at: usize| bytes[at..].first_chunk().map(|b| u32::from_le_bytes(*b) as usize);
    let length = |at: usize| bytes[at..].first_chunk().and_then(|b| usize::try_from(u64::from_le_bytes(*b)).ok());
    let rank = number(16)?;
    if (number(8)?, number(12)?) != (rows, columns) || rank == 0 {
        return None;
    }
    let padded = |start: usize, length: usize| start.checked_add(length)?.checked_next_multiple_of(64);
    let (of_down, of_up) = (length(20)?, length(28)?);
    let middle = padded(HEADER, of_down)?;
    if padded(middle, of_up)? != bytes.len() {
        return None;
    }
    let down = factor(bytes[5], rank, columns, bytes.slice(HEADER..HEADER + of_down)?)?;
    let up = factor(bytes[6], rows, rank, bytes.slice(middle..middle + of_up)?)?;
    Some([down, up])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(format: Format, rows: usize, cols: usize) -> Factor {
        let bytes = (0..rows * format.run_bytes(cols).unwrap()).map(|i| (i % 61) as u8).collect();
        Factor { format: Some(format), bytes }
    }

    #[test]
    fn what_is_packed_is_read() {
        for (down, up) in [(Format::F32, Format::F32), (Format::Bf16, Format::Q8_0), (Format::Q4_0, Format::Q4_0)] {
            let (rows, cols, rank) = (37, 96, 32);
            let (b, a) = (plain(down, rank, cols), plain(up, rows, rank));
            let bytes = Bytes::from(pack(rows, cols, rank, &b, &a).unwrap());
            let weight = Weight::new(down, Orientation::LowRank, rows, cols, bytes.clone()).unwrap();
            let [first, second] = weight.factors().unwrap();
            assert_eq!((first.outputs(), first.inputs(), first.format()), (rank, cols, down));
            assert_eq!((second.outputs(), second.inputs(), second.format()), (rows, rank, up));
            assert_eq!((&first.bytes()[..], &second.bytes()[..]), (&b.bytes[..], &a.bytes[..]));
            assert!(Weight::new(down, Orientation::LowRank, rows + 1, cols, bytes.clone()).is_none());
            assert!(Weight::new(Format::Q6K, Orientation::LowRank, rows, cols, bytes).is_none());
        }
        assert!(pack(4, 256, 2, &plain(Format::Q4K, 2, 256), &plain(Format::F32, 4, 2)).is_none(), "no kind for it");
        assert!(pack(4, 8, 2, &plain(Format::F32, 2, 8), &plain(Format::F32, 4, 3)).is_none(), "another rank");
    }

    #[test]
    fn damaged_headers_are_no_pieces() {
        let good = pack(5, 7, 3, &plain(Format::F32, 3, 7), &plain(Format::F32, 5, 3)).unwrap();
        for cut in 0..good.len() {
            assert!(parse(5, 7, &Bytes::from(good[..cut].to_vec())).is_none(), "{cut}");
        }
        // Any other byte of what the header says.
        for at in (0..7).chain(8..36) {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(parse(5, 7, &Bytes::from(bad)).is_none(), "byte {at}, bit {bit}");
            }
        }
    }
}
