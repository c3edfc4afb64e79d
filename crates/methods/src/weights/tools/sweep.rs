//! The column sweep of SparseGPT and GPTQ: from the first column to the last, an entry is dropped or rounded, and the error
//! goes to the columns behind it through the factor of the inverse Gram matrix.
//!
//! Frantar and Alistarh, SparseGPT (arXiv:2301.00774); Frantar et al., GPTQ (arXiv:2210.17323). Rows do not depend on each
//! other, except where scores compete inside a block of 128 columns; within a block they are swept in parallel, and the
//! columns behind it are updated by one matrix product.

use super::{factor::Factor, grid::Grid, rows, select};
use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use lacuna_core::compress::{Changed, Codes, Layer, Pattern};

/// Columns of a block.
pub const BLOCK: usize = 128;

/// What a sweep does to entries.
#[derive(Clone, Copy)]
pub struct Aim {
    /// Drops this share, where the pattern allows it; `None`: drops nothing that is there.
    pub drop: Option<(f64, Pattern)>,
    /// Rounds what is left.
    pub grid: Option<Grid>,
}

/// What a row carries from block to block.
struct Row {
    /// Errors of the columns of this block.
    errors: Vec<f32>,
    /// The scale of the current group.
    scale: f32,
    codes: Vec<i8>,
    scales: Vec<f32>,
}

/// Sweeps over a layer.
pub fn sweep(layer: &Layer<'_>, factor: &Factor, aim: Aim) -> Changed {
    let n = layer.inputs;
    let mut w = layer.weight.to_vec();
    let mut kept = layer.kept.map_or_else(|| vec![true; w.len()], <[bool]>::to_vec);
    rows::each(layer.pool, &mut w, n, |_, row| {
        row.iter_mut().zip(&factor.dead).filter(|(_, d)| **d).for_each(|(w, _)| *w = 0.0);
    });
    let empty = || Row { errors: Vec::new(), scale: 1.0, codes: Vec::new(), scales: Vec::new() };
    let mut state: Vec<Row> = (0..layer.outputs).map(|_| empty()).collect();
    let mut dropped = 0;
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        if let Some((share, Pattern::Free)) = aim.drop {
            let drop = select::count(share, layer.outputs * end).saturating_sub(dropped);
            dropped += choose(layer, factor, &w, &mut kept, start..end, drop);
        }
        let block = Block { layer, factor, aim, start, end };
        block.rows(&mut w, &mut kept, &mut state);
        let errors: Vec<f32> = state.iter().flat_map(|r| &r.errors).copied().collect();
        push(layer, factor, &mut w, &errors, start..end);
    }
    let codes = aim.grid.map(|g| Codes {
        bits: g.bits,
        group: g.group,
        codes: state.iter().flat_map(|r| &r.codes).copied().collect(),
        scales: state.iter().flat_map(|r| &r.scales).copied().collect(),
    });
    let any = aim.drop.is_some() || layer.kept.is_some();
    Changed { weight: w, kept: any.then_some(kept), codes, books: None, low_rank: None, notes: factor.notes.clone() }
}

/// Marks the `drop` lowest scores `(w / u_jj)^2` of a block of columns, all rows together; entries that were dropped before
/// count first. Returns how many are dropped in the block.
fn choose(
    layer: &Layer<'_>,
    factor: &Factor,
    w: &[f32],
    kept: &mut [bool],
    columns: std::ops::Range<usize>,
    drop: usize,
) -> usize {
    let (n, width) = (layer.inputs, columns.len());
    let mut scores = vec![0.0_f32; layer.outputs * width];
    let before: &[bool] = kept;
    rows::each(layer.pool, &mut scores, width, |r, row| {
        for (s, j) in row.iter_mut().zip(columns.clone()) {
            let x = w[r * n + j] / factor.upper[j * n + j];
            *s = if before[r * n + j] { x * x } else { -1.0 };
        }
    });
    let mut mask = vec![true; scores.len()];
    select::keep_largest(&scores, drop.min(scores.len()), &mut mask);
    let mut count = 0;
    for (r, row) in mask.chunks_exact(width).enumerate() {
        for (k, j) in row.iter().zip(columns.clone()) {
            kept[r * n + j] &= k;
            count += usize::from(!kept[r * n + j]);
        }
    }
    count
}

