//! The whole forward pass in plain scalar code: the oracle that the engine and every kernel are compared with.
//!
//! Read it from the top. No cache, no threads, no vector instructions; weights are decoded row by row. Activations of `n`
//! tokens are one flat slice, one row per token.

use crate::error::{Error, Result};
use crate::model::spec::{Act, BlockSpec, Latent, MlpSpec, NormKind, Position, Rope, RopePairs, RouterScale, Spec};
use crate::model::weights::{Block, Gated, LatentWeights, Linear, Mlp, Model, Norm};
use lacuna_core::observer::Observer;
use lacuna_core::site::{Point, Proj};
use lacuna_core::weight::{Orientation, Weight};
use lacuna_kernels::convert::decode_run;

/// Logits of every position of `tokens`: one row of `spec.vocab` numbers per token.
///
/// # Errors
/// [`Error::Argument`] if a token is outside the vocabulary, [`Error::Context`] if the text is longer than the context.
pub fn logits(model: &Model, tokens: &[u32]) -> Result<Vec<f32>> {
    observed_logits(model, tokens, &mut Nobody)
}

/// [`logits`], showing the points of the pass to `observer`. Inside experts only the input of gate and up is shown.
///
/// # Errors
/// As for [`logits`].
pub fn observed_logits(model: &Model, tokens: &[u32], observer: &mut dyn Observer) -> Result<Vec<f32>> {
    let spec = &model.spec;
    check(spec, tokens)?;
    let mut x = embed(model, tokens);
    let inputs = per_layer_inputs(model, tokens, &x);
    for (layer, (block, weights)) in spec.blocks.iter().zip(&model.blocks).enumerate() {
        let mut pass = Pass { spec, block, layer, observer: &mut *observer };
        pass.block(weights, &mut x, &inputs);
    }
    let h = norm(spec, &model.final_norm, &x);
    show(observer, Point::Head, spec.width, &h);
    let mut logits = linear(&model.head, &h);
    cap(&mut logits, spec.logit_cap);
    Ok(logits)
}

struct Nobody;

impl Observer for Nobody {
    fn wants(&self, _: Point) -> bool {
        false
    }

    fn observe(&mut self, _: Point, _: usize, _: &[f32]) {}
}

fn show(observer: &mut dyn Observer, point: Point, width: usize, values: &[f32]) {
    if observer.wants(point) {
        observer.observe(point, width, values);
    }
}

fn check(spec: &Spec, tokens: &[u32]) -> Result<()> {
    if tokens.len() > spec.context {
        return Err(Error::Context { tokens: tokens.len(), context: spec.context });
    }
    match tokens.iter().find(|t| **t as usize >= spec.vocab) {
        Some(t) => Err(Error::Argument {
            name: "tokens",
            problem: format!("token {t} is outside the vocabulary of {}; is this the model's tokenizer?", spec.vocab),
        }),
        None => Ok(()),
    }
}

fn embed(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let spec = &model.spec;
    let mut x = vec![0.0; tokens.len() * spec.width];
    for (position, (row, token)) in x.chunks_exact_mut(spec.width).zip(tokens).enumerate() {
        decode_row(&model.embed, *token as usize, row);
        row.iter_mut().for_each(|v| *v *= spec.embed_scale);
        if let (Position::Learned { offset }, Some(table)) = (&spec.position, &model.positions) {
            let mut p = vec![0.0; spec.width];
            decode_row(table, position + offset, &mut p);
            add(row, &p);
        }
    }
    x
}

/// The inputs of per-layer embeddings, one row of all blocks' per token.
fn per_layer_inputs(model: &Model, tokens: &[u32], x: &[f32]) -> Vec<f32> {
    let Some(w) = &model.per_layer else { return Vec::new() };
    let (width, each) = (model.spec.width as f32, w.norm.gain.len());
    let scaled: Vec<f32> = linear(&w.projection, x).iter().map(|v| v / width.sqrt()).collect();
    let mut inputs = norm(&model.spec, &w.norm, &scaled);
    let mut own = vec![0.0; w.table.inputs()];
    for (row, token) in inputs.chunks_exact_mut(own.len()).zip(tokens) {
        decode_row(&w.table, *token as usize, &mut own);
        axpy((each as f32).sqrt(), &own, row);
        row.iter_mut().for_each(|v| *v /= std::f32::consts::SQRT_2);
    }
    inputs
}

