//! Input-major copies of output-major weights: `W[out, in]` becomes `W^T[in, out]`, one run per input channel.
//!
//! Floats are moved, so the copy is exact. Quantised weights are decoded and quantised again, because a skipped channel
//! must be able to skip its scales: the groups of 32 then lie along the outputs.

use lacuna_core::{
    bytes::Bytes,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{
    Format,
    convert::{decode_run, encode_run},
};

/// Side of a tile; also the group of the block formats that are written.
const TILE: usize = 32;

/// The format of an input-major copy, and what to tell the user where it is not the same numbers.
pub fn input_major_format(source: Format, outputs: usize) -> (Format, Option<String>) {
    let target = match source {
        Format::F32 | Format::F16 | Format::Bf16 => return (source, None),
        Format::Q8_0 | Format::Q6K => Format::Q8_0,
        Format::Q4_0 | Format::Q4K => Format::Q4_0,
    };
    let from = source.name();
    if !outputs.is_multiple_of(target.block_len()) {
        let note =
            format!("{from} with {outputs} outputs (not a multiple of {TILE}) is kept as F16 in input-major form");
        return (Format::F16, Some(note));
    }
    (target, Some(format!("{from} is quantised again to {} with groups along the outputs", target.name())))
}

/// The input-major copy of an output-major weight, in the format of [`input_major_format`].
///
/// # Panics
/// If `weight` is input-major already.
pub fn input_major(weight: &Weight) -> Weight {
    assert_eq!(weight.orientation(), Orientation::OutputMajor, "only output-major weights are copied");
    let (format, _) = input_major_format(weight.format(), weight.outputs());
    let (outputs, inputs) = (weight.outputs(), weight.inputs());
    let run = format.run_bytes(outputs).expect("input_major_format picks a format whose blocks divide the outputs");
    let mut out = vec![0; run * inputs];
    match (weight.format() == format, format.block_bytes()) {
        (true, 2) => move_values::<2>(weight.bytes(), inputs, outputs, &mut out),
        (true, 4) => move_values::<4>(weight.bytes(), inputs, outputs, &mut out),
        _ => recode(weight, format, &mut out),
    }
    Weight::new(format, Orientation::InputMajor, outputs, inputs, Bytes::from(out))
        .expect("the copy has the length of its shape")
}

/// Transposes values of `N` bytes, tile by tile so that both sides stay in the cache.
fn move_values<const N: usize>(source: &[u8], inputs: usize, outputs: usize, out: &mut [u8]) {
    let (source, out) = (source.as_chunks::<N>().0, out.as_chunks_mut::<N>().0);
    for o0 in (0..outputs).step_by(TILE) {
        for i0 in (0..inputs).step_by(TILE) {
            for i in i0..(i0 + TILE).min(inputs) {
                for o in o0..(o0 + TILE).min(outputs) {
                    out[i * outputs + o] = source[o * inputs + i];
                }
            }
        }
    }
}

/// Decodes a strip of 32 outputs, and encodes from each of its channels the 32 values of one run.
fn recode(weight: &Weight, format: Format, out: &mut [u8]) {
    let (outputs, inputs, matrix) = (weight.outputs(), weight.inputs(), weight.matrix());
    let run = out.len() / inputs.max(1);
    let mut strip = vec![0.0; TILE * inputs];
    let mut values = [0.0; TILE];
    for o0 in (0..outputs).step_by(TILE) {
        let n = TILE.min(outputs - o0);
        for (o, row) in strip.chunks_exact_mut(inputs).take(n).enumerate() {
            decode_run(matrix.format(), matrix.row(o0 + o), row);
        }
        let start = o0 / format.block_len() * format.block_bytes();
        let length = n / format.block_len() * format.block_bytes();
        for i in 0..inputs {
            for (o, v) in values[..n].iter_mut().enumerate() {
                *v = strip[o * inputs + i];
            }
            encode_run(format, &values[..n], &mut out[i * run + start..][..length]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(format: Format, outputs: usize, inputs: usize) -> Weight {
        let mut bytes = Vec::new();
        for o in 0..outputs {
            let row: Vec<f32> = (0..inputs).map(|i| ((o * 131 + i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
            let mut run = vec![0; format.run_bytes(inputs).unwrap()];
            encode_run(format, &row, &mut run);
            bytes.extend(run);
        }
        Weight::new(format, Orientation::OutputMajor, outputs, inputs, bytes.into()).unwrap()
    }

    fn decoded(w: &Weight) -> Vec<Vec<f32>> {
        let m = w.matrix();
        let mut rows = vec![vec![0.0; m.cols()]; m.rows()];
        rows.iter_mut().enumerate().for_each(|(r, row)| decode_run(m.format(), m.row(r), row));
        rows
    }

    fn worst(a: &Weight, b: &Weight) -> f32 {
        let (a, b) = (decoded(a), decoded(b));
        let pairs = a.iter().enumerate().flat_map(|(o, row)| row.iter().enumerate().map(move |(i, v)| (o, i, *v)));
        pairs.map(|(o, i, v)| (v - b[i][o]).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn floats_move_exactly() {
        for format in [Format::F32, Format::F16, Format::Bf16] {
            for (outputs, inputs) in [(1, 1), (33, 70), (64, 32), (5, 100)] {
                let w = weight(format, outputs, inputs);
                let t = input_major(&w);
                assert_eq!((t.format(), t.orientation()), (format, Orientation::InputMajor));
                assert_eq!(worst(&w, &t), 0.0, "{format:?} {outputs}x{inputs}");
            }
        }
    }

    #[test]
    fn quantised_weights_keep_their_bits_and_bound_their_error() {
        // Values span [-1, 1]: half a step of 2/255 and of 2/16 at most (Q4_0's positive end is one step short).
        for (from, to, bound) in [
            (Format::Q8_0, Format::Q8_0, 0.005),
            (Format::Q6K, Format::Q8_0, 0.005),
            (Format::Q4_0, Format::Q4_0, 0.15),
            (Format::Q4K, Format::Q4_0, 0.15),
        ] {
            let w = weight(from, 64, 256);
            let t = input_major(&w);
            assert_eq!(t.format(), to);
            assert!(worst(&w, &t) <= bound, "{from:?}: {}", worst(&w, &t));
        }
    }

    #[test]
    fn odd_outputs_fall_back_to_f16_and_say_so() {
        let w = weight(Format::Q8_0, 33, 64);
        let t = input_major(&w);
        assert_eq!(t.format(), Format::F16);
        assert!(worst(&w, &t) < 0.001);
        assert!(input_major_format(Format::Q8_0, 33).1.unwrap().contains("33 outputs"));
    }
}
