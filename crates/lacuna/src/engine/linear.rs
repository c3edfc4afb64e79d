//! Linear layers: several projections of one input in one parallel region, by dot form, axpy form or matrix product.

use super::{
    compiled::{LayerCounts, LayerPlan},
    rows,
    sparse::{self, Selection},
};
use crate::model::weights::Linear;
use lacuna_core::{
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Format, Pool, axpy, elementwise, gemm, gemv};

/// One projection: which, its weights, and where its results go.
pub(super) struct Part<'a> {
    pub proj: Proj,
    pub linear: &'a Linear,
    pub out: &'a mut [f32],
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
    /// One vector, or one per expert.
    operands: Vec<gemv::Operand>,
    formats: Vec<Format>,
    /// `0, 1, 2, ...`: all channels, for dense axpy.
    all: Vec<u32>,
    pub selections: [Selection; 3],
}

impl Linears {
    /// Decode: every part's product with the one vector `x`, as the plan of the layer says.
    pub fn decode(&mut self, pool: &Pool, sparsity: &mut Sparsity<'_>, x: &[f32], mut parts: Vec<Part<'_>>) {
        if let Some(plan) = sparsity.plan {
            let sparse: Vec<_> = parts.extract_if(.., |p| plan.input(p.proj).is_some()).collect();
            if !sparse.is_empty() {
                sparse::inputs(pool, plan, sparsity, x, sparse, &mut self.selections);
            }
        }
        *sparsity.bytes += parts.iter().map(|p| p.linear.weight.bytes().len() as u64).sum::<u64>();
        let mut parts: Vec<_> = parts.into_iter().map(|p| (p.linear, p.out)).collect();
        self.dense(pool, x, &mut parts);
    }

    /// Dense products with one vector.
    pub fn dense(&mut self, pool: &Pool, x: &[f32], parts: &mut [(&Linear, &mut [f32])]) {
        self.prepare(x, parts.iter().map(|p| &p.0.weight));
        let mut jobs: Vec<gemv::Job<'_>> = Vec::with_capacity(parts.len());
        let mut transposed: Vec<axpy::Job<'_>> = Vec::new();
        for (linear, out) in parts.iter_mut() {
            let w = linear.weight.matrix();
            match linear.weight.orientation() {
                Orientation::OutputMajor => jobs.push(gemv::Job { w, x: &self.operands[0], y: out }),
                Orientation::InputMajor => {
                    let index = &self.all[..x.len()];
                    transposed.push(axpy::Job { wt: w, index, value: x, y: out });
                }
            }
        }
        if !jobs.is_empty() {
            gemv::run(pool, &mut jobs);
        }
        if !transposed.is_empty() {
            axpy::run(pool, &mut transposed);
        }
        parts.iter_mut().for_each(|(linear, out)| add_bias(pool, linear, out));
    }

    /// `x` in the form that products with `weights` read.
    pub fn operand<'w>(&mut self, x: &[f32], weights: impl Iterator<Item = &'w Weight>) -> &gemv::Operand {
        self.prepare(x, weights);
        &self.operands[0]
    }

    /// Readies the operand for all of `weights`, and the list of all channels where one of them is input-major.
    fn prepare<'w>(&mut self, x: &[f32], weights: impl Iterator<Item = &'w Weight>) {
        self.formats.clear();
        let mut transposed = false;
        for w in weights {
            match w.orientation() {
                Orientation::OutputMajor => self.formats.push(w.format()),
                Orientation::InputMajor => transposed = true,
            }
        }
        if self.operands.is_empty() {
            self.operands.push(gemv::Operand::new());
        }
        if !self.formats.is_empty() {
            self.operands[0].prepare(x, &self.formats);
        }
        if transposed {
            self.all.extend(self.all.len() as u32..x.len() as u32);
        }
    }

    /// Products of different vectors in one region: the down projections of the experts. All must be output-major.
    pub fn dense_each(&mut self, pool: &Pool, parts: &mut [(&Linear, &[f32], &mut [f32])]) {
        while self.operands.len() < parts.len() {
            self.operands.push(gemv::Operand::new());
        }
        for ((linear, x, _), operand) in parts.iter().zip(&mut self.operands) {
            operand.prepare(x, &[linear.weight.format()]);
        }
        let jobs = parts.iter_mut().zip(&self.operands);
        let mut jobs: Vec<_> =
            jobs.map(|((linear, _, out), x)| gemv::Job { w: linear.weight.matrix(), x, y: out }).collect();
        gemv::run(pool, &mut jobs);
        parts.iter_mut().for_each(|(linear, _, out)| add_bias(pool, linear, out));
    }

    /// Prefill: every part's product with the `n` rows of `x`.
    pub fn prefill(&mut self, pool: &Pool, x: &[f32], n: usize, parts: &mut [(&Linear, &mut [f32])]) {
        self.formats.clear();
        self.formats.extend(parts.iter().map(|p| p.0.weight.format()));
        self.input.prepare(pool, x, n, x.len() / n, &self.formats);
        let (mut dot, mut axpy) = (Vec::with_capacity(parts.len()), Vec::new());
        for (linear, out) in parts.iter_mut() {
            let job = gemm::Job { w: linear.weight.matrix(), x: &self.input, y: out, accumulate: false };
            match linear.weight.orientation() {
                Orientation::OutputMajor => dot.push(job),
                Orientation::InputMajor => axpy.push(job),
            }
        }
        if !dot.is_empty() {
            gemm::run(pool, &mut dot);
        }
        if !axpy.is_empty() {
            gemm::run_input_major(pool, &mut axpy);
        }
        parts.iter_mut().for_each(|(linear, out)| add_bias(pool, linear, out));
    }
}

/// Adds the bias, if there is one, to every row of `out`.
fn add_bias(pool: &Pool, linear: &Linear, out: &mut [f32]) {
    if let Some(bias) = &linear.bias {
        rows::each(pool, out, bias.len(), |_, row| elementwise::add(row, bias));
    }
}
