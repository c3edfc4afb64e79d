//! The key/value cache: positions in blocks of [`PAGE_LEN`], each block one buffer that holds the page of every layer.
//! Blocks come from a free list that the sessions of an engine share, and are made when a context grows into them.

use crate::{
    error::{Error, Result},
    model::spec::{BlockSpec, Spec},
};
use lacuna_kernels::{
    Pool,
    attention::{Cache, KvShape, KvType, PAGE_LEN, PageBuf, page_bytes, write},
};
use std::sync::{Arc, Mutex, PoisonError};

/// Where the page of each layer lies in a block, and the blocks that no session uses.
pub(super) struct BlockPool {
    ty: KvType,
    /// Start of each layer's page, then the length of a block.
    offsets: Vec<usize>,
    free: Mutex<Vec<PageBuf>>,
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
        Ok(Self { ty, offsets, free: Mutex::new(Vec::new()) })
    }

    fn take(&self) -> PageBuf {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| PageBuf::zeroed(self.offsets.last().copied().unwrap_or(0)))
    }

    fn give(&self, blocks: impl Iterator<Item = PageBuf>) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).extend(blocks);
    }

    /// Number of blocks that wait for a user.
    #[cfg(test)]
    pub fn free(&self) -> usize {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// The keys and values of one session.
pub(super) struct KvCache {
    pool: Arc<BlockPool>,
    blocks: Vec<PageBuf>,
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

    /// Gives back the blocks behind position `len`.
    pub fn truncate(&mut self, len: usize) {
        let keep = len.div_ceil(PAGE_LEN).min(self.blocks.len());
        self.pool.give(self.blocks.drain(keep..));
    }

    /// Stores keys and values (`kv_heads * head_dim` numbers per position) of positions from `start` on; blocks are
    /// shared among the threads.
    pub fn write(&mut self, pool: &Pool, layer: usize, block: &BlockSpec, start: usize, k: &[f32], v: &[f32]) {
        let width = block.kv_heads * block.head_dim;
        let (range, ty) = (self.page(layer, block), self.pool.ty);
        let (n, mut done, mut parts) = (k.len() / width, 0, Vec::new());
        for buffer in &mut self.blocks[start / PAGE_LEN..] {
            let slot = (start + done) % PAGE_LEN;
            let rows = done..n.min(done + PAGE_LEN - slot);
            done = rows.end;
            parts.push(Mutex::new((&mut buffer[range.clone()], slot, rows)));
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

    fn page(&self, layer: usize, block: &BlockSpec) -> std::ops::Range<usize> {
        let start = self.pool.offsets[layer];
        let bytes = page_bytes(self.pool.ty, shape(block)).expect("checked when the pool was made");
        start..start + bytes
    }

    /// Calls `f` with the pages of `layer`.
    pub fn read<R>(&self, layer: usize, block: &BlockSpec, f: impl FnOnce(&Cache<'_>) -> R) -> R {
        let range = self.page(layer, block);
        let pages: Vec<&[u8]> = self.blocks.iter().map(|b| &b[range.clone()]).collect();
        f(&Cache { ty: self.pool.ty, page_len: PAGE_LEN, pages: &pages })
    }
}

impl Drop for KvCache {
    fn drop(&mut self) {
        self.truncate(0);
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
            scale: 1.0,
            window: None,
            score_cap: None,
            rope: None,
            parallel: false,
            mlp: MlpSpec::Plain { inner: 8 },
            act: Act::Relu,
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
            logit_cap: None,
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
