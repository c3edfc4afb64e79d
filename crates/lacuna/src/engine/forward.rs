//! The forward pass over some tokens, of one session or of several: rows through dot-form products while decoding,
//! through matrix products in prefill. The order of operations is that of [`crate::reference`].
//!
//! A decoded row has the same bits whatever else is in the pass: every product, norm and attention of it is computed as
//! if it were alone, and only the reads of the weights are shared.

use super::{
    compiled::{CompiledPlan, Counters, LayerPlan},
    kv::Places,
    latent,
    linear::{Linears, Part, Sparsity},
    masked, rows,
    shared::Shared,
};
use crate::model::{
    spec::{BlockSpec, NormKind, Position, Spec},
    weights::{Block, Linear, Norm},
};
use lacuna_core::{
    observer::Observer,
    site::{Point, Proj},
};
use lacuna_kernels::{Pool, attention, convert::decode_run, elementwise};

/// How products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Rows that do not depend on their company; the plan applies.
    Decode,
    /// The same without the plan.
    Dense,
    /// Any number of tokens, dense.
    Prefill,
    /// Any number of tokens; each through its own selection of the plan, for measures of quality.
    Masked,
}

impl Mode {
    /// The mode of a pass under `plan`: dense ones follow it where the model does not compute anything else.
    pub fn under(self, plan: Option<&CompiledPlan>) -> Self {
        match plan.filter(|p| p.is_of_the_model()) {
            Some(_) if self == Mode::Prefill => Mode::Masked,
            Some(plan) if self == Mode::Dense => {
                if plan.masked {
                    Mode::Masked
                } else {
                    Mode::Decode
                }
            }
            _ => self,
        }
    }

    /// Whether the tokens follow one another in one context and go through matrix products.
    pub fn is_chunk(self) -> bool {
        matches!(self, Mode::Prefill | Mode::Masked)
    }
}

/// Buffers of a pass, reused from pass to pass; rows of the tokens lie one after the other.
#[derive(Default)]
pub(super) struct Workspace {
    /// Residual stream.
    pub x: Vec<f32>,
    /// Normalised input of the next projections.
    pub h: Vec<f32>,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    attended: Vec<f32>,
    pub latent: super::latent::LatentBuffers,
    /// The residual stream in the next basis.
    moved: Vec<f32>,
    /// Inputs of per-layer embeddings, those of all blocks for each token.
    pub per_layer: Vec<f32>,
    /// Output of the attention, kept apart while the MLP of a parallel block runs.
    branch: Vec<f32>,
    /// Output of the MLP.
    pub y: Vec<f32>,
    pub gate: Vec<f32>,
    pub up: Vec<f32>,
    /// Per rotary table: cos and sin of each token's position.
    pub cos: Vec<Vec<f32>>,
    pub sin: Vec<Vec<f32>>,
    scratch: attention::Scratch,
    pub linears: Linears,
    pub experts: super::experts::ExpertBuffers,
    /// Per layer, which neurons the prompt used; only kept for rules that follow the prompt.
    pub prompt: Vec<super::prompt::PromptNeurons>,
}

/// One pass.
pub(super) struct Forward<'a> {
    pub shared: &'a Shared,
    pub places: Places<'a>,
    pub ws: &'a mut Workspace,
    pub counters: &'a mut Counters,
    pub observer: &'a mut dyn Observer,
    /// What the layers skip: the engine's plan, or that of a search.
    pub plan: Option<&'a CompiledPlan>,
    pub mode: Mode,
}

/// `buffer` with exactly `len` numbers; their values mean nothing.
pub(super) fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    &mut buffer[..]
}

/// Normalises rows of `norm.gain.len()` numbers.
pub(super) fn normalise(pool: &Pool, spec: &Spec, norm: &Norm, x: &[f32], out: &mut [f32]) {
    match spec.norm {
        NormKind::Rms => elementwise::rms_norm_rows(pool, x, &norm.gain, norm.over, spec.norm_eps, out),
        NormKind::Layer => {
            elementwise::layer_norm_rows(pool, x, &norm.gain, norm.bias.as_deref(), spec.norm_eps, out);
        }
    }
}

