//! Converted layouts on disk: one file per matrix, made once, mapped from then on, so that only one copy of a matrix
//! is resident (nothing touches the pages of the original any more).
//!
//! `<cache>/layouts/<model hash>/<layer>.<projection>.<format>`: one page of JSON header, then the runs. Files appear by
//! rename, so a kill in mid-write leaves at most a temporary file. The header's checksum covers shape and 16 spread
//! pieces of the data ([`model_hash`]); a file that fails it is made again.

use super::transpose::{input_major, input_major_format};
use lacuna_core::{
    atomic::write_atomically,
    bytes::Bytes,
    error::{Error, Result},
    hash::{HashedTensor, model_hash},
    map::{LoadMode, open},
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::Pool;
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Version of the stored form.
const VERSION: u32 = 1;

/// Bytes before the data; a page, so that mapped runs are aligned.
const HEADER: usize = 4096;

/// A matrix that is wanted in input-major form.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Layer, from 0.
    pub layer: usize,
    /// Projection.
    pub proj: Proj,
    /// The output-major weight.
    pub weight: &'a Weight,
}

/// Where converted layouts of one model are kept.
#[derive(Clone, Debug)]
pub struct LayoutCache {
    folder: Option<PathBuf>,
}

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct Header {
    version: u32,
    orientation: String,
    format: String,
    outputs: usize,
    inputs: usize,
    checksum: String,
}

impl Header {
    fn of(w: &Weight) -> Self {
        let shape = [w.inputs() as u64, w.outputs() as u64];
        let tensor = HashedTensor { name: "input-major", kind: w.format().name(), shape: &shape, data: w.bytes() };
        Self {
            version: VERSION,
            orientation: "input-major".into(),
            format: w.format().name().into(),
            outputs: w.outputs(),
            inputs: w.inputs(),
            checksum: model_hash(&VERSION.to_le_bytes(), vec![tensor]),
        }
    }
}

impl LayoutCache {
    /// The cache of the model with this hash below `root`; without a root, copies live in memory.
    pub fn new(root: Option<&Path>, model: &str) -> Self {
        Self { folder: root.map(|r| r.join("layouts").join(model)) }
    }

    /// Input-major copies of all `wanted`, in their order: mapped from the cache where it has them, otherwise made by
    /// the threads of `pool` (one matrix each) and stored. `progress(done, all)` is called from those threads.
    ///
    /// A cache that cannot be written is no error: the copies then live in memory, and the log says so.
    pub fn input_major(
        &self,
        wanted: &[Wanted<'_>],
        pool: &Pool,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Vec<Weight> {
        let made: Vec<Mutex<Option<Weight>>> = wanted.iter().map(|_| Mutex::new(None)).collect();
        let done = AtomicUsize::new(0);
        pool.run(wanted.len(), &|_, i| {
            let weight = self.one(&wanted[i]);
            *made[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(weight);
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, wanted.len());
        });
        let take = |m: Mutex<Option<Weight>>| m.into_inner().unwrap_or_else(PoisonError::into_inner);
        made.into_iter().map(|m| take(m).expect("the pool runs every chunk")).collect()
    }

    fn one(&self, wanted: &Wanted<'_>) -> Weight {
        let Some(folder) = &self.folder else { return input_major(wanted.weight) };
        let (format, _) = input_major_format(wanted.weight.format(), wanted.weight.outputs());
        let path = folder.join(format!("{}.{}.{}", wanted.layer, wanted.proj, format.name()));
        match read(&path, wanted.weight) {
            Ok(weight) => return weight,
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(e) => tracing::warn!("converted layout is made again: {e}"),
        }
        let copy = input_major(wanted.weight);
        match write(&path, &copy).and_then(|()| read(&path, wanted.weight)) {
            Ok(mapped) => mapped,
            Err(e) => {
                tracing::warn!("converted layout stays in memory: {e}");
                copy
            }
        }
    }
}

fn write(path: &Path, weight: &Weight) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    }
    let bytes = weight.bytes();
    write_atomically(path, Some((HEADER + bytes.len()) as u64), |out| {
        let mut header = serde_json::to_vec(&Header::of(weight))?;
        header.resize(HEADER, b'\n');
        out.write_all(&header)?;
        out.write_all(bytes)
    })
}

/// Maps a stored copy of `original`, or says what is wrong with it.
fn read(path: &Path, original: &Weight) -> Result<Weight> {
    let bad = |found: &str| Error::malformed(found, "a converted layout of this matrix").in_file(path);
    let file = open(path, LoadMode::Map)?;
    let head = file.get(..HEADER).ok_or_else(|| bad("a file shorter than its header"))?;
    let header: Header = serde_json::from_slice(head).map_err(|e| bad(&e.to_string()))?;
    let data: Bytes = file.slice(HEADER..file.len()).ok_or_else(|| bad("no data"))?;
    let (format, _) = input_major_format(original.format(), original.outputs());
    let weight = Weight::new(format, Orientation::InputMajor, original.outputs(), original.inputs(), data)
        .ok_or_else(|| bad("data of another length"))?;
    if header != Header::of(&weight) {
        return Err(bad("another version, shape, format or checksum"));
    }
    Ok(weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_kernels::Format;

    fn weight(seed: usize) -> Weight {
        let bytes: Vec<u8> = (0..40 * 72 * 2).map(|i| ((i * 31 + seed) % 251) as u8).collect();
        Weight::new(Format::F16, Orientation::OutputMajor, 40, 72, bytes.into()).unwrap()
    }

    fn get(root: Option<&Path>, w: &Weight) -> Weight {
        let wanted = Wanted { layer: 3, proj: Proj::Down, weight: w };
        let copies = LayoutCache::new(root, "abc").input_major(&[wanted], &Pool::new(1), &|_, _| {});
        copies.into_iter().next().unwrap()
    }

    #[test]
    fn stored_mapped_and_made_again_when_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let w = weight(1);
        let want = input_major(&w);
        let path = dir.path().join("layouts/abc/3.mlp.down.F16");
        assert_eq!(**get(Some(dir.path()), &w).bytes(), **want.bytes());
        let stored = fs::read(&path).unwrap();
        assert_eq!(stored.len(), HEADER + want.bytes().len());
        assert_eq!(**get(Some(dir.path()), &w).bytes(), **want.bytes());
        for damage in [stored[..stored.len() - 1].to_vec(), stored[..100].to_vec(), vec![], {
            let mut s = stored.clone();
            s[HEADER + 7] ^= 1;
            s
        }] {
            fs::write(&path, damage).unwrap();
            assert_eq!(**get(Some(dir.path()), &w).bytes(), **want.bytes());
            assert_eq!(fs::read(&path).unwrap(), stored, "written again");
        }
    }

    #[test]
    fn a_second_start_reads_the_file_and_not_the_original() {
        let dir = tempfile::tempdir().unwrap();
        let first = get(Some(dir.path()), &weight(1));
        let second = get(Some(dir.path()), &weight(2));
        assert_eq!(**first.bytes(), **second.bytes(), "same model hash: the cache answers");
    }

    #[test]
    fn no_cache_or_one_that_cannot_be_written_is_no_error() {
        let w = weight(1);
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("file");
        fs::write(&blocked, "").unwrap();
        for root in [None, Some(blocked.as_path())] {
            assert_eq!(**get(root, &w).bytes(), **input_major(&w).bytes());
        }
    }
}
