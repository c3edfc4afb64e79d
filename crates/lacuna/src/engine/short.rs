//! Prompts with a short end: a few tokens cost less as rows of a decode pass than as a matrix product, which unpacks all
//! weights for them.

use super::{
    compiled::Counters,
    forward::{Mode, Nobody},
    kv::KV_BLOCK,
    session::Session,
};
use crate::error::Result;

/// Most tokens of a short end. On a model of 1B parameters (two threads, AVX-512 with AMX) the matrix product of 1 to 8
/// tokens takes the time of 2 to 3 decode steps in bf16 and of 5 to 6 in Q4_0; a decode pass of 4 rows takes 1.7 and 2.4,
/// one of 8 rows as much as the product.
const SHORT: usize = 4;
/// Tokens before a short end, if there are any: a pass of its own costs a shorter prompt, of which nothing is kept, too much.
const LONG: usize = 8 * KV_BLOCK;

/// How many tokens of a prompt of `len` go through matrix products; the others are rows of a decode pass. Products of the two
/// kinds differ in their last bits, so nothing but the length decides: a text does not depend on what was kept of its
/// prompt. A short end never fills a block, so all blocks that can be kept come from matrix products.
fn matrix_part(len: usize) -> usize {
    let start = len.saturating_sub(1) / KV_BLOCK * KV_BLOCK;
    if len - start <= SHORT && (start == 0 || start >= LONG) { start } else { len }
}

impl Session {
    /// How many tokens of a prompt of `len` tokens [`Session::prompt`] computes as [`Session::prefill`] does. Whoever
    /// appends a prompt in parts must end one there.
    pub fn matrix_part(&self, len: usize) -> usize {
        // A rule that follows the prompt sees it in matrix products only.
        let follows = self.shared.plan.as_deref().is_some_and(super::batch::follows_prompts);
        if follows { len } else { matrix_part(len) }
    }

    /// [`Session::prefill`] of a prompt that ends with `tokens`: the same but for the last bits, and faster where the
    /// prompt, or what stands behind its last whole block, has very few tokens. The context as it then is counts as the
    /// prompt.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn prompt(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.check(tokens, tokens.len())?;
        let whole = self.len + tokens.len();
        let (first, rows) = tokens.split_at(self.matrix_part(whole).max(self.len) - self.len);
        if rows.is_empty() {
            return self.prefill(tokens);
        }
        if !first.is_empty() {
            self.observe(first, &mut Nobody)?;
        }
        self.check_cancelled()?;
        self.settle();
        // As in prefill, what is read for a prompt is not counted.
        let unseen = Counters::new(self.shared.model.blocks.len());
        let counters = std::mem::replace(&mut self.counters, unseen);
        self.forward(rows, Mode::Dense, &mut Nobody);
        self.counters = counters;
        self.last_logits(rows.len() - 1, &mut Nobody)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_length_decides() {
        let short = |len| (len - matrix_part(len), matrix_part(len));
        assert_eq!([1, 4, 5, 64, 65, 68].map(short), [(1, 0), (4, 0), (0, 5), (0, 64), (0, 65), (0, 68)]);
        assert_eq!([512, 513, 516, 517, 576, 577].map(short).map(|s| s.0), [0, 1, 4, 0, 0, 1]);
        assert_eq!(matrix_part(0), 0);
        // No block is ever filled by rows of a decode pass.
        assert!((1..3000).all(|len| len / KV_BLOCK * KV_BLOCK <= matrix_part(len) || len < KV_BLOCK));
    }
}