/// Normalises rows in place, with a copy of each row where the kernel needs one.
fn normalise_in_place(pool: &Pool, spec: &Spec, norm: &Norm, x: &mut [f32], copy: &mut Vec<f32>) {
    copy.clear();
    copy.extend_from_slice(x);
    normalise(pool, spec, norm, copy, x);
}

impl Forward<'_> {
    /// Runs all blocks over `tokens`; the residual stream is left in the workspace, the keys and values in the cache.
    pub fn run(&mut self, tokens: &[u32]) {
        self.places.grow();
        self.embed(tokens);
        self.rotations(tokens.len());
        for layer in 0..self.shared.model.blocks.len() {
            self.block(layer, tokens.len());
        }
    }

    /// One block alone over the residual stream of `n` tokens; what it leaves in the residual stream lies in the
    /// workspace.
    pub fn run_block(&mut self, layer: usize, x: &[f32], n: usize) {
        self.places.grow();
        sized(&mut self.ws.x, x.len()).copy_from_slice(x);
        self.rotations(n);
        self.block(layer, n);
    }

    /// The embeddings of `tokens` become the residual stream.
    pub fn embed(&mut self, tokens: &[u32]) {
        let model = &self.shared.model;
        let (spec, embed) = (&model.spec, model.embed.matrix());
        let x = sized(&mut self.ws.x, tokens.len() * spec.width);
        let learned = match (&spec.position, &model.positions) {
            (Position::Learned { offset }, Some(table)) => Some((*offset, table.matrix())),
            _ => None,
        };
        let places = &self.places;
        rows::each(&self.shared.pool, x, spec.width, |i, row| {
            decode_run(embed.format(), embed.row(tokens[i] as usize), row);
            if spec.embed_scale != 1.0 {
                row.iter_mut().for_each(|v| *v *= spec.embed_scale);
            }
            if let Some((offset, table)) = learned {
                let mut position = vec![0.0; spec.width];
                decode_run(table.format(), table.row(places.position(i) + offset), &mut position);
                elementwise::add(row, &position);
            }
        });
        self.per_layer_inputs(tokens);
    }

    /// The inputs of per-layer embeddings of `tokens`, whose embeddings are the residual stream.
    fn per_layer_inputs(&mut self, tokens: &[u32]) {
        let (pool, model) = (&self.shared.pool, &self.shared.model);
        let Some(w) = &model.per_layer else { return };
        let (n, all, each) = (tokens.len(), w.table.inputs(), w.norm.gain.len());
        let Workspace { x, per_layer, up, linears, .. } = &mut *self.ws;
        let inputs = sized(per_layer, n * all);
        plain_products(self.mode, pool, linears, self.counters, (x, n), [(&w.projection, &mut *inputs)]);
        let scale = 1.0 / (model.spec.width as f32).sqrt();
        rows::each(pool, inputs, all, |_, row| row.iter_mut().for_each(|v| *v *= scale));
        normalise_in_place(pool, &model.spec, &w.norm, inputs, up);
        let (table, of_table) = (w.table.matrix(), (each as f32).sqrt());
        rows::each(pool, inputs, all, |i, row| {
            let mut own = vec![0.0; all];
            decode_run(table.format(), table.row(tokens[i] as usize), &mut own);
            row.iter_mut().zip(own).for_each(|(v, own)| *v = (*v + own * of_table) * std::f32::consts::FRAC_1_SQRT_2);
        });
    }

    /// What a block adds out of its own embedding of the tokens: `x += norm(out(act(gate x) * e))`.
    fn own_embedding(&mut self, block: &BlockSpec, weights: &Block, n: usize) {
        let (Some(w), Some(own)) = (&weights.per_layer, block.per_layer) else { return };
        let (pool, spec) = (&self.shared.pool, &self.shared.model.spec);
        let Workspace { x, per_layer, gate, y, up, linears, .. } = &mut *self.ws;
        let (inputs, all) = (&per_layer[..], per_layer.len() / n);
        let gate = sized(gate, n * own.width);
        plain_products(self.mode, pool, linears, self.counters, (x, n), [(&w.gate, &mut *gate)]);
        rows::each(pool, gate, own.width, |i, row| {
            elementwise::act(own.act, row);
            row.iter_mut().zip(&inputs[i * all + own.first..]).for_each(|(g, e)| *g *= e);
        });
        let y = sized(y, n * spec.width);
        plain_products(self.mode, pool, linears, self.counters, (gate, n), [(&w.out, &mut *y)]);
        normalise_in_place(pool, spec, &w.norm, y, up);
        rows::add_scaled(pool, x, y, spec.width, 1.0);
    }

    /// Fills the tables of cosines and sines for `n` positions.
    fn rotations(&mut self, n: usize) {
        let ropes = &self.shared.model.spec.ropes;
        let Workspace { cos, sin, .. } = &mut *self.ws;
        cos.resize_with(ropes.len(), Vec::new);
        sin.resize_with(ropes.len(), Vec::new);
        for (r, rope) in ropes.iter().enumerate() {
            let half = rope.freqs.len();
            let (cos, sin) = (sized(&mut cos[r], n * half), sized(&mut sin[r], n * half));
            for (i, (cos, sin)) in cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half)).enumerate() {
                elementwise::rope_table(&rope.freqs, self.places.position(i), rope.factor, cos, sin);
            }
        }
    }

    fn block(&mut self, layer: usize, n: usize) {
        let (shared, pool) = (self.shared, &self.shared.pool);
        let (spec, weights) = (&shared.model.spec, &shared.model.blocks[layer]);
        let block = &spec.blocks[layer];
        let width = spec.width;
        {
            let Workspace { x, h, .. } = &mut *self.ws;
            normalise(pool, spec, &weights.attn_norm, x, sized(h, n * width));
        }
        if !self.attention(layer, block, weights, n) {
            return;
        }
        let Workspace { branch, up, .. } = &mut *self.ws;
        if let Some(post) = &weights.attn_post_norm {
            normalise_in_place(pool, spec, post, branch, up);
        }
        let shortcuts = weights.shortcuts.as_ref();
        if !block.parallel {
            self.shortcut(shortcuts.map(|s| &s.attn), n);
            rows::add_scaled(pool, &mut self.ws.x, &self.ws.branch, width, block.residual_scale);
        }
        let Workspace { x, h, .. } = &mut *self.ws;
        normalise(pool, spec, &weights.mlp_norm, x, sized(h, n * width));
        if !self.mlp(layer, block, &weights.mlp, n) {
            return;
        }
        let Workspace { y, up, .. } = &mut *self.ws;
        if let Some(post) = &weights.mlp_post_norm {
            normalise_in_place(pool, spec, post, y, up);
        }
        if block.parallel {
            self.shortcut(shortcuts.map(|s| &s.attn), n);
            rows::add_scaled(pool, &mut self.ws.x, &self.ws.branch, width, block.residual_scale);
        } else {
            self.shortcut(shortcuts.and_then(|s| s.mlp.as_ref()), n);
        }
        rows::add_scaled(pool, &mut self.ws.x, &self.ws.y, width, block.residual_scale);
        self.own_embedding(block, weights, n);
        show(self.observer, Point::Output { layer }, width, &self.ws.x);
    }

    /// Takes the residual stream of `n` tokens to its next basis, where it has one: `x <- S x`.
    fn shortcut(&mut self, shortcut: Option<&Linear>, n: usize) {
        let Some(linear) = shortcut else { return };
        let pool = &self.shared.pool;
        let Workspace { x, moved, linears, .. } = &mut *self.ws;
        let part = (linear, sized(moved, n * linear.weight.outputs()));
        plain_products(self.mode, pool, linears, self.counters, (x, n), [part]);
        std::mem::swap(x, moved);
    }

    /// From the normalised `h` to `branch`; false if the observer ends the pass before.
    fn attention(&mut self, layer: usize, block: &BlockSpec, weights: &Block, n: usize) -> bool {
        let shared = self.shared;
        let (pool, spec) = (&shared.pool, &shared.model.spec);
        let q_width = block.heads * block.head_dim;
        for proj in [Proj::Q, Proj::K, Proj::V] {
            show(self.observer, Point::Input { layer, proj }, spec.width, &self.ws.h);
            if self.observer.ends(Point::Input { layer, proj }) {
                return false;
            }
        }
        match (&weights.latent, block.latent) {
            (Some(latent), Some(sizes)) => self.latent(layer, (weights, latent), (block, sizes), n),
            _ => self.full_size(layer, block, weights, n),
        }
        self.places.write(pool, layer, block, &self.ws.k, &self.ws.v);
        let Workspace { q, attended, scratch, .. } = &mut *self.ws;
        let attended = sized(attended, n * q_width);
        let asked = attention_spec(block);
        let (mode, places) = (self.mode, &self.places);
        if mode.is_chunk() {
            places.read(0, layer, block, |cache| {
                attention::prefill(pool, &asked, cache, places.position(0), q, attended, scratch);
            });
        } else {
            for (i, (q, out)) in q.chunks_exact(q_width).zip(attended.chunks_exact_mut(q_width)).enumerate() {
                places.read(i, layer, block, |cache| {
                    attention::decode(pool, &asked, cache, places.position(i) + 1, q, out, scratch);
                });
            }
        }
        latent::cut_values(block, &mut self.ws.attended);
        show(self.observer, Point::Input { layer, proj: Proj::O }, block.attended(), &self.ws.attended);
        if self.observer.ends(Point::Input { layer, proj: Proj::O }) {
            return false;
        }
        let Workspace { attended, branch, linears, .. } = &mut *self.ws;
        let parts = [(Proj::O, &weights.o, sized(branch, n * spec.width))];
        let place = Site { mode, pool, layer, plan: layer_plan(self.plan, layer) };
        project(&place, linears, self.counters, (attended, n), parts);
        true
    }

    /// Queries, keys and values of the normalised `h`, with norms and rotation.
    fn full_size(&mut self, layer: usize, block: &BlockSpec, weights: &Block, n: usize) {
        let (pool, spec) = (&self.shared.pool, &self.shared.model.spec);
        let (q_width, kv_width) = (block.heads * block.head_dim, block.kv_heads * block.head_dim);
        let Workspace { h, q, k, v, cos, sin, up, linears, .. } = &mut *self.ws;
        let parts = [
            (Proj::Q, &weights.q, sized(q, n * q_width)),
            (Proj::K, &weights.k, sized(k, n * kv_width)),
            (Proj::V, &weights.v, sized(v, n * kv_width)),
        ];
        let place = Site { mode: self.mode, pool, layer, plan: layer_plan(self.plan, layer) };
        project(&place, linears, self.counters, (h, n), parts);
        for (x, norm) in [(&mut *q, &weights.q_norm), (&mut *k, &weights.k_norm)] {
            if let Some(norm) = norm {
                normalise_in_place(pool, spec, norm, x, up);
            }
        }
        if let Some((r, rope)) = block.rope.and_then(|r| Some((r, spec.ropes.get(r)?))) {
            let half = rope.freqs.len();
            for (x, heads) in [(q, block.heads), (k, block.kv_heads)] {
                rows::each(pool, x, heads * block.head_dim, |i, row| {
                    let at = i * half..(i + 1) * half;
                    elementwise::rope(row, block.head_dim, rope.pairs, &cos[r][at.clone()], &sin[r][at]);
                });
            }
        }
    }
}

