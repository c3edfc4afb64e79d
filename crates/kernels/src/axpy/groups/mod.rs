//! Columns of block formats with their own scales: the codes of a channel lie together, and the scales stay what they are.
//!
//! Blocks of Q8_0, Q4_0 and Q4_K lie along the inputs, so a channel's codes belong to as many blocks as there are outputs.
//! [`pack`] moves the codes of each channel side by side and leaves the scales per group of 32 channels: nothing is
//! quantised again, and a sum over some channels is the dense product without the others, in the same integers. For
//! that a sum reads the scales of every group that it meets. The scales and minima of Q4_K's sub-blocks are products of two
//! numbers; they are stored multiplied, rounded to f16.
//!
//! Layout, for `groups = inputs / 32` and outputs padded to units ([`unit()`]): first `groups` rows of f16 scales, one per
//! output (for Q4_K each followed by a row of minima); then the channels, each a row of 64 bytes per unit. First come the first channels of all groups, then the second ones: the rows
//! of a group lie far apart, so that each has its own page and its own hardware prefetch stream, and the next group's
//! follow each of them. Within 64 bytes, byte `16 l + 4 k + i` is that of output `16 k + 4 l + i`, the order in which
//! four interleaved channels fall into whole registers; nibbles have outputs `k` below 4 in the low nibbles and those 64
//! further in the high ones. Codes are unsigned: those of Q4_0 are 8 too large, those of Q8_0 128.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(test)]
mod tests;
mod unpack;

use crate::gemv::q4k_scales;
use crate::{Format, Isa, Matrix};
use half::f16;
use std::ops::Range;

pub(crate) use unpack::{unpack, unpack_values};

/// Channels that share their scales.
pub(crate) const GROUP: usize = 32;
/// Bytes of a channel's unit.
const LINE: usize = 64;
/// Bytes between the channels of one number in all groups and the next ones: whole lines, and an odd number of them, so that
/// rows of a group fall into different sets of the caches where their distance is a power of two otherwise.
const SKEW: usize = 3 * LINE;

/// Outputs in one unit: 64 bytes of codes. `None` for formats without this form.
pub const fn unit(format: Format) -> Option<usize> {
    match format {
        Format::Q8_0 => Some(LINE),
        Format::Q4_0 | Format::Q4K => Some(2 * LINE),
        _ => None,
    }
}

/// What the unsigned codes are too large by.
const fn offset(format: Format) -> i32 {
    match format {
        Format::Q4_0 => 8,
        Format::Q4K => 0,
        _ => 128,
    }
}

/// Rows of f16 per group: scales, and minima for formats that have them.
const fn rows_of_scales(format: Format) -> usize {
    if matches!(format, Format::Q4K) { 2 } else { 1 }
}

/// Bytes that [`pack`] makes of a matrix; `None` if the format has no such form, `inputs` are not whole groups, or the
/// size overflows.
pub fn bytes(format: Format, outputs: usize, inputs: usize) -> Option<usize> {
    let units = outputs.div_ceil(unit(format)?);
    if !inputs.is_multiple_of(GROUP) {
        return None;
    }
    let row = units.checked_mul(unit(format)?)?.checked_mul(2 * rows_of_scales(format))?;
    let scales = (inputs / GROUP).checked_mul(row)?;
    inputs.checked_mul(units.checked_mul(LINE)?)?.checked_add(scales)?.checked_add(GROUP * SKEW)
}

/// Bytes of one channel's codes; `None` if the format has no such form.
pub fn channel_bytes(format: Format, outputs: usize) -> Option<usize> {
    outputs.div_ceil(unit(format)?).checked_mul(LINE)
}

/// A view of a packed matrix.
#[derive(Clone, Copy, Debug)]
pub struct Groups<'a> {
    format: Format,
    outputs: usize,
    inputs: usize,
    scales: &'a [u8],
    codes: &'a [u8],
}

impl<'a> Groups<'a> {
    /// A view of `data`; `None` if its length is not that of [`bytes()`].
    pub fn new(format: Format, outputs: usize, inputs: usize, data: &'a [u8]) -> Option<Self> {
        if bytes(format, outputs, inputs)? != data.len() {
            return None;
        }
        let units = outputs.div_ceil(unit(format)?);
        let (scales, codes) = data.split_at(data.len() - inputs * units * LINE - GROUP * SKEW);
        Some(Self { format, outputs, inputs, scales, codes })
    }

    /// How the codes are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Number of channels.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Length of a channel.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes that a sum over the channels `index` (ascending) reads.
    pub fn bytes_of(&self, index: &[u32]) -> usize {
        let mut groups = 0;
        let mut last = u32::MAX;
        for i in index {
            groups += usize::from(i / GROUP as u32 != last);
            last = i / GROUP as u32;
        }
        index.len() * self.row_bytes() + groups * self.scale_bytes()
    }

    fn groups(&self) -> usize {
        self.inputs / GROUP
    }

