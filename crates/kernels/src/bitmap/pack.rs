//! From stored rows to units and back.

use super::{Bitmap, OFFSET, PADDING, unit};
use crate::{Format, Isa, Matrix};

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
                        self.put(i / 16, b * 16 + i % 16, q != 0, &[q ^ 0x80]);
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
        let [low, high] = &self.values;
        if format == Format::Bf16 {
            return out.extend_from_slice(low);
        }
        out.extend(self.masks[1].to_le_bytes());
        out.extend(self.scales.as_flattened());
        if format == Format::Q8_0 {
            out.extend_from_slice(low);
            out.extend_from_slice(high);
        } else {
            let at = |v: &[u8], i: usize| v.get(i).copied().unwrap_or(0);
            out.extend((0..low.len().max(high.len())).map(|i| at(low, i) | at(high, i) << 4));
        }
    }
}

/// Bytes of a unit whose masks keep `n` values.
pub(super) fn unit_bytes(format: Format, n: [usize; 2]) -> usize {
    match format {
        Format::Bf16 => 8 + 2 * n[0],
        Format::Q8_0 => 24 + n[0] + n[1],
        _ => 24 + n[0].max(n[1]),
    }
}

/// Bytes that the columns of a whole unit take in the dense format.
pub(super) fn stored_unit(format: Format) -> usize {
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
    for row in 0..w.rows() {
        for stored in w.row(row).chunks(stored_unit(format)) {
            let n = kept_values(format, stored);
            bytes += unit_bytes(format, n);
            kept += n[0] + n[1];
        }
    }
    Some((bytes, w.rows() * w.cols() - kept))
}

/// How many values of one unit each mask keeps.
fn kept_values(format: Format, stored: &[u8]) -> [usize; 2] {
    let count = |bytes: &[u8], kept: fn(u8) -> bool| bytes.iter().map(|&q| usize::from(kept(q))).sum::<usize>();
    match format {
        Format::Bf16 => {
            let kept = |v: &[u8; 2]| usize::from(u16::from_le_bytes(*v) << 1 != 0);
            [stored.as_chunks::<2>().0.iter().map(kept).sum(), 0]
        }
        Format::Q8_0 => {
            let halves = |b: &[u8; 34]| [count(&b[2..18], |q| q != 0), count(&b[18..], |q| q != 0)];
            stored.as_chunks::<34>().0.iter().map(halves).fold([0; 2], |a, b| [a[0] + b[0], a[1] + b[1]])
        }
        _ => {
            let halves = |b: &[u8; 18]| [count(&b[2..], |q| q & 15 != 8), count(&b[2..], |q| q >> 4 != 8)];
            stored.as_chunks::<18>().0.iter().map(halves).fold([0; 2], |a, b| [a[0] + b[0], a[1] + b[1]])
        }
    }
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

    /// Where it is in the bytes.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn place(&self) -> usize {
        self.at
    }

    /// Writes the next columns in the dense format of `w`, as many as `out` takes: whole units, or to the end of the row. Rows
    /// that lead outside the bytes give NaN.
    ///
    /// # Panics
    /// If this CPU lacks `isa`.
    pub fn unpack(&mut self, isa: Isa, w: &Bitmap, out: &mut [u8]) {
        assert!(isa.is_available(), "{isa} is not available here");
        let (whole, rest) = out.split_at_mut(out.len() - out.len() % stored_unit(w.format));
        self.at = match isa {
            // SAFETY: the assertion checked that the CPU has this instruction set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => unsafe { super::avx512::unpack(w, self.at, whole) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { super::avx2::unpack(w, self.at, whole) },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => super::neon::unpack(w, self.at, whole),
            _ => super::scalar::unpack(w, self.at, whole),
        };
        self.at = super::scalar::unpack(w, self.at, rest);
    }

    /// Passes over the next `columns`, which must be whole units or lead to the end of the row.
    pub fn skip(&mut self, w: &Bitmap, columns: usize) {
        for _ in 0..columns.div_ceil(unit(w.format).unwrap_or(1)) {
            self.at = w.next(self.at);
        }
    }
}
