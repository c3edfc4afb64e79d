//! Every format, instruction set and orientation on odd sizes, against sums in f64 over the decoded weights.

use super::arithmetic::Arithmetic;
use super::driver::run;
use super::{Input, Job, Weights};
use crate::axpy::groups::{self, Groups};
use crate::convert::{decode_run, encode_run};
use crate::isa::{self, Isa};
use crate::{Format, Matrix, Pool};

/// Small deterministic numbers, roughly uniform in -1..1 (a 64-bit linear congruential generator, Knuth's constants).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn many(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// How a case's weights lie.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Orientation {
    OutputMajor,
    InputMajor,
    Groups,
}

/// One product's data.
struct Case {
    format: Format,
    orientation: Orientation,
    m: usize,
    n: usize,
    k: usize,
    x: Vec<f32>,
    stored: Vec<u8>,
    /// Decoded, `[n][k]`.
    w: Vec<f64>,
}

impl Case {
    fn new(format: Format, orientation: Orientation, [m, n, k]: [usize; 3], seed: u64) -> Self {
        let mut random = Random(seed);
        let (rows, cols) = if orientation == Orientation::InputMajor { (k, n) } else { (n, k) };
        let bytes = format.run_bytes(cols).unwrap();
        let mut stored = vec![0; bytes * rows];
        let mut w = vec![0.0; n * k];
        let mut run = vec![0.0; cols];
        for r in 0..rows {
            let bytes = &mut stored[r * bytes..(r + 1) * bytes];
            encode_run(format, &random.many(cols), bytes);
            decode_run(format, bytes, &mut run);
            for (c, v) in run.iter().enumerate() {
                w[if orientation == Orientation::InputMajor { c * k + r } else { r * k + c }] = f64::from(*v);
            }
        }
        if orientation == Orientation::Groups {
            stored = groups::pack(&Matrix::new(format, n, k, &stored).unwrap()).unwrap();
        }
        Self { format, orientation, m, n, k, x: random.many(m * k), stored, w }
    }

    fn weights(&self) -> Weights<'_> {
        let matrix = |rows, cols| Matrix::new(self.format, rows, cols, &self.stored).unwrap();
        match self.orientation {
            Orientation::OutputMajor => Weights::OutputMajor(matrix(self.n, self.k)),
            Orientation::InputMajor => Weights::InputMajor(matrix(self.k, self.n)),
            Orientation::Groups => Weights::Groups(Groups::new(self.format, self.n, self.k, &self.stored).unwrap()),
        }
    }

    fn run(&self, isa: Isa, pool: &Pool, rows: std::ops::Range<usize>, y: &mut [f32], accumulate: bool) {
        let mut x = Input::new();
        x.prepare_for(isa, pool, &self.x[rows.start * self.k..rows.end * self.k], rows.len(), self.k, &[self.format]);
        run(isa, pool, &mut [Job { w: self.weights(), x: &x, y, accumulate }]);
    }

    /// The exact output and the largest error that the arithmetic may make.
    fn expected(&self, isa: Isa, m: usize, n: usize) -> (f64, f64) {
        let (x, w) = (&self.x[m * self.k..][..self.k], &self.w[n * self.k..][..self.k]);
        let (mut sum, mut size, mut rounding) = (0.0, 0.0, 0.0);
        for (x, w) in x.chunks(32).zip(w.chunks(32)) {
            let scale = f64::from(x.iter().fold(0f32, |a, v| a.max(v.abs()))) / 127.0;
            for (x, w) in x.iter().zip(w) {
                let product = f64::from(*x) * w;
                sum += product;
                size += product.abs();
                // int8 activations are off by at most half a step.
                rounding += 0.501 * scale * w.abs();
            }
        }
        // f32: n additions lose at most n * 2^-24 of the sum of magnitudes (Higham, Accuracy and Stability of
        // Numerical Algorithms, 4.2); the small constant holds for the sizes here.
        let mut f32_bound = 1e-5 * size + 1e-6;
        if self.orientation == Orientation::Groups && self.format == Format::Q4K {
            // Scales times codes and minima are off by 2^-11 at most; together they are at most 31 times a weight's step.
            f32_bound += x.iter().map(|x| f64::from(x.abs())).sum::<f64>() * 2e-3;
        }
        match Arithmetic::of(isa, self.format, self.weights().without_blocks()) {
            Arithmetic::F32 => (sum, f32_bound),
            // Rounding to 8 significant bits is off by at most 2^-8 relative: once for the activation and, unless
            // the weight is a bf16 already, once for the weight.
            Arithmetic::Bf16 if self.format == Format::Bf16 => (sum, f32_bound + size * 2f64.powi(-8)),
            Arithmetic::Bf16 => (sum, f32_bound + size * (2f64.powi(-7) + 2f64.powi(-16))),
            Arithmetic::Int8 => (sum, f32_bound + rounding),
        }
    }

    fn check(&self, isa: Isa, pool: &Pool) {
        let name = format!("{:?} {:?} {isa} {}x{}x{}", self.format, self.orientation, self.m, self.n, self.k);
        let mut y = vec![f32::NAN; self.m * self.n];
        self.run(isa, pool, 0..self.m, &mut y, false);
        for m in 0..self.m {
            for n in 0..self.n {
                let (want, bound) = self.expected(isa, m, n);
                let got = f64::from(y[m * self.n + n]);
                assert!((got - want).abs() <= bound, "{name} [{m}, {n}]: {got}, not {want} +- {bound}");
            }
        }
        let mut twice = y.clone();
        self.run(isa, pool, 0..self.m, &mut twice, true);
        assert!(y.iter().zip(&twice).all(|(y, t)| y + y == *t), "{name}: accumulate");
    }
}

