//! From stored rows to units and back.

use super::{Bitmap, OFFSET, PADDING, mask, unit};
use crate::{Format, Matrix};

/// Bytes of values and their marks in one unit of a row.
struct Unit {
    masks: [u64; 2],
    /// f16, as stored.
    scales: [[u8; 2]; 4],
    /// Values of each mask: two bytes each in BF16, one otherwise.
    values: [Vec<u8>; 2],
}

impl Unit {
    fn new() -> Self {
        Self { masks: [0; 2], scales: [[0; 2]; 4], values: [Vec::new(), Vec::new()] }
    }

    /// Takes the stored columns of one unit.
    fn read(&mut self, format: Format, stored: &[u8]) {
        self.masks = [0; 2];
        self.scales = [[0; 2]; 4];
        self.values.iter_mut().for_each(Vec::clear);
        match format {
            Format::Bf16 => {
                for (i, v) in stored.as_chunks::<2>().0.iter().enumerate() {
                    // Both zeros.
                    self.put(0, i, v[1] & 0x7f | v[0] != 0, v);
                }
            }
            Format::Q8_0 => {
                for (b, block) in stored.as_chunks::<34>().0.iter().enumerate() {
                    self.scales[b] = [block[0], block[1]];
                    for (i, &q) in block[2..].iter().enumerate() {
                        self.put(0, b * 32 + i, q != 0, &[q ^ 0x80]);
                    }
                }
            }
            _ => {
                for (b, block) in stored.as_chunks::<18>().0.iter().enumerate() {
                    self.scales[b] = [block[0], block[1]];
                    for (i, &q) in block[2..].iter().enumerate() {
                        self.put(0, b * 16 + i, q & 15 != 8, &[q & 15]);
                        self.put(1, b * 16 + i, q >> 4 != 8, &[q >> 4]);
                    }
                }
            }
        }
    }

    fn put(&mut self, half: usize, bit: usize, kept: bool, value: &[u8]) {
        if kept {
            self.masks[half] |= 1 << bit;
            self.values[half].extend_from_slice(value);
        }
    }

    fn write(&self, format: Format, out: &mut Vec<u8>) {
        out.extend(self.masks[0].to_le_bytes());
        match format {
            Format::Bf16 => out.extend_from_slice(&self.values[0]),
            Format::Q8_0 => {
                out.extend(self.scales[..2].as_flattened());
                out.extend_from_slice(&self.values[0]);
            }
            _ => {
                out.extend(self.masks[1].to_le_bytes());
                out.extend(self.scales.as_flattened());
                let [low, high] = &self.values;
                let at = |v: &[u8], i: usize| v.get(i).copied().unwrap_or(0);
                out.extend((0..low.len().max(high.len())).map(|i| at(low, i) | at(high, i) << 4));
            }
        }
    }
}

/// Bytes of a unit with these masks.
pub(super) fn unit_bytes(format: Format, masks: [u64; 2]) -> usize {
    let n = masks.map(|m| m.count_ones() as usize);
    match format {
        Format::Bf16 => 8 + 2 * n[0],
        Format::Q8_0 => 12 + n[0],
        _ => 24 + n[0].max(n[1]),
    }
}

/// Bytes that the columns of a whole unit take in the dense format.
fn stored_unit(format: Format) -> usize {
    unit(format).and_then(|n| format.run_bytes(n)).unwrap_or(1)
}

/// `w` without its zeros: what [`Bitmap::new`] takes. `None` for formats without such a layout.
pub fn pack(w: &Matrix) -> Option<Vec<u8>> {
    let format = w.format();
    unit(format)?;
    let mut out = vec![0; (w.rows() + 1) * OFFSET];
    let mut one = Unit::new();
    for row in 0..w.rows() {
        for stored in w.row(row).chunks(stored_unit(format)) {
            one.read(format, stored);
            one.write(format, &mut out);
        }
        let end = (out.len() as u64).to_le_bytes();
        out[(row + 1) * OFFSET..][..OFFSET].copy_from_slice(&end);
    }
    let first = (((w.rows() + 1) * OFFSET) as u64).to_le_bytes();
    out[..OFFSET].copy_from_slice(&first);
    out.resize(out.len() + PADDING, 0);
    Some(out)
}

