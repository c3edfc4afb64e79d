//! Converted layouts on disk: one file per matrix, made once, mapped from then on, so that only one copy of a matrix
//! is resident (nothing touches the pages of the original any more).
//!
//! `<cache>/layouts/<model hash>/<layer>.<projection>.<format>` (in mixtures `<layer>.expert-<n>.<projection>...`, bitmaps with
//! `.bitmap` behind): one page of JSON header, then the data. Files appear by rename, so a kill in mid-write leaves at most
//! a temporary file.
//!
//! A start must not read gigabytes to trust them, so there are two checks. The header holds a SHA-256 of all data, and
//! the time of the last change that the file was given when it was written. Where the file still has that time, nobody
//! has written to it since, and a sample (shape and 16 spread pieces, [`model_hash`]) is enough; otherwise (a copied or
//! changed file) all of it is read once, and the time set again if it is right. What the system damages without a write
//! is found by [`check_all`] (`lacuna doctor --check-cache`). A file that fails a check is made again.

use super::{
    bitmaps::bitmap_of,
    transpose::{CopyForm, by_channels},
};
use lacuna_core::{
    atomic::write_atomically,
    bytes::Bytes,
    error::{Error, Result},
    hash::{HashedTensor, model_hash, sha256},
    map::{LoadMode, open},
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::Pool;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Version of the stored form.
const VERSION: u32 = 3;

/// Bytes before the data; a page, so that mapped runs are aligned.
const HEADER: usize = 4096;

/// A matrix that is wanted in another layout.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Layer, from 0.
    pub layer: usize,
    /// Expert, in a mixture.
    pub expert: Option<usize>,
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

/// What a copy is for.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// Reading single channels.
    Channels,
    /// Leaving out zeros.
    Bitmap,
}

impl Layout {
    fn form(self, weight: &Weight) -> CopyForm {
        match self {
            Self::Channels => CopyForm::for_weight(weight).0,
            Self::Bitmap => CopyForm { format: weight.format(), orientation: Orientation::Bitmap },
        }
    }

    fn make(self, weight: &Weight) -> Weight {
        match self {
            Self::Channels => by_channels(weight),
            Self::Bitmap => bitmap_of(weight),
        }
    }
}

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct Header {
    version: u32,
    orientation: String,
    format: String,
    outputs: usize,
    inputs: usize,
    /// [`model_hash`] of shape and samples.
    checksum: String,
    /// Of all data.
    #[serde(default)]
    sha256: String,
    /// Seconds since 1970 that the file has as the time of its last change.
    #[serde(default)]
    written: u64,
}

impl Header {
    fn new(w: &Weight) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self {
            version: VERSION,
            orientation: w.orientation().name().into(),
            format: w.format().name().into(),
            outputs: w.outputs(),
            inputs: w.inputs(),
            checksum: sample(w),
            sha256: sha256(w.bytes()),
            // Even seconds: some file systems store no others.
            written: now / 2 * 2,
        }
    }

    fn time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.written)
    }

    /// Whether it describes `w` (without looking at all data).
    fn is_of(&self, w: &Weight) -> bool {
        let shape = (self.outputs, self.inputs) == (w.outputs(), w.inputs()) && self.format == w.format().name();
        self.version == VERSION && self.orientation == w.orientation().name() && shape && self.checksum == sample(w)
    }
}

fn sample(w: &Weight) -> String {
    let shape = [w.inputs() as u64, w.outputs() as u64];
    let tensor = HashedTensor { name: w.orientation().name(), kind: w.format().name(), shape: &shape, data: w.bytes() };
    model_hash(&VERSION.to_le_bytes(), vec![tensor])
}

impl LayoutCache {
    /// The cache of the model with this hash below `root`; without a root, copies live in memory.
    pub fn new(root: Option<&Path>, model: &str) -> Self {
        Self { folder: root.map(|r| r.join("layouts").join(model)) }
    }

    /// The cache of a form of the same model whose matrices have other shapes.
    pub fn beside(&self, ending: &str) -> Self {
        let named = |f: &PathBuf| {
            let mut name = f.clone().into_os_string();
            name.push(ending);
            PathBuf::from(name)
        };
        Self { folder: self.folder.as_ref().map(named) }
    }

