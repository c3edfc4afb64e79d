//! Gram matrices `X^T X` of the vectors that enter a layer, added up in blocks of tokens by the matrix kernels: products in
//! single precision over at most 2,048 tokens, sums in double precision. Only the upper triangle is computed.
//!
//! Where tiles multiply BF16 (AMX), a number is taken as two of these, `x = h + l` with an error below `2^-17` of it, and three products
//! `h h + h l + l h` stand for one: what is left out is below `2^-16` of an entry's `|x_i| |x_j|`, a thousandth of the damping
//! that a factorisation needs anyway, and tiles are more than three times as fast.
//!
//! `n^2` multiply-adds per token and pair of inputs are all the work; turning the vectors, and adding a product to the sums
//! (24 bytes per entry for 2,048 multiply-adds), are a few per cent beside it.

use lacuna_core::{compress::Inputs, observer::Observer, site::Point};
use lacuna_kernels::{Format, Isa, Matrix, Pool, convert::decode_run, gemm, isa};
use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// Tokens of one product.
const TOKENS: usize = 2048;
/// Rows of one product.
const ROWS: usize = 512;
/// Inputs that one task turns.
const TURN: usize = 64;
/// Tokens that it turns at a time: a line of BF16.
const SPAN: usize = 32;

/// Gathers what compressors see of the inputs of some points of one block.
pub struct Gather<'a> {
    pool: &'a Pool,
    seen: Vec<Seen>,
    scratch: Scratch,
    /// The first point that held a number that is not finite.
    pub broken: Option<(Point, f32)>,
}

/// What was seen at one point.
struct Seen {
    point: Point,
    inputs: Inputs,
    /// Vectors that are not in the Gram matrix yet: how many, and one row of [`TOKENS`] numbers per input, in the parts of
    /// [`Form`].
    held: usize,
    turned: [Vec<u8>; 2],
}

/// Buffers of a product, kept from one to the next.
struct Scratch {
    form: Form,
    rows: Vec<f32>,
    input: gemm::Input,
    product: Vec<f32>,
}

/// What numbers are multiplied as.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// Themselves.
    Single,
    /// Two parts in BF16.
    Halves,
}

impl Form {
    fn format(self) -> Format {
        match self {
            Self::Single => Format::F32,
            Self::Halves => Format::Bf16,
        }
    }
}

impl<'a> Gather<'a> {
    /// Nothing seen yet at `points` of these widths, in the order in which a pass shows them; with `gram`, Gram matrices are
    /// added up.
    pub fn new(pool: &'a Pool, points: impl IntoIterator<Item = (Point, usize)>, gram: bool) -> Self {
        let empty = |n: usize| Inputs { tokens: 0, squares: vec![0.0; n], gram: gram.then(|| vec![0.0; n * n]) };
        let seen =
            points.into_iter().map(|(point, n)| Seen { point, inputs: empty(n), held: 0, turned: Default::default() });
        let form = if isa::get() == Isa::Amx { Form::Halves } else { Form::Single };
        Self { pool, seen: seen.collect(), scratch: Scratch::new(form), broken: None }
    }

    /// Tokens that were seen, at the point that saw most.
    pub fn tokens(&self) -> u64 {
        self.seen.iter().map(|s| s.inputs.tokens).max().unwrap_or(0)
    }

    /// Fills the lower triangles, and takes the squares from the diagonals.
    pub fn finish(mut self) -> Vec<(Point, Inputs)> {
        for Seen { inputs, held, turned, .. } in &mut self.seen {
            let n = inputs.squares.len();
            let Some(gram) = &mut inputs.gram else { continue };
            let width = self.scratch.form.format().block_bytes();
            turned.iter_mut().for_each(|part| close_up(part, TOKENS * width, *held * width));
            self.scratch.add(self.pool, gram, n, *held, turned);
            *turned = Default::default();
            mirror(self.pool, gram, n);
            (0..n).for_each(|i| inputs.squares[i] = gram[i * n + i]);
        }
        self.seen.into_iter().map(|s| (s.point, s.inputs)).collect()
    }
}

impl Observer for Gather<'_> {
    fn wants(&self, point: Point) -> bool {
        self.seen.iter().any(|s| s.point == point)
    }

    fn ends(&self, point: Point) -> bool {
        self.seen.last().is_some_and(|s| s.point == point)
    }

    fn observe(&mut self, point: Point, width: usize, values: &[f32]) {
        let Some(Seen { inputs, held, turned, .. }) = self.seen.iter_mut().find(|s| s.point == point) else { return };
        inputs.tokens += (values.len() / width) as u64;
        let mut finite = true;
        if let Some(gram) = &mut inputs.gram {
            let mut rest = values;
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min((TOKENS - *held) * width));
                finite &= turn(self.pool, now, width, self.scratch.form, turned, *held);
                *held += now.len() / width;
                if *held == TOKENS {
                    self.scratch.add(self.pool, gram, width, TOKENS, turned);
                    *held = 0;
                }
                rest = later;
            }
        } else {
            finite = values.iter().all(|x| x.is_finite());
            for row in values.chunks_exact(width) {
                inputs.squares.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x) * f64::from(*x));
            }
        }
        if let Some(bad) = values.iter().find(|x| !finite && !x.is_finite()) {
            self.broken.get_or_insert((point, *bad));
        }
    }
}

