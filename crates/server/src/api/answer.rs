//! What is common to the answers of completions and chat.

use super::{Arrival, Running, State, prepare::Prepared, stream};
use crate::{
    error::{Error, Result},
    http::{Reply, StatusCode},
    schedule::{Activity, Done, Event, Failure, Finish, Usage},
};
use serde_json::{Value, json};
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// The answers of a request as they grow. In a stream, what was told is taken out.
pub(super) trait Answers: Send + Sized + 'static {
    /// How ids begin.
    const ID: &'static str;
    /// The kind of object that an answer is.
    const WHOLE: &'static str;
    /// The kind of object that an event of a stream is.
    const PART: &'static str;

    /// Nothing is answered yet.
    fn new(state: &State, common: Common) -> Self;

    /// What all kinds keep.
    fn common(&self) -> &Common;

    /// Takes news of one answer.
    fn take(&mut self, state: &State, index: usize, event: Event);

    /// The choices of an answer that is sent whole.
    fn choices(&mut self) -> Vec<Value>;

    /// The events that a stream begins with.
    fn begin(&mut self) -> Vec<Value>;

    /// The events that one answer's news make.
    fn tell(&mut self, index: usize) -> Vec<Value>;
}

/// Queues the jobs of a request and answers it, whole or as a stream.
pub(super) async fn reply<A: Answers>(state: Arc<State>, mut prepared: Prepared, arrival: Arrival) -> Result<Reply> {
    let group = state.ids.fetch_add(1, Ordering::Relaxed);
    let running = state.submit(|events| prepared.jobs(group, &arrival, &events))?;
    let (id, streams) = (state.id(A::ID), prepared.stream);
    let model = state.names[prepared.plan].clone();
    let answers = A::new(&state, Common { id, created: arrival.seconds, model, prepared, sum: Sum::default() });
    if streams { Ok(stream::reply(state, running, answers)) } else { whole(&state, running, answers).await }
}

async fn whole<A: Answers>(state: &State, mut running: Running, mut answers: A) -> Result<Reply> {
    while let Some((index, event)) = running.next().await {
        if let Event::Failed(Failure::Panic | Failure::Engine) = event {
            answers.common().failed(state, Failure::Panic);
            return Err(Error::internal("the answer failed by a fault of the server; others are not affected"));
        }
        answers.take(state, index, event);
    }
    running.check()?;
    let choices = answers.choices();
    let common = answers.common();
    let mut body = common.frame(A::WHOLE, choices);
    body["usage"] = common.sum.usage();
    body["timings"] = common.timings();
    Ok(Reply::json(StatusCode::OK, body.to_string()))
}

/// What the answers of a request have in common.
pub(super) struct Common {
    id: String,
    created: u64,
    model: String,
    pub prepared: Prepared,
    sum: Sum,
}

impl Common {
    /// An object of this kind.
    pub fn frame(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }

    /// The event behind the last choice, where it was asked for.
    pub fn usage<A: Answers>(&self) -> Option<Value> {
        let mut last = self.prepared.include_usage.then(|| self.frame(A::PART, Vec::new()))?;
        last["usage"] = self.sum.usage();
        Some(last)
    }

    /// The object `timings`.
    pub fn timings(&self) -> Value {
        self.sum.timings()
    }

    /// Counts an answer that failed, says so in the log, and gives the word for it.
    pub fn failed(&self, state: &State, failure: Failure) -> &'static str {
        state.metrics.failed.add(1);
        tracing::warn!(id = self.id, ?failure, "failed");
        "error"
    }

    /// Counts an answer that ended well, and gives the word for why it did.
    pub fn ended(&mut self, state: &State, index: usize, done: &Done) -> &'static str {
        self.sum.add(index, self.prepared.n, &done.usage);
        ended(state, &self.id, done.finish, &done.usage)
    }
}

/// Counts an answer, and logs its counts and times; never its text.
fn ended(state: &State, id: &str, finish: Finish, usage: &Usage) -> &'static str {
    let reason = match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    };
    let counter = match finish {
        Finish::Stop => &state.metrics.stopped,
        Finish::Length => &state.metrics.length,
    };
    counter.add(1);
    state.metrics.answer_seconds.observe(usage.queued + usage.prefill + usage.decode);
    tracing::info!(
        id,
        finish = reason,
        prompt = usage.prompt,
        cached = usage.cached,
        generated = usage.generated,
        queue_ms = usage.queued.as_millis() as u64,
        prefill_ms = usage.prefill.as_millis() as u64,
        decode_ms = usage.decode.as_millis() as u64,
        "answered"
    );
    reason
}

/// Counts over the answers of a request; a prompt with several answers counts once.
#[derive(Default)]
struct Sum {
    prompt: usize,
    generated: usize,
    /// The last answer that ended, for the timings.
    last: Usage,
}

impl Sum {
    /// Adds answer `index`, of `n` per prompt.
    fn add(&mut self, index: usize, n: usize, usage: &Usage) {
        if index.is_multiple_of(n) {
            self.prompt += usage.prompt;
        }
        self.generated += usage.generated;
        self.last = *usage;
    }

    /// The object `usage`.
    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": { "cached_tokens": self.last.cached },
        })
    }

    /// The object `timings`: of the answer that ended last.
    fn timings(&self) -> Value {
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let rate = |n: usize, d: Duration| n as f64 / d.as_secs_f64().max(1e-6);
        let u = &self.last;
        json!({
            "queue_ms": ms(u.queued),
            "cache_n": u.cached,
            "prompt_n": u.prompt - u.cached,
            "prompt_ms": ms(u.prefill),
            "prompt_per_second": rate(u.prompt - u.cached, u.prefill),
            "predicted_n": u.generated,
            "predicted_ms": ms(u.decode),
            // The first token comes from the prompt's pass.
            "predicted_per_second": rate(u.generated.saturating_sub(1), u.decode),
        })
    }
}

/// The object `lacuna`.
pub(super) fn activity(a: &Activity) -> Value {
    json!({
        "bytes": a.bytes,
        "sites": a.sites,
        "kept": a.kept,
        "strip": { "layer": a.strip.layer, "cells": a.strip.cells },
    })
}
