//! The key/value cache: positions in blocks of [`PAGE_LEN`], each block one buffer that holds the page of every layer.
//! Blocks come from a free list that the sessions of an engine share, and are made when a context grows into them.
//! Several caches may hold one block; the one that writes to it takes a copy first, unless it is the last.

use crate::{
    error::{Error, Result},
    model::spec::{BlockSpec, Spec},
};
use lacuna_kernels::{
    Pool,
    attention::{Cache, KvShape, KvType, PAGE_LEN, PageBuf, page_bytes, write},
};
use std::{
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Where the page of each layer lies in a block, and the blocks that no session uses.
pub(super) struct BlockPool {
    ty: KvType,
    /// Start of each layer's page, then the length of a block.
    offsets: Vec<usize>,
    free: Mutex<Vec<PageBuf>>,
    used: AtomicUsize,
}

/// A block that goes back to its pool when nobody holds it any more.
struct Block {
    bytes: PageBuf,
    pool: Arc<BlockPool>,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.give(std::mem::take(&mut self.bytes));
    }
}

/// Keys and values of [`KV_BLOCK`] positions in all layers, computed once and held by any number of sessions.
#[derive(Clone)]
pub struct KvBlock(Arc<Block>);

/// Blocks that stay free though nobody uses as many.
const KEPT_FREE: usize = 8;

/// Positions of a block of keys and values.
pub const KV_BLOCK: usize = PAGE_LEN;

impl KvBlock {
    /// Its size in memory.
    pub fn bytes(&self) -> usize {
        self.0.bytes.len()
    }
}

fn shape(block: &BlockSpec) -> KvShape {
    KvShape { kv_heads: block.kv_heads, head_dim: block.head_dim, page_len: PAGE_LEN }
}

/// Bytes of keys and values for `positions` positions: whole blocks; `None` if the size overflows.
pub fn kv_bytes(spec: &Spec, ty: KvType, positions: usize) -> Option<usize> {
    let block = spec.blocks.iter().try_fold(0usize, |sum, b| sum.checked_add(page_bytes(ty, shape(b))?))?;
    block.checked_mul(positions.div_ceil(PAGE_LEN))
}

impl BlockPool {
    pub fn new(spec: &Spec, ty: KvType) -> Result<Self> {
        let mut offsets = vec![0];
        for (layer, block) in spec.blocks.iter().enumerate() {
            let bytes = page_bytes(ty, shape(block));
            let end = bytes.and_then(|b| b.checked_next_multiple_of(64)?.checked_add(offsets[layer]));
            offsets.push(end.ok_or_else(|| Error::Argument {
                name: "spec",
                problem: format!("layer {layer}: keys of {:?} have no page size", shape(block)),
            })?);
        }
        Ok(Self { ty, offsets, free: Mutex::new(Vec::new()), used: AtomicUsize::new(0) })
    }