    fn units(&self) -> usize {
        self.outputs.div_ceil(self.unit())
    }

    fn unit(&self) -> usize {
        if self.format == Format::Q8_0 { LINE } else { 2 * LINE }
    }

    pub(super) fn row_bytes(&self) -> usize {
        self.units() * LINE
    }

    fn scale_bytes(&self) -> usize {
        self.units() * self.unit() * 2 * rows_of_scales(self.format)
    }

    /// Where the codes of channel `c` of group `g` begin.
    #[inline(always)]
    fn start(&self, c: usize, g: usize) -> usize {
        (c * self.groups() + g) * self.row_bytes() + c * SKEW
    }

    /// The codes of channel `c` of group `g`.
    fn row(&self, c: usize, g: usize) -> &'a [u8] {
        &self.codes[self.start(c, g)..][..self.row_bytes()]
    }

    /// The scales of a group, and its minima, if the format has them.
    fn scales(&self, group: usize) -> (&'a [u8], &'a [u8]) {
        let all = &self.scales[group * self.scale_bytes()..][..self.scale_bytes()];
        all.split_at(self.units() * self.unit() * 2)
    }
}

/// The place of output `o` of a unit: its byte, and whether it is the upper nibble.
const fn place(o: usize) -> (usize, bool) {
    let (k, l, i) = (o / 16, o / 4 % 4, o % 4);
    (16 * l + 4 * (k % 4) + i, k >= 4)
}

/// Moves the codes and scales of an output-major matrix into this form; `None` if [`bytes()`] is.
pub fn pack(w: &Matrix) -> Option<Vec<u8>> {
    let (format, outputs, inputs) = (w.format(), w.rows(), w.cols());
    let mut out = vec![0; bytes(format, outputs, inputs)?];
    let (groups, unit) = (inputs / GROUP, unit(format)?);
    let units = outputs.div_ceil(unit);
    let (scale_row, row) = (units * unit * 2, units * LINE);
    let (scales, codes) = out.split_at_mut(groups * scale_row * rows_of_scales(format));
    for o in 0..outputs {
        let (byte, upper) = place(o % unit);
        let at = o / unit * LINE + byte;
        for g in 0..groups {
            let block = GroupBlock::of(format, w.row(o), g);
            let to = g * scale_row * rows_of_scales(format) + 2 * o;
            scales[to..to + 2].copy_from_slice(&block.scale.to_le_bytes());
            if rows_of_scales(format) == 2 {
                scales[to + scale_row..][..2].copy_from_slice(&block.minimum.to_le_bytes());
            }
            for (c, code) in block.codes.into_iter().enumerate() {
                codes[(c * groups + g) * row + c * SKEW + at] |= code << (4 * u8::from(upper));
            }
        }
    }
    Some(out)
}

/// What one output has in a group.
struct GroupBlock {
    scale: f16,
    minimum: f16,
    codes: [u8; GROUP],
}

impl GroupBlock {
    /// Group `g` of an output-major run.
    fn of(format: Format, run: &[u8], g: usize) -> Self {
        let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]);
        if format == Format::Q4K {
            let block = &run[g / 8 * format.block_bytes()..][..format.block_bytes()];
            let (scales, minima) = q4k_scales(&block[4..16]);
            let j = g % 8;
            let times = |d: &[u8], all: u64| f16::from_f32(half(d).to_f32() * f32::from(all.to_le_bytes()[j]));
            let nibbles = &block[16 + j / 2 * 32..][..GROUP];
            let codes = std::array::from_fn(|c| nibbles[c] >> (j % 2 * 4) & 15);
            return Self { scale: times(block, scales), minimum: times(&block[2..], minima), codes };
        }
        let block = &run[g * format.block_bytes()..][..format.block_bytes()];
        let codes = std::array::from_fn(|c| match format {
            Format::Q4_0 => block[2 + c % 16] >> (c / 16 * 4) & 15,
            _ => block[2 + c] ^ 0x80,
        });
        Self { scale: half(block), minimum: f16::ZERO, codes }
    }
}

/// The chosen channels of one sum, quantised as the dense products quantise their vector: per group, `d = max |x| / 127`
/// and `q = round(x / d)`.
#[derive(Debug, Default)]
pub(super) struct Operand {
    groups: Vec<Group>,
    /// Four channels each; a group's last is filled up with channels times zero.
    quads: Vec<Quad>,
    channels: usize,
}

/// The channels of a sum that share their scales.
#[derive(Clone, Copy, Debug)]
struct Group {
    number: u32,
    /// First of its quads.
    first: u32,
    /// What codes are multiplied with, beside their scale.
    d: f32,
    /// Takes the offset of the codes back: that times the sum of all `q`.
    bias: i32,
    /// What minima are multiplied with: `d` times the sum of all `q`.
    sum: f32,
}

#[derive(Clone, Copy, Debug)]
struct Quad {
    /// Numbers of the channels in their group.
    channels: [u8; 4],
    q: [i8; 4],
}

