//! Training of low-rank predictors: logistic regression through a ReLU bottleneck, Adam, one thread, fixed seed.

use lacuna_core::{plan::Cut, statistics::Rows};

/// Pairs of inputs and activated gates; the last tenth is for measuring.
#[derive(Clone, Copy)]
pub struct Example<'a> {
    /// Inputs of the MLP.
    pub inputs: &'a Rows,
    /// Activated gates of the same tokens.
    pub neurons: &'a Rows,
    /// How many of the largest are active; none: those that are not zero.
    pub active: Option<usize>,
}

/// A predictor `B relu(A h)`.
pub struct Trained {
    /// `A`, `[rank, width]`.
    pub down: Vec<f32>,
    /// `B`, `[neurons, rank]`.
    pub up: Vec<f32>,
}

const BATCH: usize = 64;
const RATE: f32 = 2e-3;

impl Example<'_> {
    /// Tokens in all, and those to train on.
    fn tokens(&self) -> (usize, usize) {
        let all = (self.inputs.values.len() / self.inputs.width).min(self.neurons.values.len() / self.neurons.width);
        (all, (all - all / 10).max(1).min(all))
    }

    fn input(&self, token: usize) -> &[f32] {
        &self.inputs.values[token * self.inputs.width..][..self.inputs.width]
    }

    /// Which neurons of a token are active.
    fn labels(&self, token: usize) -> Vec<bool> {
        let row = &self.neurons.values[token * self.neurons.width..][..self.neurons.width];
        let Some(active) = self.active else { return row.iter().map(|a| *a != 0.0).collect() };
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_unstable_by(|a, b| row[*b].abs().total_cmp(&row[*a].abs()).then(a.cmp(b)));
        let mut labels = vec![false; row.len()];
        order[..active].iter().for_each(|i| labels[*i] = true);
        labels
    }
}

/// Adam's state for one matrix.
struct Adam {
    mean: Vec<f32>,
    square: Vec<f32>,
}

impl Adam {
    fn new(n: usize) -> Self {
        Self { mean: vec![0.0; n], square: vec![0.0; n] }
    }

    fn step(&mut self, weights: &mut [f32], gradient: &[f32], t: i32, rate: f32) {
        let (c1, c2) = (1.0 - 0.9_f32.powi(t), 1.0 - 0.999_f32.powi(t));
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((w, g), (m, s)) in weights.iter_mut().zip(gradient).zip(moments) {
            *m = 0.9 * *m + 0.1 * g;
            *s = 0.999 * *s + 0.001 * g * g;
            *w -= rate * (*m / c1) / ((*s / c2).sqrt() + 1e-8);
        }
    }
}

/// Trains a predictor of `rank` over `epochs` passes.
pub fn train(example: &Example<'_>, rank: usize, epochs: usize) -> Trained {
    let (width, inner) = (example.inputs.width, example.neurons.width);
    let (_, tokens) = example.tokens();
    let mut random = Noise(0x2545_f491_4f6c_dd1d);
    let mut net = Trained {
        down: (0..rank * width).map(|_| random.next() * (6.0 / width as f32).sqrt()).collect(),
        up: (0..inner * rank).map(|_| random.next() * (1.0 / rank as f32).sqrt()).collect(),
    };
    let labels: Vec<Vec<bool>> = (0..tokens).map(|t| example.labels(t)).collect();
    let active = labels.iter().flatten().filter(|l| **l).count() as f32;
    // Deja Vu's weight: positives count 1, negatives the share of positives (and a little).
    let rare = active / (tokens * inner) as f32 + 0.005;
    let (mut a, mut b) = (Adam::new(net.down.len()), Adam::new(net.up.len()));
    let mut order: Vec<usize> = (0..tokens).collect();
    let (mut t, steps) = (0, (epochs * tokens.div_ceil(BATCH)).max(1));
    for _ in 0..epochs {
        for i in (1..order.len()).rev() {
            order.swap(i, random.below(i + 1));
        }
        for batch in order.chunks(BATCH) {
            t += 1;
            let (down, up) = net.gradients(example, batch, &labels, rare);
            let rate = RATE * (1.0 - t as f32 / steps as f32).max(0.05);
            a.step(&mut net.down, &down, t, rate);
            b.step(&mut net.up, &up, t, rate);
        }
    }
    net
}

impl Trained {
    /// `relu(A h)`.
    fn hidden(&self, h: &[f32]) -> Vec<f32> {
        self.down.chunks_exact(h.len()).map(|row| dot(row, h).max(0.0)).collect()
    }

    /// Scores of all neurons.
    pub fn scores(&self, h: &[f32]) -> Vec<f32> {
        let hidden = self.hidden(h);
        self.up.chunks_exact(hidden.len()).map(|row| dot(row, &hidden)).collect()
    }

