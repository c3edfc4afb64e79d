//! The GGUF side of opening a model: metadata become settings, tensors become stored tensors, types without a kernel are
//! converted when the weights are loaded.

use super::arch;
use super::checkpoint::{Checkpoint, LoadOptions};
use super::fields::Fields;
use super::memory::tokenizer;
use super::source::{Original, Source, Stored};
use crate::error::Result;
use lacuna_core::format::gguf::{Gguf, TensorInfo, Value, decode_run, nearest};
use lacuna_core::map::LoadMode;
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;
use std::path::Path;

/// Longest metadata list that becomes a setting; longer ones are vocabularies.
const LIST_CAP: usize = 4096;
/// Tensors that are settings: divisors of the rotary frequencies.
const ROPE_TENSORS: [&str; 3] = ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];
/// Kept as a setting for those who look at the embedding's shape first.
const EMBEDDING: &str = "token_embd.weight";

pub(super) fn open(path: &Path, options: &LoadOptions) -> Result<Checkpoint> {
    // The header alone is looked at here: what is too large is refused before it is read.
    let file = Gguf::open(path, LoadMode::Map)?;
    let shown = path.display().to_string();
    let name = file.metadata().str("general.architecture").map_err(|e| e.in_file(path))?;
    let side = arch::of_gguf(&shown, name)?;
    let fields = Fields::new(format!("{shown} [gguf metadata]"), options.context, settings(&file, name)?);
    let spec = (side.spec)(&fields)?;
    let source = Source::new(shown, tensors(&file, path)?);
    let (mode, check) = (options.mode, options.check_tensors);
    let kind = file.metadata().str("tokenizer.ggml.model").unwrap_or_default();
    let (tokenizer, hash) = (tokenizer(kind == "llama", spec.vocab), file.hash());
    Ok(Checkpoint { spec, source, names: side.names, tied: None, hash, mode, check, packed: None, tokenizer })
}

/// Metadata as settings: those of the architecture without its prefix, those of other groups whole; beside them the
/// divisor tensors, and the size of the vocabulary by the embedding.
fn settings(file: &Gguf, arch: &str) -> Result<Map<String, Json>> {
    let mut map = named(file.metadata().iter(), arch);
    if file.is_powerinfer() {
        map.insert("powerinfer".into(), true.into());
    }
    for name in ROPE_TENSORS {
        let Some(t) = file.get(name) else { continue };
        let (rows, cols) = t.rows_cols();
        if rows.saturating_mul(cols) <= LIST_CAP {
            let mut values = vec![0.0; rows * cols];
            decode_run(t.kind, &file.bytes(&t)?, &mut values)?;
            map.insert(name.into(), values.into());
        }
    }
    if let Some(t) = file.get(EMBEDDING) {
        map.insert("vocab_size".into(), t.rows_cols().0.into());
    }
    Ok(map)
}

/// Pairs of a header as settings: those of the architecture `arch` without its prefix.
pub(super) fn named<'a>(pairs: impl Iterator<Item = (&'a str, &'a Value)>, arch: &str) -> Map<String, Json> {
    let prefix = format!("{arch}.");
    let short = |key: &str| key.strip_prefix(&prefix).unwrap_or(key).to_owned();
    pairs.filter_map(|(key, value)| Some((short(key), setting(value)?))).collect()
}

/// A value as JSON; `None` for long lists. Numbers that JSON does not have become a text, which every reader of numbers
/// refuses by name.
fn setting(value: &Value) -> Option<Json> {
    Some(match value {
        Value::Bool(b) => Json::Bool(*b),
        Value::String(s) => Json::String(s.clone()),
        Value::Array(a) if a.len() > LIST_CAP => return None,
        Value::Array(a) => Json::Array(a.iter().map(|v| v.ok().and_then(|v| setting(&v))).collect::<Option<_>>()?),
        number => match (number.as_int(), number.as_float()) {
            (Some(i), _) => Json::from(i),
            (None, Some(f)) => Json::from(f),
            (None, None) => Json::String("a number that is not finite or too large".into()),
        },
    })
}

/// All tensors as they are in the file; those of types that no kernel reads will become the nearest that has one.
fn tensors(file: &Gguf, path: &Path) -> Result<BTreeMap<String, Stored>> {
    let mut tensors = BTreeMap::new();
    for t in file.tensors() {
        let bytes = file.bytes(&t).map_err(|e| e.in_file(path))?;
        let format = nearest(t.kind, t.rows_cols().1).map_err(|e| e.in_item(t.name).in_file(path))?;
        let from = Some(t.kind).filter(|k| k.format().is_none()).map(Original::Gguf);
        tensors.insert(t.name.to_owned(), Stored { format, shape: shape(&t), bytes, from });
    }
    Ok(tensors)
}

/// Outermost first, as everywhere in Lacuna.
fn shape(t: &TensorInfo<'_>) -> Vec<usize> {
    t.dims.iter().rev().map(|n| *n as usize).collect()
}
