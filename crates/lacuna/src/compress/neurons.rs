//! Whole neurons: chosen on the dense block, dropped from gate, up, down and their biases together. Those that stay come
//! first. With one width for all blocks the matrices really become smaller; otherwise the rest of their places hold zeros, which
//! the engine leaves out when it starts.

use super::{
    LayerReport, Plan,
    block::{Compressed, Runner, Spent, Task, decoded, output_error, relative, rounded},
    choices::{Choices, place},
    hidden::Hidden,
    homes::{Home, homes},
    store::Finished,
    tensors::numbers,
};
use crate::{
    calibrate::layer_shapes,
    error::{Error, Result},
    model::{
        spec::{MlpSpec, Spec},
        weights::Block,
    },
};
use lacuna_core::{
    compress::{Changed, Inputs, NeuronPruner, Neurons, Pruned, Sight},
    format::safetensors::Dtype,
    method::MethodError,
    site::Proj,
};
use lacuna_kernels::{Format, Pool};
use lacuna_methods::registry::Resolved;
use std::{collections::BTreeMap, time::Instant};

/// The projections of an MLP.
const MLP: [Proj; 3] = [Proj::Gate, Proj::Up, Proj::Down];

/// The step that drops whole neurons, if one does.
pub fn pruner(steps: &[Resolved]) -> Option<(&Resolved, &'static dyn NeuronPruner)> {
    steps.iter().find_map(|s| Some((s, s.method.compressor()?.neurons()?)))
}

/// How many of `inner` neurons of a block stay.
fn keep((step, pruner): (&Resolved, &dyn NeuronPruner), choices: &Choices, layer: usize, inner: usize) -> usize {
    let shares: Vec<f64> = MLP.iter().filter_map(|p| choices.get(layer, *p).share).collect();
    let share = match shares.len() {
        0 => step.params.get("sparsity"),
        n => shares.iter().sum::<f64>() / n as f64,
    };
    pruner.keep(&step.params, inner, share)
}

/// The width of an MLP that is none of experts.
fn inner(mlp: &MlpSpec) -> Option<usize> {
    match *mlp {
        MlpSpec::Gated { inner } | MlpSpec::Plain { inner } => Some(inner),
        MlpSpec::Experts { .. } | MlpSpec::ReluExperts { .. } => None,
    }
}

/// `spec` with MLPs of `width` neurons.
fn with_width(spec: &Spec, width: usize) -> Spec {
    let mut spec = spec.clone();
    spec.blocks.iter_mut().for_each(|b| match &mut b.mlp {
        MlpSpec::Gated { inner } | MlpSpec::Plain { inner } => *inner = width,
        MlpSpec::Experts { .. } | MlpSpec::ReluExperts { .. } => {}
    });
    spec
}

/// An output with narrower MLPs.
pub struct Narrowed {
    /// Neurons of every MLP.
    pub width: usize,
    /// What the output computes.
    pub spec: Spec,
    /// Where its projections are stored, by block.
    pub homes: Vec<Vec<Home>>,
}

impl Plan<'_> {
    /// The shape of the output, where a step drops as many neurons in every block.
    pub(super) fn narrowed(&self, prefix: &str) -> Option<Narrowed> {
        let step = pruner(&self.request.steps)?;
        let width_of = |(layer, b): (usize, &crate::model::spec::BlockSpec)| {
            let inner = inner(&b.mlp)?;
            Some((inner, keep(step, &self.choices, layer, inner)))
        };
        let all: Option<Vec<(usize, usize)>> = self.spec.blocks.iter().enumerate().map(width_of).collect();
        let all = all?;
        let first = *all.first()?;
        if first.0 == first.1 || all.iter().any(|w| *w != first) {
            return None;
        }
        let spec = with_width(&self.spec, first.1);
        let homes = (0..spec.blocks.len()).map(|l| homes(self.names, prefix, &spec, l)).collect();
        Some(Narrowed { width: first.1, spec, homes })
    }

    /// That a step that drops whole neurons stands alone, on a model that has MLPs of its own.
    pub(super) fn check_neurons(&self) -> Result<()> {
        let Some((step, _)) = pruner(&self.request.steps) else { return Ok(()) };
        let refuse = |reason: &str| {
            Err(MethodError::NotApplicable { method: step.method.name().into(), reason: reason.into() }.into())
        };
        if self.request.steps.len() > 1 {
            return refuse(
                "it changes the shape of the model; run it alone, and compress its output with the other methods",
            );
        }
        if self.spec.blocks.iter().any(|b| inner(&b.mlp).is_none()) {
            return refuse("the MLPs of a mixture are experts, which it does not reach");
        }
        Ok(())
    }
}