    fn take(self: &Arc<Self>) -> Arc<Block> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = free.unwrap_or_else(|| PageBuf::zeroed(self.offsets.last().copied().unwrap_or(0)));
        self.used.fetch_add(1, Ordering::Relaxed);
        Arc::new(Block { bytes, pool: self.clone() })
    }

    fn give(&self, bytes: PageBuf) {
        let used = self.used.fetch_sub(1, Ordering::Relaxed) - 1;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // A busy moment must not hold memory for ever: every plan of a server has a list of its own.
        if free.len() < used.max(KEPT_FREE) {
            free.push(bytes);
        } else {
            free.truncate(used.max(KEPT_FREE));
        }
    }

    /// Number of blocks that somebody holds.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Number of blocks that wait for a user.
    #[cfg(test)]
    pub fn free(&self) -> usize {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// The keys and values of one session, or those of a fork of it.
pub(super) struct KvCache {
    pool: Arc<BlockPool>,
    blocks: Vec<Arc<Block>>,
}

impl KvCache {
    pub fn new(pool: Arc<BlockPool>) -> Self {
        Self { pool, blocks: Vec::new() }
    }

    /// Makes room for `len` positions.
    pub fn grow(&mut self, len: usize) {
        while self.blocks.len() < len.div_ceil(PAGE_LEN) {
            self.blocks.push(self.pool.take());
        }
    }

    /// Lets go of the blocks behind position `len`.
    pub fn truncate(&mut self, len: usize) {
        self.blocks.truncate(len.div_ceil(PAGE_LEN));
    }

    /// Another continuation of the first `len` positions.
    pub fn fork(&self, len: usize) -> Self {
        Self { pool: self.pool.clone(), blocks: self.blocks[..len.div_ceil(PAGE_LEN)].to_vec() }
    }

    /// The blocks of the first `len` positions that are full.
    pub fn whole(&self, len: usize) -> Vec<KvBlock> {
        self.blocks[..len / PAGE_LEN].iter().cloned().map(KvBlock).collect()
    }

    /// Goes on behind `blocks`; whether they are of this cache's pool.
    pub fn begin_with(&mut self, blocks: &[KvBlock]) -> bool {
        let ours = blocks.iter().all(|b| Arc::ptr_eq(&b.0.pool, &self.pool));
        if ours {
            self.blocks = blocks.iter().map(|b| b.0.clone()).collect();
        }
        ours
    }

    /// The bytes of a block for writing: a copy of it if others hold it too.
    fn own<'a>(pool: &Arc<BlockPool>, block: &'a mut Arc<Block>) -> &'a mut [u8] {
        if Arc::get_mut(block).is_none() {
            let mut copy = pool.take();
            let bytes = &mut Arc::get_mut(&mut copy).expect("nobody else has seen it yet").bytes;
            bytes.copy_from_slice(&block.bytes);
            *block = copy;
        }
        &mut Arc::get_mut(block).expect("it was the only one, or is now").bytes
    }

    /// Stores keys and values (`kv_heads * head_dim` numbers per position) of positions from `start` on; blocks are
    /// shared among the threads.
    pub fn write(&mut self, pool: &Pool, layer: usize, block: &BlockSpec, start: usize, k: &[f32], v: &[f32]) {
        let width = block.kv_heads * block.head_dim;
        let (range, ty) = (self.page(layer, block), self.pool.ty);
        let (n, mut done, mut parts) = (k.len() / width, 0, Vec::new());
        for shared in &mut self.blocks[start / PAGE_LEN..] {
            let slot = (start + done) % PAGE_LEN;
            let rows = done..n.min(done + PAGE_LEN - slot);
            if rows.is_empty() {
                break;
            }
            done = rows.end;
            parts.push(Mutex::new((&mut Self::own(&self.pool, shared)[range.clone()], slot, rows)));
        }
        // Each part is taken by one chunk, so the lock is never waited for.
        pool.run(parts.len(), &|_, chunk| {
            let mut part = parts[chunk].lock().unwrap_or_else(PoisonError::into_inner);
            let (page, slot, rows) = &mut *part;
            for (i, row) in rows.clone().enumerate() {
                let at = row * width..(row + 1) * width;
                write(ty, shape(block), page, *slot + i, &k[at.clone()], &v[at]);
            }
        });
    }

    fn page(&self, layer: usize, block: &BlockSpec) -> Range<usize> {
        let start = self.pool.offsets[layer];
        let bytes = page_bytes(self.pool.ty, shape(block)).expect("checked when the pool was made");
        start..start + bytes
    }

    /// Calls `f` with the pages of `layer`.
    pub fn read<R>(&self, layer: usize, block: &BlockSpec, f: impl FnOnce(&Cache<'_>) -> R) -> R {
        let range = self.page(layer, block);
        let pages: Vec<&[u8]> = self.blocks.iter().map(|b| &b.bytes[range.clone()]).collect();
        f(&Cache { ty: self.pool.ty, page_len: PAGE_LEN, pages: &pages })
    }
}

