//! Files as bytes: the one audited place that maps memory.
#![allow(
    unsafe_code,
    reason = "mapping a file is unsafe by nature; this module is the one place of the crate that does it"
)]

use crate::{
    bytes::{Bytes, Owner},
    error::{Error, Result},
};
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

/// How the bytes of a file come into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadMode {
    /// Mapped: pages come from the disk when first read and are shared between processes. The file must not be cut or
    /// changed while it is in use; the system ends a program that reads a page which is gone.
    #[default]
    Map,
    /// Read into memory at once: safe against later changes of the file. (Models look at the header through a map first,
    /// to refuse what does not fit before they read it; the weights are then read.)
    Read,
}

/// All bytes of the regular file at `path`.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened, mapped or read; [`Error::Malformed`] if it is a folder or a device.
pub fn open(path: impl AsRef<Path>, mode: LoadMode) -> Result<Bytes> {
    let path = path.as_ref();
    let mut file = File::open(path).map_err(Error::io(path, "open"))?;
    let metadata = file.metadata().map_err(Error::io(path, "examine"))?;
    if !metadata.is_file() {
        return Err(Error::malformed("a folder or device", "a regular file").in_file(path));
    }
    match mode {
        LoadMode::Map => map(file).map_err(Error::io(path, "map")),
        LoadMode::Read => read(&mut file, metadata.len()).map(Bytes::from).map_err(Error::io(path, "read")),
    }
}

/// As [`open`] in read mode, but refuses a file of more than `limit` bytes before reading it.
pub fn read_small(path: impl AsRef<Path>, limit: u64) -> Result<Bytes> {
    let path = path.as_ref();
    let length = std::fs::metadata(path).map_err(Error::io(path, "open"))?.len();
    Error::check_limit("the size of the file", length, limit).map_err(|e| e.in_file(path))?;
    open(path, LoadMode::Read)
}

/// A mapped file, and the file itself for reading parts without the map.
struct Mapped {
    map: memmap2::Mmap,
    /// Behind a lock, since a file has one position for all of its readers.
    file: Mutex<File>,
}

impl Owner for Mapped {
    fn bytes(&self) -> &[u8] {
        &self.map
    }

    #[cfg(unix)]
    fn release(&self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        // SAFETY: the pages of a read-only map of a file that DONTNEED drops come back from the file with the same bytes
        // when they are touched; the range is inside the map, which `Bytes` keeps. A hint that the system refuses costs
        // memory and nothing else.
        let _ =
            unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
    }

    fn copy(&self, range: Range<usize>) -> io::Result<Vec<u8>> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(range.start as u64))?;
        let bytes = read(&mut file, range.len() as u64)?;
        if bytes.len() == range.len() {
            return Ok(bytes);
        }
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was read"))
    }
}

fn map(file: File) -> io::Result<Bytes> {
    // SAFETY: the map is read-only and private to this value, and every reader sees plain bytes, for which any content is
    // valid. What no program can rule out is that another process changes or cuts the file meanwhile; `LoadMode::Map`
    // documents that, and `LoadMode::Read` is the mode for files that are not trusted to stay.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(Bytes::new(Arc::new(Mapped { map, file: Mutex::new(file) })))
}

fn read(file: &mut File, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // A file too large for memory is an error of this call and not an abort of the program.
    bytes.try_reserve_exact(usize::try_from(length).unwrap_or(usize::MAX))?;
    file.take(length).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_modes_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        for content in [b"".as_slice(), b"some bytes"] {
            let path = dir.path().join("f");
            std::fs::write(&path, content).unwrap();
            assert_eq!(&*open(&path, LoadMode::Map).unwrap(), content);
            assert_eq!(&*open(&path, LoadMode::Read).unwrap(), content);
        }
    }

    #[test]
    fn parts_of_a_map_are_read_from_the_file_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let content: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = open(&path, LoadMode::Map).unwrap();
        for range in [0..0, 0..1, 5000..70_001, 99_999..100_000] {
            let part = file.slice(range.clone()).unwrap();
            assert_eq!(&*part.in_memory().unwrap(), &content[range.clone()]);
            part.release();
            assert_eq!(&*part, &content[range], "pages come back");
        }
        let end = file.slice(90_000..100_000).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(95_000).unwrap();
        assert_eq!(end.in_memory().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn folders_devices_and_missing_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        for path in [dir.path(), &missing, Path::new("/dev/null")] {
            let message = open(path, LoadMode::Map).unwrap_err().to_string();
            assert!(message.contains(path.to_str().unwrap()), "{message}");
        }
        std::fs::write(&missing, [0; 11]).unwrap();
        assert!(matches!(read_small(&missing, 10), Err(Error::Limit { found: 11, limit: 10, .. })));
        assert_eq!(read_small(&missing, 11).unwrap().len(), 11);
    }
}
