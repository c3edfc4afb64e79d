//! The residual streams of all calibration windows between two blocks: in memory, or in a file where they do not fit.

use crate::error::{Error, Result};
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// One residual stream per window.
pub struct Hidden {
    windows: Vec<Vec<u32>>,
    lengths: Vec<usize>,
    store: Store,
}

enum Store {
    Memory(Vec<Vec<f32>>),
    File(Spilled),
}

struct Spilled {
    file: File,
    path: PathBuf,
}

impl Drop for Spilled {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Hidden {
    /// Room for streams of `width` numbers per token of these windows; in the file `spill` if they take more than `most` bytes.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn new(windows: Vec<Vec<u32>>, width: usize, most: u64, spill: &Path) -> Result<Self> {
        let lengths: Vec<usize> = windows.iter().map(|w| w.len() * width).collect();
        let bytes = 4 * lengths.iter().map(|n| *n as u64).sum::<u64>();
        let store = if bytes <= most {
            Store::Memory(lengths.iter().map(|n| vec![0.0; *n]).collect())
        } else {
            tracing::info!("residual streams of {bytes} bytes are kept in {}", spill.display());
            let open = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(spill);
            Store::File(Spilled { file: open.map_err(Error::io(spill))?, path: spill.to_owned() })
        };
        Ok(Self { windows, lengths, store })
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// The tokens of window `i`.
    pub fn tokens(&self, i: usize) -> &[u32] {
        &self.windows[i]
    }

    fn offset(&self, i: usize) -> u64 {
        4 * self.lengths[..i].iter().map(|n| *n as u64).sum::<u64>()
    }

    /// The stream of window `i`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn get(&mut self, i: usize) -> Result<Vec<f32>> {
        let offset = self.offset(i);
        match &mut self.store {
            Store::Memory(all) => Ok(all[i].clone()),
            Store::File(Spilled { file, path }) => {
                let mut bytes = vec![0; 4 * self.lengths[i]];
                let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut bytes));
                read.map_err(Error::io(path))?;
                Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
        }
    }

    /// Replaces the stream of window `i`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set(&mut self, i: usize, x: &[f32]) -> Result<()> {
        let offset = self.offset(i);
        match &mut self.store {
            Store::Memory(all) => all[i].copy_from_slice(x),
            Store::File(Spilled { file, path }) => {
                let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
                let write = file.seek(SeekFrom::Start(offset)).and_then(|_| file.write_all(&bytes));
                write.map_err(Error::io(path))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_file_hold_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hidden");
        for most in [1 << 20, 0] {
            let mut h = Hidden::new(vec![vec![7; 3], vec![8], vec![9; 2]], 1, most, &path).unwrap();
            assert_eq!((h.len(), h.tokens(1), path.exists()), (3, &[8][..], most == 0));
            for (i, x) in [vec![1.0, 2.0, 3.0], vec![-4.0], vec![5.0, 6.5]].iter().enumerate() {
                h.set(i, x).unwrap();
            }
            h.set(1, &[7.0]).unwrap();
            assert_eq!(
                [h.get(0).unwrap(), h.get(1).unwrap(), h.get(2).unwrap()],
                [vec![1.0, 2.0, 3.0], vec![7.0], vec![5.0, 6.5]]
            );
        }
        assert!(!path.exists());
    }
}