    /// Copies by channels of all `wanted`, in their order: mapped from the cache where it has them, otherwise made by
    /// the threads of `pool` (one matrix each) and stored. `progress(done, all)` is called from those threads.
    ///
    /// A cache that cannot be written is no error: the copies then live in memory, and the log says so.
    pub fn by_channels(
        &self,
        wanted: &[Wanted<'_>],
        pool: &Pool,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Vec<Weight> {
        self.all(wanted, Layout::Channels, pool, progress)
    }

    /// Bitmaps of all `wanted`, as [`LayoutCache::by_channels`] gives copies.
    ///
    /// # Panics
    /// If a format has no bitmaps.
    pub fn bitmaps(&self, wanted: &[Wanted<'_>], pool: &Pool, progress: &(dyn Fn(usize, usize) + Sync)) -> Vec<Weight> {
        self.all(wanted, Layout::Bitmap, pool, progress)
    }

    fn all(
        &self,
        wanted: &[Wanted<'_>],
        layout: Layout,
        pool: &Pool,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Vec<Weight> {
        let made: Vec<Mutex<Option<Weight>>> = wanted.iter().map(|_| Mutex::new(None)).collect();
        let done = AtomicUsize::new(0);
        pool.run(wanted.len(), &|_, i| {
            let weight = self.one(&wanted[i], layout);
            *made[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(weight);
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, wanted.len());
        });
        let take = |m: Mutex<Option<Weight>>| m.into_inner().unwrap_or_else(PoisonError::into_inner);
        made.into_iter().map(|m| take(m).expect("the pool runs every chunk")).collect()
    }

    fn one(&self, wanted: &Wanted<'_>, layout: Layout) -> Weight {
        let Some(folder) = &self.folder else {
            let copy = layout.make(wanted.weight);
            wanted.weight.bytes().release();
            return copy;
        };
        let form = layout.form(wanted.weight);
        let expert = wanted.expert.map_or(String::new(), |e| format!("expert-{e}."));
        let end = if layout == Layout::Bitmap { ".bitmap" } else { "" };
        let path = folder.join(format!("{}.{expert}{}.{}{end}", wanted.layer, wanted.proj, form.format.name()));
        match read(&path, wanted.weight, form) {
            Ok(Some(weight)) => return weight,
            Ok(None) => tracing::debug!("{} is of another version and made again", path.display()),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(e) => {
                tracing::warn!("a converted layout is not what was written and made again: {}", path.display());
                tracing::debug!("{e}");
            }
        }
        let copy = layout.make(wanted.weight);
        // From here on only the copy is read.
        wanted.weight.bytes().release();
        match write(&path, &copy).and_then(|()| read(&path, wanted.weight, form)) {
            Ok(mapped) => mapped.unwrap_or(copy),
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
    let (bytes, header) = (weight.bytes(), Header::new(weight));
    write_atomically(path, Some((HEADER + bytes.len()) as u64), |out| {
        let mut json = serde_json::to_vec(&header)?;
        json.resize(HEADER, b'\n');
        out.write_all(&json)?;
        out.write_all(bytes)
    })?;
    stamp(path, &header)
}

/// Gives the file the time that its header promises. A kill before this costs one full check at the next start.
fn stamp(path: &Path, header: &Header) -> Result<()> {
    let file = File::options().append(true).open(path).map_err(Error::io(path, "open"))?;
    file.set_modified(header.time()).map_err(Error::io(path, "set the time of"))
}

/// The parts of a stored file.
struct Stored {
    header: Header,
    data: Bytes,
}

fn open_stored(path: &Path) -> Result<Stored> {
    let file = open(path, LoadMode::Map)?;
    let head = file.get(..HEADER).ok_or_else(|| bad(path, "a file shorter than its header"))?;
    let header = serde_json::from_slice(head).map_err(|e| bad(path, &e.to_string()))?;
    let data = file.slice(HEADER..file.len()).ok_or_else(|| bad(path, "no data"))?;
    Ok(Stored { header, data })
}

fn bad(path: &Path, found: &str) -> Error {
    Error::malformed(found, "a converted layout of this matrix").in_file(path)
}

/// Maps a stored copy of `original` in `form`, or says what is wrong with it; `None` if another version of the program wrote it.
fn read(path: &Path, original: &Weight, form: CopyForm) -> Result<Option<Weight>> {
    let Stored { header, data } = open_stored(path)?;
    if header.version != VERSION {
        return Ok(None);
    }
    let weight = Weight::new(form.format, form.orientation, original.outputs(), original.inputs(), data)
        .ok_or_else(|| bad(path, "data of another length"))?;
    if !header.is_of(&weight) {
        return Err(bad(path, "another shape, format or checksum"));
    }
    let changed = fs::metadata(path).and_then(|m| m.modified()).map_err(Error::io(path, "examine"))?;
    if changed != header.time() {
        if sha256(weight.bytes()) != header.sha256 {
            return Err(bad(path, "data that changed since it was written"));
        }
        // A cache that cannot be written is checked in full each time.
        if let Err(e) = stamp(path, &header) {
            tracing::debug!("{e}");
        }
    }
    Ok(Some(weight))
}

/// Reads every converted layout below the cache `root` in full and removes those whose data is not what was written
/// (they are made again when they are needed). Returns how many are good, and what was wrong with the others.
///
/// # Errors
/// A folder that cannot be listed, or a file that cannot be removed.
pub fn check_all(root: &Path) -> Result<(usize, Vec<Error>)> {
    let (mut good, mut wrong) = (0, Vec::new());
    let list = |folder: &Path| match fs::read_dir(folder) {
        Ok(entries) => entries.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    };
    let layouts = root.join("layouts");
    for model in list(&layouts).map_err(Error::io(&layouts, "list"))?.into_iter().filter(|p| p.is_dir()) {
        // Names that begin with a dot are files that someone is writing.
        let hidden = |p: &PathBuf| p.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        for path in list(&model).map_err(Error::io(&model, "list"))?.into_iter().filter(|p| !hidden(p)) {
            let damaged = |s: Stored| sha256(&s.data) != s.header.sha256 || s.header.version != VERSION;
            match open_stored(&path).map(damaged) {
                Ok(false) => good += 1,
                found => {
                    fs::remove_file(&path).map_err(Error::io(&path, "remove"))?;
                    wrong.push(found.err().unwrap_or_else(|| bad(&path, "data that changed since it was written")));
                }
            }
        }
    }
    Ok((good, wrong))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::weight::Orientation;
    use lacuna_kernels::Format;

    fn weight(seed: usize) -> Weight {
        let bytes: Vec<u8> = (0..40 * 72 * 2).map(|i| ((i * 31 + seed) % 251) as u8).collect();
        Weight::new(Format::F16, Orientation::OutputMajor, 40, 72, bytes.into()).unwrap()
    }

    fn get(root: Option<&Path>, w: &Weight) -> Weight {
        let wanted = Wanted { layer: 3, expert: None, proj: Proj::Down, weight: w };
        let copies = LayoutCache::new(root, "abc").by_channels(&[wanted], &Pool::new(1), &|_, _| {});
        copies.into_iter().next().unwrap()
    }

    #[test]
    fn stored_mapped_and_made_again_when_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let w = weight(1);
        let want = by_channels(&w);
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
            assert_eq!(data(&path), data_of(&stored), "written again");
        }
    }

    fn data(path: &Path) -> Vec<u8> {
        data_of(&fs::read(path).unwrap())
    }

    fn data_of(file: &[u8]) -> Vec<u8> {
        file[HEADER..].to_vec()
    }

    /// A matrix too large for the sample to cover, with one byte changed between the pieces.
    #[test]
    fn a_change_that_the_sample_misses_is_found_by_the_time_or_the_full_check() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..512 * 512 * 2).map(|i: usize| (i * 31 % 241) as u8).collect();
        let w = Weight::new(Format::F16, Orientation::OutputMajor, 512, 512, bytes.into()).unwrap();
        let want = get(Some(dir.path()), &w).bytes().to_vec();
        let path = dir.path().join("layouts/abc/3.mlp.down.F16");
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        let damage = || {
            let mut file = fs::read(&path).unwrap();
            file[HEADER + 6000] ^= 1;
            fs::write(&path, file).unwrap();
        };
        damage();
        assert_ne!(data(&path), want);
        assert_eq!(**get(Some(dir.path()), &w).bytes(), *want, "another time: read in full, and made again");
        // The same damage under the old time is what a failing disk does.
        let time_now = fs::metadata(&path).unwrap().modified().unwrap();
        damage();
        File::options().append(true).open(&path).unwrap().set_modified(time_now.max(time)).unwrap();
        assert_ne!(**get(Some(dir.path()), &w).bytes(), *want, "the sample does not see it");
        let (good, wrong) = check_all(dir.path()).unwrap();
        assert_eq!((good, wrong.len()), (0, 1));
        assert!(wrong[0].to_string().contains("3.mlp.down.F16"), "{}", wrong[0]);
        assert_eq!(**get(Some(dir.path()), &w).bytes(), *want);
        // A copy has another time and the right data: it is read in full once and keeps its header.
        File::options().append(true).open(&path).unwrap().set_modified(UNIX_EPOCH).unwrap();
        let before = fs::read(&path).unwrap();
        assert_eq!(**get(Some(dir.path()), &w).bytes(), *want);
        assert_eq!(fs::read(&path).unwrap(), before);
        assert_ne!(fs::metadata(&path).unwrap().modified().unwrap(), UNIX_EPOCH, "the time is set again");
        assert_eq!(check_all(dir.path()).unwrap().0, 1);
        assert_eq!(check_all(&dir.path().join("nowhere")).unwrap().0, 0);
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
            assert_eq!(**get(root, &w).bytes(), **by_channels(&w).bytes());
        }
    }
}
