//! Prefill with f32 products on any lanes.

use super::backend::{Backend, LOWEST, Rows, SoftmaxRow, State};
use super::page::{KvType, Layout};
use crate::elementwise::math;
use crate::isa::Isa;
use crate::lanes::{Kernel, Lanes, on_lanes};

/// f32 products with the lanes of an instruction set (not scalar).
pub(super) struct LanesF32(pub Isa);

/// Rows of a tile of the products.
const R: usize = 6;

impl Backend for LanesF32 {
    type A = f32;
    const KV: KvType = KvType::F32;

    fn group(&self) -> usize {
        4 * R
    }

    fn columns(&self) -> usize {
        16
    }

    unsafe fn load_row(&self, row: &[f32], to: *mut f32) {
        // SAFETY: the caller vouches for the room.
        unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), to, row.len()) }
    }

    unsafe fn scores(&self, layout: &Layout, rows: &Rows<f32>, keys: &[*const f32], at: usize, columns: usize) {
        let product = Product {
            rows: self.group(),
            a: rows.q,
            a_stride: rows.q_stride,
            b: &keys[..1],
            b_stride: layout.page_len,
            b_rows: layout.d2,
            depth: layout.d2,
            c: rows.scores.wrapping_add(at),
            c_stride: rows.scores_stride,
            columns,
            add: false,
        };
        on_lanes(self.0, product);
    }

    unsafe fn softmax(&self, row: SoftmaxRow<f32>, state: &mut State) {
        on_lanes(self.0, Softmax { row, state });
    }

    unsafe fn values(&self, layout: &Layout, rows: &Rows<f32>, values: &[*const f32], columns: usize) {
        let product = Product {
            rows: self.group(),
            a: rows.weights,
            a_stride: rows.weights_stride,
            b: values,
            b_stride: layout.d16,
            b_rows: layout.page_len,
            depth: columns,
            c: rows.out,
            c_stride: layout.d16,
            columns: layout.d16,
            add: true,
        };
        on_lanes(self.0, product);
    }

    unsafe fn convert(&self, ty: KvType, run: &[u8], width: usize, rows: usize, to: *mut f32) {
        on_lanes(self.0, Convert { ty, run, width, rows, to });
    }
}

/// `c = a b` or `c += a b`, `b` given in pieces of `b_rows` rows; rows a multiple of [`R`], columns of 16.
struct Product<'a> {
    rows: usize,
    a: *const f32,
    a_stride: usize,
    b: &'a [*const f32],
    b_stride: usize,
    b_rows: usize,
    depth: usize,
    c: *mut f32,
    c_stride: usize,
    columns: usize,
    add: bool,
}

impl Kernel for Product<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let mut column = 0;
        while column < self.columns {
            // SAFETY: the caller vouches for the shapes; tiles stay inside `rows` and `columns`.
            column += unsafe {
                match (self.columns - column) / V::N {
                    4.. if V::N != 8 => self.strip::<V, 4>(column),
                    2.. if V::N == 8 => self.strip::<V, 2>(column),
                    _ => self.strip::<V, 1>(column),
                }
            };
        }
    }
}

impl Product<'_> {
    /// `S` vectors of columns of all rows; returns the number of columns.
    #[inline(always)]
    unsafe fn strip<V: Lanes, const S: usize>(&self, column: usize) -> usize {
        // SAFETY: the caller vouches for the shapes.
        unsafe {
            for row in (0..self.rows).step_by(R) {
                let mut acc = [[V::splat(0.0); S]; R];
                let c = self.c.add(row * self.c_stride + column);
                if self.add {
                    for (r, acc) in acc.iter_mut().enumerate() {
                        for (s, acc) in acc.iter_mut().enumerate() {
                            *acc = V::load(c.add(r * self.c_stride + s * V::N));
                        }
                    }
                }
                let mut a = self.a.add(row * self.a_stride);
                let mut left = self.depth;
                for &b in self.b {
                    let n = left.min(self.b_rows);
                    tile::<V, S>(&mut acc, a, self.a_stride, b.add(column), self.b_stride, n);
                    a = a.wrapping_add(n);
                    left -= n;
                }
                for (r, acc) in acc.iter().enumerate() {
                    for (s, acc) in acc.iter().enumerate() {
                        acc.store(c.add(r * self.c_stride + s * V::N));
                    }
                }
            }
        }
        S * V::N
    }
}

