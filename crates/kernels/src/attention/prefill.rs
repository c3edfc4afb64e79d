//! Many queries: blocked attention with online softmax.
//!
//! A piece of work is a block of queries of all heads of one key/value group: rows are (head, query). It walks a list
//! of blocks of keys; for each, groups of rows compute scores, weights and weighted values while keys and values stay
//! in the second-level cache. Blocks of keys start at multiples of [`KEYS`], and a block that a row does not see
//! leaves the row's bits as they are: a row's result does not depend on the rows computed with it.

use std::ops::Range;

use super::backend::{Backend, LOWEST, Rows, SoftmaxRow, State};
use super::page::Layout;
use super::shared::SharedMut;
use super::{Cache, Job, PageBuf, Scratch, Spec};

/// Keys of a block, rounded down to whole pages (at least one).
const KEYS: usize = 256;

/// Rows (query heads of a group times queries) of a piece of work, at most, unless the group is larger: each key and
/// value that comes from memory serves so many rows. Fewer where the threads would run out of pieces.
const ROWS: usize = 512;

/// Pieces of work for each thread that make waiting for the last one short.
const PIECES: usize = 4;

/// Everything that all pieces of one call share.
struct Call<'a, B: Backend> {
    backend: &'a B,
    spec: &'a Spec,
    cache: &'a Cache<'a>,
    layout: Layout,
    start: usize,
    /// Queries.
    n: usize,
    /// Query heads of a key/value head.
    group: usize,
    /// Queries of a piece.
    queries: usize,
    /// Keys of a block.
    keys: usize,
    q: &'a [f32],
    sizes: Sizes,
}

/// Offsets in bytes of the parts of a worker's memory, and strides in numbers.
struct Sizes {
    q_stride: usize,
    scores_stride: usize,
    weights_stride: usize,
    /// Where each part starts: queries, scores, weights, values, keys, out; then the total.
    parts: [usize; 7],
}

impl Sizes {
    fn new<B: Backend>(backend: &B, layout: &Layout, rows: usize, keys: usize) -> Self {
        let number = size_of::<B::A>();
        // A cache line more than a power of two, so that the rows of a tile do not compete for the same cache sets.
        let q_stride = layout.d2.next_multiple_of(32) + 64 / number;
        let (scores_stride, weights_stride) = (keys + 16, keys + 64 / number);
        let own_weights = if number == size_of::<f32>() { 0 } else { backend.group() * weights_stride * number };
        let sizes = [
            rows * q_stride * number,
            backend.group() * scores_stride * 4,
            own_weights,
            keys * layout.d16 * number,
            keys * layout.d2 * number,
            rows * layout.d16 * 4,
        ];
        let mut parts = [0; 7];
        for (i, size) in sizes.into_iter().enumerate() {
            parts[i + 1] = parts[i] + size.next_multiple_of(64);
        }
        Self { q_stride, scores_stride, weights_stride, parts }
    }
}

/// Attention of the queries of `job`.
pub(super) fn run<B: Backend>(backend: &B, job: &Job<'_>, out: &mut [f32], scratch: &mut Scratch) {
    let Job { pool, spec, cache, start, q } = *job;
    let (layout, group) = (cache.layout(spec), spec.heads / spec.kv_heads);
    let n = q.len() / (spec.heads * spec.head_dim);
    let keys = (KEYS / cache.page_len).max(1) * cache.page_len;
    let fair = n * spec.heads / (PIECES * pool.threads()).max(1);
    let queries = (fair.clamp(ROWS / 8, ROWS) / group).clamp(1, n.max(1));
    let rows = (group * queries).next_multiple_of(backend.group());
    let sizes = Sizes::new(backend, &layout, rows, keys);
    let each = sizes.parts[6];
    if scratch.arena.len() < each * pool.threads() {
        scratch.arena = PageBuf::zeroed(each * pool.threads());
    }
    let arena = SharedMut::new(&mut scratch.arena);
    let out = SharedMut::new(out);
    let call = Call { backend, spec, cache, layout, start, n, group, queries, keys, q, sizes };
    let pieces = n.div_ceil(queries);
    pool.run(pieces * spec.kv_heads, &|worker, chunk| {
        // The last queries see the most keys: they go first, so that small pieces fill the end.
        let (piece, h) = (pieces - 1 - chunk / spec.kv_heads, chunk % spec.kv_heads);
        // SAFETY: the memory of a worker is used by one chunk at a time.
        let memory = unsafe { arena.slice(worker * each, each) };
        let mut piece = Piece::new(&call, memory, h, piece * queries);
        backend.begin();
        piece.attend(call.visible_blocks(piece.first, piece.count));
        backend.end();
        piece.finish(&out);
    });
}

