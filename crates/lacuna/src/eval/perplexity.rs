//! Perplexity with its error, and bits per byte.

use super::{
    source::{LogSoftmax, LogitSource, mean_and_error, run},
    windows::Window,
};
use crate::{error::Result, tokenizer::Pieces};

/// The negative log-likelihood of a text, accumulated.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
    /// Scored predictions.
    pub count: usize,
    /// Sum of `-ln p`.
    pub nll: f64,
    /// Sum of `(ln p)^2`.
    pub nll_squares: f64,
    /// Bytes of text behind the scored tokens; 0 without a tokenizer.
    pub bytes: usize,
}

impl Perplexity {
    /// `exp(mean nll)` and its error `ppl * sd / sqrt(n - 1)`, as llama.cpp prints them.
    pub fn ppl(&self) -> (f64, f64) {
        let (mean, error) = mean_and_error(self.nll, self.nll_squares, self.count);
        (mean.exp(), error * mean.exp())
    }

    /// Mean negative log-likelihood in bits per byte of text; comparable between vocabularies. `None` without bytes.
    pub fn bits_per_byte(&self) -> Option<f64> {
        (self.bytes > 0).then(|| self.nll / std::f64::consts::LN_2 / self.bytes as f64)
    }

    /// Adds one prediction of probability `exp(ln_p)`.
    pub(super) fn add(&mut self, ln_p: f64) {
        self.count += 1;
        self.nll -= ln_p;
        self.nll_squares += ln_p * ln_p;
    }
}

/// Where a measurement is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a, T> {
    /// Windows done.
    pub done: usize,
    /// All windows.
    pub total: usize,
    /// The measure over the windows done.
    pub so_far: &'a T,
}

/// Scores `windows`; `pieces` turns tokens into bytes for [`Perplexity::bits_per_byte`]. `progress` is called after
/// each window.
///
/// # Errors
/// A window longer than the context, a token outside the vocabulary, logits that are not finite.
pub fn perplexity(
    source: &mut dyn LogitSource,
    windows: &[Window],
    pieces: Option<&Pieces>,
    mut progress: impl FnMut(Progress<'_, Perplexity>),
) -> Result<Perplexity> {
    let mut sum = Perplexity::default();
    for (i, window) in windows.iter().enumerate() {
        run([&mut *source], window, &mut |[row]| {
            sum.add(LogSoftmax::new(row.logits)?.of(row.logits[row.next as usize]));
            Ok(())
        })?;
        sum.bytes += pieces.map_or(0, |p| scored_bytes(window, p));
        progress(Progress { done: i + 1, total: windows.len(), so_far: &sum });
    }
    Ok(sum)
}

/// Bytes of text behind the scored tokens of a window.
pub(super) fn scored_bytes(window: &Window, pieces: &Pieces) -> usize {
    let scored = window.tokens.get(window.first + 1..).unwrap_or(&[]);
    let text = |t: &&u32| !pieces.is_special(**t);
    let bytes: usize = scored.iter().filter(text).map(|t| pieces.bytes(*t).len()).sum();
    let added = window.begins_text && window.first == 0 && pieces.strips_leading_space();
    let first = scored.first().map_or(&[][..], |t| pieces.bytes(*t));
    bytes - usize::from(added && first.starts_with(b" "))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Says that token `t` is followed by `t + 1`, with a fixed lead over all others.
    pub struct Counting {
        pub lead: f32,
    }

    impl LogitSource for Counting {
        fn vocab(&self) -> usize {
            8
        }

        fn context(&self) -> usize {
            100
        }

        fn reset(&mut self) -> Result<()> {
            Ok(())
        }

        fn skip(&mut self, _: &[u32]) -> Result<()> {
            Ok(())
        }

        fn feed(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<()> {
            logits.clear();
            for t in tokens {
                logits.extend((0..8).map(|i| if i == (t + 1) % 8 { self.lead } else { 0.0 }));
            }
            Ok(())
        }
    }

    #[test]
    fn by_hand() {
        let p = (2.0f64).exp() / ((2.0f64).exp() + 7.0);
        let q = 1.0 / ((2.0f64).exp() + 7.0);
        let window = Window { tokens: vec![0, 1, 2, 7], first: 1, begins_text: true };
        let mut pieces = Pieces::new(false);
        (0..8).for_each(|i| pieces.push(&vec![b'a'; i], i == 7));
        let got = perplexity(&mut Counting { lead: 2.0 }, &[window], Some(&pieces), |_| {}).unwrap();
        assert_eq!((got.count, got.bytes), (2, 2), "token 1 is not scored, token 7 is special");
        assert!((got.nll + p.ln() + q.ln()).abs() < 1e-6);
        let (ppl, error) = got.ppl();
        assert!((ppl - 1.0 / (p * q).sqrt()).abs() < 1e-4);
        assert!((error / ppl - (p.ln() - q.ln()).abs() / 2.0).abs() < 1e-6, "sd of two values, over sqrt(n - 1) = 1");
        assert!((got.bits_per_byte().unwrap() + (p * q).log2() / 2.0).abs() < 1e-6);
    }

    #[test]
    fn impossible_windows_and_broken_logits_are_errors() {
        let run = |tokens: Vec<u32>, lead| {
            let w = Window { tokens, first: 0, begins_text: true };
            perplexity(&mut Counting { lead }, &[w], None, |_| {}).map_err(|e| e.to_string())
        };
        assert!(run(vec![0; 101], 1.0).unwrap_err().contains("101 tokens"));
        assert!(run(vec![0, 9], 1.0).unwrap_err().contains("token 9"));
        assert!(run(vec![0, 1], f32::NAN).unwrap_err().contains("not finite"));
        assert!(run(vec![0, 1], f32::INFINITY).unwrap_err().contains("not finite"));
    }
}
