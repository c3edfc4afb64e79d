//! Decodes a panel of weights into the tiles that the block kernels read.

use std::ops::Range;

use super::Weights;
use super::arithmetic::Arithmetic;
use super::buffer::Buffer;
use super::codes::{self, CodeLayout, CodeRow};
use super::input::{round_bf16, tiles};
use super::transpose::transpose16;
use super::{TILE_K, TILE_N};
use crate::axpy::groups::{self, GROUP, Groups};
use crate::bitmap::{Bitmap, Strip};
use crate::codebook;
use crate::convert::decode_run;
use crate::isa::Isa;
use crate::{Format, Matrix};

/// Rows that are fetched ahead.
const AHEAD: usize = 4;

/// Numbers in a tile.
pub(crate) const TILE: usize = TILE_N * TILE_K;

/// Decoded weights of one panel, `[tiles of outputs][tiles of inputs][16][32]`, in scratch memory.
#[derive(Default)]
pub(crate) struct Panel {
    numbers: Buffer,
    scales: Buffer,
    offsets: Buffer,
    run: Buffer,
    /// Weights of other forms, output by output.
    plain: Buffer,
    strip: Strip,
}

/// The int8 form of a panel.
pub(crate) struct Codes<'a> {
    pub(crate) codes: &'a [u8],
    pub(crate) scales: &'a [f32],
    pub(crate) offsets: Option<&'a [f32]>,
    pub(crate) layout: CodeLayout,
}

impl Panel {
    /// The panel after [`Panel::fill`] for f32 arithmetic.
    pub(crate) fn f32s(&self, tiles: usize) -> &[f32] {
        self.numbers.numbers(tiles * TILE)
    }

    /// The panel after [`Panel::fill`] for BF16 arithmetic.
    pub(crate) fn bf16s(&self, tiles: usize) -> &[u16] {
        self.numbers.numbers(tiles * TILE)
    }

