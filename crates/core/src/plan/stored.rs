//! Plans on disk: `p.json`, and where the plan has vectors or matrices `p.<hash>.safetensors` beside it.
//!
//! The JSON names the other file with its length and SHA-256. Both are written under temporary names and renamed, the
//! vectors first: a reader sees the old plan or the new one, never a mixture.

use super::{Decoding, Entry, PLAN_MAX_BYTES, PLAN_SIDE_MAX_BYTES, PLAN_VERSION, Plan};
use crate::{
    atomic::write_atomically,
    bytes::Bytes,
    format::safetensors::{NewTensor, Tensors, file_size, write},
    hash::sha256,
    map::{LoadMode, open, read_small},
    method::MethodError,
    tensor::Tensor,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

const REMEDY: &str = "damaged or not a plan; delete it and calibrate again";

/// The file of vectors that belongs to a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Side {
    file: String,
    bytes: u64,
    sha256: String,
}

/// The plan as it is stored.
#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    model: String,
    method: String,
    calibration_tokens: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    side: Option<Side>,
    entries: Vec<Entry>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    decoding: Option<Decoding>,
}

impl Plan {
    /// Reads a stored plan and checks it against the model it will run on.
    ///
    /// # Errors
    /// Unreadable, over [`PLAN_MAX_BYTES`], not a plan, of another version, made for another model (both hashes are
    /// named), with vectors that are missing, damaged or not finite, or with entries that no model of `layers` layers
    /// can follow.
    pub fn load(path: &Path, model: &str, layers: usize) -> Result<Self, MethodError> {
        Self::parse(&read_small(path, PLAN_MAX_BYTES)?, path, model, layers)
    }

    /// [`Plan::load`] on the bytes of the JSON file; `path` is for messages and to find the vectors beside it.
    pub fn parse(text: &[u8], path: &Path, model: &str, layers: usize) -> Result<Self, MethodError> {
        let bad = |reason: String| MethodError::Plan { path: path.into(), reason };
        if text.len() as u64 > PLAN_MAX_BYTES {
            return Err(bad(format!("longer than {PLAN_MAX_BYTES} bytes: not a plan of this program")));
        }
        #[derive(Deserialize)]
        struct Head {
            version: u32,
            model: String,
        }
        let head: Head = serde_json::from_slice(text).map_err(|e| bad(format!("{e}: {REMEDY}")))?;
        if head.version != PLAN_VERSION {
            return Err(bad(format!(
                "stored as version {}, this program reads {PLAN_VERSION}: calibrate again",
                head.version
            )));
        }
        if head.model != model {
            return Err(MethodError::OtherModel { path: path.into(), plan: head.model, model: model.into() });
        }
        let stored: Stored = serde_json::from_slice(text).map_err(|e| bad(format!("{e}: {REMEDY}")))?;
        let tensors = stored.side.as_ref().map_or(Ok(BTreeMap::new()), |side| read_side(side, path))?;
        let Stored { version, model, method, calibration_tokens, mut entries, decoding, .. } = stored;
        for tensor in entries.iter_mut().flat_map(|e| e.rule.tensors_mut()) {
            let found = tensors.get(tensor.name());
            *tensor = found.ok_or_else(|| bad(format!("vector {} is nowhere: {REMEDY}", tensor.name())))?.clone();
        }
        let plan = Plan { version, model, method, calibration_tokens, entries, decoding };
        plan.check(layers).map_err(bad)?;
        Ok(plan)
    }

    /// Writes the plan so that a reader sees the old one or the new one, never a part.
    ///
    /// # Errors
    /// The files cannot be written, or the plan's vectors were never read.
    pub fn save(&self, path: &Path) -> Result<(), MethodError> {
        let bad = |reason: String| MethodError::Plan { path: path.into(), reason };
        let before = old_side(path);
        let side = self.write_side(path)?;
        let stored = Stored {
            version: self.version,
            model: self.model.clone(),
            method: self.method.clone(),
            calibration_tokens: self.calibration_tokens,
            side: side.clone(),
            entries: self.entries.clone(),
            decoding: self.decoding,
        };
        let mut text = serde_json::to_vec_pretty(&stored).map_err(|e| bad(e.to_string()))?;
        text.push(b'\n');
        write_atomically(path, Some(text.len() as u64), |out| out.write_all(&text))?;
        if let Some(old) = before.filter(|b| side.as_ref().is_none_or(|s| s.file != b.file)) {
            // No plan names it any more; if it cannot be removed it is only in the way.
            let _ = fs::remove_file(beside(path, &old.file));
        }
        Ok(())
    }

