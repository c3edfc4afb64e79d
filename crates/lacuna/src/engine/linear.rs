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
        self.prepare(x, n, parts.iter().map(|p| &p.0.weight));
        let operands: Vec<_> = self.operands.iter().take(n).collect();
        let width = x.len() / n;
        // The list of channels is there when a weight is input-major, and unused otherwise.
        let all = self.all.get(..width).unwrap_or_default();
        let every: Vec<(&[u32], &[f32])> = x.chunks_exact(width).map(|x| (all, x)).collect();
        let (mut dot, mut maps, mut books, mut axpy) =
            (Vec::with_capacity(parts.len()), Vec::new(), Vec::new(), Vec::new());
        for (linear, y) in parts.iter_mut() {
            match linear.weight.orientation() {
                Orientation::OutputMajor => dot.push(gemv::multi::Job { w: linear.weight.matrix(), x: &operands, y }),
                Orientation::Bitmap => maps.push(bitmap::Job { w: linear.weight.bitmap(), x: &operands, y }),
                Orientation::Codebook => books.push(codebook::Job { w: linear.weight.codebook(), x: &operands, y }),
                _ => axpy.push(axpy::multi::Job { w: linear.weight.columns(), x: &every, y }),
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
        parts.iter_mut().for_each(|(linear, out)| add_bias(pool, linear, out));
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
                Orientation::OutputMajor => self.formats.push(w.format()),
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
    /// mixture. All must be of one width.
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
        self.formats.clear();
        self.formats.extend(parts.iter().map(|p| p.0.weight.format()));
        self.input.prepare(pool, x, n, x.len() / n, &self.formats);
        let x = &self.input;
        let jobs =
            parts.iter_mut().map(|(linear, y)| gemm::Job { w: linear.weight.product(), x, y, accumulate: false });
        gemm::run(pool, &mut jobs.collect::<Vec<_>>());
        parts.iter_mut().for_each(|(linear, out)| add_bias(pool, linear, out));
    }
}

/// Adds the bias, if there is one, to every row of `out`.
fn add_bias(pool: &Pool, linear: &Linear, out: &mut [f32]) {
    if let Some(bias) = &linear.bias {
        rows::each(pool, out, bias.len(), |_, row| elementwise::add(row, bias));
    }
}