/// Sizes are multiples of the block along the stored run only.
fn sizes(format: Format, orientation: Orientation) -> Vec<[usize; 3]> {
    let block = format.block_len();
    let along = |i: usize| if block == 1 { [1, 37, 300, 577][i] } else { block * [1, 2, 3, 5][i] };
    let across = [1, 19, 70, 131];
    (0..4)
        .map(|i| {
            let m = [1, 5, 17, 50][i];
            match orientation {
                Orientation::OutputMajor | Orientation::Groups => [m, across[i], along(i)],
                Orientation::InputMajor => [m, along(i), across[i]],
            }
        })
        .collect()
}

fn every_case(mut f: impl FnMut(Format, Orientation, Isa)) {
    for format in Format::ALL {
        for orientation in [Orientation::OutputMajor, Orientation::InputMajor, Orientation::Groups] {
            if orientation == Orientation::Groups && groups::unit(format).is_none() {
                continue;
            }
            isa::available().into_iter().for_each(|isa| f(format, orientation, isa));
        }
    }
}

#[test]
fn products_match_exact_sums() {
    let pool = Pool::new(2);
    every_case(|format, orientation, isa| {
        for (seed, size) in sizes(format, orientation).into_iter().enumerate() {
            Case::new(format, orientation, size, seed as u64).check(isa, &pool);
        }
    });
}

#[test]
fn a_row_does_not_depend_on_the_others_or_on_threads() {
    let (one, two) = (Pool::new(1), Pool::new(2));
    every_case(|format, orientation, isa| {
        let along = if format.block_len() == 1 { 577 } else { 3 * format.block_len() };
        let (n, k) = if orientation == Orientation::InputMajor { (along, 600) } else { (77, along) };
        let case = Case::new(format, orientation, [101, n, k], 7);
        let mut all = vec![0.0; case.m * n];
        case.run(isa, &two, 0..case.m, &mut all, false);
        let mut alone = vec![0.0; case.m * n];
        case.run(isa, &one, 0..case.m, &mut alone, false);
        assert!(bits(&all) == bits(&alone), "{format:?} {orientation:?} {isa}: threads");
        for rows in [0..1, 3..5, 17..67, 100..101] {
            let mut y = vec![0.0; rows.len() * n];
            case.run(isa, &one, rows.clone(), &mut y, false);
            assert!(bits(&y) == bits(&all[rows.start * n..rows.end * n]), "{format:?} {orientation:?} {isa}: {rows:?}");
        }
    });
}

