//! Decode through what a plan keeps: columns of kept input channels, rows of kept neurons.

use super::{
    compiled::{ChosenBy, Kept, LayerPlan, NeuronRule},
    linear::{Linears, Part, Sparsity},
    mlp::Acts,
};
use crate::model::weights::Linear;
use lacuna_core::plan::{Cut, Selector, Stage};
use lacuna_kernels::{
    Pool, axpy,
    elementwise::{self, Activation},
    gemv, isa, select,
};

/// The kept entries of a vector; buffers are reused.
#[derive(Debug, Default)]
pub(super) struct Selection {
    pub index: Vec<u32>,
    pub value: Vec<f32>,
    top: select::TopScratch,
    shifted: Vec<f32>,
}

impl Selection {
    /// Keeps the entries of `x` that `selector` wants by magnitude, or `signed` by the value itself. `prompt` is the list
    /// of a selector that follows the prompt.
    pub fn select(&mut self, selector: &Selector, x: &[f32], signed: bool, prompt: &[u32]) {
        let scale = selector.scale.as_ref().map(|s| s.values()).filter(|_| !signed);
        self.cut(&selector.cut, scale, x, signed, prompt);
        if selector.unit {
            divide_by_norm(&mut self.value);
        }
    }

    fn cut(&mut self, cut: &Cut, scale: Option<&[f32]>, x: &[f32], signed: bool, prompt: &[u32]) {
        match cut {
            Cut::NonZero => select::nonzero(isa::get(), x, &mut self.index, &mut self.value),
            Cut::Above { threshold } => self.above(x, scale, signed, *threshold),
            Cut::Top { count } if signed => self.top_signed(x, *count),
            Cut::Top { count } => {
                select::top_k(isa::get(), x, scale, *count, &mut self.top, (&mut self.index, &mut self.value));
            }
            Cut::Gaussian { multiple } => {
                let (mean, std) = select::moments(x, scale, signed);
                self.above(x, scale, signed, (mean + f64::from(*multiple) * std) as f32);
            }
            Cut::Listed { list } => select::listed(x, list.positions(), &mut self.index, &mut self.value),
            Cut::Prompt { .. } => select::listed(x, prompt, &mut self.index, &mut self.value),
        }
    }

    fn above(&mut self, x: &[f32], scale: Option<&[f32]>, signed: bool, threshold: f32) {
        let (isa, index, value) = (isa::get(), &mut self.index, &mut self.value);
        match scale {
            _ if signed => select::above(isa, x, threshold, index, value),
            Some(scale) => select::scaled(isa, x, scale, threshold, index, value),
            None => select::magnitude(isa, x, threshold, index, value),
        }
    }

    /// The largest values, not magnitudes: all are moved to zero and above first.
    fn top_signed(&mut self, x: &[f32], count: usize) {
        let least = x.iter().copied().fold(f32::INFINITY, f32::min);
        self.shifted.clear();
        self.shifted.extend(x.iter().map(|v| v - least));
        select::top_k(isa::get(), &self.shifted, None, count, &mut self.top, (&mut self.index, &mut self.value));
    }

    /// Drops entries that `then` does not keep by `product` (one number per entry of `index`).
    pub(super) fn narrow(&mut self, then: &Selector, product: &mut Vec<f32>, scratch: &mut Selection) {
        let gathered: Option<Vec<f32>> =
            then.scale.as_ref().map(|s| self.index.iter().map(|&i| s.values()[i as usize]).collect());
        scratch.cut(&then.cut, gathered.as_deref(), product, false, &[]);
        for (to, &from) in scratch.index.iter().enumerate() {
            self.index[to] = self.index[from as usize];
        }
        self.index.truncate(scratch.index.len());
        std::mem::swap(product, &mut scratch.value);
    }
}

/// `x / ||x||`; zeros stay.
fn divide_by_norm(x: &mut [f32]) {
    let norm = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
    if norm > 0.0 {
        x.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
    }
}