/// Where one row of a pass lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its position.
    pub position: usize,
    /// The caches that get its keys and values; its query sees the first.
    pub caches: Range<usize>,
}

/// Where the rows of a pass lie: in one context behind one another, in several contexts, or on the paths of a tree.
pub(super) struct Places<'a> {
    caches: Vec<&'a mut KvCache>,
    rows: Vec<Place>,
}

impl<'a> Places<'a> {
    /// `n` rows from position `start` on.
    pub fn following(kv: &'a mut KvCache, start: usize, n: usize) -> Self {
        Self { caches: vec![kv], rows: (start..start + n).map(|position| Place { position, caches: 0..1 }).collect() }
    }

    /// Rows anywhere: of several contexts, or of a context and its forks.
    pub fn new(caches: Vec<&'a mut KvCache>, rows: Vec<Place>) -> Self {
        Self { caches, rows }
    }

    /// Position of a row.
    pub fn position(&self, row: usize) -> usize {
        self.rows[row].position
    }

    /// Makes room for all rows.
    pub fn grow(&mut self) {
        for place in &self.rows {
            for cache in &mut self.caches[place.caches.clone()] {
                cache.grow(place.position + 1);
            }
        }
    }

    /// Stores keys and values (`kv_heads * head_dim` numbers per row).
    pub fn write(&mut self, pool: &Pool, layer: usize, block: &BlockSpec, k: &[f32], v: &[f32]) {
        let width = block.kv_heads * block.head_dim;
        if let [kv] = &mut self.caches[..]
            && self.rows.windows(2).all(|w| w[0].position + 1 == w[1].position)
        {
            return kv.write(pool, layer, block, self.rows[0].position, k, v);
        }
        for (place, (k, v)) in self.rows.iter().zip(k.chunks_exact(width).zip(v.chunks_exact(width))) {
            for cache in &mut self.caches[place.caches.clone()] {
                cache.write(pool, layer, block, place.position, k, v);
            }
        }
    }

