//! One query against the whole cache, split over key/value heads and spans of positions.
//!
//! The spans have a fixed size and their partial results (maximum, sum, weighted values) are combined in their order,
//! by whichever thread finishes the last span of a head: the result is the same for any number of threads
//! (split-KV decoding: Dao et al. 2023, Flash-Decoding).

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::page::{KvType, Layout};
use super::shared::SharedMut;
use super::{Cache, Job, Scratch, Spec};
use crate::elementwise::math;
use crate::isa::Isa;
use crate::lanes::{Kernel, Lanes, on_lanes};

/// Positions in a span, rounded down to whole pages (at least one).
const SPAN: usize = 256;

/// Shape of the split of one call.
struct Split<'a> {
    spec: &'a Spec,
    cache: &'a Cache<'a>,
    layout: Layout,
    /// Visible positions.
    visible: Range<usize>,
    /// Query heads of one key/value head.
    group: usize,
    /// Positions of a span.
    span: usize,
    /// Indices of the spans that hold visible positions.
    spans: Range<usize>,
}

impl Split<'_> {
    /// Numbers of one partial result: per query head of the group its weighted values (`d16`), maximum and sum.
    fn partial(&self) -> usize {
        self.group * (self.layout.d16 + 2)
    }
}

/// Attention of the query at position `job.start`; `isa` is not scalar.
pub(super) fn run(isa: Isa, job: &Job<'_>, out: &mut [f32], scratch: &mut Scratch) {
    let Job { pool, spec, cache, start, q } = *job;
    let len = start + 1;
    let span = (SPAN / cache.page_len).max(1) * cache.page_len;
    let visible = spec.first_visible(len - 1)..len;
    let spans = visible.start / span..len.div_ceil(span);
    let (layout, group) = (cache.layout(spec), spec.heads / spec.kv_heads);
    let split = Split { spec, cache, layout, visible, group, span, spans };
    let Scratch { queries, partials, scores, .. } = scratch;
    scale_queries(&split, q, queries);
    partials.resize(spec.kv_heads * split.spans.len() * split.partial(), 0.0);
    scores.resize(pool.threads() * group * span, 0.0);
    let (partials, scores, out) = (SharedMut::new(partials), SharedMut::new(scores), SharedMut::new(out));
    let done: Vec<_> = (0..spec.kv_heads).map(|_| AtomicUsize::new(0)).collect();
    pool.run(spec.kv_heads * split.spans.len(), &|worker, chunk| {
        let (s, h) = (chunk / spec.kv_heads, chunk % spec.kv_heads);
        let place = |s: usize| (h * split.spans.len() + s) * split.partial()..;
        // SAFETY: (h, s) belongs to this chunk alone, the scores to this worker.
        let (partial, scores) = unsafe {
            let scores = scores.slice(worker * group * span, group * span);
            (partials.slice(place(s).start, split.partial()), scores)
        };
        let q = &queries[h * group * layout.d2..(h + 1) * group * layout.d2];
        on_lanes(isa, SpanJob::new(&split, h, s, q, scores, partial));
        // The counter orders the writes of all spans of this head before the reads of the last one.
        if done[h].fetch_add(1, Ordering::AcqRel) + 1 == split.spans.len() {
            // SAFETY: all other chunks of this head have ended; no other chunk writes this part of the result.
            let (all, out) = unsafe {
                let width = group * spec.head_dim;
                let all = partials.slice(place(0).start, split.spans.len() * split.partial());
                (&*all, out.slice(h * width, width))
            };
            combine(&split, all, out);
        }
    });
}

/// Queries padded to `d2` and multiplied so that scores come out in the unit of `exp2` (without a cap) or as they are.
fn scale_queries(split: &Split<'_>, q: &[f32], queries: &mut Vec<f32>) {
    let factor = split.spec.scale * split.spec.cap.map_or(std::f32::consts::LOG2_E, |_| 1.0);
    queries.clear();
    for q in q.chunks_exact(split.spec.head_dim) {
        queries.extend(q.iter().map(|x| x * factor));
        queries.resize(queries.len().next_multiple_of(split.layout.d2), 0.0);
    }
}

