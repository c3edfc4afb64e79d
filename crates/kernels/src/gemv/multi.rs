//! Several vectors with the rows of one matrix: the weights come from memory once, for all vectors.
//!
//! Each result has the bits that [`super::run`] gives for its vector alone, so that a token's logits do not depend on
//! the tokens that are computed beside it.

#[cfg(target_arch = "x86_64")]
use super::multi512;
use super::{CLAIM_BYTES, CLAIMS, Operand, Rows, WIDE, compute};
use crate::{Isa, Matrix, Pool, isa};

/// Bytes of weights that are used for all vectors before the next ones are read: they stay in the second cache.
const BLOCK_BYTES: usize = 64 << 10;

/// The products `y_i = W x_i` of some vectors.
pub struct Job<'a> {
    /// `[out, in]`.
    pub w: Matrix<'a>,
    /// Vectors of `w.cols()` numbers, prepared for the format of `w`.
    pub x: &'a [&'a Operand],
    /// `x.len()` rows of `w.rows()` results, overwritten.
    pub y: &'a mut [f32],
}

/// Products of some vectors with chosen rows of a matrix, each vector with its own.
pub struct RowsJob<'a> {
    /// `[out, in]`.
    pub w: Matrix<'a>,
    /// For each vector its row numbers, ascending, the vector (prepared for the format of `w`), and one result per row
    /// number, overwritten.
    pub parts: Vec<(&'a [u32], &'a Operand, &'a mut [f32])>,
}

/// Computes all jobs in one parallel region.
///
/// # Panics
/// If the lengths of a job do not fit together, or a vector was not prepared for its format.
pub fn run(pool: &Pool, jobs: &mut [Job]) {
    run_on(isa::get(), pool, jobs);
}

/// [`run`] with the instruction set chosen by the caller.
///
/// # Panics
/// As [`run`], and if this CPU lacks `isa`.
pub fn run_on(isa: Isa, pool: &Pool, jobs: &mut [Job]) {
    assert!(isa.is_available(), "{isa} is not available here");
    let bytes: usize = jobs.iter().map(|j| j.w.rows() * j.w.row_bytes()).sum();
    let claim_bytes = (bytes / (CLAIMS * pool.threads())).clamp(CLAIM_BYTES.0, CLAIM_BYTES.1);
    let parts: Vec<_> = jobs.iter_mut().map(|job| Part::new(job, claim_bytes)).collect();
    pool.run_parts(&parts, Part::claims, |part, claim| part.run_claim(isa, claim));
}

/// A job cut into claims.
struct Part<'a> {
    w: Matrix<'a>,
    x: &'a [&'a Operand],
    y: *mut f32,
    per_claim: usize,
}

// SAFETY: `y` comes from an exclusive borrow that lives as long as the region, and claims write disjoint parts of it.
unsafe impl Sync for Part<'_> {}

impl<'a> Part<'a> {
    fn new(job: &'a mut Job, claim_bytes: usize) -> Self {
        let w = job.w;
        assert_eq!(job.y.len(), w.rows() * job.x.len(), "results and rows differ in number");
        job.x.iter().for_each(|x| check(&w, x));
        let per_claim = (claim_bytes / w.row_bytes().max(1)).next_multiple_of(WIDE).max(WIDE);
        Self { w, x: job.x, y: job.y.as_mut_ptr(), per_claim }
    }

    fn claims(&self) -> usize {
        self.w.rows().div_ceil(self.per_claim)
    }

    fn run_claim(&self, isa: Isa, claim: usize) {
        let start = claim * self.per_claim;
        let len = self.per_claim.min(self.w.rows() - start);
        let slice = |i: usize| {
            // SAFETY: `start + len` is at most the number of rows, and there are as many rows of results as vectors;
            // every claim runs once and covers its own rows of the matrix, so the slices do not overlap.
            unsafe { std::slice::from_raw_parts_mut(self.y.add(i * self.w.rows() + start), len) }
        };
        let mut ys: Vec<&mut [f32]> = (0..self.x.len()).map(slice).collect();
        let rows = Rows { w: self.w, index: None, start, len };
        match (isa, self.x) {
            (_, [x]) => compute(isa, &rows, x, ys[0]),
            // SAFETY: `run_on` has checked that the CPU has this instruction set.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512 | Isa::Amx, _) if multi512::serves(self.w.format()) => unsafe {
                multi512::compute(&rows, self.x, &mut ys);
            },
            _ => in_blocks(isa, &rows, self.x, &mut ys),
        }
    }
}

