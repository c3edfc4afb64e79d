//! From compressed projections to the tensors of a file: dense numbers with zeros in place, or codes packed as the
//! compressed-tensors library packs them.

use super::{choices::place, homes::Home, low_rank, store::Finished};
use half::f16;
use lacuna_core::{
    compress::{Books, Changed, Codes},
    format::safetensors::Dtype,
    site::Proj,
};
use lacuna_kernels::{
    Format,
    codebook::{self, Parts},
    convert::encode_run,
};
use std::collections::BTreeMap;

/// Bits that codes of `bits` bits take in a file: widths that every version of the library packs alike.
pub fn stored_bits(bits: u32) -> u32 {
    match bits {
        0..=2 => 2,
        3..=4 => 4,
        _ => 8,
    }
}

/// What kind of file the tensors are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A Hugging Face directory.
    HuggingFace,
    /// A GGUF file; its tensors lie in the work folder as plain bytes.
    Gguf,
}

/// The tensors of a home whose projections were `changed`, and whose numbers were stored in `format`.
pub fn finished(home: &Home, changed: &BTreeMap<Proj, Changed>, format: Format, target: Target) -> Vec<Finished> {
    let parts = || home.parts.iter().filter_map(|(proj, rows)| Some((changed.get(proj)?, rows)));
    let coded = parts().next().is_some_and(|(c, _)| c.codes.is_some());
    match (target, Dtype::of(format)) {
        (Target::HuggingFace, Some(dtype)) if coded => codes(home, parts(), dtype),
        (Target::HuggingFace, Some(dtype)) => vec![dense(home, parts(), dtype)],
        _ => vec![blocks(home, parts(), format)],
    }
}

/// What the packed form of a projection is called until the output is put together.
pub fn packed_name(layer: usize, proj: Proj) -> String {
    format!("{PACKED}{}", place(layer, proj))
}

/// What begins the names of packed forms, which no tensor of a model has.
pub const PACKED: &str = "lacuna.packed.";

/// The packed form of a projection that became pairs and books, or two factors with other numbers in `format`.
pub fn packed(layer: usize, proj: Proj, changed: &Changed, format: Format) -> Option<Finished> {
    if changed.low_rank.is_some() {
        return low_rank::packed(layer, proj, changed, format);
    }
    let data = packed_books(changed.books.as_ref()?, &changed.weight)?;
    Some(Finished { name: packed_name(layer, proj), dtype: Dtype::U8, shape: vec![data.len() as u64], data })
}

/// The bytes of codes of pairs that stand for `weight`.
pub fn packed_books(b: &Books, weight: &[f32]) -> Option<Vec<u8>> {
    let (bits, cols) = (b.bits as usize, weight.len() / b.of_row.len().max(1));
    let (of_row, entries) = (&b.of_row[..], &b.entries[..]);
    codebook::pack(&Parts { bits, cols, span: b.span, of_row, entries, exponents: &b.exponents, codes: &b.codes })
}

/// Puts the rows of `part` (of `cols` numbers) to their places in `all`.
fn scatter<T: Copy>(all: &mut [T], part: &[T], rows: &[usize], cols: usize) {
    for (row, numbers) in rows.iter().zip(part.chunks_exact(cols)) {
        all[row * cols..][..cols].copy_from_slice(numbers);
    }
}

fn dense<'a>(home: &Home, parts: impl Iterator<Item = (&'a Changed, &'a Vec<usize>)>, dtype: Dtype) -> Finished {
    let (rows, cols) = (home.outputs, home.inputs);
    let mut all = vec![0.0_f32; rows * cols];
    parts.for_each(|(c, at)| scatter(&mut all, &c.weight, at, cols));
    let shape = if home.transposed { vec![cols as u64, rows as u64] } else { vec![rows as u64, cols as u64] };
    if home.transposed {
        let turned = (0..cols * rows).map(|i| all[i % rows * cols + i / rows]).collect();
        all = turned;
    }
    Finished { name: home.tensor.clone(), dtype, shape, data: numbers(dtype.format().unwrap_or(Format::F32), &all) }
}

