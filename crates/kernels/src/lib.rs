//! Kernels of Lacuna: slices in, slices out.
//!
//! This crate knows numbers in memory and nothing else: no tensor, no model, no file. Every fast path has a readable
//! scalar twin, which is the reference that the property tests compare with. It is the only crate with `unsafe` code
//! (beside the one memory-map wrapper in `lacuna-core`).
//!
//! * [`attention`]: attention over a paged key/value cache, for one query and for many.
//! * [`axpy`]: weighted sums of chosen input channels (decode).
//! * [`bitmap`]: matrices without their zeros: a bit per position, and the kept values.
//! * [`codebook`]: matrices of two to four bits: codes of pairs of weights, and small books of what they stand for.
//! * [`convert`]: one run of numbers from and to its stored form.
//! * [`elementwise`]: norms, softmax, rotary embedding, activations.
//! * [`mod@format`]: how one row of numbers is stored (f32, f16, bf16, quantised blocks).
//! * [`gemm`]: matrix products for prefill.
//! * [`gemv`]: dot products of one vector with all or chosen rows (decode).
//! * [`isa`]: the one place that picks an instruction set.
//! * [`pool`]: the one place that makes threads.
//! * [`probe`]: what this machine can do at best.
//! * [`select`]: which entries of a vector stay.

pub mod attention;
pub mod axpy;
pub mod bitmap;
pub mod codebook;
pub mod convert;
pub mod elementwise;
pub mod format;
pub mod gemm;
pub mod gemv;
pub mod isa;
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod pool;
pub mod probe;
pub mod select;
#[cfg(test)]
mod testing;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use format::{Format, Matrix};
pub use isa::Isa;
pub use pool::Pool;
