//! Statistics on disk, so that a killed calibration goes on where it was: a safetensors file with a few arrays per
//! observation. What was observed is not stored but part of the key, which the reader must know.

use super::{Gathered, Moments, Rows, Slot, Statistics};
use crate::{
    bytes::Bytes,
    error::{Error, Result},
    firing::Firing,
    format::safetensors::{Dtype, NewTensor, Tensors, write},
    hash::sha256,
    histogram::MagnitudeHistogram,
    statistics::Observation,
};
use std::io::{self, Write};

/// How far a pass is.
const POSITION: &str = "position";
const KEY: &str = "key";

fn words<const N: usize, T: Copy>(values: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|v| to(*v)).collect()
}

impl Statistics {
    /// The key of a pass over something called `subject` that gathers `observations`.
    pub fn key(subject: &str, observations: &[Observation]) -> String {
        sha256(format!("{subject} {observations:?}").as_bytes())
    }

    /// Writes what was gathered, with the key and how many windows are done.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, key: &str, windows: usize, out: &mut dyn Write) -> io::Result<()> {
        let mut parts: Vec<(String, Dtype, u64, Vec<u8>)> = Vec::new();
        for (i, slot) in self.slots.values().enumerate() {
            let mut add = |name: &str, dtype: Dtype, bytes: Vec<u8>| {
                let count = bytes.len() as u64 * 8 / dtype.bits();
                parts.push((format!("{i}.{name}"), dtype, count, bytes));
            };
            let mut head = vec![slot.tokens];
            match &slot.gathered {
                Gathered::Scores(h) => {
                    let (bins, zeros, total) = h.parts();
                    head.extend([zeros, total]);
                    add("bins", Dtype::U64, words(&bins, u64::to_le_bytes));
                }
                Gathered::Moments(m) => {
                    head.push(m.tokens);
                    add("sums", Dtype::F64, words(&m.sums, f64::to_le_bytes));
                    add("squares", Dtype::F64, words(&m.squares, f64::to_le_bytes));
                }
                Gathered::Rows(r) => {
                    head.push(r.width as u64);
                    add("rows", Dtype::F32, words(&r.values, f32::to_le_bytes));
                }
                Gathered::Firing(f) => {
                    let (width, tokens, counts, bits) = f.parts();
                    head.extend([width as u64, tokens]);
                    add("counts", Dtype::U64, words(counts, u64::to_le_bytes));
                    add("bits", Dtype::U64, words(bits, u64::to_le_bytes));
                }
            }
            add("head", Dtype::U64, words(&head, u64::to_le_bytes));
        }
        let shapes: Vec<[u64; 1]> = parts.iter().map(|p| [p.2]).collect();
        let list: Vec<NewTensor<'_>> = parts
            .iter()
            .zip(&shapes)
            .map(|((name, dtype, _, data), shape)| NewTensor { name, dtype: *dtype, shape, data })
            .collect();
        write(&list, &[(KEY, key), (POSITION, &windows.to_string())], out)
    }

    /// Reads what [`Statistics::write`] wrote for these observations and this key, and how many windows were done.
    ///
    /// # Errors
    /// Damaged, or of another key.
    pub fn read(bytes: Bytes, key: &str, observations: Vec<Observation>) -> Result<(Self, usize)> {
        let file = Tensors::parse(bytes)?;
        let wrong = || Error::malformed("statistics of another pass", "those of this one");
        let windows = file.metadata().get(POSITION).and_then(|p| p.parse().ok()).ok_or_else(wrong)?;
        if file.metadata().get(KEY).is_none_or(|k| k != key) {
            return Err(wrong());
        }
        let mut statistics = Self::new(observations);
        for (i, slot) in statistics.slots.values_mut().enumerate() {
            read_slot(&file, i, slot)?;
        }
        Ok((statistics, windows))
    }
}

