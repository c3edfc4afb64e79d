//! Quantised Hugging Face checkpoints of the compressed-tensors library: its formats `pack-quantized` and `int-quantized`,
//! symmetric, with one scale per group of columns or per row.
//!
//! Source: vllm-project/compressed-tensors, `compressors/` and `quantization/quant_config.py`. A layer `P` is stored as
//! `P.weight_packed` (I32, codes plus `2^(bits-1)` as a stream of bits per row, low bits first), `P.weight_scale`
//! `[rows, groups]` and `P.weight_shape`; in `int-quantized` as `P.weight` (I8) and `P.weight_scale`. No kernel reads these,
//! so loading turns them into the block format whose codes are the same: Q4_0 up to 4 bits, Q8_0 up to 8, with the scale
//! repeated for every 32 columns. Groups that are no multiple of 32 become F32. Activations are computed as for any other
//! weight, whatever the configuration says of theirs.

use super::fields::Fields;
use super::source::{Original, Source, Stored};
use crate::error::{Error, Result};
use half::f16;
use lacuna_core::bytes::Bytes;
use lacuna_core::format::safetensors::{self, Dtype};
use lacuna_kernels::{Format, convert::decode_run};

/// Codes of a weight and their scales, as they are stored.
#[derive(Clone, Debug)]
pub struct Codes {
    /// Bits of a code.
    bits: u32,
    /// Whether codes are whole bytes (`int-quantized`) and not a stream of bits.
    bytes: bool,
    /// `[rows, groups]`.
    scales: Bytes,
    scale_format: Format,
    groups: usize,
}

/// What the configuration says of the whole checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scheme {
    /// Whether there are codes of 2, 4 and 8 bits.
    widths: [bool; WIDTHS.len()],
}

/// Bits of codes that are read.
const WIDTHS: [u32; 3] = [2, 4, 8];

impl Scheme {
    /// Codes of any of these bits.
    pub fn new(bits: impl IntoIterator<Item = u32>) -> Self {
        let mut widths = [false; WIDTHS.len()];
        bits.into_iter().for_each(|b| WIDTHS.iter().zip(&mut widths).for_each(|(w, on)| *on |= *w == b));
        Self { widths }
    }

    /// The bits with which a row of `cols` codes takes `words` words; `None` if there are none, or several.
    fn bits(self, cols: usize, words: usize) -> Option<u32> {
        let fits = |b: u32| (cols as u64).checked_mul(u64::from(b)).map(|n| n.div_ceil(32)) == Some(words as u64);
        let mut all = WIDTHS.into_iter().zip(self.widths).filter(|(b, on)| *on && fits(*b)).map(|(b, _)| b);
        all.next().filter(|_| all.next().is_none())
    }

    /// The scheme of `quantization_config`; `None` if there is none.
    ///
    /// # Errors
    /// Methods, formats and grids that are not read here.
    pub fn of(fields: &Fields) -> Result<Option<Self>> {
        let Some(config) = fields.get("quantization_config").filter(|c| !c.is_null()) else { return Ok(None) };
        let remedy = "; convert the checkpoint to BF16, or use a GGUF file";
        let refuse = |what: String| Err(fields.unsupported(what, remedy));
        let text = |key: &str| config.get(key).and_then(|v| v.as_str());
        if text("quant_method") != Some("compressed-tensors") {
            return refuse(format!(
                "quantization_config with method {}",
                config.get("quant_method").unwrap_or(&"".into())
            ));
        }
        let format = text("format").unwrap_or_default();
        if !["pack-quantized", "int-quantized"].contains(&format) {
            return refuse(format!("compressed-tensors format `{}`", format.chars().take(60).collect::<String>()));
        }
        let groups = config.get("config_groups").and_then(|g| g.as_object());
        let all: Vec<_> = groups.into_iter().flat_map(|g| g.values()).map(|g| g.get("weights")).collect();
        let mut widths = Vec::new();
        for weights in all {
            let of = |key: &str| weights.and_then(|w| w.get(key));
            let bits = of("num_bits").and_then(serde_json::Value::as_u64).unwrap_or(0);
            if !matches!(bits, 2 | 4 | 8) || of("type").and_then(|t| t.as_str()) != Some("int") {
                let shown = weights.map_or_else(|| "none".into(), ToString::to_string);
                return refuse(format!("compressed-tensors weights other than of 2, 4 or 8 integer bits ({shown})"));
            }
            if of("symmetric").and_then(serde_json::Value::as_bool) != Some(true) {
                return refuse("compressed-tensors weights with zero points".into());
            }
            widths.push(bits as u32);
        }
        if widths.is_empty() {
            return refuse("quantization_config without a group of weights".into());
        }
        Ok(Some(Self::new(widths)))
    }
}

