//! The server: an OpenAI-compatible interface over the engine, in three layers. [`http`] knows sockets and no model.
#![forbid(unsafe_code)]

pub mod constraint;
pub mod gbnf;
pub mod http;
pub mod page;
