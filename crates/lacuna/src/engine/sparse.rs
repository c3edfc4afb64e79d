//! Decode through what a plan keeps: columns of kept input channels, rows of kept neurons.

use super::{
    compiled::{LayerPlan, NeuronRule},
    linear::{Part, Sparsity},
};
use crate::model::weights::Linear;
use lacuna_core::plan::Selector;
use lacuna_kernels::{Pool, axpy, elementwise, gemv, isa, select};

/// The kept entries of a vector; buffers are reused.
#[derive(Debug, Default)]
pub(super) struct Selection {
    pub index: Vec<u32>,
    pub value: Vec<f32>,
}

impl Selection {
    /// Keeps the entries of `x` that `selector` wants.
    pub fn select(&mut self, selector: Selector, x: &[f32]) {
        match selector {
            Selector::NonZero => select::nonzero(isa::get(), x, &mut self.index, &mut self.value),
            Selector::Magnitude { threshold } => {
                select::magnitude(isa::get(), x, threshold, &mut self.index, &mut self.value);
            }
        }
    }
}

/// Projections of `x` whose inputs the plan selects, all in one region; `selections` has room for every part. Parts with
/// equal selectors (q, k, v under uniform thresholds) share one selection.
pub(super) fn inputs(
    pool: &Pool,
    plan: &LayerPlan,
    sparsity: &mut Sparsity<'_>,
    x: &[f32],
    mut parts: Vec<Part<'_>>,
    selections: &mut [Selection],
) {
    let mut made: Vec<Selector> = Vec::with_capacity(parts.len());
    let mut jobs = Vec::with_capacity(parts.len());
    for part in &parts {
        let Some(rule) = plan.input(part.proj) else { continue };
        let at = made.iter().position(|s| *s == rule.selector).unwrap_or_else(|| {
            made.push(rule.selector);
            selections[made.len() - 1].select(rule.selector, x);
            made.len() - 1
        });
        let kept = selections[at].index.len();
        sparsity.counts.inputs[part.proj as usize].add(kept, x.len());
        *sparsity.bytes += (kept * rule.weight.matrix().row_bytes()) as u64;
    }
    for part in parts.iter_mut() {
        let Some(rule) = plan.input(part.proj) else { continue };
        let Some(at) = made.iter().position(|s| *s == rule.selector) else { continue };
        let (index, value) = (&selections[at].index[..], &selections[at].value[..]);
        jobs.push(axpy::Job { wt: rule.weight.matrix(), index, value, y: &mut *part.out });
    }
    axpy::run(pool, &mut jobs);
    for part in parts {
        if let Some(bias) = &part.linear.bias {
            elementwise::add(part.out, bias);
        }
    }
}

/// The second half of a gated MLP over selected neurons.
pub(super) struct Neurons<'a> {
    pub rule: &'a NeuronRule,
    pub up: &'a Linear,
    pub down_bias: Option<&'a [f32]>,
}

impl Neurons<'_> {
    /// `y = down(gate * up x)` over the neurons that the rule keeps of the activated `gate`. `x` is prepared for the
    /// format of `up`; `product` is scratch. Returns the bytes read.
    pub fn run(
        &self,
        pool: &Pool,
        gate: &[f32],
        x: &gemv::Operand,
        selection: &mut Selection,
        product: &mut Vec<f32>,
        y: &mut [f32],
    ) -> u64 {
        selection.select(self.rule.selector, gate);
        let kept = selection.index.len();
        product.resize(kept, 0.0);
        let w = self.up.weight.matrix();
        gemv::run_rows(pool, &mut [gemv::RowsJob { w, rows: &selection.index, x, y: product }]);
        let bias = |i: u32| self.up.bias.as_ref().map_or(0.0, |b| b[i as usize]);
        for ((p, g), &i) in product.iter_mut().zip(&selection.value).zip(&selection.index) {
            *p = g * (*p + bias(i));
        }
        let down = self.rule.down.matrix();
        axpy::run(pool, &mut [axpy::Job { wt: down, index: &selection.index, value: product, y }]);
        if let Some(bias) = self.down_bias {
            elementwise::add(y, bias);
        }
        (kept * (w.row_bytes() + down.row_bytes())) as u64
    }
}
