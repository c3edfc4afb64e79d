//! What lies before the first block and behind the last: embeddings and positions in the first basis, the head in the last.

use super::{
    Sliced,
    matrix::{centre, times},
    walk::{Cut, Walk, ones},
};
use crate::compress::{store::Finished, tensors::numbers};
use crate::model::{spec::NormKind, weights::Norm};
use lacuna_core::{format::safetensors::Dtype, weight::Weight};
use lacuna_kernels::{Format, convert::decode_run};

/// Rows of a table that are turned at once.
const ROWS: usize = 4096;

impl Walk<'_> {
    /// Embeddings and learned positions in the first basis.
    pub(super) fn beginning(&self, basis: &Cut) -> Vec<Finished> {
        let centred = self.model.spec.norm == NormKind::Layer;
        let named = |name: &str| format!("{}{name}.weight", self.prefix);
        let embed = self.table(named(self.plan.names.embed), &self.model.embed, basis, |rows, width| {
            if centred {
                centre(rows, width);
            }
        });
        let positions = self.model.positions.as_ref().map(|table| {
            self.table(named(self.plan.names.positions), table, basis, |rows, width| {
                if centred {
                    centre(rows, width);
                }
            })
        });
        [Some(embed), positions].into_iter().flatten().collect()
    }

    /// The last norm, which is plain now, and the head with its gains in the last basis.
    pub(super) fn end(&self, basis: &Cut) -> Vec<Finished> {
        // Loading puts the factor on the logits into the gains, and will do so again.
        let Norm { gain, bias, .. } = &self.model.final_norm;
        let scale = 1.0 / self.model.spec.logit_scale;
        let gain: Vec<f32> = gain.iter().map(|g| g * scale).collect();
        let bias: Option<Vec<f32>> = bias.as_ref().map(|b| b.iter().map(|b| b * scale).collect());
        let name = self.head();
        let head = self.table(name.clone(), &self.model.head.weight, basis, |rows, width| {
            rows.chunks_exact_mut(width).for_each(|row| row.iter_mut().zip(&gain).for_each(|(w, g)| *w *= g));
        });
        let norm = ones(self.source, format!("{}{}.weight", self.prefix, self.plan.names.final_norm), self.kept());
        let mut all = vec![head, norm];
        if self.model.head.bias.is_some() || bias.is_some() {
            let mut sums = self.model.head.bias.clone().unwrap_or_else(|| vec![0.0; self.model.spec.vocab]);
            if let Some(shift) = &bias {
                let weight = &self.model.head.weight;
                for (start, sums) in (0..).step_by(ROWS).zip(sums.chunks_mut(ROWS)) {
                    let rows = decoded_rows(weight, start, sums.len());
                    let moved = times(self.pool(), &rows, weight.inputs(), shift);
                    sums.iter_mut().zip(&moved).for_each(|(s, m)| *s += m);
                }
            }
            let format = all[0].dtype.format().unwrap_or(Format::F32);
            let (name, shape) = (name.replace(".weight", ".bias"), vec![sums.len() as u64]);
            all.push(Finished { name, dtype: all[0].dtype, shape, data: numbers(format, &sums) });
        }
        all
    }

    /// Where the head is stored, or will be where it was the embedding.
    fn head(&self) -> String {
        let own = format!("{}.weight", self.plan.names.head);
        let prefixed = format!("{}{own}", self.prefix.strip_suffix("model.").unwrap_or(self.prefix));
        if !self.source.has(&own) && self.source.has(&prefixed) { prefixed } else { own }
    }

    /// The rows of a table in another basis, after `change`.
    fn table(&self, name: String, table: &Weight, basis: &Cut, change: impl Fn(&mut [f32], usize)) -> Finished {
        let (count, width) = (table.outputs(), table.inputs());
        let dtype = Dtype::of(table.format()).unwrap_or(Dtype::F32);
        let format = dtype.format().unwrap_or(Format::F32);
        let mut data = Vec::with_capacity(format.run_bytes(count * self.kept()).unwrap_or(0));
        for start in (0..count).step_by(ROWS) {
            let mut rows = decoded_rows(table, start, ROWS.min(count - start));
            change(&mut rows, width);
            data.extend(numbers(format, &times(self.pool(), &rows, width, &basis.rows)));
        }
        Finished { name, dtype, shape: vec![count as u64, self.kept() as u64], data }
    }
}

fn decoded_rows(table: &Weight, start: usize, count: usize) -> Vec<f32> {
    let (m, width) = (table.matrix(), table.inputs());
    let mut rows = vec![0.0; count * width];
    rows.chunks_exact_mut(width).enumerate().for_each(|(i, row)| decode_run(m.format(), m.row(start + i), row));
    rows
}

impl Sliced {
    /// Bytes that a run needs beside those of the matrices as they were: shortcuts and bases, embeddings and a head of their
    /// own, all at most in four bytes.
    pub fn added(&self) -> u64 {
        let (kept, before, blocks) = (self.spec.width as u64, self.before as u64, self.spec.blocks.len() as u64);
        4 * (blocks * (2 * kept * kept + 2 * kept * before) + 2 * self.spec.vocab as u64 * kept)
    }
}