/// The channels of a group at the start of a list, with their values as 8-bit codes of one scale.
struct Taken {
    count: usize,
    /// Their numbers in the group, and whatever behind.
    channels: [u8; GROUP],
    /// Their codes, and zeros.
    q: [i8; GROUP],
    /// Sum of all `q`.
    sum: i32,
    /// The largest amount, or NaN if a value is not finite: it reaches the scale and so every output.
    largest: f32,
}

impl Taken {
    /// From lists that are not empty.
    #[inline(always)]
    fn new(index: &[u32], value: &[f32]) -> Self {
        let number = index[0] / GROUP as u32;
        let count = index.iter().take(GROUP).take_while(|i| **i / GROUP as u32 == number).count();
        let (mut channels, mut x) = ([0; GROUP], [0.0_f32; GROUP]);
        channels.iter_mut().zip(&index[..count]).for_each(|(c, i)| *c = (i % GROUP as u32) as u8);
        x[..count].copy_from_slice(&value[..count]);
        let largest = x.iter().fold(0.0_f32, |m, v| m.max(v.abs())) + x.iter().map(|v| v * 0.0).sum::<f32>();
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        // Adding 1.5 * 2^23 rounds to whole numbers, ties to even, in the low bits.
        let q = x.map(|v| (v * inverse + 12_582_912.0).to_bits() as i8);
        Self { count, channels, q, sum: q.iter().map(|&q| i32::from(q)).sum(), largest }
    }
}

impl Operand {
    /// Quantises `value`, the values of the channels `index`; ascending channels are read best, and others are right too.
    pub(super) fn new(isa: Isa, w: &Groups, index: &[u32], value: &[f32]) -> Self {
        assert_eq!(index.len(), value.len(), "a value per channel");
        let mut operand = Self {
            groups: Vec::with_capacity(w.groups().min(index.len())),
            quads: Vec::with_capacity(index.len() / 4 + w.groups().min(index.len())),
            channels: index.len(),
        };
        match isa {
            // SAFETY: the caller has checked that the CPU has this instruction set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => unsafe { avx512::fill(&mut operand, w, index, value) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::fill(&mut operand, w, index, value) },
            _ => operand.fill(w, index, value, Taken::new),
        }
        operand
    }

    /// Compiled for each instruction set, with its own [`Taken::new`].
    #[inline(always)]
    fn fill(&mut self, w: &Groups, index: &[u32], value: &[f32], take: impl Fn(&[u32], &[f32]) -> Taken) {
        let mut start = 0;
        while start < index.len() {
            let taken = take(&index[start..], &value[start..]);
            self.push(w, index[start] / GROUP as u32, &taken);
            start += taken.count;
        }
    }

    #[inline(always)]
    fn push(&mut self, w: &Groups, number: u32, taken: &Taken) {
        let Taken { count, mut channels, q, sum, largest } = *taken;
        let (first, d) = (self.quads.len() as u32, largest / 127.0);
        self.groups.push(Group { number, first, d, bias: -offset(w.format) * sum, sum: d * sum as f32 });
        let (quads, count) = (count.div_ceil(4), count.min(GROUP));
        // The last quad is filled up with its first channel, times zero.
        (count..4 * quads).for_each(|c| channels[c] = channels[4 * quads - 4]);
        let both = channels.as_chunks::<4>().0.iter().zip(q.as_chunks::<4>().0);
        self.quads.extend(both.take(quads).map(|(channels, q)| Quad { channels: *channels, q: *q }));
    }

    /// Channels in all.
    pub(super) fn channels(&self) -> usize {
        self.channels
    }

    /// Groups of channels.
    pub(super) fn len(&self) -> usize {
        self.groups.len()
    }

    /// A group and its quads.
    fn group(&self, g: usize) -> (Group, &[Quad]) {
        let end = self.groups.get(g + 1).map_or(self.quads.len(), |next| next.first as usize);
        (self.groups[g], &self.quads[self.groups[g].first as usize..end])
    }

    /// Which group is the `g`th; none after the last.
    #[cfg(target_arch = "x86_64")]
    fn number(&self, g: usize) -> Option<usize> {
        self.groups.get(g).map(|group| group.number as usize)
    }
}

/// Adds the sums over the groups `range` of `x` to `y`, the outputs from `first` on (a multiple of [`unit()`]).
pub(super) fn add(isa: Isa, w: &Groups, x: &Operand, range: Range<usize>, first: usize, y: &mut [f32]) {
    assert!(first.is_multiple_of(w.unit()) && first + y.len() <= w.outputs, "whole units from `first` on");
    match isa {
        // SAFETY: the caller has checked that the CPU has this instruction set; rows and groups are those of `w`, as
        // `Operand::new` makes them.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512::add(w, x, range, first / w.unit(), y) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::add(w, x, range, first / w.unit(), y) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::add(w, x, range, first / w.unit(), y),
        _ => scalar::add(w, x, range, first, y),
    }
}
