//! Mixtures of experts: decode runs the active experts of its token only, and of these the neurons that a plan keeps;
//! prefill gathers the tokens of each expert.

use super::{
    compiled::NeuronRule,
    forward::{Forward, Mode, Nobody, Workspace, layer_plan, show, sized},
    gated_bytes, masked,
    mlp::{Acts, gate_times_up},
    rows,
    sparse::Neurons,
};
use crate::model::{
    spec::{BlockSpec, MlpSpec},
    weights::{Gated, Linear},
};
use lacuna_core::site::Point;
use lacuna_kernels::elementwise;

/// Buffers of a mixture.
#[derive(Default)]
pub(super) struct ExpertBuffers {
    /// Router scores, one row per token.
    pub scores: Vec<f32>,
    /// Which experts each token uses, by expert: `(expert, token, share)`.
    pub routes: Vec<Route>,
    /// Inputs of one expert's tokens.
    pub gathered: Vec<f32>,
    /// Results, before they are weighted.
    pub results: Vec<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Route {
    pub expert: usize,
    pub token: usize,
    pub share: f32,
}

impl Route {
    /// Adds its share of `result` to its token's row of `y`.
    pub fn add(&self, result: &[f32], y: &mut [f32]) {
        let y = &mut y[self.token * result.len()..(self.token + 1) * result.len()];
        y.iter_mut().zip(result).for_each(|(y, v)| *y += self.share * v);
    }
}

/// The experts of every token with their shares, sorted by expert, then token: the largest of `softmax(scores)`, the
/// lower number on ties. The order fixes the order of summation, whatever else is in the batch.
fn route(scores: &mut [f32], experts: usize, active: usize, normalise: bool, routes: &mut Vec<Route>) {
    routes.clear();
    let mut order: Vec<usize> = Vec::with_capacity(experts);
    for (token, row) in scores.chunks_exact_mut(experts).enumerate() {
        elementwise::softmax(row);
        order.clear();
        order.extend(0..experts);
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        order.truncate(active);
        let sum: f32 = if normalise { order.iter().map(|&e| row[e]).sum() } else { 1.0 };
        routes.extend(order.iter().map(|&expert| Route { expert, token, share: row[expert] / sum }));
    }
    routes.sort_by_key(|r| (r.expert, r.token));
}

/// The mixture of one layer.
pub(super) struct Mixture<'a> {
    pub layer: usize,
    pub act: Acts,
    pub router: &'a Linear,
    pub experts: &'a [Gated],
}

