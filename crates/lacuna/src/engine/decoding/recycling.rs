//! Token Recycling (Luo et al., "Turning Trash into Treasure", 2024): every pass gives the most likely successors of
//! every token in it; they are remembered, token by token, and the next tree is filled from them.
//!
//! The published tree is fixed and has 80 nodes, for a GPU on which they cost little. Here the tree grows best first by
//! the measured frequency with which the candidate of each rank turns out right, and stops growing where a further node
//! no longer pays its measured time.

use super::{Ask, Draft, cost::Cost};
use crate::{
    engine::{session::Session, tree::TokenTree},
    error::Result,
};
use std::{cmp::Ordering, collections::BinaryHeap, time::Duration};

/// Candidates that are remembered for each token (the paper's 8).
const CANDIDATES: usize = 8;
/// No candidate yet.
const NONE: u32 = u32::MAX;
/// Frequencies assumed at first, by rank, and the number of tokens that this assumption weighs.
const PRIOR: [f64; CANDIDATES] = [0.4, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01];
const PRIOR_WEIGHT: f64 = 12.0;
/// Weight that older tokens keep with each new one.
const KEEP: f64 = 0.995;

/// How Token Recycling guesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecyclingOptions {
    /// Most tokens in a tree, the known first one included.
    pub most: usize,
    /// Whether the size follows measured times; otherwise every tree is as large as `most` and the candidates allow.
    pub adapt: bool,
}

impl Default for RecyclingOptions {
    fn default() -> Self {
        Self { most: 16, adapt: true }
    }
}

/// Remembered successors of every token; 32 bytes per token that was seen. Keep it for later prompts: it starts warm.
pub struct Recycling {
    options: RecyclingOptions,
    /// Candidates of each token, best first, padded with [`NONE`].
    table: Vec<[u32; CANDIDATES]>,
    /// Candidates of each node of the tree under way, as they were when it was drafted.
    drafted: Vec<[u32; CANDIDATES]>,
    /// How often the candidate of each rank was right, and of how many tokens.
    hits: [f64; CANDIDATES],
    total: f64,
    cost: Cost,
}

/// A node that may join the tree.
struct Candidate {
    p: f64,
    parent: usize,
    rank: usize,
    order: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.p.total_cmp(&other.p).then(other.order.cmp(&self.order))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

impl Recycling {
    /// An empty table.
    pub fn new(options: RecyclingOptions) -> Self {
        let (table, drafted) = (Vec::new(), Vec::new());
        Self { options, table, drafted, hits: [0.0; CANDIDATES], total: 0.0, cost: Cost::default() }
    }

    /// The remembered successors of `token`, best first.
    pub fn candidates(&self, token: u32) -> &[u32] {
        let row = self.table.get(token as usize).map_or(&[][..], |row| &row[..]);
        &row[..row.iter().position(|&c| c == NONE).unwrap_or(row.len())]
    }

    /// Remembers `row` as the successors of `token`, best first; anything may stand there, the checks keep the text right.
    pub fn remember(&mut self, token: u32, row: &[u32]) {
        let at = token as usize;
        if self.table.len() <= at {
            self.table.resize(at + 1, [NONE; CANDIDATES]);
        }
        self.table[at] = [NONE; CANDIDATES];
        self.table[at].iter_mut().zip(row).for_each(|(to, from)| *to = *from);
    }

    /// Chance that the candidate of each rank is right, given that its token is.
    fn rates(&self) -> [f64; CANDIDATES] {
        std::array::from_fn(|r| (self.hits[r] + PRIOR[r] * PRIOR_WEIGHT) / (self.total + PRIOR_WEIGHT))
    }

    /// Puts the children of `node` (rank 0) or its next sibling (rank `rank`) into the race.
    fn race(&self, heap: &mut BinaryHeap<Candidate>, parent: usize, rank: usize, p: f64) {
        if self.drafted[parent].get(rank).is_some_and(|&c| c != NONE) {
            let order = heap.len() + CANDIDATES * parent + rank;
            heap.push(Candidate { p: p * self.rates()[rank], parent, rank, order });
        }
    }

