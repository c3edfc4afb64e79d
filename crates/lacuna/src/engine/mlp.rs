//! The MLP of a block: gated or plain, dense or over the neurons that a plan keeps.

use super::{
    compiled::{Counters, NeuronRule},
    experts::Mixture,
    forward::{Forward, Mode, Site, Workspace, layer_plan, project, show, sized, sparsity},
    masked, prompt,
    relu_experts::Rectified,
    rows,
    sparse::Neurons,
    sparse_rows,
};
use crate::model::{
    spec::BlockSpec,
    weights::{Linear, Mlp},
};
use lacuna_core::{
    observer::Observer,
    site::{Point, Proj},
};
use lacuna_kernels::{
    Pool,
    elementwise::{self, Activation},
};

impl Forward<'_> {
    /// From the normalised `h` to `y`; false if the observer ends the pass before.
    pub(super) fn mlp(&mut self, layer: usize, block: &BlockSpec, mlp: &Mlp, n: usize) -> bool {
        let width = self.shared.model.spec.width;
        let proj_inputs: &[Proj] = match mlp {
            Mlp::Plain { .. } | Mlp::ReluExperts { .. } => &[Proj::Up],
            _ => &[Proj::Gate, Proj::Up],
        };
        for &proj in proj_inputs {
            show(self.observer, Point::Input { layer, proj }, width, &self.ws.h);
            if self.observer.ends(Point::Input { layer, proj }) {
                return false;
            }
        }
        let act = Acts { gate: block.act, up: block.up_act };
        let (first, second, down) = match mlp {
            Mlp::Gated(g) => (&g.gate, Some(&g.up), &g.down),
            Mlp::Plain { up, down } => (up, None, down),
            Mlp::Experts { router, experts } => {
                let router = self.shared.routers[layer].as_ref().unwrap_or(router);
                self.experts(block, &Mixture { layer, act, router, experts }, n);
                return true;
            }
            Mlp::ReluExperts { router, gain, experts } => {
                let router = self.shared.routers[layer].as_ref().unwrap_or(router);
                let w = Rectified { layer, act: block.act, router, gain: gain.as_deref(), experts };
                self.relu_experts(block, &w, n);
                return true;
            }
        };
        let layers = Layers { layer, act, first, second, down };
        match masked::neuron_rule(layer_plan(self.plan, layer)) {
            Some(rule) if self.mode == Mode::Decode && rule.by_channels() => self.chosen_neurons(&layers, rule, n),
            Some(rule) if matches!(self.mode, Mode::Decode | Mode::Masked) => self.masked_neurons(&layers, rule, n),
            _ => return self.all_neurons(&layers, n),
        }
        true
    }

    fn all_neurons(&mut self, w: &Layers<'_>, n: usize) -> bool {
        let inner = w.first.weight.outputs();
        let place =
            Site { plan: layer_plan(self.plan, w.layer), pool: &self.shared.pool, mode: self.mode, layer: w.layer };
        let Workspace { h, gate, up, linears, .. } = &mut *self.ws;
        match w.second {
            Some(second) => {
                let (gate, up) = (sized(gate, n * inner), sized(up, n * inner));
                let parts = [(Proj::Gate, w.first, &mut *gate), (Proj::Up, second, &mut *up)];
                project(&place, linears, self.counters, (h, n), parts);
                w.act.activate_up(&self.shared.pool, up, inner);
                show(self.observer, Point::Up { layer: w.layer }, inner, up);
                gate_times_up(&self.shared.pool, self.observer, (w.layer, w.act.gate), gate, up, inner);
            }
            None => {
                project(&place, linears, self.counters, (h, n), [(Proj::Up, w.first, sized(up, n * inner))]);
                rows::each(&self.shared.pool, up, inner, |_, row| elementwise::act(w.act.gate, row));
                show(self.observer, Point::Neurons { layer: w.layer }, inner, up);
            }
        }
        let point = Point::Input { layer: w.layer, proj: Proj::Down };
        show(self.observer, point, inner, &self.ws.up);
        if self.observer.ends(point) {
            return false;
        }
        self.remember_prompt(w.layer, inner);
        self.down(w.layer, w.down, n);
        true
    }

    /// `y = down(up)`.
    fn down(&mut self, layer: usize, down: &Linear, n: usize) {
        let shared = self.shared;
        let place = Site { mode: self.mode, pool: &shared.pool, layer, plan: layer_plan(self.plan, layer) };
        let Workspace { up, y, linears, .. } = &mut *self.ws;
        let parts = [(Proj::Down, down, sized(y, n * shared.model.spec.width))];
        project(&place, linears, self.counters, (up, n), parts);
    }

    /// In prefill, notes which neurons of a layer the prompt uses, where a rule follows it.
    fn remember_prompt(&mut self, layer: usize, inner: usize) {
        let rule = masked::neuron_rule(layer_plan(self.plan, layer));
        if let Some(rule) = rule.filter(|_| self.mode == Mode::Prefill) {
            let first = self.places.position(0) == 0;
            prompt::remember(&mut self.ws.prompt, layer, rule, first, &self.ws.up, inner);
        }
    }

    /// Decode over the kept neurons, row by row.
    fn chosen_neurons(&mut self, w: &Layers<'_>, rule: &NeuronRule, n: usize) {
        let inner = w.first.weight.outputs();
        let (shared, layer) = (self.shared, w.layer);
        let width = shared.model.spec.width;
        let place = Site { mode: Mode::Decode, pool: &shared.pool, layer, plan: layer_plan(self.plan, layer) };
        let Workspace { h, gate, up, y, linears, prompt, .. } = &mut *self.ws;
        let prompt = prompt::list(prompt, layer, rule, inner);
        let gate = sized(gate, n * inner);
        if rule.reads_gate() {
            let first = if w.second.is_some() { Proj::Gate } else { Proj::Up };
            project(&place, linears, self.counters, (h, n), [(first, w.first, &mut *gate)]);
        }
        let neurons =
            Neurons { rule, act: w.act, first: w.first, second: w.second, down_bias: w.down.bias.as_deref(), prompt };
        let observer = &mut *self.observer;
        let mut watch = |gate: &[f32]| show(observer, Point::Neurons { layer }, inner, gate);
        let y = sized(y, n * width);
        if n > 1 && rule.reads_gate() {
            let used = sparse_rows::neurons(&shared.pool, linears, &neurons, (h, gate), y, &mut watch);
            let s = sparsity(&place, self.counters);
            s.counts.neurons.add(used.kept, n * inner);
            *s.bytes += used.bytes;
            return;
        }
        let results = y.chunks_exact_mut(width);
        for ((gate, h), y) in gate.chunks_exact_mut(inner).zip(h.chunks_exact(width)).zip(results) {
            let used = neurons.run(&shared.pool, linears, h, (gate, up), y, &mut watch);
            let s = sparsity(&place, self.counters);
            s.counts.neurons.add(used.kept, inner);
            *s.bytes += used.bytes;
        }
    }

    /// Many tokens, each over its own kept neurons, through dense products.
    fn masked_neurons(&mut self, w: &Layers<'_>, rule: &NeuronRule, n: usize) {
        let inner = w.first.weight.outputs();
        let (pool, layer) = (&self.shared.pool, w.layer);
        let place = Site { mode: self.mode, pool, layer, plan: layer_plan(self.plan, layer) };
        let Workspace { h, gate, up, linears, prompt, .. } = &mut *self.ws;
        let prompt = prompt::list(prompt, layer, rule, inner);
        let gate = sized(gate, n * inner);
        let first = if w.second.is_some() { Proj::Gate } else { Proj::Up };
        let mut unseen = Counters::new(self.counters.layers.len());
        let by_gate = rule.reads_gate();
        let counters = if by_gate { &mut *self.counters } else { &mut unseen };
        project(&place, linears, counters, (h, n), [(first, w.first, &mut *gate)]);
        let kept = masked::neurons(pool, linears, rule, (w.act.gate, prompt), (h, n), gate);
        let up = sized(up, n * inner);
        let mut row_bytes = if by_gate { 0 } else { w.first.weight.matrix().row_bytes() };
        match w.second {
            Some(second) => {
                linears.prefill(pool, h, n, &mut [(second, &mut *up)]);
                w.act.activate_up(pool, up, inner);
                up.iter_mut().zip(gate.iter()).for_each(|(u, g)| *u *= g);
                row_bytes += second.weight.matrix().row_bytes();
            }
            None => up.copy_from_slice(gate),
        }
        let reach = masked::products(pool, rule, kept, up, inner);
        let y = sized(&mut self.ws.y, n * self.shared.model.spec.width);
        self.ws.linears.prefill(pool, &self.ws.up, n, &mut [(w.down, y)]);
        let s = sparsity(&place, self.counters);
        s.counts.neurons.add(kept.channels as usize, n * inner);
        *s.bytes += kept.channels * row_bytes as u64 + rule.reads.bytes(reach) + n as u64 * rule.predictor_bytes();
    }
}