/// One vector after the other over pieces of the claim that stay in a cache.
fn in_blocks(isa: Isa, rows: &Rows, xs: &[&Operand], ys: &mut [&mut [f32]]) {
    let block = (BLOCK_BYTES / rows.w.row_bytes().max(1)).next_multiple_of(WIDE).max(WIDE);
    let mut first = 0;
    while first < rows.len {
        let len = block.min(rows.len - first);
        let piece = Rows { start: rows.start + first, len, ..*rows };
        for (x, y) in xs.iter().zip(ys.iter_mut()) {
            compute(isa, &piece, x, &mut y[first..first + len]);
        }
        first += len;
    }
}

fn check(w: &Matrix, x: &Operand) {
    assert_eq!(x.len(), w.cols(), "vector and rows differ in length");
    assert!(x.serves(w.format()), "the vector was not prepared for {}", w.format().name());
}

/// Computes chosen rows in one parallel region: a row that several vectors want is read once.
///
/// # Panics
/// As [`run`], and if row numbers are too large or not ascending.
pub fn run_rows(pool: &Pool, job: &mut RowsJob) {
    run_rows_on(isa::get(), pool, job);
}

/// [`run_rows`] with the instruction set chosen by the caller.
///
/// # Panics
/// As [`run_rows`], and if this CPU lacks `isa`.
pub fn run_rows_on(isa: Isa, pool: &Pool, job: &mut RowsJob) {
    assert!(isa.is_available(), "{isa} is not available here");
    let w = job.w;
    let parts: Vec<_> = job.parts.iter_mut().map(|(index, x, y)| Chosen::new(&w, index, x, y)).collect();
    let wanted: usize = parts.iter().map(|p| p.index.len()).max().unwrap_or(0) * w.row_bytes();
    let share = (wanted / (CLAIMS * pool.threads())).clamp(CLAIM_BYTES.0, CLAIM_BYTES.1);
    // Claims are ranges of all rows; where few are wanted, a range holds correspondingly more of them.
    let bytes = (w.rows() * w.row_bytes()).max(1);
    let per_claim = (share * bytes / wanted.max(1) / w.row_bytes().max(1)).clamp(WIDE, w.rows().max(WIDE));
    pool.run(w.rows().div_ceil(per_claim), &|_, claim| {
        let (first, end) = (claim * per_claim, (claim + 1) * per_claim);
        for part in &parts {
            part.run(isa, &w, first as u32, end as u32);
        }
    });
}

/// One vector's rows.
struct Chosen<'a> {
    index: &'a [u32],
    x: &'a Operand,
    y: *mut f32,
}

// SAFETY: `y` comes from an exclusive borrow that lives as long as the region, and claims write disjoint parts of it.
unsafe impl Sync for Chosen<'_> {}

impl<'a> Chosen<'a> {
    fn new(w: &Matrix, index: &'a [u32], x: &'a Operand, y: &'a mut [f32]) -> Self {
        check(w, x);
        assert_eq!(index.len(), y.len(), "results and rows differ in number");
        assert!(index.is_sorted_by(|a, b| a < b), "row numbers do not ascend");
        assert!(index.last().is_none_or(|&i| (i as usize) < w.rows()), "a row number is not below {}", w.rows());
        Self { index, x, y: y.as_mut_ptr() }
    }