    /// The panel after [`Panel::fill`] for int8 arithmetic.
    pub(crate) fn codes(&self, format: Format, tiles: usize) -> Codes<'_> {
        let layout = CodeLayout::of(format);
        let n = tiles * layout.groups * TILE_N;
        let offsets = layout.has_offsets.then(|| self.offsets.numbers(n));
        Codes { codes: self.numbers.numbers(tiles * TILE), scales: self.scales.numbers(n), offsets, layout }
    }

    /// Decodes outputs `outputs` and inputs `inputs` of `w`. Padding up to whole tiles becomes zero.
    pub(crate) fn fill(
        &mut self,
        isa: Isa,
        arithmetic: Arithmetic,
        w: &Weights<'_>,
        outputs: Range<usize>,
        inputs: Range<usize>,
    ) {
        match w {
            Weights::OutputMajor(w) => {
                let shape = Shape { isa, outputs: outputs.len(), inputs: inputs.len() };
                self.fill_rows(arithmetic, shape, &mut Stored { w, first: outputs.start, inputs });
            }
            Weights::InputMajor(w) => self.fill_runs(arithmetic, &Part { isa, w, outputs, inputs }),
            Weights::Groups(w) => {
                let (n, k) = (outputs.len(), inputs.len());
                let mut scratch = std::mem::take(&mut self.plain);
                let (format, bytes) = unpacked(isa, arithmetic, w, (outputs, inputs), &mut scratch);
                let w = Matrix::new(format, n, k, bytes).expect("as many numbers as the panel has");
                let shape = Shape { isa, outputs: n, inputs: k };
                self.fill_rows(arithmetic, shape, &mut Stored { w: &w, first: 0, inputs: 0..k });
                self.plain = scratch;
            }
            Weights::Bitmap(w) => {
                let shape = Shape { isa, outputs: outputs.len(), inputs: inputs.len() };
                let (mut scratch, mut strip) = (std::mem::take(&mut self.plain), std::mem::take(&mut self.strip));
                let row = w.format().run_bytes(inputs.len()).expect("panels are cut at the borders of blocks");
                strip.go_to(w, outputs, inputs);
                // One row at a time, which the first cache holds until it is decoded.
                let row = scratch.at_least::<u8>(row);
                self.fill_rows(arithmetic, shape, &mut Unpacked { isa, w, strip: &mut strip, row });
                (self.plain, self.strip) = (scratch, strip);
            }
            Weights::Codebook(w) => {
                let (n, k) = (outputs.len(), inputs.len());
                let mut scratch = std::mem::take(&mut self.plain);
                let bytes = scratch.at_least::<u8>(n * k * codebook::DENSE.block_bytes());
                codebook::unpack(isa, w, outputs, inputs, bytes);
                let w = Matrix::new(codebook::DENSE, n, k, bytes).expect("a row for every output of the panel");
                let shape = Shape { isa, outputs: n, inputs: k };
                self.fill_rows(arithmetic, shape, &mut Stored { w: &w, first: 0, inputs: 0..k });
                self.plain = scratch;
            }
        }
    }

    fn fill_rows(&mut self, arithmetic: Arithmetic, shape: Shape, rows: &mut dyn Rows) {
        match arithmetic {
            Arithmetic::F32 => self.fill_f32(shape, rows),
            Arithmetic::Bf16 => self.fill_bf16(shape, rows),
            Arithmetic::Int8 => self.fill_codes(shape, rows),
        }
    }

    fn fill_runs(&mut self, arithmetic: Arithmetic, part: &Part<'_>) {
        match arithmetic {
            Arithmetic::F32 => self.fill_transposed::<f32>(part, f32_tile),
            #[cfg(target_arch = "x86_64")]
            Arithmetic::Bf16 if part.isa.has_avx512() => self.fill_transposed_bf16(part),
            Arithmetic::Bf16 => self.fill_transposed::<u16>(part, bf16_tile),
            Arithmetic::Int8 => {
                unreachable!("scales across outputs: arithmetic chooses BF16 for input-major weights")
            }
        }
    }

    fn fill_f32(&mut self, shape: Shape, rows: &mut dyn Rows) {
        let (k, format) = (shape.inputs, rows.format());
        let tiles_k = tiles(k);
        let out = self.numbers.at_least::<f32>(shape.tiles() * TILE);
        let run = self.run.at_least::<f32>(tiles_k * TILE_K);
        run[k..].fill(0.0);
        for (i, at) in shape.lines() {
            match shape.row(rows, i) {
                // As they are stored: one copy less.
                Some(bytes) if format == Format::F32 && k.is_multiple_of(TILE_K) => {
                    for (t, line) in bytes.as_chunks::<4>().0.as_chunks::<TILE_K>().0.iter().enumerate() {
                        let out = &mut out[at + t * TILE..][..TILE_K];
                        out.iter_mut().zip(line).for_each(|(out, v)| *out = f32::from_le_bytes(*v));
                    }
                    continue;
                }
                Some(bytes) => f32_run(shape.isa, format, bytes, &mut run[..k]),
                None => run.fill(0.0),
            }
            for (t, line) in run.chunks_exact(TILE_K).enumerate() {
                out[at + t * TILE..][..TILE_K].copy_from_slice(line);
            }
        }
    }

    fn fill_bf16(&mut self, shape: Shape, rows: &mut dyn Rows) {
        let (k, format) = (shape.inputs, rows.format());
        let tiles_k = tiles(k);
        let out = self.numbers.at_least::<u16>(shape.tiles() * TILE);
        let run = self.run.at_least::<f32>(k);
        for (i, at) in shape.lines() {
            let lines = &mut out[at..at + (tiles_k - 1) * TILE + TILE_K];
            let Some(bytes) = shape.row(rows, i) else {
                lines.chunks_mut(TILE).for_each(|line| line[..TILE_K].fill(0));
                continue;
            };
            #[cfg(target_arch = "x86_64")]
            if shape.isa.has_avx512() && super::decode512::has(format) {
                // SAFETY: these instruction sets include all that the decoder uses.
                unsafe { super::decode512::bf16_row(format, bytes, k, lines) };
                continue;
            }
            decode_run(format, bytes, run);
            bf16_row(run, lines);
        }
    }

    fn fill_codes(&mut self, shape: Shape, rows: &mut dyn Rows) {
        let (k, format) = (shape.inputs, rows.format());
        let layout = CodeLayout::of(format);
        let n = shape.tiles() * layout.groups * TILE_N;
        let codes = self.numbers.at_least::<u8>(shape.tiles() * TILE);
        let scales = self.scales.at_least::<f32>(n);
        let offsets = self.offsets.at_least::<f32>(if layout.has_offsets { n } else { 0 });
        let groups = tiles(k) * layout.groups;
        for (i, at) in shape.lines() {
            let scale_at = i / TILE_N * groups * TILE_N + i % TILE_N;
            let mut row = CodeRow {
                codes: &mut codes[at..],
                scales: &mut scales[scale_at..],
                offsets: if layout.has_offsets { &mut offsets[scale_at..] } else { &mut [] },
            };
            match shape.row(rows, i) {
                Some(bytes) => codes::decode_row(shape.isa, format, bytes, &mut row),
                None => row.clear(tiles(k), layout),
            }
        }
    }

    /// [`Panel::fill_transposed`] in BF16 all through: 32 runs become two rows of tiles (16 inputs x 32 outputs), and
    /// two of those become two tiles of the panel.
    #[cfg(target_arch = "x86_64")]
    fn fill_transposed_bf16(&mut self, part: &Part<'_>) {
        let n = part.outputs.len();
        let (tiles_n, lines, tiles_k) = (n.div_ceil(TILE_N), tiles(n), tiles(part.inputs.len()));
        let out = self.numbers.at_least::<u16>(part.tiles() * TILE);
        let runs = self.run.at_least::<u16>(2 * lines * TILE);
        for t in 0..tiles_k {
            for i in 0..TILE_K {
                let at = i / 16 * lines * TILE + i % 16 * TILE_K;
                let run = &mut runs[at..at + (lines - 1) * TILE + TILE_K];
                match part.run_bytes(t * TILE_K + i) {
                    // SAFETY: this function is for instruction sets that include all that the decoder uses.
                    Some(bytes) => unsafe { super::decode512::bf16_row(part.w.format(), bytes, n, run) },
                    None => run.chunks_mut(TILE).for_each(|line| line[..TILE_K].fill(0)),
                }
            }
            let (first, second) = runs.split_at(lines * TILE);
            for (line, (a, b)) in first.as_chunks().0.iter().zip(second.as_chunks().0).enumerate() {
                // SAFETY: as above.
                let pair = unsafe { super::transpose::transpose_bf16(a, b) };
                for (tile_n, tile) in (2 * line..tiles_n).zip(pair.as_chunks::<TILE>().0) {
                    out[(tile_n * tiles_k + t) * TILE..][..TILE].copy_from_slice(tile);
                }
            }
        }
    }

    /// Input-major weights: 32 runs of outputs at a time are decoded and transposed tile by tile.
    fn fill_transposed<T: super::buffer::Number>(&mut self, part: &Part<'_>, put: fn(&[f32; TILE], &mut [T])) {
        let n = part.outputs.len();
        let padded = n.next_multiple_of(TILE_N);
        let tiles_k = tiles(part.inputs.len());
        let out = self.numbers.at_least::<T>(part.tiles() * TILE);
        let runs = self.run.at_least::<f32>(TILE_K * padded);
        for t in 0..tiles_k {
            for (i, run) in runs.chunks_exact_mut(padded).enumerate() {
                match part.run_bytes(t * TILE_K + i) {
                    Some(bytes) => {
                        f32_run(part.isa, part.w.format(), bytes, &mut run[..n]);
                        run[n..].fill(0.0);
                    }
                    None => run.fill(0.0),
                }
            }
            for tile_n in 0..padded / TILE_N {
                let tile = transposed_tile(part.isa, runs, padded, tile_n * TILE_N);
                put(&tile, &mut out[(tile_n * tiles_k + t) * TILE..][..TILE]);
            }
        }
    }
}

