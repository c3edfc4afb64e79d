//! All formats on all instruction sets of this machine against sums in f64, on odd sizes, at the edge of memory.

use super::*;
use crate::testing::{Guarded, Random, stored};
use crate::{Format, convert};

/// Column counts: one block, odd numbers of blocks, whole groups, and any length for float formats.
fn sizes(format: Format) -> Vec<usize> {
    match format.block_len() {
        1 => (1..=70).chain([96, 127, 128, 129, 255, 257, 300]).collect(),
        32 => (1..=13).chain([32, 37]).map(|n| n * 32).collect(),
        _ => (1..=5).map(|n| n * 256).collect(),
    }
}

/// What the kernel should give, and the sum of magnitudes that its error is measured by.
fn expected(w: &Matrix, row: usize, operand: &Operand, x: &[f32]) -> (f64, f64) {
    let mut weights = vec![0.0; w.cols()];
    convert::decode_run(w.format(), w.row(row), &mut weights);
    let seen = |i: usize| match w.format().block_len() {
        1 => x[i],
        _ => f32::from(operand.int8().q[i]) * operand.int8().d[i / 32],
    };
    let terms = weights.iter().enumerate().map(|(i, &w)| f64::from(w) * f64::from(seen(i)));
    terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()))
}

#[test]
fn every_format_on_every_isa() {
    let pool = Pool::new(1);
    let mut random = Random(1);
    for format in Format::ALL {
        for cols in sizes(format) {
            let rows = 1 + (random.bits() % 9) as usize;
            let guarded = Guarded::new(&stored(format, rows * cols, &mut random));
            let w = Matrix::new(format, rows, cols, guarded.bytes()).unwrap();
            let x = random.floats(cols);
            for isa in isa::available() {
                let mut operand = Operand::new();
                operand.prepare_on(isa, &x, &[format]);
                let mut y = vec![f32::NAN; rows];
                run_on(isa, &pool, &mut [Job { w, x: &operand, y: &mut y }]);
                for (row, &y) in y.iter().enumerate() {
                    let (sum, size) = expected(&w, row, &operand, &x);
                    // The minima of Q4_K cancel against its codes, so its terms understate the intermediate sums.
                    let slack = if format == Format::Q4K { 16.0 } else { 2.0 };
                    let error = (f64::from(y) - sum).abs();
                    assert!(error <= slack * 1e-6 * size + 1e-7, "{format:?} {isa} {rows}x{cols}: {y} for {sum}");
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_company() {
    let mut random = Random(2);
    let pools = [Pool::new(1), Pool::new(2), Pool::new(5)];
    for format in Format::ALL {
        let (rows, cols) = (531, 512 + format.block_len());
        let bytes = stored(format, rows * cols, &mut random);
        let w = Matrix::new(format, rows, cols, &bytes).unwrap();
        let x = random.floats(cols);
        let index: Vec<u32> = (0..rows as u32).filter(|i| i % 7 < 3).collect();
        for isa in isa::available() {
            let mut operand = Operand::new();
            operand.prepare_on(isa, &x, &Format::ALL);
            let mut first = vec![0.0; rows];
            run_on(isa, &pools[0], &mut [Job { w, x: &operand, y: &mut first }]);
            for pool in &pools {
                let (mut a, mut b, mut some) = (vec![1.0; rows], vec![2.0; rows], vec![3.0; index.len()]);
                let again = Job { w, x: &operand, y: &mut a };
                run_on(isa, pool, &mut [again, Job { w, x: &operand, y: &mut b }]);
                run_rows_on(isa, pool, &mut [RowsJob { w, rows: &index, x: &operand, y: &mut some }]);
                assert_eq!(bits(&a), bits(&first));
                assert_eq!(bits(&b), bits(&first));
                let chosen: Vec<f32> = index.iter().map(|&i| first[i as usize]).collect();
                assert_eq!(bits(&some), bits(&chosen), "{format:?} {isa}");
            }
        }
    }
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn bad_numbers_surface() {
    let pool = Pool::new(1);
    let mut random = Random(3);
    for format in Format::ALL {
        let bytes = stored(format, 3 * 512, &mut random);
        let w = Matrix::new(format, 3, 512, &bytes).unwrap();
        for isa in isa::available() {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = random.floats(512);
                x[300] = bad;
                let mut operand = Operand::new();
                operand.prepare_on(isa, &x, &[format]);
                let mut y = [0.0; 3];
                run_on(isa, &pool, &mut [Job { w, x: &operand, y: &mut y }]);
                assert!(y.iter().all(|y| !y.is_finite()), "{format:?} {isa} {bad}: {y:?}");
            }
        }
    }
}

#[test]
fn nothing_to_do() {
    let pool = Pool::new(2);
    let operand = {
        let mut o = Operand::new();
        o.prepare(&[], &[Format::F32]);
        o
    };
    let w = Matrix::new(Format::F32, 0, 0, &[]).unwrap();
    run(&pool, &mut [Job { w, x: &operand, y: &mut [] }]);
    run(&pool, &mut []);
    run_rows(&pool, &mut [RowsJob { w, rows: &[], x: &operand, y: &mut [] }]);
}

#[test]
#[should_panic(expected = "not prepared")]
fn unprepared_form_is_refused() {
    let mut operand = Operand::new();
    operand.prepare(&[0.0; 32], &[Format::F32]);
    let w = Matrix::new(Format::Q8_0, 1, 32, &[0; 34]).unwrap();
    run(&Pool::new(1), &mut [Job { w, x: &operand, y: &mut [0.0] }]);
}
