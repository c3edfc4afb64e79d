//! Many small experts without gates behind a router with a ReLU (BlockFFN): a token uses those with a positive score, and of the
//! others nothing is read or computed. Decode reads the union of what its rows use, each row computing its own; prefill gathers
//! the tokens of each expert, as for other mixtures.

use super::{
    experts::{ExpertBuffers, Route},
    forward::{Forward, Mode, Workspace, show, sized},
    rows,
};
use crate::model::{
    spec::{BlockSpec, MlpSpec, RouterScale},
    weights::{Linear, Ungated},
};
use lacuna_core::site::Point;
use lacuna_kernels::elementwise::{self, Activation};

/// The experts of one layer.
pub(super) struct Rectified<'a> {
    pub layer: usize,
    pub act: Activation,
    pub router: &'a Linear,
    pub gain: Option<&'a [f32]>,
    pub experts: &'a [Ungated],
}

/// The factor of every expert in a row of scores, 0 where the score is not positive; `used` gets the experts whose is.
fn scale_scores(g: &mut [f32], scale: RouterScale, gain: Option<&[f32]>, mut used: impl FnMut(usize, f32)) {
    g.iter_mut().for_each(|v| *v = v.max(0.0));
    let divisor = match scale {
        RouterScale::Plain => 1.0,
        RouterScale::Sum { factor } => factor * g.iter().sum::<f32>() + 1e-5,
        RouterScale::Rms { eps } => (g.iter().map(|v| v * v).sum::<f32>() / g.len() as f32 + eps).sqrt(),
    };
    for (e, v) in g.iter_mut().enumerate() {
        let positive = *v > 0.0;
        *v = *v / divisor * gain.map_or(1.0, |gain| gain[e]);
        if positive {
            used(e, *v);
        }
    }
}

impl Forward<'_> {
    /// From the normalised `h` to `y`.
    pub(super) fn relu_experts(&mut self, block: &BlockSpec, w: &Rectified<'_>, n: usize) {
        let MlpSpec::ReluExperts { scale, .. } = block.mlp else {
            unreachable!("loading pairs experts with their specification")
        };
        let (pool, count, passes) = (&self.shared.pool, w.experts.len(), self.passes(n));
        let Workspace { h, y, linears, experts: buffers, .. } = &mut *self.ws;
        let ExpertBuffers { scores, routes, .. } = buffers;
        let scores = sized(scores, n * count);
        let router_bytes = w.router.weight.bytes().len() as u64;
        if self.mode.is_chunk() {
            linears.prefill(pool, h, n, &mut [(w.router, &mut *scores)]);
        } else {
            linears.dense(pool, h, n, &mut [(w.router, &mut *scores)]);
        }
        self.counters.weight_bytes += router_bytes * passes;
        routes.clear();
        for (token, row) in scores.chunks_exact_mut(count).enumerate() {
            scale_scores(row, scale, w.gain, |expert, share| routes.push(Route { expert, token, share }));
        }
        show(self.observer, Point::Experts { layer: w.layer }, count, scores);
        routes.sort_by_key(|r| (r.expert, r.token));
        sized(y, n * self.shared.model.spec.width).fill(0.0);
        if self.mode != Mode::Prefill {
            self.counters.layers[w.layer].neurons.add(routes.len() * inner(w), n * count * inner(w));
        }
        if self.mode.is_chunk() {
            self.gathered_relu_experts(w);
        } else {
            self.listed_relu_experts(w, n);
        }
    }

    /// How often weights are counted as read by a pass over `n` tokens: decode reads them once for all of its rows, masked passes
    /// count what decode would have read for each, and prefill counts nothing.
    fn passes(&self, n: usize) -> u64 {
        match self.mode {
            Mode::Decode | Mode::Dense => 1,
            Mode::Masked => n as u64,
            Mode::Prefill => 0,
        }
    }

    /// Rows that do not depend on their company: the experts that any of them uses, in one region.
    fn listed_relu_experts(&mut self, w: &Rectified<'_>, n: usize) {
        let (pool, width, inner) = (&self.shared.pool, self.shared.model.spec.width, inner(w));
        let Workspace { h, y, up, linears, experts: buffers, .. } = &mut *self.ws;
        let ExpertBuffers { routes, results, .. } = buffers;
        if routes.is_empty() {
            return;
        }
        let up = sized(up, routes.len() * inner);
        let (mut parts, mut ups) = (Vec::new(), &mut *up);
        for group in routes.chunk_by(|a, b| a.expert == b.expert) {
            let e = &w.experts[group[0].expert];
            let out = ups.split_off_mut(..group.len() * inner).unwrap_or_default();
            parts.push((&e.up, group.iter().map(|r| r.token).collect(), out));
            self.counters.weight_bytes += bytes(e);
        }
        linears.chosen(pool, h, n, &mut parts);
        rows::each(pool, up, inner, |_, row| elementwise::act(w.act, row));
        let mut out = sized(results, routes.len() * width);
        let (mut parts, mut first) = (Vec::new(), 0);
        for group in routes.chunk_by(|a, b| a.expert == b.expert) {
            let results = out.split_off_mut(..group.len() * width).unwrap_or_default();
            parts.push((&w.experts[group[0].expert].down, (first..first + group.len()).collect(), results));
            first += group.len();
        }
        linears.chosen(pool, up, routes.len(), &mut parts);
        // Ascending experts for every token, as when it is alone.
        routes.iter().zip(results.chunks_exact(width)).for_each(|(r, result)| r.add(result, y));
    }

    /// Expert by expert over all tokens that use it, through matrix products.
    fn gathered_relu_experts(&mut self, w: &Rectified<'_>) {
        let (pool, width, inner) = (&self.shared.pool, self.shared.model.spec.width, inner(w));
        let Workspace { h, y, up, linears, experts: buffers, .. } = &mut *self.ws;
        let ExpertBuffers { routes, gathered, results, .. } = buffers;
        for group in routes.chunk_by(|a, b| a.expert == b.expert) {
            let (e, n) = (&w.experts[group[0].expert], group.len());
            gathered.clear();
            group.iter().for_each(|r| gathered.extend_from_slice(&h[r.token * width..(r.token + 1) * width]));
            let up = sized(up, n * inner);
            linears.prefill(pool, gathered, n, &mut [(&e.up, &mut *up)]);
            rows::each(pool, up, inner, |_, row| elementwise::act(w.act, row));
            let results = sized(results, n * width);
            linears.prefill(pool, up, n, &mut [(&e.down, &mut *results)]);
            group.iter().zip(results.chunks_exact(width)).for_each(|(r, result)| r.add(result, y));
            self.counters.weight_bytes += if self.mode == Mode::Masked { n as u64 * bytes(e) } else { 0 };
        }
    }
}

