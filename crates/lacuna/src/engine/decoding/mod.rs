//! Decoding by guessing: a draft proposes tokens, one pass checks them all, a rule accepts a beginning of them.
//!
//! Token Recycling (Luo et al., 2024), self-speculation with a sparse plan and Sirius (Zhou et al., 2024) are three
//! choices of one loop. With [`Rule::Exact`] the text is that of plain decoding, token for token, also with a seed and a
//! temperature: the sampler sees the same logits (see [`Session::verify`]) in the same order, once per token.

mod cost;
mod recycling;
mod sparse;

pub use recycling::{Recycling, RecyclingOptions};
pub use sparse::SparseSteps;

use super::{
    sampler::Sampler,
    session::Session,
    tree::{MAX_TREE, TokenTree},
};
use crate::error::{Error, Result};
use lacuna_core::plan;
use std::time::{Duration, Instant};

/// Where guesses come from.
pub trait Draft: Send {
    /// A tree whose only root is `last`, the token that follows the context, of at most `ask.most` tokens and at most
    /// `ask.deep` on a path. The context is left as it was.
    ///
    /// # Errors
    /// As [`Session::decode`].
    fn draft(&mut self, session: &mut Session, last: u32, ask: &Ask<'_>) -> Result<TokenTree>;

    /// The tree was checked: [`Session::node_logits`] has its logits; draft and check took `spent`.
    fn checked(&mut self, session: &Session, tree: &TokenTree, spent: Duration) {
        let _ = (session, tree, spent);
    }

    /// `id` is what came behind node `node`, which was accepted.
    fn followed(&mut self, node: usize, id: u32) {
        let _ = (node, id);
    }
}

/// What is asked of a draft.
pub struct Ask<'a> {
    /// Most tokens in the tree, the root included; at least 1.
    pub most: usize,
    /// Most tokens on a path; at least 1.
    pub deep: usize,
    /// The sampler as it is before the token behind `last` is chosen.
    pub sampler: &'a Sampler,
    /// Tokens that end a text: nothing is worth guessing behind them.
    pub ends: &'a dyn Fn(u32) -> bool,
}

/// Which guesses are accepted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Those that the sampler chooses from the checked logits: nothing is lost.
    Exact,
    /// Sirius: those whose checked probability (at the temperature 0.6 of its published code) is at least this; the
    /// text is then a compromise between the sparse model and the dense one.
    Threshold(f32),
}

/// Temperature of the probabilities that [`Rule::Threshold`] compares (Infini-AI-Lab/Sirius, `llama12.py`).
const THRESHOLD_TEMPERATURE: f64 = 0.6;

/// Counts of a [`Decoder`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecodingStats {
    /// Checking passes.
    pub passes: u64,
    /// Tokens in their trees, the known first token of each not counted.
    pub guessed: u64,
    /// Guesses that were accepted.
    pub accepted: u64,
    /// Bytes of weights that drafting read.
    pub draft_bytes: u64,
    /// Bytes of weights that checking read.
    pub check_bytes: u64,
    /// Time spent drafting.
    pub draft_time: Duration,
    /// Time spent checking.
    pub check_time: Duration,
}

impl DecodingStats {
    /// Tokens that a pass brings on average: the accepted guesses and the one that follows them. 1 is plain decoding.
    pub fn accepted_length(&self) -> f64 {
        if self.passes == 0 { 1.0 } else { 1.0 + self.accepted as f64 / self.passes as f64 }
    }

    /// Bytes of weights read per token, relative to one checking pass: `((n - 1) d + 1) / accepted length` for sparse
    /// steps of density `d` (Sirius).
    pub fn effective_density(&self) -> f64 {
        if self.check_bytes == 0 {
            return 1.0;
        }
        (self.draft_bytes + self.check_bytes) as f64 / self.check_bytes as f64 / self.accepted_length()
    }
}

/// Chooses one token after the other, for one conversation at a time.
pub struct Decoder {
    draft: Option<Box<dyn Draft>>,
    dense: bool,
    rule: Rule,
    most: usize,
    tree: TokenTree,
    /// The node of `tree` that the context ends with.
    at: Option<usize>,
    stats: DecodingStats,
}

impl Decoder {
    /// One pass per token.
    pub fn plain() -> Self {
        let tree = TokenTree::default();
        Self { draft: None, dense: false, rule: Rule::Exact, most: 1, tree, at: None, stats: DecodingStats::default() }
    }

    /// Guesses from earlier candidates, checked as the session decodes (by its plan where it has one).
    ///
    /// # Errors
    /// Options out of their range.
    pub fn token_recycling(options: RecyclingOptions) -> Result<Self> {
        let most = checked_most(options.most)?;
        Ok(Self { draft: Some(Box::new(Recycling::new(options))), most, ..Self::plain() })
    }

    /// Blocks of up to `n` tokens written by the session's plan and checked by a dense pass under `rule`.
    ///
    /// # Errors
    /// `n` or a threshold out of its range.
    pub fn sparse_steps(n: usize, rule: Rule) -> Result<Self> {
        if let Rule::Threshold(p) = rule
            && !(0.0..=1.0).contains(&p)
        {
            return Err(Error::Argument { name: "threshold", problem: format!("{p} is not within 0 to 1") });
        }
        let most = checked_most(n)?;
        Ok(Self { draft: Some(Box::new(SparseSteps)), dense: true, rule, most, ..Self::plain() })
    }

