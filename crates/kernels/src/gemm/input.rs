//! Activations packed once for all matrices that read them.

use super::arithmetic::Arithmetic;
use super::buffer::{Buffer, Shared};
use super::transpose::transpose16;
use super::{LANES, TILE_K};
use crate::isa::{self, Isa};
use crate::{Format, Pool};

/// Inputs with one int8 scale.
pub(crate) const GROUP: usize = 32;
/// Inputs with one sum of int8 codes (the finest scale groups of a format, Q6_K's).
pub(crate) const SUM_GROUP: usize = 16;
/// Inputs packed at a time: 16 dwords of int8 codes per row.
pub(crate) const STEP: usize = 64;
/// Inputs packed by one chunk of the parallel region.
const CHUNK_K: usize = 1024;

/// `m` rows of `k` activations in the layouts that the kernels read, in buffers that are reused from call to call.
#[derive(Debug, Default)]
pub struct Input {
    pub(crate) isa: Option<Isa>,
    m: usize,
    k: usize,
    has: Kinds,
    f32s: Buffer,
    bf16s: Buffer,
    codes: Buffer,
    scales: Buffer,
    sums: Buffer,
}

/// Which layouts are wanted or present.
#[derive(Clone, Copy, Debug, Default)]
struct Kinds {
    f32: bool,
    bf16: bool,
    int8: bool,
}

/// The int8 layout: `x ~ scale * code`.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    /// `[block][k / 4][16 rows][4]`
    pub(crate) codes: &'a [i8],
    /// `[block][k / 32][16 rows]`
    pub(crate) scales: &'a [f32],
    /// Sums of codes, `[block][k / 16][16 rows]`
    pub(crate) sums: &'a [i32],
}

impl Input {
    /// Empty; allocates nothing until [`Input::prepare`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Packs `m` rows of `k` activations for weights of the given formats, in either orientation.
    ///
    /// # Panics
    /// If `x` has not `m * k` numbers.
    pub fn prepare(&mut self, pool: &Pool, x: &[f32], m: usize, k: usize, formats: &[Format]) {
        self.prepare_for(isa::get(), pool, x, m, k, formats);
    }

    /// [`Input::prepare`] for a given instruction set.
    pub(crate) fn prepare_for(&mut self, isa: Isa, pool: &Pool, x: &[f32], m: usize, k: usize, formats: &[Format]) {
        assert_eq!(x.len(), m * k, "activations: {m} rows of {k} expected");
        (self.isa, self.m, self.k, self.has) = (Some(isa), m, k, Kinds::of(isa, formats));
        let (blocks, k_pad, has) = (self.blocks(), self.k_pad(), self.has);
        let n = blocks * k_pad * LANES;
        let sized = |wanted: bool, n: usize| if wanted { n } else { 0 };
        let out = Outputs {
            f32s: Shared::new(self.f32s.at_least(sized(has.f32, n))),
            bf16s: Shared::new(self.bf16s.at_least(sized(has.bf16, n))),
            codes: Shared::new(self.codes.at_least(sized(has.int8, n))),
            scales: Shared::new(self.scales.at_least(sized(has.int8, n / GROUP))),
            sums: Shared::new(self.sums.at_least(sized(has.int8, n / SUM_GROUP))),
        };
        let rows = Rows { x, m, k, k_pad };
        let parts = k_pad.div_ceil(CHUNK_K);
        pool.run(blocks * parts, &|_, chunk| {
            let (block, k0) = (chunk / parts, chunk % parts * CHUNK_K);
            rows.pack(isa, has, out, block, k0..(k0 + CHUNK_K).min(k_pad));
        });
    }

    /// Bytes that [`Input::prepare`] needs for `m` rows of `k` activations; `None` if they overflow.
    pub fn bytes(m: usize, k: usize, formats: &[Format]) -> Option<usize> {
        let has = Kinds::of(isa::get(), formats);
        let each = |wanted: bool, bytes: usize| if wanted { bytes } else { 0 };
        let n = m.checked_next_multiple_of(LANES)?.checked_mul(k.checked_next_multiple_of(STEP)?)?;
        let int8 = n.checked_add(n / GROUP * 4)?.checked_add(n / SUM_GROUP * 4)?;
        n.checked_mul(each(has.f32, 4) + each(has.bf16, 2))?.checked_add(each(has.int8, int8))
    }