    fn write_side(&self, path: &Path) -> Result<Option<Side>, MethodError> {
        let bad = |reason: String| MethodError::Plan { path: path.into(), reason };
        let tensors = self.tensors();
        if tensors.is_empty() {
            return Ok(None);
        }
        let parts: Vec<(&str, Vec<u64>, Bytes)> =
            tensors.iter().map(|(n, t)| (*n, t.shape().iter().map(|a| *a as u64).collect(), t.bytes())).collect();
        let mut list = Vec::with_capacity(parts.len());
        for ((name, shape, data), tensor) in parts.iter().zip(tensors.values()) {
            let dtype = tensor.dtype().ok_or_else(|| bad(format!("vector {name} was never read")))?;
            list.push(NewTensor { name, dtype, shape, data });
        }
        let size = file_size(&list, &[]).map_err(|e| bad(e.to_string()))?;
        let mut content = Vec::with_capacity(size as usize);
        write(&list, &[], &mut content).map_err(|e| bad(e.to_string()))?;
        let hash = sha256(&content);
        let stem = path.file_stem().map_or("plan".into(), |s| s.to_string_lossy().into_owned());
        let file = format!("{stem}.{}.safetensors", &hash[..12]);
        write_atomically(beside(path, &file), Some(size), |out| out.write_all(&content))?;
        Ok(Some(Side { file, bytes: size, sha256: hash }))
    }
}

fn beside(path: &Path, file: &str) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).join(file)
}

/// The side file that the plan at `path` names now, if there is a plan and its file name is a plain one.
fn old_side(path: &Path) -> Option<Side> {
    #[derive(Deserialize)]
    struct Named {
        side: Option<Side>,
    }
    let text = read_small(path, PLAN_MAX_BYTES).ok()?;
    serde_json::from_slice::<Named>(&text).ok()?.side.filter(|s| is_plain(&s.file))
}

/// A name within the plan's own folder.
fn is_plain(file: &str) -> bool {
    file.ends_with(".safetensors") && Path::new(file).file_name().is_some_and(|n| n == file) && !file.contains('\\')
}

