//! Linear layers: several projections of one input in one parallel region, by dot form, axpy form or matrix product.

use super::{
    compiled::{LayerCounts, LayerPlan},
    rows,
    sparse::{self, Selection},
    sparse_rows,
};
use crate::model::weights::Linear;
use lacuna_core::{
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Format, Pool, axpy, bitmap, codebook, elementwise, gemm, gemv};

/// One projection: which, its weights, and where its results go.
pub(super) struct Part<'a> {
    pub proj: Proj,
    pub linear: &'a Linear,
    pub out: &'a mut [f32],
}

impl Part<'_> {
    /// The part of one of `n` rows.
    fn row(&mut self, row: usize, n: usize) -> Part<'_> {
        let len = self.out.len() / n;
        Part { proj: self.proj, linear: self.linear, out: &mut self.out[row * len..(row + 1) * len] }
    }
}

/// What a layer skips, and where it counts.
pub(super) struct Sparsity<'a> {
    /// The layer's plan, if there is one.
    pub plan: Option<&'a LayerPlan>,
    /// Kept entries.
    pub counts: &'a mut LayerCounts,
    /// Bytes of weights read.
    pub bytes: &'a mut u64,
}

/// What linear layers need beside their operands; buffers are reused.
#[derive(Default)]
pub(super) struct Linears {
    input: gemm::Input,
    /// One per row.
    operands: Vec<gemv::Operand>,
    formats: Vec<Format>,
    /// `0, 1, 2, ...`: all channels, for dense axpy.
    all: Vec<u32>,
    pub selections: [Selection; 3],
}

impl Linears {
    /// Decode: every part's products with the `n` rows of `x`, as the plan of the layer says.
    pub fn decode(&mut self, pool: &Pool, sparsity: &mut Sparsity<'_>, x: &[f32], n: usize, mut parts: Vec<Part<'_>>) {
        if let Some(plan) = sparsity.plan {
            let mut sparse: Vec<_> = parts.extract_if(.., |p| plan.input(p.proj).is_some()).collect();
            if n > 1 {
                let serves = |p: &mut Part<'_>| plan.input(p.proj).is_some_and(sparse_rows::serves);
                let together: Vec<_> = sparse.extract_if(.., serves).collect();
                sparse_rows::inputs(pool, plan, sparsity, x, n, together);
            }
            if !sparse.is_empty() {
                for (row, x) in x.chunks_exact(x.len() / n).enumerate() {
                    let parts = sparse.iter_mut().map(|p| p.row(row, n)).collect();
                    sparse::inputs(pool, plan, sparsity, x, parts, self);
                }
            }
        }
        *sparsity.bytes += parts.iter().map(|p| p.linear.weight.bytes().len() as u64).sum::<u64>();
        let mut parts: Vec<_> = parts.into_iter().map(|p| (p.linear, p.out)).collect();
        self.dense(pool, x, n, &mut parts);
    }

    /// Dense products with the `n` rows of `x`; each row has the bits that it has alone.
    pub fn dense(&mut self, pool: &Pool, x: &[f32], n: usize, parts: &mut [(&Linear, &mut [f32])]) {
        self.in_steps(x, n, parts, |s, x, parts| s.products(pool, x, n, parts));
        parts.iter_mut().for_each(|(linear, out)| add_bias(pool, linear, out));
    }

    /// Runs `products` over all weights; of those of low rank, first over what reads `x`, then over what reads the result.
    fn in_steps(
        &mut self,
        x: &[f32],
        n: usize,
        parts: &mut [(&Linear, &mut [f32])],
        products: impl Fn(&mut Self, &[f32], &mut [(&Weight, &mut [f32])]),
    ) {
        let factors = parts.iter().filter_map(|p| p.0.weight.factors());
        let mut through: Vec<Vec<f32>> = factors.map(|[down, _]| vec![0.0; n * down.outputs()]).collect();
        let mut between = through.iter_mut();
        let first = parts.iter_mut().filter_map(|(linear, y)| match linear.weight.factors() {
            None => Some((&linear.weight, &mut **y)),
            Some([down, _]) => Some((down, &mut between.next()?[..])),
        });
        let mut first: Vec<_> = first.collect();
        products(self, x, &mut first);
        let pairs = parts.iter_mut().filter_map(|(linear, y)| Some((&linear.weight.factors()?[1], y)));
        for ((up, y), x) in pairs.zip(&through) {
            products(self, x, &mut [(up, y)]);
        }
    }