    /// Calls `f` with the pages of `layer` that `row` sees.
    pub fn read<R>(&self, row: usize, layer: usize, block: &BlockSpec, f: impl FnOnce(&Cache<'_>) -> R) -> R {
        self.caches[self.rows[row].caches.start].read(layer, block, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::{Act, MlpSpec, NormKind, Position};

    fn spec() -> Spec {
        let block = BlockSpec {
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            latent: None,
            scale: 1.0,
            window: None,
            score_cap: None,
            rope: None,
            parallel: false,
            mlp: MlpSpec::Plain { inner: 8 },
            act: Act::Relu,
            up_act: None,
            residual_scale: 1.0,
            per_layer: None,
        };
        Spec {
            arch: "test".into(),
            vocab: 4,
            width: 16,
            context: 1000,
            embed_scale: 1.0,
            position: Position::Rotary,
            ropes: Vec::new(),
            norm: NormKind::Rms,
            norm_eps: 1e-5,
            logit_scale: 1.0,
            norm_width: None,
            logit_cap: None,
            predictor_threshold: 0.0,
            blocks: vec![block.clone(), BlockSpec { kv_heads: 2, ..block }],
        }
    }

    #[test]
    fn blocks_are_made_as_needed_and_come_back() {
        let pool = Arc::new(BlockPool::new(&spec(), KvType::F16).expect("a valid shape"));
        let mut kv = KvCache::new(pool.clone());
        kv.grow(1);
        assert_eq!(kv.blocks.len(), 1);
        kv.grow(PAGE_LEN + 1);
        kv.truncate(PAGE_LEN);
        assert_eq!((kv.blocks.len(), pool.free()), (1, 1));
        kv.grow(3 * PAGE_LEN);
        assert_eq!((kv.blocks.len(), pool.free()), (3, 0), "the free one is used first");
        drop(kv);
        assert_eq!(pool.free(), 3);
        assert_eq!(kv_bytes(&spec(), KvType::F16, PAGE_LEN + 1), Some(2 * pool.offsets[2]));
    }

    #[test]
    fn free_blocks_are_at_most_as_many_as_used_ones_or_a_few() {
        let pool = Arc::new(BlockPool::new(&spec(), KvType::F16).expect("a valid shape"));
        let session = |blocks: usize| {
            let mut kv = KvCache::new(pool.clone());
            kv.grow(blocks * PAGE_LEN);
            kv
        };
        let (long, short) = (session(100), session(30));
        drop(long);
        assert_eq!((pool.used(), pool.free()), (30, 30));
        drop(short);
        assert_eq!((pool.used(), pool.free()), (0, KEPT_FREE));
        drop(session(3));
        assert_eq!((pool.used(), pool.free()), (0, KEPT_FREE), "and they are used again");
    }

    #[test]
    fn forks_share_whole_blocks_and_copy_the_partial_one() {
        let (spec, threads) = (spec(), Pool::new(1));
        let block = &spec.blocks[1];
        let pool = Arc::new(BlockPool::new(&spec, KvType::F32).expect("a valid shape"));
        let row = |v: usize| vec![v as f32; 16];
        let fill = |kv: &mut KvCache, from: usize, to: usize, add: usize| {
            for at in from..to {
                kv.grow(at + 1);
                kv.write(&threads, 1, block, at, &row(at + add), &row(at + add));
            }
        };
        let pages = |kv: &KvCache| kv.read(1, block, |c| c.pages.iter().map(|p| p.to_vec()).collect::<Vec<_>>());
        for len in [PAGE_LEN + 10, 2 * PAGE_LEN, 5] {
            let (mut trunk, mut want) = (KvCache::new(pool.clone()), KvCache::new(pool.clone()));
            fill(&mut trunk, 0, len, 0);
            fill(&mut want, 0, len, 0);
            let mut fork = trunk.fork(len);
            fill(&mut trunk, len, len + 3, 1000);
            fill(&mut fork, len, len + 3, 0);
            fill(&mut want, len, len + 3, 0);
            // The block that the fork writes to is its own: a copy of the partial one, or a new one.
            assert_eq!(pool.used(), trunk.blocks.len() + want.blocks.len() + 1, "{len}");
            let seen = pages(&fork);
            trunk = fork;
            // Slots behind the end hold whatever a block held before; all that is compared was written.
            let slots = |pages: &[Vec<u8>]| {
                let mut all = Vec::new();
                for at in 0..len + 3 {
                    let (mut k, mut v) = (row(0), row(0));
                    let page = &pages[at / PAGE_LEN];
                    lacuna_kernels::attention::read(KvType::F32, shape(block), page, at % PAGE_LEN, &mut k, &mut v);
                    all.extend(k.into_iter().chain(v));
                }
                all
            };
            let want = slots(&pages(&want));
            assert!(slots(&seen) == want && slots(&pages(&trunk)) == want, "{len}");
        }
    }

    #[test]
    fn rows_land_in_their_slots_across_blocks() {
        let (spec, threads) = (spec(), Pool::new(2));
        let block = &spec.blocks[1];
        let write_all = |chunks: &[usize]| {
            let pool = Arc::new(BlockPool::new(&spec, KvType::F32).expect("a valid shape"));
            let mut kv = KvCache::new(pool);
            let mut at = 0;
            for &n in chunks {
                kv.grow(at + n);
                let rows: Vec<f32> = (at * 16..(at + n) * 16).map(|v| v as f32).collect();
                kv.write(&threads, 1, block, at, &rows, &rows);
                at += n;
            }
            kv.read(1, block, |cache| cache.pages.iter().map(|p| p.to_vec()).collect::<Vec<_>>())
        };
        let whole = write_all(&[150]);
        assert_eq!(whole.len(), 3);
        for chunks in [&[1; 150][..], &[60, 10, 80], &[64, 64, 22], &[149, 1]] {
            assert!(write_all(chunks) == whole, "{chunks:?}");
        }
    }
}
