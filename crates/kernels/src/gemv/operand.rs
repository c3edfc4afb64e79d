//! The vector of a product, prepared once for all matrices that it meets.

use crate::gemm::buffer::Numbers;
use crate::{Format, Isa, isa};

/// Numbers that share one scale in the int8 form.
pub(crate) const BLOCK: usize = 32;
/// Padding of every buffer, in numbers: a multiple of all block lengths.
const PAD: usize = 256;
/// Numbers in one group of the order that Q4_0 kernels want.
pub(crate) const GROUP: usize = 128;

/// A vector in the forms that the kernels read. All buffers are reused by the next [`Operand::prepare`].
///
/// The int8 form follows ggml's dynamic activation quantisation: per 32 numbers, `d = max |x| / 127` and
/// `q = round(x / d)` (ties to even). A block that holds a NaN or an infinity gets such a scale, so that it surfaces
/// in every product.
#[derive(Clone, Debug, Default)]
pub struct Operand {
    len: usize,
    plain: Numbers<f32>,
    split: Numbers<f32>,
    int8: Int8,
    q4_0: Q4_0,
    have: Have,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Have {
    plain: bool,
    split: bool,
    int8: bool,
    q4_0: bool,
}

/// The int8 form in natural order, padded with zeros to a multiple of 256 numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Int8 {
    /// Codes, -127 to 127.
    pub q: Numbers<i8>,
    /// Scale per block of 32.
    pub d: Numbers<f32>,
    /// The same scales, each 8 times: one per lane of four numbers.
    pub d8: Numbers<f32>,
    /// `d` times the sum of the codes, per block of 32.
    pub sum: Numbers<f32>,
    /// `-128` times the sum of four codes, per lane of four numbers: turns products with `w + 128` into those with `w`.
    pub bias: Numbers<i32>,
}

/// The int8 form in groups of four blocks (128 numbers) for Q4_0's wide kernels: first the first 16 numbers of each
/// block (they meet the low nibbles), then the last 16 of each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Q4_0 {
    /// Codes, 128 per group.
    pub q: Numbers<i8>,
    /// Scales, each 4 times: 16 lanes per group.
    pub d4: Numbers<f32>,
    /// `-8` times the sum of the eight codes of a lane, 16 lanes per group.
    pub bias: Numbers<i32>,
}

impl Operand {
    /// An empty vector without forms.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes over `x` in the forms that matrices of `formats` need; earlier contents are gone.
    pub fn prepare(&mut self, x: &[f32], formats: &[Format]) {
        self.prepare_on(isa::get(), x, formats);
    }