/// The layers of an MLP without experts. `first` is the gate, or up in a plain MLP; `second` is up of a gated one.
struct Layers<'a> {
    layer: usize,
    act: Acts,
    first: &'a Linear,
    second: Option<&'a Linear>,
    down: &'a Linear,
}

/// The non-linearities of an MLP.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acts {
    /// Of the gate, or of up in a plain MLP.
    pub gate: Activation,
    /// Of up in a gated MLP, where it has one.
    pub up: Option<Activation>,
}

impl Acts {
    /// Applies that of up to rows of `inner` numbers.
    pub fn activate_up(self, pool: &Pool, up: &mut [f32], inner: usize) {
        if let Some(act) = self.up {
            rows::each(pool, up, inner, |_, row| elementwise::act(act, row));
        }
    }
}

/// `up = act(gate) * up`, row by row; the observer may see the activated gates.
pub(super) fn gate_times_up(
    pool: &Pool,
    observer: &mut dyn Observer,
    (layer, act): (usize, Activation),
    gate: &mut [f32],
    up: &mut [f32],
    inner: usize,
) {
    rows::pairs(pool, gate, up, inner, |gate, up| {
        elementwise::act(act, gate);
        up.iter_mut().zip(gate.iter()).for_each(|(u, g)| *u *= g);
    });
    show(observer, Point::Neurons { layer }, inner, gate);
}
