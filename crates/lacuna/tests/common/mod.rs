//! What tests of real models share.
#![allow(dead_code, reason = "each test file uses a part")]

use std::path::{Path, PathBuf};

/// A file of the shared data; `None`, and a note, where it is absent.
pub fn shared(part: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(part);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: not present: {}", path.display());
    None
}

/// The first `n` test stories; none where they are absent.
pub fn stories(n: usize) -> Vec<String> {
    let Some(path) = shared("data/tinystories-sample/stories.txt") else { return Vec::new() };
    let text = std::fs::read_to_string(path).expect("readable text");
    text.split("<|endoftext|>").map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).take(n).collect()
}