    /// Gradients of the weighted cross entropy, mean over the batch.
    fn gradients(
        &self,
        example: &Example<'_>,
        batch: &[usize],
        labels: &[Vec<bool>],
        rare: f32,
    ) -> (Vec<f32>, Vec<f32>) {
        let (mut down, mut up) = (vec![0.0; self.down.len()], vec![0.0; self.up.len()]);
        let per = 1.0 / batch.len() as f32;
        for &token in batch {
            let h = example.input(token);
            let hidden = self.hidden(h);
            let mut back = vec![0.0; hidden.len()];
            let rows = self.up.chunks_exact(hidden.len()).zip(up.chunks_exact_mut(hidden.len()));
            for ((row, grad), active) in rows.zip(&labels[token]) {
                let p = 1.0 / (1.0 + (-dot(row, &hidden)).exp());
                let error = if *active { p - 1.0 } else { rare * p } * per;
                grad.iter_mut().zip(&hidden).for_each(|(g, x)| *g += error * x);
                back.iter_mut().zip(row).for_each(|(b, w)| *b += error * w);
            }
            let rows = down.chunks_exact_mut(h.len()).zip(hidden.iter().zip(&back));
            for (grad, (_, b)) in rows.filter(|(_, (x, _))| **x > 0.0) {
                grad.iter_mut().zip(h).for_each(|(g, h)| *g += b * h);
            }
        }
        (down, up)
    }

    /// The score that keeps a share `recall` of the active neurons of tokens that were not trained on, and the share of
    /// all neurons above it.
    pub fn threshold(&self, example: &Example<'_>, recall: f64) -> (Cut, f64) {
        let (all, trained) = example.tokens();
        let (mut active, mut scores) = (Vec::new(), Vec::new());
        for token in if trained < all { trained..all } else { 0..all } {
            let s = self.scores(example.input(token));
            active.extend(s.iter().zip(example.labels(token)).filter(|(_, l)| *l).map(|(s, _)| *s));
            scores.extend(s);
        }
        active.sort_unstable_by(f32::total_cmp);
        let at = ((1.0 - recall) * active.len() as f64) as usize;
        // Strictly above: one step below the score that must stay.
        let threshold = active.get(at).map_or(f32::MIN, |s| s.next_down());
        let kept = scores.iter().filter(|s| **s > threshold).count() as f64 / scores.len().max(1) as f64;
        (Cut::Above { threshold }, kept)
    }

    /// Recall, precision and kept share on tokens that were not trained on.
    pub fn quality(&self, example: &Example<'_>, cut: &Cut) -> (f64, f64, f64) {
        let (all, trained) = example.tokens();
        let (mut hit, mut kept, mut active, mut total) = (0_usize, 0_usize, 0_usize, 0_usize);
        for token in if trained < all { trained..all } else { 0..all } {
            let (scores, labels) = (self.scores(example.input(token)), example.labels(token));
            let limit = match cut {
                Cut::Above { threshold } => *threshold,
                Cut::Top { count } => {
                    let mut sorted = scores.clone();
                    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
                    sorted.get(*count).copied().unwrap_or(f32::MIN)
                }
                _ => f32::MIN,
            };
            for (s, l) in scores.iter().zip(&labels) {
                kept += usize::from(*s > limit);
                hit += usize::from(*s > limit && *l);
            }
            active += labels.iter().filter(|l| **l).count();
            total += labels.len();
        }
        let share = |a: usize, b: usize| if b == 0 { 1.0 } else { a as f64 / b as f64 };
        (share(hit, active), share(hit, kept), share(kept, total))
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    let ((a, ra), (b, rb)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a).zip(b).for_each(|((s, a), b)| *s += a * b);
    }
    sums.iter().sum::<f32>() + ra.iter().zip(rb).map(|(a, b)| a * b).sum::<f32>()
}

struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Within -1 to 1.
    fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Neurons that open where a fixed direction of the input points: a predictor of enough rank finds them.
    fn pairs(tokens: usize) -> (Rows, Rows) {
        let (width, inner) = (8, 24);
        let inputs = crate::testing::normal(1, tokens * width);
        let directions = crate::testing::normal(2, inner * width);
        let gates = inputs
            .chunks_exact(width)
            .flat_map(|h| directions.chunks_exact(width).map(|d| (dot(d, h) - 2.0).max(0.0)).collect::<Vec<_>>());
        let neurons = gates.collect();
        (Rows { width, values: inputs.clone() }, Rows { width: inner, values: neurons })
    }

    #[test]
    fn training_raises_recall_far_above_chance() {
        let (inputs, neurons) = pairs(1500);
        let example = Example { inputs: &inputs, neurons: &neurons, active: None };
        let cut = Cut::Top { count: 12 };
        let before = train(&example, 16, 0).quality(&example, &cut);
        let after = train(&example, 16, 30).quality(&example, &cut);
        assert!((before.0 - 0.5).abs() < 0.2 && after.0 > 0.95, "{before:?} {after:?}");
        assert!((after.2 - 0.5).abs() < 1e-6, "exactly K");
        let trained = train(&example, 16, 30);
        let (cut, kept) = trained.threshold(&example, 0.99);
        let (recall, _, share) = trained.quality(&example, &cut);
        assert!(recall >= 0.985 && (share - kept).abs() < 1e-9 && kept < 0.8, "{recall} {kept}");
    }

    #[test]
    fn all_kept_has_full_recall_and_training_is_deterministic() {
        let (inputs, neurons) = pairs(100);
        let example = Example { inputs: &inputs, neurons: &neurons, active: Some(6) };
        let a = train(&example, 4, 2);
        assert_eq!(a.down, train(&example, 4, 2).down);
        assert_eq!(a.quality(&example, &Cut::Top { count: 24 }).0, 1.0);
        assert_eq!(example.labels(0).iter().filter(|l| **l).count(), 6);
    }
}