    /// Rows of activations.
    pub fn rows(&self) -> usize {
        self.m
    }

    /// Activations in a row.
    pub fn cols(&self) -> usize {
        self.k
    }

    /// Blocks of 16 rows.
    pub(crate) fn blocks(&self) -> usize {
        self.m.div_ceil(LANES)
    }

    /// Inputs with padding to whole packing steps; the padding is zero.
    pub(crate) fn k_pad(&self) -> usize {
        self.k.next_multiple_of(STEP)
    }

    /// Whether the layout for `arithmetic` was packed.
    pub(crate) fn is_for(&self, arithmetic: Arithmetic) -> bool {
        match arithmetic {
            Arithmetic::F32 => self.has.f32,
            Arithmetic::Bf16 => self.has.bf16,
            Arithmetic::Int8 => self.has.int8,
        }
    }

    /// `[block][k][16 rows]`
    pub(crate) fn f32s(&self) -> &[f32] {
        self.f32s.numbers(self.len())
    }

    /// `[block][k / 2][16 rows][2]`
    pub(crate) fn bf16s(&self) -> &[u16] {
        self.bf16s.numbers(self.len())
    }

    /// The int8 layout.
    pub(crate) fn codes(&self) -> Codes<'_> {
        let n = self.len();
        Codes {
            codes: self.codes.numbers(n),
            scales: self.scales.numbers(n / GROUP),
            sums: self.sums.numbers(n / SUM_GROUP),
        }
    }

    fn len(&self) -> usize {
        self.blocks() * self.k_pad() * LANES
    }
}

impl Kinds {
    fn of(isa: Isa, formats: &[Format]) -> Self {
        let mut has = Self::default();
        for &format in formats {
            for without_blocks in [false, true] {
                match Arithmetic::of(isa, format, without_blocks) {
                    Arithmetic::F32 => has.f32 = true,
                    Arithmetic::Bf16 => has.bf16 = true,
                    Arithmetic::Int8 => has.int8 = true,
                }
            }
        }
        has
    }
}

/// Where the packed layouts go.
#[derive(Clone, Copy)]
struct Outputs {
    f32s: Shared<f32>,
    bf16s: Shared<u16>,
    codes: Shared<i8>,
    scales: Shared<f32>,
    sums: Shared<i32>,
}

/// The rows to pack.
#[derive(Clone, Copy)]
struct Rows<'a> {
    x: &'a [f32],
    m: usize,
    k: usize,
    k_pad: usize,
}

impl Rows<'_> {
    /// Packs inputs `range` of block `block`.
    fn pack(&self, isa: Isa, has: Kinds, out: Outputs, block: usize, range: std::ops::Range<usize>) {
        let mut rows = [[0f32; STEP]; LANES];
        for k0 in range.step_by(STEP) {
            self.gather(block, k0, &mut rows);
            let at = (block * self.k_pad + k0) * LANES;
            // SAFETY: each (block, k0) is packed by one chunk, and its parts of the layouts are its own.
            let (f32s, bf16s, int8) = unsafe {
                (
                    has.f32.then(|| out.f32s.part(at, STEP * LANES)),
                    has.bf16.then(|| out.bf16s.part(at, STEP * LANES)),
                    has.int8.then(|| {
                        let scales = out.scales.part(at / GROUP, STEP / GROUP * LANES);
                        let sums = out.sums.part(at / SUM_GROUP, STEP / SUM_GROUP * LANES);
                        (out.codes.part(at, STEP * LANES), scales, sums)
                    }),
                )
            };
            #[cfg(target_arch = "x86_64")]
            if isa.has_avx512() {
                // SAFETY: these instruction sets include all that the packing uses.
                unsafe { super::pack512::pack(&rows, f32s, bf16s, int8) };
                continue;
            }
            if let Some(out) = f32s {
                pack_f32(isa, &rows, out);
            }
            if let Some(out) = bf16s {
                pack_bf16(isa, &rows, out);
            }
            if let Some((codes, scales, sums)) = int8 {
                pack_int8(isa, &rows, codes, scales, sums);
            }
        }
    }

    /// Copies inputs `k0..k0 + STEP` of the rows of a block; what lies outside is zero.
    fn gather(&self, block: usize, k0: usize, rows: &mut [[f32; STEP]; LANES]) {
        let len = STEP.min(self.k.saturating_sub(k0));
        for (lane, row) in rows.iter_mut().enumerate() {
            let m = block * LANES + lane;
            let filled = if m < self.m { len } else { 0 };
            if filled > 0 {
                row[..filled].copy_from_slice(&self.x[m * self.k + k0..][..filled]);
            }
            row[filled..].fill(0.0);
        }
    }
}