/// Whether `name` belongs to the codes of another tensor.
pub(super) fn is_part(name: &str) -> bool {
    ["_scale", "_shape", "_zero_point", "_g_idx"]
        .iter()
        .any(|end| name.strip_suffix(end).is_some_and(|n| n.ends_with(".weight")))
}

/// Puts the quantised tensor whose codes are `name` into `source`, if it is one.
///
/// # Errors
/// Codes, scales and shapes that do not belong together.
pub(super) fn add(scheme: Scheme, files: &safetensors::Model, name: &str, source: &mut Source) -> Result<bool> {
    let Some((entry, bytes)) = files.get(name) else { return Ok(false) };
    let (weight, whole) = match name.strip_suffix("_packed") {
        Some(weight) if weight.ends_with(".weight") => (weight, false),
        _ if name.ends_with(".weight") && entry.dtype == Dtype::I8 => (name, true),
        _ => return Ok(false),
    };
    let bad = |what: String| Error::Unsupported {
        file: source.file.clone(),
        what: format!("tensor `{name}`: {what}"),
        remedy: "; compress or download the model again".into(),
    };
    for end in ["_g_idx", "_zero_point"] {
        if files.get(&format!("{weight}{end}")).is_some() {
            return Err(bad(format!("with `{weight}{end}`")));
        }
    }
    let (scale, scales) = files.require(&format!("{weight}_scale"))?;
    let scale_format = scale.format()?;
    let (rows, width) = entry.matrix_shape()?;
    let cols = if whole {
        width
    } else {
        columns(files, weight, rows).ok_or_else(|| bad("without a usable `weight_shape`".into()))?
    };
    let (scale_rows, groups) = scale.matrix_shape()?;
    let bits = if whole { Some(8) } else { scheme.bits(cols, width).filter(|_| entry.dtype == Dtype::I32) };
    let Some(bits) = bits.filter(|_| scale_rows == rows && groups > 0 && cols.is_multiple_of(groups)) else {
        return Err(bad(format!("{:?} codes and {:?} scales for {rows} rows of {cols}", entry.shape, scale.shape)));
    };
    let format = match cols / groups {
        group if !group.is_multiple_of(32) => Format::F32,
        _ if bits <= 4 => Format::Q4_0,
        _ => Format::Q8_0,
    };
    let codes = Codes { bits, bytes: whole, scales, scale_format, groups };
    let from = Some(Original::Codes(codes));
    source.tensors.insert(weight.to_owned(), Stored { format, shape: vec![rows, cols], bytes, from });
    Ok(true)
}

/// The columns that `weight_shape` tells, if it fits the rows.
fn columns(files: &safetensors::Model, weight: &str, rows: usize) -> Option<usize> {
    let (entry, bytes) = files.get(&format!("{weight}_shape"))?;
    let numbers: Vec<i64> = match entry.dtype {
        Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
        Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect(),
        _ => return None,
    };
    let [r, c] = numbers[..] else { return None };
    (r == rows as i64 && c > 0).then(|| usize::try_from(c).ok()).flatten()
}

impl Codes {
    /// What messages call it.
    pub fn name(&self) -> &'static str {
        match (self.bytes, self.bits) {
            (true, _) => "int-quantized",
            (_, 2) => "pack-quantized 2 bits",
            (_, 4) => "pack-quantized 4 bits",
            _ => "pack-quantized 8 bits",
        }
    }

    /// The weights in `format`, which is the one that `add` chose.
    ///
    /// # Errors
    /// A scale that F16 cannot hold.
    pub fn convert(
        &self,
        codes: &[u8],
        (rows, cols): (usize, usize),
        format: Format,
    ) -> std::result::Result<Vec<u8>, String> {
        let mut scales = vec![0.0; rows * self.groups];
        decode_run(self.scale_format, &self.scales, &mut scales);
        if let Some(s) = scales.iter().find(|s| !(s.is_finite() && s.abs() <= f16::MAX.to_f32())) {
            return Err(format!("scale {s} is not a number that F16 holds"));
        }
        let group = cols / self.groups;
        let row_bytes = codes.len().checked_div(rows).unwrap_or(0);
        let mut out = Vec::with_capacity(format.run_bytes(cols).unwrap_or(0) * rows);
        let mut row = vec![0_i8; cols];
        for (r, bytes) in codes.chunks_exact(row_bytes.max(1)).enumerate() {
            self.unpack(bytes, &mut row);
            for (g, part) in row.chunks_exact(group).enumerate() {
                put(part, scales[r * self.groups + g], format, &mut out);
            }
        }
        Ok(out)
    }

    /// One row of signed codes.
    fn unpack(&self, bytes: &[u8], row: &mut [i8]) {
        if self.bytes {
            row.iter_mut().zip(bytes).for_each(|(c, b)| *c = *b as i8);
            return;
        }
        let (per_byte, half) = (8 / self.bits as usize, 1_i16 << (self.bits - 1));
        let mask = ((1_u16 << self.bits) - 1) as u8;
        for (j, c) in row.iter_mut().enumerate() {
            let code = bytes[j / per_byte] >> (j % per_byte * self.bits as usize) & mask;
            *c = (i16::from(code) - half) as i8;
        }
    }
}

