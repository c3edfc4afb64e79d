//! The engine: one [`Engine`] per model, one [`Session`] per conversation.
//!
//! Prefill runs many tokens through matrix products and is dense. Decode runs one token through dot products, or
//! through what a [`CompiledPlan`] keeps. Both write keys and values into the session's pages and follow
//! [`crate::model::spec::Spec`] alone: no architecture and no method is named here.

mod batch;
pub mod bitmaps;
pub mod break_even;
pub mod compile;
mod compiled;
mod dead;
pub mod decoding;
mod experts;
mod forward;
pub mod generate;
mod kv;
mod latent;
pub mod layouts;
mod linear;
mod masked;
mod mlp;
pub mod probe;
mod prompt;
mod relu_experts;
mod rows;
pub mod sampler;
mod session;
mod shared;
mod short;
mod sparse;
mod sparse_rows;
pub mod transpose;
mod tree;

pub use compiled::{ChosenBy, CompiledPlan, Counters, InputRule, LayerCounts, LayerPlan, NeuronRule, SiteCount};
pub use kv::{KV_BLOCK, KvBlock, kv_bytes};
pub use lacuna_kernels::attention::KvType;
pub use session::Session;
pub use tree::{MAX_TREE, TokenTree};

use crate::{
    error::{Error, Result},
    model::weights::{Gated, Linear, Mlp, Model},
};
use kv::BlockPool;
use lacuna_core::weight::Orientation;
use lacuna_kernels::Pool;
use shared::{Shared, routers};
use std::sync::Arc;

/// How an engine runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads; 0: one per core.
    pub threads: usize,
    /// How keys and values are stored.
    pub kv: KvType,
    /// Most tokens that prefill runs at once; bounds its memory.
    pub prefill_chunk: usize,
    /// What decode skips.
    pub plan: Option<Arc<CompiledPlan>>,
}

impl Default for Options {
    fn default() -> Self {
        Self { threads: 0, kv: KvType::F16, prefill_chunk: 512, plan: None }
    }
}

