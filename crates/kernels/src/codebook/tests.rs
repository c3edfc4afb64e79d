//! Bytes and back, and all instruction sets against sums in f64, on odd sizes.

use super::*;
use crate::gemm;
use crate::gemv::Operand;
use crate::testing::{Guarded, Random};
use crate::{Isa, Matrix, Pool, isa};
use half::bf16;

/// A random matrix in parts.
struct Made {
    bits: usize,
    cols: usize,
    span: usize,
    of_row: Vec<u16>,
    entries: Vec<i8>,
    exponents: Vec<i8>,
    codes: Vec<u8>,
}

impl Made {
    fn new(bits: usize, rows: usize, cols: usize, span: usize, random: &mut Random) -> Self {
        let (spans, books) = (cols.div_ceil(span), 1 + random.bits() as usize % 4);
        let size = entries(bits);
        Self {
            bits,
            cols,
            span,
            of_row: (0..rows).map(|_| (random.bits() % books as u64) as u16).collect(),
            entries: (0..books * spans * size * 2).map(|_| random.bits() as i8).collect(),
            exponents: (0..books * spans).map(|_| -(random.bits() as i8 & 7) - 3).collect(),
            codes: (0..rows * cols.div_ceil(32) * 16).map(|_| random.bits() as u8 & (size - 1) as u8).collect(),
        }
    }

    fn parts(&self) -> Parts<'_> {
        let Self { bits, cols, span, of_row, entries, exponents, codes } = self;
        Parts { bits: *bits, cols: *cols, span: *span, of_row, entries, exponents, codes }
    }

    /// By the definition.
    fn weight(&self, row: usize, col: usize) -> f32 {
        let (spans, size) = (self.cols.div_ceil(self.span), entries(self.bits));
        let book = usize::from(self.of_row[row]) * spans + col / self.span;
        let pairs = self.cols.div_ceil(32) * 16;
        let code = usize::from(self.codes[row * pairs + col / 32 * 16 + col % 16]);
        let entry = self.entries[(book * size + code) * 2 + col % 32 / 16];
        f32::from(entry) * f32::from(self.exponents[book]).exp2()
    }
}

fn cases(random: &mut Random) -> Vec<(usize, Made)> {
    let mut all = Vec::new();
    for bits in 2..=4 {
        for cols in [1, 15, 16, 17, 31, 32, 33, 64, 100, 128, 172, 200, 256, 257, 384, 700, 704, 1024] {
            for span in [128, 256, 1024] {
                let rows = (random.bits() % 11) as usize + 1;
                all.push((rows, Made::new(bits, rows, cols, span, random)));
            }
        }
    }
    all
}

#[test]
fn unpacking_gives_what_the_parts_say() {
    let mut random = Random(1);
    for (rows, made) in cases(&mut random) {
        let bytes = pack(&made.parts()).unwrap();
        let guarded = Guarded::new(&bytes);
        let w = Codebook::new(rows, made.cols, guarded.bytes()).unwrap();
        for isa in isa::available() {
            let mut out = vec![7_u8; rows * made.cols * 2];
            unpack(isa, &w, 0..rows, 0..made.cols, &mut out);
            for (i, v) in out.as_chunks::<2>().0.iter().enumerate() {
                let want = made.weight(i / made.cols, i % made.cols);
                assert_eq!(bf16::from_le_bytes(*v).to_f32(), want, "{isa} {} bits, {rows}x{}", made.bits, made.cols);
            }
            if made.cols > 256 {
                let rest = made.cols - 256;
                let mut part = vec![7_u8; rest * 2];
                unpack(isa, &w, rows - 1..rows, 256..made.cols, &mut part);
                assert_eq!(part, out[out.len() - 2 * rest..]);
            }
        }
    }
}