/// The bytes that [`pack`] would give, and the zeros of `w`; `None` for formats without such a layout.
pub fn packed_bytes(w: &Matrix) -> Option<(usize, usize)> {
    let format = w.format();
    unit(format)?;
    let (mut bytes, mut kept) = ((w.rows() + 1) * OFFSET + PADDING, 0);
    let mut one = Unit::new();
    for row in 0..w.rows() {
        for stored in w.row(row).chunks(stored_unit(format)) {
            one.read(format, stored);
            bytes += unit_bytes(format, one.masks);
            kept += one.masks.iter().map(|m| m.count_ones() as usize).sum::<usize>();
        }
    }
    Some((bytes, w.rows() * w.cols() - kept))
}

/// A place in one row of a matrix, to unpack it piece by piece from left to right.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    at: usize,
}

impl Cursor {
    /// The start of row `row`.
    ///
    /// # Panics
    /// If `row` is not below [`Bitmap::rows`].
    pub fn new(w: &Bitmap, row: usize) -> Self {
        assert!(row < w.rows(), "a row that is not there");
        Self { at: w.start(row) }
    }

    /// Writes the next columns in the dense format of `w`, as many as `out` takes: whole units, or to the end of the row. Rows
    /// that lead outside the bytes give NaN.
    pub fn unpack(&mut self, w: &Bitmap, out: &mut [u8]) {
        for out in out.chunks_mut(stored_unit(w.format)) {
            self.at = unpack_unit(w, self.at, out);
        }
    }
}

/// Writes one unit; returns where the next one begins.
fn unpack_unit(w: &Bitmap, at: usize, out: &mut [u8]) -> usize {
    if at > w.limit() {
        // 0xffff is a NaN in BF16 and as an f16 scale.
        out.fill(0xff);
        return usize::MAX;
    }
    let bytes = &w.data[at..];
    let mut masks = [mask(bytes), 0];
    match w.format {
        Format::Bf16 => {
            let mut values = bytes[8..].as_chunks::<2>().0.iter();
            for (i, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *out = if masks[0] >> i & 1 == 1 { values.next().copied().unwrap_or_default() } else { [0; 2] };
            }
        }
        Format::Q8_0 => {
            let mut values = bytes[12..].iter();
            for (b, block) in out.as_chunks_mut::<34>().0.iter_mut().enumerate() {
                block[..2].copy_from_slice(&bytes[8 + 2 * b..][..2]);
                for (i, q) in block[2..].iter_mut().enumerate() {
                    let kept = masks[0] >> (b * 32 + i) & 1 == 1;
                    *q = if kept { values.next().copied().unwrap_or_default() ^ 0x80 } else { 0 };
                }
            }
        }
        _ => {
            masks[1] = mask(&bytes[8..]);
            let (mut low, mut high) = (bytes[24..].iter(), bytes[24..].iter());
            for (b, block) in out.as_chunks_mut::<18>().0.iter_mut().enumerate() {
                block[..2].copy_from_slice(&bytes[16 + 2 * b..][..2]);
                for (i, q) in block[2..].iter_mut().enumerate() {
                    let bit = b * 16 + i;
                    let l = if masks[0] >> bit & 1 == 1 { low.next().map_or(0, |v| v & 15) } else { 8 };
                    let h = if masks[1] >> bit & 1 == 1 { high.next().map_or(0, |v| v >> 4) } else { 8 };
                    *q = l | h << 4;
                }
            }
        }
    }
    at + unit_bytes(w.format, masks)
}