/// One block's pass over all tokens.
struct Pass<'a> {
    spec: &'a Spec,
    block: &'a BlockSpec,
    layer: usize,
    observer: &'a mut dyn Observer,
}

impl Pass<'_> {
    fn block(&mut self, w: &Block, x: &mut [f32], inputs: &[f32]) {
        let h = norm(self.spec, &w.attn_norm, x);
        let mut a = self.attention(w, &h);
        if let Some(post) = &w.attn_post_norm {
            a = norm(self.spec, post, &a);
        }
        let (scale, shortcuts) = (self.block.residual_scale, w.shortcuts.as_ref());
        if !self.block.parallel {
            shortcut(shortcuts.map(|s| &s.attn), x);
            axpy(scale, &a, x);
        }
        let h = norm(self.spec, &w.mlp_norm, x);
        let mut m = self.mlp(&w.mlp, &h);
        if let Some(post) = &w.mlp_post_norm {
            m = norm(self.spec, post, &m);
        }
        if self.block.parallel {
            shortcut(shortcuts.map(|s| &s.attn), x);
            axpy(scale, &a, x);
        } else {
            shortcut(shortcuts.and_then(|s| s.mlp.as_ref()), x);
        }
        axpy(scale, &m, x);
        self.own_embedding(w, x, inputs);
        show(self.observer, Point::Output { layer: self.layer }, self.spec.width, x);
    }

    /// `x += norm(out(act(gate x) * e))`.
    fn own_embedding(&self, w: &Block, x: &mut [f32], inputs: &[f32]) {
        let (Some(w), Some(own)) = (&w.per_layer, self.block.per_layer) else { return };
        let mut gate = linear(&w.gate, x);
        let all = inputs.len() / (x.len() / self.spec.width);
        for (gate, row) in gate.chunks_exact_mut(own.width).zip(inputs.chunks_exact(all)) {
            gate.iter_mut().zip(&row[own.first..]).for_each(|(g, e)| *g = activate(own.act, *g) * e);
        }
        add(x, &norm(self.spec, &w.norm, &linear(&w.out, &gate)));
    }

    fn show_input(&mut self, projections: &[Proj], width: usize, x: &[f32]) {
        for &proj in projections {
            show(self.observer, Point::Input { layer: self.layer, proj }, width, x);
        }
    }

    /// `o(softmax(mask(cap(scale * q k^T))) v)`; query head `h` reads key/value head `h / (heads / kv_heads)`.
    fn attention(&mut self, w: &Block, x: &[f32]) -> Vec<f32> {
        let b = self.block;
        self.show_input(&[Proj::Q, Proj::K, Proj::V], self.spec.width, x);
        let (q, k, v) = match (&w.latent, b.latent) {
            (Some(weights), Some(latent)) => self.latent(w, weights, latent, x),
            _ => self.projected(w, x),
        };
        let (d, q_width, kv_width) = (b.head_dim, b.heads * b.head_dim, b.kv_heads * b.head_dim);
        let value = b.latent.map_or(d, |l| l.value);
        let v_width = b.kv_heads * value;
        let mut out = vec![0.0; q.len() / q_width * b.attended()];
        for t in 0..q.len() / q_width {
            let first = b.window.map_or(0, |w| (t + 1).saturating_sub(w));
            for head in 0..b.heads {
                let at = head / (b.heads / b.kv_heads);
                let query = &q[t * q_width + head * d..][..d];
                let mut scores: Vec<f32> =
                    (first..=t).map(|s| b.scale * dot(query, &k[s * kv_width + at * d..][..d])).collect();
                cap(&mut scores, b.score_cap);
                softmax(&mut scores);
                let o = &mut out[t * b.attended() + head * value..][..value];
                for (s, p) in (first..).zip(&scores) {
                    axpy(*p, &v[s * v_width + at * value..][..value], o);
                }
            }
        }
        self.show_input(&[Proj::O], b.attended(), &out);
        linear(&w.o, &out)
    }

    /// Queries, keys and values of full size, normalised and rotated.
    fn projected(&self, w: &Block, x: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let b = self.block;
        let (mut q, mut k, v) = (linear(&w.q, x), linear(&w.k, x), linear(&w.v, x));
        if let Some(gain) = &w.q_norm {
            q = norm(self.spec, gain, &q);
        }
        if let Some(gain) = &w.k_norm {
            k = norm(self.spec, gain, &k);
        }
        if let Some(rope) = b.rope.and_then(|r| self.spec.ropes.get(r)) {
            rotate(rope, b.head_dim, b.heads, &mut q);
            rotate(rope, b.head_dim, b.kv_heads, &mut k);
        }
        (q, k, v)
    }

    /// Those of latent attention: `q = q_up norm(q_down x)`, `[c | r] = kv_down x`, per head `[k | v] = kv_up norm(c)`; the last
    /// `rope` components of a query are rotated, and `r`, rotated, is the end of every head's key.
    fn latent(&self, w: &Block, weights: &LatentWeights, l: Latent, x: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let b = self.block;
        let spec = Spec { norm_eps: l.eps, ..self.spec.clone() };
        let mut q = match &weights.query {
            Some((down, gain)) => linear(&w.q, &norm(&spec, gain, &linear(down, x))),
            None => linear(&w.q, x),
        };
        let down = linear(&w.k, x);
        let rows = || down.chunks_exact(l.kv_rank + l.rope);
        let compressed: Vec<f32> = rows().flat_map(|r| &r[..l.kv_rank]).copied().collect();
        let mut shared: Vec<f32> = rows().flat_map(|r| &r[l.kv_rank..]).copied().collect();
        let expanded = linear(&w.v, &norm(&spec, &weights.kv_norm, &compressed));
        if let Some(rope) = b.rope.and_then(|r| self.spec.ropes.get(r)) {
            rotate(rope, l.rope, 1, &mut shared);
            let mut turned: Vec<f32> = q.chunks_exact(b.head_dim).flat_map(|head| &head[l.nope..]).copied().collect();
            rotate(rope, l.rope, b.heads, &mut turned);
            for (head, turned) in q.chunks_exact_mut(b.head_dim).zip(turned.chunks_exact(l.rope)) {
                head[l.nope..].copy_from_slice(turned);
            }
        }
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for (row, shared) in expanded.chunks_exact(b.heads * (l.nope + l.value)).zip(shared.chunks_exact(l.rope)) {
            for head in row.chunks_exact(l.nope + l.value) {
                k.extend(head[..l.nope].iter().chain(shared));
                v.extend(&head[l.nope..]);
            }
        }
        (q, k, v)
    }

    fn mlp(&mut self, w: &Mlp, x: &[f32]) -> Vec<f32> {
        let width = self.spec.width;
        match w {
            Mlp::Gated(gated) => {
                self.show_input(&[Proj::Gate, Proj::Up], width, x);
                let (gate, up) = self.neurons(gated, x);
                let inner = gated.gate.weight.outputs();
                let h: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| g * u).collect();
                show(self.observer, Point::Up { layer: self.layer }, inner, &up);
                show(self.observer, Point::Neurons { layer: self.layer }, inner, &gate);
                self.show_input(&[Proj::Down], inner, &h);
                linear(&gated.down, &h)
            }
            Mlp::Plain { up, down } => {
                self.show_input(&[Proj::Up], width, x);
                let mut h = linear(up, x);
                h.iter_mut().for_each(|v| *v = activate(self.block.act, *v));
                let inner = up.weight.outputs();
                show(self.observer, Point::Neurons { layer: self.layer }, inner, &h);
                self.show_input(&[Proj::Down], inner, &h);
                linear(down, &h)
            }
            Mlp::ReluExperts { router, gain, experts } => {
                self.show_input(&[Proj::Up], width, x);
                let shares: Vec<f32> =
                    x.chunks_exact(width).flat_map(|t| self.rectified(linear(router, t), gain.as_deref())).collect();
                show(self.observer, Point::Experts { layer: self.layer }, experts.len(), &shares);
                let mut out = vec![0.0; x.len()];
                for (e, w) in experts.iter().enumerate() {
                    let mut h = linear(&w.up, x);
                    h.iter_mut().for_each(|v| *v = activate(self.block.act, *v));
                    let results = linear(&w.down, &h);
                    let shares = shares.iter().skip(e).step_by(experts.len());
                    for ((y, result), p) in out.chunks_exact_mut(width).zip(results.chunks_exact(width)).zip(shares) {
                        axpy(*p, result, y);
                    }
                }
                out
            }
            Mlp::Experts { router, experts } => {
                self.show_input(&[Proj::Gate, Proj::Up], width, x);
                let mut out = vec![0.0; x.len()];
                let routes: Vec<_> = x.chunks_exact(width).map(|token| self.route(linear(router, token))).collect();
                let mut shares = vec![0.0; routes.len() * experts.len()];
                for (row, routes) in shares.chunks_exact_mut(experts.len()).zip(&routes) {
                    routes.iter().for_each(|(e, share)| row[*e] = *share);
                }
                show(self.observer, Point::Experts { layer: self.layer }, experts.len(), &shares);
                let mut gates = Vec::new();
                for (expert, w) in experts.iter().enumerate() {
                    let share = |r: &Vec<(usize, f32)>| r.iter().find(|r| r.0 == expert).map(|r| r.1);
                    for ((token, y), r) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(&routes) {
                        let Some(share) = share(r) else { continue };
                        let (gate, up) = self.neurons(w, token);
                        let h: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| g * u).collect();
                        axpy(share, &linear(&w.down, &h), y);
                        gates.extend(gate);
                    }
                }
                let inner = experts.first().map_or(0, |w| w.gate.weight.outputs());
                show(self.observer, Point::Neurons { layer: self.layer }, inner, &gates);
                out
            }
        }
    }

    /// `(act(gate x), up x)`, up with its own non-linearity where it has one.
    fn neurons(&self, w: &Gated, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut gate = linear(&w.gate, x);
        gate.iter_mut().for_each(|v| *v = activate(self.block.act, *v));
        let mut up = linear(&w.up, x);
        if let Some(act) = self.block.up_act {
            up.iter_mut().for_each(|v| *v = activate(act, *v));
        }
        (gate, up)
    }

    /// The factor of every expert for one token, 0 where its score is not positive. All experts are computed here.
    fn rectified(&self, mut g: Vec<f32>, gain: Option<&[f32]>) -> Vec<f32> {
        let MlpSpec::ReluExperts { scale, .. } = self.block.mlp else { return Vec::new() };
        g.iter_mut().for_each(|v| *v = v.max(0.0));
        let divisor = match scale {
            RouterScale::Plain => 1.0,
            RouterScale::Sum { factor } => factor * g.iter().sum::<f32>() + 1e-5,
            RouterScale::Rms { eps } => (dot(&g, &g) / g.len() as f32 + eps).sqrt(),
        };
        g.iter_mut().for_each(|v| *v /= divisor);
        if let Some(gain) = gain {
            g.iter_mut().zip(gain).for_each(|(v, gain)| *v *= gain);
        }
        g
    }

    /// The experts of one token with their shares: the largest of `softmax(scores)`, ties to the lower number.
    fn route(&self, mut scores: Vec<f32>) -> Vec<(usize, f32)> {
        let MlpSpec::Experts { active, normalise, .. } = self.block.mlp else { return Vec::new() };
        softmax(&mut scores);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        order.truncate(active);
        let sum: f32 = if normalise { order.iter().map(|e| scores[*e]).sum() } else { 1.0 };
        order.into_iter().map(|e| (e, scores[e] / sum)).collect()
    }
}

