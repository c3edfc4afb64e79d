//! Attention over a paged key/value cache: causal, grouped-query, with sliding window and score cap.
//!
//! [`decode()`] computes one query against the whole cache and is bound by memory: it splits the cache into spans of
//! fixed size, reads each key and value once for all query heads of its group, and computes in f32. [`prefill()`]
//! computes many queries with blocked online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022)
//! and is bound by arithmetic. In both, results are the same bits for any number of threads.

#[cfg(target_arch = "x86_64")]
mod amx;
mod backend;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod buffer;
mod decode;
mod lanes_f32;
mod page;
mod prefill;
mod scalar;
mod shared;
#[cfg(test)]
mod tests;

pub use buffer::PageBuf;
pub use page::{KvShape, KvType, PAGE_ALIGN, PAGE_LEN, page_bytes, read, write};

use crate::isa::{self, Isa};
use crate::pool::Pool;
use page::Layout;

/// What attention computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// Query heads: a multiple of `kv_heads`; query head `h` reads key/value head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Numbers in a head.
    pub head_dim: usize,
    /// Factor on the scores, positive; usually `1/sqrt(head_dim)`.
    pub scale: f32,
    /// A query sees this many positions, itself included (at least 1); all if `None`.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)` (Gemma 2); positive.
    pub cap: Option<f32>,
}

impl Spec {
    /// The first position that a query at position `at` sees.
    pub fn first_visible(&self, at: usize) -> usize {
        self.window.map_or(0, |window| (at + 1).saturating_sub(window))
    }
}

/// Keys and values of one layer for one sequence: position `j` lies in slot `j % page_len` of page `j / page_len`.
///
/// Pages that end before the first visible position are not read and may be empty slices.
#[derive(Clone, Copy)]
pub struct Cache<'a> {
    /// How they are stored.
    pub ty: KvType,
    /// Positions in a page.
    pub page_len: usize,
    /// Pages in the order of positions, each of [`page_bytes`] bytes.
    pub pages: &'a [&'a [u8]],
}

impl Cache<'_> {
    fn layout(&self, spec: &Spec) -> Layout {
        let Spec { kv_heads, head_dim, .. } = *spec;
        Layout::new(self.ty, KvShape { kv_heads, head_dim, page_len: self.page_len })
    }

    /// Checks everything that the kernels rely on for queries at positions `start..start + n`.
    fn check(&self, spec: &Spec, start: usize, n: usize, q: usize, out: usize) {
        assert!(
            spec.heads > 0 && spec.heads.is_multiple_of(spec.kv_heads),
            "{} heads of {}",
            spec.heads,
            spec.kv_heads
        );
        assert!(spec.scale > 0.0 && spec.cap.is_none_or(|c| c > 0.0) && spec.window != Some(0), "{spec:?}");
        assert_eq!([q, out], [n * spec.heads * spec.head_dim; 2], "numbers of the queries and of the result");
        let layout = self.layout(spec);
        let bytes = layout.head() * spec.kv_heads * self.ty.bytes();
        let pages = spec.first_visible(start) / self.page_len..(start + n).div_ceil(self.page_len);
        assert!(pages.end <= self.pages.len(), "{} pages for {} positions", self.pages.len(), start + n);
        assert!(self.pages[pages].iter().all(|page| page.len() == bytes), "a page is not {bytes} bytes");
    }
}

/// Working memory of the kernels, reused between calls; its content means nothing outside a call.
#[derive(Default)]
pub struct Scratch {
    /// Scaled queries of decode.
    queries: Vec<f32>,
    /// Results of the spans of decode.
    partials: Vec<f32>,
    /// Scores of decode, one part for each worker.
    scores: Vec<f32>,
    /// Memory of prefill, one part for each worker.
    arena: PageBuf,
}

/// Attention of one query at position `len - 1` over a cache of `len` positions, which includes its own key and value.
///
/// `q` and `out` hold `heads * head_dim` numbers.
///
/// # Panics
/// If `len` is 0, or a length, a page or the specification does not fit.
pub fn decode(
    pool: &Pool,
    spec: &Spec,
    cache: &Cache<'_>,
    len: usize,
    q: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    assert!(len > 0, "attention over nothing");
    decode_with(isa::get(), &Job { pool, spec, cache, start: len - 1, q }, out, scratch);
}

/// What both entry points hand to a kernel: queries at positions from `start` on.
struct Job<'a> {
    pool: &'a Pool,
    spec: &'a Spec,
    cache: &'a Cache<'a>,
    start: usize,
    q: &'a [f32],
}

/// [`decode()`] with the instruction set `isa`, which this machine must have.
fn decode_with(isa: Isa, job: &Job<'_>, out: &mut [f32], scratch: &mut Scratch) {
    job.cache.check(job.spec, job.start, 1, job.q.len(), out.len());
    match isa {
        Isa::Scalar => scalar::row(job.spec, job.cache, job.start, job.q, out),
        _ => decode::run(isa, job, out, scratch),
    }
}

/// Causal attention of `n` queries at positions `start..start + n`, whose keys and values are already in the cache.
///
/// `q` and `out` hold `n` rows of `heads * head_dim` numbers. A row's result does not depend on `n` or on the row's
/// place in the call. With f16 or bf16 pages, AVX-512 and AMX compute the products in bf16 (8 bits) with f32 sums.
///
/// # Panics
/// If a length, a page or the specification does not fit.
pub fn prefill(
    pool: &Pool,
    spec: &Spec,
    cache: &Cache<'_>,
    start: usize,
    q: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    prefill_with(isa::get(), &Job { pool, spec, cache, start, q }, out, scratch);
}

/// [`prefill()`] with the instruction set `isa`, which this machine must have.
fn prefill_with(isa: Isa, job: &Job<'_>, out: &mut [f32], scratch: &mut Scratch) {
    let Job { spec, cache, start, q, .. } = *job;
    let width = spec.heads * spec.head_dim;
    cache.check(spec, start, q.len() / width, q.len(), out.len());
    match isa {
        Isa::Scalar => {
            for (i, (q, out)) in q.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
                scalar::row(spec, cache, start + i, q, out);
            }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx if bf16::pays(isa, &cache.layout(spec)) => {
            prefill::run(&bf16::DotBf16 { amx: isa == Isa::Amx }, job, out, scratch);
        }
        _ => prefill::run(&lanes_f32::LanesF32(isa), job, out, scratch),
    }
}