/// A model that is ready to run. Clones share everything.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// Makes the threads for `model`.
    ///
    /// # Errors
    /// Options out of their range, or a plan for another number of layers or other shapes.
    pub fn new(model: Arc<Model>, options: Options) -> Result<Self> {
        Self::build(model, None, options)
    }

    /// An engine that computes with `model`; `original`: the same before its matrices became bitmaps.
    fn build(model: Arc<Model>, original: Option<Arc<Model>>, options: Options) -> Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if options.threads == 0 { cores() } else { options.threads };
        within("threads", threads, 1, 1024)?;
        within("prefill_chunk", options.prefill_chunk, 1, 1 << 16)?;
        if let Some(plan) = &options.plan {
            check_plan(&model, plan)?;
        }
        let blocks = Arc::new(BlockPool::new(&model.spec, options.kv)?);
        let (kv, prefill_chunk, plan) = (options.kv, options.prefill_chunk, options.plan);
        let (pool, routers) = (Pool::new(threads), routers(&model));
        Ok(Self {
            shared: Arc::new(Shared { model, original, pool, kv, blocks, prefill_chunk, plan, routers, saved: 0 }),
        })
    }

    /// The same model, plan and threads, without dead neurons and with matrices as bitmaps where their zeros pay for it, and
    /// what was packed; `None` if nothing was. [`Engine::model`] stays the model as it was loaded. `progress(done, all)` is called from the
    /// threads while bitmaps are made.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn with_bitmaps(
        &self,
        options: &bitmaps::BitmapOptions,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Option<(Self, bitmaps::Packed)>> {
        let Shared { model, kv, prefill_chunk, plan, pool, original, .. } = &*self.shared;
        if original.is_some() {
            return Ok(None);
        }
        // What a container holds has the shapes of the whole model.
        let live = if model.packed.is_some() { None } else { dead::without_dead(model, plan.as_deref()) };
        let packed = match &live {
            None => bitmaps::pack(model, plan.as_deref(), options, pool, progress)?,
            Some(live) => {
                tracing::info!("{} of {} neurons are dead and are left out", live.dropped, live.all);
                // Their matrices have other shapes than those of the whole model.
                let options = bitmaps::BitmapOptions { cache: options.cache.beside("-live"), ..options.clone() };
                let packed = bitmaps::pack(&live.model, plan.as_deref(), &options, pool, progress)?;
                Some(packed.unwrap_or_else(|| bitmaps::Packed::nothing(&live.model)))
            }
        };
        let Some(mut packed) = packed else { return Ok(None) };
        packed.dead = live.map_or(0, |l| l.dropped);
        let options = Options { threads: self.threads(), kv: *kv, prefill_chunk: *prefill_chunk, plan: plan.clone() };
        let engine = Self::build(packed.model.clone(), Some(model.clone()), options)?;
        Ok(Some((engine, packed)))
    }

    /// The engine without the model as it was before its matrices got other forms, whose memory is free then if nothing else
    /// holds it. What reads those matrices as they were (plans, calibration) must not be asked for any more: with this,
    /// [`Engine::model`] is what the engine computes with. An engine that others share stays as it is.
    pub fn without_originals(self) -> Self {
        let before = self.bytes_per_token(0);
        let mut shared = match Arc::try_unwrap(self.shared) {
            Ok(shared) => shared,
            Err(shared) => return Self { shared },
        };
        if shared.original.is_some() {
            shared.original = Some(shared.model.clone());
        }
        let mut engine = Self { shared: Arc::new(shared) };
        let after = engine.bytes_per_token(0);
        if let Some(shared) = Arc::get_mut(&mut engine.shared) {
            shared.saved += before.saturating_sub(after);
        }
        engine
    }

    /// The same model and threads with another plan, or none; without bitmaps.
    ///
    /// # Errors
    /// A plan for another number of layers or other shapes.
    pub fn with_plan(&self, plan: Option<Arc<CompiledPlan>>) -> Result<Self> {
        let threads = self.threads();
        let Shared { kv, prefill_chunk, .. } = &*self.shared;
        Self::new(self.model().clone(), Options { threads, kv: *kv, prefill_chunk: *prefill_chunk, plan })
    }

    /// A conversation of at most `context` tokens, 0: as many as the model was made for. Pages of keys and values are
    /// made as it grows. Rotary models go on behind what they were trained with, at a loss of quality.
    ///
    /// # Errors
    /// A context longer than the table of a model with learned positions.
    pub fn session(&self, context: usize) -> Result<Session> {
        let spec = &self.shared.model.spec;
        let context = if context == 0 { spec.context } else { context };
        if context > spec.most_positions() {
            let problem = format!("{context} is more than the {} positions this model has learned", spec.context);
            return Err(Error::Argument { name: "context", problem });
        }
        Ok(Session::new(self.shared.clone(), context))
    }

    /// The model as it was loaded or compiled, before any of its matrices became bitmaps.
    pub fn model(&self) -> &Arc<Model> {
        self.shared.original.as_ref().unwrap_or(&self.shared.model)
    }

    /// Whether some matrices are read as bitmaps.
    pub fn has_bitmaps(&self) -> bool {
        self.shared.original.is_some()
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.pool.threads()
    }

    /// The threads, for other work on the same model (conversions); one job runs at a time.
    pub fn pool(&self) -> &Pool {
        &self.shared.pool
    }

    /// How keys and values are stored.
    pub fn kv(&self) -> KvType {
        self.shared.kv
    }

    /// Most tokens that prefill runs at once.
    pub fn prefill_chunk(&self) -> usize {
        self.shared.prefill_chunk
    }

    /// Blocks of keys and values that sessions and [`KvBlock`]s hold at the moment.
    pub fn blocks_in_use(&self) -> usize {
        self.shared.blocks.used()
    }

    /// Whether what decode keeps follows from how the whole prompt was computed in the same session.
    pub fn follows_prompts(&self) -> bool {
        self.shared.plan.as_deref().is_some_and(batch::follows_prompts)
    }

    /// Bytes that a dense decode step (without a plan or bitmaps) reads with `depth` tokens in the context: weights (of the active experts only;
    /// where a router's ReLU decides how many those are, of all), keys and values. What a plan saves is in [`Session::counters`].
    pub fn bytes_per_token(&self, depth: usize) -> u64 {
        let model = self.model();
        let mut bytes = weight_bytes(&model.head) + model.embed.matrix().row_bytes() as u64;
        bytes +=
            model.per_layer.as_ref().map_or(0, |p| weight_bytes(&p.projection) + p.table.matrix().row_bytes() as u64);
        for (block, spec) in model.blocks.iter().zip(&model.spec.blocks) {
            bytes += [&block.q, &block.k, &block.v, &block.o].map(weight_bytes).iter().sum::<u64>();
            let latent = block.latent.as_ref().and_then(|l| l.query.as_ref());
            bytes += latent.map_or(0, |(down, _)| weight_bytes(down));
            bytes += block.shortcuts.as_ref().map_or(0, |s| s.bytes());
            bytes += block.per_layer.as_ref().map_or(0, |p| p.bytes());
            bytes += match &block.mlp {
                Mlp::Gated(gated) => gated_bytes(gated),
                Mlp::Plain { up, down } => weight_bytes(up) + weight_bytes(down),
                Mlp::Experts { router, experts } => {
                    let active = match spec.mlp {
                        crate::model::spec::MlpSpec::Experts { active, .. } => active,
                        _ => 0,
                    };
                    weight_bytes(router) + experts.first().map_or(0, gated_bytes) * active as u64
                }
                Mlp::ReluExperts { router, experts, .. } => {
                    let all = experts.iter().map(|e| weight_bytes(&e.up) + weight_bytes(&e.down));
                    weight_bytes(router) + all.sum::<u64>()
                }
            };
        }
        bytes + self.shared.saved + kv_bytes_read(&self.shared, depth)
    }
}