/// Neurons of an expert.
fn inner(w: &Rectified<'_>) -> usize {
    w.experts.first().map_or(0, |e| e.up.weight.outputs())
}

fn bytes(e: &Ungated) -> u64 {
    (e.up.weight.bytes().len() + e.down.weight.bytes().len()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled(mut g: Vec<f32>, scale: RouterScale, gain: Option<&[f32]>) -> (Vec<f32>, Vec<usize>) {
        let mut used = Vec::new();
        scale_scores(&mut g, scale, gain, |e, _| used.push(e));
        (g, used)
    }

    #[test]
    fn factors_are_those_of_the_formulas() {
        let g = || vec![3.0, -1.0, 0.0, 4.0];
        assert_eq!(scaled(g(), RouterScale::Plain, None), (vec![3.0, 0.0, 0.0, 4.0], vec![0, 3]));
        let (p, _) = scaled(g(), RouterScale::Sum { factor: 2.0 }, None);
        assert!((p[0] - 3.0 / 14.000_01).abs() < 1e-7 && p[1] == 0.0, "{p:?}");
        // The mean of the squares is 25 / 4; zeros count.
        let (p, used) = scaled(g(), RouterScale::Rms { eps: 0.0 }, Some(&[1.0, 1.0, 1.0, -0.5]));
        assert!((p[0] - 1.2).abs() < 1e-6 && (p[3] + 0.8).abs() < 1e-6, "{p:?}");
        assert_eq!(used, [0, 3], "a negative gain does not make an expert inactive");
    }

    #[test]
    fn a_router_that_says_nothing_gives_zeros_and_its_scale_does_not_matter() {
        let rms = RouterScale::Rms { eps: 1e-5 };
        assert_eq!(scaled(vec![-1.0, -2.0, 0.0], rms, Some(&[1.0; 3])), (vec![0.0; 3], vec![]));
        let (a, _) = scaled(vec![100.0, -1.0, 50.0], rms, None);
        let (b, _) = scaled(vec![300.0, -3.0, 150.0], rms, None);
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
    }
}