#[test]
fn more_rows_than_a_chunk_and_several_jobs() {
    let pool = Pool::new(2);
    for isa in isa::available() {
        let case = Case::new(Format::Q4_0, Orientation::OutputMajor, [530, 40, 64], 3);
        let other = Case::new(Format::F32, Orientation::OutputMajor, [530, 9, 64], 4);
        let mut x = Input::new();
        x.prepare_for(isa, &pool, &case.x, case.m, case.k, &[case.format, other.format]);
        let (mut y, mut z) = (vec![0.0; 530 * 40], vec![1.0; 530 * 9]);
        let mut jobs = [
            Job { w: case.weights(), x: &x, y: &mut y, accumulate: false },
            Job { w: other.weights(), x: &x, y: &mut z, accumulate: true },
        ];
        run(isa, &pool, &mut jobs);
        let (mut y1, mut z1) = (vec![0.0; 530 * 40], vec![1.0; 530 * 9]);
        case.run(isa, &pool, 0..530, &mut y1, false);
        let same_x = Case { x: case.x.clone(), ..other };
        same_x.run(isa, &pool, 0..530, &mut z1, true);
        assert!(bits(&y) == bits(&y1) && bits(&z) == bits(&z1), "{isa}");
    }
}

#[test]
fn empty_products() {
    let pool = Pool::new(1);
    for isa in isa::available() {
        let mut x = Input::new();
        x.prepare_for(isa, &pool, &[], 0, 64, &[Format::Q8_0]);
        let w = Matrix::new(Format::Q8_0, 1, 64, &[0; 68]).unwrap();
        run(isa, &pool, &mut [Job { w: Weights::OutputMajor(w), x: &x, y: &mut [], accumulate: false }]);
        x.prepare_for(isa, &pool, &[], 2, 0, &[Format::F32]);
        let mut y = [1.0; 2];
        let w = Matrix::new(Format::F32, 1, 0, &[]).unwrap();
        run(isa, &pool, &mut [Job { w: Weights::OutputMajor(w), x: &x, y: &mut y, accumulate: false }]);
        assert_eq!(y, [0.0; 2], "no inputs: every sum is empty");
    }
}

