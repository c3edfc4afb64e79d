//! How far a model is from its base: what `llama-perplexity --kl-divergence` prints, in one pass without a file of logits.

use super::{
    perplexity::{Perplexity, Progress, scored_bytes},
    source::{LogSoftmax, LogitSource, Scored, mean_and_error, run},
    windows::Window,
};
use crate::{
    error::{Error, Result},
    tokenizer::Pieces,
};

/// A value with its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Its standard error.
    pub error: f64,
}

/// Divergence of a test model from its base over a text.
#[derive(Clone, Debug, Default)]
pub struct Divergence {
    /// Perplexity of the base.
    pub base: Perplexity,
    /// Perplexity of the test model.
    pub test: Perplexity,
    nll_products: f64,
    kld: Vec<f32>,
    delta_p: Vec<f32>,
    same_top: usize,
}

impl Divergence {
    fn add(&mut self, base: &Scored<'_>, test: &Scored<'_>) -> Result<()> {
        let (b, t) = (LogSoftmax::new(base.logits)?, LogSoftmax::new(test.logits)?);
        let next = base.next as usize;
        let (ln_b, ln_t) = (b.of(base.logits[next]), t.of(test.logits[next]));
        self.base.add(ln_b);
        self.test.add(ln_t);
        self.nll_products += ln_b * ln_t;
        self.delta_p.push((ln_t.exp() - ln_b.exp()) as f32);
        let terms = base.logits.iter().zip(test.logits).map(|(x, y)| {
            let lb = b.of(*x);
            // Terms below e^-16 of probability add nothing and cost an exponential each (llama.cpp does the same).
            if lb > -16.0 { lb.exp() * (lb - t.of(*y)) } else { 0.0 }
        });
        self.kld.push(terms.sum::<f64>() as f32);
        self.same_top += usize::from(top(base.logits) == top(test.logits));
        Ok(())
    }

    /// Scored predictions.
    pub fn count(&self) -> usize {
        self.kld.len()
    }

    /// Mean Kullback-Leibler divergence of the test's distribution from the base's, in nats.
    pub fn kld(&self) -> Estimate {
        mean(self.kld.iter().map(|x| f64::from(*x)))
    }

    /// Quantile `q` (0 to 1) of the divergence; 1 is the maximum.
    pub fn kld_quantile(&self, q: f64) -> f64 {
        quantile(&self.kld, q)
    }

    /// Mean change of the probability of the right token.
    pub fn delta_p(&self) -> Estimate {
        mean(self.delta_p.iter().map(|x| f64::from(*x)))
    }

    /// Quantile of the change of the probability of the right token.
    pub fn delta_p_quantile(&self, q: f64) -> f64 {
        quantile(&self.delta_p, q)
    }

    /// Root mean square of that change.
    pub fn delta_p_rms(&self) -> Estimate {
        let squares = mean(self.delta_p.iter().map(|x| f64::from(*x) * f64::from(*x)));
        let value = squares.value.sqrt();
        Estimate { value, error: if value > 0.0 { 0.5 * squares.error / value } else { 0.0 } }
    }

    /// Share of positions where both models rank the same token first.
    pub fn same_top(&self) -> Estimate {
        let n = self.count() as f64;
        let p = self.same_top as f64 / n;
        Estimate { value: p, error: (p * (1.0 - p) / (n - 1.0)).sqrt() }
    }

    /// Mean of `ln(PPL(test) / PPL(base))`; its error counts that both were measured on the same tokens.
    pub fn ln_ppl_ratio(&self) -> Estimate {
        let (t, te) = mean_and_error(self.test.nll, self.test.nll_squares, self.count());
        let (b, be) = mean_and_error(self.base.nll, self.base.nll_squares, self.count());
        let variance = te * te + be * be - 2.0 * self.covariance();
        Estimate { value: t - b, error: variance.max(0.0).sqrt() }
    }

    /// `PPL(test) / PPL(base)`.
    pub fn ppl_ratio(&self) -> Estimate {
        let ln = self.ln_ppl_ratio();
        Estimate { value: ln.value.exp(), error: ln.error * ln.value.exp() }
    }

    /// Correlation of the two models' log-likelihoods per token, -1 to 1.
    pub fn correlation(&self) -> f64 {
        let error = |p: &Perplexity| mean_and_error(p.nll, p.nll_squares, p.count).1;
        self.covariance() / (error(&self.test) * error(&self.base))
    }

