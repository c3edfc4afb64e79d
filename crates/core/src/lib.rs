//! What every part of Lacuna shares: sites, selectors, plans, recipes, stored weights, file formats and their errors.
//!
//! This crate is the boundary to untrusted input: every parser here is a pure function from bytes to checked views.
#![deny(unsafe_code)]

pub mod bytes;
pub mod histogram;
pub mod method;
pub mod observer;
pub mod plan;
pub mod recipe;
pub mod site;
pub mod statistics;
pub mod suggest;
pub mod weight;
