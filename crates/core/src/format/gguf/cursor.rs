//! Reads little-endian fields one after the other; every error carries the byte.

use crate::{
    error::{Error, Result},
    size::Size,
};

pub struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// Next byte to be read.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.position.checked_add(n);
        let taken = end.and_then(|end| self.bytes.get(self.position..end)).ok_or_else(|| {
            let found = format!("the end of the file after {} bytes", self.bytes.len());
            Error::malformed(found, format!("{n} more bytes")).at_byte(self.position as u64)
        })?;
        self.position += n;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A u64 that counts items of at least `smallest` bytes each: above `limit`, or more than the rest of the file can
    /// hold, is an error before anything is reserved for them.
    pub fn count(&mut self, what: &'static str, limit: u64, smallest: usize) -> Result<usize> {
        let at = self.position as u64;
        let n = self.u64()?;
        let check = || -> Result<usize> {
            Error::check_limit(what, n, limit)?;
            let left = (self.bytes.len() - self.position) as u64;
            let needed = Size(n).times(Size::from(smallest))?;
            if needed.0 > left {
                let expected = format!("at least {} for {what}, {n}", needed.0);
                return Err(Error::malformed(format!("{left} bytes left in the file"), expected));
            }
            Ok(Size(n).index()?)
        };
        check().map_err(|e| e.at_byte(at))
    }

    /// A u64 length and so many bytes of UTF-8.
    pub fn string(&mut self, what: &'static str, limit: u64) -> Result<&'a str> {
        let at = self.position as u64;
        let n = self.count(what, limit, 1)?;
        str::from_utf8(self.take(n)?).map_err(|_| Error::malformed("bytes that are no UTF-8", "a string").at_byte(at))
    }
}
