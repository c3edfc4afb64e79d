//! Texts, token ids and templates, without the engine.

use super::{State, prepare::short_enough};
use crate::{
    error::{Error, Result},
    fields::{Endpoint, Values},
    http::{Reply, StatusCode},
    tools::{self, Tools},
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
    let known = state.tokenizer.chat_template().is_some_and(tools::template_knows);
    let (messages, list) = match offered(values)? {
        Some(tools) if known => (tools::for_template(messages), Some(tools.list)),
        Some(tools) => (tools.told(messages), None),
        None => (tools::for_template(messages), None),
    };
    let answer = values.flag("add_generation_prompt");
    let text = template.render_with(&messages, &list, answer).map_err(|e| Error::field("messages", e))?;
    short_enough(state, "messages", &text)?;
    Ok(text)
}

/// The tools that a request offers to the model.
pub(super) fn offered(values: &Values) -> Result<Option<Tools>> {
    Tools::read(values.json("tools"), values.json("tool_choice"))
        .map_err(|(field, problem)| Error::field(field, problem))
}
