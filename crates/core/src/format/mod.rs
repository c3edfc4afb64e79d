//! File formats. Every reader is a pure function from bytes to a checked view: it never panics, allocates no more than
//! twice the file and 16 MiB, and after it has returned no offset, shape or length needs another check.

pub mod config;
pub mod fuzz;
pub mod gguf;
pub mod packed;
pub mod safetensors;
