//! What a server says about itself.

use super::{State, now};
use crate::{
    error::{Error, Result},
    fields::FIELDS,
    http::{Reply, StatusCode},
};
use serde_json::{Map, Value, json};
use std::sync::atomic::Ordering;

/// `GET /health`.
pub(super) fn health(state: &State) -> Result<Reply> {
    if state.closed.load(Ordering::Relaxed) {
        return Err(Error::busy("the server is about to end"));
    }
    Ok(Reply::json(StatusCode::OK, json!({ "status": "ok" }).to_string()))
}

fn entry(state: &State, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "lacuna",
        "max_model_len": state.bounds.context,
        "meta": {
            "plan": name.strip_prefix(&state.names[0]).map(|p| p.trim_start_matches(':')).filter(|p| !p.is_empty()),
            "n_ctx": state.bounds.context,
            "n_vocab": state.bounds.vocab,
            "n_layer": state.bounds.layers,
            "architecture": state.engine.model().spec.arch,
        },
    })
}

/// `GET /v1/models`.
pub(super) fn models(state: &State) -> Reply {
    let data: Vec<_> = state.names.iter().map(|n| entry(state, n)).collect();
    Reply::json(StatusCode::OK, json!({ "object": "list", "data": data }).to_string())
}

/// `GET /v1/models/NAME`.
pub(super) fn model(state: &State, name: &str) -> Result<Reply> {
    let name = name.replace("%3A", ":").replace("%2F", "/");
    match state.names.iter().find(|n| **n == name) {
        Some(name) => Ok(Reply::json(StatusCode::OK, entry(state, name).to_string())),
        None => Err(Error::no_model(&name, &state.names)),
    }
}

/// `GET /tokenizer_info`.
pub(super) fn tokenizer(state: &State) -> Reply {
    let special = state.tokenizer.special();
    let literal = |id: Option<u32>| id.map(|id| state.tokenizer.literal(id));
    let eos = special.eos.first().copied();
    let body = json!({
        "bos_token": literal(special.bos),
        "eos_token": literal(eos),
        "pad_token": literal(eos),
        "bos_token_id": special.bos,
        "eos_token_id": eos,
        "eos_token_ids": special.eos,
        "vocab_size": state.tokenizer.len(),
        "chat_template": state.tokenizer.chat_template(),
    });
    Reply::json(StatusCode::OK, body.to_string())
}

/// `GET /props`.
pub(super) fn props(state: &State) -> Reply {
    let mut defaults = Map::new();
    for field in FIELDS.iter().filter(|f| f.on.contains(&crate::fields::Endpoint::Completions)) {
        let value = match field.absent {
            crate::fields::Absent::Bool(b) => Value::from(b),
            crate::fields::Absent::Int(n) => Value::from(n),
            crate::fields::Absent::Float(x) => Value::from(x),
            crate::fields::Absent::Word(w) => Value::from(w),
            crate::fields::Absent::Nothing(_) | crate::fields::Absent::Refused => continue,
        };
        defaults.insert(field.name.to_owned(), value);
    }
    let body = json!({
        "model": state.names[0],
        "models": state.names,
        "total_slots": state.options.parallel,
        "queue": state.options.queue,
        "n_ctx": state.bounds.context,
        "n_layer": state.bounds.layers,
        "prefix_cache_bytes": state.options.prefixes,
        "chat_template": state.tokenizer.chat_template(),
        "bos_token": state.tokenizer.special().bos.map(|id| state.tokenizer.literal(id)),
        "eos_token": state.tokenizer.special().eos.first().map(|id| state.tokenizer.literal(*id)),
        "default_generation_settings": { "n_ctx": state.bounds.context, "params": defaults },
        "uptime_seconds": now().saturating_sub(state.created),
        "version": env!("CARGO_PKG_VERSION"),
    });
    Reply::json(StatusCode::OK, body.to_string())
}

/// `GET /metrics`.
pub(super) fn metrics(state: &State) -> Reply {
    state.metrics.blocks.set(state.scheduler.blocks_in_use());
    state.metrics.waiting.set(state.scheduler.waiting());
    Reply::Full {
        status: StatusCode::OK,
        content_type: "text/plain; version=0.0.4; charset=utf-8",
        headers: Vec::new(),
        body: state.metrics.text(state.vllm_metrics).into(),
    }
}
