//! Bodies of the fuzz targets, as ordinary functions: the targets in `fuzz/` and the tests call the same code. Each reads
//! its input as one format and then uses everything that parsing promised to have checked.

use super::{
    config::Config,
    gguf::{Gguf, Metadata, Value, decode_run},
    safetensors::{Tensors, shard_names},
};
use crate::{
    bytes::Bytes,
    plan::Plan,
    recipe::{Recipe, parse_short},
};
use std::path::Path;

/// Most bytes decoded per tensor: decoding is checked on the first blocks as well as on all.
const DECODED: usize = 4096;

/// `input` as a safetensors file, and as an index of shards.
pub fn safetensors(input: &[u8]) {
    let _ = shard_names(input);
    let Ok(file) = Tensors::parse(Bytes::from(input.to_vec())) else { return };
    let mut covered = 0;
    for e in file.entries() {
        let bytes = file.bytes(e).expect("the range was checked by parsing");
        covered += bytes.len();
        assert_eq!(file.get(&e.name), Some(e));
        let _ = (e.format(), e.matrix_shape());
    }
    assert!(covered <= input.len(), "tensors are disjoint");
}

/// `input` as a GGUF file.
pub fn gguf(input: &[u8]) {
    let Ok(file) = Gguf::parse(Bytes::from(input.to_vec())) else { return };
    for (key, value) in file.metadata().iter() {
        assert!(file.metadata().get(key).is_some());
        getters(file.metadata(), key);
        if let Value::Array(a) = value {
            assert_eq!(a.iter().count(), a.len());
        }
    }
    let mut covered = 0;
    for t in file.tensors() {
        let bytes = file.bytes(&t).expect("the range was checked by parsing");
        covered += bytes.len();
        let (rows, cols) = t.rows_cols();
        assert_eq!(rows * (cols / t.kind.block_len()) * t.kind.block_bytes(), bytes.len());
        let blocks = (bytes.len() / t.kind.block_bytes()).min(DECODED / t.kind.block_bytes());
        let mut out = vec![0.0; blocks * t.kind.block_len()];
        let _ = decode_run(t.kind, &bytes[..blocks * t.kind.block_bytes()], &mut out);
    }
    assert!(covered <= input.len(), "tensors are disjoint");
}

fn getters(m: &Metadata, key: &str) {
    let _ = (m.count(key), m.positive(key), m.float(key), m.bool(key), m.str(key).map(str::len));
    let _ = (m.strings(key).map(|s| s.len()), m.floats(key).map(|f| f.len()), m.ints(key, 0..=9).map(|i| i.len()));
}

/// `input` as a configuration.
pub fn config(input: &[u8]) {
    let Ok(c) = Config::parse(input) else { return };
    for key in c.keys() {
        let _ = (c.count(key), c.positive(key), c.float(key), c.bool(key), c.str(key).map(str::len));
        let _ = (c.strings(key).map(|s| s.len()), c.floats(key).map(|f| f.len()), c.ints(key, 0..=9).map(|i| i.len()));
        let _ = c.section(key).map(|s| s.keys().count());
    }
}

/// `input` as a plan for a model of four layers.
pub fn plan(input: &[u8]) {
    if let Ok(plan) = Plan::parse(input, Path::new("plan"), "", 4) {
        assert!(plan.check(4).is_ok());
    }
}

/// `input` as a recipe, and as its short form.
pub fn recipe(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    let _ = (Recipe::parse(text, "recipe"), parse_short(text));
}

/// `input` as every format.
pub fn all(input: &[u8]) {
    safetensors(input);
    gguf(input);
    config(input);
    plan(input);
    recipe(input);
}

/// As [`all`] for large inputs: parses without reading the tensors.
pub fn headers(input: &[u8]) {
    let bytes = Bytes::from(input.to_vec());
    let _ = Tensors::parse(bytes.clone());
    let _ = Gguf::parse(bytes);
    config(input);
}
