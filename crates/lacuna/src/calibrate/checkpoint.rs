//! What a search has found so far, stored after every layer, so that a killed one goes on where it was.

use super::search::LayerFound;
use crate::error::Result;
use lacuna_core::{atomic::write_atomically, error::Error, map::read_small, site::Proj};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Longest stored search that is read, in bytes.
const MOST_BYTES: u64 = 64 << 20;

#[derive(Default, Serialize, Deserialize)]
struct Stored {
    /// Hash of everything the result depends on.
    key: String,
    layers: BTreeMap<usize, StoredLayer>,
}

#[derive(Clone, Serialize, Deserialize)]
struct StoredLayer {
    errors: (f64, f64),
    dropped: BTreeMap<String, f64>,
}

/// The layers that are done; with a path, also on disk.
pub(super) struct Checkpoint {
    path: Option<PathBuf>,
    stored: Stored,
}

impl Checkpoint {
    /// What lies at `path`, if it belongs to `key` and is whole; otherwise nothing yet.
    pub fn open(path: Option<&Path>, key: &str) -> Self {
        let read = |p: &Path| serde_json::from_slice::<Stored>(&read_small(p, MOST_BYTES).ok()?).ok();
        let stored = path.and_then(read).filter(|s| s.key == key);
        if let Some(s) = &stored {
            tracing::info!("going on behind {} layers that an earlier search finished", s.layers.len());
        }
        let fresh = || Stored { key: key.into(), layers: BTreeMap::new() };
        Self { path: path.map(Path::to_path_buf), stored: stored.unwrap_or_else(fresh) }
    }

    /// A finished layer; `None` too if what is stored cannot be meant.
    pub fn layer(&self, layer: usize) -> Option<LayerFound> {
        let stored = self.stored.layers.get(&layer)?;
        let valid =
            |(name, share): (&String, &f64)| Some((Proj::parse(name)?, *share)).filter(|s| (0.0..1.0).contains(&s.1));
        let dropped = stored.dropped.iter().map(valid).collect::<Option<BTreeMap<_, _>>>()?;
        Some(LayerFound { errors: stored.errors, dropped })
    }

    /// Adds a finished layer.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn add(&mut self, layer: usize, found: LayerFound) -> Result<()> {
        let dropped = found.dropped.iter().map(|(p, s)| (p.name().to_owned(), *s)).collect();
        self.stored.layers.insert(layer, StoredLayer { errors: found.errors, dropped });
        let Some(path) = &self.path else { return Ok(()) };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
        }
        let text = serde_json::to_vec(&self.stored).map_err(|e| Error::malformed(e.to_string(), "a search"))?;
        Ok(write_atomically(path, Some(text.len() as u64), |out| out.write_all(&text))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_only_with_the_same_key_and_a_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("searches/a.json");
        let found = LayerFound { errors: (1.0, 2.0), dropped: [(Proj::Q, 0.25), (Proj::Up, 0.5)].into() };
        let mut c = Checkpoint::open(Some(&path), "key");
        assert!(c.layer(0).is_none());
        c.add(0, found.clone()).unwrap();
        assert_eq!(Checkpoint::open(Some(&path), "key").layer(0), Some(found));
        assert!(Checkpoint::open(Some(&path), "other").layer(0).is_none());
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() - 3]).unwrap();
        assert!(Checkpoint::open(Some(&path), "key").layer(0).is_none());
        let odd = String::from_utf8(text).unwrap().replace("0.25", "7");
        fs::write(&path, odd).unwrap();
        assert!(Checkpoint::open(Some(&path), "key").layer(0).is_none());
    }
}