fn read_side(side: &Side, path: &Path) -> Result<BTreeMap<String, Tensor>, MethodError> {
    let bad = |reason: String| MethodError::Plan { path: path.into(), reason };
    if !is_plain(&side.file) || side.bytes > PLAN_SIDE_MAX_BYTES {
        return Err(bad(format!("names `{}` ({} bytes) for its vectors: {REMEDY}", side.file, side.bytes)));
    }
    let file = beside(path, &side.file);
    let bytes = open(&file, LoadMode::Map)
        .map_err(|e| bad(format!("its vectors cannot be read ({e}); keep both files together, or calibrate again")))?;
    let same = bytes.len() as u64 == side.bytes && sha256(&bytes) == side.sha256;
    if !same {
        return Err(bad(format!("`{}` is not the file this plan was stored with; calibrate again", side.file)));
    }
    let tensors = Tensors::parse(bytes).map_err(|e| e.in_file(&file))?;
    let mut all = BTreeMap::new();
    for entry in tensors.entries() {
        let shape = entry.shape.iter().map(|a| usize::try_from(*a).unwrap_or(usize::MAX)).collect();
        let tensor =
            Tensor::read(&entry.name, entry.dtype, shape, tensors.bytes(entry)?).map_err(|e| e.in_file(&file))?;
        all.insert(entry.name.clone(), tensor);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        plan::{Accept, DraftSource, Rule, Selector},
        site::Proj,
    };

    fn plan() -> Plan {
        let selector = Selector::above(0.1234567);
        Plan {
            version: PLAN_VERSION,
            model: "abc".into(),
            method: "teal=0.5".into(),
            calibration_tokens: 10,
            entries: vec![
                Entry { layer: 0, rule: Rule::inputs(Proj::Q, selector), kept: Some(0.5) },
                Entry { layer: 1, rule: Rule::neurons(Selector::non_zero()), kept: None },
            ],
            decoding: Some(Decoding {
                draft: DraftSource::Plan,
                accept: Accept::Threshold { probability: 0.25 },
                most: 8,
            }),
        }
    }

    fn with_vectors(x: f32) -> Plan {
        let mut p = plan();
        let scale = Tensor::vector(vec![x, 2.0]);
        p.entries[0].rule = Rule::inputs(Proj::Q, Selector::top(1).scaled(scale.clone()));
        p.entries.push(Entry { layer: 0, rule: Rule::inputs(Proj::K, Selector::top(1).scaled(scale)), kept: None });
        p
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut all: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        all.sort();
        all
    }

    #[test]
    fn stored_and_read_back_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        plan().save(&path).unwrap();
        assert_eq!(Plan::load(&path, "abc", 2).unwrap(), plan());
        assert_eq!(names(dir.path()), ["p.json"], "no side file, no partial file");
        with_vectors(1.0).save(&path).unwrap();
        let back = Plan::load(&path, "abc", 2).unwrap();
        assert_eq!(back, with_vectors(1.0));
        assert_eq!(back.entries[2].rule.selector().scale.as_ref().unwrap().values(), [1.0, 2.0]);
        let first = names(dir.path());
        with_vectors(3.0).save(&path).unwrap();
        assert_eq!(names(dir.path()).len(), 2, "the old vectors are gone");
        assert_ne!(names(dir.path()), first);
        plan().save(&path).unwrap();
        assert_eq!(names(dir.path()), ["p.json"]);
    }

    #[test]
    fn refuses_other_models_versions_and_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        plan().save(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let parse = |t: &str| Plan::parse(t.as_bytes(), Path::new("p.json"), "abc", 2).map_err(|e| e.to_string());
        assert!(parse(&text).is_ok());
        let e = Plan::parse(text.as_bytes(), Path::new("p.json"), "xyz", 2).unwrap_err().to_string();
        assert!(e.contains("abc") && e.contains("xyz"), "{e}");
        assert!(parse(&text.replace("\"version\": 2", "\"version\": 1")).unwrap_err().contains("version 1"));
        assert!(parse(&text.replace("\"layer\": 1", "\"layer\": 2")).unwrap_err().contains("layer 2"));
        assert!(parse(&text.replace("attn.q", "attn.x")).unwrap_err().contains("attn.x"));
        assert!(parse(&text.replace("\"kept\": 0.5", "\"kept\": 1.5")).unwrap_err().contains("1.5"));
        for n in 0..text.trim_end().len() {
            assert!(parse(&text[..n]).is_err(), "cut at {n}");
        }
    }

    #[test]
    fn damaged_missing_or_foreign_vectors_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        with_vectors(1.0).save(&path).unwrap();
        let side = dir.path().join(names(dir.path()).into_iter().find(|n| n.ends_with("tensors")).unwrap());
        let good = fs::read(&side).unwrap();
        let load = || Plan::load(&path, "abc", 2).map_err(|e| e.to_string());
        for n in [0, 1, good.len() / 2, good.len() - 1] {
            fs::write(&side, &good[..n]).unwrap();
            assert!(load().unwrap_err().contains("calibrate again"), "cut at {n}");
            let mut flipped = good.clone();
            flipped[n] ^= 1;
            fs::write(&side, flipped).unwrap();
            assert!(load().unwrap_err().contains("calibrate again"), "flipped at {n}");
        }
        fs::remove_file(&side).unwrap();
        assert!(load().unwrap_err().contains("keep both files together"));
        fs::write(&side, good).unwrap();
        load().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let name = side.file_name().unwrap().to_str().unwrap();
        for bad in ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x"] {
            fs::write(&path, text.replace(name, bad)).unwrap();
            assert!(load().unwrap_err().contains("damaged"), "{bad}");
        }
        fs::write(&path, text.replace(with_vectors(1.0).entries[0].rule.tensors()[0].name(), "0123")).unwrap();
        assert!(load().unwrap_err().contains("0123"));
    }
}