    /// [`Operand::prepare`] with the instruction set chosen by the caller. The result does not depend on it.
    ///
    /// # Panics
    /// If this CPU lacks `isa`.
    pub fn prepare_on(&mut self, isa: Isa, x: &[f32], formats: &[Format]) {
        assert!(isa.is_available(), "{isa} is not available here");
        let any = |wanted: &[Format]| formats.iter().any(|f| wanted.contains(f));
        self.len = x.len();
        self.have = Have {
            plain: any(&[Format::F32, Format::F16]),
            split: any(&[Format::Bf16]),
            int8: any(&[Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K]),
            q4_0: any(&[Format::Q4_0]),
        };
        let padded = x.len().next_multiple_of(PAD);
        if self.have.plain {
            self.plain.resize(padded);
            self.plain[..x.len()].copy_from_slice(x);
            self.plain[x.len()..].fill(0.0);
        }
        if self.have.split {
            self.split.resize(padded);
            split(x, &mut self.split);
        }
        if self.have.int8 {
            self.int8.resize(padded);
            if self.have.q4_0 {
                self.q4_0.resize(padded);
            }
            quantise(isa, x, &mut self.int8, self.have.q4_0.then_some(&mut self.q4_0));
        }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it has no entries.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True if it was prepared for matrices of this format.
    pub fn serves(&self, format: Format) -> bool {
        match format {
            Format::F32 | Format::F16 => self.have.plain,
            Format::Bf16 => self.have.split,
            Format::Q4_0 => self.have.q4_0,
            Format::Q8_0 | Format::Q4K | Format::Q6K => self.have.int8,
        }
    }

    /// Natural order, padded with zeros to a multiple of 256.
    pub(crate) fn plain(&self) -> &[f32] {
        &self.plain
    }

    /// Per 32 numbers the 16 of even position, then the 16 of odd position; padded with zeros to a multiple of 256.
    pub(crate) fn split(&self) -> &[f32] {
        &self.split
    }

    pub(crate) fn int8(&self) -> &Int8 {
        &self.int8
    }

    #[cfg(any(target_arch = "x86_64", test))]
    pub(crate) fn q4_0(&self) -> &Q4_0 {
        &self.q4_0
    }
}

impl Int8 {
    fn resize(&mut self, n: usize) {
        self.q.resize(n);
        self.d.resize(n / BLOCK);
        self.d8.resize(n / 4);
        self.sum.resize(n / BLOCK);
        self.bias.resize(n / 4);
    }
}

impl Q4_0 {
    fn resize(&mut self, n: usize) {
        self.q.resize(n);
        self.d4.resize(n / 8);
        self.bias.resize(n / 8);
    }
}

fn split(x: &[f32], out: &mut [f32]) {
    let (whole, rest) = x.as_chunks::<BLOCK>();
    for (x, out) in whole.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        split_block(x, out);
    }
    let mut last = [0.0; BLOCK];
    last[..rest.len()].copy_from_slice(rest);
    for (i, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate().skip(whole.len()) {
        split_block(if i == whole.len() { &last } else { &[0.0; BLOCK] }, out);
    }
}

fn split_block(x: &[f32; BLOCK], out: &mut [f32; BLOCK]) {
    for i in 0..BLOCK / 2 {
        out[i] = x[2 * i];
        out[BLOCK / 2 + i] = x[2 * i + 1];
    }
}

fn quantise(isa: Isa, x: &[f32], out: &mut Int8, q4_0: Option<&mut Q4_0>) {
    match isa {
        // SAFETY: `prepare_on` has checked that the CPU has this instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { quantise_avx512(x, out, q4_0) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { quantise_avx2(x, out, q4_0) },
        _ => quantise_body(x, out, q4_0),
    }
}

/// [`quantise_body`] compiled with 512-bit vectors.
///
/// # Safety
/// The CPU must have [`Isa::Avx512`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn quantise_avx512(x: &[f32], out: &mut Int8, q4_0: Option<&mut Q4_0>) {
    quantise_body(x, out, q4_0);
}

/// [`quantise_body`] compiled with 256-bit vectors.
///
/// # Safety
/// The CPU must have [`Isa::Avx2`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn quantise_avx2(x: &[f32], out: &mut Int8, q4_0: Option<&mut Q4_0>) {
    quantise_body(x, out, q4_0);
}

#[inline(always)]
fn quantise_body(x: &[f32], out: &mut Int8, mut q4_0: Option<&mut Q4_0>) {
    let (whole, rest) = x.as_chunks::<BLOCK>();
    let mut last = [0.0; BLOCK];
    last[..rest.len()].copy_from_slice(rest);
    let codes = out.q.as_chunks_mut::<BLOCK>().0;
    let (scales, sums) = (&mut out.d[..], &mut out.sum[..]);
    let lanes = out.bias.as_chunks_mut::<8>().0.iter_mut().zip(out.d8.as_chunks_mut::<8>().0);
    for (b, (codes, (bias, d8))) in codes.iter_mut().zip(lanes).enumerate() {
        let block = match whole.get(b) {
            Some(block) => block,
            None if b == whole.len() => &last,
            None => &[0.0; BLOCK],
        };
        let d = quantise_block(block, codes);
        let sum = lane_bias(codes, bias);
        scales[b] = d;
        *d8 = [d; 8];
        sums[b] = d * sum as f32;
        if let Some(q4_0) = q4_0.as_deref_mut() {
            place_q4_0(b, d, codes, bias, q4_0);
        }
    }
}