impl Scratch {
    fn new(form: Form) -> Self {
        Self { form, rows: Vec::new(), input: gemm::Input::new(), product: Vec::new() }
    }

    /// Adds the upper triangle of `X^T X` to `gram[n, n]`; `turned` are the parts of `X^T[n, tokens]`.
    fn add(&mut self, pool: &Pool, gram: &mut [f64], n: usize, tokens: usize, turned: &[Vec<u8>; 2]) {
        if tokens == 0 {
            return;
        }
        let Self { form, rows, input, product } = self;
        let format = form.format();
        // Which parts of the columns meet which of the rows.
        let (high, low): (&[u8], &[u8]) = (&turned[0], &turned[1]);
        let (both, one) = ([high, low], [high]);
        let meetings: &[(&[u8], &[&[u8]])] = match form {
            Form::Single => &[(high, &one)],
            Form::Halves => &[(high, &both), (low, &one)],
        };
        let row = format.run_bytes(tokens).expect("numbers without blocks");
        for (first, gram) in (0..n).step_by(ROWS).zip(gram.chunks_mut(ROWS * n)) {
            let (count, behind) = (gram.len() / n, n - first);
            product.resize(count * behind, 0.0);
            rows.resize(count * tokens, 0.0);
            let mut accumulate = false;
            for (of_rows, of_columns) in meetings {
                decode(pool, format, &of_rows[first * row..][..count * row], rows, tokens);
                input.prepare(pool, rows, count, tokens, &[format]);
                for columns in *of_columns {
                    let w =
                        Matrix::new(format, behind, tokens, &columns[first * row..]).expect("rows from the first on");
                    let w = gemm::Weights::OutputMajor(w);
                    gemm::run(pool, &mut [gemm::Job { w, x: input, y: product, accumulate }]);
                    accumulate = true;
                }
            }
            let parts: Vec<_> = gram.chunks_exact_mut(n).map(Mutex::new).collect();
            pool.run(count, &|_, r| {
                // Each row is taken by one task, so the lock is never waited for.
                let mut row = parts[r].lock().unwrap_or_else(PoisonError::into_inner);
                let sums = row[first..].iter_mut().zip(&product[r * behind..][..behind]);
                sums.for_each(|(g, p)| *g += f64::from(*p));
            });
        }
    }
}

/// Rows of `tokens` numbers in `format`, decoded by all threads.
fn decode(pool: &Pool, format: Format, bytes: &[u8], rows: &mut [f32], tokens: usize) {
    let bytes = bytes.chunks_exact(bytes.len() / (rows.len() / tokens));
    let parts: Vec<_> = bytes.zip(rows.chunks_exact_mut(tokens)).map(Mutex::new).collect();
    pool.run(parts.len(), &|_, part| {
        // Each part is taken by one task, so the lock is never waited for.
        let (bytes, row) = &mut *parts[part].lock().unwrap_or_else(PoisonError::into_inner);
        decode_run(format, bytes, row);
    });
}

/// Rows `x` of `n` numbers become columns `from ..` of `n` rows of [`TOKENS`] in the parts of `form`; whether all were finite. A
/// task turns [`TURN`] of them, [`SPAN`] numbers of each at a time, out of a copy: rows of the vectors lie a power of two apart and
/// meet in a few sets of the caches.
fn turn(pool: &Pool, x: &[f32], n: usize, form: Form, [first, second]: &mut [Vec<u8>; 2], from: usize) -> bool {
    let width = form.format().block_bytes();
    let (row, end) = (width * TOKENS, width * (from + x.len() / n));
    first.resize(row * n, 0);
    second.resize(if form == Form::Halves { row * n } else { 0 }, 0);
    let seconds = second.chunks_mut(TURN * row).map(Some).chain(std::iter::repeat_with(|| None));
    let parts: Vec<_> = first.chunks_mut(TURN * row).zip(seconds).map(Mutex::new).collect();
    let finite = AtomicBool::new(true);
    pool.run(parts.len(), &|_, part| {
        // As above.
        let (first, second) = &mut *parts[part].lock().unwrap_or_else(PoisonError::into_inner);
        let (inputs, mut copy) = (first.len() / row, [[0.0_f32; TURN]; SPAN]);
        let mut all = true;
        for (block, vectors) in x.chunks(SPAN * n).enumerate() {
            for (to, vector) in copy.iter_mut().zip(vectors.chunks_exact(n)) {
                to[..inputs].copy_from_slice(&vector[part * TURN..][..inputs]);
                all &= to[..inputs].iter().fold(true, |all, v| all & v.is_finite());
            }
            let start = width * (from + block * SPAN);
            for j in 0..inputs {
                let numbers = copy.each_ref().map(|row| row[j]);
                let at = j * row + start..j * row + (start + SPAN * width).min(end);
                match second {
                    None => put(&mut first[at], numbers.map(f32::to_le_bytes)),
                    Some(second) => {
                        put(&mut first[at.clone()], numbers.map(|v| high(v).to_le_bytes()));
                        let rest = |v: f32| v - f32::from_bits(u32::from(high(v)) << 16);
                        put(&mut second[at], numbers.map(|v| high(rest(v)).to_le_bytes()));
                    }
                }
            }
        }
        if !all {
            finite.store(false, Ordering::Relaxed);
        }
    });
    finite.into_inner()
}

