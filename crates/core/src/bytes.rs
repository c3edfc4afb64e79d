//! Shared, immutable bytes: owned, or a part of a mapped file.

use std::{fmt, io, ops::Deref, ops::Range, sync::Arc};

/// What holds bytes: memory, or a mapped file.
pub trait Owner: Send + Sync {
    /// All of its bytes: the same slice each time.
    fn bytes(&self) -> &[u8];

    /// A hint that these bytes are not read soon: a mapped file gives their pages back to the system, and reads them
    /// again when they are touched. Memory stays as it is.
    fn release(&self, _range: Range<usize>) {}

    /// A copy of these bytes. A mapped file reads them from the file, so that no page of the map is touched.
    ///
    /// # Errors
    /// What the system says, or a file that has become shorter.
    fn copy(&self, range: Range<usize>) -> io::Result<Vec<u8>> {
        Ok(self.bytes()[range].to_vec())
    }
}

impl Owner for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

impl Owner for &'static [u8] {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A cheaply cloned part of an immutable byte buffer (a mapped file, or memory).
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn Owner>,
    range: Range<usize>,
}

impl Bytes {
    /// All bytes of `owner`.
    pub fn new(owner: Arc<dyn Owner>) -> Self {
        let range = 0..owner.bytes().len();
        Self { owner, range }
    }

    /// A part of these bytes; `None` if `range` (relative to them) is not inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let start = self.range.start.checked_add(range.start)?;
        let end = self.range.start.checked_add(range.end)?;
        (range.start <= range.end && end <= self.range.end)
            .then(|| Self { owner: self.owner.clone(), range: start..end })
    }

    /// Says that these bytes are not read soon; see [`Owner::release`].
    pub fn release(&self) {
        self.owner.release(self.range.clone());
    }

    /// The same bytes in memory of their own; see [`Owner::copy`].
    ///
    /// # Errors
    /// As there.
    pub fn in_memory(&self) -> io::Result<Self> {
        self.owner.copy(self.range.clone()).map(Self::from)
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.bytes()[self.range.clone()]
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(v: Vec<u8>) -> Self {
        Self::new(Arc::new(v))
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({} bytes)", self.len())
    }
}
