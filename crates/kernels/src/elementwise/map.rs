//! Loops over slices, one lane-vector at a time.

use crate::lanes::{Kernel, Lanes, Twin};

/// A function of one number, in its lane form and its plain form.
pub(super) trait Op: Copy {
    /// The readable twin.
    fn plain(self, x: f32) -> f32;
    /// The lane form; must be `inline(always)`.
    ///
    /// # Safety
    /// The machine must have the instruction set of `V`.
    unsafe fn lanes<V: Lanes>(self, x: V) -> V;
}

/// `x = f(x)`.
pub(super) struct Map<'a, F>(pub F, pub &'a mut [f32]);

impl<F: Op> Twin for Map<'_, F> {
    fn scalar(self) {
        self.1.iter_mut().for_each(|x| *x = self.0.plain(*x));
    }
}

impl<F: Op> Kernel for Map<'_, F> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let mut chunks = self.1.chunks_exact_mut(V::N);
        for x in &mut chunks {
            // SAFETY: the caller vouches for the instruction set; the chunk has `N` numbers.
            unsafe { self.0.lanes(V::load(x.as_ptr())).store(x.as_mut_ptr()) };
        }
        let x = chunks.into_remainder();
        // SAFETY: as above, with fewer than `N` numbers.
        unsafe { self.0.lanes(V::load_part(x.as_ptr(), x.len())).store_part(x.as_mut_ptr(), x.len()) };
    }
}

/// `out = f(x) * y`.
pub(super) struct MapMul<'a, F>(pub F, pub &'a [f32], pub &'a [f32], pub &'a mut [f32]);

impl<F: Op> Twin for MapMul<'_, F> {
    fn scalar(self) {
        for ((x, y), o) in self.1.iter().zip(self.2).zip(self.3) {
            *o = self.0.plain(*x) * y;
        }
    }
}

impl<F: Op> Kernel for MapMul<'_, F> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        for ((x, y), o) in self.1.chunks(V::N).zip(self.2.chunks(V::N)).zip(self.3.chunks_mut(V::N)) {
            let n = x.len().min(y.len()).min(o.len());
            // SAFETY: the caller vouches for the instruction set; `n` numbers are in each chunk.
            unsafe {
                let (x, y) = (V::load_part(x.as_ptr(), n), V::load_part(y.as_ptr(), n));
                self.0.lanes(x).mul(y).store_part(o.as_mut_ptr(), n);
            }
        }
    }
}