    /// The loop that a plan describes.
    ///
    /// # Errors
    /// Numbers out of their range.
    pub fn of(plan: &plan::Decoding) -> Result<Self> {
        let rule = match plan.accept {
            plan::Accept::Exact => Rule::Exact,
            plan::Accept::Threshold { probability } => Rule::Threshold(probability),
        };
        match plan.draft {
            plan::DraftSource::Plan => Self::sparse_steps(plan.most, rule),
            plan::DraftSource::TokenRecycling => {
                Self::token_recycling(RecyclingOptions { most: plan.most, ..RecyclingOptions::default() })
            }
        }
    }

    /// Guesses from `draft`, checked with or without the plan under `rule`, in trees of at most `most` tokens.
    ///
    /// # Errors
    /// `most` out of its range.
    pub fn new(draft: Box<dyn Draft>, dense: bool, rule: Rule, most: usize) -> Result<Self> {
        let most = checked_most(most)?;
        Ok(Self { draft: Some(draft), dense, rule, most, ..Self::plain() })
    }

    /// What happened so far.
    pub fn stats(&self) -> &DecodingStats {
        &self.stats
    }

    /// Sets the counts back; what a draft has learned stays.
    pub fn reset_stats(&mut self) {
        self.stats = DecodingStats::default();
    }

    /// Forgets the guesses that are under way: call it before another context is continued.
    pub fn begin(&mut self) {
        self.at = None;
    }

    /// Appends `last` to the context and chooses the token behind it.
    ///
    /// # Errors
    /// As [`Session::decode`].
    pub fn next(
        &mut self,
        session: &mut Session,
        last: u32,
        sampler: &mut Sampler,
        ends: &dyn Fn(u32) -> bool,
    ) -> Result<u32> {
        self.advance(session, last, sampler, ends)?;
        let chosen = sampler.sample(session.logits());
        let id = match (self.rule, self.guess()) {
            (Rule::Threshold(least), Some(guess)) if probability(session.logits(), guess) >= f64::from(least) => guess,
            _ => chosen,
        };
        sampler.accept(id);
        if let (Some(draft), Some(at)) = (&mut self.draft, self.at) {
            draft.followed(at, id);
        }
        Ok(id)
    }

    /// The first guess behind the context.
    fn guess(&self) -> Option<u32> {
        self.tree.first_child(Some(self.at?)).map(|i| self.tree.tokens()[i])
    }

    /// Makes `last` the end of the context: by a guess that was right, or by a new pass.
    fn advance(
        &mut self,
        session: &mut Session,
        last: u32,
        sampler: &Sampler,
        ends: &dyn Fn(u32) -> bool,
    ) -> Result<()> {
        if let Some(child) = self.at.and_then(|at| self.tree.child(Some(at), last)) {
            session.accept(child)?;
            self.at = Some(child);
            self.stats.accepted += 1;
            return Ok(());
        }
        self.at = None;
        let Some(draft) = &mut self.draft else {
            session.decode(last)?;
            return Ok(());
        };
        let room = session.context().saturating_sub(session.len()).max(1);
        let ask = Ask { most: self.most, deep: room, sampler, ends };
        let (begin, before) = (Instant::now(), session.counters().weight_bytes);
        self.tree = draft.draft(session, last, &ask)?;
        let (drafted, middle) = (begin.elapsed(), session.counters().weight_bytes);
        session.verify(&self.tree, self.dense)?;
        let spent = begin.elapsed();
        let stats = &mut self.stats;
        stats.passes += 1;
        stats.guessed += self.tree.len() as u64 - 1;
        stats.draft_bytes += middle - before;
        stats.check_bytes += session.counters().weight_bytes - middle;
        stats.draft_time += drafted;
        stats.check_time += spent - drafted;
        draft.checked(session, &self.tree, spent);
        session.accept(0)?;
        self.at = Some(0);
        Ok(())
    }
}

fn checked_most(most: usize) -> Result<usize> {
    if (1..=MAX_TREE).contains(&most) {
        return Ok(most);
    }
    Err(Error::Argument { name: "draft_max", problem: format!("{most} is not within 1 to {MAX_TREE}") })
}

/// Probability of `id` at [`THRESHOLD_TEMPERATURE`].
fn probability(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |l: f32| (f64::from(l - max) / THRESHOLD_TEMPERATURE).exp();
    let Some(&own) = logits.get(id as usize) else { return 0.0 };
    weight(own) / logits.iter().map(|&l| weight(l)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_at_the_published_temperature() {
        let logits = [0.0, 0.6 * 3f32.ln(), f32::NEG_INFINITY];
        assert!((probability(&logits, 0) - 0.25).abs() < 1e-6 && (probability(&logits, 1) - 0.75).abs() < 1e-6);
        assert_eq!((probability(&logits, 2), probability(&logits, 9)), (0.0, 0.0));
    }

    #[test]
    fn density_follows_the_formula_of_sirius() {
        // n = 16 at density 0.65, 15.22 accepted: 0.706 in the paper's table.
        let stats = DecodingStats {
            passes: 100,
            accepted: 1422,
            draft_bytes: 15 * 65 * 100,
            check_bytes: 100 * 100,
            ..DecodingStats::default()
        };
        assert!((stats.accepted_length() - 15.22).abs() < 1e-9);
        assert!((stats.effective_density() - 0.706).abs() < 5e-4);
    }

    #[test]
    fn ranges() {
        assert!(Decoder::sparse_steps(0, Rule::Exact).is_err() && Decoder::sparse_steps(65, Rule::Exact).is_err());
        assert!(Decoder::sparse_steps(8, Rule::Threshold(1.5)).is_err());
        assert!(Decoder::sparse_steps(8, Rule::Threshold(f32::NAN)).is_err());
        assert!(Decoder::token_recycling(RecyclingOptions { most: 65, ..RecyclingOptions::default() }).is_err());
    }
}
