//! The next token of several sessions in one pass.

use super::{
    Engine,
    compiled::{CompiledPlan, Counters, SiteCount},
    forward::{Forward, Mode, Nobody, head_input},
    kv::{Place, Places},
    kv_bytes_read,
    session::{Session, check_finite, logits},
};
use crate::error::{Error, Result};
use lacuna_core::plan::Cut;
use std::sync::Arc;

impl Engine {
    /// Appends one token to each session, by the plan where there is one, and reads the dense weights once for all.
    /// [`Session::logits`] then has each session's logits, with the bits that [`Session::decode`] gives it alone. The
    /// counters of the sessions get equal parts of the weights' bytes and of the plan's counts. A plan whose neurons
    /// follow the prompt is run session by session.
    ///
    /// # Errors
    /// Before any work: no sessions, a session of another engine, and as [`Session::decode`] for any of them (also a
    /// cancelled one). Afterwards: logits that are not numbers, with all sessions extended.
    pub fn decode_batch(&self, rows: &mut [(&mut Session, u32)]) -> Result<()> {
        let error = |problem: &str| Err(Error::Argument { name: "sessions", problem: problem.into() });
        for (session, token) in rows.iter() {
            if !Arc::ptr_eq(&session.shared, &self.shared) {
                return error("one belongs to another engine");
            }
            session.check(&[*token], 1)?;
            session.check_cancelled()?;
        }
        let shared = &*self.shared;
        if shared.plan.as_deref().is_some_and(alone) {
            return rows.iter_mut().try_for_each(|(session, token)| session.decode(*token).map(|_| ()));
        }
        let Some((first, _)) = rows.first_mut() else { return error("there are none") };
        let mut ws = std::mem::take(&mut first.ws);
        let mut all = std::mem::take(&mut first.logits);
        rows.iter_mut().for_each(|(session, _)| session.settle());
        let tokens: Vec<u32> = rows.iter().map(|(_, token)| *token).collect();
        let mut counters = Counters::new(self.shared.model.blocks.len());
        let place = |(i, row): (usize, &(&mut Session, u32))| Place { position: row.0.len, caches: i..i + 1 };
        let places = rows.iter().enumerate().map(place).collect();
        let places = Places::new(rows.iter_mut().map(|(session, _)| &mut session.kv).collect(), places);
        let mode = Mode::Decode;
        Forward {
            shared,
            places,
            ws: &mut ws,
            counters: &mut counters,
            observer: &mut Nobody,
            plan: shared.plan.as_deref(),
            mode,
        }
        .run(&tokens);
        head_input(shared, &mut ws, &mut Nobody, None);
        logits(shared, &mut ws, rows.len(), &mut all);
        let (n, vocab) = (rows.len(), shared.model.spec.vocab);
        for (i, ((session, _), row)) in rows.iter_mut().zip(all.chunks_exact(vocab)).enumerate() {
            session.logits.clear();
            session.logits.extend_from_slice(row);
            session.row = 0;
            session.len += 1;
            session.counters.add_part(&counters, i, n);
            session.count_head(n);
            session.counters.kv_bytes += kv_bytes_read(shared, session.len);
        }
        if let Some((first, _)) = rows.first_mut() {
            first.ws = ws;
        }
        rows.iter().try_for_each(|(session, _)| check_finite(session.logits(), session.len - 1))
    }
}

/// Whether the plan must run session by session: what it keeps lies with the session, or it masks rows of prefill.
fn alone(plan: &CompiledPlan) -> bool {
    plan.masked || follows_prompts(plan)
}

/// Whether the plan has neurons that follow the prompt.
pub(super) fn follows_prompts(plan: &CompiledPlan) -> bool {
    let mut rules = plan.layers.iter().filter_map(|layer| layer.neurons.as_ref());
    rules.any(|rule| matches!(rule.selector.cut, Cut::Prompt { .. }))
}

impl Counters {
    /// Adds part `i` of the `n` equal parts of a shared pass.
    fn add_part(&mut self, pass: &Self, i: usize, n: usize) {
        let part = |all: u64| all / n as u64 + u64::from((i as u64) < all % n as u64);
        let add = |to: &mut SiteCount, from: &SiteCount| {
            to.kept += part(from.kept);
            to.total += part(from.total);
        };
        self.steps += 1;
        self.weight_bytes += part(pass.weight_bytes);
        for (to, from) in self.layers.iter_mut().zip(&pass.layers) {
            to.inputs.iter_mut().zip(&from.inputs).for_each(|(to, from)| add(to, from));
            add(&mut to.neurons, &from.neurons);
        }
    }
}
