//! Scratch memory aligned to cache lines, viewed as the number type that a kernel works in.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// One cache line, and one AVX-512 register.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A growing buffer of cache lines. Its contents are whatever was written last; fresh lines are zero.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
}

/// Number types a buffer can be viewed as.
///
/// # Safety
/// Implementors have no padding, are valid for every bit pattern and are aligned to at most 64 bytes.
pub(crate) unsafe trait Number: Copy {}

// SAFETY: plain numbers.
unsafe impl Number for f32 {}
// SAFETY: plain numbers.
unsafe impl Number for i32 {}
// SAFETY: plain numbers.
unsafe impl Number for u32 {}
// SAFETY: plain numbers.
unsafe impl Number for u16 {}
// SAFETY: plain numbers.
unsafe impl Number for u8 {}
// SAFETY: plain numbers.
unsafe impl Number for i8 {}

impl Buffer {
    /// Makes room for `n` numbers and returns them all, holding whatever was there before.
    pub(crate) fn at_least<T: Number>(&mut self, n: usize) -> &mut [T] {
        let lines = (n * size_of::<T>()).div_ceil(size_of::<Line>());
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 64]));
        }
        // SAFETY: the lines hold at least n numbers, are aligned to 64 and initialised; `Number` allows any bits.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), n) }
    }

    /// The first `n` numbers.
    ///
    /// # Panics
    /// If the buffer is shorter.
    pub(crate) fn numbers<T: Number>(&self, n: usize) -> &[T] {
        assert!(n * size_of::<T>() <= self.lines.len() * size_of::<Line>(), "the buffer is shorter than {n} numbers");
        // SAFETY: as above, checked by the assertion.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), n) }
    }
}

/// Numbers of one type that begin at a cache line: loads of whole registers never touch two lines.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbers<T> {
    buffer: Buffer,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Number> Numbers<T> {
    /// Makes it `n` numbers long; new ones hold anything that was there before.
    pub(crate) fn resize(&mut self, n: usize) {
        self.buffer.at_least::<T>(n);
        self.len = n;
    }
}

impl<T: Number> Deref for Numbers<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.buffer.numbers(self.len)
    }
}

impl<T: Number> DerefMut for Numbers<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.buffer.at_least(self.len)
    }
}

/// A mutable slice whose disjoint parts are written by several workers.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: `part` forbids overlapping parts by contract, and pointers of `at` are dereferenced by other contracts only.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Shares `data`; the caller keeps it borrowed while parts are in use.
    pub(crate) fn new(data: &mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len() }
    }

    /// The first of the numbers `[start, start + len)`, as a pointer because parts of several chunks may interleave.
    ///
    /// # Panics
    /// If they are not inside the slice.
    pub(crate) fn at(self, start: usize, len: usize) -> *mut T {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "part outside of the shared slice");
        self.data.wrapping_add(start)
    }

    /// The part `[start, start + len)`.
    ///
    /// # Safety
    /// The slice given to [`Shared::new`] is still alive and no two parts alive at once overlap.
    ///
    /// # Panics
    /// If the part is not inside the slice.
    pub(crate) unsafe fn part<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: inside the slice as `at` checks; exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.at(start, len), len) }
    }
}
