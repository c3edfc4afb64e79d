//! Choosing the next token: llama.cpp's filters in llama.cpp's order (penalties, top-k, top-p, min-p, temperature,
//! draw; `common/sampling.cpp` and `src/llama-sampling.cpp`), with a random stream of our own, so that a seed gives the
//! same text on any machine and at any number of threads that computes the same logits.

use crate::error::{Error, Result};
use std::{cmp::Ordering, collections::VecDeque};

/// Settings; [`Default`] are those of llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Seed of the random stream.
    pub seed: u64,
    /// Divides the logits; 0 and below pick the most likely token.
    pub temp: f32,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens until their probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this likely relative to the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 changes nothing.
    pub repeat_penalty: f32,
    /// Tokens that count as recent; 0 switches the three penalties off.
    pub repeat_last: usize,
    /// Subtracted once from the logit of each recent token.
    pub presence_penalty: f32,
    /// Subtracted for each time a recent token occurred.
    pub frequency_penalty: f32,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
        }
    }
}

impl SamplerOptions {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temp: 0.0, ..Self::default() }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting, its value and the range.
    pub fn check(&self) -> Result<()> {
        within("temp", self.temp, -1.0, 100.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -100.0, 100.0)?;
        within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)?;
        within("repeat_penalty", self.repeat_penalty, 0.0, 100.0)?;
        if self.repeat_penalty == 0.0 {
            return Err(Error::Argument { name: "repeat_penalty", problem: "0 would divide by zero; 1 is off".into() });
        }
        if self.repeat_last > 1 << 20 {
            let problem = format!("{} is not within 0 to {}", self.repeat_last, 1 << 20);
            return Err(Error::Argument { name: "repeat_last", problem });
        }
        Ok(())
    }

    fn penalises(&self) -> bool {
        let changes = self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0;
        changes && self.repeat_last > 0
    }
}

fn within(name: &'static str, value: f32, low: f32, high: f32) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::Argument { name, problem: format!("{value} is not within {low} to {high}") })
}

/// xoshiro256++ (D. Blackman, S. Vigna, "Scrambled linear pseudorandom number generators", 2019), seeded by SplitMix64.
#[derive(Clone, Debug)]
pub struct Rng([u64; 4]);