    /// Products of weights that are no pairs with the `n` rows of `x`.
    fn products(&mut self, pool: &Pool, x: &[f32], n: usize, parts: &mut [(&Weight, &mut [f32])]) {
        self.prepare(x, n, parts.iter().map(|p| p.0));
        let operands: Vec<_> = self.operands.iter().take(n).collect();
        let width = x.len() / n;
        // The list of channels is there when a weight is input-major, and unused otherwise.
        let all = self.all.get(..width).unwrap_or_default();
        let every: Vec<(&[u32], &[f32])> = x.chunks_exact(width).map(|x| (all, x)).collect();
        let (mut dot, mut maps, mut books, mut axpy) =
            (Vec::with_capacity(parts.len()), Vec::new(), Vec::new(), Vec::new());
        for (w, y) in parts.iter_mut() {
            match w.orientation() {
                Orientation::OutputMajor => dot.push(gemv::multi::Job { w: w.matrix(), x: &operands, y }),
                Orientation::Bitmap => maps.push(bitmap::Job { w: w.bitmap(), x: &operands, y }),
                Orientation::Codebook => books.push(codebook::Job { w: w.codebook(), x: &operands, y }),
                _ => axpy.push(axpy::multi::Job { w: w.columns(), x: &every, y }),
            }
        }
        if !dot.is_empty() {
            gemv::multi::run(pool, &mut dot);
        }
        if !maps.is_empty() {
            bitmap::run(pool, &mut maps);
        }
        if !books.is_empty() {
            codebook::run(pool, &mut books);
        }
        if !axpy.is_empty() {
            axpy::multi::run(pool, &mut axpy);
        }
    }

    /// The `n` rows of `x` in the form that products with `weights` read.
    pub fn operands<'w>(&mut self, x: &[f32], n: usize, weights: impl Iterator<Item = &'w Weight>) -> &[gemv::Operand] {
        self.prepare(x, n, weights);
        &self.operands[..n]
    }

    /// `x` in the form that products with `weights` read.
    pub fn operand<'w>(&mut self, x: &[f32], weights: impl Iterator<Item = &'w Weight>) -> &gemv::Operand {
        self.prepare(x, 1, weights);
        &self.operands[0]
    }

    /// Readies an operand per row for all of `weights`, and the list of all channels where one of them is input-major.
    fn prepare<'w>(&mut self, x: &[f32], n: usize, weights: impl Iterator<Item = &'w Weight>) {
        self.formats.clear();
        let mut transposed = false;
        for w in weights {
            match w.orientation() {
                // Of low rank: what the first of its matrices reads, which callers pass on by itself.
                Orientation::OutputMajor | Orientation::LowRank => self.formats.push(w.format()),
                Orientation::Bitmap => self.formats.push(bitmap::operand(w.format())),
                Orientation::Codebook => self.formats.push(codebook::OPERAND),
                Orientation::InputMajor | Orientation::InputGroups => transposed = true,
            }
        }
        let width = x.len() / n;
        if self.operands.len() < n {
            self.operands.resize_with(n, gemv::Operand::new);
        }
        if !self.formats.is_empty() {
            self.operands.iter_mut().zip(x.chunks_exact(width)).for_each(|(o, x)| o.prepare(x, &self.formats));
        }
        if transposed {
            self.all.extend(self.all.len() as u32..width as u32);
        }
    }

    /// Products of each part's weights with the rows of `x` (`n` in all) that it names, in one region: the experts of a
    /// mixture. All must be of one width, and none of low rank (containers hold no experts).
    pub fn chosen(&mut self, pool: &Pool, x: &[f32], n: usize, parts: &mut [(&Linear, Vec<usize>, &mut [f32])]) {
        self.prepare(x, n, parts.iter().map(|p| &p.0.weight));
        let (operands, width) = (&self.operands, x.len() / n);
        let all = self.all.get(..width).unwrap_or_default();
        let rows: Vec<Vec<_>> = parts.iter().map(|p| p.1.iter().map(|&row| &operands[row]).collect()).collect();
        let row = |&row: &usize| (all, &x[row * width..(row + 1) * width]);
        let channels: Vec<Vec<_>> = parts.iter().map(|p| p.1.iter().map(row).collect()).collect();
        let (mut dot, mut maps, mut books, mut axpy) =
            (Vec::with_capacity(parts.len()), Vec::new(), Vec::new(), Vec::new());
        for (((linear, _, y), rows), channels) in parts.iter_mut().zip(&rows).zip(&channels) {
            match linear.weight.orientation() {
                Orientation::OutputMajor => dot.push(gemv::multi::Job { w: linear.weight.matrix(), x: rows, y }),
                Orientation::Bitmap => maps.push(bitmap::Job { w: linear.weight.bitmap(), x: rows, y }),
                Orientation::Codebook => books.push(codebook::Job { w: linear.weight.codebook(), x: rows, y }),
                _ => axpy.push(axpy::multi::Job { w: linear.weight.columns(), x: channels, y }),
            }
        }
        if !dot.is_empty() {
            gemv::multi::run(pool, &mut dot);
        }
        if !maps.is_empty() {
            bitmap::run(pool, &mut maps);
        }
        if !books.is_empty() {
            codebook::run(pool, &mut books);
        }
        if !axpy.is_empty() {
            axpy::multi::run(pool, &mut axpy);
        }
        parts.iter_mut().for_each(|(linear, _, out)| add_bias(pool, linear, out));
    }

    /// Prefill: every part's product with the `n` rows of `x`.
    pub fn prefill(&mut self, pool: &Pool, x: &[f32], n: usize, parts: &mut [(&Linear, &mut [f32])]) {
        self.in_steps(x, n, parts, |s, x, parts| {
            s.formats.clear();
            s.formats.extend(parts.iter().map(|p| p.0.format()));
            s.input.prepare(pool, x, n, x.len() / n, &s.formats);
            let x = &s.input;
            let jobs = parts.iter_mut().map(|(w, y)| gemm::Job { w: w.product(), x, y, accumulate: false });
            gemm::run(pool, &mut jobs.collect::<Vec<_>>());
        });
        parts.iter_mut().for_each(|(linear, out)| add_bias(pool, linear, out));
    }
}

