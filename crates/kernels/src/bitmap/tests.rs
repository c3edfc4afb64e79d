//! Packing and unpacking, and all instruction sets against the dense products and sums in f64, on odd sizes and densities.

use super::*;
use crate::gemm;
use crate::gemv::{self, Operand};
use crate::testing::{Guarded, Random, stored};
use crate::{Isa, Matrix, Pool, convert, isa};

/// Dense rows with about `share` of their numbers zero; every fourth row has none but zeros where `share` is not 0.
fn pruned(format: Format, rows: usize, cols: usize, share: f64, random: &mut Random) -> Vec<u8> {
    let mut bytes = stored(format, rows * cols, random);
    let row = format.run_bytes(cols).unwrap();
    for (r, row) in bytes.chunks_exact_mut(row).enumerate() {
        for (b, block) in row.chunks_exact_mut(format.block_bytes()).enumerate() {
            let mut drop = |j: usize| {
                let dropped = (random.bits() >> 11) as f64 / (1_u64 << 53) as f64;
                dropped < share || (share > 0.0 && (r % 4 == 3 || (r % 4 == 2 && b + j == 0)))
            };
            match format {
                Format::Bf16 if drop(b) => block.copy_from_slice(&[0, if r % 2 == 0 { 0x80 } else { 0 }]),
                Format::Q8_0 => block[2..].iter_mut().enumerate().filter(|(j, _)| drop(*j)).for_each(|(_, q)| *q = 0),
                Format::Q4_0 => block[2..].iter_mut().enumerate().for_each(|(j, q)| {
                    *q = if drop(j) { *q & 0xf0 | 8 } else { *q };
                    *q = if drop(j + 16) { *q & 0x0f | 0x80 } else { *q };
                }),
                _ => {}
            }
        }
    }
    bytes
}

fn sizes(format: Format) -> Vec<usize> {
    match format.block_len() {
        1 => vec![1, 2, 31, 32, 33, 63, 64, 65, 100, 127, 128, 200, 257, 512, 700],
        _ => [1, 2, 3, 4, 5, 7, 8, 16, 21].map(|n| n * 32).to_vec(),
    }
}