impl Task<'_> {
    /// Drops neurons of the block's MLP. `done` is told each changed layer.
    ///
    /// # Errors
    /// What the method says, numbers that are not finite, a width that the format of down cannot store.
    pub(super) fn neurons(
        &self,
        (step, pruner): (&Resolved, &dyn NeuronPruner),
        hidden: Option<&mut Hidden>,
        done: &mut dyn FnMut(&LayerReport),
    ) -> Result<Compressed> {
        let block = &self.model.blocks[self.layer];
        let Some(mlp) = &layer_shapes(&self.model.spec)[self.layer].mlp else { return Ok(Compressed::default()) };
        let inner = mlp.inner;
        let keep = keep((step, pruner), self.choices, self.layer, inner);
        self.check_width(block, keep, inner)?;
        let start = Instant::now();
        let runner = Runner::new(self.model, self.layer, block.clone(), self.threads)?;
        let seen = match hidden {
            Some(hidden) => {
                let gram = self.sight() == Sight::Gram;
                runner.observe(self.layer, hidden, &[(Proj::Down, inner)], gram)?.remove(&Proj::Down)
            }
            None => None,
        };
        let observed = Instant::now();
        let weights: BTreeMap<Proj, Vec<f32>> =
            MLP.into_iter().filter_map(|p| Some((p, decoded(&block.linear(p)?.weight)))).collect();
        let of = |proj: Proj| weights.get(&proj).map(|w| &w[..]);
        let neurons = Neurons {
            place: &format!("layers.{}.mlp", self.layer),
            width: self.model.spec.width,
            inner,
            gate: of(Proj::Gate),
            up: of(Proj::Up).unwrap_or_default(),
            down: of(Proj::Down).unwrap_or_default(),
            seen: seen.as_ref(),
            keep,
            pool: runner.pool(),
        };
        let pruned = pruner.prune(&step.params, &neurons)?;
        let mut out = Compressed { notes: pruned.notes.clone(), ..Compressed::default() };
        let order = Order::new(&pruned.kept, self.narrow);
        for (proj, dense) in &weights {
            let format = block.linear(*proj).map_or(Format::F32, |l| l.weight.format());
            let report = self.report(*proj, dense, (&pruned, seen.as_ref()), format, runner.pool());
            done(&report);
            out.layers.push(report);
            let weight = match proj {
                Proj::Down => order.columns(&pruned.down, inner),
                _ => order.rows(dense, neurons.width),
            };
            let changed = Changed {
                weight: rounded(&weight, format),
                kept: None,
                codes: None,
                books: None,
                low_rank: None,
                notes: Vec::new(),
            };
            out.changed.insert(*proj, changed);
        }
        out.beside = self.biases(block, &order);
        out.spent = Spent { observing: observed - start, solving: observed.elapsed() };
        Ok(out)
    }

    /// That what stays fills whole blocks of the format of down.
    fn check_width(&self, block: &Block, keep: usize, inner: usize) -> Result<()> {
        let Some(down) = block.linear(Proj::Down) else { return Ok(()) };
        let unit = down.weight.format().block_len();
        if keep == inner || keep.is_multiple_of(unit) {
            return Ok(());
        }
        let place = place(self.layer, Proj::Down);
        let name = down.weight.format().name();
        let reason =
            format!("{keep} neurons are no whole blocks of {name}; use a multiple of {unit} (parameter `multiple`)");
        Err(Error::Method(MethodError::Layer { place, reason }))
    }

    /// What became of one projection, in its old shape.
    fn report(
        &self,
        proj: Proj,
        dense: &[f32],
        (pruned, seen): (&Pruned, Option<&Inputs>),
        format: Format,
        pool: &Pool,
    ) -> LayerReport {
        let (inner, width) = (pruned.kept.len(), self.model.spec.width);
        let down = proj == Proj::Down;
        let (outputs, inputs) = if down { (width, inner) } else { (inner, width) };
        let new: Vec<f32> = match down {
            true if format.block_len() == 1 => rounded(&pruned.down, format),
            true => pruned.down.clone(),
            false => dense.iter().enumerate().map(|(i, w)| if pruned.kept[i / width] { *w } else { 0.0 }).collect(),
        };
        LayerReport {
            layer: self.layer,
            proj: proj.name().into(),
            outputs,
            inputs,
            dropped: (pruned.kept.iter().filter(|k| !**k).count() * width) as u64,
            zeros: new.iter().filter(|w| **w == 0.0).count() as u64,
            bits: None,
            bytes: (0, 0),
            weight_error: relative(dense, &new, None, inputs),
            output_error: seen.filter(|_| down).map(|s| output_error(pool, s, dense, &new, inputs)),
        }
    }

    /// The biases of gate and up in the new order.
    pub(super) fn biases(&self, block: &Block, order: &Order) -> Vec<Finished> {
        let norms = &self.norms;
        let spec = with_width(&self.model.spec, order.all.len());
        let homes = homes(norms.names, norms.prefix, &spec, self.layer);
        let bias = |home: &Home| {
            let name = format!("{}.bias", home.tensor.strip_suffix(".weight")?);
            let stored = norms.source.tensors.get(&name)?;
            let mut all = vec![0.0; home.outputs];
            for (proj, rows) in home.parts.iter().filter(|p| matches!(p.0, Proj::Gate | Proj::Up)) {
                let old = block.linear(*proj)?.bias.as_ref()?;
                rows.iter().zip(order.rows(old, 1)).for_each(|(r, b)| all[*r] = b);
            }
            let has = home.parts.iter().any(|p| matches!(p.0, Proj::Gate | Proj::Up));
            let (dtype, shape) = (Dtype::of(stored.format)?, vec![all.len() as u64]);
            has.then(|| Finished { name, dtype, shape, data: numbers(stored.format, &all) })
        };
        homes.iter().filter_map(bias).collect()
    }
}