/// The numbers of a panel of `w` in an output-major form that loses nothing in this arithmetic.
fn unpacked<'a>(
    isa: Isa,
    arithmetic: Arithmetic,
    w: &Groups,
    (outputs, inputs): (Range<usize>, Range<usize>),
    scratch: &'a mut Buffer,
) -> (Format, &'a [u8]) {
    let numbers = outputs.len() * inputs.len();
    if w.format() != Format::Q4K {
        let bytes = scratch.at_least::<u8>(numbers / GROUP * w.format().block_bytes());
        groups::unpack(isa, w, outputs, inputs, bytes);
        return (w.format(), bytes);
    }
    let format = if arithmetic == Arithmetic::Bf16 {
        let out = scratch.at_least::<u16>(numbers);
        groups::unpack_values(isa, w, (outputs, inputs), out, |v| round_bf16(v).to_le());
        Format::Bf16
    } else {
        let out = scratch.at_least::<u32>(numbers);
        groups::unpack_values(isa, w, (outputs, inputs), out, |v| v.to_bits().to_le());
        Format::F32
    };
    (format, scratch.numbers(numbers * format.block_bytes()))
}

/// Outputs and inputs of a panel that is filled output by output.
#[derive(Clone, Copy)]
struct Shape {
    isa: Isa,
    outputs: usize,
    inputs: usize,
}

impl Shape {
    fn tiles(self) -> usize {
        self.outputs.div_ceil(TILE_N) * tiles(self.inputs)
    }

    /// Every output of the panel, padding included, with the place of its first line among the tiles.
    fn lines(self) -> impl Iterator<Item = (usize, usize)> {
        let tiles_k = tiles(self.inputs);
        let padded = self.outputs.next_multiple_of(TILE_N);
        (0..padded).map(move |i| (i, i / TILE_N * tiles_k * TILE + i % TILE_N * TILE_K))
    }

    /// The stored inputs of output `i` of the panel; `None` for padding.
    fn row(self, rows: &mut dyn Rows, i: usize) -> Option<&[u8]> {
        (i < self.outputs).then(|| rows.row(i))
    }
}