/// Numbers in the bytes of a format; for block formats, whole blocks.
pub fn numbers(format: Format, values: &[f32]) -> Vec<u8> {
    let mut data = vec![0; format.run_bytes(values.len()).unwrap_or(0)];
    encode_run(format, values, &mut data);
    data
}

/// The format that holds codes of `bits` bits in a GGUF file.
pub fn block_format(bits: u32) -> Format {
    if bits <= 4 { Format::Q4_0 } else { Format::Q8_0 }
}

fn blocks<'a>(home: &Home, parts: impl Iterator<Item = (&'a Changed, &'a Vec<usize>)>, format: Format) -> Finished {
    let (rows, cols) = (home.outputs, home.inputs);
    let (mut all, mut coded) = (Vec::new(), format);
    for (changed, at) in parts {
        let data = match &changed.codes {
            None => numbers(format, &changed.weight),
            Some(c) => {
                coded = block_format(c.bits);
                coded_blocks(c, coded)
            }
        };
        let row_bytes = coded.run_bytes(cols).unwrap_or(0);
        all.resize(rows * row_bytes, 0);
        scatter(&mut all, &data, at, row_bytes);
    }
    Finished { name: home.tensor.clone(), dtype: Dtype::U8, shape: vec![all.len() as u64], data: all }
}

/// Codes in blocks of 32 with their scale in F16.
pub fn coded_blocks(c: &Codes, format: Format) -> Vec<u8> {
    let mut out = Vec::with_capacity(format.run_bytes(c.codes.len()).unwrap_or(0));
    for (group, scale) in c.codes.chunks_exact(c.group).zip(&c.scales) {
        for block in group.chunks_exact(32) {
            out.extend(f16::from_f32(*scale).to_le_bytes());
            match format {
                Format::Q4_0 => out.extend((0..16).map(|j| (block[j] + 8) as u8 | ((block[j + 16] + 8) as u8) << 4)),
                _ => out.extend(block.iter().map(|c| *c as u8)),
            }
        }
    }
    out
}

fn codes<'a>(home: &Home, parts: impl Iterator<Item = (&'a Changed, &'a Vec<usize>)>, dtype: Dtype) -> Vec<Finished> {
    let (rows, cols) = (home.outputs, home.inputs);
    let mut all = vec![0_i8; rows * cols];
    let (mut scales, mut bits, mut groups) = (Vec::new(), 8, 1);
    for (changed, at) in parts {
        let Some(c) = &changed.codes else { continue };
        (bits, groups) = (stored_bits(c.bits), cols / c.group);
        scales.resize(rows * groups, 1.0);
        scatter(&mut all, &c.codes, at, cols);
        scatter(&mut scales, &c.scales, at, groups);
    }
    let base = &home.tensor;
    let words = (cols as u64 * u64::from(bits)).div_ceil(32);
    let shape: Vec<u8> = [rows as i64, cols as i64].iter().flat_map(|n| n.to_le_bytes()).collect();
    let make = |end: &str, dtype, shape, data| Finished { name: format!("{base}{end}"), dtype, shape, data };
    vec![
        make(
            "_packed",
            Dtype::I32,
            vec![rows as u64, words],
            all.chunks_exact(cols).flat_map(|r| pack(r, bits)).collect(),
        ),
        make(
            "_scale",
            dtype,
            vec![rows as u64, groups as u64],
            numbers(dtype.format().unwrap_or(Format::F32), &scales),
        ),
        make("_shape", Dtype::I64, vec![2], shape),
    ]
}