impl Rng {
    /// The stream of `seed`.
    pub fn new(mut seed: u64) -> Self {
        let mut split = || {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = seed;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        Self([split(), split(), split(), split()])
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.0;
        let out = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        out
    }

    /// A number in `[0, 1)` with 53 random bits.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A token that is still in the race.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    logit: f32,
    id: u32,
}

/// Higher logit first, lower id on ties.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Chooses tokens; keeps the recent ones for the penalties.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    rng: Rng,
    recent: VecDeque<u32>,
    changed: Vec<f32>,
    candidates: Vec<Candidate>,
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    ///
    /// # Errors
    /// An option out of its range.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.check()?;
        Ok(Self {
            options,
            rng: Rng::new(options.seed),
            recent: VecDeque::new(),
            changed: Vec::new(),
            candidates: Vec::new(),
            weights: Vec::new(),
        })
    }

    /// The settings.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Notes a token of the prompt, or one that [`Sampler::sample`] returned.
    pub fn accept(&mut self, id: u32) {
        if self.options.repeat_last == 0 {
            return;
        }
        if self.recent.len() == self.options.repeat_last {
            self.recent.pop_front();
        }
        self.recent.push_back(id);
    }

    /// Chooses from `logits`, one per token of the vocabulary; minus infinity excludes a token, one must be finite.
    ///
    /// # Panics
    /// If `logits` is empty.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        assert!(!logits.is_empty(), "a vocabulary has at least one token");
        let mut changed = std::mem::take(&mut self.changed);
        let logits = if self.options.penalises() {
            changed.clear();
            changed.extend_from_slice(logits);
            self.penalise(&mut changed);
            &changed[..]
        } else {
            logits
        };
        let id = if self.options.temp <= 0.0 { best(logits) } else { self.draw(logits) };
        self.changed = changed;
        id
    }

    fn penalise(&self, logits: &mut [f32]) {
        let o = &self.options;
        let mut recent: Vec<u32> = self.recent.iter().copied().collect();
        recent.sort_unstable();
        for same in recent.chunk_by(|a, b| a == b) {
            let Some(logit) = logits.get_mut(same[0] as usize) else { continue };
            *logit = if *logit <= 0.0 { *logit * o.repeat_penalty } else { *logit / o.repeat_penalty };
            *logit -= same.len() as f32 * o.frequency_penalty + o.presence_penalty;
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        self.keep_top_k(logits);
        self.keep_top_p();
        self.keep_min_p();
        let total = self.weigh(self.options.temp);
        let mut left = self.rng.next_f64() * total;
        for (c, w) in self.candidates.iter().zip(&self.weights) {
            left -= w;
            if left < 0.0 {
                return c.id;
            }
        }
        // Rounding can leave a rest; it belongs to the last candidate that can be drawn.
        let last = self.weights.iter().rposition(|w| *w > 0.0).unwrap_or(0);
        self.candidates[last].id
    }

    /// Fills `candidates` with the `top_k` best, best first.
    fn keep_top_k(&mut self, logits: &[f32]) {
        let k = if self.options.top_k == 0 { logits.len() } else { self.options.top_k.min(logits.len()) };
        let all = logits.iter().zip(0u32..).map(|(&logit, id)| Candidate { logit, id });
        let kept = &mut self.candidates;
        kept.clear();
        // Collected in batches of k beyond the k best so far, so that a large vocabulary is never sorted as a whole.
        let batch = k.max(64);
        let mut worst = f32::NEG_INFINITY;
        for c in all {
            if c.logit < worst {
                continue;
            }
            kept.push(c);
            if kept.len() == k + batch {
                kept.select_nth_unstable_by(k - 1, by_rank);
                kept.truncate(k);
                worst = kept[k - 1].logit;
            }
        }
        kept.sort_unstable_by(by_rank);
        kept.truncate(k);
    }

    /// Fills `weights` with `exp((logit - max) / temp)` and returns their sum.
    fn weigh(&mut self, temp: f32) -> f64 {
        let max = self.candidates[0].logit;
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|c| (f64::from(c.logit - max) / f64::from(temp)).exp()));
        self.weights.iter().sum()
    }

    fn keep_top_p(&mut self) {
        if self.options.top_p >= 1.0 {
            return;
        }
        let total = self.weigh(1.0);
        let mut sum = 0.0;
        let full = self.weights.iter().position(|w| {
            sum += w / total;
            sum >= f64::from(self.options.top_p)
        });
        if let Some(last) = full {
            self.candidates.truncate(last + 1);
        }
    }

    fn keep_min_p(&mut self) {
        if self.options.min_p <= 0.0 {
            return;
        }
        let least = self.candidates[0].logit + self.options.min_p.ln();
        let kept = self.candidates.iter().take_while(|c| c.logit >= least).count();
        self.candidates.truncate(kept.max(1));
    }
}