    /// The rows of this vector from number `first` to before `end`.
    fn run(&self, isa: Isa, w: &Matrix, first: u32, end: u32) {
        let start = self.index.partition_point(|&i| i < first);
        let len = self.index[start..].partition_point(|&i| i < end);
        let rows = Rows { w: *w, index: Some(self.index), start, len };
        // SAFETY: the index has as many entries as there are results; ranges of row numbers are disjoint between
        // claims and the numbers ascend, so the slices do not overlap.
        let y = unsafe { std::slice::from_raw_parts_mut(self.y.add(start), len) };
        compute(isa, &rows, self.x, y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;
    use crate::gemv;
    use crate::testing::{Random, stored};

    fn bits(v: &[f32]) -> Vec<u32> {
        v.iter().map(|v| v.to_bits()).collect()
    }

    /// Matrix, vectors, and their products one by one.
    fn alone(isa: Isa, w: &Matrix, operands: &[Operand]) -> Vec<Vec<f32>> {
        let pool = Pool::new(1);
        let one = |x| {
            let mut y = vec![0.0; w.rows()];
            gemv::run_on(isa, &pool, &mut [gemv::Job { w: *w, x, y: &mut y }]);
            y
        };
        operands.iter().map(one).collect()
    }

    fn operands(isa: Isa, n: usize, cols: usize, random: &mut Random) -> Vec<Operand> {
        let one = |_| {
            let mut o = Operand::new();
            o.prepare_on(isa, &random.floats(cols), &Format::ALL);
            o
        };
        (0..n).map(one).collect()
    }

    #[test]
    fn every_vector_gets_the_bits_of_its_own_product() {
        let mut random = Random(11);
        let pools = [Pool::new(1), Pool::new(3)];
        for format in Format::ALL {
            for (rows, groups) in [(1, 1), (3, 2), (131, 9), (530, 3)] {
                let cols = 32.max(format.block_len()) * groups + if format.block_len() == 1 { 5 } else { 0 };
                let bytes = stored(format, rows * cols, &mut random);
                let w = Matrix::new(format, rows, cols, &bytes).unwrap();
                for isa in isa::available() {
                    for n in [1, 2, 3, 4, 5, 8, 11] {
                        let xs = operands(isa, n, cols, &mut random);
                        let want: Vec<f32> = alone(isa, &w, &xs).concat();
                        let refs: Vec<&Operand> = xs.iter().collect();
                        for pool in &pools {
                            let mut y = vec![f32::NAN; n * rows];
                            run_on(isa, pool, &mut [Job { w, x: &refs, y: &mut y }]);
                            assert_eq!(bits(&y), bits(&want), "{format:?} {isa} {n} x {rows} x {cols}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn chosen_rows_get_the_bits_of_all_rows() {
        let mut random = Random(12);
        let (rows, cols) = (517, 512);
        for format in Format::ALL {
            let bytes = stored(format, rows * cols, &mut random);
            let w = Matrix::new(format, rows, cols, &bytes).unwrap();
            for isa in isa::available() {
                let xs = operands(isa, 3, cols, &mut random);
                let want = alone(isa, &w, &xs);
                let lists: Vec<Vec<u32>> =
                    [3, 7, 600].iter().map(|&m| (0..rows as u32).filter(|i| i % m == 1).collect()).collect();
                let mut ys: Vec<Vec<f32>> = lists.iter().map(|l| vec![f32::NAN; l.len()]).collect();
                let parts = lists.iter().zip(&xs).zip(&mut ys).map(|((l, x), y)| (&l[..], x, &mut y[..])).collect();
                run_rows_on(isa, &Pool::new(2), &mut RowsJob { w, parts });
                for ((list, y), want) in lists.iter().zip(&ys).zip(&want) {
                    let want: Vec<f32> = list.iter().map(|&i| want[i as usize]).collect();
                    assert_eq!(bits(y), bits(&want), "{format:?} {isa}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "do not ascend")]
    fn unsorted_rows_are_refused() {
        let w = Matrix::new(Format::F32, 2, 1, &[0; 8]).unwrap();
        let mut x = Operand::new();
        x.prepare(&[1.0], &[Format::F32]);
        run_rows(&Pool::new(1), &mut RowsJob { w, parts: vec![(&[1, 0], &x, &mut [0.0; 2])] });
    }
}
