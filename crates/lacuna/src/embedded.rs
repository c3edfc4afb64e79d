//! The model inside the library: the files of `assets/embedded`, a Hugging Face directory (see the card there).

use lacuna_core::bytes::Bytes;
use std::sync::Arc;

/// What messages call it.
pub const NAME: &str = "embedded";

/// Name and contents of every file, as the build script found them.
static FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The contents of the file `name`, without a copy; `None` if the library was built without it.
pub fn file(name: &str) -> Option<Bytes> {
    let (_, bytes) = FILES.iter().find(|(n, _)| *n == name)?;
    Some(Bytes::new(Arc::new(*bytes)))
}

/// Whether the library was built with a model.
pub fn exists() -> bool {
    file("config.json").is_some()
}
