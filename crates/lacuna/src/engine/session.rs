//! One conversation: its tokens' keys and values, and the passes that extend them.

use super::{
    compiled::Counters,
    forward::{Forward, Mode, Nobody, Workspace, head_input, sized},
    kv::{KV_BLOCK, KvBlock, KvCache, Place, Places},
    kv_bytes_read,
    shared::Shared,
    tree::TokenTree,
    weight_bytes,
};
use crate::error::{Error, Result};
use lacuna_core::{observer::Observer, site::Point};
use lacuna_kernels::elementwise;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Rows of logits that [`Session::score`] holds at once.
const SCORE_ROWS: usize = 64;

/// Called with a position in the context and the logits that the token there gives for the next one.
pub type Sink<'a> = dyn FnMut(usize, &[f32]) + 'a;

/// A conversation.
pub struct Session {
    pub(super) shared: Arc<Shared>,
    pub(super) kv: KvCache,
    pub(super) ws: Workspace,
    /// Rows of the last pass.
    pub(super) logits: Vec<f32>,
    /// The row that [`Session::logits`] gives.
    pub(super) row: usize,
    pub(super) counters: Counters,
    pub(super) len: usize,
    context: usize,
    cancel: Arc<AtomicBool>,
    checked: Option<Checked>,
}