/// Merges the partial results of the spans of one key/value head, in their order, into `out`.
fn combine(split: &Split<'_>, partials: &[f32], out: &mut [f32]) {
    let (d16, group) = (split.layout.d16, split.group);
    for (g, out) in out.chunks_exact_mut(split.spec.head_dim).enumerate() {
        let max_and_sum = |p: &[f32]| (p[group * d16 + 2 * g], p[group * d16 + 2 * g + 1]);
        let parts = || partials.chunks_exact(split.partial());
        let max = parts().map(|p| max_and_sum(p).0).fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0;
        out.fill(0.0);
        for part in parts() {
            let (m, sum) = max_and_sum(part);
            let weight = (m - max).exp2();
            total += weight * sum;
            out.iter_mut().zip(&part[g * d16..]).for_each(|(o, x)| *o += weight * x);
        }
        let factor = 1.0 / total;
        out.iter_mut().for_each(|o| *o *= factor);
    }
}

/// One span of one key/value head.
struct SpanJob<'a> {
    layout: Layout,
    /// Keys and values of the pages that are read; the first holds the first visible position.
    runs: Vec<(&'a [u8], &'a [u8])>,
    /// Visible positions, counted from the start of the first page.
    visible: Range<usize>,
    group: usize,
    cap: Option<f32>,
    q: &'a [f32],
    /// `[group][stride]`.
    scores: &'a mut [f32],
    stride: usize,
    partial: &'a mut [f32],
}

impl<'a> SpanJob<'a> {
    fn new(split: &Split<'a>, h: usize, s: usize, q: &'a [f32], scores: &'a mut [f32], partial: &'a mut [f32]) -> Self {
        let page_len = split.cache.page_len;
        let start = (split.spans.start + s) * split.span;
        let first = split.visible.start.max(start);
        let end = split.visible.end.min(start + split.span);
        let base = first / page_len * page_len;
        let pages = &split.cache.pages[base / page_len..end.div_ceil(page_len)];
        let runs = pages.iter().map(|page| split.layout.split(page, h)).collect();
        let visible = first - base..end - base;
        let (group, cap) = (split.group, split.spec.cap);
        Self { layout: split.layout, runs, visible, group, cap, q, scores, stride: split.span, partial }
    }

    /// The run of keys or values that is read after the run `i` of `(keys, values)`.
    fn next(&self, i: usize, values: bool) -> *const u8 {
        match (self.runs.get(i + 1), values) {
            (Some(next), true) => next.1.as_ptr(),
            (Some(next), false) => next.0.as_ptr(),
            (None, true) => std::ptr::null(),
            (None, false) => self.runs[0].1.as_ptr(),
        }
    }
}

impl Kernel for SpanJob<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: the caller vouches for the instruction set.
        unsafe {
            match self.layout.ty {
                KvType::F32 => self.span::<V, F32>(),
                KvType::F16 => self.span::<V, F16>(),
                KvType::Bf16 => self.span::<V, Bf16>(),
            }
        }
    }
}

/// How two rows of a run are loaded: rows `2i` and `2i + 1` are neighbours in memory, or interleaved number by number.
trait Elem {
    const BYTES: usize;
    const PAIRS: bool;
    /// `N` numbers of each of the two rows of pair `i`, from `column` on.
    unsafe fn rows<V: Lanes>(run: *const u8, width: usize, i: usize, column: usize) -> (V, V);
    /// Of row `2i` alone.
    unsafe fn row<V: Lanes>(run: *const u8, width: usize, i: usize, column: usize) -> V;
}

struct F32;
struct F16;
struct Bf16;

impl Elem for F32 {
    const BYTES: usize = 4;
    const PAIRS: bool = false;

