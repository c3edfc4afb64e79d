//! Tensors of types without a kernel format become the nearest format that has one.

use super::{TensorType, decode_run};
use crate::{
    error::{Error, Result},
    size::Size,
};
use lacuna_kernels::{Format, convert::encode_run};

/// The format that a tensor with rows of `cols` numbers is computed in; its own where kernels have it.
///
/// Otherwise the smallest that adds little to the loss the file already has (re-coding noise against the noise of the
/// type itself is measured in the tests): Q4_1 becomes Q4_K (Q8_0 where a row is no multiple of 256), Q5_0 and Q5_1
/// Q8_0, Q5_K and Q3_K Q6_K (their steps change every 16 or 32 numbers, as in Q6_K), Q2_K Q4_K.
///
/// # Errors
/// [`Error::Unsupported`] for types that are not decoded here.
pub fn nearest(kind: TensorType, cols: usize) -> Result<Format> {
    let own = kind.format();
    let near = match kind {
        TensorType::Q4_1 if cols.is_multiple_of(Format::Q4K.block_len()) => Some(Format::Q4K),
        TensorType::Q4_1 | TensorType::Q5_0 | TensorType::Q5_1 => Some(Format::Q8_0),
        TensorType::Q2_K => Some(Format::Q4K),
        TensorType::Q3_K | TensorType::Q5_K => Some(Format::Q6K),
        _ => None,
    };
    own.or(near).ok_or_else(|| kind.unsupported())
}

/// Re-codes whole rows of `cols` numbers from `kind` to `to`: any part of a tensor, so that rows can be shared out to
/// threads.
///
/// # Errors
/// If `kind` is not decoded here, or a length does not fit the rows.
pub fn convert_rows(kind: TensorType, to: Format, cols: usize, bytes: &[u8], out: &mut [u8]) -> Result<()> {
    let misfit = || Error::malformed(format!("{} rows of {cols} numbers", kind.name()), "whole blocks of both formats");
    let from_row = kind.size(&[cols as u64])?.index()?;
    let to_row = to.run_bytes(cols).ok_or_else(misfit)?;
    let rows = Size::from(bytes.len()).exactly_over(Size::from(from_row))?;
    if rows.times(Size::from(to_row))? != Size::from(out.len()) {
        return Err(misfit());
    }
    let mut values = vec![0.0; cols];
    for (from, to_bytes) in bytes.chunks_exact(from_row).zip(out.chunks_exact_mut(to_row)) {
        decode_run(kind, from, &mut values)?;
        encode_run(to, &values, to_bytes);
    }
    Ok(())
}

/// A whole tensor of `rows` rows in its [`nearest`] format.
///
/// # Errors
/// As [`convert_rows`].
pub fn convert_tensor(kind: TensorType, bytes: &[u8], rows: usize, cols: usize) -> Result<(Format, Vec<u8>)> {
    let format = nearest(kind, cols)?;
    let row = format.run_bytes(cols).ok_or_else(|| kind.unsupported())?;
    let expected = kind.size(&[cols as u64, rows as u64])?;
    if expected != Size::from(bytes.len()) {
        return Err(Error::malformed(format!("{} bytes", bytes.len()), format!("{} for {rows} rows", expected.0)));
    }
    let mut out = vec![0; Size::from(row).times(Size::from(rows))?.index()?];
    convert_rows(kind, format, cols, bytes, &mut out)?;
    Ok((format, out))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random blocks with plausible scales, as values.
    fn random(kind: TensorType, blocks: usize) -> (Vec<u8>, Vec<f32>) {
        let mut s = 0x9E37_79B9_7F4A_7C15_u64;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 32) as u8
        };
        let mut bytes: Vec<u8> = (0..blocks * kind.block_bytes()).map(|_| next()).collect();
        let positive = 0x2A66_u16.to_le_bytes(); // 0.05
        let negative = 0xB800_u16.to_le_bytes(); // -0.5
        for block in bytes.chunks_exact_mut(kind.block_bytes()) {
            let places: &[(usize, [u8; 2])] = match kind {
                TensorType::Q4_1 | TensorType::Q5_1 => &[(0, positive), (2, negative)],
                TensorType::Q2_K => &[(80, positive), (82, positive)],
                TensorType::Q3_K => &[(108, positive)],
                TensorType::Q5_K => &[(0, positive), (2, positive)],
                _ => &[(0, positive)],
            };
            places.iter().for_each(|(at, h)| block[*at..*at + 2].copy_from_slice(h));
        }
        let mut values = vec![0.0; blocks * kind.block_len()];
        decode_run(kind, &bytes, &mut values).unwrap();
        (bytes, values)
    }

    #[test]
    fn recoding_adds_little_noise() {
        // Error over the size of the values; the types' own errors on bell-shaped weights are about 0.08 (Q4), 0.04 (Q5),
        // 0.25 (Q2) and 0.15 (Q3). Random codes and scales are harder than real blocks.
        let cases = [
            (TensorType::Q4_1, 0.02),
            (TensorType::Q5_0, 0.006),
            (TensorType::Q5_1, 0.006),
            (TensorType::Q2_K, 0.08),
            (TensorType::Q3_K, 0.02),
            (TensorType::Q5_K, 0.02),
        ];
        for (kind, bound) in cases {
            let cols = 512;
            let (bytes, values) = random(kind, 64 * 512 / kind.block_len());
            let (format, coded) = convert_tensor(kind, &bytes, 64, cols).unwrap();
            let mut back = vec![0.0; values.len()];
            lacuna_kernels::convert::decode_run(format, &coded, &mut back);
            let square = |it: &mut dyn Iterator<Item = f32>| it.map(|v| f64::from(v) * f64::from(v)).sum::<f64>();
            let error = square(&mut values.iter().zip(&back).map(|(a, b)| a - b));
            let noise = (error / square(&mut values.iter().copied())).sqrt();
            println!("{} -> {}: {noise:.4}", kind.name(), format.name());
            assert!(noise < bound, "{} -> {}: {noise}", kind.name(), format.name());
        }
    }

    #[test]
    fn formats_of_the_kernels_stay_as_they_are() {
        for format in Format::ALL {
            assert_eq!(nearest(TensorType::of(format), 256).unwrap(), format);
        }
        assert_eq!(nearest(TensorType::Q4_1, 96).unwrap(), Format::Q8_0);
        let message = nearest(TensorType::IQ2_XS, 256).unwrap_err().to_string();
        assert!(message.starts_with("type IQ2_XS as a weight is not supported. Re-quantise"), "{message}");
    }

    #[test]
    fn lengths_that_do_not_fit_are_errors() {
        let mut out = vec![0; 34];
        assert!(convert_rows(TensorType::Q5_0, Format::Q8_0, 32, &[0; 22], &mut out).is_ok());
        assert!(convert_rows(TensorType::Q5_0, Format::Q8_0, 32, &[0; 21], &mut out).is_err());
        assert!(convert_rows(TensorType::Q5_0, Format::Q8_0, 32, &[0; 44], &mut out).is_err());
        assert!(convert_rows(TensorType::Q5_0, Format::Q4K, 32, &[0; 22], &mut out).is_err());
        assert!(convert_rows(TensorType::Q5_0, Format::Q8_0, 33, &[0; 22], &mut out).is_err());
        assert!(convert_tensor(TensorType::Q5_0, &[0; 22], usize::MAX, 32).is_err());
    }
}