/// A tree that was checked and not yet settled: its keys and values are in the cache and its forks.
struct Checked {
    tree: TokenTree,
    /// For each node the caches (0: the trunk) that hold it.
    leaves: Vec<std::ops::Range<usize>>,
    forks: Vec<KvCache>,
    /// The last node that was accepted.
    at: Option<usize>,
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>, context: usize) -> Self {
        Self {
            kv: KvCache::new(shared.blocks.clone()),
            counters: Counters::new(shared.model.blocks.len()),
            shared,
            ws: Workspace::default(),
            logits: Vec::new(),
            row: 0,
            len: 0,
            context,
            cancel: Arc::default(),
            checked: None,
        }
    }

    /// Tokens in the context.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the context is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.shared.model.spec.vocab
    }

    /// Tokens that the context can hold.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits behind the last token of the context, one per token of the vocabulary; empty before the first pass, and
    /// those of another position after [`Session::truncate`] and [`Session::verify`].
    pub fn logits(&self) -> &[f32] {
        let vocab = self.shared.model.spec.vocab;
        self.logits.get(self.row * vocab..(self.row + 1) * vocab).unwrap_or_default()
    }

    /// What the decode steps have read and kept so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Sets the counters back.
    pub fn reset_counters(&mut self) {
        self.counters = Counters::new(self.counters.layers.len());
    }

    /// A flag for other threads: while it is set, passes end with [`Error::Cancelled`] before the next step or chunk.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.cancel.clone()
    }

    /// Forgets everything behind the first `len` tokens; more than there are changes nothing.
    pub fn truncate(&mut self, len: usize) {
        self.settle();
        self.len = len.min(self.len);
        self.kv.truncate(self.len);
    }

    /// The full blocks of the context, for other sessions that begin alike ([`Session::begin_with`]).
    pub fn blocks(&mut self) -> Vec<KvBlock> {
        self.settle();
        self.kv.whole(self.len)
    }

    /// Begins an empty context with blocks that another session of the engine has computed: the same as computing their
    /// tokens again. Neurons that follow the prompt do not see these tokens ([`super::Engine::follows_prompts`]).
    ///
    /// # Errors
    /// A context that is not empty or too small, or blocks of another engine.
    pub fn begin_with(&mut self, blocks: &[KvBlock]) -> Result<()> {
        let len = blocks.len() * KV_BLOCK;
        let error = |problem: &str| Err(Error::Argument { name: "blocks", problem: problem.into() });
        if !self.is_empty() {
            return error("the context is not empty");
        }
        if len > self.context {
            return Err(Error::Context { tokens: len, context: self.context });
        }
        if !self.kv.begin_with(blocks) {
            return error("they belong to another engine");
        }
        self.len = len;
        Ok(())
    }

    /// Computes all tokens of `tree` as continuations of the context, in one pass that reads the weights once. None of
    /// them is in the context until [`Session::accept`] takes it; [`Session::node_logits`] has their logits. Each node's
    /// logits have the bits that decoding its path token by token gives: with `dense` without the plan, otherwise by the
    /// plan.
    ///
    /// # Errors
    /// As [`Session::prefill`]; a tree of no or more than [`super::MAX_TREE`] tokens.
    pub fn verify(&mut self, tree: &TokenTree, dense: bool) -> Result<()> {
        tree.check()?;
        if !dense && self.shared.plan.as_ref().is_some_and(|p| p.masked) {
            return Err(Error::Argument {
                name: "plan",
                problem: "a masked plan has no decode passes to check".into(),
            });
        }
        self.check(tree.tokens(), tree.height())?;
        self.check_cancelled()?;
        self.settle();
        let (leaves, start, n) = (tree.leaves(), self.len, tree.len());
        let all = leaves.iter().map(|l| l.end).max().unwrap_or(1);
        let mut forks: Vec<_> = (1..all).map(|_| self.kv.fork(start)).collect();
        let place = |i: usize| Place { position: start + tree.depth(i), caches: leaves[i].clone() };
        let rows = (0..n).map(place).collect();
        let places = Places::new(std::iter::once(&mut self.kv).chain(&mut forks).collect(), rows);
        let (shared, ws, counters) = (&*self.shared, &mut self.ws, &mut self.counters);
        let mode = if dense { Mode::Dense } else { Mode::Decode }.under(self.shared.plan.as_deref());
        Forward { shared, places, ws, counters, observer: &mut Nobody, plan: shared.plan.as_deref(), mode }
            .run(tree.tokens());
        self.counters.steps += 1;
        self.count_head(1);
        self.counters.kv_bytes += (0..n).map(|i| kv_bytes_read(&self.shared, start + tree.depth(i) + 1)).sum::<u64>();
        self.checked = Some(Checked { tree: tree.clone(), leaves, forks, at: None });
        head_input(&self.shared, &mut self.ws, &mut Nobody, None);
        self.row = 0;
        logits(&self.shared, &mut self.ws, n, &mut self.logits);
        let vocab = self.shared.model.spec.vocab;
        let mut rows = self.logits.chunks_exact(vocab).enumerate();
        rows.try_for_each(|(i, row)| check_finite(row, start + tree.depth(i)))
    }

    /// Logits behind node `node` of the tree that was checked last.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn node_logits(&self, node: usize) -> &[f32] {
        let vocab = self.shared.model.spec.vocab;
        &self.logits[node * vocab..(node + 1) * vocab]
    }

    /// Takes node `node` of the checked tree into the context and returns its logits.
    ///
    /// # Errors
    /// No tree was checked since the last pass, or the node does not continue the one that was accepted last.
    pub fn accept(&mut self, node: usize) -> Result<&[f32]> {
        let fits = |c: &Checked| node < c.tree.len() && c.tree.parent(node) == c.at;
        let Some(checked) = self.checked.as_mut().filter(|c| fits(c)) else {
            let problem = format!("{node} does not continue what was accepted");
            return Err(Error::Argument { name: "node", problem });
        };
        checked.at = Some(node);
        self.row = node;
        self.len += 1;
        Ok(self.logits())
    }

    /// Keeps the keys and values of the accepted path and gives back the others.
    pub(super) fn settle(&mut self) {
        let Some(checked) = self.checked.take() else { return };
        let mut forks = checked.forks;
        if let Some(fork) = checked.at.and_then(|at| checked.leaves[at].start.checked_sub(1)) {
            self.kv = forks.swap_remove(fork);
        }
        self.kv.truncate(self.len);
    }

    /// Appends `tokens` to the context in chunks and returns the logits of the last one.
    ///
    /// # Errors
    /// Before any work: no tokens, tokens outside the vocabulary, or more than the context holds. Later: cancelled, or
    /// logits that are not numbers.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.extend(tokens, Mode::Prefill, &mut Nobody, None)?;
        self.last_logits((tokens.len() - 1) % self.shared.prefill_chunk, &mut Nobody)
    }

    /// [`Session::prefill`] that gives `sink` the logits of every position, up to rounding. Memory does not grow with the
    /// text.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn score(&mut self, tokens: &[u32], sink: &mut Sink<'_>) -> Result<()> {
        self.extend(tokens, Mode::Prefill, &mut Nobody, Some(sink))?;
        // The sink's come from a matrix product; what stays are the bits that prefill leaves.
        self.last_logits((tokens.len() - 1) % self.shared.prefill_chunk, &mut Nobody).map(|_| ())
    }

    /// [`Session::score`] under the engine's plan: every token through its own selection, as decode would choose it, at
    /// the speed of prefill. Counts what decode would have read. Equal to decoding step by step up to rounding.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn score_masked(&mut self, tokens: &[u32], sink: &mut Sink<'_>) -> Result<()> {
        let start = self.len;
        self.extend(tokens, Mode::Masked, &mut Nobody, Some(sink))?;
        for depth in start + 1..=self.len {
            self.counters.steps += 1;
            self.count_head(1);
            self.counters.kv_bytes += kv_bytes_read(&self.shared, depth);
        }
        Ok(())
    }

    /// Appends `tokens` and shows the points of the dense forward pass to `observer`; no logits.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn observe(&mut self, tokens: &[u32], observer: &mut dyn Observer) -> Result<()> {
        self.extend(tokens, Mode::Prefill, observer, None)
    }

    /// Appends one token, sparsely where there is a plan, and returns its logits.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, token: u32) -> Result<&[f32]> {
        self.step(token, &mut Nobody)
    }

    /// [`Session::decode`] that shows the points of the pass to `observer`.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode_observed(&mut self, token: u32, observer: &mut dyn Observer) -> Result<&[f32]> {
        self.step(token, observer)
    }

    fn step(&mut self, token: u32, observer: &mut dyn Observer) -> Result<&[f32]> {
        self.check(&[token], 1)?;
        self.check_cancelled()?;
        self.settle();
        let masked = self.shared.plan.as_ref().is_some_and(|p| p.masked);
        self.forward(&[token], if masked { Mode::Masked } else { Mode::Decode }, observer);
        self.counters.steps += 1;
        self.count_head(1);
        self.counters.kv_bytes += kv_bytes_read(&self.shared, self.len);
        self.last_logits(0, observer)
    }

    /// Counts the embedding of a row and this session's part of the head's bytes, which `sharers` sessions read together.
    pub(super) fn count_head(&mut self, sharers: usize) {
        self.counters.weight_bytes += self.shared.model.embed.matrix().row_bytes() as u64;
        self.counters.weight_bytes += weight_bytes(&self.shared.model.head) / sharers as u64;
    }

    /// Checks everything that can be known before any work; `grow` is by how much the context grows at most.
    pub(super) fn check(&self, tokens: &[u32], grow: usize) -> Result<()> {
        let vocab = self.shared.model.spec.vocab;
        if tokens.is_empty() {
            return Err(Error::Argument { name: "tokens", problem: "there are none".into() });
        }
        let need = self.len.saturating_add(grow);
        if need > self.context {
            return Err(Error::Context { tokens: need, context: self.context });
        }
        match tokens.iter().find(|&&t| t as usize >= vocab) {
            Some(t) => Err(Error::Argument {
                name: "tokens",
                problem: format!("{t} is outside the vocabulary of {vocab}; is this the model's tokenizer?"),
            }),
            None => Ok(()),
        }
    }

    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    fn extend(
        &mut self,
        tokens: &[u32],
        mode: Mode,
        observer: &mut dyn Observer,
        mut sink: Option<&mut Sink<'_>>,
    ) -> Result<()> {
        self.check(tokens, tokens.len())?;
        self.settle();
        for chunk in tokens.chunks(self.shared.prefill_chunk) {
            self.check_cancelled()?;
            self.forward(chunk, mode, observer);
            if observer.wants(Point::Head) {
                head_input(&self.shared, &mut self.ws, observer, None);
            }
            if let Some(sink) = sink.as_deref_mut() {
                self.score_chunk(chunk.len(), sink)?;
            }
        }
        Ok(())
    }

    pub(super) fn forward(&mut self, tokens: &[u32], mode: Mode, observer: &mut dyn Observer) {
        let places = Places::following(&mut self.kv, self.len, tokens.len());
        let (shared, ws) = (&*self.shared, &mut self.ws);
        let plan = shared.plan.as_deref();
        // What is read for a prompt is not counted, whatever the pass.
        let mut unseen = Counters::new(shared.model.blocks.len());
        let counters = if mode == Mode::Prefill { &mut unseen } else { &mut self.counters };
        Forward { shared, places, ws, counters, observer, plan, mode: mode.under(plan) }.run(tokens);
        self.len += tokens.len();
    }

    /// Logits of row `row` of the residual stream.
    pub(super) fn last_logits(&mut self, row: usize, observer: &mut dyn Observer) -> Result<&[f32]> {
        let shared = &*self.shared;
        head_input(shared, &mut self.ws, observer, Some(row));
        self.row = 0;
        logits(shared, &mut self.ws, 1, &mut self.logits);
        check_finite(&self.logits, self.len - 1)?;
        Ok(&self.logits)
    }

    /// Gives `sink` the logits of the last `n` positions.
    fn score_chunk(&mut self, n: usize, sink: &mut Sink<'_>) -> Result<()> {
        head_input(&self.shared, &mut self.ws, &mut Nobody, None);
        self.row = 0;
        let shared = &*self.shared;
        let spec = &shared.model.spec;
        let Workspace { h, linears, .. } = &mut self.ws;
        for (i, x) in h.chunks(SCORE_ROWS * spec.width).enumerate() {
            let rows = x.len() / spec.width;
            let logits = sized(&mut self.logits, rows * spec.vocab);
            linears.prefill(&shared.pool, x, rows, &mut [(&shared.model.head, &mut *logits)]);
            for (r, logits) in logits.chunks_exact_mut(spec.vocab).enumerate() {
                if let Some(cap) = spec.logit_cap {
                    elementwise::cap(logits, cap);
                }
                let position = self.len - n + i * SCORE_ROWS + r;
                check_finite(logits, position)?;
                sink(position, logits);
            }
        }
        // What stays is the last row, as after other passes.
        let last = self.logits.len() - spec.vocab;
        self.logits.drain(..last);
        Ok(())
    }
}

/// Logits of the `n` rows in `ws.h`, each with the bits that it has alone.
pub(super) fn logits(shared: &Shared, ws: &mut Workspace, n: usize, logits: &mut Vec<f32>) {
    let spec = &shared.model.spec;
    let logits = sized(logits, n * spec.vocab);
    let Workspace { h, linears, .. } = ws;
    linears.dense(&shared.pool, h, n, &mut [(&shared.model.head, &mut *logits)]);
    if let Some(cap) = spec.logit_cap {
        logits.chunks_exact_mut(spec.vocab).for_each(|row| elementwise::cap(row, cap));
    }
}

pub(super) fn check_finite(logits: &[f32], position: usize) -> Result<()> {
    match logits.iter().find(|l| !l.is_finite()) {
        Some(&value) => Err(Error::BadLogits { position, value }),
        None => Ok(()),
    }
}
