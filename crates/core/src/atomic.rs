//! Files that are always complete: written under a temporary name, flushed to the disk, then renamed.

use crate::error::{Error, Result};
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

/// Writes `path` through `body`. At every moment, whatever ends the program, `path` is the complete old or the complete
/// new file. With `needed` (the exact size) the space is reserved before the first byte.
///
/// # Errors
/// [`Error::Space`] if there is too little room, [`Error::Io`] otherwise; the old file is then untouched and the
/// temporary one (`.NAME.PID-N.tmp` in the same folder) removed.
pub fn write_atomically(
    path: impl AsRef<Path>,
    needed: Option<u64>,
    body: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    write_through(path.as_ref(), needed, |file| file, body)
}

/// Bytes that can still be written below the folder `dir`; `None` where the system does not tell.
#[cfg(target_os = "linux")]
pub fn free_space(dir: &Path) -> Option<u64> {
    let s = rustix::fs::statvfs(dir).ok()?;
    Some(s.f_bavail.saturating_mul(s.f_frsize))
}

/// Bytes that can still be written below the folder `dir`; `None` where the system does not tell.
#[cfg(not(target_os = "linux"))]
pub fn free_space(_: &Path) -> Option<u64> {
    None
}

/// Puts the complete folder `new` in the place of `path`, and removes what was there. At every moment `path` is the old or
/// the new folder (where the system cannot swap two folders: for an instant neither).
///
/// # Errors
/// The system refuses; `path` is then what it was, or, where folders cannot be swapped, may lie beside it.
pub fn replace_folder(new: &Path, path: &Path) -> Result<()> {
    let sync = |p: &Path| p.parent().map(|f| if f.as_os_str().is_empty() { Path::new(".") } else { f }).map(File::open);
    if path.exists() {
        swap(new, path).map_err(Error::io(path, "replace"))?;
        fs::remove_dir_all(new).map_err(Error::io(new, "remove"))?;
    } else {
        fs::rename(new, path).map_err(Error::io(path, "rename"))?;
    }
    // Some systems cannot flush folders.
    if let Some(Ok(folder)) = sync(path) {
        let _ = folder.sync_all();
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn swap(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        Err(_) => swap_in_steps(a, b),
    }
}

#[cfg(not(target_os = "linux"))]
fn swap(a: &Path, b: &Path) -> io::Result<()> {
    swap_in_steps(a, b)
}

fn swap_in_steps(a: &Path, b: &Path) -> io::Result<()> {
    let mut aside = b.as_os_str().to_owned();
    aside.push(format!(".{}.old", process::id()));
    fs::rename(b, &aside)?;
    fs::rename(a, b)?;
    fs::rename(&aside, a)
}

/// As [`write_atomically`], with every write to the file passing through `wrap`: the tests make those fail.
fn write_through<W: Write>(
    path: &Path,
    needed: Option<u64>,
    wrap: impl FnOnce(File) -> W,
    body: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let temporary = Temporary(folder.join(temporary_name(path)?));
    let file = File::create_new(&temporary.0).map_err(Error::io(&temporary.0, "create"))?;
    if let Some(needed) = needed {
        reserve(path, &file, needed)?;
    }
    let handle = file.try_clone().map_err(Error::io(path, "write"))?;
    let mut writer = BufWriter::with_capacity(1 << 20, wrap(file));
    body(&mut writer).and_then(|()| writer.flush()).map_err(Error::io(path, "write"))?;
    handle.sync_all().map_err(Error::io(path, "flush"))?;
    fs::rename(&temporary.0, path).map_err(Error::io(path, "rename"))?;
    // The rename itself is on the disk once the folder is; some systems cannot flush folders.
    let _ = File::open(folder).and_then(|f| f.sync_all());
    Ok(())
}

/// Removes the file it names when dropped; after the rename there is none left.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn temporary_name(path: &Path) -> Result<OsString> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name =
        path.file_name().ok_or_else(|| Error::malformed("a path without a file name", "a file name").in_file(path))?;
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{}.tmp", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    Ok(temporary)
}