/// One row of codes plus `2^(bits-1)` as a stream of bits, low bits first, filled up to words of 32 bits.
fn pack(row: &[i8], bits: u32) -> Vec<u8> {
    let per_byte = 8 / bits as usize;
    let half = 1_i16 << (bits - 1);
    let mut bytes: Vec<u8> = row
        .chunks(per_byte)
        .map(|codes| {
            let code = |(i, c): (usize, &i8)| ((i16::from(*c) + half) as u8) << (i as u32 * bits);
            codes.iter().enumerate().map(code).fold(0, |b, c| b | c)
        })
        .collect();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_low_bits_first_and_fills_words() {
        assert_eq!(pack(&[-8, 7, 0, 1, -1], 4), [0xf0, 0x98, 0x07, 0]);
        assert_eq!(pack(&[-128, 0, 127], 8), [0, 128, 255, 0]);
        assert_eq!(pack(&[-2, -1, 0, 1, 1], 2), [0b1110_0100, 0b11, 0, 0]);
        assert_eq!([2, 3, 4, 5, 8].map(stored_bits), [2, 4, 4, 8, 8]);
    }

    fn changed(weight: Vec<f32>, codes: Option<Codes>) -> Changed {
        Changed { weight, kept: None, codes, books: None, low_rank: None, notes: vec![] }
    }

    #[test]
    fn parts_go_to_their_rows() {
        let mut home = Home {
            tensor: "qk.weight".into(),
            outputs: 3,
            inputs: 2,
            transposed: false,
            parts: vec![(Proj::Q, vec![0, 2]), (Proj::K, vec![1])],
        };
        let all = BTreeMap::from([
            (Proj::Q, changed(vec![1.0, 2.0, 5.0, 6.0], None)),
            (Proj::K, changed(vec![3.0, 4.0], None)),
        ]);
        let values =
            |f: &Finished| -> Vec<f32> { f.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect() };
        let one = &finished(&home, &all, Format::F32, Target::HuggingFace)[0];
        assert_eq!((values(one), &one.shape[..]), (vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[3, 2][..]));
        home.transposed = true;
        let one = &finished(&home, &all, Format::F32, Target::HuggingFace)[0];
        assert_eq!((values(one), &one.shape[..]), (vec![1.0, 3.0, 5.0, 2.0, 4.0, 6.0], &[2, 3][..]));
        home.transposed = false;
        let codes = |codes: Vec<i8>, scales: Vec<f32>| Some(Codes { bits: 4, group: 2, codes, scales });
        let all = BTreeMap::from([
            (Proj::Q, changed(vec![], codes(vec![1, 2, 5, 6], vec![0.5, 2.0]))),
            (Proj::K, changed(vec![], codes(vec![3, 4], vec![4.0]))),
        ]);
        let three = finished(&home, &all, Format::F32, Target::HuggingFace);
        assert_eq!(three[0].data, [0xa9, 0, 0, 0, 0xcb, 0, 0, 0, 0xed, 0, 0, 0]);
        assert_eq!((values(&three[1]), &three[1].shape[..]), (vec![0.5, 4.0, 2.0], &[3, 1][..]));
        assert_eq!(three[2].name, "qk.weight_shape");
    }

    #[test]
    fn blocks_of_a_gguf_file_hold_the_codes() {
        let home =
            Home { tensor: "w".into(), outputs: 1, inputs: 64, transposed: false, parts: vec![(Proj::Q, vec![0])] };
        let numbers: Vec<i8> = (0..64).map(|i| (i % 16) as i8 - 8).collect();
        let weight: Vec<f32> = numbers.iter().map(|c| f32::from(*c) * 0.5).collect();
        for bits in [4, 8] {
            let codes = Codes { bits, group: 64, codes: numbers.clone(), scales: vec![0.5] };
            let all = BTreeMap::from([(Proj::Q, changed(weight.clone(), Some(codes)))]);
            let one = &finished(&home, &all, Format::F16, Target::Gguf)[0];
            let mut back = vec![0.0; 64];
            lacuna_kernels::convert::decode_run(block_format(bits), &one.data, &mut back);
            assert_eq!(back, weight);
        }
    }
}
