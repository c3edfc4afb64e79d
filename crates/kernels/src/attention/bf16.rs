//! Prefill with bf16 products and f32 sums: `vdpbf16ps` of AVX-512, or AMX tiles where the shape allows.
//!
//! `vdpbf16ps` and `tdpbf16ps` add pairs of products without intermediate rounding of the products, round to nearest
//! even and treat subnormal numbers as zero (Intel SDM, volume 2).

use std::arch::x86_64::*;

use half::bf16;

use super::amx;
use super::backend::{Backend, Rows, SoftmaxRow, State};
use super::lanes_f32::{prepare, unit};
use super::page::{KvType, Layout};
use crate::elementwise::math;
use crate::isa::Isa;
use crate::lanes::{Avx512, Lanes};

/// bf16 products.
pub(super) struct DotBf16 {
    /// With AMX tiles.
    pub amx: bool,
}

/// Whether bf16 products are allowed (the pages are 16 bits wide already) and faster than f32 products: on CPUs with AMX, `vdpbf16ps` has half the rate of the f32
/// multiply-add (measured on Sapphire Rapids: 65 against 136 GFLOP/s a core), on those without (Zen 4 and 5) twice.
pub(super) fn pays(isa: Isa, layout: &Layout) -> bool {
    layout.ty != KvType::F32 && (isa == Isa::Avx512 || amx::fits(layout))
}

/// Rows of a tile of the AVX-512 products: 6 x 4 accumulators leave 8 registers for operands.
const R: usize = 6;

impl Backend for DotBf16 {
    type A = u16;
    const KV: KvType = KvType::Bf16;

    fn group(&self) -> usize {
        if self.amx { amx::ROWS } else { 4 * R }
    }

    fn columns(&self) -> usize {
        if self.amx { amx::COLUMNS } else { 16 }
    }

    fn begin(&self) {
        if self.amx {
            amx::begin();
        }
    }

    fn end(&self) {
        if self.amx {
            amx::end();
        }
    }

    unsafe fn load_row(&self, row: &[f32], to: *mut u16) {
        // SAFETY: the caller vouches for the room and the instruction set.
        unsafe { load_row(row, to) }
    }

    unsafe fn scores(&self, layout: &Layout, rows: &Rows<u16>, keys: &[*const u16], at: usize, columns: usize) {
        let scores = rows.scores.wrapping_add(at);
        // SAFETY: the caller vouches for the shapes and the instruction set.
        unsafe {
            if self.amx {
                let next = keys.get(1).copied().unwrap_or(keys[0]);
                amx::scores(layout, rows, keys[0], next, scores, columns);
                return;
            }
            let product = Product {
                rows: 4 * R,
                a: rows.q,
                a_stride: rows.q_stride,
                b: &keys[..1],
                b_stride: 2 * layout.page_len,
                b_pairs: layout.d2 / 2,
                pairs: layout.d2 / 2,
                c: scores,
                c_stride: rows.scores_stride,
                columns,
                add: false,
            };
            product.run();
        }
    }

    unsafe fn softmax(&self, row: SoftmaxRow<u16>, state: &mut State) {
        // SAFETY: the caller vouches for the shapes and the instruction set.
        unsafe { softmax(row, state) }
    }

    unsafe fn values(&self, layout: &Layout, rows: &Rows<u16>, values: &[*const u16], columns: usize) {
        // SAFETY: the caller vouches for the shapes and the instruction set.
        unsafe {
            if self.amx {
                amx::values(layout, rows, values, columns);
                return;
            }
            let product = Product {
                rows: 4 * R,
                a: rows.weights,
                a_stride: rows.weights_stride,
                b: values,
                b_stride: 2 * layout.d16,
                b_pairs: layout.page_len / 2,
                pairs: columns / 2,
                c: rows.out,
                c_stride: layout.d16,
                columns: layout.d16,
                add: true,
            };
            product.run();
        }
    }

    unsafe fn convert(&self, ty: KvType, run: &[u8], width: usize, rows: usize, to: *mut u16) {
        match ty {
            KvType::F16 => {
                for pair in 0..rows / 2 {
                    // SAFETY: the caller vouches for the shapes and the instruction set.
                    unsafe {
                        let from = run.as_ptr().cast::<u16>().add(2 * pair * width);
                        pair_rows(from, width, to.add(2 * pair * width));
                    }
                }
            }
            // SAFETY: the caller vouches for the room; the types have the same layout.
            KvType::Bf16 => unsafe { std::ptr::copy_nonoverlapping(run.as_ptr(), to.cast(), 2 * rows * width) },
            KvType::F32 => unreachable!("f32 pages are never rounded: see `pays`"),
        }
    }
}

#[inline(always)]
unsafe fn pairs(p: *const u16) -> __m512bh {
    // SAFETY: the caller vouches for 32 numbers; every bit pattern is a vector of bf16.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(p.cast())) }
}

#[inline(always)]
unsafe fn broadcast(p: *const u16) -> __m512bh {
    // SAFETY: the caller vouches for two numbers; every bit pattern is a vector of bf16.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(p.cast::<i32>().read_unaligned())) }
}