/// The old numbers of neurons in their new order: those that stay, then (unless the output is narrower) the others.
pub(super) struct Order {
    all: Vec<usize>,
    live: usize,
}

impl Order {
    /// All neurons, in another order.
    pub fn of(all: Vec<usize>) -> Self {
        Self { live: all.len(), all }
    }

    fn new(kept: &[bool], narrow: bool) -> Self {
        let of = |which: bool| (0..kept.len()).filter(move |j| kept[*j] == which);
        let mut all: Vec<usize> = of(true).collect();
        let live = all.len();
        if !narrow {
            all.extend(of(false));
        }
        Self { all, live }
    }

    /// Rows of `width` numbers in the new order, zeros for dropped ones.
    pub fn rows(&self, old: &[f32], width: usize) -> Vec<f32> {
        let row = |(i, j): (usize, &usize)| {
            old[j * width..][..width].iter().map(move |w| if i < self.live { *w } else { 0.0 })
        };
        self.all.iter().enumerate().flat_map(row).collect()
    }

    /// Columns in the new order; those of dropped neurons are zero already.
    pub fn columns(&self, old: &[f32], inner: usize) -> Vec<f32> {
        old.chunks_exact(inner).flat_map(|row| self.all.iter().map(|j| row[*j])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_stay_come_first() {
        let kept = [false, true, true, false];
        let order = Order::new(&kept, false);
        assert_eq!(order.all, [1, 2, 0, 3]);
        let rows: Vec<f32> = (0..8).map(|i| i as f32).collect();
        assert_eq!(order.rows(&rows, 2), [2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(order.columns(&[0.0, 1.0, 2.0, 0.0], 4), [1.0, 2.0, 0.0, 0.0]);
        let narrow = Order::new(&kept, true);
        assert_eq!(narrow.rows(&rows, 2), [2.0, 3.0, 4.0, 5.0]);
        assert_eq!(narrow.columns(&[0.0, 1.0, 2.0, 0.0], 4), [1.0, 2.0]);
    }
}