/// Rows of `row` bytes lose all but their first `kept`.
fn close_up(bytes: &mut Vec<u8>, row: usize, kept: usize) {
    let rows = bytes.len() / row;
    (0..rows).for_each(|i| bytes.copy_within(i * row..i * row + kept, i * kept));
    bytes.truncate(rows * kept);
}

/// As many of the numbers as there is room for.
fn put<const B: usize>(to: &mut [u8], numbers: [[u8; B]; SPAN]) {
    to.copy_from_slice(&numbers.as_flattened()[..to.len()]);
}

/// A finite number, rounded to BF16. (Of others, whatever comes: they are told.)
fn high(v: f32) -> u16 {
    let bits = v.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The upper triangle becomes the lower one, a line of eight numbers of each row at a time.
fn mirror(pool: &Pool, gram: &mut [f64], n: usize) {
    const LINE: usize = 8;
    for first in (0..n).step_by(TURN) {
        let (above, from_here) = gram.split_at_mut(first * n);
        let rows = &mut from_here[..TURN.min(n - first) * n];
        for i in 0..rows.len() / n {
            (0..i).for_each(|j| rows[i * n + first + j] = rows[j * n + first + i]);
        }
        let parts: Vec<_> = rows.chunks_mut(LINE * n).map(Mutex::new).collect();
        pool.run(parts.len(), &|_, part| {
            // As above.
            let rows = &mut *parts[part].lock().unwrap_or_else(PoisonError::into_inner);
            for (square, above) in above.chunks_exact(LINE * n).enumerate() {
                for (i, row) in rows.chunks_exact_mut(n).enumerate() {
                    let column = first + part * LINE + i;
                    let to = &mut row[square * LINE..][..LINE];
                    to.iter_mut().zip(above[column..].iter().step_by(n)).for_each(|(to, from)| *to = *from);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::site::Proj;

    #[test]
    fn is_the_product_with_its_transpose() {
        let pool = Pool::new(2);
        let point = Point::Input { layer: 0, proj: Proj::Down };
        let forms = [Form::Single, Form::Halves];
        let sizes = [(1, 1), (33, 5000), (600, 40), (130, 2048)];
        for (form, (n, tokens)) in forms.into_iter().flat_map(|f| sizes.map(|s| (f, s))) {
            let x: Vec<f32> = (0..n * tokens).map(|i| ((i * 37 % 101) as f32 - 50.0) / 30.0).collect();
            let mut with = Gather::new(&pool, [(point, n)], true);
            with.scratch.form = form;
            let mut without = Gather::new(&pool, [(point, n)], false);
            for part in x.chunks(n * 300) {
                with.observe(point, n, part);
                without.observe(point, n, part);
            }
            let (with, without) = (with.finish().remove(0).1, without.finish().remove(0).1);
            let gram = with.gram.unwrap();
            for (i, j) in [(0, 0), (n - 1, 0), (n / 2, n - 1), (n - 1, n - 1), (n / 3, n / 2)] {
                let exact =
                    |i: usize, j: usize| x.chunks_exact(n).map(|r| f64::from(r[i]) * f64::from(r[j])).sum::<f64>();
                let error = (gram[i * n + j] - exact(i, j)).abs();
                // What is left out of single products, or lost in sums of thousands of them.
                let bound = 2.0_f64.powi(-16) * (exact(i, i) * exact(j, j)).sqrt() + 1e-12;
                assert!(error <= bound, "{form:?} {n} {i} {j}: {error} of {bound}");
            }
            assert!(with.squares.iter().zip(&without.squares).all(|(a, b)| (a - b).abs() < 1e-4 * tokens as f64));
            assert_eq!((with.tokens, without.gram), (tokens as u64, None));
        }
    }

    #[test]
    fn numbers_that_are_none_are_told() {
        let pool = Pool::new(1);
        let point = Point::Input { layer: 0, proj: Proj::Q };
        let mut g = Gather::new(&pool, [(point, 2)], true);
        g.observe(point, 2, &[1.0, f32::INFINITY]);
        assert_eq!(g.broken, Some((point, f32::INFINITY)));
        assert!(g.wants(point) && !g.wants(Point::Head));
    }
}