#[test]
fn not_a_number_spreads_to_its_row_only() {
    let pool = Pool::new(1);
    for format in Format::ALL {
        for isa in isa::available() {
            let mut case = Case::new(format, Orientation::OutputMajor, [3, 5, 512], 9);
            case.x[512 + 300] = f32::NAN;
            let mut y = vec![0.0; 15];
            case.run(isa, &pool, 0..3, &mut y, false);
            for (i, v) in y.iter().enumerate() {
                assert_eq!(v.is_nan(), i / 5 == 1, "{format:?} {isa}: output {i} is {v}");
            }
        }
    }
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

#[cfg(target_arch = "x86_64")]
mod kernels {
    //! Block kernels and decoders against their twins.

    use super::*;
    use crate::gemm::codes::{self, CodeLayout, CodeRow};
    use crate::gemm::product::{Product, Scales};
    use crate::gemm::{avx512_int8, scalar};

    #[test]
    fn int8_kernel_gives_the_bits_of_its_twin() {
        if !isa::available().contains(&Isa::Avx512) {
            return println!("skipped: no AVX-512 here");
        }
        let (tiles_n, tiles_k, x_stride) = (3, 2, 128 * 16);
        for blocks in [1, 2, 3, 5] {
            for (groups, with_offsets) in [(1, false), (1, true), (2, false), (2, true)] {
                let mut random = Random(blocks as u64);
                let mut next = |n: usize| random.many(n);
                let w: Vec<u8> = next(tiles_n * tiles_k * 512).iter().map(|v| (v * 127.0 + 128.0) as u8).collect();
                let x: Vec<i8> = next(blocks * x_stride).iter().map(|v| (v * 127.0) as i8).collect();
                let x_sums = group_sums(&x);
                let (w_scales, offsets) = (next(tiles_n * tiles_k * 32), next(tiles_n * tiles_k * 32));
                let x_scales = next(blocks * x_stride / 32);
                let offsets = with_offsets.then_some(&offsets[..]);
                let scales = Scales { w: &w_scales, offsets, zero_point: 8, groups, x: &x_scales, x_sums: &x_sums };
                let start = next(blocks * tiles_n * 256);
                for first in [true, false] {
                    let (mut fast, mut slow) = (start.clone(), start.clone());
                    let product = |sums| Product { w: &w, x: &x, x_stride, sums, tiles_n, tiles_k, blocks, first };
                    // SAFETY: AVX-512 was found above.
                    unsafe { avx512_int8::int8_block(product(&mut fast), scales) };
                    scalar::int8_block(product(&mut slow), scales);
                    assert!(bits(&fast) == bits(&slow), "{blocks} blocks, {groups} groups, first {first}");
                }
            }
        }
    }

    /// Sums of 16 inputs of each lane, from `[k / 4][16][4]`.
    fn group_sums(x: &[i8]) -> Vec<i32> {
        let sum = |g: &[i8], lane: usize| (0..16).map(|k| i32::from(g[(k / 4 * 16 + lane) * 4 + k % 4])).sum();
        x.chunks(256).flat_map(|g| (0..16).map(move |lane| sum(g, lane))).collect()
    }

    #[test]
    fn bf16_kernels_are_near_their_twin() {
        use crate::gemm::input::round_bf16;
        let (tiles_n, tiles_k, x_stride) = (3, 5, 192 * 16);
        for isa in isa::available().into_iter().filter(|isa| isa.has_avx512()) {
            for blocks in [1, 2, 3, 4, 5] {
                let mut random = Random(blocks as u64);
                let mut next = |n: usize| random.many(n).into_iter().map(round_bf16).collect::<Vec<_>>();
                let (w, x) = (next(tiles_n * tiles_k * 512), next(blocks * x_stride));
                let start = random.many(blocks * tiles_n * 256);
                for first in [true, false] {
                    let (mut fast, mut slow) = (start.clone(), start.clone());
                    let product = |sums| Product { w: &w, x: &x, x_stride, sums, tiles_n, tiles_k, blocks, first };
                    // SAFETY: the instruction set is available.
                    unsafe {
                        match isa {
                            Isa::Amx => crate::gemm::amx::bf16_block(product(&mut fast)),
                            _ => crate::gemm::avx512::bf16_block(product(&mut fast)),
                        }
                    }
                    scalar::bf16_block(product(&mut slow));
                    let near = fast.iter().zip(&slow).all(|(f, s)| (f - s).abs() < 1e-4);
                    assert!(near, "{isa}: {blocks} blocks, first {first}");
                }
            }
        }
    }

    #[test]
    fn code_decoders_agree() {
        for format in [Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K] {
            let case = Case::new(format, Orientation::OutputMajor, [1, 1, 768], 5);
            let layout = CodeLayout::of(format);
            let decode = |fast: Option<Isa>| {
                let (mut c, mut s, mut o) = (vec![0; 24 * 512], vec![0.0; 48 * 16], vec![0.0; 48 * 16]);
                let mut row = CodeRow { codes: &mut c, scales: &mut s, offsets: &mut o };
                match fast {
                    Some(isa) => codes::decode_row(isa, format, &case.stored, &mut row),
                    None => codes::decode_row_scalar(format, &case.stored, &mut row),
                }
                (c, s, o)
            };
            let slow = decode(None);
            for k in 0..768 {
                let g = k * layout.groups / 32 * 16;
                let code = i32::from(slow.0[k / 32 * 512 + k % 32]) - layout.zero_point;
                let w = f64::from(slow.1[g]) * f64::from(code) + f64::from(slow.2[g]);
                assert!((w - case.w[k]).abs() < 1e-6, "{format:?} {k}: {w}, not {}", case.w[k]);
            }
            for isa in isa::available() {
                assert!(decode(Some(isa)) == slow, "{format:?} {isa}");
            }
        }
    }
}

#[test]
fn codes_by_inputs_have_the_bits_of_codes_by_outputs() {
    let pool = Pool::new(2);
    for format in [Format::Q8_0, Format::Q4_0] {
        for isa in isa::available() {
            let size = [20, 300, 1056];
            let (a, b) = (
                Case::new(format, Orientation::OutputMajor, size, 11),
                Case::new(format, Orientation::Groups, size, 11),
            );
            let (mut y, mut z) = (vec![0.0; 20 * 300], vec![0.0; 20 * 300]);
            a.run(isa, &pool, 0..20, &mut y, false);
            b.run(isa, &pool, 0..20, &mut z, false);
            assert!(bits(&y) == bits(&z), "{format:?} {isa}");
        }
    }
}