/// A block of columns.
struct Block<'a> {
    layer: &'a Layer<'a>,
    factor: &'a Factor,
    aim: Aim,
    start: usize,
    end: usize,
}

impl Block<'_> {
    /// Sweeps the columns of the block in every row.
    fn rows(&self, w: &mut [f32], kept: &mut [bool], state: &mut [Row]) {
        let n = self.layer.inputs;
        let mut work: Vec<_> = w.chunks_exact_mut(n).zip(kept.chunks_exact_mut(n)).zip(state.iter_mut()).collect();
        rows::units(self.layer.pool, &mut work, 8, |row, ((w, kept), state)| self.row(row, w, kept, state));
    }

    fn row(&self, row: usize, w: &mut [f32], kept: &mut [bool], state: &mut Row) {
        let n = self.layer.inputs;
        let frozen = self.layer.kept.map(|k| &k[row * n..][..n]);
        state.errors.clear();
        for j in self.start..self.end {
            if let Some((_, Pattern::Runs { keep, of })) = self.aim.drop
                && j.is_multiple_of(of)
            {
                self.choose_run(w, kept, j..j + of, of - keep);
            }
            let u = &self.factor.upper[j * n..][..n];
            let value = self.value(j, w, kept, state);
            let error = (w[j] - value) / u[j];
            w[j] = value;
            state.errors.push(error);
            if error == 0.0 {
                continue;
            }
            let behind = j + 1..self.end;
            match frozen {
                None => w[behind.clone()].iter_mut().zip(&u[behind]).for_each(|(w, u)| *w -= error * u),
                Some(frozen) => behind.filter(|i| frozen[*i]).for_each(|i| w[i] -= error * u[i]),
            }
        }
    }

    /// What column `j` of a row becomes.
    fn value(&self, j: usize, w: &[f32], kept: &[bool], state: &mut Row) -> f32 {
        let Some(grid) = self.aim.grid else { return if kept[j] { w[j] } else { 0.0 } };
        if j.is_multiple_of(grid.group) {
            let group = j..j + grid.group;
            state.scale = grid.scale(group.map(|i| if kept[i] { w[i] } else { 0.0 }));
            state.scales.push(state.scale);
        }
        let code = if kept[j] { grid.code(w[j], state.scale) } else { 0 };
        state.codes.push(code);
        f32::from(code) * state.scale
    }

    /// Marks the `drop` lowest scores of a run of one row.
    fn choose_run(&self, w: &[f32], kept: &mut [bool], run: std::ops::Range<usize>, drop: usize) {
        let n = self.layer.inputs;
        let score = |j: usize| {
            let x = w[j] / self.factor.upper[j * n + j];
            if kept[j] { x * x } else { -1.0 }
        };
        let scores: Vec<f32> = run.clone().map(score).collect();
        let mut mask = vec![true; scores.len()];
        select::keep_largest(&scores, drop, &mut mask);
        run.zip(mask).for_each(|(j, k)| kept[j] &= k);
    }
}

/// Pushes the errors of columns `block` (`[rows, columns]`) into all columns behind them: `W[:, end..] -= E U[block, end..]`;
/// dropped entries stay zero.
pub fn push(layer: &Layer<'_>, factor: &Factor, w: &mut [f32], errors: &[f32], block: std::ops::Range<usize>) {
    let (n, rows, width) = (layer.inputs, layer.outputs, block.len());
    if block.end == n {
        return;
    }
    let e = MatRef::from_row_major_slice(errors, rows, width);
    let u = MatRef::from_row_major_slice(&factor.upper, n, n);
    let u = u.submatrix(block.start, block.end, width, n - block.end);
    let all = MatMut::from_row_major_slice_mut(w, rows, n);
    matmul(all.submatrix_mut(0, block.end, rows, n - block.end), Accum::Add, e, u, -1.0, Par::rayon(0));
    if let Some(frozen) = layer.kept {
        w.iter_mut().zip(frozen).filter(|(_, k)| !**k).for_each(|(w, _)| *w = 0.0);
    }
}
