//! What is common to the answers of completions and chat.

use super::State;
use crate::schedule::{Activity, Failure, Finish, Usage};
use serde_json::{Value, json};
use std::time::Duration;

/// The word for why an answer ended.
pub(super) fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

/// Counts a failed answer and says so in the log.
pub(super) fn failed(state: &State, id: &str, failure: Failure) {
    state.metrics.failed.add(1);
    tracing::warn!(id, ?failure, "failed");
}

/// Counts an answer that ended well, and logs its counts and times; never its text.
pub(super) fn ended(state: &State, id: &str, finish: Finish, usage: &Usage) {
    let counter = match finish {
        Finish::Stop => &state.metrics.stopped,
        Finish::Length => &state.metrics.length,
    };
    counter.add(1);
    state.metrics.answer_seconds.observe(usage.queued + usage.prefill + usage.decode);
    tracing::info!(
        id,
        finish = reason(finish),
        prompt = usage.prompt,
        cached = usage.cached,
        generated = usage.generated,
        queue_ms = usage.queued.as_millis() as u64,
        prefill_ms = usage.prefill.as_millis() as u64,
        decode_ms = usage.decode.as_millis() as u64,
        "answered"
    );
}

/// Counts over the answers of a request; a prompt with several answers counts once.
#[derive(Default)]
pub(super) struct Sum {
    prompt: usize,
    generated: usize,
    /// The last answer that ended, for the timings.
    last: Usage,
}

impl Sum {
    /// Adds answer `index`, of `n` per prompt.
    pub fn add(&mut self, index: usize, n: usize, usage: &Usage) {
        if index.is_multiple_of(n) {
            self.prompt += usage.prompt;
        }
        self.generated += usage.generated;
        self.last = *usage;
    }

    /// The object `usage`.
    pub fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": { "cached_tokens": self.last.cached },
        })
    }

    /// The object `timings`: of the answer that ended last.
    pub fn timings(&self) -> Value {
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