/// Projections of `x` whose inputs the plan selects, all in one region; `selections` has room for every part. Parts with
/// equal selectors (q, k, v with one joint score) share one selection.
pub(super) fn inputs(
    pool: &Pool,
    plan: &LayerPlan,
    sparsity: &mut Sparsity<'_>,
    x: &[f32],
    mut parts: Vec<Part<'_>>,
    linears: &mut Linears,
) {
    let mut made: Vec<&Selector> = Vec::with_capacity(parts.len());
    let mut jobs = Vec::with_capacity(parts.len());
    let mut selections = std::mem::take(&mut linears.selections);
    for part in &parts {
        let Some(rule) = plan.input(part.proj) else { continue };
        let at = made.iter().position(|s| **s == rule.selector).unwrap_or_else(|| {
            made.push(&rule.selector);
            selections[made.len() - 1].select(&rule.selector, x, false, &[]);
            made.len() - 1
        });
        let index = &selections[at].index;
        sparsity.counts.inputs[part.proj as usize].add(index.len(), x.len());
        *sparsity.bytes += rule.reads.bytes(Kept::of(index));
    }
    for part in parts.iter_mut() {
        let Some(rule) = plan.input(part.proj) else { continue };
        let Some(at) = made.iter().position(|s| **s == rule.selector) else { continue };
        let (index, value) = (&selections[at].index[..], &selections[at].value[..]);
        jobs.push(axpy::Job { w: rule.weight.columns(), index, value, y: &mut *part.out });
    }
    axpy::run(pool, &mut jobs);
    for part in parts {
        let rule = plan.input(part.proj);
        if let Some((rule, (down, up))) = rule.and_then(|r| Some((r, r.low_rank.as_ref()?)))
            && let Some(at) = made.iter().position(|s| **s == rule.selector)
        {
            let mut rest = x.to_vec();
            selections[at].index.iter().for_each(|&i| rest[i as usize] = 0.0);
            let mut through = vec![0.0; down.weight.outputs()];
            let mut add = vec![0.0; part.out.len()];
            linears.dense(pool, &rest, 1, &mut [(down, &mut through)]);
            linears.dense(pool, &through, 1, &mut [(up, &mut add)]);
            elementwise::add(part.out, &add);
            *sparsity.bytes += (down.weight.bytes().len() + up.weight.bytes().len()) as u64;
        }
        if let Some(bias) = &part.linear.bias {
            elementwise::add(part.out, bias);
        }
    }
    linears.selections = selections;
}

/// An MLP over selected neurons. `first` is the gate, or up in a plain MLP; `second` is up of a gated one.
pub(super) struct Neurons<'a> {
    pub rule: &'a NeuronRule,
    pub act: Acts,
    pub first: &'a Linear,
    pub second: Option<&'a Linear>,
    pub down_bias: Option<&'a [f32]>,
    /// The list of a selector that follows the prompt.
    pub prompt: &'a [u32],
}

/// What one step of [`Neurons`] did.
pub(super) struct Used {
    pub kept: usize,
    pub bytes: u64,
}

