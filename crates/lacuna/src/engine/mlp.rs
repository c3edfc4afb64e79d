//! The MLP of a block: gated or plain, dense or over the neurons that a plan keeps.

use super::{
    forward::{Forward, Mode, Workspace, project, show, sized, sparsity},
    rows,
    sparse::Neurons,
};
use crate::model::{
    spec::{Act, BlockSpec},
    weights::{Gated, Linear, Mlp},
};
use lacuna_core::site::{Point, Proj};
use lacuna_kernels::elementwise::{self, Activation};

impl Forward<'_> {
    /// From the normalised `h` to `y`.
    pub(super) fn mlp(&mut self, layer: usize, block: &BlockSpec, mlp: &Mlp, n: usize) {
        let width = self.shared.model.spec.width;
        let proj_inputs: &[Proj] = match mlp {
            Mlp::Plain { .. } => &[Proj::Up],
            _ => &[Proj::Gate, Proj::Up],
        };
        for &proj in proj_inputs {
            show(self.observer, Point::Input { layer, proj }, width, &self.ws.h);
        }
        let act = activation(block.act);
        match mlp {
            Mlp::Gated(gated) => match self.shared.neuron_rule(layer).filter(|_| self.mode == Mode::Decode) {
                Some(_) => self.gated_neurons(layer, act, gated, n),
                None => self.gated(layer, act, gated, n),
            },
            Mlp::Plain { up, down } => self.plain(layer, act, up, down, n),
            Mlp::Experts { router, experts } => {
                let router = self.shared.routers[layer].as_ref().unwrap_or(router);
                self.experts(block, router, experts, act, n);
            }
        }
    }

    fn gated(&mut self, layer: usize, act: Activation, w: &Gated, n: usize) {
        let (shared, mode) = (self.shared, self.mode);
        let inner = w.gate.weight.outputs();
        let Workspace { h, gate, up, linears, .. } = &mut *self.ws;
        let parts = [(Proj::Gate, &w.gate, sized(gate, n * inner)), (Proj::Up, &w.up, sized(up, n * inner))];
        project(mode, shared, linears, (layer, &mut *self.counters), h, n, parts);
        self.gate_times_up(layer, act, inner);
        show(self.observer, Point::Input { layer, proj: Proj::Down }, inner, &self.ws.up);
        self.down(layer, &w.down, n);
    }

    /// `up = act(gate) * up`.
    fn gate_times_up(&mut self, layer: usize, act: Activation, inner: usize) {
        let pool = &self.shared.pool;
        let neurons = Point::Neurons { layer };
        let watched = self.observer.wants(neurons);
        let Workspace { gate, up, .. } = &mut *self.ws;
        if watched {
            rows::each(pool, gate, inner, |_, row| elementwise::act(act, row));
            show(self.observer, neurons, inner, gate);
            rows::each(pool, up, inner, |i, row| {
                row.iter_mut().zip(&gate[i * inner..]).for_each(|(u, g)| *u *= g);
            });
        } else {
            gate_rows(pool, act, gate, up, inner);
        }
    }

    fn plain(&mut self, layer: usize, act: Activation, up_w: &Linear, down_w: &Linear, n: usize) {
        let (shared, mode) = (self.shared, self.mode);
        let inner = up_w.weight.outputs();
        let Workspace { h, up, linears, .. } = &mut *self.ws;
        let parts = [(Proj::Up, up_w, sized(up, n * inner))];
        project(mode, shared, linears, (layer, &mut *self.counters), h, n, parts);
        rows::each(&shared.pool, &mut self.ws.up, inner, |_, row| elementwise::act(act, row));
        show(self.observer, Point::Neurons { layer }, inner, &self.ws.up);
        show(self.observer, Point::Input { layer, proj: Proj::Down }, inner, &self.ws.up);
        self.down(layer, down_w, n);
    }

    /// `y = down(up)`.
    fn down(&mut self, layer: usize, down: &Linear, n: usize) {
        let (shared, mode) = (self.shared, self.mode);
        let Workspace { up, y, linears, .. } = &mut *self.ws;
        let parts = [(Proj::Down, down, sized(y, n * shared.model.spec.width))];
        project(mode, shared, linears, (layer, &mut *self.counters), up, n, parts);
    }

    /// Gate first, then the rows of up and the columns of down that belong to the kept neurons.
    fn gated_neurons(&mut self, layer: usize, act: Activation, w: &Gated, n: usize) {
        let shared = self.shared;
        let Some(rule) = shared.neuron_rule(layer) else { return };
        let (inner, width) = (w.gate.weight.outputs(), shared.model.spec.width);
        let Workspace { h, gate, up, y, linears, .. } = &mut *self.ws;
        let parts = [(Proj::Gate, &w.gate, sized(gate, n * inner))];
        project(Mode::Decode, shared, linears, (layer, &mut *self.counters), h, n, parts);
        rows::each(&shared.pool, gate, inner, |_, row| elementwise::act(act, row));
        show(self.observer, Point::Neurons { layer }, inner, gate);
        let mut selection = std::mem::take(&mut linears.selections[0]);
        let neurons = Neurons { rule, up: &w.up, down_bias: w.down.bias.as_deref() };
        let results = sized(y, n * width).chunks_exact_mut(width);
        for ((gate, h), y) in gate.chunks_exact(inner).zip(h.chunks_exact(width)).zip(results) {
            let x = linears.operand(h, std::iter::once(&w.up.weight));
            let bytes = neurons.run(&shared.pool, gate, x, &mut selection, up, y);
            let s = sparsity(shared, layer, self.counters);
            s.counts.neurons.add(selection.index.len(), inner);
            *s.bytes += bytes;
        }
        linears.selections[0] = selection;
    }
}

/// `up = act(gate) * up`, row by row.
pub(super) fn gate_rows(pool: &lacuna_kernels::Pool, act: Activation, gate: &mut [f32], up: &mut [f32], inner: usize) {
    rows::pairs(pool, gate, up, inner, |gate, up| {
        elementwise::act(act, gate);
        up.iter_mut().zip(gate.iter()).for_each(|(u, g)| *u *= g);
    });
}

/// The kernel's name of a non-linearity.
fn activation(act: Act) -> Activation {
    match act {
        Act::Silu => Activation::Silu,
        Act::Gelu => Activation::Gelu,
        Act::GeluTanh => Activation::GeluTanh,
        Act::QuickGelu => Activation::QuickGelu,
        Act::Relu => Activation::Relu,
        Act::Relu2 => Activation::Relu2,
    }
}