impl Forward<'_> {
    /// From the normalised `h` to `y`.
    pub(super) fn experts(&mut self, block: &BlockSpec, w: &Mixture<'_>, n: usize) {
        let MlpSpec::Experts { active, normalise, .. } = block.mlp else {
            unreachable!("loading pairs experts with their specification")
        };
        let pool = &self.shared.pool;
        let Workspace { h, linears, experts: buffers, .. } = &mut *self.ws;
        let scores = sized(&mut buffers.scores, n * w.experts.len());
        let router_bytes = w.router.weight.bytes().len() as u64;
        match self.mode {
            Mode::Decode | Mode::Dense => {
                linears.dense(pool, h, n, &mut [(w.router, &mut *scores)]);
                self.counters.weight_bytes += router_bytes;
            }
            Mode::Prefill | Mode::Masked => {
                linears.prefill(pool, h, n, &mut [(w.router, &mut *scores)]);
                self.counters.weight_bytes += if self.mode == Mode::Masked { n as u64 * router_bytes } else { 0 };
            }
        }
        route(scores, w.experts.len(), active, normalise, &mut buffers.routes);
        if self.observer.wants(Point::Experts { layer: w.layer }) {
            let mut shares = vec![0.0; n * w.experts.len()];
            buffers.routes.iter().for_each(|r| shares[r.token * w.experts.len() + r.expert] = r.share);
            self.observer.observe(Point::Experts { layer: w.layer }, w.experts.len(), &shares);
        }
        sized(&mut self.ws.y, n * self.shared.model.spec.width).fill(0.0);
        let rules = layer_plan(self.plan, w.layer).map_or(&[][..], |p| &p.experts);
        match self.mode {
            Mode::Decode if rules.first().is_some_and(NeuronRule::by_channels) => self.chosen_neurons_of(w, rules, n),
            Mode::Decode if !rules.is_empty() => self.gathered_experts(w, rules),
            Mode::Decode | Mode::Dense => self.decode_experts(w, n),
            Mode::Prefill => self.gathered_experts(w, &[]),
            Mode::Masked => self.gathered_experts(w, rules),
        }
    }

    fn decode_experts(&mut self, w: &Mixture<'_>, n: usize) {
        let pool = &self.shared.pool;
        let width = self.shared.model.spec.width;
        let Workspace { h, y, gate, up, linears, experts: buffers, .. } = &mut *self.ws;
        let routes = &buffers.routes;
        let inner = w.experts[0].gate.weight.outputs();
        let (gate, up) = (sized(gate, routes.len() * inner), sized(up, routes.len() * inner));
        let mut parts: Vec<(&Linear, Vec<usize>, &mut [f32])> = Vec::with_capacity(2 * routes.len());
        let (mut gates, mut ups) = (&mut *gate, &mut *up);
        for group in routes.chunk_by(|a, b| a.expert == b.expert) {
            let (e, tokens) = (&w.experts[group[0].expert], group.iter().map(|r| r.token));
            let gate = gates.split_off_mut(..group.len() * inner).unwrap_or_default();
            let up = ups.split_off_mut(..group.len() * inner).unwrap_or_default();
            parts.push((&e.gate, tokens.clone().collect(), gate));
            parts.push((&e.up, tokens.collect(), up));
            self.counters.weight_bytes += gated_bytes(e);
        }
        linears.chosen(pool, h, n, &mut parts);
        w.act.activate_up(pool, up, inner);
        gate_times_up(pool, self.observer, (w.layer, w.act.gate), gate, up, inner);
        let mut results = sized(&mut buffers.results, routes.len() * width);
        let (mut parts, mut first) = (Vec::with_capacity(routes.len()), 0);
        for group in routes.chunk_by(|a, b| a.expert == b.expert) {
            let out = results.split_off_mut(..group.len() * width).unwrap_or_default();
            parts.push((&w.experts[group[0].expert].down, (first..first + group.len()).collect(), out));
            first += group.len();
        }
        linears.chosen(pool, up, routes.len(), &mut parts);
        // Ascending experts for every token, as when it is alone.
        routes.iter().zip(buffers.results.chunks_exact(width)).for_each(|(r, result)| r.add(result, y));
    }

    /// Decode over the neurons that the rules keep: the gates of all tokens' experts in one region, then route by route.
    fn chosen_neurons_of(&mut self, w: &Mixture<'_>, rules: &[NeuronRule], n: usize) {
        let (pool, layer) = (&self.shared.pool, w.layer);
        let width = self.shared.model.spec.width;
        let Workspace { h, y, gate, up, linears, experts: buffers, .. } = &mut *self.ws;
        let (routes, inner) = (&buffers.routes, w.experts[0].gate.weight.outputs());
        let gate = sized(gate, routes.len() * inner);
        if rules[0].reads_gate() {
            let (mut parts, mut gates) = (Vec::with_capacity(routes.len()), &mut *gate);
            for group in routes.chunk_by(|a, b| a.expert == b.expert) {
                let (linear, tokens) = (&w.experts[group[0].expert].gate, group.iter().map(|r| r.token));
                let gate = gates.split_off_mut(..group.len() * inner).unwrap_or_default();
                parts.push((linear, tokens.collect(), gate));
                self.counters.weight_bytes += linear.weight.bytes().len() as u64;
            }
            linears.chosen(pool, h, n, &mut parts);
        }
        let result = sized(&mut buffers.results, width);
        let mut seen = Vec::new();
        let watched = self.observer.wants(Point::Neurons { layer });
        let mut watch = |gate: &[f32]| seen.extend_from_slice(if watched { gate } else { &[] });
        for (r, gate) in routes.iter().zip(gate.chunks_exact_mut(inner)) {
            let e = &w.experts[r.expert];
            let (rule, down_bias) = (&rules[r.expert], e.down.bias.as_deref());
            let neurons = Neurons { rule, act: w.act, first: &e.gate, second: Some(&e.up), down_bias, prompt: &[] };
            let x = &h[r.token * width..(r.token + 1) * width];
            let used = neurons.run(pool, linears, x, (gate, up), result, &mut watch);
            r.add(result, y);
            self.counters.layers[layer].neurons.add(used.kept, inner);
            self.counters.weight_bytes += used.bytes;
        }
        if !seen.is_empty() {
            show(self.observer, Point::Neurons { layer }, inner, &seen);
        }
    }

    /// Expert by expert over all of its tokens, through matrix products; with rules, each token over its own neurons.
    fn gathered_experts(&mut self, w: &Mixture<'_>, rules: &[NeuronRule]) {
        let (pool, layer) = (&self.shared.pool, w.layer);
        let width = self.shared.model.spec.width;
        let Workspace { h, y, gate, up, linears, experts: buffers, .. } = &mut *self.ws;
        let ExpertBuffers { routes, gathered, results, .. } = buffers;
        let mut seen = Vec::new();
        let watched = self.observer.wants(Point::Neurons { layer });
        for group in routes.chunk_by(|a, b| a.expert == b.expert) {
            let (e, n) = (&w.experts[group[0].expert], group.len());
            let inner = e.gate.weight.outputs();
            gathered.clear();
            group.iter().for_each(|r| gathered.extend_from_slice(&h[r.token * width..(r.token + 1) * width]));
            let (gate, up) = (sized(gate, n * inner), sized(up, n * inner));
            linears.prefill(pool, gathered, n, &mut [(&e.gate, &mut *gate), (&e.up, &mut *up)]);
            w.act.activate_up(pool, up, inner);
            if let Some(rule) = rules.get(group[0].expert) {
                let kept = masked::neurons(pool, linears, rule, (w.act.gate, &[]), (gathered, n), gate);
                rows::pairs(pool, gate, up, inner, |gate, up| up.iter_mut().zip(gate).for_each(|(u, g)| *u *= *g));
                let reach = masked::products(pool, rule, kept, up, inner);
                self.counters.layers[layer].neurons.add(kept.channels as usize, n * inner);
                let read = n * e.gate.weight.bytes().len();
                let rows = kept.channels * e.up.weight.matrix().row_bytes() as u64 + rule.reads.bytes(reach);
                self.counters.weight_bytes += read as u64 + rows;
            } else {
                gate_times_up(pool, &mut Nobody, (layer, w.act.gate), gate, up, inner);
                seen.extend_from_slice(if watched { gate } else { &[] });
                self.counters.weight_bytes += if self.mode == Mode::Masked { n as u64 * gated_bytes(e) } else { 0 };
            }
            let results = sized(results, n * width);
            linears.prefill(pool, up, n, &mut [(&e.down, &mut *results)]);
            group.iter().zip(results.chunks_exact(width)).for_each(|(r, result)| r.add(result, y));
        }
        if !seen.is_empty() {
            show(self.observer, Point::Neurons { layer }, w.experts[0].gate.weight.outputs(), &seen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_scores_win_and_ties_go_to_the_lower_number() {
        let mut routes = Vec::new();
        let ln = |p: f32| p.ln();
        let mut scores = [ln(0.1), ln(0.5), ln(0.1), ln(0.3), 0.0, 0.0, 0.0, 0.0];
        route(&mut scores, 4, 2, true, &mut routes);
        let found: Vec<_> = routes.iter().map(|r| (r.expert, r.token)).collect();
        assert_eq!(found, [(0, 1), (1, 0), (1, 1), (3, 0)]);
        for (r, want) in routes.iter().zip([0.5, 0.625, 0.5, 0.375]) {
            assert!((r.share - want).abs() < 1e-6, "{r:?}");
        }
    }
}
