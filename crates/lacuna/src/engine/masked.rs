//! Masked passes: many tokens at once, every row through its own selection, then the dense product. They compute what
//! decode under the plan computes, at the speed of prefill, and save nothing: for measures of quality and for searches.

use super::{
    compiled::{ChosenBy, InputRule, Kept, LayerPlan, NeuronRule},
    linear::{Linears, Part, Sparsity},
    rows,
    sparse::{Selection, scores},
};
use lacuna_core::plan::{Selector, Stage};
use lacuna_kernels::{
    Pool,
    elementwise::{self, Activation},
};
use std::sync::{Mutex, PoisonError};

/// Sets the entries of every row of `x` that `selector` drops to zero; returns how many stay.
fn mask(pool: &Pool, selector: &Selector, x: &mut [f32], width: usize, signed: bool, prompt: &[u32]) -> Kept {
    let kept = Counter::default();
    rows::each(pool, x, width, |_, row| {
        let mut s = Selection::default();
        s.select(selector, row, signed, prompt);
        row.fill(0.0);
        s.index.iter().zip(&s.value).for_each(|(&i, v)| row[i as usize] = *v);
        kept.add(&s.index);
    });
    kept.sum()
}

/// Channels kept by the threads of a pass.
#[derive(Default)]
struct Counter(Mutex<Kept>);

impl Counter {
    fn add(&self, index: &[u32]) {
        let of = Kept::of(index);
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sum.channels += of.channels;
        sum.groups += of.groups;
    }

    fn sum(self) -> Kept {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Projections of the `n` rows of `x`, each over its own kept inputs.
pub(super) fn inputs(
    pool: &Pool,
    sparsity: &mut Sparsity<'_>,
    (x, n): (&[f32], usize),
    parts: Vec<Part<'_>>,
    linears: &mut Linears,
) {
    let width = x.len() / n;
    let rule = |p: &Part<'_>| sparsity.plan.and_then(|plan| plan.input(p.proj));
    let (sparse, dense): (Vec<_>, Vec<_>) = parts.into_iter().partition(|p| rule(p).is_some());
    if !dense.is_empty() {
        let bytes: usize = dense.iter().map(|p| p.linear.weight.bytes().len()).sum();
        *sparsity.bytes += (bytes * n) as u64;
        let mut list: Vec<_> = dense.into_iter().map(|p| (p.linear, p.out)).collect();
        linears.prefill(pool, x, n, &mut list);
    }
    let Some(plan) = sparsity.plan else { return };
    let mut made: Option<(&Selector, Vec<f32>, Kept)> = None;
    for part in sparse {
        let Some(rule) = plan.input(part.proj) else { continue };
        let (masked, kept) = match &made {
            Some((s, masked, kept)) if **s == rule.selector => (masked, *kept),
            _ => {
                let mut copy = x.to_vec();
                let kept = mask(pool, &rule.selector, &mut copy, width, false, &[]);
                let (_, masked, _) = made.insert((&rule.selector, copy, kept));
                (&*masked, kept)
            }
        };
        sparsity.counts.inputs[part.proj as usize].add(kept.channels as usize, x.len());
        *sparsity.bytes += rule.reads.bytes(kept);
        linears.prefill(pool, masked, n, &mut [(part.linear, &mut *part.out)]);
        low_rank(pool, linears, rule, (x, masked, n), part.out);
        if let Some((down, up)) = &rule.low_rank {
            *sparsity.bytes += (n * (down.weight.bytes().len() + up.weight.bytes().len())) as u64;
        }
    }
}

/// Adds what the dropped inputs give through the low-rank part, if there is one.
fn low_rank(
    pool: &Pool,
    linears: &mut Linears,
    rule: &InputRule,
    (x, masked, n): (&[f32], &[f32], usize),
    out: &mut [f32],
) {
    let Some((down, up)) = &rule.low_rank else { return };
    let rest: Vec<f32> = x.iter().zip(masked).map(|(x, m)| x - m).collect();
    let mut through = vec![0.0; n * down.weight.outputs()];
    let mut add = vec![0.0; out.len()];
    linears.dense(pool, &rest, n, &mut [(down, &mut through)]);
    linears.dense(pool, &through, n, &mut [(up, &mut add)]);
    elementwise::add(out, &add);
}

/// Activates the rows of `gate` and zeroes the neurons that the rule drops; returns how many stay. `x` holds the rows
/// that a predictor reads.
pub(super) fn neurons(
    pool: &Pool,
    linears: &mut Linears,
    rule: &NeuronRule,
    (act, prompt): (Activation, &[u32]),
    (x, n): (&[f32], usize),
    gate: &mut [f32],
) -> Kept {
    let inner = gate.len() / n;
    let activate = |gate: &mut [f32]| rows::each(pool, gate, inner, |_, row| elementwise::act(act, row));
    match &rule.by {
        ChosenBy::Gate(Stage::Activated) => {
            activate(gate);
            mask(pool, &rule.selector, gate, inner, false, prompt)
        }
        ChosenBy::Gate(Stage::Gate) => {
            // Every activation of the engine maps zero to zero.
            let kept = mask(pool, &rule.selector, gate, inner, true, prompt);
            activate(gate);
            kept
        }
        ChosenBy::Predictor { down, relu, up } => {
            let scores = scores(pool, linears, (x, n), (down, *relu, up));
            activate(gate);
            let kept = Counter::default();
            rows::each(pool, gate, inner, |i, row| {
                let mut s = Selection::default();
                s.select(&rule.selector, &scores[i * inner..(i + 1) * inner], true, prompt);
                let all = row.to_vec();
                row.fill(0.0);
                s.index.iter().for_each(|&i| row[i as usize] = all[i as usize]);
                kept.add(&s.index);
            });
            kept.sum()
        }
    }
}

/// Zeroes the products that `then` drops; returns how many neurons reach down.
pub(super) fn products(pool: &Pool, rule: &NeuronRule, kept: Kept, product: &mut [f32], inner: usize) -> Kept {
    let Some(then) = &rule.then else { return kept };
    let reach = mask(pool, then, product, inner, false, &[]);
    Kept { channels: reach.channels.min(kept.channels), groups: reach.groups.min(kept.groups) }
}

/// The rule on the neurons of a layer.
pub(super) fn neuron_rule(plan: Option<&LayerPlan>) -> Option<&NeuronRule> {
    plan.and_then(|p| p.neurons.as_ref())
}
