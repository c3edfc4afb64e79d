//! The neurons of an MLP in another order: rows of gate and up with their biases, columns of down. What the block computes stays
//! the same, sums of down in another order.

use super::{
    block::{Task, decoded},
    neurons::Order,
    store::Finished,
    tensors::numbers,
};
use crate::model::weights::{Block, Linear, Mlp};
use lacuna_core::{
    compress::Neurons,
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Format, Pool};

impl Task<'_> {
    /// The block in the order that a step wants, and the biases that were moved. The block as it is where none does, or where
    /// its MLP cannot be moved number by number (experts, blocks of codes, predictors of neurons).
    pub(super) fn ordered(&self, pool: &Pool) -> (Block, Vec<Finished>) {
        let mut block = self.model.blocks[self.layer].clone();
        let Some(order) = self.order(&block, pool) else { return (block, Vec::new()) };
        let order = Order::of(order);
        let biases = self.biases(&block, &order);
        permute(&mut block, &order);
        (block, biases)
    }

    fn order(&self, block: &Block, pool: &Pool) -> Option<Vec<usize>> {
        let (up, down) = (block.linear(Proj::Up)?, block.linear(Proj::Down)?);
        let gate = block.linear(Proj::Gate);
        let movable = |l: &Linear| {
            let plain = matches!(l.weight.format(), Format::F32 | Format::F16 | Format::Bf16);
            plain && l.weight.orientation() == Orientation::OutputMajor
        };
        let all_move = [Some(up), Some(down), gate].into_iter().flatten().all(movable);
        if !all_move || block.predictor.is_some() || matches!(block.mlp, Mlp::Experts { .. }) {
            return None;
        }
        let compressors = self.steps.iter().filter_map(|s| Some((s, s.method.compressor()?)));
        let [of_up, of_down] = [up, down].map(|l| decoded(&l.weight));
        let of_gate = gate.map(|l| decoded(&l.weight));
        let (width, inner) = (up.weight.inputs(), up.weight.outputs());
        let place = format!("layers.{}.mlp", self.layer);
        let mlp = Neurons {
            place: &place,
            width,
            inner,
            gate: of_gate.as_deref(),
            up: &of_up,
            down: &of_down,
            seen: None,
            keep: inner,
            pool,
        };
        let order = compressors.into_iter().find_map(|(s, c)| c.order(&s.params, &mlp))?;
        // Every neuron once, whatever a method says.
        let mut sorted = order.clone();
        sorted.sort_unstable();
        sorted.into_iter().eq(0..inner).then_some(order)
    }
}

/// Puts the neurons of `block` into `order`.
fn permute(block: &mut Block, order: &Order) {
    for proj in [Proj::Gate, Proj::Up, Proj::Down] {
        let Some(linear) = block.linear_mut(proj) else { continue };
        let (outputs, inputs, format) = (linear.weight.outputs(), linear.weight.inputs(), linear.weight.format());
        let all = decoded(&linear.weight);
        let all = if proj == Proj::Down { order.columns(&all, inputs) } else { order.rows(&all, inputs) };
        let bytes = numbers(format, &all).into();
        linear.weight =
            Weight::new(format, Orientation::OutputMajor, outputs, inputs, bytes).expect("as many numbers as before");
        if let Some(bias) = linear.bias.as_mut().filter(|_| proj != Proj::Down) {
            *bias = order.rows(bias, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compress::tests::fixture,
        model::{LoadOptions, load},
    };

    /// `down (relu(gate x + b) * (up x + c))` over whole numbers, which have no rounding.
    fn mlp(block: &Block, x: &[i64]) -> Vec<i64> {
        let product = |l: &Linear, x: &[i64]| -> Vec<i64> {
            let rows = decoded(&l.weight).chunks_exact(x.len()).map(<[f32]>::to_vec).collect::<Vec<_>>();
            let bias = |i: usize| l.bias.as_ref().map_or(0, |b| b[i] as i64);
            let dot = |(i, r): (usize, &Vec<f32>)| r.iter().zip(x).map(|(w, x)| *w as i64 * x).sum::<i64>() + bias(i);
            rows.iter().enumerate().map(dot).collect()
        };
        let up = product(block.linear(Proj::Up).unwrap(), x);
        let inner: Vec<i64> = match block.linear(Proj::Gate) {
            Some(gate) => product(gate, x).iter().zip(&up).map(|(g, u)| g.max(&0) * u).collect(),
            None => up.iter().map(|u| *u.max(&0)).collect(),
        };
        product(block.linear(Proj::Down).unwrap(), &inner)
    }

    #[test]
    fn another_order_changes_nothing() {
        for name in ["llama2", "opt"] {
            let model = load(&fixture(name), &LoadOptions::default()).unwrap();
            let mut block = model.blocks[0].clone();
            for proj in [Proj::Gate, Proj::Up, Proj::Down] {
                let Some(linear) = block.linear_mut(proj) else { continue };
                let w = &linear.weight;
                let whole: Vec<f32> =
                    decoded(w).iter().enumerate().map(|(i, w)| (w * 900.0).round() + (i % 5) as f32).collect();
                let bytes = numbers(Format::F32, &whole).into();
                linear.weight =
                    Weight::new(Format::F32, Orientation::OutputMajor, w.outputs(), w.inputs(), bytes).unwrap();
                linear.bias.iter_mut().flatten().enumerate().for_each(|(i, b)| *b = (i % 7) as f32 - 3.0);
            }
            let inner = block.linear(Proj::Up).unwrap().weight.outputs();
            let order = Order::of((0..inner).map(|i| (i + 5) % inner).rev().collect());
            let mut moved = block.clone();
            permute(&mut moved, &order);
            assert_ne!(
                decoded(&moved.linear(Proj::Up).unwrap().weight),
                decoded(&block.linear(Proj::Up).unwrap().weight)
            );
            let x: Vec<i64> = (0..model.spec.width as i64).map(|i| i * 13 % 17 - 8).collect();
            assert_eq!(mlp(&moved, &x), mlp(&block, &x), "{name}");
        }
    }
}
