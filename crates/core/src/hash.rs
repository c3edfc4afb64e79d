//! The hash that binds plans and converted layouts to one model.

use sha2::{Digest, Sha256};
use std::fmt::Write;

/// Pieces read from a large tensor, evenly spread, the first and the last byte included.
const PIECES: usize = 16;
/// Bytes of one piece.
const PIECE: usize = 4096;

/// One tensor of a model, as far as the hash is concerned.
#[derive(Clone, Copy, Debug)]
pub struct HashedTensor<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Its stored type (`BF16`, `Q4_K`, ...).
    pub kind: &'a str,
    /// Its shape in the file's order.
    pub shape: &'a [u64],
    /// Its bytes.
    pub data: &'a [u8],
}

/// SHA-256 (hex) over `config`, the table of tensors (sorted by name, so the split into shards does not matter) and 16
/// evenly spread pieces of 4 KiB of each tensor; tensors of up to 64 KiB enter whole.
///
/// Reading all weights would take seconds per 10 GB, and a model must be ready in less than one: a fine-tuned, pruned or
/// re-quantised model differs in every tensor and gets another hash, but a change of single bytes between the pieces is
/// not seen. This binds files that belong together; it does not protect against an attacker.
pub fn model_hash(config: &[u8], mut tensors: Vec<HashedTensor<'_>>) -> String {
    tensors.sort_by_key(|t| t.name);
    let mut hash = Sha256::new();
    hash.update(b"lacuna model hash 1\0");
    put(&mut hash, config);
    for t in tensors {
        put(&mut hash, t.name.as_bytes());
        put(&mut hash, t.kind.as_bytes());
        hash.update((t.shape.len() as u64).to_le_bytes());
        t.shape.iter().for_each(|n| hash.update(n.to_le_bytes()));
        hash.update((t.data.len() as u64).to_le_bytes());
        pieces(t.data).for_each(|p| hash.update(p));
    }
    hex(&hash.finalize())
}

/// SHA-256 of `bytes` in hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Remainders of a byte at eight places, of the reflected Castagnoli polynomial.
const CRC32C: [[u32; 256]; 8] = {
    let mut tables = [[0; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let (mut crc, mut bit) = (i as u32, 0);
        while bit < 8 {
            crc = (crc >> 1) ^ ((crc & 1) * 0x82f6_3b78);
            bit += 1;
        }
        tables[0][i] = crc;
        i += 1;
    }
    let mut i = 0;
    while i < 256 {
        let mut place = 1;
        while place < 8 {
            let before: u32 = tables[place - 1][i];
            tables[place][i] = before >> 8 ^ tables[0][(before & 255) as usize];
            place += 1;
        }
        i += 1;
    }
    tables
};

/// CRC-32C (Castagnoli, RFC 3720 appendix B.4) of `bytes`, eight at a time by tables.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let (eights, rest) = bytes.as_chunks::<8>();
    let mut crc = !0_u32;
    for eight in eights {
        let word = u64::from_le_bytes(*eight) ^ u64::from(crc);
        crc = (0..8).fold(0, |sum, place| sum ^ CRC32C[7 - place][(word >> (8 * place) & 255) as usize]);
    }
    for byte in rest {
        crc = crc >> 8 ^ CRC32C[0][(crc as u8 ^ byte) as usize];
    }
    !crc
}

/// Length first, so that the border between two fields cannot move.
fn put(hash: &mut Sha256, field: &[u8]) {
    hash.update((field.len() as u64).to_le_bytes());
    hash.update(field);
}

fn pieces(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (count, length) = if data.len() <= PIECES * PIECE { (1, data.len()) } else { (PIECES, PIECE) };
    let last = data.len() - length;
    (0..count).map(move |i| {
        // Two steps keep the product inside 64 bits for any tensor.
        let start = last / (PIECES - 1) * i + last % (PIECES - 1) * i / (PIECES - 1);
        &data[start..start + length]
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        // Writing to a string cannot fail.
        let _ = write!(s, "{b:02x}");
        s
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor<'a>(name: &'a str, data: &'a [u8]) -> HashedTensor<'a> {
        HashedTensor { name, kind: "F32", shape: &[2, 3], data }
    }

    #[test]
    fn sha256_of_abc() {
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    /// RFC 3720, appendix B.4, and the usual check value.
    #[test]
    fn crc32c_of_known_bytes() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn order_does_not_matter_and_everything_else_does() {
        let (a, b) = ([1_u8; 24], [2_u8; 24]);
        let base = model_hash(b"c", vec![tensor("a", &a), tensor("b", &b)]);
        assert_eq!(base, model_hash(b"c", vec![tensor("b", &b), tensor("a", &a)]));
        let others = [
            model_hash(b"d", vec![tensor("a", &a), tensor("b", &b)]),
            model_hash(b"c", vec![tensor("a", &b), tensor("b", &b)]),
            model_hash(b"c", vec![tensor("a", &a), tensor("c", &b)]),
            model_hash(b"c", vec![tensor("a", &a), HashedTensor { kind: "F16", ..tensor("b", &b) }]),
            model_hash(b"c", vec![tensor("a", &a), HashedTensor { shape: &[3, 2], ..tensor("b", &b) }]),
            model_hash(b"c", vec![tensor("a", &a)]),
        ];
        assert!(others.iter().all(|o| *o != base));
    }

    #[test]
    fn pieces_cover_both_ends_of_large_tensors_and_all_of_small_ones() {
        for n in [0, 1, 65_536, 65_537, 70_001, 10_000_019] {
            let data = vec![0_u8; n];
            let offset = |p: &[u8]| p.as_ptr() as usize - data.as_ptr() as usize;
            let all: Vec<_> = pieces(&data).collect();
            assert_eq!(offset(all[0]), 0);
            let last = all[all.len() - 1];
            assert_eq!(offset(last) + last.len(), n);
            assert_eq!(all.iter().map(|p| p.len()).sum::<usize>(), n.min(65_536));
        }
    }
}
