//! Cuts products into chunks, runs the block kernels over the panels of a chunk and stores the result.

use std::cell::RefCell;
use std::ops::Range;

use super::Weights;
use super::arithmetic::Arithmetic;
use super::buffer::{Buffer, Shared};
use super::input::{Input, tiles};
use super::panel::Panel;
use super::product::{Product, Scales};
use super::store::{Target, store_tile};
use super::{Job, LANES, TILE_N};
use crate::Pool;
use crate::isa::Isa;

/// Blocks of rows per chunk: 512 rows, so that packed activations of a panel and the sums stay in a 1 MiB cache.
const CHUNK_BLOCKS: usize = 32;

/// Scratch of one thread.
#[derive(Default)]
struct Scratch {
    panel: Panel,
    sums: Buffer,
}

thread_local! {
    /// Kept from call to call: some hundred KiB per worker.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Runs `jobs` with the instruction set that their inputs were prepared for.
pub(crate) fn run(isa: Isa, pool: &Pool, jobs: &mut [Job<'_>]) {
    let mut end = 0;
    let plans: Vec<(usize, Plan<'_>)> = jobs
        .iter_mut()
        .map(|job| {
            let plan = Plan::new(isa, job);
            end += plan.chunks();
            (end, plan)
        })
        .collect();
    pool.run(end, &|_, chunk| {
        let i = plans.partition_point(|&(end, _)| end <= chunk);
        let (end, plan) = &plans[i];
        SCRATCH.with_borrow_mut(|scratch| plan.run(chunk - (end - plan.chunks()), scratch));
    });
}

/// One product cut into chunks of `panel_n` outputs by [`CHUNK_BLOCKS`] row blocks.
struct Plan<'a> {
    isa: Isa,
    w: Weights<'a>,
    arithmetic: Arithmetic,
    x: &'a Input,
    y: Shared<f32>,
    accumulate: bool,
    n: usize,
    panel_n: usize,
}

impl<'a> Plan<'a> {
    fn new(isa: Isa, job: &mut Job<'a>) -> Self {
        let (n, k) = job.w.shape();
        let arithmetic = Arithmetic::of(isa, job.w.format(), job.w.without_blocks());
        assert_eq!(job.x.isa.unwrap_or(isa), isa, "the input was prepared for another instruction set");
        assert!(job.x.rows() == 0 || job.x.is_for(arithmetic), "the input was not prepared for {:?}", job.w.format());
        assert_eq!(job.x.cols(), k, "inputs per output");
        assert_eq!(job.y.len(), job.x.rows() * n, "the result has {} rows of {n}", job.x.rows());
        let panel_n = arithmetic.panel_n(isa, &job.w);
        let y = Shared::new(job.y);
        Self { isa, w: job.w, arithmetic, x: job.x, y, accumulate: job.accumulate, n, panel_n }
    }

    fn row_parts(&self) -> usize {
        self.x.blocks().div_ceil(CHUNK_BLOCKS)
    }

    fn chunks(&self) -> usize {
        self.n.div_ceil(self.panel_n) * self.row_parts()
    }

    fn run(&self, chunk: usize, scratch: &mut Scratch) {
        let n0 = chunk / self.row_parts() * self.panel_n;
        let b0 = chunk % self.row_parts() * CHUNK_BLOCKS;
        let outputs = n0..(n0 + self.panel_n).min(self.n);
        let blocks = b0..(b0 + CHUNK_BLOCKS).min(self.x.blocks());
        let k = self.x.cols();
        let tiles_n = outputs.len().div_ceil(TILE_N);
        let sums = scratch.sums.at_least::<f32>(blocks.len() * tiles_n * TILE_N * LANES);
        if k == 0 {
            sums.fill(0.0);
        }
        let panel_k = self.arithmetic.panel_k(self.isa);
        for k0 in (0..k).step_by(panel_k) {
            let inputs = k0..(k0 + panel_k).min(k);
            scratch.panel.fill(self.isa, self.arithmetic, &self.w, outputs.clone(), inputs.clone());
            self.multiply(&scratch.panel, &inputs, &blocks, tiles_n, sums);
        }
        self.store(sums, &outputs, &blocks);
    }

    fn multiply(&self, panel: &Panel, inputs: &Range<usize>, blocks: &Range<usize>, tiles_n: usize, sums: &mut [f32]) {
        let tiles_k = tiles(inputs.len());
        let x_stride = self.x.k_pad() * LANES;
        let from = blocks.start * x_stride + inputs.start * LANES;
        let (blocks, first) = (blocks.len(), inputs.start == 0);
        match self.arithmetic {
            Arithmetic::F32 => {
                let (w, x) = (panel.f32s(tiles_n * tiles_k), &self.x.f32s()[from..]);
                f32_block(self.isa, Product { w, x, x_stride, sums, tiles_n, tiles_k, blocks, first });
            }
            Arithmetic::Bf16 => {
                let (w, x) = (panel.bf16s(tiles_n * tiles_k), &self.x.bf16s()[from..]);
                bf16_block(self.isa, Product { w, x, x_stride, sums, tiles_n, tiles_k, blocks, first });
            }
            Arithmetic::Int8 => {
                let (codes, x) = (panel.codes(self.w.format(), tiles_n * tiles_k), self.x.codes());
                let scales = Scales {
                    w: codes.scales,
                    offsets: codes.offsets,
                    zero_point: codes.layout.zero_point,
                    groups: codes.layout.groups,
                    x: &x.scales[from / 32..],
                    x_sums: &x.sums[from / 16..],
                };
                let (w, x) = (codes.codes, &x.codes[from..]);
                int8_block(self.isa, Product { w, x, x_stride, sums, tiles_n, tiles_k, blocks, first }, scales);
            }
        }
    }

    /// Transposes the sums of a chunk into `y`.
    fn store(&self, sums: &[f32], outputs: &Range<usize>, blocks: &Range<usize>) {
        let padded = outputs.len().next_multiple_of(TILE_N);
        for (block, sums) in blocks.clone().zip(sums.chunks_exact(padded * LANES)) {
            let m0 = block * LANES;
            let rows = LANES.min(self.x.rows() - m0);
            for (n0, tile) in outputs.clone().step_by(TILE_N).zip(sums.as_chunks().0) {
                let outputs = TILE_N.min(outputs.end - n0);
                let y = self.y.at(m0 * self.n + n0, (rows - 1) * self.n + outputs);
                let to = Target { y, stride: self.n, rows, outputs, accumulate: self.accumulate };
                // SAFETY: `y` is borrowed by the job for as long as the plan lives, and a chunk alone touches these
                // outputs of these rows; `at` checked that the last of them exists.
                unsafe { store_tile(self.isa, tile, to) };
            }
        }
    }
}

fn f32_block(isa: Isa, p: Product<'_, f32, f32>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set was found on this CPU.
        Isa::Avx512 | Isa::Amx => unsafe { super::avx512::f32_block(p) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { super::avx2::f32_block(p) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: NEON is part of every AArch64 CPU that Rust's std supports.
        Isa::Neon => unsafe { super::neon::f32_block(p) },
        _ => super::scalar::f32_block(p),
    }
}

#[cfg(target_arch = "x86_64")]
fn bf16_block(isa: Isa, p: Product<'_, u16, u16>) {
    if isa == Isa::Amx {
        // SAFETY: the instruction set was found on this CPU and the system gave permission for the tiles.
        unsafe { super::amx::bf16_block(p) }
    } else {
        // SAFETY: BF16 arithmetic is chosen for AVX-512 with BF16 only.
        unsafe { super::avx512::bf16_block(p) }
    }
}

#[cfg(target_arch = "x86_64")]
fn int8_block(_isa: Isa, p: Product<'_, u8, i8>, scales: Scales<'_>) {
    // SAFETY: int8 arithmetic is chosen for AVX-512 with VNNI only.
    unsafe { super::avx512_int8::int8_block(p, scales) }
}

#[cfg(not(target_arch = "x86_64"))]
fn bf16_block(_isa: Isa, _p: Product<'_, u16, u16>) {
    unreachable!("BF16 arithmetic is chosen on x86-64 only")
}

#[cfg(not(target_arch = "x86_64"))]
fn int8_block(_isa: Isa, _p: Product<'_, u8, i8>, _scales: Scales<'_>) {
    unreachable!("int8 arithmetic is chosen on x86-64 only")
}