impl Neurons<'_> {
    /// `y = down(act(gate) * up x)` over the neurons that the rule keeps. `gate` holds `first x` where the rule looks at
    /// it; `watch` sees the activated gate. `product` is scratch.
    pub fn run(
        &self,
        pool: &Pool,
        linears: &mut Linears,
        x: &[f32],
        (gate, product): (&mut [f32], &mut Vec<f32>),
        y: &mut [f32],
        watch: &mut dyn FnMut(&[f32]),
    ) -> Used {
        let [mut chosen, mut scratch, third] = std::mem::take(&mut linears.selections);
        let mut bytes = self.choose(pool, linears, x, gate, &mut chosen, watch);
        let kept = chosen.index.len();
        product.resize(kept, 0.0);
        if let Some(up) = self.second {
            rows(pool, linears, up, x, &chosen.index, product);
            if let Some(act) = self.act.up {
                elementwise::act(act, product);
            }
            product.iter_mut().zip(&chosen.value).for_each(|(p, g)| *p *= g);
            bytes += (kept * up.weight.matrix().row_bytes()) as u64;
        } else {
            product.copy_from_slice(&chosen.value);
        }
        if let Some(then) = &self.rule.then {
            chosen.narrow(then, product, &mut scratch);
        }
        let w = self.rule.down.columns();
        axpy::run(pool, &mut [axpy::Job { w, index: &chosen.index, value: product, y }]);
        if let Some(bias) = self.down_bias {
            elementwise::add(y, bias);
        }
        bytes += self.rule.reads.bytes(Kept::of(&chosen.index));
        linears.selections = [chosen, scratch, third];
        Used { kept, bytes }
    }

    /// Fills `chosen` with the kept neurons and their activated gates. Returns the bytes read for it.
    pub(super) fn choose(
        &self,
        pool: &Pool,
        linears: &mut Linears,
        x: &[f32],
        gate: &mut [f32],
        chosen: &mut Selection,
        watch: &mut dyn FnMut(&[f32]),
    ) -> u64 {
        let selector = &self.rule.selector;
        if self.rule.is_fixed() {
            let list = if let Cut::Listed { list } = &selector.cut { list.positions() } else { self.prompt };
            chosen.index.clear();
            chosen.index.extend_from_slice(list);
            return self.gates(pool, linears, x, chosen);
        }
        match &self.rule.by {
            ChosenBy::Gate(Stage::Activated) => {
                elementwise::act(self.act.gate, gate);
                watch(gate);
                chosen.select(selector, gate, false, self.prompt);
                0
            }
            ChosenBy::Gate(Stage::Gate) => {
                chosen.select(selector, gate, true, self.prompt);
                elementwise::act(self.act.gate, &mut chosen.value);
                0
            }
            ChosenBy::Predictor { down, relu, up } => {
                let scores = scores(pool, linears, (x, 1), (down, *relu, up));
                chosen.select(selector, &scores, true, self.prompt);
                self.rule.predictor_bytes() + self.gates(pool, linears, x, chosen)
            }
        }
    }

    /// Activated gates of the neurons in `chosen.index`; returns the bytes read.
    fn gates(&self, pool: &Pool, linears: &mut Linears, x: &[f32], chosen: &mut Selection) -> u64 {
        chosen.value.resize(chosen.index.len(), 0.0);
        rows(pool, linears, self.first, x, &chosen.index, &mut chosen.value);
        elementwise::act(self.act.gate, &mut chosen.value);
        (chosen.index.len() * self.first.weight.matrix().row_bytes()) as u64
    }
}

/// Scores of all neurons for the `n` rows of `x`, by a low-rank network; each row has the bits that it has alone, so that
/// masked passes choose what decode chooses.
pub(super) fn scores(
    pool: &Pool,
    linears: &mut Linears,
    (x, n): (&[f32], usize),
    (down, relu, up): (&Linear, bool, &Linear),
) -> Vec<f32> {
    let mut hidden = vec![0.0; n * down.weight.outputs()];
    let mut scores = vec![0.0; n * up.weight.outputs()];
    linears.dense(pool, x, n, &mut [(down, &mut hidden)]);
    if relu {
        elementwise::act(Activation::Relu, &mut hidden);
    }
    linears.dense(pool, &hidden, n, &mut [(up, &mut scores)]);
    scores
}

/// `out[i] = W[rows[i]] x + bias[rows[i]]`.
fn rows(pool: &Pool, linears: &mut Linears, linear: &Linear, x: &[f32], rows: &[u32], out: &mut [f32]) {
    let x = linears.operand(x, std::iter::once(&linear.weight));
    gemv::run_rows(pool, &mut [gemv::RowsJob { w: linear.weight.matrix(), rows, x, y: out }]);
    if let Some(bias) = &linear.bias {
        out.iter_mut().zip(rows).for_each(|(o, &i)| *o += bias[i as usize]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_has_norm_one_and_forgets_the_scale_of_the_rest() {
        let mut s = Selection::default();
        let x = [3.0, -0.1, 0.0, -4.0];
        s.select(&Selector::top(2).to_unit(), &x, false, &[]);
        assert_eq!((&s.index[..], &s.value[..]), (&[0, 3][..], &[0.6, -0.8][..]));
        let larger = x.map(|v| v * 1024.0);
        let before = s.value.clone();
        s.select(&Selector::top(2).to_unit(), &larger, false, &[]);
        assert_eq!(s.value, before);
        s.select(&Selector::top(2).to_unit(), &[0.0; 4], false, &[]);
        assert!(s.value.iter().all(|v| *v == 0.0));
        s.select(&Selector::top(2), &x, false, &[]);
        assert_eq!(s.value, [3.0, -4.0], "without the option nothing is divided");
    }
}
