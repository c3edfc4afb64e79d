//! Lacuna, the library: models, the engine that runs them, and the measures of what skipping costs and saves.
#![forbid(unsafe_code)]

pub mod cache;
pub mod calibrate;
pub mod chat;
pub mod compare;
pub mod compress;
pub mod embedded;
pub mod engine;
pub mod error;
pub mod eval;
pub mod fuzz;
pub mod hub;
pub mod model;
pub mod reference;
pub mod tokenizer;