/// Adds the bias, if there is one, to every row of `out`.
fn add_bias(pool: &Pool, linear: &Linear, out: &mut [f32]) {
    if let Some(bias) = &linear.bias {
        rows::each(pool, out, bias.len(), |_, row| elementwise::add(row, bias));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::{
        bytes::Bytes,
        pair::{self, Factor},
    };
    use lacuna_kernels::convert::{decode_run, encode_run};

    fn numbers(seed: u32, n: usize) -> Vec<f32> {
        (0..n as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / (1 << 23) as f32 - 1.0)
            .collect()
    }

    /// Bytes in `format`, and the numbers that they stand for.
    fn stored(format: Format, cols: usize, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let (mut bytes, mut back) = (Vec::new(), Vec::new());
        for row in values.chunks_exact(cols) {
            let mut run = vec![0; format.run_bytes(cols).unwrap()];
            encode_run(format, row, &mut run);
            let mut numbers = vec![0.0; cols];
            decode_run(format, &run, &mut numbers);
            bytes.extend(run);
            back.extend(numbers);
        }
        (bytes, back)
    }

    /// A pair, and the product of its numbers.
    fn pair_of(rows: usize, cols: usize, rank: usize, format: Format) -> (Linear, Vec<f64>) {
        let (b, down) = stored(format, cols, &numbers(rank as u32, rank * cols));
        let (a, up) = stored(format, rank, &numbers(cols as u32 + 7, rows * rank));
        let factor = |bytes| Factor { format: Some(format), bytes };
        let bytes = Bytes::from(pair::pack(rows, cols, rank, &factor(b), &factor(a)).unwrap());
        let weight = Weight::new(format, Orientation::LowRank, rows, cols, bytes).unwrap();
        let at = |i: usize, j: usize| {
            (0..rank).map(|k| f64::from(up[i * rank + k]) * f64::from(down[k * cols + j])).sum::<f64>()
        };
        let product = (0..rows * cols).map(|i| at(i / cols, i % cols)).collect();
        (Linear { weight, bias: Some(numbers(3, rows)) }, product)
    }

    #[test]
    fn pairs_are_their_product() {
        let pool = Pool::new(2);
        let sizes = [(1, 1, 1), (7, 5, 3), (33, 65, 17), (96, 64, 32), (160, 96, 64)];
        for format in [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4_0] {
            let fits = |s: &&(usize, usize, usize)| format.run_bytes(s.1).is_some() && format.run_bytes(s.2).is_some();
            for &(rows, cols, rank) in sizes.iter().filter(fits) {
                let (linear, product) = pair_of(rows, cols, rank, format);
                let plain: Vec<u8> = product.iter().flat_map(|w| (*w as f32).to_le_bytes()).collect();
                let weight = Weight::new(Format::F32, Orientation::OutputMajor, rows, cols, plain.into()).unwrap();
                let whole = Linear { weight, bias: linear.bias.clone() };
                for n in [1, 3, 9] {
                    let x = numbers(11, n * cols);
                    let mut y = [(); 3].map(|()| vec![0.0; n * rows]);
                    let [own, many, with] = &mut y;
                    let mut linears = Linears::default();
                    // Beside a weight of another kind that reads the same vector.
                    linears.dense(&pool, &x, n, &mut [(&linear, &mut own[..]), (&whole, &mut with[..])]);
                    linears.prefill(&pool, &x, n, &mut [(&linear, &mut many[..]), (&whole, &mut with[..])]);
                    let bias = linear.bias.as_ref().unwrap();
                    let mut size: f64 = 0.0;
                    let want: Vec<f64> = (0..n * rows)
                        .map(|i| {
                            let x = &x[i / rows * cols..][..cols];
                            let row = product[i % rows * cols..][..cols].iter().zip(x);
                            let y = row.map(|(w, x)| w * f64::from(*x)).sum::<f64>();
                            size = size.max(y.abs());
                            y + f64::from(bias[i % rows])
                        })
                        .collect();
                    // Block formats round the vectors too, BF16 those of prefill.
                    let bound = if format == Format::F32 { 1e-5 } else { 0.03 } * size.max(1.0);
                    for (form, got) in [("decode", &*own), ("prefill", &*many)] {
                        let worst = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                        assert!(
                            worst < bound,
                            "{form} {format:?} {rows}x{cols} of {rank}, {n} rows: {worst} of {size}"
                        );
                    }
                    // A row has the bits that it has alone.
                    let mut one = vec![0.0; rows];
                    linears.dense(&pool, &x[(n - 1) * cols..], 1, &mut [(&linear, &mut one[..])]);
                    assert_eq!(one, own[(n - 1) * rows..]);
                }
            }
        }
    }
}
