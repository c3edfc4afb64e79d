//! Several rows through one plan: each row keeps its own channels, a channel that several keep is read once.

use super::{
    compiled::{InputRule, Kept, LayerPlan},
    linear::{Linears, Part, Sparsity},
    sparse::{Neurons, Selection, Used},
};
use lacuna_core::plan::Selector;
use lacuna_kernels::{Pool, axpy, elementwise, gemv};

/// Whether [`inputs`] can serve the rule.
pub(super) fn serves(rule: &InputRule) -> bool {
    rule.low_rank.is_none()
}

/// Projections of the `n` rows of `x` whose inputs the plan selects, all in one region. Each row gets the bits that it
/// has alone; bytes are counted for the union of the channels.
pub(super) fn inputs(
    pool: &Pool,
    plan: &LayerPlan,
    sparsity: &mut Sparsity<'_>,
    x: &[f32],
    n: usize,
    mut parts: Vec<Part<'_>>,
) {
    let width = x.len() / n;
    let mut made: Vec<(&Selector, Vec<Selection>, Kept)> = Vec::with_capacity(parts.len());
    for part in &parts {
        let Some(rule) = plan.input(part.proj) else { continue };
        if !made.iter().any(|(selector, ..)| **selector == rule.selector) {
            let rows: Vec<_> = x.chunks_exact(width).map(|x| selected(&rule.selector, x)).collect();
            let read = union(&rows, width);
            made.push((&rule.selector, rows, read));
        }
    }
    let of = |rule: &InputRule| made.iter().find(|(selector, ..)| **selector == rule.selector);
    let lists: Vec<Vec<(&[u32], &[f32])>> = parts
        .iter()
        .map(|part| {
            let rows = plan.input(part.proj).and_then(of).map_or(&[][..], |(_, rows, _)| &rows[..]);
            rows.iter().map(|s| (&s.index[..], &s.value[..])).collect()
        })
        .collect();
    let mut jobs = Vec::with_capacity(parts.len());
    for (part, x) in parts.iter_mut().zip(&lists) {
        let Some(rule) = plan.input(part.proj) else { continue };
        let count = &mut sparsity.counts.inputs[part.proj as usize];
        x.iter().for_each(|(index, _)| count.add(index.len(), width));
        *sparsity.bytes += of(rule).map_or(0, |(.., read)| rule.reads.bytes(*read));
        jobs.push(axpy::multi::Job { w: rule.weight.columns(), x, y: &mut *part.out });
    }
    axpy::multi::run(pool, &mut jobs);
    for part in parts {
        if let Some(bias) = &part.linear.bias {
            part.out.chunks_exact_mut(bias.len()).for_each(|row| elementwise::add(row, bias));
        }
    }
}

/// [`Neurons::run`] for the rows of `x` and of `gate`, whose rule reads the gate. Each row of `y` gets the bits that it
/// has alone; bytes are counted for the unions.
pub(super) fn neurons(
    pool: &Pool,
    linears: &mut Linears,
    w: &Neurons<'_>,
    (x, gate): (&[f32], &mut [f32]),
    y: &mut [f32],
    watch: &mut dyn FnMut(&[f32]),
) -> Used {
    let (inner, outputs) = (w.first.weight.outputs(), w.rule.down.outputs());
    let n = gate.len() / inner;
    let width = x.len() / n;
    let mut rows: Vec<Selection> = Vec::with_capacity(n);
    let mut bytes = 0;
    for (x, gate) in x.chunks_exact(width).zip(gate.chunks_exact_mut(inner)) {
        let mut chosen = Selection::default();
        bytes += w.choose(pool, linears, x, gate, &mut chosen, watch);
        rows.push(chosen);
    }
    let kept = rows.iter().map(|s| s.index.len()).sum();
    let mut products: Vec<Vec<f32>> = rows.iter().map(|s| s.value.clone()).collect();
    if let Some(up) = w.second {
        let operands = linears.operands(x, n, std::iter::once(&up.weight));
        let mut ups: Vec<Vec<f32>> = rows.iter().map(|s| vec![0.0; s.index.len()]).collect();
        let parts = rows.iter().zip(operands).zip(&mut ups).map(|((s, x), y)| (&s.index[..], x, &mut y[..]));
        gemv::multi::run_rows(pool, &mut gemv::multi::RowsJob { w: up.weight.matrix(), parts: parts.collect() });
        for ((s, up_row), product) in rows.iter().zip(&mut ups).zip(&mut products) {
            if let Some(bias) = &up.bias {
                up_row.iter_mut().zip(&s.index).for_each(|(u, &i)| *u += bias[i as usize]);
            }
            if let Some(act) = w.act.up {
                elementwise::act(act, up_row);
            }
            product.iter_mut().zip(up_row).for_each(|(p, u)| *p *= *u);
        }
        bytes += union(&rows, inner).channels * up.weight.matrix().row_bytes() as u64;
    }
    if let Some(then) = &w.rule.then {
        let mut scratch = Selection::default();
        rows.iter_mut().zip(&mut products).for_each(|(s, p)| s.narrow(then, p, &mut scratch));
    }
    let lists: Vec<(&[u32], &[f32])> = rows.iter().zip(&products).map(|(s, p)| (&s.index[..], &p[..])).collect();
    axpy::multi::run(pool, &mut [axpy::multi::Job { w: w.rule.down.columns(), x: &lists, y: &mut *y }]);
    if let Some(bias) = w.down_bias {
        y.chunks_exact_mut(outputs).for_each(|y| elementwise::add(y, bias));
    }
    bytes += w.rule.reads.bytes(union(&rows, inner));
    Used { kept, bytes }
}

fn selected(selector: &Selector, x: &[f32]) -> Selection {
    let mut selection = Selection::default();
    selection.select(selector, x, false, &[]);
    selection
}

/// The channels of `width` that at least one row keeps.
fn union(rows: &[Selection], width: usize) -> Kept {
    let mut kept = vec![false; width];
    rows.iter().flat_map(|s| &s.index).for_each(|&i| kept[i as usize] = true);
    let index: Vec<u32> = (0..width as u32).filter(|i| kept[*i as usize]).collect();
    Kept::of(&index)
}
