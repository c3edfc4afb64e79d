//! Decode products.

use super::Bitmap;
use crate::gemv::Operand;
use crate::gemv::runs::{self, Runs};
use crate::{Format, Isa, Pool, isa};

/// The products `y_i = W x_i` of some vectors. Each result has the bits that it has alone; with AVX2 and NEON those of
/// the dense product, with AVX-512 too, except that Q8_0 rounds its sums in another order there.
pub struct Job<'a> {
    /// `[out, in]`.
    pub w: Bitmap<'a>,
    /// Vectors of `w.cols()` numbers, prepared for [`super::operand`] of the format of `w`.
    pub x: &'a [&'a Operand],
    /// `x.len()` rows of `w.rows()` results, overwritten.
    pub y: &'a mut [f32],
}

/// Computes all jobs in one parallel region.
///
/// # Panics
/// If the lengths of a job do not fit together, or a vector was not prepared for its format.
pub fn run(pool: &Pool, jobs: &mut [Job]) {
    run_on(isa::get(), pool, jobs);
}

/// [`run`] with the instruction set chosen by the caller.
///
/// # Panics
/// As [`run`], and if this CPU lacks `isa`.
pub fn run_on(isa: Isa, pool: &Pool, jobs: &mut [Job]) {
    runs::run_on(isa, pool, jobs.iter_mut().map(|j| (j.w, j.x, &mut *j.y)).collect());
}

impl Runs for Bitmap<'_> {
    fn size(&self) -> (usize, usize, usize) {
        (self.rows(), self.cols(), self.data().len())
    }

    fn operand(&self) -> Format {
        super::operand(self.format())
    }

    fn compute(&self, isa: Isa, first: usize, x: &Operand, y: &mut [f32]) {
        match isa {
            // SAFETY: the caller has checked that the CPU has this instruction set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => unsafe { super::avx512::compute(self, first, x, y) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { super::avx2::compute(self, first, x, y) },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => super::neon::compute(self, first, x, y),
            _ => {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = super::scalar::dot(self, first + i, x);
                }
            }
        }
    }
}
