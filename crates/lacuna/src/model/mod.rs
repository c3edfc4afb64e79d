//! Models: what an architecture is ([`spec`]), its weights ([`weights`]), and one file per architecture that maps
//! configuration and tensor names to both. No file here names a method.

pub mod spec;
pub mod weights;
