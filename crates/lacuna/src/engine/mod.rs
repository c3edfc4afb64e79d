//! The engine.

pub mod sampler;
