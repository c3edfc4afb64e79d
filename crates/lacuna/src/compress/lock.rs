//! `lacuna.lock.json`: everything that an output follows from, and what came out. No times and no paths, so that equal runs
//! write equal bytes.

use super::{Goal, Report, Request};
use crate::error::{Error, Result};
use lacuna_core::{hash::sha256, map::read_small};
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

/// Longest lock that is read, in bytes.
pub(super) const LOCK_BYTES: u64 = 64 << 20;

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

/// That the run follows from what the lock says that it must follow from.
///
/// # Errors
/// It cannot be read, or the first thing that is different.
pub(super) fn check(request: &Request, hash: &str, files: &BTreeMap<String, String>) -> Result<()> {
    let Some(path) = &request.lock else { return Ok(()) };
    let wrong =
        |problem: String| Err(Error::Argument { name: "lock", problem: format!("{}: {problem}", path.display()) });
    let text = read_small(path, LOCK_BYTES)?;
    let theirs: Value = match serde_json::from_slice(&text) {
        Ok(value) => value,
        Err(e) => return wrong(format!("not a lock: {e}")),
    };
    let mut ours = lock(request, hash, files, &Report::default());
    for (name, hash) in files {
        if theirs["base"]["files"].get(name) != Some(&json!(hash)) {
            let said = theirs["base"]["files"].get(name).and_then(Value::as_str).unwrap_or("none");
            return wrong(format!(
                "`{name}` of the model has SHA-256 {hash}, the lock says {said}: another revision; restore the one it names, or run \
                 without the lock"
            ));
        }
    }
    // What was measured does not have to be the same before the run.
    if let Some(Value::Number(kl)) = theirs["goal"].get("kl") {
        ours["goal"]["kl"] = Value::Number(kl.clone());
    }
    for key in ["version", "lacuna", "base", "steps", "ratios", "goal", "seed", "calibration", "gguf"] {
        if ours[key] != theirs[key] {
            let shown = |v: &Value| v.to_string().chars().take(200).collect::<String>();
            return wrong(format!(
                "`{key}` is {} in this run, the lock says {}",
                shown(&ours[key]),
                shown(&theirs[key])
            ));
        }
    }
    Ok(())
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
    let goal = match &request.goal {
        None => Value::Null,
        Some(Goal::Bytes(budget)) => json!({"target_bytes": budget}),
        Some(Goal::Divergence { most, held_out }) => {
            let tokens = held_out.iter().map(Vec::len).sum::<usize>();
            json!({"max_kl": most, "held_out_tokens": tokens, "kl": report.divergence})
        }
    };
    let mut lock = json!({
        "version": 1,
        "lacuna": env!("CARGO_PKG_VERSION"),
        "base": {"hash": hash, "files": files},
        "steps": request.steps.iter().map(step).collect::<Vec<_>>(),
        "ratios": request.ratios.name(),
        "goal": goal,
        "seed": request.seed,
        "calibration": calibration,
        "sparsity": report.sparsity(),
        "layers": report.layers,
        "notes": report.notes,
    });
    if request.gguf {
        lock["gguf"] = json!(true);
    }
    lock
}