/// Codes of one block; returns the scale.
#[inline(always)]
fn quantise_block(x: &[f32; BLOCK], codes: &mut [i8; BLOCK]) -> f32 {
    // As integers the magnitudes sort like the numbers, and NaN is above all, so it reaches the scale.
    let largest = x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    let inverse = 127.0 / largest;
    if inverse == f32::INFINITY {
        // Zero, or so small that the quotient overflows.
        *codes = [0; BLOCK];
        return 0.0;
    }
    // Adding 1.5 * 2^23 rounds to an integer (ties to even) and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    for (v, c) in x.iter().zip(codes) {
        *c = (v * inverse + ROUND).to_bits() as i8;
    }
    largest / 127.0
}

/// Fills the eight lane biases of a block; returns the sum of its codes.
#[inline(always)]
fn lane_bias(codes: &[i8; BLOCK], bias: &mut [i32; 8]) -> i32 {
    let mut sum = 0;
    for (four, bias) in codes.as_chunks::<4>().0.iter().zip(bias) {
        let lane: i32 = four.iter().map(|&c| i32::from(c)).sum();
        *bias = -128 * lane;
        sum += lane;
    }
    sum
}

/// Copies block `b` to its place in the grouped order.
#[inline(always)]
fn place_q4_0(b: usize, d: f32, codes: &[i8; BLOCK], bias: &[i32; 8], out: &mut Q4_0) {
    let (group, part) = (b / 4, b % 4);
    let q = &mut out.q[group * GROUP..][..GROUP];
    q[part * 16..][..16].copy_from_slice(&codes[..16]);
    q[64 + part * 16..][..16].copy_from_slice(&codes[16..]);
    let lane = group * 16 + part * 4;
    out.d4[lane..lane + 4].fill(d);
    for (i, o) in out.bias[lane..lane + 4].iter_mut().enumerate() {
        *o = (bias[i] + bias[i + 4]) / 16;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_agree_with_their_definition() {
        for n in [0, 1, 31, 32, 33, 128, 300] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.1).collect();
            for isa in isa::available() {
                let mut o = Operand::new();
                // Dirty buffers must not shine through.
                o.prepare_on(isa, &[7.0; 900], &Format::ALL);
                o.prepare_on(isa, &x, &Format::ALL);
                for (i, &x) in x.iter().enumerate() {
                    assert_eq!(o.plain()[i], x);
                    let (b, j) = (i / BLOCK, i % BLOCK);
                    assert_eq!(o.split()[b * BLOCK + j / 2 + 16 * (j % 2)], x);
                    let d = o.int8().d[b];
                    assert!((f32::from(o.int8().q[i]) * d - x).abs() <= d * 0.501);
                    let at = i / GROUP * GROUP + j / 16 * 64 + b % 4 * 16 + j % 16;
                    assert_eq!(o.q4_0().q[at], o.int8().q[i]);
                    assert_eq!(o.q4_0().d4[(i / GROUP) * 16 + b % 4 * 4 + j % 4], d);
                }
                assert!(o.plain()[n..].iter().all(|&v| v == 0.0));
                assert!(o.int8().q[n..].iter().all(|&v| v == 0));
                assert_eq!(o.int8().bias.iter().sum::<i32>(), 16 * o.q4_0().bias.iter().sum::<i32>());
            }
        }
    }

    #[test]
    fn nan_and_infinity_reach_the_scale() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 64];
            x[40] = bad;
            let mut o = Operand::new();
            o.prepare(&x, &[Format::Q8_0]);
            assert!(o.int8().d[0].is_finite() && !o.int8().d[1].is_finite());
            assert!(!o.int8().sum[1].is_finite());
        }
        let mut o = Operand::new();
        o.prepare(&[1e-40; 32], &[Format::Q8_0]);
        assert_eq!((o.int8().d[0], o.int8().q[0]), (0.0, 0));
    }
}