#[test]
fn products_agree_with_sums_in_double_precision() {
    let mut random = Random(2);
    let pool = Pool::new(1);
    for (rows, made) in cases(&mut random) {
        let bytes = pack(&made.parts()).unwrap();
        let guarded = Guarded::new(&bytes);
        let w = Codebook::new(rows, made.cols, guarded.bytes()).unwrap();
        let x = random.floats(made.cols);
        for isa in isa::available() {
            let mut operand = Operand::new();
            operand.prepare_on(isa, &x, &[OPERAND]);
            let mut y = vec![f32::NAN; rows];
            run_on(isa, &pool, &mut [Job { w, x: &[&operand], y: &mut y }]);
            for (row, y) in y.into_iter().enumerate() {
                let seen = |i: usize| f64::from(operand.int8().q[i]) * f64::from(operand.int8().d[i / 32]);
                let terms = (0..made.cols).map(|i| f64::from(made.weight(row, i)) * seen(i));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                let what = format!("{isa} {} bits, {rows}x{} row {row}", made.bits, made.cols);
                assert!((f64::from(y) - sum).abs() <= 2e-6 * size + 1e-9, "{what}: {y} for {sum}");
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_company() {
    let mut random = Random(3);
    let pools = [Pool::new(1), Pool::new(2), Pool::new(5)];
    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for made in (2..=4).map(|bits| Made::new(bits, 531, 544, 256, &mut random)).collect::<Vec<_>>() {
        let bytes = pack(&made.parts()).unwrap();
        let w = Codebook::new(531, 544, &bytes).unwrap();
        for isa in isa::available() {
            let mut operands = vec![Operand::new(); 3];
            operands.iter_mut().for_each(|o| o.prepare_on(isa, &random.floats(544), &[OPERAND]));
            let alone: Vec<f32> = operands
                .iter()
                .flat_map(|x| {
                    let mut y = vec![f32::NAN; 531];
                    run_on(isa, &pools[0], &mut [Job { w, x: &[x], y: &mut y }]);
                    y
                })
                .collect();
            let xs: Vec<&Operand> = operands.iter().collect();
            for pool in &pools {
                let (mut y, mut z) = (vec![f32::NAN; 531 * 3], vec![f32::NAN; 531]);
                run_on(isa, pool, &mut [Job { w, x: &xs, y: &mut y }, Job { w, x: &xs[..1], y: &mut z }]);
                assert_eq!((bits(&y), bits(&z)), (bits(&alone), bits(&alone[..531])), "{isa}");
            }
        }
    }
}

#[test]
fn matrix_products_have_the_bits_of_dense_ones() {
    let mut random = Random(4);
    let pools = [Pool::new(1), Pool::new(3)];
    for bits in 2..=4 {
        for (m, n, k) in [(1, 1, 32), (3, 17, 544), (20, 70, 1056), (33, 300, 160)] {
            let made = Made::new(bits, n, k, 256, &mut random);
            let bytes = pack(&made.parts()).unwrap();
            let w = Codebook::new(n, k, &bytes).unwrap();
            let mut dense = vec![0; 2 * n * k];
            unpack(Isa::Scalar, &w, 0..n, 0..k, &mut dense);
            let d = Matrix::new(DENSE, n, k, &dense).unwrap();
            let x = random.floats(m * k);
            for pool in &pools {
                let mut input = gemm::Input::new();
                input.prepare(pool, &x, m, k, &[DENSE]);
                let mut ys = [vec![f32::NAN; m * n], vec![f32::NAN; m * n]];
                for (y, w) in ys.iter_mut().zip([gemm::Weights::OutputMajor(d), gemm::Weights::Codebook(w)]) {
                    gemm::run(pool, &mut [gemm::Job { w, x: &input, y, accumulate: false }]);
                }
                assert_eq!(ys[0], ys[1], "{bits} bits, {m} x {n} x {k}");
            }
        }
    }
}

#[test]
fn damaged_bytes_are_refused_or_give_numbers() {
    let mut random = Random(5);
    let pool = Pool::new(1);
    let made = Made::new(3, 9, 512, 256, &mut random);
    let good = pack(&made.parts()).unwrap();
    for at in 0..24 {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (random.bits() % 8);
        // Bytes 6 and 7 mean nothing.
        assert!(Codebook::new(9, 512, &bytes).is_none() || matches!(at, 6 | 7), "byte {at}");
    }
    assert!(Codebook::new(9, 512, &good[..good.len() - 1]).is_none() && Codebook::new(9, 511, &good).is_none());
    assert!(Codebook::new(9, 512, &[]).is_none() && Codebook::new(usize::MAX, 512, &good).is_none());
    for _ in 0..200 {
        let mut bytes = good.clone();
        for _ in 0..40 {
            let at = 64 + random.bits() as usize % (bytes.len() - 64);
            bytes[at] = random.bits() as u8;
        }
        let guarded = Guarded::new(&bytes);
        let w = Codebook::new(9, 512, guarded.bytes()).unwrap();
        for isa in isa::available() {
            let mut x = Operand::new();
            x.prepare_on(isa, &random.floats(512), &[OPERAND]);
            let mut y = vec![0.0; 9];
            run_on(isa, &pool, &mut [Job { w, x: &[&x], y: &mut y }]);
            let mut out = vec![0; 512 * 9 * 2];
            unpack(isa, &w, 0..9, 0..512, &mut out);
        }
    }
}

#[test]
fn bytes_are_those_of_the_formula() {
    let mut random = Random(6);
    for (bits, book, codes) in [(2, 32, 32), (3, 128, 48), (4, 512, 64)] {
        let mut made = Made::new(bits, 256, 1024, 256, &mut random);
        made.of_row.iter_mut().enumerate().for_each(|(r, b)| *b = (r / 128) as u16);
        made.entries.resize(2 * 4 * book, 0);
        made.exponents.resize(2 * 4, -4);
        let bytes = pack(&made.parts()).unwrap().len();
        assert_eq!(bytes, 64 + 512 + 64 + 8 * book + 256 * 8 * codes + PADDING);
    }
    let mut made = Made::new(2, 4, 64, 128, &mut random);
    made.of_row[0] = 99;
    assert!(pack(&made.parts()).is_none(), "a book that is not there");
    made.of_row[0] = 0;
    made.codes[3] = 16;
    assert!(pack(&made.parts()).is_none(), "an entry that is not there");
}
