//! What a client is told when a request cannot be answered: `{"error": {"message", "type", "param", "code"}}`.

use crate::http::{HeaderValue, Reply, StatusCode, header};
use serde_json::json;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A request that is refused, and how the client is told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The status of the answer.
    pub status: StatusCode,
    /// What is wrong, and what would do.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// A word for programs.
    pub code: &'static str,
    /// After how many seconds it is worth trying again.
    pub retry_after: Option<u32>,
}

impl Error {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code, retry_after: None }
    }

    /// The request as a whole is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    /// A field is wrong.
    pub fn field(name: &str, message: impl std::fmt::Display) -> Self {
        let message = format!("`{name}`: {message}");
        Self { param: Some(name.to_owned()), ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message) }
    }

    /// A prompt that does not fit.
    pub fn context(name: &str, tokens: impl std::fmt::Display, context: usize) -> Self {
        let message = format!("`{name}`: the prompt has {tokens} tokens, but the context holds {context}; shorten it");
        let code = "context_length_exceeded";
        Self { param: Some(name.to_owned()), ..Self::new(StatusCode::BAD_REQUEST, code, message) }
    }

    /// There is no such model.
    pub fn no_model(name: &str, known: &[String]) -> Self {
        let message = format!("there is no model `{}` here; there are: {}", shown(name), known.join(", "));
        Self { param: Some("model".into()), ..Self::new(StatusCode::NOT_FOUND, "model_not_found", message) }
    }

    /// The queue is full, or the server is about to stop.
    pub fn busy(message: &str) -> Self {
        Self { retry_after: Some(1), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message) }
    }

    /// A fault of the server.
    pub fn internal(message: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// The JSON object that tells the client.
    pub fn to_json(&self) -> serde_json::Value {
        let kind = match self.status {
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            s if s.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}

impl From<Error> for Reply {
    fn from(e: Error) -> Self {
        let retry = e.retry_after.map(|s| (header::RETRY_AFTER, HeaderValue::from(s)));
        Self::Full {
            status: e.status,
            content_type: "application/json",
            headers: retry.into_iter().collect(),
            body: e.to_json().to_string().into(),
        }
    }
}

/// `text`, cut where it is long: messages repeat what was sent, and must not be as long.
pub fn shown(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}