    fn row(&self, token: u32) -> [u32; CANDIDATES] {
        self.table.get(token as usize).copied().unwrap_or([NONE; CANDIDATES])
    }
}

impl Draft for Recycling {
    fn draft(&mut self, session: &mut Session, last: u32, ask: &Ask<'_>) -> Result<TokenTree> {
        let vocab = session.vocab() as u32;
        let mut tree = TokenTree::new(last);
        self.drafted.clear();
        self.drafted.push(self.row(last));
        let mut chance = vec![1.0];
        let mut heap = BinaryHeap::new();
        self.race(&mut heap, 0, 0, 1.0);
        let (mut tokens, further) = (1.0, self.cost.further());
        while tree.len() < ask.most.min(self.options.most) {
            let Some(next) = heap.pop() else { break };
            // The next best node must bring more tokens per time than the tree has without it.
            if self.options.adapt && next.p * (1.0 + further * (tree.len() - 1) as f64) < tokens * further {
                break;
            }
            self.race(&mut heap, next.parent, next.rank + 1, chance[next.parent]);
            let token = self.drafted[next.parent][next.rank];
            if token >= vocab || tree.depth(next.parent) + 1 >= ask.deep {
                continue;
            }
            let node = tree.push(token, next.parent);
            tokens += next.p;
            chance.push(next.p);
            self.drafted.push(if (ask.ends)(token) { [NONE; CANDIDATES] } else { self.row(token) });
            self.race(&mut heap, node, 0, next.p);
        }
        Ok(tree)
    }

    fn checked(&mut self, session: &Session, tree: &TokenTree, spent: Duration) {
        self.cost.add(tree.len(), spent.as_secs_f64());
        // Where a token occurs twice the likelier node, which comes first, has the last word.
        for node in (0..tree.len()).rev() {
            self.remember(tree.tokens()[node], &top(session.node_logits(node)));
        }
    }

    fn followed(&mut self, node: usize, id: u32) {
        self.total = self.total * KEEP + 1.0;
        self.hits.iter_mut().for_each(|h| *h *= KEEP);
        let rank = self.drafted.get(node).and_then(|row| row.iter().position(|&c| c == id));
        if let Some(rank) = rank {
            self.hits[rank] += 1.0;
        }
    }
}

/// The tokens of the largest logits, best first, the lower number on ties.
fn top(logits: &[f32]) -> Vec<u32> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(CANDIDATES + 1);
    let mut least = f32::NEG_INFINITY;
    for (&l, id) in logits.iter().zip(0..) {
        if l > least || best.len() < CANDIDATES {
            let at = best.partition_point(|b| b.0 >= l);
            best.insert(at, (l, id));
            best.truncate(CANDIDATES);
            if let [.., last] = &best[..]
                && best.len() == CANDIDATES
            {
                least = last.0;
            }
        }
    }
    best.into_iter().map(|b| b.1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_logits_in_order() {
        let mut logits: Vec<f32> = (0..100).map(|i| (i * 37 % 100) as f32).collect();
        logits[4] = 99.0;
        let want: Vec<u32> = {
            let mut ids: Vec<u32> = (0..100).collect();
            ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            ids[..CANDIDATES].to_vec()
        };
        assert_eq!(top(&logits), want);
        assert_eq!(top(&[1.0, 3.0, 2.0]), [1, 2, 0], "fewer tokens than candidates");
        assert_eq!(top(&[f32::NEG_INFINITY; 2]), [0, 1]);
    }

    #[test]
    fn rows_are_replaced_and_others_stay() {
        let mut r = Recycling::new(RecyclingOptions::default());
        r.remember(5, &[1, 2, 3]);
        r.remember(2, &[9]);
        r.remember(5, &[7]);
        assert_eq!((r.candidates(5), r.candidates(2), r.candidates(4)), (&[7][..], &[9][..], &[][..]));
        assert!(r.candidates(1000).is_empty());
    }

    #[test]
    fn rates_follow_what_came() {
        let mut r = Recycling::new(RecyclingOptions::default());
        r.drafted = vec![[3, 4, NONE, NONE, NONE, NONE, NONE, NONE]];
        (0..200).for_each(|_| r.followed(0, 4));
        let rates = r.rates();
        assert!(rates[1] > 0.9 && rates[0] < 0.05, "{rates:?}");
        r.followed(7, 4);
        assert!(r.rates()[1] < rates[1], "behind a node without candidates nothing was right");
    }
}
