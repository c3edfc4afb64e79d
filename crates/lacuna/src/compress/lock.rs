//! `lacuna.lock.json`: everything that an output follows from, and what came out. No times and no paths, so that equal runs
//! write equal bytes.

use super::{Report, Request};
use crate::error::{Error, Result};
use lacuna_core::hash::sha256;
use lacuna_methods::registry::Resolved;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::Path,
};

/// Name of the file in an output directory; a GGUF file has it beside itself, with its own name before it.
pub const NAME: &str = "lacuna.lock.json";

/// SHA-256 of the files that a model consists of: its configuration and weights.
///
/// # Errors
/// One cannot be read.
pub(super) fn source_files(model: &Path) -> Result<BTreeMap<String, String>> {
    let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !model.is_dir() {
        return Ok(BTreeMap::from([(name(model), file_hash(model)?)]));
    }
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(model).map_err(Error::io(model))? {
        let path = entry.map_err(Error::io(model))?.path();
        let ending = path.extension().unwrap_or_default();
        if ending == "safetensors" || name(&path) == "config.json" {
            files.insert(name(&path), file_hash(&path)?);
        }
    }
    Ok(files)
}

fn file_hash(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// The lock of a finished run.
pub(super) fn lock(request: &Request, hash: &str, files: &BTreeMap<String, String>, report: &Report) -> Value {
    let step = |s: &Resolved| {
        let params: serde_json::Map<_, _> = s.params.iter().map(|(n, v)| (n.to_owned(), json!(v))).collect();
        json!({"method": s.method.name(), "params": params})
    };
    let calibration = request.calibration.as_ref().map(|c| {
        let id = |w: &Vec<u32>| sha256(&w.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())[..16].to_owned();
        json!({
            "text_sha256": c.sha256,
            "tokens": c.tokens(),
            "windows": c.windows.iter().map(id).collect::<Vec<_>>(),
        })
    });
    json!({
        "version": 1,
        "lacuna": env!("CARGO_PKG_VERSION"),
        "base": {"hash": hash, "files": files},
        "steps": request.steps.iter().map(step).collect::<Vec<_>>(),
        "ratios": request.ratios.name(),
        "seed": request.seed,
        "calibration": calibration,
        "sparsity": report.sparsity(),
        "layers": report.layers,
        "notes": report.notes,
    })
}
