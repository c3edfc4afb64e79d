//! Aligned bytes for pages.

use std::ops::{Deref, DerefMut};

/// Zeroed bytes whose start is aligned to a cache line ([`super::PAGE_ALIGN`]), which dereference to `[u8]`.
///
/// Holding many pages in one buffer lets the system back them with huge pages.
#[derive(Clone, Default)]
pub struct PageBuf {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl PageBuf {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }
}

impl Deref for PageBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the lines are one allocation of at least `len` initialised bytes, and `u8` has no alignment.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the borrow of `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_zero_and_writable() {
        for len in [0, 1, 63, 64, 1000] {
            let mut buf = PageBuf::zeroed(len);
            assert_eq!(buf.len(), len);
            assert!(buf.as_ptr().addr().is_multiple_of(crate::attention::PAGE_ALIGN));
            assert!(buf.iter().all(|&b| b == 0));
            buf.fill(7);
            assert!(buf.clone().iter().all(|&b| b == 7));
        }
    }
}