impl<B: Backend> Call<'_, B> {
    /// The blocks of keys that any of `count` queries from `first` on sees, in order: the seam for sparse attention,
    /// where a planner's list takes the place of this range.
    fn visible_blocks(&self, first: usize, count: usize) -> impl Iterator<Item = usize> + use<B> {
        let at = self.start + first;
        self.spec.first_visible(at) / self.keys..(at + count).div_ceil(self.keys)
    }

    /// The pages of a block of keys, up to the last position.
    fn pages(&self, block: usize) -> Range<usize> {
        let end = ((block + 1) * self.keys).min(self.start + self.n);
        block * self.keys / self.cache.page_len..end.div_ceil(self.cache.page_len)
    }
}

/// A block of queries of one key/value head.
struct Piece<'a, B: Backend> {
    call: &'a Call<'a, B>,
    h: usize,
    /// First query and number of queries.
    first: usize,
    count: usize,
    rows: Rows<B::A>,
    staged_keys: *mut B::A,
    staged_values: *mut B::A,
    states: Vec<State>,
}

impl<'a, B: Backend> Piece<'a, B> {
    fn new(call: &'a Call<'a, B>, memory: &mut [u8], h: usize, first: usize) -> Self {
        let count = call.queries.min(call.n - first);
        let Sizes { q_stride, scores_stride, weights_stride, parts } = call.sizes;
        // Zero bytes are zero in every number type: padding of queries and rows, sums, weights of padded rows.
        memory[parts[0]..parts[3]].fill(0);
        memory[parts[5]..parts[6]].fill(0);
        let memory = memory.as_mut_ptr();
        let at = |i: usize| memory.wrapping_add(parts[i]);
        let weights = if size_of::<B::A>() == size_of::<f32>() { at(1) } else { at(2) };
        let weights_stride = if size_of::<B::A>() == size_of::<f32>() { scores_stride } else { weights_stride };
        let rows = Rows {
            q: at(0).cast_const().cast(),
            q_stride,
            scores: at(1).cast(),
            scores_stride,
            weights: weights.cast(),
            weights_stride,
            out: at(5).cast(),
        };
        let states = vec![State { max: LOWEST, sum: 0.0 }; call.group * count];
        let (staged_values, staged_keys) = (at(3).cast(), at(4).cast());
        let mut piece = Self { call, h, first, count, rows, staged_keys, staged_values, states };
        piece.load_queries();
        piece
    }

    /// Query `i` of head `g` of the group becomes row `g * count + i`.
    fn load_queries(&mut self) {
        let Spec { heads, head_dim, .. } = *self.call.spec;
        for row in 0..self.states.len() {
            let (g, i) = (row / self.count, row % self.count);
            let at = ((self.first + i) * heads + self.h * self.call.group + g) * head_dim;
            let to = self.rows.q.cast_mut().wrapping_add(row * self.rows.q_stride);
            // SAFETY: the part for queries has `q_stride >= head_dim` numbers for every row.
            unsafe { self.call.backend.load_row(&self.call.q[at..at + head_dim], to) };
        }
    }