fn attention_spec(block: &BlockSpec) -> attention::Spec {
    attention::Spec {
        heads: block.heads,
        kv_heads: block.kv_heads,
        head_dim: block.head_dim,
        scale: block.scale,
        window: block.window,
        cap: block.score_cap,
    }
}

/// Where and how projections are computed.
pub(super) struct Site<'a> {
    pub mode: Mode,
    pub pool: &'a Pool,
    pub layer: usize,
    /// What the layer skips.
    pub plan: Option<&'a LayerPlan>,
}

/// The plan of one layer.
pub(super) fn layer_plan(plan: Option<&CompiledPlan>, layer: usize) -> Option<&LayerPlan> {
    plan.and_then(|p| p.layers.get(layer))
}

/// Products of the `n` rows of `x` that no plan reaches.
fn plain_products<const N: usize>(
    mode: Mode,
    pool: &Pool,
    linears: &mut Linears,
    counters: &mut Counters,
    (x, n): (&[f32], usize),
    mut parts: [(&Linear, &mut [f32]); N],
) {
    let bytes: u64 = parts.iter().map(|p| p.0.weight.bytes().len() as u64).sum();
    counters.weight_bytes += match mode {
        Mode::Decode | Mode::Dense => bytes,
        Mode::Prefill => 0,
        Mode::Masked => bytes * n as u64,
    };
    match mode {
        Mode::Decode | Mode::Dense => linears.dense(pool, x, n, &mut parts),
        Mode::Prefill | Mode::Masked => linears.prefill(pool, x, n, &mut parts),
    }
}

