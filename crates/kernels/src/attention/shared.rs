//! One slice written by several threads in disjoint parts.

use std::marker::PhantomData;

/// A slice whose parts are handed out without a check of their overlap.
pub(super) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `slice`, whose callers promise disjoint parts.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// The `len` elements from `start` on.
    ///
    /// # Panics
    /// If they are not inside.
    ///
    /// # Safety
    /// While the result lives, no other part that overlaps it may be used.
    #[allow(clippy::mut_from_ref, reason = "the purpose of the type")]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start} + {len} of {}", self.len);
        // SAFETY: inside the borrowed slice (just checked); disjointness is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