    #[inline(always)]
    unsafe fn rows<V: Lanes>(run: *const u8, width: usize, i: usize, column: usize) -> (V, V) {
        // SAFETY: the caller names rows and columns inside the run.
        unsafe {
            let p = run.cast::<f32>().add(2 * i * width + column);
            (V::load(p), V::load(p.add(width)))
        }
    }

    #[inline(always)]
    unsafe fn row<V: Lanes>(run: *const u8, width: usize, i: usize, column: usize) -> V {
        // SAFETY: the caller names rows and columns inside the run.
        unsafe { V::load(run.cast::<f32>().add(2 * i * width + column)) }
    }
}

impl Elem for F16 {
    const BYTES: usize = 2;
    const PAIRS: bool = false;

    #[inline(always)]
    unsafe fn rows<V: Lanes>(run: *const u8, width: usize, i: usize, column: usize) -> (V, V) {
        // SAFETY: the caller names rows and columns inside the run.
        unsafe {
            let p = run.cast::<u16>().add(2 * i * width + column);
            (V::load_f16(p), V::load_f16(p.add(width)))
        }
    }

    #[inline(always)]
    unsafe fn row<V: Lanes>(run: *const u8, width: usize, i: usize, column: usize) -> V {
        // SAFETY: the caller names rows and columns inside the run.
        unsafe { V::load_f16(run.cast::<u16>().add(2 * i * width + column)) }
    }
}

impl Elem for Bf16 {
    const BYTES: usize = 2;
    const PAIRS: bool = true;

    #[inline(always)]
    unsafe fn rows<V: Lanes>(run: *const u8, width: usize, i: usize, column: usize) -> (V, V) {
        // SAFETY: the caller names rows and columns inside the run.
        unsafe { V::load_bf16_pairs(run.cast::<u16>().add(2 * (i * width + column))) }
    }

    #[inline(always)]
    unsafe fn row<V: Lanes>(run: *const u8, width: usize, i: usize, column: usize) -> V {
        // SAFETY: the caller names rows and columns inside the run.
        unsafe { Self::rows(run, width, i, column).0 }
    }
}

/// Rows of `width` numbers at `run`; `next` is read afterwards and fetched ahead.
#[derive(Clone, Copy)]
struct Operand {
    run: *const u8,
    next: *const u8,
    width: usize,
}

/// `acc[g][s] += sum over rows r in rows of weights[g * stride + r] * run[r][column + s N ..]`, which serves both
/// products: keys (rows are components, columns positions) and values (rows are positions, columns components).
///
/// # Safety
/// The run has the rows and columns named, `weights` one number per row and `g`, both of `rows.start` being even;
/// the machine has the instruction set.
#[inline(always)]
unsafe fn product<V: Lanes, E: Elem, const S: usize, const G: usize>(
    acc: &mut [[V; S]; G],
    Operand { run, next, width }: Operand,
    column: usize,
    rows: Range<usize>,
    weights: *const f32,
    stride: usize,
) {
    // SAFETY: as above.
    unsafe {
        for i in rows.start / 2..rows.end / 2 {
            let offset = (2 * i * width + if E::PAIRS { 2 * column } else { column }) * E::BYTES;
            if E::PAIRS {
                for line in (0..2 * S * V::N * E::BYTES).step_by(64) {
                    V::prefetch(next.wrapping_add(offset + line));
                }
            } else {
                for line in (0..S * V::N * E::BYTES).step_by(64) {
                    V::prefetch(next.wrapping_add(offset + line));
                    V::prefetch(next.wrapping_add(offset + width * E::BYTES + line));
                }
            }
            let mut x = [(V::splat(0.0), V::splat(0.0)); S];
            for (s, x) in x.iter_mut().enumerate() {
                *x = E::rows::<V>(run, width, i, column + s * V::N);
            }
            for (g, acc) in acc.iter_mut().enumerate() {
                let a = V::splat(*weights.add(g * stride + 2 * i));
                let b = V::splat(*weights.add(g * stride + 2 * i + 1));
                for (acc, x) in acc.iter_mut().zip(x) {
                    *acc = x.1.fma(b, x.0.fma(a, *acc));
                }
            }
        }
        // The other half of the last pair may never have been written: it is not multiplied, not even with zero.
        if !rows.end.is_multiple_of(2) {
            for s in 0..S {
                let x = E::row::<V>(run, width, rows.end / 2, column + s * V::N);
                for (g, acc) in acc.iter_mut().enumerate() {
                    acc[s] = x.fma(V::splat(*weights.add(g * stride + rows.end - 1)), acc[s]);
                }
            }
        }
    }
}