/// Projections of the `n` rows of `x`; while decoding and in masked passes, as the plan says.
pub(super) fn project<const N: usize>(
    site: &Site<'_>,
    linears: &mut Linears,
    counters: &mut Counters,
    (x, n): (&[f32], usize),
    parts: [(Proj, &Linear, &mut [f32]); N],
) {
    match site.mode {
        Mode::Decode | Mode::Masked => {
            let parts = parts.into_iter().map(|(proj, linear, out)| Part { proj, linear, out }).collect();
            let mut sparsity = sparsity(site, counters);
            match site.mode {
                Mode::Masked => masked::inputs(site.pool, &mut sparsity, (x, n), parts, linears),
                _ => linears.decode(site.pool, &mut sparsity, x, n, parts),
            }
        }
        Mode::Dense => {
            counters.weight_bytes += parts.iter().map(|p| p.1.weight.bytes().len() as u64).sum::<u64>();
            linears.dense(site.pool, x, n, &mut parts.map(|(_, linear, out)| (linear, out)));
        }
        Mode::Prefill => linears.prefill(site.pool, x, n, &mut parts.map(|(_, linear, out)| (linear, out))),
    }
}

/// The final norm of row `row` of the residual stream, or of all rows; it is left in `h`.
pub(super) fn head_input(shared: &Shared, ws: &mut Workspace, observer: &mut dyn Observer, row: Option<usize>) {
    let spec = &shared.model.spec;
    let width = spec.width;
    let Workspace { x, h, .. } = ws;
    let x = row.map_or(&x[..], |r| &x[r * width..(r + 1) * width]);
    normalise(&shared.pool, spec, &shared.model.final_norm, x, sized(h, x.len()));
    show(observer, Point::Head, width, h);
}

/// The plan and the counters of a layer.
pub(super) fn sparsity<'a>(site: &Site<'a>, counters: &'a mut Counters) -> Sparsity<'a> {
    Sparsity { plan: site.plan, counts: &mut counters.layers[site.layer], bytes: &mut counters.weight_bytes }
}

/// Shows a point to the observer, if it wants it.
pub(super) fn show(observer: &mut dyn Observer, point: Point, width: usize, values: &[f32]) {
    if observer.wants(point) {
        observer.observe(point, width, values);
    }
}

/// An observer that wants nothing.
pub(super) struct Nobody;

impl Observer for Nobody {
    fn wants(&self, _: Point) -> bool {
        false
    }

    fn observe(&mut self, _: Point, _: usize, _: &[f32]) {}
}