/// Takes `needed` bytes from the file system at once, so that a full disk shows before the work and not after it.
#[cfg(target_os = "linux")]
fn reserve(path: &Path, file: &File, needed: u64) -> Result<()> {
    use rustix::{fs, io::Errno};
    if needed == 0 {
        return Ok(());
    }
    match fs::fallocate(file, fs::FallocateFlags::KEEP_SIZE, 0, needed) {
        Err(Errno::NOSPC | Errno::FBIG) => {
            let free = fs::fstatvfs(file).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize));
            Err(Error::Space { path: path.to_owned(), needed, free })
        }
        // Not every file system can reserve; writing will then tell.
        _ => Ok(()),
    }
}

#[cfg(not(target_os = "linux"))]
fn reserve(_: &Path, _: &File, _: u64) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails the `left`-th write.
    struct Failing {
        file: File,
        left: usize,
    }

    impl Write for Failing {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.left == 0 {
                return Err(io::Error::other("the disk is full"));
            }
            self.left -= 1;
            self.file.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.file.flush()
        }
    }

    fn names(dir: &Path) -> Vec<OsString> {
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect()
    }

    #[test]
    fn fail_the_nth_write_for_every_n() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        fs::write(&path, "old").unwrap();
        let piece = vec![7_u8; 700_000];
        let body = |w: &mut dyn Write| (0..10).try_for_each(|_| w.write_all(&piece));
        let mut failures = 0;
        for n in 0.. {
            match write_through(&path, Some(7_000_000), |file| Failing { file, left: n }, body) {
                Err(e) => {
                    failures += 1;
                    assert!(e.to_string().contains("the disk is full"), "{e}");
                    assert_eq!(fs::read(&path).unwrap(), b"old");
                    assert_eq!(names(dir.path()), ["model"]);
                }
                Ok(()) => break,
            }
        }
        assert!(failures > 5, "{failures}");
        assert_eq!(fs::read(&path).unwrap(), vec![7; 7_000_000]);
        assert_eq!(names(dir.path()), ["model"]);
    }

    #[test]
    fn an_error_or_panic_of_the_body_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let failed = write_atomically(&path, None, |_| Err(io::Error::other("no more")));
        assert!(matches!(failed, Err(Error::Io { .. })));
        let panicked = std::panic::catch_unwind(|| write_atomically(&path, None, |_| panic!("in the body")));
        assert!(panicked.is_err());
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_disk_that_is_too_small_is_refused_before_the_work() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("huge");
        let refused = write_atomically(&path, Some(1 << 60), |_| panic!("must not be reached"));
        assert!(matches!(refused, Err(Error::Space { needed, .. }) if needed == 1 << 60), "{refused:?}");
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn folders_are_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (new, path) = (dir.path().join("new"), dir.path().join("model"));
        let make = |at: &Path, text: &str| {
            fs::create_dir(at).unwrap();
            fs::write(at.join("file"), text).unwrap();
        };
        make(&new, "first");
        replace_folder(&new, &path).unwrap();
        make(&new, "second");
        replace_folder(&new, &path).unwrap();
        assert_eq!(
            (fs::read(path.join("file")).unwrap(), names(dir.path())),
            (b"second".to_vec(), vec!["model".into()])
        );
        make(&new, "third");
        swap_in_steps(&new, &path).unwrap();
        assert_eq!(fs::read(path.join("file")).unwrap(), b"third");
        assert_eq!(fs::read(new.join("file")).unwrap(), b"second");
        assert!(free_space(dir.path()).is_none_or(|n| n > 0));
    }

    #[test]
    fn a_bare_file_name_and_a_path_without_one() {
        assert!(write_atomically("..", None, |_| Ok(())).is_err());
        assert!(write_atomically("/", None, |_| Ok(())).is_err());
    }
}
