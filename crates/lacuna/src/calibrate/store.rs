//! Where plans lie: beside the model, or in the cache where the model's folder cannot be written.

use crate::cache;
use lacuna_core::{Error, method::MethodError, plan::Plan};
use std::path::{Path, PathBuf};

/// Places of the plan `label` for the model at `model` (a folder or a file), the preferred one first:
/// `<folder>/lacuna/plan-<label>-<hash>.json` or `<file>.lacuna/plan-<label>-<hash>.json`, then
/// `<cache>/plans/<hash>/plan-<label>-<hash>.json`. An embedded model (`None`) has only the last.
pub fn places(model: Option<&Path>, label: &str, hash: &str) -> Vec<PathBuf> {
    places_below(model, cache::root(), label, hash)
}

fn places_below(model: Option<&Path>, cache: Option<PathBuf>, label: &str, hash: &str) -> Vec<PathBuf> {
    let short: String = hash.chars().take(12).collect();
    let name = format!("plan-{}-{short}.json", slug(label));
    let beside = model.map(|m| {
        if m.is_dir() {
            return m.join("lacuna").join(&name);
        }
        let mut folder = m.as_os_str().to_owned();
        folder.push(".lacuna");
        Path::new(&folder).join(&name)
    });
    beside.into_iter().chain(cache.map(|c| c.join("plans").join(hash).join(&name))).collect()
}

/// `relu,teal=0.5` as a part of a file name: `relu+teal-0.5`.
fn slug(label: &str) -> String {
    let letter = |c| match c {
        ',' => '+',
        'a'..='z' | '0'..='9' | '.' | '-' => c,
        _ => '-',
    };
    label.chars().map(letter).take(100).collect()
}

/// The stored plan of that label, if there is one.
///
/// # Errors
/// A plan that is there but damaged, of another version or model.
pub fn find(
    model: Option<&Path>,
    label: &str,
    hash: &str,
    layers: usize,
) -> Result<Option<(Plan, PathBuf)>, MethodError> {
    for path in places(model, label, hash) {
        if path.exists() {
            return Plan::load(&path, hash, layers).map(|p| Some((p, path)));
        }
    }
    Ok(None)
}

/// Stores `plan` at the first of its places that can be written, and says where.
///
/// # Errors
/// None of the places can be written; the error is that of the last.
pub fn save(plan: &Plan, model: Option<&Path>) -> Result<PathBuf, MethodError> {
    save_at(plan, places(model, &plan.method, &plan.model))
}

fn save_at(plan: &Plan, places: Vec<PathBuf>) -> Result<PathBuf, MethodError> {
    let nowhere = "there is no folder to store it in; set LACUNA_CACHE to one".into();
    let mut result = Err(MethodError::Plan { path: "(new)".into(), reason: nowhere });
    for path in places {
        let folder = path.parent().unwrap_or(Path::new("."));
        result = std::fs::create_dir_all(folder)
            .map_err(|e| MethodError::from(Error::io(folder, "create")(e)))
            .and_then(|()| plan.save(&path))
            .map(|()| path);
        match &result {
            Ok(_) => break,
            Err(e) => tracing::info!("plan is stored elsewhere: {e}"),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::plan::PLAN_VERSION;

    #[test]
    fn beside_the_model_or_in_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let hash = "0123456789abcdef";
        let cache = Some(dir.path().join("cache"));
        let file = dir.path().join("m.gguf");
        std::fs::write(&file, "").unwrap();
        let names = |model: &Path| -> Vec<String> {
            let relative = |p: PathBuf| p.strip_prefix(dir.path()).unwrap().display().to_string();
            places_below(Some(model), cache.clone(), "relu,teal=0.5", hash).into_iter().map(relative).collect()
        };
        let cached = "cache/plans/0123456789abcdef/plan-relu+teal-0.5-0123456789ab.json";
        assert_eq!(names(dir.path()), ["lacuna/plan-relu+teal-0.5-0123456789ab.json", cached]);
        assert_eq!(names(&file), ["m.gguf.lacuna/plan-relu+teal-0.5-0123456789ab.json", cached]);

        let plan = Plan {
            version: PLAN_VERSION,
            model: hash.into(),
            method: "relu".into(),
            calibration_tokens: 0,
            decoding: None,
            entries: vec![],
        };
        let blocked = file.join("p.json");
        let good = dir.path().join("new/p.json");
        assert_eq!(save_at(&plan, vec![blocked.clone(), good.clone()]).unwrap(), good);
        assert_eq!(Plan::load(&good, hash, 0).unwrap(), plan);
        assert!(save_at(&plan, vec![blocked]).is_err() && save_at(&plan, vec![]).is_err());
    }
}