/// Bytes of keys and values that one decode step reads at `depth`.
fn kv_bytes_read(shared: &Shared, depth: usize) -> u64 {
    let read = |b: &crate::model::spec::BlockSpec| {
        let seen = b.window.map_or(depth, |w| w.min(depth));
        (seen * b.kv_heads * b.head_dim * 2 * shared.kv.bytes()) as u64
    };
    shared.model.spec.blocks.iter().map(read).sum()
}

fn weight_bytes(linear: &Linear) -> u64 {
    linear.weight.bytes().len() as u64
}

fn gated_bytes(w: &Gated) -> u64 {
    [&w.gate, &w.up, &w.down].map(weight_bytes).iter().sum()
}

fn within(name: &'static str, value: usize, low: usize, high: usize) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::Argument { name, problem: format!("{value} is not within {low} to {high}") })
}

/// Checks that every rule of `plan` fits the weights it stands in for.
fn check_plan(model: &Model, plan: &CompiledPlan) -> Result<()> {
    let error = |problem: String| Error::Argument { name: "plan", problem };
    if plan.layers.len() != model.blocks.len() {
        return Err(error(format!("{} layers, but the model has {}", plan.layers.len(), model.blocks.len())));
    }
    let by_channels = !plan.masked;
    for (layer, (rules, block)) in plan.layers.iter().zip(&model.blocks).enumerate() {
        for proj in lacuna_core::site::Proj::ALL {
            let Some(rule) = rules.input(proj) else { continue };
            let fits = block.linear(proj).is_some_and(|l| stands_in(&rule.weight, &l.weight, by_channels));
            if !fits {
                return Err(error(format!("layer {layer}: the weight of {proj} is not a copy of it by channels")));
            }
        }
        if !rules.experts.is_empty() && !experts_fit(&rules.experts, &block.mlp, by_channels) {
            return Err(error(format!("layer {layer}: rules on experts need a rule for each, on its down projection")));
        }
        let Some(rule) = &rules.neurons else { continue };
        let by_rows = |l: &Linear| l.weight.orientation() == Orientation::OutputMajor;
        let predicted = !rule.reads_gate();
        let fits = match &block.mlp {
            Mlp::Gated(g) => {
                stands_in(&rule.down, &g.down.weight, by_channels)
                    && (plan.masked || (by_rows(&g.up) && (!predicted || by_rows(&g.gate))))
            }
            Mlp::Plain { up, down } => {
                stands_in(&rule.down, &down.weight, by_channels) && (plan.masked || !predicted || by_rows(up))
            }
            Mlp::Experts { .. } | Mlp::ReluExperts { .. } => false,
        };
        if !fits {
            return Err(error(format!("layer {layer}: a rule on neurons needs an MLP and its down projection")));
        }
    }
    Ok(())
}

fn experts_fit(rules: &[NeuronRule], mlp: &Mlp, by_channels: bool) -> bool {
    let Mlp::Experts { experts, .. } = mlp else { return false };
    let by_rows = |l: &Linear| !by_channels || l.weight.orientation() == Orientation::OutputMajor;
    let fits = |(rule, w): (&NeuronRule, &Gated)| {
        stands_in(&rule.down, &w.down.weight, by_channels) && by_rows(&w.gate) && by_rows(&w.up)
    };
    rules.len() == experts.len() && rules.iter().zip(experts).all(fits)
}

fn stands_in(copy: &lacuna_core::weight::Weight, original: &lacuna_core::weight::Weight, by_channels: bool) -> bool {
    (!by_channels || copy.orientation() != Orientation::OutputMajor)
        && (copy.outputs(), copy.inputs()) == (original.outputs(), original.inputs())
}
