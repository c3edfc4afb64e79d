//! Several rows through one plan: each row keeps its own channels, a channel that several keep is read once.

use super::{
    compiled::{InputRule, LayerPlan},
    linear::{Part, Sparsity},
    sparse::Selection,
};
use lacuna_core::plan::Selector;
use lacuna_kernels::{Pool, axpy, elementwise};

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
    let mut made: Vec<(&Selector, Vec<Selection>, usize)> = Vec::with_capacity(parts.len());
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
        *sparsity.bytes += of(rule).map_or(0, |(.., read)| (read * rule.channel_bytes) as u64);
        jobs.push(axpy::multi::Job { wt: rule.weight.matrix(), x, y: &mut *part.out });
    }
    axpy::multi::run(pool, &mut jobs);
    for part in parts {
        if let Some(bias) = &part.linear.bias {
            part.out.chunks_exact_mut(bias.len()).for_each(|row| elementwise::add(row, bias));
        }
    }
}

fn selected(selector: &Selector, x: &[f32]) -> Selection {
    let mut selection = Selection::default();
    selection.select(selector, x, false, &[]);
    selection
}

/// How many channels of `width` at least one row keeps.
fn union(rows: &[Selection], width: usize) -> usize {
    let mut kept = vec![false; width];
    rows.iter().flat_map(|s| &s.index).for_each(|&i| kept[i as usize] = true);
    kept.iter().filter(|k| **k).count()
}