/// `x <- S x`, where the residual stream passes to another basis.
fn shortcut(s: Option<&Linear>, x: &mut [f32]) {
    if let Some(s) = s {
        x.copy_from_slice(&linear(s, x));
    }
}

/// Normalises rows as long as the gain: whole channels, or single heads for q/k norms.
fn norm(spec: &Spec, w: &Norm, x: &[f32]) -> Vec<f32> {
    let n = w.gain.len();
    let mut out = x.to_vec();
    for row in out.chunks_exact_mut(n) {
        if spec.norm == NormKind::Layer {
            let mean = row.iter().sum::<f32>() / n as f32;
            row.iter_mut().for_each(|v| *v -= mean);
        }
        let scale = 1.0 / (dot(row, row) / w.over as f32 + spec.norm_eps).sqrt();
        for (i, v) in row.iter_mut().enumerate() {
            *v = *v * scale * w.gain[i] + w.bias.as_ref().map_or(0.0, |b| b[i]);
        }
    }
    out
}

/// Rotates the first `rope.dims` components of every head; row `t` of `x` stands at position `t`.
fn rotate(rope: &Rope, head_dim: usize, heads: usize, x: &mut [f32]) {
    for (position, row) in x.chunks_exact_mut(heads * head_dim).enumerate() {
        for head in row.chunks_exact_mut(head_dim) {
            for (i, freq) in rope.freqs.iter().enumerate() {
                let (a, b) = match rope.pairs {
                    RopePairs::Half => (i, i + rope.dims / 2),
                    RopePairs::Adjacent => (2 * i, 2 * i + 1),
                };
                let (sin, cos) = (position as f32 * freq).sin_cos();
                let (sin, cos) = (sin * rope.factor, cos * rope.factor);
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
        }
    }
}

fn activate(act: Act, x: f32) -> f32 {
    match act {
        Act::Silu => x / (1.0 + (-x).exp()),
        Act::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
        Act::GeluTanh => 0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh()),
        Act::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Act::Relu => x.max(0.0),
        Act::Relu2 => x.max(0.0) * x.max(0.0),
    }
}

