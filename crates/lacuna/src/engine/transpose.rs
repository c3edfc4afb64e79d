//! Copies of output-major weights whose input channels can be read one by one.
//!
//! Floats are moved: `W[out, in]` becomes `W^T[in, out]`, one run per channel. The codes of Q8_0, Q4_0 and Q4_K are moved
//! too, and their scales stay with groups of channels ([`Orientation::InputGroups`]): a copy holds the same numbers. Only
//! Q6_K, which has a scale for every 16 inputs, is decoded and quantised again, to Q8_0.

use lacuna_core::{
    bytes::Bytes,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{
    Format,
    axpy::groups,
    convert::{decode_run, encode_run},
};

/// Side of a tile; also the group of the block formats that are written.
const TILE: usize = 32;

/// How the copy of a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyForm {
    /// Format.
    pub format: Format,
    /// One of the input-wise orientations.
    pub orientation: Orientation,
}

impl CopyForm {
    /// The form for output-major weights of `source`, and what to tell the user where it is not the same numbers.
    fn of(source: Format) -> (Self, Option<String>) {
        let (format, orientation) = match source {
            Format::F32 | Format::F16 | Format::Bf16 => (source, Orientation::InputMajor),
            Format::Q8_0 | Format::Q6K => (Format::Q8_0, Orientation::InputGroups),
            Format::Q4_0 | Format::Q4K => (source, Orientation::InputGroups),
        };
        let from = source.name();
        if format == source {
            return (Self { format, orientation }, None);
        }
        let note = format!("{from} is quantised again to {} for reading by channels", format.name());
        (Self { format, orientation }, Some(note))
    }

    /// The form for `weight`: what it is, if it can be read by channels already.
    pub fn for_weight(weight: &Weight) -> (Self, Option<String>) {
        match weight.orientation() {
            Orientation::OutputMajor => Self::of(weight.format()),
            orientation => (Self { format: weight.format(), orientation }, None),
        }
    }

    /// Bytes of a copy of a matrix.
    pub fn bytes(self, outputs: usize, inputs: usize) -> Option<usize> {
        match self.orientation {
            Orientation::InputGroups => groups::bytes(self.format, outputs, inputs),
            _ => self.format.run_bytes(outputs)?.checked_mul(inputs),
        }
    }
}

/// The copy of an output-major weight, in the form of [`CopyForm::for_weight`].
///
/// # Panics
/// If `weight` is not output-major.
pub fn by_channels(weight: &Weight) -> Weight {
    assert_eq!(weight.orientation(), Orientation::OutputMajor, "only output-major weights are copied");
    let (form, _) = CopyForm::for_weight(weight);
    let (outputs, inputs) = (weight.outputs(), weight.inputs());
    let out = match (weight.format() == form.format, form.format) {
        (true, Format::F16 | Format::Bf16) => moved::<2>(weight.bytes(), inputs, outputs),
        (true, Format::F32) => moved::<4>(weight.bytes(), inputs, outputs),
        (true, _) => groups::pack(&weight.matrix()).expect("a block format whose blocks divide the inputs"),
        (false, _) => {
            let again = recoded(weight, form.format);
            groups::pack(&again.matrix()).expect("a block format whose blocks divide the inputs")
        }
    };
    Weight::new(form.format, form.orientation, outputs, inputs, Bytes::from(out))
        .expect("the copy has the length of its shape")
}

/// Transposes values of `N` bytes, tile by tile so that both sides stay in the cache.
fn moved<const N: usize>(source: &[u8], inputs: usize, outputs: usize) -> Vec<u8> {
    let mut bytes = vec![0; source.len()];
    let (source, out) = (source.as_chunks::<N>().0, bytes.as_chunks_mut::<N>().0);
    for o0 in (0..outputs).step_by(TILE) {
        for i0 in (0..inputs).step_by(TILE) {
            for i in i0..(i0 + TILE).min(inputs) {
                for o in o0..(o0 + TILE).min(outputs) {
                    out[i * outputs + o] = source[o * inputs + i];
                }
            }
        }
    }
    bytes
}

/// The weight in another block format, output-major.
fn recoded(weight: &Weight, format: Format) -> Weight {
    let (outputs, inputs, matrix) = (weight.outputs(), weight.inputs(), weight.matrix());
    let run = format.run_bytes(inputs).expect("blocks of 32 divide those of 256");
    let (mut out, mut row) = (vec![0; run * outputs], vec![0.0; inputs]);
    for (o, run) in out.chunks_exact_mut(run.max(1)).enumerate() {
        decode_run(matrix.format(), matrix.row(o), &mut row);
        encode_run(format, &row, run);
    }
    Weight::new(format, Orientation::OutputMajor, outputs, inputs, out.into()).expect("a run per output")
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

    #[test]
    fn floats_move_exactly() {
        for format in [Format::F32, Format::F16, Format::Bf16] {
            for (outputs, inputs) in [(1, 1), (33, 70), (64, 32), (5, 100)] {
                let w = weight(format, outputs, inputs);
                let t = by_channels(&w);
                assert_eq!((t.format(), t.orientation()), (format, Orientation::InputMajor));
                let (a, b) = (decoded(&w), decoded(&t));
                for (o, row) in a.iter().enumerate() {
                    row.iter().enumerate().for_each(|(i, v)| assert_eq!(*v, b[i][o], "{format:?} {o} {i}"));
                }
            }
        }
    }

    #[test]
    fn codes_move_and_q6_k_bounds_its_error() {
        // Values span [-1, 1]: half a step of 2/255 at most.
        for (from, to, bound) in [
            (Format::Q8_0, Format::Q8_0, 0.0),
            (Format::Q6K, Format::Q8_0, 0.005),
            (Format::Q4_0, Format::Q4_0, 0.0),
            (Format::Q4K, Format::Q4K, 0.0),
        ] {
            let w = weight(from, 33, 256);
            let t = by_channels(&w);
            assert_eq!((t.format(), t.orientation()), (to, Orientation::InputGroups));
            assert_eq!(Some(t.bytes().len()), CopyForm::for_weight(&w).0.bytes(33, 256));
            assert_eq!(CopyForm::for_weight(&w).1.is_some(), from != to);
            assert_eq!(
                CopyForm::for_weight(&t),
                (CopyForm { format: to, orientation: Orientation::InputGroups }, None)
            );
            if from == to {
                assert_eq!(Some(t.bytes().to_vec()), groups::pack(&w.matrix()));
                continue;
            }
            let (a, b) = (decoded(&w), decoded(&recoded(&w, to)));
            let worst = a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst > 0.0 && worst <= bound, "{from:?}: {worst}");
        }
    }
}
