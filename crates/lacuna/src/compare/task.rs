//! One task with right answers: the choice among endings, or the last word. The context is prefilled (dense, as in use)
//! and the answers are decoded, so that a plan acts where it acts in use.

use super::report::{Measured, TaskFacts, TaskScore};
use crate::{
    engine::{Engine, Session},
    error::Result,
    eval::source::LogSoftmax,
};

/// What makes an answer right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The right choice has the highest log-likelihood per byte (`acc_norm` of lm-evaluation-harness).
    Choice,
    /// Every token of the one answer is the most likely one (LAMBADA).
    Exact,
}

/// A question.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// What is read.
    pub context: Vec<u32>,
    /// The answers: tokens, and bytes of text.
    pub choices: Vec<(Vec<u32>, usize)>,
    /// Index of the right one.
    pub answer: usize,
}

/// Questions under one rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Name and meaning.
    pub facts: TaskFacts,
    /// How answers are judged.
    pub rule: Rule,
    /// The questions.
    pub items: Vec<Item>,
}

/// Which questions `engine` answers rightly. `progress(done, all)` counts questions.
///
/// # Errors
/// As [`Session::prefill`]; logits that are not finite.
pub fn answers(engine: &Engine, task: &Task, mut progress: impl FnMut(usize, usize)) -> Result<Vec<bool>> {
    let length = |i: &Item| i.context.len() + i.choices.iter().map(|c| c.0.len()).max().unwrap_or(0);
    let mut session = engine.session(task.items.iter().map(length).max().unwrap_or(0))?;
    let mut right = Vec::with_capacity(task.items.len());
    for (done, item) in task.items.iter().enumerate() {
        session.truncate(0);
        let first = session.prefill(&item.context)?.to_vec();
        right.push(match task.rule {
            Rule::Choice => choice(&mut session, item, &first)? == item.answer,
            Rule::Exact => exact(&mut session, item, &first)?,
        });
        progress(done + 1, task.items.len());
    }
    Ok(right)
}

/// Index of the choice with the highest log-likelihood per byte, the first on ties.
fn choice(session: &mut Session, item: &Item, first: &[f32]) -> Result<usize> {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, (tokens, bytes)) in item.choices.iter().enumerate() {
        session.truncate(item.context.len());
        let Some(&start) = tokens.first() else { continue };
        let mut sum = LogSoftmax::new(first)?.of(first[start as usize]);
        for pair in tokens.windows(2) {
            let row = session.decode(pair[0])?;
            sum += LogSoftmax::new(row)?.of(row[pair[1] as usize]);
        }
        let score = sum / (*bytes).max(1) as f64;
        if score > best.1 {
            best = (i, score);
        }
    }
    Ok(best.0)
}

/// Whether every token of the right answer is the most likely one, given those before it.
fn exact(session: &mut Session, item: &Item, first: &[f32]) -> Result<bool> {
    let Some((tokens, _)) = item.choices.get(item.answer) else { return Ok(false) };
    let top = crate::engine::sampler::best;
    if tokens.first() != Some(&top(first)) {
        return Ok(false);
    }
    for pair in tokens.windows(2) {
        if top(session.decode(pair[0])?) != pair[1] {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The score of one plan beside the dense model's answers to the same questions.
pub fn score(right: &[bool], dense: &[bool]) -> TaskScore {
    let count = |f: &dyn Fn(bool, bool) -> bool| right.iter().zip(dense).filter(|(r, d)| f(**r, **d)).count();
    let (hits, n) = (right.iter().filter(|r| **r).count(), right.len());
    let share = hits as f64 / n.max(1) as f64;
    TaskScore {
        right: hits,
        items: n,
        accuracy: Measured { value: share, error: (share * (1.0 - share) / n.max(1) as f64).sqrt() },
        gained_lost: [count(&|r, d| r && !d), count(&|r, d| !r && d)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_count_flips() {
        let s = score(&[true, true, false, false], &[true, false, true, true]);
        assert_eq!((s.right, s.items, s.gained_lost), (2, 4, [1, 2]));
        assert_eq!(s.accuracy, Measured { value: 0.5, error: 0.25 });
        assert_eq!(score(&[], &[]).accuracy, Measured::default());
    }
}
