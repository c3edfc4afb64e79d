//! The one error type of this crate: what was found where, what was expected, and what to do about it.

use crate::size::Overflow;
use std::{fmt, io, path::Path, path::PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where in the input something is wrong; parts that are not known are left out of the message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Option<PathBuf>,
    /// The tensor, metadata key or configuration key.
    pub item: Option<String>,
    /// Byte from the start of the file.
    pub byte: Option<u64>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(item) = &self.item {
            write!(f, "`{}`: ", Printable(item))?;
        }
        if let Some(byte) = self.byte {
            write!(f, "at byte {byte}: ")?;
        }
        Ok(())
    }
}

/// Text from a file, cut to a readable length and with control characters escaped, so that a message can neither flood
/// nor steer a terminal.
pub struct Printable<'a>(pub &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 120;
        for c in self.0.chars().take(SHOWN) {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        if self.0.chars().nth(SHOWN).is_some() { f.write_str("...") } else { Ok(()) }
    }
}

/// What can go wrong with files and stored data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot {doing}: {source}. Check that the path exists, is readable and has room", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried (`open`, `read`, ...).
        doing: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// Not enough room on the disk; nothing was changed.
    #[error("{}: {needed} bytes needed, {free} free. Free some space or write elsewhere; nothing was changed", path.display())]
    Space {
        /// The file that was to be written.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// The input breaks a rule of its format.
    #[error("{at}found {found}, expected {expected}. {remedy}")]
    Malformed {
        /// Where.
        at: Box<Place>,
        /// What is there.
        found: String,
        /// What the format asks for.
        expected: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A number is above what Lacuna accepts from a file.
    #[error("{at}{what} is {found}, more than the limit of {limit}. {DAMAGED}")]
    Limit {
        /// Where.
        at: Box<Place>,
        /// What is too large.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The largest accepted.
        limit: u64,
    },
    /// Arithmetic on sizes from the input does not fit 64 bits (or the address space).
    #[error("{at}{overflow}. {DAMAGED}")]
    Overflow {
        /// Where.
        at: Box<Place>,
        /// The operation.
        overflow: Overflow,
    },
    /// Something that must be there is not.
    #[error("{at}{what} is missing. {remedy}")]
    Missing {
        /// Where.
        at: Box<Place>,
        /// What is missing.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Well formed, but not something Lacuna computes with.
    #[error("{at}{what} is not supported. {remedy}")]
    Unsupported {
        /// Where.
        at: Box<Place>,
        /// What.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
}

/// Remedy for a file that cannot be what its writer meant.
pub const DAMAGED: &str = "The file is damaged or incomplete: download or convert it again";

impl Error {
    /// [`Error::Malformed`] with the remedy [`DAMAGED`] and no place yet.
    pub fn malformed(found: impl Into<String>, expected: impl Into<String>) -> Self {
        Error::Malformed { at: Box::default(), found: found.into(), expected: expected.into(), remedy: DAMAGED }
    }

    /// [`Error::Missing`] with no place yet.
    pub fn missing(what: impl Into<String>, remedy: &'static str) -> Self {
        Error::Missing { at: Box::default(), what: what.into(), remedy }
    }

    /// [`Error::Unsupported`] with no place yet.
    pub fn unsupported(what: impl Into<String>, remedy: &'static str) -> Self {
        Error::Unsupported { at: Box::default(), what: what.into(), remedy }
    }

    /// [`Error::Limit`] if `found` is above `limit`.
    pub fn check_limit(what: &'static str, found: u64, limit: u64) -> Result<()> {
        if found > limit { Err(Error::Limit { at: Box::default(), what, found, limit }) } else { Ok(()) }
    }

    /// For `map_err` on a system call.
    pub fn io(path: impl AsRef<Path>, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { path, doing, source }
    }

    /// Adds the file, unless one is named already.
    pub fn in_file(self, file: impl AsRef<Path>) -> Self {
        self.with_place(|p| {
            p.file.get_or_insert_with(|| file.as_ref().to_owned());
        })
    }

    /// Adds the tensor or key, unless one is named already.
    pub fn in_item(self, item: &str) -> Self {
        self.with_place(|p| {
            p.item.get_or_insert_with(|| item.to_owned());
        })
    }

    /// Adds the byte, unless one is named already.
    pub fn at_byte(self, byte: u64) -> Self {
        self.with_place(|p| {
            p.byte.get_or_insert(byte);
        })
    }

    /// Where it happened, for errors in the input.
    pub fn place(&self) -> Option<&Place> {
        match self {
            Error::Io { .. } | Error::Space { .. } => None,
            Error::Malformed { at, .. }
            | Error::Limit { at, .. }
            | Error::Overflow { at, .. }
            | Error::Missing { at, .. }
            | Error::Unsupported { at, .. } => Some(at),
        }
    }

    fn with_place(mut self, change: impl FnOnce(&mut Place)) -> Self {
        match &mut self {
            Error::Io { .. } | Error::Space { .. } => {}
            Error::Malformed { at, .. }
            | Error::Limit { at, .. }
            | Error::Overflow { at, .. }
            | Error::Missing { at, .. }
            | Error::Unsupported { at, .. } => change(at),
        }
        self
    }
}

impl From<Overflow> for Error {
    fn from(overflow: Overflow) -> Self {
        Error::Overflow { at: Box::default(), overflow }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_file_item_byte_and_remedy_once() {
        let e =
            Error::malformed("7", "a multiple of 32").at_byte(9).at_byte(10).in_item("a\u{1b}[2J").in_file("m.gguf");
        let text = e.to_string();
        assert!(
            text.starts_with("m.gguf: `a\\u{1b}[2J`: at byte 9: found 7, expected a multiple of 32. The file"),
            "{text}"
        );
    }

    #[test]
    fn long_names_are_cut() {
        let e = Error::malformed("x", "y").in_item(&"n".repeat(1000)).to_string();
        assert!(e.len() < 400 && e.contains("nnn...`"), "{e}");
    }
}