impl SpanJob<'_> {
    #[inline(always)]
    unsafe fn span<V: Lanes, E: Elem>(self) {
        // SAFETY: the caller vouches for the instruction set; heads `g..g + G` are in the group.
        unsafe {
            let mut me = self;
            for i in 0..me.runs.len() {
                me.for_groups::<V, E, false>(i);
            }
            for g in 0..me.group {
                me.weigh::<V>(g);
            }
            let values = me.group * me.layout.d16;
            me.partial[..values].fill(0.0);
            for i in 0..me.runs.len() {
                me.for_groups::<V, E, true>(i);
            }
        }
    }

    /// Scores (or, if `VALUES`, weighted values) of run `i`, four query heads at a time.
    #[inline(always)]
    unsafe fn for_groups<V: Lanes, E: Elem, const VALUES: bool>(&mut self, i: usize) {
        // SAFETY: the caller vouches for the instruction set; heads `g..g + G` are in the group.
        unsafe {
            let mut g = 0;
            while g < self.group {
                match self.group - g {
                    4.. => g += self.strips::<V, E, 4, VALUES>(i, g),
                    2.. => g += self.strips::<V, E, 2, VALUES>(i, g),
                    _ => g += self.strips::<V, E, 1, VALUES>(i, g),
                }
            }
        }
    }

    /// All columns of run `i` for `G` query heads from `g` on; returns `G`.
    #[inline(always)]
    unsafe fn strips<V: Lanes, E: Elem, const G: usize, const VALUES: bool>(&mut self, i: usize, g: usize) -> usize {
        let columns = if VALUES { self.layout.d16 } else { self.layout.page_len };
        let mut column = 0;
        // SAFETY: the caller vouches for the instruction set; the strips stay below `columns`, a multiple of 16.
        unsafe {
            while column < columns {
                // Accumulators: 16 of the 32 registers of AVX-512 and NEON, 8 of the 16 of AVX2.
                column += match (columns - column) / V::N {
                    4.. if V::N != 8 => self.strip::<V, E, 4, G, VALUES>(i, g, column),
                    2.. if V::N == 8 => self.strip::<V, E, 2, G, VALUES>(i, g, column),
                    _ => self.strip::<V, E, 1, G, VALUES>(i, g, column),
                };
            }
        }
        G
    }

    /// `S` vectors of columns of run `i` for `G` query heads; returns the number of columns.
    #[inline(always)]
    unsafe fn strip<V: Lanes, E: Elem, const S: usize, const G: usize, const VALUES: bool>(
        &mut self,
        i: usize,
        g: usize,
        column: usize,
    ) -> usize {
        let page_len = self.layout.page_len;
        // Other query heads of the group find the next run already on its way.
        let next = if g == 0 { self.next(i, VALUES) } else { std::ptr::null() };
        // SAFETY: runs, queries and scores have the shape of `layout`; columns and heads are in range.
        unsafe {
            if VALUES {
                // A pair that starts before the first visible position has weight zero there (see `weigh`).
                let rows = self.visible.start.saturating_sub(i * page_len) & !1
                    ..(self.visible.end - i * page_len).min(page_len);
                let out = self.partial.as_mut_ptr().add(g * self.layout.d16 + column);
                let mut acc = load_all::<V, S, G>(out, self.layout.d16);
                let weights = self.scores.as_ptr().add(g * self.stride + i * page_len);
                let operand = Operand { run: self.runs[i].1.as_ptr(), next, width: self.layout.d16 };
                product::<V, E, S, G>(&mut acc, operand, column, rows, weights, self.stride);
                store_all(acc, out, self.layout.d16);
            } else {
                let out = self.scores.as_mut_ptr().add(g * self.stride + i * page_len + column);
                let mut acc = [[V::splat(0.0); S]; G];
                let weights = self.q.as_ptr().add(g * self.layout.d2);
                let operand = Operand { run: self.runs[i].0.as_ptr(), next, width: page_len };
                let rows = 0..self.layout.d2;
                product::<V, E, S, G>(&mut acc, operand, column, rows, weights, self.layout.d2);
                store_all(acc, out, self.stride);
            }
        }
        S * V::N
    }

    /// Turns the scores of query head `g` into weights `2^(score - maximum)`; notes maximum and sum.
    #[inline(always)]
    unsafe fn weigh<V: Lanes>(&mut self, g: usize) {
        let Range { start, end } = self.visible;
        // SAFETY: the caller vouches for the instruction set; `start..end` lies inside the row of scores.
        unsafe {
            let row = self.scores.as_mut_ptr().add(g * self.stride);
            let mut max = V::splat(f32::NEG_INFINITY);
            for j in (start..end).step_by(V::N) {
                let n = (end - j).min(V::N);
                let mut x = V::load_part(row.add(j), n);
                if let Some(cap) = self.cap {
                    let y = math::tanh(x.div(V::splat(cap)));
                    x = y.mul(V::splat(cap * std::f32::consts::LOG2_E));
                    x.store_part(row.add(j), n);
                }
                // Lanes beyond the end are zero: replace them by a score that is really there.
                max = max.max(if n == V::N { x } else { V::splat(max_of(row.add(j), n)) });
            }
            let max = max.max_lane();
            let mut sum = V::splat(0.0);
            for j in (start..end).step_by(V::N) {
                let n = (end - j).min(V::N);
                let y = math::exp2(V::load_part(row.add(j), n).sub(V::splat(max)));
                y.store_part(row.add(j), n);
                sum = sum.add(V::load_part(row.add(j), n));
            }
            if start % 2 == 1 {
                *row.add(start - 1) = 0.0;
            }
            let at = self.group * self.layout.d16 + 2 * g;
            self.partial[at] = max;
            self.partial[at + 1] = sum.sum();
        }
    }
}

/// The largest of `n` numbers.
#[inline(always)]
unsafe fn max_of(p: *const f32, n: usize) -> f32 {
    // SAFETY: the caller vouches for `n` numbers.
    unsafe { std::slice::from_raw_parts(p, n) }.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

#[inline(always)]
unsafe fn load_all<V: Lanes, const S: usize, const G: usize>(p: *const f32, stride: usize) -> [[V; S]; G] {
    // SAFETY: the caller vouches for `S * N` numbers in each of `G` rows.
    unsafe {
        let mut acc = [[V::splat(0.0); S]; G];
        for (g, acc) in acc.iter_mut().enumerate() {
            for (s, acc) in acc.iter_mut().enumerate() {
                *acc = V::load(p.add(g * stride + s * V::N));
            }
        }
        acc
    }
}

#[inline(always)]
unsafe fn store_all<V: Lanes, const S: usize, const G: usize>(acc: [[V; S]; G], p: *mut f32, stride: usize) {
    for (g, acc) in acc.into_iter().enumerate() {
        for (s, acc) in acc.into_iter().enumerate() {
            // SAFETY: the caller vouches for `S * N` numbers in each of `G` rows.
            unsafe { acc.store(p.add(g * stride + s * V::N)) };
        }
    }
}
