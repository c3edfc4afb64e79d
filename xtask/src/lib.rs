//! Developer tasks as a library, so that tests and CI run the same code: [`tidy`] holds the walls of the house up,
//! [`docs`] writes the pages that are generated from the registry.
#![forbid(unsafe_code)]

pub mod docs;
pub mod tidy;

use std::path::PathBuf;

/// The root of the repository, found from where this crate lies.
pub fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map(PathBuf::from).unwrap_or(here)
}