/// Where a panel gets the stored inputs of its outputs from.
trait Rows {
    fn format(&self) -> Format;

    /// Those of output `i` of the panel; asked for each, in order.
    fn row(&mut self, i: usize) -> &[u8];
}

/// Rows of a matrix as they are.
struct Stored<'a> {
    w: &'a Matrix<'a>,
    /// The first output.
    first: usize,
    inputs: Range<usize>,
}

impl Rows for Stored<'_> {
    fn format(&self) -> Format {
        self.w.format()
    }

    fn row(&mut self, i: usize) -> &[u8] {
        // Pieces of rows are too short for the hardware to see what comes.
        if let Some(next) = (self.first + i).checked_add(AHEAD).filter(|n| *n < self.w.rows()) {
            fetch(cut(self.w, next, &self.inputs));
        }
        cut(self.w, self.first + i, &self.inputs)
    }
}

/// Asks for all lines of `bytes`.
fn fetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    bytes.iter().step_by(64).for_each(|b| crate::x86::prefetch(b));
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// Rows that zeros are put back into.
struct Unpacked<'a> {
    isa: Isa,
    w: &'a Bitmap<'a>,
    strip: &'a mut Strip,
    /// Room for one.
    row: &'a mut [u8],
}

impl Rows for Unpacked<'_> {
    fn format(&self) -> Format {
        self.w.format()
    }

    fn row(&mut self, i: usize) -> &[u8] {
        self.strip.unpack(self.isa, self.w, i, self.row);
        self.row
    }
}

/// The part of an input-major matrix that a panel holds.
struct Part<'a> {
    isa: Isa,
    w: &'a Matrix<'a>,
    outputs: Range<usize>,
    inputs: Range<usize>,
}

impl<'a> Part<'a> {
    fn tiles(&self) -> usize {
        self.outputs.len().div_ceil(TILE_N) * tiles(self.inputs.len())
    }

    /// The stored outputs of input `i` of the panel; `None` for padding.
    fn run_bytes(&self, i: usize) -> Option<&'a [u8]> {
        let k = self.inputs.start + i;
        (k < self.inputs.end).then(|| cut(self.w, k, &self.outputs))
    }
}

/// The bytes of numbers `range` of one run. Panels begin at multiples of 256, the longest block, and end at one or at
/// the run's end, so both borders are block borders.
fn cut<'a>(w: &Matrix<'a>, run: usize, range: &Range<usize>) -> &'a [u8] {
    let at = |n: usize| n / w.format().block_len() * w.format().block_bytes();
    &w.row(run)[at(range.start)..at(range.end)]
}

/// Decodes to f32; only the formats of f32 arithmetic (F32, F16) are worth a fast path.
fn f32_run(isa: Isa, format: Format, bytes: &[u8], run: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if format == Format::F16 && isa.has_avx512() {
        // SAFETY: these instruction sets include AVX-512F.
        return unsafe { super::decode512::f16_run(bytes, run) };
    }
    let _ = isa;
    decode_run(format, bytes, run);
}

/// Rounds a row to bf16 lines of 32, one tile apart; padding becomes zero.
fn bf16_row(run: &[f32], lines: &mut [u16]) {
    for (line, values) in lines.chunks_mut(TILE).zip(run.chunks(TILE_K)) {
        let line = &mut line[..TILE_K];
        for (d, v) in line.iter_mut().zip(values) {
            *d = round_bf16(*v);
        }
        line[values.len()..].fill(0);
    }
}

/// The tile of 16 outputs from `n0` on, of 32 decoded runs `padded` apart.
fn transposed_tile(isa: Isa, runs: &[f32], padded: usize, n0: usize) -> [f32; TILE] {
    let mut tile = [0f32; TILE];
    let mut square = [0u32; 256];
    for half in 0..2 {
        for (i, line) in square.chunks_exact_mut(TILE_N).enumerate() {
            let run = &runs[(half * 16 + i) * padded + n0..][..TILE_N];
            for (d, v) in line.iter_mut().zip(run) {
                *d = v.to_bits();
            }
        }
        transpose16(isa, &mut square);
        for (row, line) in tile.chunks_exact_mut(TILE_K).zip(square.chunks_exact(TILE_N)) {
            for (d, v) in row[half * 16..].iter_mut().zip(line) {
                *d = f32::from_bits(*v);
            }
        }
    }
    tile
}

fn f32_tile(tile: &[f32; TILE], out: &mut [f32]) {
    out.copy_from_slice(tile);
}

fn bf16_tile(tile: &[f32; TILE], out: &mut [u16]) {
    for (o, v) in out.iter_mut().zip(tile) {
        *o = round_bf16(*v);
    }
}