/// `acc += a b` for `R` rows, `S` vectors of columns and depth `n`.
#[inline(always)]
unsafe fn tile<V: Lanes, const S: usize>(
    acc: &mut [[V; S]; R],
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    n: usize,
) {
    // SAFETY: the caller vouches for the shapes.
    unsafe {
        for k in 0..n {
            let mut x = [V::splat(0.0); S];
            for (s, x) in x.iter_mut().enumerate() {
                *x = V::load(b.add(k * b_stride + s * V::N));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let w = V::splat(*a.add(r * a_stride + k));
                for (acc, x) in acc.iter_mut().zip(x) {
                    *acc = x.fma(w, *acc);
                }
            }
        }
    }
}

struct Softmax<'a> {
    row: SoftmaxRow<f32>,
    state: &'a mut State,
}

impl Kernel for Softmax<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: the caller vouches for the shapes.
        unsafe {
            let max = prepare::<V, f32>(&self.row, self.state);
            let (c, shift) = (V::splat(unit(&self.row)), V::splat(-max));
            let mut sum = V::splat(0.0);
            for j in (0..self.row.columns).step_by(V::N) {
                let y = math::exp2(V::load(self.row.scores.add(j)).fma(c, shift));
                y.store(self.row.weights.add(j));
                sum = sum.add(y);
            }
            self.state.sum += sum.sum();
        }
    }
}

/// Factor from the scores that [`prepare`] leaves to the unit of `exp2`.
#[inline(always)]
pub(super) fn unit<A>(row: &SoftmaxRow<A>) -> f32 {
    if row.cap.is_some() { std::f32::consts::LOG2_E } else { row.scale }
}

/// Caps and masks the scores and raises the running maximum, scaling sum and weighted values; returns the maximum.
///
/// # Safety
/// The shapes fit, and the machine has the instruction set.
#[inline(always)]
pub(super) unsafe fn prepare<V: Lanes, A>(row: &SoftmaxRow<A>, state: &mut State) -> f32 {
    // SAFETY: as above.
    unsafe {
        if let Some(cap) = row.cap {
            let (cap, factor) = (V::splat(cap), V::splat(row.scale / cap));
            for j in (0..row.columns).step_by(V::N) {
                let p = row.scores.add(j);
                math::tanh(V::load(p).mul(factor)).mul(cap).store(p);
            }
        }
        let (from, to) = row.visible;
        (0..from).chain(to..row.columns).for_each(|j| row.scores.add(j).write_unaligned(f32::NEG_INFINITY));
        let mut max = V::splat(f32::NEG_INFINITY);
        for j in (0..row.columns).step_by(V::N) {
            max = max.max(V::load(row.scores.add(j)));
        }
        let max = max.max_lane() * unit(row);
        if max > state.max {
            // Rows that have seen nothing have zero values and sum; the factor underflows to 0.
            let factor = if state.max == LOWEST { 0.0 } else { (state.max - max).exp2() };
            state.max = max;
            state.sum *= factor;
            for i in (0..row.d16).step_by(V::N) {
                let p = row.out.add(i);
                V::load(p).mul(V::splat(factor)).store(p);
            }
        }
        state.max
    }
}

struct Convert<'a> {
    ty: KvType,
    run: &'a [u8],
    width: usize,
    rows: usize,
    to: *mut f32,
}

impl Kernel for Convert<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let from = self.run.as_ptr().cast::<u16>();
        let all = self.rows * self.width;
        // SAFETY: the caller vouches for `rows * width` numbers on both sides; the width is a multiple of 16.
        unsafe {
            match self.ty {
                KvType::F32 => std::ptr::copy_nonoverlapping(self.run.as_ptr(), self.to.cast(), 4 * all),
                KvType::F16 => {
                    (0..all).step_by(V::N).for_each(|i| V::load_f16(from.add(i)).store(self.to.add(i)));
                }
                KvType::Bf16 => {
                    for pair in 0..self.rows / 2 {
                        let to = self.to.add(2 * pair * self.width);
                        for i in (0..self.width).step_by(V::N) {
                            let (a, b) = V::load_bf16_pairs(from.add(2 * (pair * self.width + i)));
                            a.store(to.add(i));
                            b.store(to.add(self.width + i));
                        }
                    }
                }
            }
        }
    }
}
