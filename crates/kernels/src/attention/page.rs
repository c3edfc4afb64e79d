//! Pages of the key/value cache: one layer's keys and values of `page_len` consecutive positions.
//!
//! The layout is private to [`crate::attention`]. A page holds one run per key/value head: first its keys, transposed
//! so that neighbouring numbers are neighbouring *positions* (a vector lane is a key, no horizontal sums), then its
//! values, where neighbouring numbers are neighbouring *components*. With `d2 = head_dim` rounded up to 2 and
//! `d16 = head_dim` rounded up to 16:
//!
//! | type | keys | values |
//! |---|---|---|
//! | f32, f16 | `[d2][page_len]` | `[page_len][d16]` |
//! | bf16 | `[d2 / 2][page_len][2]`: pairs of components | `[page_len / 2][d16][2]`: pairs of positions |
//!
//! The pairs are the operand layout of the bf16 dot products (`vdpbf16ps`, AMX `tdpbf16ps`; Intel SDM, volume 2).

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// Single precision; attention computes in f32.
    F32,
    /// Half precision; prefill may compute with bf16 products.
    F16,
    /// The upper half of a single; prefill may compute with bf16 products.
    Bf16,
}

impl KvType {
    /// Every type, in the order of the declaration.
    pub const ALL: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Bf16];

    /// Bytes of one number.
    pub const fn bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 | KvType::Bf16 => 2,
        }
    }
}

/// Positions in a page unless there is a reason for another number: the block of most sparse-attention methods, and
/// small enough that the keys or values of one head (64 x 128 x 2 bytes) stay in the first-level cache.
pub const PAGE_LEN: usize = 64;

/// Alignment in bytes that pages should have for full speed (any alignment is correct); see [`super::PageBuf`].
pub const PAGE_ALIGN: usize = 64;

/// Shape of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Numbers in a head.
    pub head_dim: usize,
    /// Positions in a page: a positive multiple of 16.
    pub page_len: usize,
}

/// Bytes of one page; `None` if the size overflows, a count is zero or `page_len` is not a multiple of 16.
pub fn page_bytes(ty: KvType, shape: KvShape) -> Option<usize> {
    let KvShape { kv_heads, head_dim, page_len } = shape;
    if kv_heads == 0 || head_dim == 0 || page_len == 0 || !page_len.is_multiple_of(16) {
        return None;
    }
    let columns = head_dim.checked_next_multiple_of(2)?.checked_add(head_dim.checked_next_multiple_of(16)?)?;
    columns.checked_mul(page_len)?.checked_mul(kv_heads)?.checked_mul(ty.bytes())
}

/// Where things lie in a page, in numbers (not bytes).
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub ty: KvType,
    pub head_dim: usize,
    pub page_len: usize,
    /// `head_dim` rounded up to 2: rows of the keys.
    pub d2: usize,
    /// `head_dim` rounded up to 16: columns of the values.
    pub d16: usize,
}

impl Layout {
    /// # Panics
    /// If [`page_bytes`] has no answer for the shape.
    pub fn new(ty: KvType, shape: KvShape) -> Self {
        assert!(page_bytes(ty, shape).is_some(), "not a page shape: {shape:?}");
        let KvShape { head_dim, page_len, .. } = shape;
        Self { ty, head_dim, page_len, d2: head_dim.next_multiple_of(2), d16: head_dim.next_multiple_of(16) }
    }

    /// Numbers of one head's keys.
    pub fn keys(&self) -> usize {
        self.d2 * self.page_len
    }

    /// Numbers of one head's keys and values.
    pub fn head(&self) -> usize {
        self.keys() + self.page_len * self.d16
    }

    /// Bytes of head `h`'s keys and of its values in `page`.
    pub fn split<'a>(&self, page: &'a [u8], h: usize) -> (&'a [u8], &'a [u8]) {
        let bytes = self.ty.bytes();
        page[h * self.head() * bytes..(h + 1) * self.head() * bytes].split_at(self.keys() * bytes)
    }

    /// Where component `i` of the key at `slot` lies among the keys of its head.
    pub fn key(&self, slot: usize, i: usize) -> usize {
        match self.ty {
            KvType::Bf16 => (i / 2 * self.page_len + slot) * 2 + i % 2,
            _ => i * self.page_len + slot,
        }
    }

    /// Where component `i` of the value at `slot` lies among the values of its head.
    pub fn value(&self, slot: usize, i: usize) -> usize {
        match self.ty {
            KvType::Bf16 => (slot / 2 * self.d16 + i) * 2 + slot % 2,
            _ => slot * self.d16 + i,
        }
    }
}

/// The number at index `i` of a run.
pub(super) fn get(ty: KvType, run: &[u8], i: usize) -> f32 {
    match ty {
        KvType::F32 => f32::from_le_bytes([run[4 * i], run[4 * i + 1], run[4 * i + 2], run[4 * i + 3]]),
        KvType::F16 => f16::from_le_bytes([run[2 * i], run[2 * i + 1]]).to_f32(),
        KvType::Bf16 => bf16::from_le_bytes([run[2 * i], run[2 * i + 1]]).to_f32(),
    }
}

