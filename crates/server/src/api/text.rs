//! Texts, token ids and templates, without the engine.

use super::{State, prepare::short_enough};
use crate::{
    error::{Error, Result},
    fields::{Endpoint, Values},
    http::{Reply, StatusCode},
};
use serde_json::{Value, json};

/// `POST /tokenize`.
pub(super) fn tokenize(state: &State, body: &[u8]) -> Result<Reply> {
    let values = state.read(Endpoint::Tokenize, body)?;
    state.plan(&values)?;
    let text = values.text("prompt").unwrap_or_default();
    let ids = state.tokenizer.encode(text, values.flag("add_special_tokens")).map_err(|e| Error::field("prompt", e))?;
    let body = json!({ "count": ids.len(), "max_model_len": state.bounds.context, "tokens": ids });
    Ok(Reply::json(StatusCode::OK, body.to_string()))
}

/// `POST /detokenize`.
pub(super) fn detokenize(state: &State, body: &[u8]) -> Result<Reply> {
    let mut values = state.read(Endpoint::Detokenize, body)?;
    state.plan(&values)?;
    let text = state.tokenizer.decode(&values.take_ids("tokens"));
    let body = json!({ "prompt": text, "content": text });
    Ok(Reply::json(StatusCode::OK, body.to_string()))
}

/// `POST /apply-template`.
pub(super) fn template(state: &State, body: &[u8]) -> Result<Reply> {
    let values = state.read(Endpoint::Template, body)?;
    state.plan(&values)?;
    let body = json!({ "prompt": conversation(state, &values)? });
    Ok(Reply::json(StatusCode::OK, body.to_string()))
}

/// The text of a conversation by the model's template. The template is the operator's; its instructions are counted, so
/// that it ends.
pub(super) fn conversation(state: &State, values: &Values) -> Result<String> {
    let template = state.template.as_ref().map_err(|e| Error::field("messages", e))?;
    let messages = values.json("messages").unwrap_or(&Value::Null);
    let given: usize =
        messages.as_array().into_iter().flatten().filter_map(|m| m["content"].as_str()).map(str::len).sum();
    let least = given / state.longest;
    if least > state.bounds.context {
        return Err(Error::context("messages", format_args!("at least {least}"), state.bounds.context));
    }
    let tools = values.json("tools").filter(|t| t.as_array().is_some_and(|t| !t.is_empty()));
    let answer = values.flag("add_generation_prompt");
    let text = template.render_with(messages, &tools, answer).map_err(|e| Error::field("messages", e))?;
    short_enough(state, "messages", &text)?;
    Ok(text)
}