const SHARES: [f64; 6] = [0.0, 0.1, 0.5, 0.8, 0.97, 1.0];

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn unpacking_gives_the_stored_rows() {
    let mut random = Random(1);
    for format in FORMATS {
        for cols in sizes(format) {
            for share in SHARES {
                let rows = (random.bits() % 6) as usize;
                let mut dense = pruned(format, rows, cols, share, &mut random);
                let w = Matrix::new(format, rows, cols, &dense).unwrap();
                let packed = pack(&w).unwrap();
                let (bytes, zeros) = packed_bytes(&w).unwrap();
                assert_eq!(bytes, packed.len(), "{format:?} {rows}x{cols} {share}");
                let mut values = vec![0.0; rows * cols];
                convert::decode_run(format, &dense, &mut values);
                if format == Format::Bf16 {
                    assert_eq!(zeros, values.iter().filter(|v| **v == 0.0).count());
                    // The sign of a zero is not kept.
                    dense.as_chunks_mut::<2>().0.iter_mut().filter(|v| **v == [0, 0x80]).for_each(|v| *v = [0, 0]);
                }
                let b = Bitmap::new(format, rows, cols, &packed).unwrap();
                let row_bytes = format.run_bytes(cols).unwrap();
                let piece = format.run_bytes(256).unwrap();
                for (row, want) in dense.chunks_exact(row_bytes).enumerate() {
                    for isa in isa::available() {
                        let mut out = vec![7; row_bytes];
                        let mut cursor = Cursor::new(&b, row);
                        out.chunks_mut(piece).for_each(|part| cursor.unpack(isa, &b, part));
                        assert_eq!(out, want, "{format:?} {isa} {rows}x{cols} {share} row {row}");
                        if cols > 256 {
                            let mut cursor = Cursor::new(&b, row);
                            cursor.skip(&b, 256);
                            cursor.unpack(isa, &b, &mut out[piece..]);
                            assert_eq!(out, want, "{format:?} {isa} behind 256 columns");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn products_agree_with_dense_ones() {
    let mut random = Random(2);
    let pool = Pool::new(1);
    for format in FORMATS {
        for cols in sizes(format) {
            for share in SHARES {
                let rows = 1 + (random.bits() % 11) as usize;
                let dense = pruned(format, rows, cols, share, &mut random);
                let w = Matrix::new(format, rows, cols, &dense).unwrap();
                let packed = Guarded::new(&pack(&w).unwrap());
                let b = Bitmap::new(format, rows, cols, packed.bytes()).unwrap();
                let x = random.floats(cols);
                for isa in isa::available() {
                    let mut operand = Operand::new();
                    operand.prepare_on(isa, &x, &[format, super::operand(format)]);
                    let (mut y, mut want) = (vec![f32::NAN; rows], vec![f32::NAN; rows]);
                    run_on(isa, &pool, &mut [Job { w: b, x: &[&operand], y: &mut y }]);
                    gemv::run_on(isa, &pool, &mut [gemv::Job { w, x: &operand, y: &mut want }]);
                    let case = format!("{format:?} {isa} {rows}x{cols} {share}");
                    for (row, (&y, &want)) in y.iter().zip(&want).enumerate() {
                        let (sum, size) = expected(&w, row, &operand, &x);
                        assert!((f64::from(y) - sum).abs() <= 2e-6 * size + 1e-7, "{case}: {y} for {sum}");
                        let same = matches!(isa, Isa::Avx2 | Isa::Neon);
                        if same || (isa.has_avx512() && format != Format::Q8_0) {
                            assert_eq!(y, want, "{case}: not what the dense product gives");
                        }
                    }
                }
            }
        }
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
fn results_do_not_depend_on_company() {
    let mut random = Random(3);
    let pools = [Pool::new(1), Pool::new(2), Pool::new(5)];
    for format in FORMATS {
        let (rows, cols) = (531, 544);
        let dense = pruned(format, rows, cols, 0.5, &mut random);
        let packed = pack(&Matrix::new(format, rows, cols, &dense).unwrap()).unwrap();
        let w = Bitmap::new(format, rows, cols, &packed).unwrap();
        for isa in isa::available() {
            let operands: Vec<Operand> = (0..5)
                .map(|_| {
                    let mut o = Operand::new();
                    o.prepare_on(isa, &random.floats(cols), &[operand(format)]);
                    o
                })
                .collect();
            let alone: Vec<f32> = operands
                .iter()
                .flat_map(|x| {
                    let mut y = vec![f32::NAN; rows];
                    run_on(isa, &pools[0], &mut [Job { w, x: &[x], y: &mut y }]);
                    y
                })
                .collect();
            let xs: Vec<&Operand> = operands.iter().collect();
            for pool in &pools {
                let mut y = vec![f32::NAN; rows * xs.len()];
                let mut z = vec![f32::NAN; rows];
                run_on(isa, pool, &mut [Job { w, x: &xs, y: &mut y }, Job { w, x: &xs[..1], y: &mut z }]);
                assert_eq!(bits(&y), bits(&alone), "{format:?} {isa}");
                assert_eq!(bits(&z), bits(&alone[..rows]), "{format:?} {isa}");
            }
        }
    }
}

#[test]
fn damaged_bytes_give_numbers_or_nan_and_never_a_read_outside() {
    let mut random = Random(4);
    let pool = Pool::new(1);
    for format in FORMATS {
        let (rows, cols) = (9, 512);
        let dense = pruned(format, rows, cols, 0.5, &mut random);
        let good = pack(&Matrix::new(format, rows, cols, &dense).unwrap()).unwrap();
        for round in 0..200 {
            let mut bytes = good.clone();
            for _ in 0..1 + round % 40 {
                let at = random.bits() as usize % if round % 2 == 0 { 80 } else { bytes.len() };
                bytes[at] = random.bits() as u8;
            }
            bytes.truncate((bytes.len() - random.bits() as usize % 700).max((rows + 1) * 8 + PADDING));
            let guarded = Guarded::new(&bytes);
            let w = Bitmap::new(format, rows, cols, guarded.bytes()).unwrap();
            for isa in isa::available() {
                let mut x = Operand::new();
                x.prepare_on(isa, &random.floats(cols), &[operand(format)]);
                let mut y = vec![0.0; rows];
                run_on(isa, &pool, &mut [Job { w, x: &[&x], y: &mut y }]);
            }
            let mut out = [0, 1].map(|v| vec![v; format.run_bytes(cols).unwrap()]);
            for row in 0..rows {
                Cursor::new(&w, row).unpack(Isa::Scalar, &w, &mut out[0]);
                for isa in isa::available() {
                    Cursor::new(&w, row).unpack(isa, &w, &mut out[1]);
                    assert!(out[0] == out[1], "{format:?} {isa} round {round} row {row}: not what scalar code unpacks");
                }
            }
            (0..rows).for_each(|row| Cursor::new(&w, row).skip(&w, cols));
        }
        let mut outside = good.clone();
        outside[8..16].fill(0xff);
        let w = Bitmap::new(format, rows, cols, &outside).unwrap();
        for isa in isa::available() {
            let mut x = Operand::new();
            x.prepare_on(isa, &random.floats(cols), &[operand(format)]);
            let mut y = vec![0.0; rows];
            run_on(isa, &pool, &mut [Job { w, x: &[&x], y: &mut y }]);
            assert!(y[1].is_nan(), "{format:?} {isa}: {}", y[1]);
        }
    }
}

#[test]
fn matrix_products_have_the_bits_of_dense_ones() {
    let mut random = Random(6);
    let pools = [Pool::new(1), Pool::new(3)];
    for format in FORMATS {
        for (m, n, k) in [(1, 1, 32), (3, 17, 544), (20, 70, 1056), (33, 300, 160)] {
            let dense = pruned(format, n, k, 0.6, &mut random);
            let w = Matrix::new(format, n, k, &dense).unwrap();
            let packed = pack(&w).unwrap();
            let b = Bitmap::new(format, n, k, &packed).unwrap();
            let x = random.floats(m * k);
            for pool in &pools {
                let mut input = gemm::Input::new();
                input.prepare(pool, &x, m, k, &[format]);
                let mut ys = [vec![f32::NAN; m * n], vec![f32::NAN; m * n]];
                for (y, w) in ys.iter_mut().zip([gemm::Weights::OutputMajor(w), gemm::Weights::Bitmap(b)]) {
                    gemm::run(pool, &mut [gemm::Job { w, x: &input, y, accumulate: false }]);
                }
                assert_eq!(bits(&ys[0]), bits(&ys[1]), "{format:?} {m} x {n} x {k}");
            }
        }
    }
}

#[test]
fn views_of_impossible_matrices_are_refused() {
    assert!(Bitmap::new(Format::Q4K, 1, 256, &[0; 4096]).is_none());
    assert!(Bitmap::new(Format::Q8_0, 1, 33, &[0; 4096]).is_none());
    assert!(Bitmap::new(Format::Bf16, 1, 33, &[0; 8 * 2 + PADDING - 1]).is_none());
    assert!(Bitmap::new(Format::Bf16, usize::MAX, 33, &[0; 4096]).is_none());
    assert!(pack(&Matrix::new(Format::F16, 0, 4, &[]).unwrap()).is_none());
}

#[test]
fn two_of_four_is_what_the_formula_says() {
    let mut random = Random(5);
    let (rows, cols) = (8, 1024);
    let mut dense = stored(Format::Q4_0, rows * cols, &mut random);
    for block in dense.as_chunks_mut::<18>().0 {
        for (i, q) in block[2..].iter_mut().enumerate() {
            *q = if i % 4 < 2 { *q & 0x77 } else { 0x88 };
        }
    }
    let packed = pack(&Matrix::new(Format::Q4_0, rows, cols, &dense).unwrap()).unwrap();
    // Two masks, four scales and 32 bytes of nibbles per 128 columns: 0.4375 bytes per weight.
    assert_eq!(packed.len(), (rows + 1) * 8 + PADDING + rows * cols / 128 * 56);
}
