//! The methods of Lacuna: one small file per published technique, by site, and one registry slice.
//!
//! To add one: a file under its site's folder with an `impl Method`, and one line in [`registry::METHODS`]. Listings,
//! recipe errors and the contract tests follow from that line.
#![forbid(unsafe_code)]

pub mod activations;
pub mod decoding;
pub mod registry;
pub mod weights;

mod common;
mod prior;
mod train;

#[cfg(test)]
mod testing;