    /// Walks the blocks of keys.
    fn attend(&mut self, blocks: impl Iterator<Item = usize>) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut blocks = blocks.peekable();
        while let Some(block) = blocks.next() {
            self.stage(block, &mut keys, &mut values);
            let mut ahead = self.lines(blocks.peek().copied());
            let size = self.call.backend.group();
            for row in (0..self.states.len()).step_by(size) {
                self.attend_group(block, row, &keys, &values, &mut ahead);
            }
        }
    }

    /// The cache lines of a block of keys and values as they lie in the cache.
    fn lines(&self, block: Option<usize>) -> impl Iterator<Item = *const u8> + use<'a, B> {
        let (call, h) = (self.call, self.h);
        let pages = block.map_or(0..0, |block| call.pages(block));
        let runs = pages.map(move |page| (call.cache.pages[page], call.layout.head() * call.cache.ty.bytes()));
        runs.flat_map(move |(page, bytes)| {
            (0..bytes).step_by(64).map(move |i| page.as_ptr().wrapping_add(h * bytes + i))
        })
    }

    /// Operands of the pages of a block: the pages themselves where they have the right form.
    fn stage(&self, block: usize, keys: &mut Vec<*const B::A>, values: &mut Vec<*const B::A>) {
        let Call { cache, layout, backend, .. } = self.call;
        let page_len = cache.page_len;
        // Slots from here on may hold anything.
        let end = self.call.start + self.call.n;
        keys.clear();
        values.clear();
        let first = self.call.spec.first_visible(self.call.start + self.first) / page_len;
        for (j, page) in self.call.pages(block).enumerate() {
            if page < first {
                // Not seen by any row, and perhaps gone: never read, since `attend_group` starts later.
                keys.push(std::ptr::null());
                values.push(std::ptr::null());
                continue;
            }
            let (k, v) = layout.split(cache.pages[page], self.h);
            let valid = (end - page * page_len).min(page_len);
            let aligned = k.as_ptr().addr().is_multiple_of(align_of::<B::A>());
            let direct = cache.ty == B::KV && aligned;
            // SAFETY: the staging parts have room for the pages of a block; the runs are whole.
            unsafe {
                let (to_k, to_v) =
                    (self.staged_keys.add(j * layout.keys()), self.staged_values.add(j * page_len * layout.d16));
                if !direct {
                    backend.convert(cache.ty, k, page_len, layout.d2, to_k);
                }
                if !direct || valid < page_len {
                    backend.convert(cache.ty, v, layout.d16, page_len, to_v);
                    self.clear_values(to_v, valid);
                    values.push(to_v.cast_const());
                } else {
                    values.push(v.as_ptr().cast());
                }
                keys.push(if direct { k.as_ptr().cast() } else { to_k.cast_const() });
            }
        }
    }

    /// Zeroes the staged values of slots from `valid` on: weight zero times an old NaN would be NaN.
    unsafe fn clear_values(&self, values: *mut B::A, valid: usize) {
        let layout = Layout { ty: B::KV, ..self.call.layout };
        for slot in valid..layout.page_len {
            for i in 0..layout.d16 {
                // SAFETY: the index lies inside the run.
                unsafe { values.add(layout.value(slot, i)).write(B::A::default()) };
            }
        }
    }

    /// One block of keys for the group of rows from `row` on.
    ///
    /// Lines of the next block are fetched `ahead` during the softmax, which leaves the memory idle otherwise.
    fn attend_group(
        &mut self,
        block: usize,
        row: usize,
        keys: &[*const B::A],
        values: &[*const B::A],
        ahead: &mut impl Iterator<Item = *const u8>,
    ) {
        let Call { spec, layout, backend, .. } = self.call;
        let base = block * self.call.keys;
        let real = row..self.states.len().min(row + backend.group());
        let position = |row: usize| self.call.start + self.first + row % self.count;
        // Keys of the block that the row sees.
        let visible = |row: usize| {
            let from = spec.first_visible(position(row)).saturating_sub(base).min(self.call.keys);
            (from, (position(row) + 1).saturating_sub(base).min(self.call.keys).max(from))
        };
        let seen = real.clone().map(visible).filter(|(from, to)| from < to);
        let Some((from, to)) = seen.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))) else { return };
        // From the first page that any row sees.
        let skip = from / layout.page_len;
        let from = skip * layout.page_len;
        let columns = (to - from).next_multiple_of(backend.columns());
        let rows = Rows {
            q: self.rows.q.wrapping_add(row * self.rows.q_stride),
            out: self.rows.out.wrapping_add(row * layout.d16),
            ..self.rows
        };
        let (keys, values) = (&keys[skip..], &values[skip..]);
        for page in 0..columns.div_ceil(layout.page_len) {
            let (at, keys) = (page * layout.page_len, &keys[page..]);
            // SAFETY: the operands are those of `stage`; the group has room for a block of scores.
            unsafe { backend.scores(layout, &rows, keys, at, (columns - at).min(layout.page_len)) };
        }
        let lines = layout.head() * self.call.cache.ty.bytes() * self.call.keys / layout.page_len / 64;
        let each = lines.div_ceil(self.states.len());
        for r in real.clone() {
            ahead.take(each).for_each(prefetch);
            let (a, b) = visible(r);
            let i = r - row;
            let softmax = SoftmaxRow {
                scores: rows.scores.wrapping_add(i * rows.scores_stride),
                weights: rows.weights.wrapping_add(i * rows.weights_stride),
                out: rows.out.wrapping_add(i * layout.d16),
                d16: layout.d16,
                columns,
                visible: (a.max(from) - from, b.max(from) - from),
                scale: spec.scale * spec.cap.map_or(std::f32::consts::LOG2_E, |_| 1.0),
                cap: spec.cap,
            };
            // SAFETY: as above.
            unsafe { backend.softmax(softmax, &mut self.states[r]) };
        }
        let values = &values[..columns.div_ceil(layout.page_len)];
        // SAFETY: as above.
        unsafe { backend.values(layout, &rows, values, columns) };
    }

    /// Divides by the sums and writes the result.
    fn finish(self, out: &SharedMut<'_, f32>) {
        let Spec { heads, head_dim, .. } = *self.call.spec;
        for (row, state) in self.states.iter().enumerate() {
            let (g, i) = (row / self.count, row % self.count);
            let at = ((self.first + i) * heads + self.h * self.call.group + g) * head_dim;
            // SAFETY: each (query, head) belongs to one piece; the row of weighted values has `d16` numbers.
            let (to, from) = unsafe {
                let from = self.rows.out.add(row * self.call.layout.d16);
                (out.slice(at, head_dim), std::slice::from_raw_parts(from, head_dim))
            };
            let factor = 1.0 / state.sum;
            to.iter_mut().zip(from).for_each(|(to, x)| *to = x * factor);
        }
    }
}

/// A hint that the cache line at `p` is read soon: into the second-level cache.
fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch (part of the x86-64 baseline) never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