    /// Covariance of the two mean log-likelihoods.
    fn covariance(&self) -> f64 {
        let n = self.count() as f64;
        (self.nll_products / n - self.test.nll / n * (self.base.nll / n)) / (n - 1.0)
    }
}

/// Index of the largest logit, the first on ties.
fn top(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = i;
        }
    }
    best
}

fn mean(values: impl Iterator<Item = f64>) -> Estimate {
    let (mut n, mut sum, mut squares) = (0, 0.0, 0.0);
    for v in values {
        n += 1;
        sum += v;
        squares += v * v;
    }
    let (value, error) = mean_and_error(sum, squares, n);
    Estimate { value, error }
}

/// Linear interpolation between the two nearest ranks.
fn quantile(values: &[f32], q: f64) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    let at = q.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (low, part) = (at.floor() as usize, at - at.floor());
    let high = (low + 1).min(sorted.len() - 1);
    f64::from(sorted[low]) * (1.0 - part) + f64::from(sorted[high]) * part
}

/// Runs `base` and `test` over the same windows in lockstep. `progress` is called after each window.
///
/// # Errors
/// As [`super::perplexity()`], and vocabularies of different size.
pub fn divergence(
    base: &mut dyn LogitSource,
    test: &mut dyn LogitSource,
    windows: &[Window],
    pieces: Option<&Pieces>,
    mut progress: impl FnMut(Progress<'_, Divergence>),
) -> Result<Divergence> {
    if base.vocab() != test.vocab() {
        let problem = format!("its vocabulary has {} tokens, the base {}: not comparable", test.vocab(), base.vocab());
        return Err(Error::Argument { name: "model", problem });
    }
    let mut sum = Divergence::default();
    for (i, window) in windows.iter().enumerate() {
        run([&mut *base, &mut *test], window, &mut |[b, t]| sum.add(&b, &t))?;
        let bytes = pieces.map_or(0, |p| scored_bytes(window, p));
        sum.base.bytes += bytes;
        sum.test.bytes += bytes;
        progress(Progress { done: i + 1, total: windows.len(), so_far: &sum });
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::{super::perplexity::tests::Counting, *};

    fn windows() -> Vec<Window> {
        vec![Window { tokens: vec![0, 1, 2, 7, 0, 3], first: 1, begins_text: true }]
    }

    #[test]
    fn a_model_does_not_diverge_from_itself() {
        let d = divergence(&mut Counting { lead: 3.0 }, &mut Counting { lead: 3.0 }, &windows(), None, |_| {}).unwrap();
        assert_eq!(d.count(), 4);
        assert_eq!((d.kld().value, d.kld_quantile(1.0), d.delta_p().value, d.same_top().value), (0.0, 0.0, 0.0, 1.0));
        assert!(d.ln_ppl_ratio().value == 0.0 && d.ln_ppl_ratio().error < 1e-9 && (d.correlation() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn by_hand() {
        let p = |lead: f64| (lead.exp() / (lead.exp() + 7.0), 1.0 / (lead.exp() + 7.0));
        let ((b1, b0), (t1, t0)) = (p(3.0), p(1.0));
        let kl = b1 * (b1 / t1).ln() + 7.0 * b0 * (b0 / t0).ln();
        let d = divergence(&mut Counting { lead: 3.0 }, &mut Counting { lead: 1.0 }, &windows(), None, |_| {}).unwrap();
        assert!((d.kld().value - kl).abs() < 1e-6 && (d.kld_quantile(0.5) - kl).abs() < 1e-6);
        // Of the four scored tokens 2 and 0 were expected, 7 and 3 were not.
        let dp = (2.0 * (t1 - b1) + 2.0 * (t0 - b0)) / 4.0;
        assert!((d.delta_p().value - dp).abs() < 1e-6);
        let ratio = (2.0 * (b1 / t1).ln() + 2.0 * (b0 / t0).ln()) / 4.0;
        assert!((d.ln_ppl_ratio().value - ratio).abs() < 1e-6);
        assert_eq!(d.same_top().value, 1.0);
        let d =
            divergence(&mut Counting { lead: 3.0 }, &mut Counting { lead: -1.0 }, &windows(), None, |_| {}).unwrap();
        assert_eq!(d.same_top().value, 0.0);
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.75), 2.5);
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 1.0), 3.0);
    }
}
