//! One block at a time: the residual stream goes in, and comes out as the block leaves it under given rules. Searches for
//! budgets measure errors with it.

use super::{
    Engine,
    compiled::{CompiledPlan, Counters, LayerPlan},
    forward::{Forward, Mode, Nobody, Workspace, head_input, sized},
    kv::{KvCache, Places},
    session::logits,
    shared::Shared,
};
use crate::error::{Error, Result};
use lacuna_core::observer::Observer;
use std::sync::Arc;

/// Runs single blocks.
pub struct Probe {
    shared: Arc<Shared>,
    kv: KvCache,
    ws: Workspace,
    counters: Counters,
    plan: CompiledPlan,
}

impl Probe {
    /// A probe into the blocks of `engine`.
    pub fn new(engine: &Engine) -> Self {
        let shared = engine.shared.clone();
        let layers = shared.model.blocks.len();
        Self {
            kv: KvCache::new(shared.blocks.clone()),
            counters: Counters::new(layers),
            plan: CompiledPlan { layers: vec![LayerPlan::default(); layers], masked: true },
            ws: Workspace::default(),
            shared,
        }
    }

    /// The residual stream before the first block.
    ///
    /// # Errors
    /// No tokens, or tokens outside the vocabulary.
    pub fn embed(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let vocab = self.shared.model.spec.vocab;
        if tokens.is_empty() || tokens.iter().any(|t| *t as usize >= vocab) {
            return Err(Error::Argument { name: "tokens", problem: format!("none, or one outside of {vocab}") });
        }
        self.kv.truncate(0);
        let mut forward = Forward {
            shared: &self.shared,
            places: Places::following(&mut self.kv, 0, tokens.len()),
            ws: &mut self.ws,
            counters: &mut self.counters,
            observer: &mut Nobody,
            plan: None,
            mode: Mode::Prefill,
        };
        forward.embed(tokens);
        Ok(self.ws.x.clone())
    }

    /// Makes `tokens` those that [`Probe::block`] runs over, which matters to models with per-layer embeddings; so does
    /// [`Probe::embed`].
    ///
    /// # Errors
    /// As there.
    pub fn over(&mut self, tokens: &[u32]) -> Result<()> {
        if self.shared.model.per_layer.is_some() {
            self.embed(tokens)?;
        }
        Ok(())
    }

    /// What block `layer` makes of the residual stream `x` (rows of the tokens of one sequence, see [`Probe::over`]), with every
    /// row through its own selection by `rules`; without rules, dense.
    ///
    /// # Errors
    /// No such layer, or rows that do not fit the model.
    pub fn block(&mut self, layer: usize, x: &[f32], rules: Option<&LayerPlan>) -> Result<&[f32]> {
        self.run(layer, x, rules, &mut Nobody)
    }

    /// [`Probe::block`] without rules, showing the points of the block to `observer`; what it gives means nothing if the observer
    /// ends it early.
    ///
    /// # Errors
    /// As there.
    pub fn observed(&mut self, layer: usize, x: &[f32], observer: &mut dyn Observer) -> Result<&[f32]> {
        self.run(layer, x, None, observer)
    }

    /// The logits `[tokens, vocab]` of what the last block leaves in the residual stream.
    ///
    /// # Errors
    /// Rows that do not fit the model.
    pub fn logits(&mut self, x: &[f32]) -> Result<Vec<f32>> {
        let spec = &self.shared.model.spec;
        if x.is_empty() || !x.len().is_multiple_of(spec.width) {
            let problem = format!("{} numbers for rows of {}", x.len(), spec.width);
            return Err(Error::Argument { name: "x", problem });
        }
        sized(&mut self.ws.x, x.len()).copy_from_slice(x);
        head_input(&self.shared, &mut self.ws, &mut Nobody, None);
        let mut out = Vec::new();
        logits(&self.shared, &mut self.ws, x.len() / spec.width, &mut out);
        Ok(out)
    }

    fn run(
        &mut self,
        layer: usize,
        x: &[f32],
        rules: Option<&LayerPlan>,
        observer: &mut dyn Observer,
    ) -> Result<&[f32]> {
        let spec = &self.shared.model.spec;
        if layer >= spec.blocks.len() || x.is_empty() || !x.len().is_multiple_of(spec.width) {
            let problem = format!("{} numbers for block {layer} of width {}", x.len(), spec.width);
            return Err(Error::Argument { name: "x", problem });
        }
        let over = self.shared.model.per_layer.as_ref().map(|p| self.ws.per_layer.len() / p.table.inputs());
        if over.is_some_and(|n| n != x.len() / spec.width) {
            let problem = "this model has per-layer embeddings, and they were made for another number of tokens".into();
            return Err(Error::Argument { name: "x", problem });
        }
        self.kv.truncate(0);
        self.plan.layers[layer] = rules.cloned().unwrap_or_default();
        let n = x.len() / spec.width;
        let mode = if rules.is_some() { Mode::Masked } else { Mode::Prefill };
        let mut forward = Forward {
            shared: &self.shared,
            places: Places::following(&mut self.kv, 0, n),
            ws: &mut self.ws,
            counters: &mut self.counters,
            observer,
            plan: Some(&self.plan),
            mode,
        };
        forward.run_block(layer, x, n);
        Ok(&self.ws.x)
    }
}