/// The error function: its Taylor series near zero, elsewhere the rational approximation 7.1.26 of Abramowitz and Stegun
/// would be too coarse, so the continued fraction of `erfc` (same handbook, 7.1.14) in double precision.
fn erf(x: f32) -> f32 {
    let z = f64::from(x).abs();
    let value = if z < 2.5 {
        let (mut term, mut sum) = (z, z);
        for n in 1..60 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let fraction = (1..40).rev().fold(z, |f, n| z + f64::from(n) / 2.0 / f);
        1.0 - (-z * z).exp() / (fraction * std::f64::consts::PI.sqrt())
    };
    (value as f32).copysign(x)
}

fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|v| *v /= sum);
}

/// `cap * tanh(x / cap)`, where there is a cap.
fn cap(x: &mut [f32], cap: Option<f32>) {
    if let Some(c) = cap {
        x.iter_mut().for_each(|v| *v = c * (*v / c).tanh());
    }
}

/// `y = W x + b` for every row of `x`.
fn linear(w: &Linear, x: &[f32]) -> Vec<f32> {
    let (outputs, inputs) = (w.weight.outputs(), w.weight.inputs());
    let n = x.len() / inputs;
    let mut y = match &w.bias {
        Some(b) => b.repeat(n),
        None => vec![0.0; n * outputs],
    };
    let mut run = vec![0.0; w.weight.matrix().cols()];
    for r in 0..w.weight.matrix().rows() {
        decode_row(&w.weight, r, &mut run);
        for t in 0..n {
            match w.weight.orientation() {
                Orientation::OutputMajor => y[t * outputs + r] += dot(&run, &x[t * inputs..][..inputs]),
                _ => axpy(x[t * inputs + r], &run, &mut y[t * outputs..][..outputs]),
            }
        }
    }
    y
}

fn decode_row(w: &Weight, row: usize, out: &mut [f32]) {
    let m = w.matrix();
    decode_run(m.format(), m.row(row), out);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

fn add(x: &mut [f32], y: &[f32]) {
    axpy(1.0, y, x);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_has_the_tabulated_values() {
        // Abramowitz and Stegun, table 7.1.
        for (x, y) in [(0.0, 0.0), (0.5, 0.520_499_9), (1.0, 0.842_700_8), (2.0, 0.995_322_3), (3.0, 0.999_977_9)] {
            assert!((erf(x) - y).abs() < 2e-7, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
        assert!((erf(2.499_99) - erf(2.500_01)).abs() < 1e-6);
    }
}
