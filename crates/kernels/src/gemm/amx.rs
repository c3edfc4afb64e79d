//! AMX block kernel: a tile of weights (16 outputs x 32 inputs) times a tile of packed activations (16 pairs of
//! inputs x 16 rows), two by two, so that four loads feed four products.
//!
//! Stable Rust has no AMX intrinsics, so the tile instructions are written as assembly.

use std::arch::asm;

use super::product::Product;
use super::{LANES, TILE_K, TILE_N};

const TILE: usize = TILE_N * TILE_K;
/// Bytes of one tile, in either number type: 16 lines of 64.
const TILE_BYTES: usize = 1024;

/// The operand of `ldtilecfg` (Intel SDM, volume 1, 18.1): palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Twin: `scalar::bf16_block`.
///
/// # Safety
/// The CPU has AMX with BF16 and the process has the system's permission to use the tiles.
pub(crate) unsafe fn bf16_block(p: Product<'_, u16, u16>) {
    p.check();
    // SAFETY: a valid configuration; the tiles are released below, before anything else could use them.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
    for block in (0..p.blocks).step_by(2) {
        for tile_n in (0..p.tiles_n).step_by(2) {
            // A missing second tile is computed as a copy of the first: the same sums are stored twice.
            let second_n = (tile_n + 1).min(p.tiles_n - 1);
            let second_block = (block + 1).min(p.blocks - 1);
            let w = |tile: usize| p.w[tile * p.tiles_k * TILE..].as_ptr();
            let x = |block: usize| p.x[block * p.x_stride..].as_ptr();
            let sums = p.sums.as_mut_ptr();
            let at = |tile: usize, block: usize| (block * p.tiles_n + tile) * TILE_N * LANES;
            // SAFETY: `check` says that these tiles, blocks and sums exist in full.
            unsafe {
                let sums = [
                    sums.add(at(tile_n, block)),
                    sums.add(at(tile_n, second_block)),
                    sums.add(at(second_n, block)),
                    sums.add(at(second_n, second_block)),
                ];
                two_by_two([w(tile_n), w(second_n)], [x(block), x(second_block)], sums, p.tiles_k, p.first);
            }
        }
    }
    // SAFETY: gives the tiles back; nothing is live in them.
    unsafe { asm!("tilerelease", options(nomem, nostack)) };
}

/// Two tiles of outputs times two row blocks over `tiles_k` tiles of inputs.
///
/// The loads of a step stand between the products of the step before. Weights are read again for the next pair of
/// blocks, activations are not before the whole panel has passed: `tileloaddt1` (a load without reuse) keeps them
/// from driving the weights out of the first cache, which gains 6 % at 512 inputs per panel.
///
/// # Safety
/// The tiles are configured; `w` and `x` point to `tiles_k` tiles each, `sums` to one tile of f32 each.
unsafe fn two_by_two(w: [*const u16; 2], x: [*const u16; 2], sums: [*mut f32; 4], tiles_k: usize, first: bool) {
    // SAFETY: all memory touched is covered by this function's contract; tile registers are declared.
    unsafe {
        asm!(
            "test {first}, {first}",
            "jz 2f",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "jmp 3f",
            "2:",
            "tileloadd tmm0, [{c0} + {line}]",
            "tileloadd tmm1, [{c1} + {line}]",
            "tileloadd tmm2, [{c2} + {line}]",
            "tileloadd tmm3, [{c3} + {line}]",
            "3:",
            "tileloadd tmm4, [{w0} + {line}]",
            "tileloaddt1 tmm6, [{x0} + {line}]",
            "tileloaddt1 tmm7, [{x1} + {line}]",
            "tileloadd tmm5, [{w1} + {line}]",
            "dec {count}",
            "jz 5f",
            "4:",
            "add {w0}, {tile}",
            "add {w1}, {tile}",
            "add {x0}, {tile}",
            "add {x1}, {tile}",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm4, [{w0} + {line}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloaddt1 tmm6, [{x0} + {line}]",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloaddt1 tmm7, [{x1} + {line}]",
            "tileloadd tmm5, [{w1} + {line}]",
            "dec {count}",
            "jnz 4b",
            "5:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tilestored [{c0} + {line}], tmm0",
            "tilestored [{c1} + {line}], tmm1",
            "tilestored [{c2} + {line}], tmm2",
            "tilestored [{c3} + {line}], tmm3",
            first = in(reg) usize::from(first),
            line = in(reg) 64usize,
            tile = const TILE_BYTES,
            count = inout(reg) tiles_k => _,
            w0 = inout(reg) w[0] => _,
            w1 = inout(reg) w[1] => _,
            x0 = inout(reg) x[0] => _,
            x1 = inout(reg) x[1] => _,
            c0 = in(reg) sums[0],
            c1 = in(reg) sums[1],
            c2 = in(reg) sums[2],
            c3 = in(reg) sums[3],
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
