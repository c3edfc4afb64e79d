//! Where logits come from: a session of the engine, or the reference in tests.

use super::windows::Window;
use crate::{
    engine::{Engine, Session},
    error::{Error, Result},
};

/// Logits of one source that are held at once, in numbers: 64 MiB.
const HELD: usize = 1 << 24;

/// Positions scored between two exchanges of the sources.
fn block(vocab: usize) -> usize {
    (HELD / vocab.max(1)).clamp(8, 512)
}

/// A model that is fed one sequence at a time.
pub trait LogitSource {
    /// Numbers in one row of logits.
    fn vocab(&self) -> usize;

    /// Longest sequence.
    fn context(&self) -> usize;

    /// Forgets the sequence.
    fn reset(&mut self) -> Result<()>;

    /// Appends `tokens` whose logits nobody reads.
    fn skip(&mut self, tokens: &[u32]) -> Result<()>;

    /// Appends `tokens` and fills `logits` with one row for each.
    fn feed(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<()>;
}

/// How an engine is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Dense, in chunks.
    Dense,
    /// Under the engine's plan, in chunks: every token through its own selection and dense products.
    Masked,
    /// Under the engine's plan, token by token, as in use.
    Steps,
}

impl Scoring {
    /// For reports.
    pub fn describe(self) -> &'static str {
        match self {
            Scoring::Dense => "dense, in chunks",
            Scoring::Masked => "masked, in chunks; the first 1 % of each window dense",
            Scoring::Steps => "step by step; the first 1 % of each window dense",
        }
    }
}

/// Tokens at the start of a window that run dense under a plan: 1 %, at least one (WINA's reference code does the same;
/// in use the whole prompt is dense).
fn dense_prefix(window: usize) -> usize {
    window.div_ceil(100).max(1)
}

/// An engine as a source. Dense engines score in chunks; what a plan costs shows in masked chunks or in steps, because
/// prefill is dense and would hide the plan.
pub struct EngineSource {
    session: Session,
    vocab: usize,
    scoring: Scoring,
    /// Length of the windows that are fed, at most.
    window: usize,
}

impl EngineSource {
    /// A session for windows of at most `context` tokens (0: as long as the model's context).
    ///
    /// # Errors
    /// A context longer than the model's.
    pub fn new(engine: &Engine, context: usize, scoring: Scoring) -> Result<Self> {
        let session = engine.session(context)?;
        let window = session.context();
        Ok(Self { session, vocab: engine.model().spec.vocab, scoring, window })
    }

    /// The session, for its counters.
    pub fn session(&self) -> &Session {
        &self.session
    }
}

impl LogitSource for EngineSource {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn context(&self) -> usize {
        self.session.context()
    }

    fn reset(&mut self) -> Result<()> {
        self.session.truncate(0);
        Ok(())
    }

    fn skip(&mut self, tokens: &[u32]) -> Result<()> {
        self.session.prefill(tokens).map(|_| ())
    }

    fn feed(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<()> {
        logits.clear();
        let dense = match self.scoring {
            Scoring::Dense => tokens.len(),
            _ => dense_prefix(self.window).saturating_sub(self.session.len()).min(tokens.len()),
        };
        let (dense, sparse) = tokens.split_at(dense);
        if !dense.is_empty() {
            self.session.score(dense, &mut |_, row| logits.extend_from_slice(row))?;
        }
        if sparse.is_empty() {
            return Ok(());
        }
        if self.scoring == Scoring::Masked {
            return self.session.score_masked(sparse, &mut |_, row| logits.extend_from_slice(row));
        }
        for token in sparse {
            logits.extend_from_slice(self.session.decode(*token)?);
        }
        Ok(())
    }
}

/// A scored row: the logits before a token, and that token.
pub(super) struct Scored<'a> {
    pub logits: &'a [f32],
    pub next: u32,
}

/// Runs `window` through all `sources` in lockstep; `sink` gets, per scored position, one row of each source.
pub(super) fn run<const N: usize>(
    mut sources: [&mut dyn LogitSource; N],
    window: &Window,
    sink: &mut dyn FnMut([Scored<'_>; N]) -> Result<()>,
) -> Result<()> {
    for s in &mut sources {
        check(*s, window)?;
        s.reset()?;
        if window.first > 0 {
            s.skip(&window.tokens[..window.first])?;
        }
    }
    let mut rows: [Vec<f32>; N] = std::array::from_fn(|_| Vec::new());
    let end = window.tokens.len().saturating_sub(1);
    let block = sources.first().map_or(1, |s| block(s.vocab()));
    for start in (window.first..end).step_by(block) {
        let stop = (start + block).min(end);
        for (s, r) in sources.iter_mut().zip(&mut rows) {
            s.feed(&window.tokens[start..stop], r)?;
        }
        for i in start..stop {
            let row = |n: usize| {
                let vocab = sources[n].vocab();
                Scored { logits: &rows[n][(i - start) * vocab..][..vocab], next: window.tokens[i + 1] }
            };
            sink(std::array::from_fn(row))?;
        }
    }
    Ok(())
}

fn check(source: &dyn LogitSource, window: &Window) -> Result<()> {
    if window.tokens.len() > source.context() {
        return Err(Error::Context { tokens: window.tokens.len(), context: source.context() });
    }
    match window.tokens.iter().find(|t| **t as usize >= source.vocab()) {
        None => Ok(()),
        Some(t) => {
            let problem =
                format!("token {t} is outside the vocabulary of {}; is this the model's tokenizer?", source.vocab());
            Err(Error::Argument { name: "text", problem })
        }
    }
}

/// Log-softmax of one row, as llama.cpp computes it: the sum in double precision.
pub struct LogSoftmax {
    max: f32,
    log_sum: f64,
}

impl LogSoftmax {
    /// The sum over `logits`.
    ///
    /// # Errors
    /// A logit that is not finite.
    pub fn new(logits: &[f32]) -> Result<Self> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|l| f64::from((l - max).exp())).sum();
        if !(max.is_finite() && sum.is_finite()) {
            let problem =
                "the model gave logits that are not finite; the weights are damaged or a number overflowed".into();
            return Err(Error::Argument { name: "model", problem });
        }
        Ok(Self { max, log_sum: sum.ln() })
    }

    /// Natural logarithm of the probability behind `logit`.
    pub fn of(&self, logit: f32) -> f64 {
        f64::from(logit - self.max) - self.log_sum
    }
}

/// Mean and its standard error, from a sum and a sum of squares.
pub(super) fn mean_and_error(sum: f64, squares: f64, count: usize) -> (f64, f64) {
    if count < 2 {
        return (if count == 1 { sum } else { f64::NAN }, f64::NAN);
    }
    let n = count as f64;
    let mean = sum / n;
    (mean, ((squares / n - mean * mean).max(0.0) / (n - 1.0)).sqrt())
}
