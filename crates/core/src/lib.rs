//! What every part of Lacuna shares: sites, selectors, plans, recipes, stored weights, file formats and their errors.
//!
//! This crate is the boundary to untrusted input: every parser here is a pure function from bytes to checked views.
#![deny(unsafe_code)]

pub mod atomic;
pub mod bytes;
pub mod compress;
pub mod error;
pub mod firing;
pub mod format;
pub mod hash;
pub mod histogram;
pub mod map;
pub mod method;
pub mod observer;
pub mod pair;
pub mod plan;
pub mod recipe;
pub mod site;
pub mod size;
pub mod statistics;
pub mod suggest;
pub mod tensor;
pub mod weight;

pub use error::{Error, Result};