fn read_slot(file: &Tensors, i: usize, slot: &mut Slot) -> Result<()> {
    let bad =
        |name: &str| Error::malformed("a missing or damaged array", "that of a pass").in_item(&format!("{i}.{name}"));
    let bytes = |name: &str, dtype: Dtype| {
        let entry = file.get(&format!("{i}.{name}")).filter(|e| e.dtype == dtype).ok_or_else(|| bad(name))?;
        file.bytes(entry)
    };
    let u64s = |name: &str| -> Result<Vec<u64>> {
        Ok(bytes(name, Dtype::U64)?.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect())
    };
    let f64s = |name: &str| -> Result<Vec<f64>> {
        let all: Vec<f64> = bytes(name, Dtype::F64)?.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
        if all.iter().all(|x| x.is_finite()) { Ok(all) } else { Err(bad(name)) }
    };
    let head: Vec<u64> = u64s("head")?;
    slot.tokens = *head.first().ok_or_else(|| bad("head"))?;
    slot.gathered = match (&slot.gathered, &head[1..]) {
        (Gathered::Scores(_), &[zeros, total]) => {
            let h = MagnitudeHistogram::from_parts(&u64s("bins")?, zeros, total);
            Gathered::Scores(Box::new(h.ok_or_else(|| bad("bins"))?))
        }
        (Gathered::Moments(_), &[tokens]) => {
            let (sums, squares) = (f64s("sums")?, f64s("squares")?);
            if sums.len() != squares.len() {
                return Err(bad("squares"));
            }
            Gathered::Moments(Moments { tokens, sums, squares })
        }
        (Gathered::Rows(_), &[width]) => {
            let values: Vec<f32> =
                bytes("rows", Dtype::F32)?.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let width = usize::try_from(width).map_err(|_| bad("head"))?;
            let whole = if width == 0 { values.is_empty() } else { values.len().is_multiple_of(width) };
            if !whole || values.iter().any(|x| !x.is_finite()) {
                return Err(bad("rows"));
            }
            Gathered::Rows(Rows { width, values })
        }
        (Gathered::Firing(_), &[width, tokens]) => {
            let width = usize::try_from(width).map_err(|_| bad("head"))?;
            let f = Firing::from_parts(width, tokens, u64s("counts")?, u64s("bits")?);
            Gathered::Firing(f.ok_or_else(|| bad("counts"))?)
        }
        _ => return Err(bad("head")),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        firing::Sampling,
        observer::Observer,
        site::{Point, Proj},
        statistics::Gather,
        tensor::Tensor,
    };

    #[test]
    fn half_a_pass_stored_and_continued_equals_a_whole_one() {
        let point = Point::Input { layer: 1, proj: Proj::O };
        let rows = Observation { point, gather: Gather::Rows { every: 3, most: 5 } };
        let scale = Tensor::vector(vec![2.0, 0.5]);
        let firing = Observation::firing(point, Sampling { every: 2, most: 4 });
        let mut all =
            vec![Observation::magnitudes(point), Observation::scores(point, scale), Observation::moments(point)];
        all.extend([rows, firing]);
        let key = Statistics::key("model text", &all);
        let values: Vec<f32> = (0..40).map(|i| (i as f32 - 17.0) * 0.3).collect();
        let (mut whole, mut half) = (Statistics::new(all.clone()), Statistics::new(all.clone()));
        whole.observe(point, 2, &values);
        half.observe(point, 2, &values[..18]);
        let mut file = Vec::new();
        half.write(&key, 3, &mut file).unwrap();
        let (mut back, windows) = Statistics::read(file.clone().into(), &key, all.clone()).unwrap();
        back.observe(point, 2, &values[18..]);
        assert_eq!(windows, 3);
        assert!(
            whole
                .slots
                .values()
                .zip(back.slots.values())
                .all(|(a, b)| a.gathered == b.gathered && a.tokens == b.tokens)
        );
        assert!(Statistics::read(file.clone().into(), "other", all.clone()).is_err());
        for n in 0..file.len() {
            assert!(Statistics::read(file[..n].to_vec().into(), &key, all.clone()).is_err(), "cut at {n}");
        }
    }
}
