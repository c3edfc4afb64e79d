//! The server: an OpenAI-compatible interface over the engine, in three layers. [`http`] knows sockets and no model;
//! [`api`] turns requests into jobs by the table in [`fields`] and results into answers; [`schedule`] has the one thread
//! that runs the engine for all of them.
#![forbid(unsafe_code)]

pub mod api;
mod base64;
pub mod constraint;
pub mod error;
pub mod fields;
pub mod fuzz;
pub mod gbnf;
pub mod http;
pub mod metrics;
pub mod page;
mod run;
pub mod schedule;
pub mod tools;

pub use run::run;