/// The bits of `row`, four or two bytes each, to be placed by `place(bytes, component)`.
fn encode(ty: KvType, row: &[f32], mut place: impl FnMut(&[u8], usize)) {
    const PIECE: usize = 64;
    for (p, row) in row.chunks(PIECE).enumerate() {
        let mut halves = [f16::ZERO; PIECE];
        match ty {
            KvType::F32 => row.iter().enumerate().for_each(|(i, x)| place(&x.to_le_bytes(), p * PIECE + i)),
            KvType::F16 => {
                let halves = &mut halves[..row.len()];
                halves.convert_from_f32_slice(row);
                halves.iter().enumerate().for_each(|(i, x)| place(&x.to_le_bytes(), p * PIECE + i));
            }
            KvType::Bf16 => {
                let bits = |x: f32| bf16::from_f32(x).to_le_bytes();
                row.iter().enumerate().for_each(|(i, &x)| place(&bits(x), p * PIECE + i));
            }
        }
    }
}

fn check(ty: KvType, shape: KvShape, page: usize, slot: usize, rows: [usize; 2]) -> Layout {
    let layout = Layout::new(ty, shape);
    assert_eq!(Some(page), page_bytes(ty, shape), "bytes of a page");
    assert!(slot < shape.page_len, "slot {slot} of a page of {}", shape.page_len);
    assert_eq!(rows, [shape.kv_heads * shape.head_dim; 2], "numbers of a key and of a value row");
    layout
}

/// Stores the keys `k` and values `v` (each `kv_heads * head_dim`) of one position, rounded to nearest.
///
/// # Panics
/// If a length does not fit `shape`, or `slot` is not below `page_len`.
pub fn write(ty: KvType, shape: KvShape, page: &mut [u8], slot: usize, k: &[f32], v: &[f32]) {
    let layout = check(ty, shape, page.len(), slot, [k.len(), v.len()]);
    let heads = page.chunks_exact_mut(layout.head() * ty.bytes());
    for ((run, k), v) in heads.zip(k.chunks_exact(layout.head_dim)).zip(v.chunks_exact(layout.head_dim)) {
        let (keys, values) = run.split_at_mut(layout.keys() * ty.bytes());
        let bytes = ty.bytes();
        encode(ty, k, |x, i| keys[layout.key(slot, i) * bytes..][..bytes].copy_from_slice(x));
        encode(ty, v, |x, i| values[layout.value(slot, i) * bytes..][..bytes].copy_from_slice(x));
        if layout.d2 > layout.head_dim {
            // The fast kernels multiply this padding with zero, which is only harmless for finite numbers.
            keys[layout.key(slot, layout.head_dim) * bytes..][..bytes].fill(0);
        }
    }
}

/// Loads the keys and values of one position into `k` and `v` (each `kv_heads * head_dim`).
///
/// # Panics
/// If a length does not fit `shape`, or `slot` is not below `page_len`.
pub fn read(ty: KvType, shape: KvShape, page: &[u8], slot: usize, k: &mut [f32], v: &mut [f32]) {
    let layout = check(ty, shape, page.len(), slot, [k.len(), v.len()]);
    let rows = k.chunks_exact_mut(layout.head_dim).zip(v.chunks_exact_mut(layout.head_dim));
    for (h, (k, v)) in rows.enumerate() {
        let (keys, values) = layout.split(page, h);
        k.iter_mut().enumerate().for_each(|(i, x)| *x = get(ty, keys, layout.key(slot, i)));
        v.iter_mut().enumerate().for_each(|(i, x)| *x = get(ty, values, layout.value(slot, i)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        for ty in KvType::ALL {
            for (kv_heads, head_dim, page_len) in [(1, 8, 16), (3, 40, 64), (2, 7, 48), (2, 128, 32)] {
                let shape = KvShape { kv_heads, head_dim, page_len };
                let mut page = vec![0xff; page_bytes(ty, shape).unwrap()];
                let n = kv_heads * head_dim;
                // Small integers are exact in every type.
                let row = |slot: usize, add: usize| (0..n).map(|i| ((i + slot * 31 + add) % 250) as f32).collect();
                for slot in 0..page_len {
                    let (k, v): (Vec<f32>, Vec<f32>) = (row(slot, 0), row(slot, 9));
                    write(ty, shape, &mut page, slot, &k, &v);
                }
                let (mut k, mut v) = (vec![0.0; n], vec![0.0; n]);
                for slot in 0..page_len {
                    read(ty, shape, &page, slot, &mut k, &mut v);
                    assert_eq!(k, row(slot, 0) as Vec<f32>);
                    assert_eq!(v, row(slot, 9) as Vec<f32>);
                }
            }
        }
    }

    #[test]
    fn impossible_shapes_have_no_size() {
        let shape = |kv_heads, head_dim, page_len| KvShape { kv_heads, head_dim, page_len };
        for bad in [shape(0, 8, 16), shape(1, 0, 16), shape(1, 8, 0), shape(1, 8, 24), shape(usize::MAX / 8, 64, 64)] {
            assert_eq!(page_bytes(KvType::F16, bad), None);
        }
        assert_eq!(page_bytes(KvType::F16, shape(8, 64, 64)), Some(8 * 64 * 64 * 2 * 2));
    }
}
