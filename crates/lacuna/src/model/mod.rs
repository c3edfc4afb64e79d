//! Models: what an architecture is ([`spec`]), its weights ([`weights`]), and one file per architecture that maps
//! configuration and tensor names to both. No file here names a method.
//!
//! [`load`] takes a Hugging Face directory or a GGUF file. The way of a file: [`checkpoint`] opens it, [`arch`] finds the
//! architecture, its file turns the settings ([`fields`]) into a spec, [`bind`] puts the tensors ([`source`]) into their
//! places by the architecture's table of [`names`].

pub mod act;
pub mod arch;
pub mod bamboo;
pub mod bind;
pub mod checkpoint;
pub mod export;
pub mod fields;
pub mod gemma2;
pub mod gemma3;
pub mod gguf;
pub mod gpt2;
pub mod gpt_neox;
pub mod llama;
pub mod memory;
pub mod minicpm;
pub mod mistral;
pub mod mixtral;
pub mod names;
pub mod opt;
pub mod packed;
pub mod phi3;
pub mod qwen2;
pub mod qwen3;
pub mod qwen3_moe;
pub mod rope;
pub mod shape;
pub mod source;
pub mod spec;
pub mod tinystories_ple;
pub mod validate;
pub mod weights;

pub use checkpoint::{Checkpoint, LoadOptions, load};
pub use memory::{Demand, MemoryEstimate};
pub use weights::Model;