#[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl")]
unsafe fn load_row(row: &[f32], to: *mut u16) {
    let chunks = row.chunks_exact(16);
    let (done, rest) = (row.len() / 16 * 16, chunks.remainder());
    for (i, x) in chunks.enumerate() {
        // SAFETY: 16 numbers on both sides; bf16 vectors are 16-bit patterns.
        unsafe {
            let y = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr())));
            _mm256_storeu_si256(to.add(16 * i).cast(), y);
        }
    }
    for (i, &x) in rest.iter().enumerate() {
        // SAFETY: the caller vouches for the room.
        unsafe { to.add(done + i).write(bf16::from_f32(x).to_bits()) };
    }
}

/// `c = a b` or `c += a b`, `b` given in pieces of `b_pairs` rows of pairs; rows a multiple of [`R`], columns of 16.
struct Product<'a> {
    rows: usize,
    a: *const u16,
    a_stride: usize,
    b: &'a [*const u16],
    b_stride: usize,
    b_pairs: usize,
    pairs: usize,
    c: *mut f32,
    c_stride: usize,
    columns: usize,
    add: bool,
}

impl Product<'_> {
    #[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl")]
    unsafe fn run(&self) {
        let mut column = 0;
        while column < self.columns {
            // SAFETY: the caller vouches for the shapes; strips stay inside the columns.
            unsafe {
                match self.columns - column {
                    64.. => {
                        self.strip::<4>(column);
                        column += 64;
                    }
                    32.. => {
                        self.strip::<2>(column);
                        column += 32;
                    }
                    _ => {
                        self.strip::<1>(column);
                        column += 16;
                    }
                }
            }
        }
    }

    /// 16 `S` columns of all rows.
    #[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl")]
    unsafe fn strip<const S: usize>(&self, column: usize) {
        for row in (0..self.rows).step_by(R) {
            let mut acc = [[_mm512_setzero_ps(); S]; R];
            // SAFETY: the caller vouches for the shapes.
            unsafe {
                let c = self.c.add(row * self.c_stride + column);
                if self.add {
                    for (r, acc) in acc.iter_mut().enumerate() {
                        for (s, acc) in acc.iter_mut().enumerate() {
                            *acc = _mm512_loadu_ps(c.add(r * self.c_stride + 16 * s));
                        }
                    }
                }
                let mut a = self.a.add(row * self.a_stride);
                let mut left = self.pairs;
                for &b in self.b {
                    let n = left.min(self.b_pairs);
                    tile(&mut acc, a, self.a_stride, b.add(2 * column), self.b_stride, n);
                    a = a.wrapping_add(2 * n);
                    left -= n;
                }
                for (r, acc) in acc.iter().enumerate() {
                    for (s, acc) in acc.iter().enumerate() {
                        _mm512_storeu_ps(c.add(r * self.c_stride + 16 * s), *acc);
                    }
                }
            }
        }
    }
}

/// `acc += a b` for `R` rows, `S` vectors of columns and `n` pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl")]
unsafe fn tile<const S: usize>(
    acc: &mut [[__m512; S]; R],
    a: *const u16,
    a_stride: usize,
    b: *const u16,
    b_stride: usize,
    n: usize,
) {
    // SAFETY: the caller vouches for the shapes.
    unsafe {
        for k in 0..n {
            let mut x = [pairs(b.add(k * b_stride)); S];
            for (s, x) in x.iter_mut().enumerate().skip(1) {
                *x = pairs(b.add(k * b_stride + 32 * s));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let w = broadcast(a.add(r * a_stride + 2 * k));
                for (acc, x) in acc.iter_mut().zip(x) {
                    *acc = _mm512_dpbf16_ps(*acc, w, x);
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl,avx512dq")]
unsafe fn softmax(row: SoftmaxRow<u16>, state: &mut State) {
    // SAFETY: the caller vouches for the shapes.
    unsafe {
        let max = prepare::<Avx512, u16>(&row, state);
        let (c, shift) = (Avx512::splat(unit(&row)), Avx512::splat(-max));
        let mut sum = Avx512::splat(0.0);
        for j in (0..row.columns).step_by(16) {
            let y = math::exp2_coarse(Avx512::load(row.scores.add(j)).fma(c, shift));
            sum = sum.add(y);
            let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(y.0));
            _mm256_storeu_si256(row.weights.add(j).cast(), rounded);
        }
        state.sum += sum.sum();
    }
}

/// Two rows of f16 become one row of bf16 pairs.
#[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl")]
unsafe fn pair_rows(from: *const u16, width: usize, to: *mut u16) {
    // SAFETY: the caller vouches for two rows of `width`, a multiple of 16; bf16 vectors are 16-bit patterns.
    unsafe {
        let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + 16 * (i % 2)) as u16);
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        for i in (0..width).step_by(16) {
            let a = _mm512_cvtph_ps(_mm256_loadu_si256(from.add(i).cast()));
            let b = _mm512_cvtph_ps(_mm256_loadu_si256(from.add(width + i).cast()));
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a));
            _mm512_storeu_si512(to.add(2 * i).cast(), _mm512_permutexvar_epi16(order, both));
        }
    }
}
