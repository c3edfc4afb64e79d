//! One conversation: its tokens' keys and values, and the passes that extend them.

use super::{
    compiled::Counters,
    forward::{Forward, Mode, Nobody, Workspace, sized},
    kv::KvCache,
    kv_bytes_read,
    shared::Shared,
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
    shared: Arc<Shared>,
    kv: KvCache,
    ws: Workspace,
    logits: Vec<f32>,
    counters: Counters,
    len: usize,
    context: usize,
    cancel: Arc<AtomicBool>,
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>, context: usize) -> Self {
        Self {
            kv: KvCache::new(shared.blocks.clone()),
            counters: Counters::new(shared.model.blocks.len()),
            shared,
            ws: Workspace::default(),
            logits: Vec::new(),
            len: 0,
            context,
            cancel: Arc::default(),
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

    /// Tokens that the context can hold.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits of the last pass, one per token of the vocabulary; empty before the first.
    pub fn logits(&self) -> &[f32] {
        &self.logits
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
        self.len = len.min(self.len);
        self.kv.truncate(self.len);
    }

    /// Appends `tokens` to the context in chunks and returns the logits of the last one.
    ///
    /// # Errors
    /// Before any work: no tokens, tokens outside the vocabulary, or more than the context holds. Later: cancelled, or
    /// logits that are not numbers.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.extend(tokens, &mut Nobody, None)?;
        self.last_logits((tokens.len() - 1) % self.shared.prefill_chunk, &mut Nobody)
    }

    /// [`Session::prefill`] that gives `sink` the logits of every position. Memory does not grow with the text.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn score(&mut self, tokens: &[u32], sink: &mut Sink<'_>) -> Result<()> {
        self.extend(tokens, &mut Nobody, Some(sink))
    }

    /// Appends `tokens` and shows the points of the dense forward pass to `observer`; no logits.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn observe(&mut self, tokens: &[u32], observer: &mut dyn Observer) -> Result<()> {
        self.extend(tokens, observer, None)
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
        self.check(&[token])?;
        self.check_cancelled()?;
        self.forward(&[token], Mode::Decode, observer);
        self.counters.steps += 1;
        self.counters.weight_bytes += self.shared.model.embed.matrix().row_bytes() as u64;
        self.counters.weight_bytes += weight_bytes(&self.shared.model.head);
        self.counters.kv_bytes += kv_bytes_read(&self.shared, self.len);
        self.last_logits(0, observer)
    }

    /// Checks everything that can be known before any work.
    fn check(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.shared.model.spec.vocab;
        if tokens.is_empty() {
            return Err(Error::Argument { name: "tokens", problem: "there are none".into() });
        }
        let need = self.len.saturating_add(tokens.len());
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

    fn check_cancelled(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    fn extend(&mut self, tokens: &[u32], observer: &mut dyn Observer, mut sink: Option<&mut Sink<'_>>) -> Result<()> {
        self.check(tokens)?;
        for chunk in tokens.chunks(self.shared.prefill_chunk) {
            self.check_cancelled()?;
            self.forward(chunk, Mode::Prefill, observer);
            if observer.wants(Point::Head) {
                self.pass(Mode::Prefill, observer).head_input(None);
            }
            if let Some(sink) = sink.as_deref_mut() {
                self.score_chunk(chunk.len(), sink)?;
            }
        }
        Ok(())
    }

    fn pass<'a>(&'a mut self, mode: Mode, observer: &'a mut dyn Observer) -> Forward<'a> {
        let (shared, kv, ws, counters) = (&*self.shared, &mut self.kv, &mut self.ws, &mut self.counters);
        Forward { shared, kv, ws, counters, observer, start: self.len, mode }
    }

    fn forward(&mut self, tokens: &[u32], mode: Mode, observer: &mut dyn Observer) {
        self.pass(mode, observer).run(tokens);
        self.len += tokens.len();
    }

    /// Logits of row `row` of the residual stream.
    fn last_logits(&mut self, row: usize, observer: &mut dyn Observer) -> Result<&[f32]> {
        self.pass(Mode::Decode, observer).head_input(Some(row));
        let shared = &*self.shared;
        let logits = sized(&mut self.logits, shared.model.spec.vocab);
        let Workspace { h, linears, .. } = &mut self.ws;
        linears.dense(&shared.pool, h, &mut [(&shared.model.head, &mut *logits)]);
        if let Some(cap) = shared.model.spec.logit_cap {
            elementwise::cap(logits, cap);
        }
        check_finite(logits, self.len - 1)?;
        Ok(&self.logits)
    }

    /// Gives `sink` the logits of the last `n` positions.
    fn score_chunk(&mut self, n: usize, sink: &mut Sink<'_>) -> Result<()> {
        self.pass(Mode::Prefill, &mut Nobody).head_input(None);
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

fn check_finite(logits: &[f32], position: usize) -> Result<()> {
    match logits.iter().find(|l| !l.is_finite()) {
        Some(&value) => Err(Error::BadLogits { position, value }),
        None => Ok(()),
    }
}
