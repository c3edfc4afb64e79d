//! Guesses at the next tokens, as a tree: each token continues its parent, the roots continue the context.

use crate::error::{Error, Result};
use std::ops::Range;

/// Most tokens that one pass checks.
pub const MAX_TREE: usize = lacuna_core::plan::MAX_CHECKED;

/// Tokens that may follow a context. A path from a root is one continuation; siblings are alternatives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenTree {
    tokens: Vec<u32>,
    parents: Vec<Option<usize>>,
    depths: Vec<usize>,
}

impl TokenTree {
    /// A tree with one root.
    pub fn new(root: u32) -> Self {
        Self { tokens: vec![root], parents: vec![None], depths: vec![0] }
    }

    /// Tokens that follow one another.
    pub fn chain(tokens: &[u32]) -> Self {
        let parents = (0..tokens.len()).map(|i| i.checked_sub(1)).collect();
        Self { tokens: tokens.to_vec(), parents, depths: (0..tokens.len()).collect() }
    }

    /// Adds a token behind `parent` and returns its number.
    ///
    /// # Panics
    /// If there is no such parent.
    pub fn push(&mut self, token: u32, parent: usize) -> usize {
        self.depths.push(self.depths[parent] + 1);
        self.parents.push(Some(parent));
        self.tokens.push(token);
        self.tokens.len() - 1
    }

    /// The tokens, parents before children.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Number of tokens on the longest path.
    pub fn height(&self) -> usize {
        self.depths.iter().max().map_or(0, |d| d + 1)
    }

    /// What node `i` continues.
    pub fn parent(&self, i: usize) -> Option<usize> {
        self.parents.get(i).copied().flatten()
    }

    /// Number of ancestors of node `i`.
    pub fn depth(&self, i: usize) -> usize {
        self.depths[i]
    }

    /// The child of `parent` (`None`: the root) with this token, the first if there are several.
    pub fn child(&self, parent: Option<usize>, token: u32) -> Option<usize> {
        (0..self.len()).find(|&i| self.parents[i] == parent && self.tokens[i] == token)
    }

    /// The first child of `parent` (`None`: the first root).
    pub fn first_child(&self, parent: Option<usize>) -> Option<usize> {
        self.parents.iter().position(|p| *p == parent)
    }

    /// For each node the leaves below it; leaves are numbered so that these are ranges and first children come first.
    pub(super) fn leaves(&self) -> Vec<Range<usize>> {
        let mut count = vec![0; self.len()];
        for i in (0..self.len()).rev() {
            count[i] = count[i].max(1);
            if let Some(p) = self.parents[i] {
                count[p] += count[i];
            }
        }
        let (mut next, mut roots) = (vec![0; self.len()], 0);
        let mut ranges = Vec::with_capacity(self.len());
        for i in 0..self.len() {
            let free = match self.parents[i] {
                Some(p) => &mut next[p],
                None => &mut roots,
            };
            let start = *free;
            *free += count[i];
            next[i] = start;
            ranges.push(start..start + count[i]);
        }
        ranges
    }

    pub(super) fn check(&self) -> Result<()> {
        if (1..=MAX_TREE).contains(&self.len()) {
            return Ok(());
        }
        let problem = format!("{} tokens, allowed are 1 to {MAX_TREE}", self.len());
        Err(Error::Argument { name: "tree", problem })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_are_ranges_below_every_node() {
        let mut t = TokenTree::new(7);
        let a = t.push(1, 0);
        let b = t.push(2, 0);
        let c = t.push(3, a);
        t.push(4, a);
        t.push(5, c);
        t.push(6, b);
        assert_eq!(t.leaves(), [0..3, 0..2, 2..3, 0..1, 1..2, 0..1, 2..3]);
        assert_eq!((t.height(), t.depth(5), t.parent(6)), (4, 3, Some(b)));
        assert_eq!((t.child(Some(a), 4), t.child(Some(b), 4), t.child(None, 7)), (Some(4), None, Some(0)));
        let chain = TokenTree::chain(&[1, 2, 3]);
        assert_eq!(chain.leaves(), [0..1, 0..1, 0..1]);
        assert_eq!((chain.first_child(Some(1)), chain.first_child(Some(2))), (Some(2), None));
        assert!(TokenTree::chain(&[]).check().is_err() && TokenTree::chain(&[0; 65]).check().is_err());
    }
}