/// Index of the largest logit, the first on ties.
pub fn best(logits: &[f32]) -> u32 {
    let mut top = 0;
    for (i, &l) in logits.iter().enumerate() {
        if l > logits[top] {
            top = i;
        }
    }
    top as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn off() -> SamplerOptions {
        SamplerOptions { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerOptions::default() }
    }

    /// Which of `logits` can come out, by drawing often.
    fn reachable(options: SamplerOptions, logits: &[f32]) -> Vec<u32> {
        let mut s = Sampler::new(options).expect("valid options");
        let mut seen: Vec<u32> = (0..4000).map(|_| s.sample(logits)).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    /// Logits of the probabilities 0.5, 0.25, 0.15, 0.1, in mixed order.
    fn logits() -> Vec<f32> {
        [0.15f32, 0.5, 0.1, 0.25].iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn each_filter_alone() {
        let l = logits();
        assert_eq!(reachable(off(), &l), [0, 1, 2, 3]);
        assert_eq!(reachable(SamplerOptions { top_k: 2, ..off() }, &l), [1, 3]);
        assert_eq!(reachable(SamplerOptions { top_k: 9, ..off() }, &l), [0, 1, 2, 3]);
        assert_eq!(reachable(SamplerOptions { top_p: 0.7, ..off() }, &l), [1, 3], "0.5 + 0.25 reaches 0.7");
        assert_eq!(reachable(SamplerOptions { top_p: 0.8, ..off() }, &l), [0, 1, 3]);
        assert_eq!(reachable(SamplerOptions { top_p: 0.0, ..off() }, &l), [1], "at least one stays");
        assert_eq!(reachable(SamplerOptions { min_p: 0.29, ..off() }, &l), [0, 1, 3], "0.15 / 0.5 = 0.3");
        assert_eq!(reachable(SamplerOptions { min_p: 0.31, ..off() }, &l), [1, 3]);
        assert_eq!(reachable(SamplerOptions { min_p: 1.0, ..off() }, &l), [1]);
    }

    #[test]
    fn order_top_k_before_top_p() {
        // Renormalised after top-k 2 the best has 0.667, which reaches 0.6 alone; before top-k it would not.
        let o = SamplerOptions { top_k: 2, top_p: 0.6, ..off() };
        assert_eq!(reachable(o, &logits()), [1]);
    }

    #[test]
    fn frequencies_follow_the_softmax_with_temperature() {
        let mut s = Sampler::new(SamplerOptions { temp: 2.0, seed: 7, ..off() }).expect("valid options");
        let (l, n) = (logits(), 40_000);
        let mut counts = [0usize; 4];
        (0..n).for_each(|_| counts[s.sample(&l) as usize] += 1);
        let roots: Vec<f64> = [0.15f64, 0.5, 0.1, 0.25].iter().map(|p| p.sqrt()).collect();
        let total: f64 = roots.iter().sum();
        for (c, r) in counts.iter().zip(&roots) {
            let (got, want) = (*c as f64 / n as f64, r / total);
            assert!((got - want).abs() < 0.01, "{counts:?}");
        }
    }

    #[test]
    fn penalties() {
        let pick = |options: SamplerOptions, logits: &[f32], recent: &[u32]| {
            let mut s = Sampler::new(SamplerOptions { temp: 0.0, ..options }).expect("valid options");
            recent.iter().for_each(|&id| s.accept(id));
            s.sample(logits)
        };
        let repeat = SamplerOptions { repeat_penalty: 2.0, ..off() };
        assert_eq!(pick(repeat, &[3.0, 2.0], &[0]), 1, "3 / 2 < 2");
        assert_eq!(pick(repeat, &[-1.0, -1.5], &[0]), 1, "-1 * 2 < -1.5");
        assert_eq!(pick(off(), &[3.0, 2.0], &[0]), 0);
        let present = SamplerOptions { presence_penalty: 0.6, ..off() };
        assert_eq!(pick(present, &[2.5, 2.0], &[0, 0]), 1);
        assert_eq!(pick(present, &[2.7, 2.0], &[0, 0]), 0, "once, however often it came");
        let frequent = SamplerOptions { frequency_penalty: 0.3, ..off() };
        assert_eq!(pick(frequent, &[2.5, 2.0], &[0]), 0);
        assert_eq!(pick(frequent, &[2.5, 2.0], &[0, 0]), 1);
        let short = SamplerOptions { repeat_last: 1, ..repeat };
        assert_eq!(pick(short, &[3.0, 2.0], &[0, 1]), 0, "the window has forgotten token 0");
        assert_eq!(pick(repeat, &[3.0, 2.0], &[9]), 0, "ids outside the logits do not matter");
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_top_k_agrees_with_a_sort() {
        assert_eq!(best(&[1.0, 3.0, 3.0]), 1);
        let mut rng = Rng::new(3);
        let logits: Vec<f32> = (0..3000).map(|_| (rng.next_u64() % 500) as f32).collect();
        let mut s = Sampler::new(SamplerOptions { top_k: 40, ..off() }).expect("valid options");
        s.keep_top_k(&logits);
        let mut all: Vec<Candidate> = logits.iter().zip(0..).map(|(&logit, id)| Candidate { logit, id }).collect();
        all.sort_by(by_rank);
        assert_eq!(s.candidates, all[..40]);
    }

    #[test]
    fn the_stream_is_fixed() {
        // Values of the public-domain C code of xoshiro256++ and SplitMix64 for seed 0.
        let mut r = Rng::new(0);
        assert_eq!(r.next_u64(), 5_987_356_902_031_041_503);
        let draws = |seed| {
            let mut s = Sampler::new(SamplerOptions { seed, ..off() }).expect("valid options");
            (0..50).map(|_| s.sample(&logits())).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn ranges_are_checked_and_named() {
        let bad = [
            SamplerOptions { temp: f32::NAN, ..off() },
            SamplerOptions { temp: 1e6, ..off() },
            SamplerOptions { top_p: -1.0, ..off() },
            SamplerOptions { top_p: 1.1, ..off() },
            SamplerOptions { min_p: f32::INFINITY, ..off() },
            SamplerOptions { repeat_penalty: 0.0, ..off() },
            SamplerOptions { repeat_penalty: -1.0, ..off() },
            SamplerOptions { frequency_penalty: f32::NAN, ..off() },
            SamplerOptions { repeat_last: usize::MAX, ..off() },
        ];
        for o in bad {
            assert!(matches!(o.check(), Err(Error::Argument { .. })), "{o:?}");
        }
        let message = SamplerOptions { top_p: 1.5, ..off() }.check().expect_err("out of range").to_string();
        assert!(message.contains("top_p") && message.contains("1.5") && message.contains("0 to 1"), "{message}");
    }
}