pub(crate) fn pack_f32(isa: Isa, rows: &[[f32; STEP]; LANES], out: &mut [f32]) {
    let mut square = [0u32; LANES * 16];
    for (part, out) in out.chunks_exact_mut(LANES * 16).enumerate() {
        for (row, line) in rows.iter().zip(square.chunks_exact_mut(16)) {
            for (d, v) in line.iter_mut().zip(&row[part * 16..]) {
                *d = v.to_bits();
            }
        }
        transpose16(isa, &mut square);
        for (o, v) in out.iter_mut().zip(&square) {
            *o = f32::from_bits(*v);
        }
    }
}

pub(crate) fn pack_bf16(isa: Isa, rows: &[[f32; STEP]; LANES], out: &mut [u16]) {
    let mut square = [0u32; LANES * 16];
    for (part, out) in out.chunks_exact_mut(LANES * 32).enumerate() {
        for (row, line) in rows.iter().zip(square.chunks_exact_mut(16)) {
            for (d, v) in line.iter_mut().zip(row[part * 32..].chunks_exact(2)) {
                *d = u32::from(round_bf16(v[0])) | u32::from(round_bf16(v[1])) << 16;
            }
        }
        transpose16(isa, &mut square);
        for (o, v) in out.chunks_exact_mut(2).zip(&square) {
            (o[0], o[1]) = (*v as u16, (*v >> 16) as u16);
        }
    }
}

pub(crate) fn pack_int8(isa: Isa, rows: &[[f32; STEP]; LANES], codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    let mut square = [0u32; LANES * 16];
    for (lane, (row, line)) in rows.iter().zip(square.chunks_exact_mut(16)).enumerate() {
        let mut quantised = [0i8; STEP];
        for (g, (group, q)) in row.chunks_exact(GROUP).zip(quantised.chunks_exact_mut(GROUP)).enumerate() {
            scales[g * LANES + lane] = quantise(group, q);
        }
        for (g, q) in quantised.chunks_exact(SUM_GROUP).enumerate() {
            sums[g * LANES + lane] = q.iter().map(|&v| i32::from(v)).sum();
        }
        for (d, q) in line.iter_mut().zip(quantised.chunks_exact(4)) {
            *d = u32::from_le_bytes([q[0] as u8, q[1] as u8, q[2] as u8, q[3] as u8]);
        }
    }
    transpose16(isa, &mut square);
    for (o, v) in codes.chunks_exact_mut(4).zip(&square) {
        o.copy_from_slice(&v.to_le_bytes().map(|b| b as i8));
    }
}

/// Symmetric int8 codes of one group, largest magnitude 127; returns the scale. A group with a NaN or an infinity
/// has the scale NaN, so that every output that reads it is NaN, as in exact arithmetic.
#[inline(always)]
fn quantise(group: &[f32], codes: &mut [i8]) -> f32 {
    let amax = group.iter().fold(0f32, |a, v| a.max(v.abs()));
    // 0 x is NaN for NaN and infinities, else zero.
    let poison: f32 = group.iter().map(|v| v * 0.0).sum();
    let scale = amax / 127.0;
    // The reciprocal of a subnormal scale may overflow; such a group is zero to all purposes.
    let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
    for (q, v) in codes.iter_mut().zip(group) {
        *q = (v * inverse).round_ties_even() as i8;
    }
    scale + poison
}

/// The nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    if v.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded }
}

/// Inputs of a block from `k0` on, in units of whole tiles.
pub(crate) const fn tiles(k: usize) -> usize {
    k.div_ceil(TILE_K)
}