/// Appends one group of codes.
fn put(codes: &[i8], scale: f32, format: Format, out: &mut Vec<u8>) {
    let scale_bytes = f16::from_f32(scale).to_le_bytes();
    match format {
        Format::Q4_0 => {
            for block in codes.chunks_exact(32) {
                out.extend(scale_bytes);
                out.extend((0..16).map(|j| (block[j] + 8) as u8 | ((block[j + 16] + 8) as u8) << 4));
            }
        }
        Format::Q8_0 => {
            for block in codes.chunks_exact(32) {
                out.extend(scale_bytes);
                out.extend(block.iter().map(|c| *c as u8));
            }
        }
        _ => out.extend(codes.iter().flat_map(|c| (f32::from(*c) * scale).to_le_bytes())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(bits: u32, bytes: bool, scales: &[f32]) -> Codes {
        let scales: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let groups = scales.len() / 4;
        Codes { bits, bytes, scales: scales.into(), scale_format: Format::F32, groups }
    }

    fn decoded(format: Format, bytes: &[u8], n: usize) -> Vec<f32> {
        let mut out = vec![0.0; n];
        decode_run(format, bytes, &mut out);
        out
    }

    #[test]
    fn nibbles_from_the_lowest_up_with_eight_taken_off() {
        let stream: Vec<u8> = (0..16).map(|i| (2 * i % 16) as u8 | (((2 * i + 1) % 16) as u8) << 4).collect();
        let expected: Vec<f32> = (0..32).map(|i| ((i % 16) as f32 - 8.0) * 0.5).collect();
        let made = codes(4, false, &[0.5]).convert(&stream, (1, 32), Format::Q4_0).unwrap();
        assert_eq!(decoded(Format::Q4_0, &made, 32), expected);
        let made = codes(4, false, &[0.5, 0.5]).convert(&stream, (1, 32), Format::F32).unwrap();
        assert_eq!(decoded(Format::F32, &made, 32), expected);
    }

    #[test]
    fn the_width_of_a_row_tells_its_bits() {
        let both = Scheme::new([4, 8]);
        assert_eq!([8, 16, 4].map(|words| both.bits(64, words)), [Some(4), Some(8), None]);
        assert_eq!(Scheme::new([2]).bits(33, 3), Some(2));
        // Two codes of 2 or of 4 bits both take one word.
        assert_eq!(Scheme::new([2, 4]).bits(2, 1), None);
        assert_eq!(both.bits(usize::MAX, 1), None);
    }

    #[test]
    fn bytes_and_pairs_of_bits() {
        let stream: Vec<u8> = (0..32).map(|i| i * 8).collect();
        let made = codes(8, false, &[1.0]).convert(&stream, (1, 32), Format::Q8_0).unwrap();
        assert_eq!(decoded(Format::Q8_0, &made, 32)[..3], [-128.0, -120.0, -112.0]);
        let made = codes(8, true, &[1.0]).convert(&stream, (1, 32), Format::Q8_0).unwrap();
        assert_eq!(decoded(Format::Q8_0, &made, 32)[15..18], [120.0, -128.0, -120.0]);
        let made = codes(2, false, &[2.0]).convert(&[0b1110_0100; 8], (1, 32), Format::Q4_0).unwrap();
        assert_eq!(decoded(Format::Q4_0, &made, 32)[..5], [-4.0, -2.0, 0.0, 2.0, -4.0]);
        assert!(codes(4, false, &[f32::NAN]).convert(&[0; 16], (1, 32), Format::Q4_0).is_err());
    }
}
