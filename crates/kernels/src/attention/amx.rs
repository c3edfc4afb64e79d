//! The two products of prefill on AMX tiles.
//!
//! Stable Rust has no AMX intrinsics, hence inline assembly. The compiler never uses tile registers, so their contents
//! stay between blocks of assembly of one thread. Eight tiles: 2 x 2 sums (tmm0 to tmm3) of 16 rows by 16 columns, two
//! left operands (tmm4, tmm5) and two right operands (tmm6, tmm7); per step four products share four loads.

use std::arch::asm;

use super::backend::Rows;
use super::page::Layout;

/// Rows of a group: two tiles.
pub(super) const ROWS: usize = 32;

/// Columns computed together: two tiles. Also the depth of one step.
pub(super) const COLUMNS: usize = 32;

/// Whether the shape can be cut into full tiles.
pub(super) fn fits(layout: &Layout) -> bool {
    layout.head_dim.is_multiple_of(32) && layout.page_len.is_multiple_of(COLUMNS)
}

/// Tile configuration, palette 1 (Intel SDM, volume 1, chapter 18): all tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    Config(bytes)
};

/// Configures the tiles of this thread. Only called where [`crate::isa`] found AMX.
pub(super) fn begin() {
    // SAFETY: a valid configuration on a machine with AMX (the only callers run with `Isa::Amx`).
    unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, preserves_flags)) };
}

/// Releases the tiles, which makes context switches cheap again.
pub(super) fn end() {
    // SAFETY: as for `begin`.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
}

/// See [`super::backend::Backend::scores`]; `scores` points at the first column, `next` at the keys that come after.
///
/// # Safety
/// The shapes fit [`fits`], and [`begin`] was called on this thread.
pub(super) unsafe fn scores(
    layout: &Layout,
    rows: &Rows<u16>,
    keys: *const u16,
    next: *const u16,
    scores: *mut f32,
    columns: usize,
) {
    let b_stride = 2 * layout.page_len;
    for column in (0..columns).step_by(COLUMNS) {
        let ahead = if column + COLUMNS < layout.page_len { keys.wrapping_add(2 * (column + COLUMNS)) } else { next };
        // SAFETY: the caller vouches for the shapes.
        unsafe {
            zero();
            multiply(rows.q, rows.q_stride, keys.add(2 * column), b_stride, layout.d2 / 32, ahead);
            store(scores.add(column), rows.scores_stride);
        }
    }
}

/// See [`super::backend::Backend::values`].
///
/// # Safety
/// The shapes fit [`fits`], and [`begin`] was called on this thread.
pub(super) unsafe fn values(layout: &Layout, rows: &Rows<u16>, values: &[*const u16], columns: usize) {
    for column in (0..layout.d16).step_by(COLUMNS) {
        // SAFETY: the caller vouches for the shapes.
        unsafe {
            let out = rows.out.add(column);
            load(out, layout.d16);
            for (page, &now) in values.iter().enumerate() {
                let at = page * layout.page_len;
                let steps = (columns - at).min(layout.page_len) / 32;
                let weights = rows.weights.cast_const().add(at);
                let ahead = match values.get(page + 1) {
                    Some(next) => next.wrapping_add(2 * column),
                    None => values[0].wrapping_add(2 * (column + COLUMNS)),
                };
                multiply(weights, rows.weights_stride, now.add(2 * column), 2 * layout.d16, steps, ahead);
            }
            store(out, layout.d16);
        }
    }
}

#[inline(always)]
unsafe fn zero() {
    // SAFETY: the caller has configured tiles.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, preserves_flags));
    }
}

/// Loads the sums from 32 x 32 numbers.
#[inline(always)]
unsafe fn load(c: *const f32, stride: usize) {
    // SAFETY: the caller vouches for the shape and has configured tiles.
    unsafe {
        asm!(
            "tileloadd tmm0, [{c} + {s}]",
            "tileloadd tmm1, [{c} + {s} + 64]",
            "tileloadd tmm2, [{d} + {s}]",
            "tileloadd tmm3, [{d} + {s} + 64]",
            c = in(reg) c, d = in(reg) c.add(16 * stride), s = in(reg) 4 * stride,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// Stores the sums.
#[inline(always)]
unsafe fn store(c: *mut f32, stride: usize) {
    // SAFETY: the caller vouches for the shape and has configured tiles.
    unsafe {
        asm!(
            "tilestored [{c} + {s}], tmm0",
            "tilestored [{c} + {s} + 64], tmm1",
            "tilestored [{d} + {s}], tmm2",
            "tilestored [{d} + {s} + 64], tmm3",
            c = in(reg) c, d = in(reg) c.add(16 * stride), s = in(reg) 4 * stride,
            options(nostack, preserves_flags),
        );
    }
}

/// Adds the product of 32 rows of `a` and 32 columns of pairs `b`, over a depth of `32 * steps`; strides in numbers.
///
/// Tiles are loaded row by row with a stride that the hardware does not prefetch, so the operand of the next call,
/// `ahead`, is brought into the first-level cache meanwhile.
#[inline(always)]
unsafe fn multiply(a: *const u16, a_stride: usize, b: *const u16, b_stride: usize, steps: usize, ahead: *const u16) {
    if steps == 0 {
        return;
    }
    // SAFETY: the caller vouches for the shapes and has configured tiles; a prefetch never faults.
    unsafe {
        asm!(
            "2:",
            "tileloadd tmm4, [{a} + {sa}]",
            "tileloadd tmm6, [{b} + {sb}]",
            "tileloadd tmm7, [{b} + {sb} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            ".rept 5",
            "prefetcht0 [{p}]",
            "prefetcht0 [{p} + 64]",
            "add {p}, {sb}",
            ".endr",
            "tileloadd tmm5, [{e} + {sa}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            ".rept 5",
            "prefetcht0 [{p}]",
            "prefetcht0 [{p} + 64]",
            "add {p}, {sb}",
            ".endr",
            "tdpbf16ps tmm2, tmm5, tmm6",
            ".rept 6",
            "prefetcht0 [{p}]",
            "prefetcht0 [{p} + 64]",
            "add {p}, {sb}",
            ".endr",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 64",
            "add {e}, 64",
            "add {b}, {next}",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) a => _,
            e = inout(reg) a.add(16 * a_stride) => _,
            b = inout(reg) b => _,
            p = inout(reg) ahead => _,
            n = inout(reg) steps => _,
            sa = in(reg) 2 * a_stride,
            sb = in(reg) 2 * b_stride,
            next = in(reg) 32 * b_stride,
            options(nostack, readonly),
        );
    }
}
