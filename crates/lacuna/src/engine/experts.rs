//! Mixtures of experts: decode runs the active experts of its token only; prefill gathers the tokens of each expert.

use super::{
    forward::{Forward, Mode, Workspace, sized},
    mlp::gate_rows,
};
use crate::model::{
    spec::{BlockSpec, MlpSpec},
    weights::{Gated, Linear},
};
use lacuna_kernels::elementwise::{self, Activation};

/// Buffers of a mixture.
#[derive(Default)]
pub(super) struct ExpertBuffers {
    /// Router scores, one row per token.
    scores: Vec<f32>,
    /// Which experts each token uses, by expert: `(expert, token, share)`.
    routes: Vec<Route>,
    /// Inputs of one expert's tokens.
    gathered: Vec<f32>,
    /// Results, before they are weighted.
    results: Vec<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Route {
    expert: usize,
    token: usize,
    share: f32,
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

impl Forward<'_> {
    /// From the normalised `h` to `y`.
    pub(super) fn experts(&mut self, block: &BlockSpec, router: &Linear, experts: &[Gated], act: Activation, n: usize) {
        let MlpSpec::Experts { active, normalise, .. } = block.mlp else {
            unreachable!("loading pairs experts with their specification")
        };
        let pool = &self.shared.pool;
        let Workspace { h, linears, experts: buffers, .. } = &mut *self.ws;
        let scores = sized(&mut buffers.scores, n * experts.len());
        match self.mode {
            Mode::Decode | Mode::Dense => linears.dense(pool, h, n, &mut [(router, &mut *scores)]),
            Mode::Prefill | Mode::Masked => linears.prefill(pool, h, n, &mut [(router, &mut *scores)]),
        }
        route(scores, experts.len(), active, normalise, &mut buffers.routes);
        sized(&mut self.ws.y, n * self.shared.model.spec.width).fill(0.0);
        match self.mode {
            Mode::Decode | Mode::Dense => {
                self.counters.weight_bytes += router.weight.bytes().len() as u64;
                self.decode_experts(experts, act, n);
            }
            Mode::Prefill | Mode::Masked => self.prefill_experts(experts, act),
        }
    }

    fn decode_experts(&mut self, experts: &[Gated], act: Activation, n: usize) {
        let pool = &self.shared.pool;
        let width = self.shared.model.spec.width;
        let Workspace { h, y, gate, up, linears, experts: buffers, .. } = &mut *self.ws;
        let routes = &buffers.routes;
        let inner = experts[0].gate.weight.outputs();
        let (gate, up) = (sized(gate, routes.len() * inner), sized(up, routes.len() * inner));
        let mut parts: Vec<(&Linear, Vec<usize>, &mut [f32])> = Vec::with_capacity(2 * routes.len());
        let (mut gates, mut ups) = (&mut *gate, &mut *up);
        for group in routes.chunk_by(|a, b| a.expert == b.expert) {
            let (w, tokens) = (&experts[group[0].expert], group.iter().map(|r| r.token));
            let gate = gates.split_off_mut(..group.len() * inner).unwrap_or_default();
            let up = ups.split_off_mut(..group.len() * inner).unwrap_or_default();
            parts.push((&w.gate, tokens.clone().collect(), gate));
            parts.push((&w.up, tokens.collect(), up));
            let bytes = [&w.gate, &w.up, &w.down].map(|l| l.weight.bytes().len() as u64);
            self.counters.weight_bytes += bytes.iter().sum::<u64>();
        }
        linears.chosen(pool, h, n, &mut parts);
        gate_rows(pool, act, gate, up, inner);
        let mut results = sized(&mut buffers.results, routes.len() * width);
        let (mut parts, mut first) = (Vec::with_capacity(routes.len()), 0);
        for group in routes.chunk_by(|a, b| a.expert == b.expert) {
            let out = results.split_off_mut(..group.len() * width).unwrap_or_default();
            parts.push((&experts[group[0].expert].down, (first..first + group.len()).collect(), out));
            first += group.len();
        }
        linears.chosen(pool, up, routes.len(), &mut parts);
        // Ascending experts for every token, as when it is alone.
        for (r, result) in routes.iter().zip(buffers.results.chunks_exact(width)) {
            let y = &mut y[r.token * width..(r.token + 1) * width];
            y.iter_mut().zip(result).for_each(|(y, v)| *y += r.share * v);
        }
    }

    fn prefill_experts(&mut self, experts: &[Gated], act: Activation) {
        let pool = &self.shared.pool;
        let width = self.shared.model.spec.width;
        let Workspace { h, y, gate, up, linears, experts: buffers, .. } = &mut *self.ws;
        let ExpertBuffers { routes, gathered, results, .. } = buffers;
        for group in routes.chunk_by(|a, b| a.expert == b.expert) {
            let (w, n) = (&experts[group[0].expert], group.len());
            let inner = w.gate.weight.outputs();
            gathered.clear();
            group.iter().for_each(|r| gathered.extend_from_slice(&h[r.token * width..(r.token + 1) * width]));
            let (gate, up) = (sized(gate, n * inner), sized(up, n * inner));
            linears.prefill(pool, gathered, n, &mut [(&w.gate, &mut *gate), (&w.up, &mut *up)]);
            gate_rows(pool, act, gate, up, inner);
            let results = sized(results, n * width);
            linears.prefill(pool, up, n, &mut [(&w.down, &mut *results)]);
            for (r, result) in group.iter().zip(results.chunks_exact(width)) {
                let y = &mut y[r.token * width..(r.token + 1) * width];
                y.iter_mut().zip(result).for_each(|(y, v)| *y += r.share * v);
            }
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
