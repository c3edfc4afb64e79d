//! Keys and values of prompts that were computed, by block and by what stands before the block.
//!
//! Only what prefill computed is kept, never what decode steps did: both are right, but they differ in their last bits,
//! and an answer must not depend on who asked before.

use lacuna::engine::{KV_BLOCK, KvBlock};
use std::{
    collections::{BTreeSet, HashMap},
    hash::{BuildHasher, RandomState},
};

/// Blocks of earlier prompts, the least recently used ones dropped first.
pub struct Prefixes {
    kept: HashMap<u64, Kept>,
    /// `(last use, depth from the end, key)`: the first goes first, children before their parents.
    order: BTreeSet<(u64, usize, u64)>,
    hasher: RandomState,
    clock: u64,
    bytes: usize,
    limit: usize,
}

struct Kept {
    parent: u64,
    tokens: Box<[u32]>,
    block: KvBlock,
    place: (u64, usize, u64),
}

impl Prefixes {
    /// Keeps at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        let (kept, order, hasher) = (HashMap::new(), BTreeSet::new(), RandomState::new());
        Self { kept, order, hasher, clock: 0, bytes: 0, limit }
    }

    /// Bytes that are kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The blocks of the beginning of `prompt`; at least one token is left over, for its logits.
    pub fn find(&mut self, plan: usize, prompt: &[u32]) -> Vec<KvBlock> {
        self.clock += 1;
        let whole = prompt.len().saturating_sub(1) / KV_BLOCK;
        let mut blocks = Vec::new();
        let mut parent = plan as u64;
        for (depth, tokens) in prompt.chunks_exact(KV_BLOCK).take(whole).enumerate() {
            let key = self.hasher.hash_one((parent, tokens));
            let Some(kept) = self.kept.get(&key).filter(|k| k.parent == parent && *k.tokens == *tokens) else { break };
            blocks.push(kept.block.clone());
            self.touch(key, depth);
            parent = key;
        }
        blocks
    }

    /// Keeps the blocks of `prompt`.
    pub fn insert(&mut self, plan: usize, prompt: &[u32], blocks: &[KvBlock]) {
        self.clock += 1;
        let mut parent = plan as u64;
        for (depth, (tokens, block)) in prompt.chunks_exact(KV_BLOCK).zip(blocks).enumerate() {
            let key = self.hasher.hash_one((parent, tokens));
            match self.kept.get(&key) {
                Some(kept) if kept.parent == parent && *kept.tokens == *tokens => {}
                // Another content with the same hash stays; what would follow this one could not be found.
                Some(_) => return,
                None if block.bytes() > self.limit => return,
                None => {
                    let place = (self.clock, usize::MAX - depth, key);
                    self.bytes += block.bytes();
                    self.order.insert(place);
                    self.kept.insert(key, Kept { parent, tokens: tokens.into(), block: block.clone(), place });
                }
            }
            self.touch(key, depth);
            parent = key;
        }
        while self.bytes > self.limit {
            let Some((_, _, key)) = self.order.pop_first() else { break };
            if let Some(gone) = self.kept.remove(&key) {
                self.bytes -= gone.block.bytes();
            }
        }
    }

    fn touch(&mut self, key: u64, depth: usize) {
        if let Some(kept) = self.kept.get_mut(&key) {
            self.order.remove(&kept.place);
            kept.place = (self.clock, usize::MAX - depth, key);
            self.order.insert(kept.place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna::{
        embedded,
        engine::{Engine, Options},
        model::{Checkpoint, LoadOptions},
    };
    use std::sync::Arc;

    #[test]
    fn longest_beginnings_are_found_and_the_oldest_ends_go_first() {
        assert!(embedded::exists());
        let model =
            Checkpoint::embedded(&LoadOptions::default()).and_then(Checkpoint::bind).expect("the embedded model");
        let engine = Engine::new(Arc::new(model), Options { threads: 1, ..Options::default() }).expect("valid options");
        let blocks = |prompt: &[u32]| {
            let mut session = engine.session(0).expect("a session");
            session.prefill(prompt).expect("fits");
            session.blocks()
        };
        let a: Vec<u32> = (0..200).collect();
        let b: Vec<u32> = (0..64).chain(1000..1136).collect();
        let made = blocks(&a);
        let mut prefixes = Prefixes::new(4 * made[0].bytes());
        prefixes.insert(0, &a, &made);
        assert_eq!(prefixes.find(0, &a).len(), 3);
        assert_eq!(prefixes.find(0, &a[..192]).len(), 2, "one token is computed");
        assert_eq!(prefixes.find(0, &b).len(), 1);
        assert_eq!(prefixes.find(1, &a).len(), 0, "another plan");
        prefixes.insert(0, &b, &blocks(&b));
        assert_eq!(prefixes.bytes(), 4 * made[0].bytes());
        assert_eq!((prefixes.find(0, &a).len(), prefixes.find(0, &b).len()), (2, 3));
        drop(made);
        assert_eq!(engine.blocks_in_use(), 4);
    }
}
