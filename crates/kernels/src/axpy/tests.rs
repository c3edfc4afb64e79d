//! All formats on all instruction sets of this machine against sums in f64; independence of threads and zeros.

use super::*;
use crate::testing::{Guarded, Random, stored};
use crate::{Format, convert};

fn sizes(format: Format) -> Vec<usize> {
    match format.block_len() {
        1 => (1..=40).chain([63, 64, 65, 128, 200, 255, 256, 257, 300, 511, 700]).collect(),
        32 => [1, 2, 3, 5, 8, 9, 17, 24, 27].map(|n| n * 32).to_vec(),
        _ => (1..=4).map(|n| n * 256).collect(),
    }
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_format_on_every_isa() {
    let pool = Pool::new(2);
    let mut random = Random(1);
    for format in Format::ALL {
        for cols in sizes(format) {
            // Few channels and many, so that groups of every width and what is left of them occur.
            let most = if cols.is_multiple_of(3) { 150 } else { 30 };
            let rows = 1 + (random.bits() % most) as usize;
            let guarded = Guarded::new(&stored(format, rows * cols, &mut random));
            let wt = Matrix::new(format, rows, cols, guarded.bytes()).unwrap();
            // Every other channel or so, the last one always: it ends at the guard page.
            let index: Vec<u32> =
                (0..rows as u32).filter(|&i| random.bits().is_multiple_of(2) || i == rows as u32 - 1).collect();
            let value = random.floats(index.len());
            let (mut sum, mut size) = (vec![0.0; cols], vec![0.0; cols]);
            let mut weights = vec![0.0; cols];
            for (&i, &v) in index.iter().zip(&value) {
                convert::decode_run(format, wt.row(i as usize), &mut weights);
                for c in 0..cols {
                    sum[c] += f64::from(v) * f64::from(weights[c]);
                    size[c] += (f64::from(v) * f64::from(weights[c])).abs();
                }
            }
            for isa in isa::available() {
                let mut y = vec![f32::NAN; cols];
                run_on(isa, &pool, &mut [Job { w: wt.into(), index: &index, value: &value, y: &mut y }]);
                for c in 0..cols {
                    let error = (f64::from(y[c]) - sum[c]).abs();
                    assert!(error <= 1e-6 * size[c] + 1e-7, "{format:?} {isa} {rows}x{cols}: {} for {}", y[c], sum[c]);
                }
            }
        }
    }
}

#[test]
fn threads_and_zeros_change_no_bit() {
    let mut random = Random(2);
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    // Few channels, and enough for several chunks of them.
    for (format, rows) in Format::ALL.into_iter().flat_map(|f| [(f, 77), (f, 2000)]) {
        let cols = 2304 + format.block_len();
        let bytes = stored(format, rows * cols, &mut random);
        let wt = Matrix::new(format, rows, cols, &bytes).unwrap();
        let x: Vec<f32> = (0..rows).map(|i| if i % 3 == 0 { random.float() } else { [0.0, -0.0][i % 2] }).collect();
        let all: Vec<u32> = (0..rows as u32).collect();
        for isa in isa::available() {
            let (mut index, mut value) = (Vec::new(), Vec::new());
            crate::select::nonzero(isa, &x, &mut index, &mut value);
            let mut first = vec![0.0; cols];
            run_on(isa, &pools[0], &mut [Job { w: wt.into(), index: &all, value: &x, y: &mut first }]);
            for pool in &pools {
                let (mut a, mut b) = (vec![1.0; cols], vec![2.0; cols]);
                let dense = Job { w: wt.into(), index: &all, value: &x, y: &mut a };
                run_on(isa, pool, &mut [dense, Job { w: wt.into(), index: &index, value: &value, y: &mut b }]);
                assert_eq!(bits(&a), bits(&first), "{format:?} {isa}");
                assert_eq!(bits(&b), bits(&first), "{format:?} {isa}");
            }
        }
    }
}

#[test]
fn bad_numbers_surface() {
    let mut random = Random(3);
    for format in Format::ALL {
        let (rows, cols) = (40, 512);
        let bytes = stored(format, rows * cols, &mut random);
        let wt = Matrix::new(format, rows, cols, &bytes).unwrap();
        let index: Vec<u32> = (0..rows as u32).collect();
        for (at, bad) in [(17, f32::NAN), (39, f32::NAN), (3, f32::INFINITY), (30, f32::NEG_INFINITY)] {
            let mut value = random.floats(rows);
            value[at] = bad;
            for isa in isa::available() {
                let mut y = vec![0.0; cols];
                run_on(isa, &Pool::new(1), &mut [Job { w: wt.into(), index: &index, value: &value, y: &mut y }]);
                assert!(y.iter().all(|y| !y.is_finite()), "{format:?} {isa} {bad}");
            }
        }
    }
}

#[test]
fn one_channel_far_above_the_others() {
    let mut random = Random(4);
    for format in [Format::Q8_0, Format::Q4_0] {
        let (rows, cols) = (48, 320);
        let bytes = stored(format, rows * cols, &mut random);
        let wt = Matrix::new(format, rows, cols, &bytes).unwrap();
        let index: Vec<u32> = (0..rows as u32).collect();
        for outlier in [1e-30, 1e3, 1e6, 1e30] {
            let mut value = random.floats(rows);
            value[20] = outlier;
            let (mut exact, mut weights) = (vec![0.0; cols], vec![0.0; cols]);
            for (&i, &v) in index.iter().zip(&value) {
                convert::decode_run(format, wt.row(i as usize), &mut weights);
                exact.iter_mut().zip(&weights).for_each(|(y, &w)| *y += f64::from(v) * f64::from(w));
            }
            // Scales are at most 0.1 and codes at most 128 steps.
            let largest = f64::from(outlier).max(1.0) * 0.1;
            for isa in isa::available() {
                let mut y = vec![0.0; cols];
                run_on(isa, &Pool::new(1), &mut [Job { w: wt.into(), index: &index, value: &value, y: &mut y }]);
                for (y, exact) in y.iter().zip(&exact) {
                    let error = (f64::from(*y) - exact).abs();
                    assert!(error <= 1e-6 * (exact.abs() + largest * 128.0), "{format:?} {isa} {outlier}: {y} {exact}");
                }
            }
        }
    }
}

#[test]
fn no_channel_gives_zeros() {
    let wt = Matrix::new(Format::Q8_0, 2, 32, &[1; 68]).unwrap();
    for isa in isa::available() {
        let mut y = [f32::NAN; 32];
        run_on(isa, &Pool::new(1), &mut [Job { w: wt.into(), index: &[], value: &[], y: &mut y }]);
        assert_eq!(y, [0.0; 32]);
    }
}

#[test]
#[should_panic(expected = "not below")]
fn channel_out_of_range_is_refused() {
    let wt = Matrix::new(Format::F32, 1, 1, &[0; 4]).unwrap();
    run(&Pool::new(1), &mut [Job { w: wt.into(), index: &[1], value: &[1.0], y: &mut [0.0] }]);
}
