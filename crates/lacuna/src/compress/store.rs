//! Finished layers on the disk, so that a run that was killed goes on where it was: one safetensors file per block in a
//! folder beside the output, and a note that tells what it belongs to and its hash.

use super::{LayerReport, choices::Choices};
use crate::error::{Error, Result};
use lacuna_core::{
    atomic::write_atomically,
    format::safetensors::{self, Dtype, NewTensor, Tensors},
    hash::sha256,
    map::{self, LoadMode, read_small},
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Longest note that is read, in bytes.
const NOTE_BYTES: u64 = 16 << 20;

/// A tensor of the output.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Its name.
    pub name: String,
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// What a block's file belongs to, and what the run reports of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Note {
    /// Hash of everything the result depends on.
    key: String,
    /// SHA-256 of the file.
    sha256: String,
    /// What became of the layers of the block.
    pub layers: Vec<LayerReport>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// What was decided before the first block, and what it belongs to.
#[derive(Serialize, Deserialize)]
struct Decided {
    key: String,
    choices: Choices,
}

/// The folder of finished blocks.
pub(super) struct Work {
    dir: PathBuf,
    key: String,
}

impl Work {
    /// The folder for `output`; blocks of a run with another `key` are removed.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(output: &Path, key: &str) -> Result<Self> {
        let dir = beside(output, "lacuna-work")?;
        fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        let work = Self { dir, key: key.into() };
        let foreign = |l: usize| work.note_of(l).is_some_and(|n| n.key != work.key);
        if (0..).take_while(|l| work.note(*l).exists()).any(foreign) {
            tracing::warn!(
                "{}: finished blocks of another run (other model, recipe or text) are removed",
                work.dir.display()
            );
            fs::remove_dir_all(&work.dir).and_then(|()| fs::create_dir_all(&work.dir)).map_err(Error::io(&work.dir))?;
        }
        Ok(work)
    }

    fn file(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("layer-{layer:04}.safetensors"))
    }

    fn note(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("layer-{layer:04}.json"))
    }

    /// Where residual streams may be kept.
    pub fn spill(&self) -> PathBuf {
        self.dir.join("streams")
    }

    fn note_of(&self, layer: usize) -> Option<Note> {
        serde_json::from_slice(&read_small(self.note(layer), NOTE_BYTES).ok()?).ok()
    }

    fn decided(&self) -> PathBuf {
        self.dir.join("choices.json")
    }

    /// What an earlier run decided.
    pub fn choices(&self) -> Option<Choices> {
        let text = read_small(self.decided(), NOTE_BYTES).ok()?;
        serde_json::from_slice::<Decided>(&text).ok().filter(|d| d.key == self.key).map(|d| d.choices)
    }

    /// Keeps what was decided, and gives it back as [`Work::choices`] does.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn add_choices(&self, choices: Choices) -> Result<Choices> {
        let path = self.decided();
        let decided = Decided { key: self.key.clone(), choices };
        let text = serde_json::to_vec(&decided).map_err(std::io::Error::from).map_err(Error::io(&path))?;
        write_atomically(path, Some(text.len() as u64), |out| out.write_all(&text))?;
        Ok(decided.choices)
    }

    /// A finished block: its tensors and what is noted of it. A damaged one counts as not finished.
    pub fn block(&self, layer: usize) -> Option<(Tensors, Note)> {
        let note = self.note_of(layer).filter(|n| n.key == self.key)?;
        let bytes = map::open(self.file(layer), LoadMode::Map).ok()?;
        if sha256(&bytes) != note.sha256 {
            tracing::warn!("{}: damaged; the block is compressed again", self.file(layer).display());
            return None;
        }
        Some((Tensors::parse(bytes).ok()?, note))
    }

    /// Adds a finished block and gives it back as [`Work::block`] does.
    ///
    /// # Errors
    /// It cannot be written or read again.
    pub fn add(
        &self,
        layer: usize,
        tensors: &[Finished],
        layers: Vec<LayerReport>,
        notes: Vec<String>,
    ) -> Result<(Tensors, Note)> {
        let new: Vec<NewTensor<'_>> = tensors
            .iter()
            .map(|t| NewTensor { name: &t.name, dtype: t.dtype, shape: &t.shape, data: &t.data })
            .collect();
        let path = self.file(layer);
        let size = safetensors::file_size(&new, &[]).map_err(Error::io(&path))?;
        write_atomically(&path, Some(size), |out| safetensors::write(&new, &[], out))?;
        let bytes = map::open(&path, LoadMode::Map)?;
        let note = Note { key: self.key.clone(), sha256: sha256(&bytes), layers, notes };
        let text = serde_json::to_vec(&note).map_err(std::io::Error::from).map_err(Error::io(&path))?;
        write_atomically(self.note(layer), Some(text.len() as u64), |out| out.write_all(&text))?;
        Ok((Tensors::parse(bytes)?, note))
    }

    /// Removes the folder if nothing is in it.
    pub fn discard_empty(&self) {
        let _ = fs::remove_dir(&self.dir);
    }

    /// Removes the folder.
    ///
    /// # Errors
    /// The system refuses.
    pub fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.dir).map_err(Error::io(&self.dir))
    }
}

/// The hidden path `.NAME.ending` beside `path`.
///
/// # Errors
/// A path without a last component.
pub(super) fn beside(path: &Path, ending: &str) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::Argument { name: "output", problem: format!("{} names no folder", path.display()) });
    };
    Ok(path.with_file_name(format!(".{}.{ending}", name.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(value: u8) -> Finished {
        Finished { name: "a.weight".into(), dtype: Dtype::BF16, shape: vec![1, 2], data: vec![value; 4] }
    }

    #[test]
    fn only_whole_blocks_of_the_same_run_count() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let work = Work::open(&out, "key").unwrap();
        assert!(work.block(0).is_none());
        work.add(0, &[tensor(1)], vec![], vec!["note".into()]).unwrap();
        work.add(1, &[tensor(2)], vec![], vec![]).unwrap();
        let work = Work::open(&out, "key").unwrap();
        let (tensors, note) = work.block(0).unwrap();
        assert_eq!((tensors.entries()[0].name.as_str(), note.notes), ("a.weight", vec!["note".to_owned()]));
        // One flipped bit.
        let mut bytes = fs::read(work.file(1)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(work.file(1), &bytes).unwrap();
        assert!(work.block(1).is_none() && work.block(0).is_some());
        // Another run.
        let other = Work::open(&out, "other").unwrap();
        assert!(other.block(0).is_none() && !other.file(0).exists());
        other.remove().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Work::open(Path::new("/"), "key").is_err());
    }
}
