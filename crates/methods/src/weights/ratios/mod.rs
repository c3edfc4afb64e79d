//! Which share of each layer goes, given the share of the whole model: a mechanism of its own, for every method that takes
//! a share.
//!
//! * `uniform`: the same everywhere.
//! * `erk` (Mocanu et al. 2018, as in RigL's code): survivors of a matrix in proportion to the sum of its sides, so small
//!   matrices stay denser; matrices that would be more than full stay whole.
//! * `lamp` (Lee et al., arXiv:2010.07611): every weight's square over the sum of squares of all weights of its matrix that
//!   are not smaller; one threshold on these scores for the model. A whole matrix's scale does not matter.
//! * `global`: one threshold on magnitudes for the model; does not know that matrices have other scales.
//!
//! * `loss`: by what each matrix was measured to lose at several shares ([`by_loss`]), so that the sum is smallest.
//! * [`angular`]: by how far blocks turn the residual stream; `ecoflap`: by how much the loss depends on them
//!   ([`ecoflap`]). Both give all matrices of a block one share ([`by_block`]).
//!
//! `lamp` and `global` were made for pruning with retraining: no matrix loses more than [`HEADROOM`] above the target. The
//! same limit holds for `loss`.

pub mod angular;
pub mod budget;
pub mod ecoflap;

use budget::Point;
use lacuna_core::suggest::hint;

/// How a share is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ratios {
    /// The same everywhere.
    Uniform,
    /// By the sides of the matrices.
    Erk,
    /// By LAMP's score.
    Lamp,
    /// By magnitude.
    Global,
    /// By measured errors.
    Loss,
    /// By how far blocks turn the residual stream.
    Angular,
    /// By how much the loss depends on blocks.
    Ecoflap,
}

/// How far the share of one matrix may lie above that of the model.
pub const HEADROOM: f64 = 0.15;

/// Largest share of one matrix.
const MOST: f64 = 0.99;

/// Rows and columns of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
}

impl Size {
    fn count(self) -> f64 {
        self.outputs as f64 * self.inputs as f64
    }
}

impl Ratios {
    /// All of them, by name.
    pub const ALL: [(&str, Ratios); 7] = [
        ("uniform", Ratios::Uniform),
        ("erk", Ratios::Erk),
        ("lamp", Ratios::Lamp),
        ("global", Ratios::Global),
        ("loss", Ratios::Loss),
        ("angular", Ratios::Angular),
        ("ecoflap", Ratios::Ecoflap),
    ];

    /// The one of that name.
    ///
    /// # Errors
    /// None is; the message names the nearest.
    pub fn parse(name: &str) -> Result<Self, String> {
        let names = || Self::ALL.iter().map(|r| r.0);
        let found = Self::ALL.iter().find(|r| r.0 == name).map(|r| r.1);
        found.ok_or_else(|| {
            let known = names().collect::<Vec<_>>().join(", ");
            format!("unknown ratios `{name}`{} (known: {known})", hint(name, names()))
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|r| r.1 == self).map_or("", |r| r.0)
    }

    /// Whether it runs the model over a text.
    pub fn runs_model(self) -> bool {
        matches!(self, Self::Loss | Self::Angular | Self::Ecoflap)
    }

    /// Whether it cannot do without a text.
    pub fn needs_text(self) -> bool {
        matches!(self, Self::Angular | Self::Ecoflap)
    }

    /// The share to drop of each matrix, so that `target` of all weights go. `weights(i)` gives the numbers of matrix `i`,
    /// once each, for those that look at them.
    ///
    /// # Errors
    /// A target that cannot be reached, with the largest that can; what `weights` returns; those that run the model, which
    /// need more than weights ([`by_loss`], [`by_block`]).
    pub fn allocate<E: From<String>>(
        self,
        target: f64,
        sizes: &[Size],
        mut weights: impl FnMut(usize) -> Result<Vec<f32>, E>,
    ) -> Result<Vec<f64>, E> {
        let shares = match self {
            Self::Uniform => return Ok(vec![target; sizes.len()]),
            Self::Loss | Self::Angular | Self::Ecoflap => {
                return Err(E::from("these ratios follow from running the model, not from weights".into()));
            }
            Self::Erk => erk(1.0 - target, sizes).into_iter().map(|d| 1.0 - d).collect(),
            Self::Lamp | Self::Global => {
                let mut all = Vec::with_capacity(sizes.len());
                for i in 0..sizes.len() {
                    all.push(Histogram::new(&weights(i)?));
                }
                by_threshold(target, &all, self == Self::Lamp)
            }
        };
        let cap = if self == Self::Erk { MOST } else { (target + HEADROOM).min(MOST) };
        Ok(fit(&shares, sizes, target, cap)?)
    }
}

/// The shares to drop where each block (by the number of the block of every matrix) has one share, nearest to `shares` of
/// the blocks and `target` in all.
///
/// # Errors
/// A target that cannot be reached, with the largest that can.
pub fn by_block(shares: &[f64], blocks: &[usize], sizes: &[Size], target: f64) -> Result<Vec<f64>, String> {
    let each: Vec<f64> = blocks.iter().map(|b| shares.get(*b).copied().unwrap_or(target)).collect();
    fit(&each, sizes, target, MOST)
}

/// Weights of every block, and of these those that stay by ECoFLaP's rule: the shares to drop, for the score of every block.
/// No block loses more than `headroom` above the target.
///
/// # Errors
/// As [`ecoflap::allocate`].
pub fn by_scores(
    scores: &[f64],
    blocks: &[usize],
    sizes: &[Size],
    target: f64,
    headroom: f64,
) -> Result<Vec<f64>, String> {
    let mut weights = vec![0_u64; scores.len()];
    blocks.iter().zip(sizes).for_each(|(b, s)| weights[*b] += (s.outputs * s.inputs) as u64);
    let floor = (1.0 - target - headroom).max(1.0 - MOST);
    let keep = (weights.iter().sum::<u64>() as f64 * (1.0 - target)).round() as u64;
    let kept = ecoflap::allocate(scores, &weights, keep, floor)?;
    let share = |b: &usize| 1.0 - kept[*b] as f64 / weights[*b].max(1) as f64;
    Ok(blocks.iter().map(share).collect())
}

/// Shares at which a matrix is measured for [`by_loss`] at `target`; nothing is lost at 0.
pub fn loss_shares(target: f64) -> Vec<f64> {
    let mut shares: Vec<f64> = [-0.3, -0.15, 0.0, HEADROOM].iter().map(|d| (target + d).min(MOST)).collect();
    shares.retain(|s| *s > 0.0);
    shares
}

/// The shares to drop, so that `target` of all weights go and the sum of the errors is smallest: `errors[i]` has pairs of a
/// share and the error that matrix `i` was measured to have there, with straight lines between them and none at 0.
///
/// # Errors
/// A target that cannot be reached, with the largest that can.
pub fn by_loss(errors: &[Vec<(f64, f64)>], sizes: &[Size], target: f64) -> Result<Vec<f64>, String> {
    let cap = (target + HEADROOM).min(MOST);
    let curve = |(errors, size): (&Vec<(f64, f64)>, &Size)| {
        let mut all: Vec<(f64, f64)> = errors.iter().copied().chain([(0.0, 0.0)]).collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let ends = all.windows(2).find(|w| w[0].0 < cap && cap < w[1].0);
        let cut = ends.map(|w| (cap, w[0].1 + (w[1].1 - w[0].1) * (cap - w[0].0) / (w[1].0 - w[0].0)));
        let points = all.into_iter().filter(|p| p.0 <= cap).chain(cut);
        points.map(|(share, error)| Point { cost: (1.0 - share) * size.count(), error }).collect::<Vec<_>>()
    };
    let curves: Vec<Vec<Point>> = errors.iter().zip(sizes).map(curve).collect();
    let all: f64 = sizes.iter().map(|s| s.count()).sum();
    let kept = budget::spread(&curves, (1.0 - target) * all).map_err(|least| {
        format!(
            "a sparsity of {target} cannot be reached: with no matrix above {cap:.2} the most is {:.4}",
            1.0 - least / all
        )
    })?;
    Ok(kept.iter().zip(sizes).map(|(k, s)| (1.0 - k / s.count()).clamp(0.0, 1.0)).collect())
}

/// Densities in proportion to `(outputs + inputs) / (outputs * inputs)`, none above 1, of `density` in all.
fn erk(density: f64, sizes: &[Size]) -> Vec<f64> {
    let raw: Vec<f64> = sizes.iter().map(|s| (s.outputs + s.inputs) as f64 / s.count()).collect();
    let mut whole = vec![false; sizes.len()];
    loop {
        let wanted: f64 = sizes.iter().map(|s| s.count()).sum::<f64>() * density;
        let taken: f64 = sizes.iter().zip(&whole).filter(|(_, w)| **w).map(|(s, _)| s.count()).sum();
        let open: f64 = sizes.iter().zip(&raw).zip(&whole).filter(|(_, w)| !**w).map(|((s, r), _)| s.count() * r).sum();
        let scale = if open > 0.0 { (wanted - taken).max(0.0) / open } else { 0.0 };
        let over: Vec<usize> = (0..sizes.len()).filter(|i| !whole[*i] && scale * raw[*i] > 1.0).collect();
        if over.is_empty() {
            return raw.iter().zip(&whole).map(|(r, w)| if *w { 1.0 } else { scale * r }).collect();
        }
        let most = over.iter().map(|i| raw[*i]).fold(0.0, f64::max);
        over.iter().filter(|i| raw[**i] == most).for_each(|i| whole[*i] = true);
    }
}

/// Squares of weights, counted in 64 steps per power of two.
struct Histogram {
    /// Weights in and above a step.
    counts: Vec<f64>,
    /// Mean square in a step over the sum of squares in and above it (LAMP), and log2 of the mean square.
    scores: Vec<(f64, f64)>,
    all: f64,
}

const STEPS: f64 = 64.0;
const LOWEST: f64 = -300.0;

impl Histogram {
    fn new(weights: &[f32]) -> Self {
        let bins = ((256.0 - LOWEST) * STEPS) as usize;
        let (mut counts, mut sums) = (vec![0.0_f64; bins], vec![0.0_f64; bins]);
        for w in weights.iter().filter(|w| **w != 0.0) {
            let square = f64::from(*w) * f64::from(*w);
            let bin = (((square.log2() - LOWEST) * STEPS) as usize).min(bins - 1);
            counts[bin] += 1.0;
            sums[bin] += square;
        }
        let (mut above, mut mass) = (0.0, 0.0);
        let mut scores = vec![(0.0, 0.0); bins];
        for bin in (0..bins).rev() {
            let mean = if counts[bin] > 0.0 { sums[bin] / counts[bin] } else { 0.0 };
            mass += sums[bin];
            above += counts[bin];
            scores[bin] = (if mass > 0.0 { mean / mass } else { 0.0 }, mean);
            counts[bin] = above;
        }
        Self { counts, scores, all: weights.len() as f64 }
    }

    /// Weights whose score is at least `threshold`.
    fn kept(&self, threshold: f64, lamp: bool) -> f64 {
        let score = |s: &(f64, f64)| if lamp { s.0 } else { s.1 };
        // Empty steps have the score 0, so the first step that reaches the threshold is a filled one.
        self.scores.iter().position(|s| score(s) >= threshold).map_or(0.0, |bin| self.counts[bin])
    }
}

/// Shares dropped by one threshold on the scores of all matrices.
fn by_threshold(target: f64, all: &[Histogram], lamp: bool) -> Vec<f64> {
    let wanted = all.iter().map(|h| h.all).sum::<f64>() * (1.0 - target);
    let (mut low, mut high) = (-300.0_f64, 256.0_f64);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        let kept: f64 = all.iter().map(|h| h.kept(middle.exp2(), lamp)).sum();
        if kept > wanted { low = middle } else { high = middle }
    }
    all.iter().map(|h| 1.0 - h.kept(high.exp2(), lamp) / h.all.max(1.0)).collect()
}

/// The nearest shares in proportion to `shares`, none above `cap`, that make `target` of the whole.
fn fit(shares: &[f64], sizes: &[Size], target: f64, cap: f64) -> Result<Vec<f64>, String> {
    let all: f64 = sizes.iter().map(|s| s.count()).sum();
    let at = |factor: f64| shares.iter().map(|s| (s * factor).clamp(0.0, cap)).collect::<Vec<f64>>();
    let total = |shares: &[f64]| shares.iter().zip(sizes).map(|(s, n)| s * n.count()).sum::<f64>() / all.max(1.0);
    let reachable = total(&at(1e9));
    if reachable + 1e-9 < target {
        return Err(format!(
            "a sparsity of {target} cannot be reached: with these ratios and no matrix above {cap:.2} the most is {reachable:.4}"
        ));
    }
    let (mut low, mut high) = (0.0, 1e9);
    for _ in 0..200 {
        let middle = f64::midpoint(low, high);
        if total(&at(middle)) < target { low = middle } else { high = middle }
    }
    Ok(at(high))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    fn weights(seed: u64, scale: f32, n: usize) -> Vec<f32> {
        normal(seed, n).into_iter().map(|w| w * scale).collect()
    }

    fn shares(ratios: Ratios, target: f64, sizes: &[Size], matrices: &[Vec<f32>]) -> Vec<f64> {
        ratios.allocate::<String>(target, sizes, |i| Ok(matrices[i].clone())).unwrap()
    }

    fn sizes() -> Vec<Size> {
        [(64, 64), (64, 256), (256, 64), (8, 64)].map(|(outputs, inputs)| Size { outputs, inputs }).to_vec()
    }

    #[test]
    fn every_way_gives_the_share_of_the_whole() {
        let sizes = sizes();
        let matrices: Vec<_> =
            sizes.iter().enumerate().map(|(i, s)| weights(i as u64, 1.0 + i as f32, s.count() as usize)).collect();
        let all: f64 = sizes.iter().map(|s| s.count()).sum();
        for (name, ratios) in Ratios::ALL.into_iter().filter(|r| !r.1.runs_model()) {
            for target in [0.0, 0.2, 0.5, 0.8] {
                let shares = shares(ratios, target, &sizes, &matrices);
                let total: f64 = shares.iter().zip(&sizes).map(|(s, n)| s * n.count()).sum();
                assert!((total / all - target).abs() < 1e-6, "{name} {target}: {shares:?}");
                assert!(shares.iter().all(|s| (0.0..1.0).contains(s)), "{name} {shares:?}");
            }
        }
    }

    #[test]
    fn erk_keeps_small_matrices_denser_and_equal_ones_equal() {
        let erk = |sizes: &[Size]| shares(Ratios::Erk, 0.5, sizes, &[]);
        let of = erk(&sizes());
        assert!(of[3] < of[0] && of[0] < of[1] && (of[1] - of[2]).abs() < 1e-9, "{of:?}");
        assert!(erk(&[Size { outputs: 9, inputs: 7 }; 3]).iter().all(|s| (s - 0.5).abs() < 1e-9));
    }

    #[test]
    fn the_scale_of_a_matrix_matters_to_global_and_not_to_lamp() {
        let sizes = [Size { outputs: 32, inputs: 32 }; 2];
        let matrices = |scale: f32| vec![weights(1, 1.0, 1024), weights(2, scale, 1024)];
        let lamp = |scale: f32| shares(Ratios::Lamp, 0.5, &sizes, &matrices(scale));
        assert!(lamp(1.0).iter().zip(lamp(1000.0)).all(|(a, b)| (a - b).abs() < 0.02));
        assert!(lamp(1.0).iter().all(|s| (s - 0.5).abs() < 0.05), "{:?}", lamp(1.0));
        let global = shares(Ratios::Global, 0.5, &sizes, &matrices(1000.0));
        assert!((global[0] - 0.65).abs() < 1e-6 && (global[1] - 0.35).abs() < 1e-6, "{global:?}");
    }

    /// Matrices whose errors are `a s^2`: at the best shares the slopes `2 a s` are equal, up to the measured grid.
    #[test]
    fn losses_decide_within_the_cap() {
        let sizes = [Size { outputs: 10, inputs: 10 }; 3];
        let errors = |weights: [f64; 3]| -> Vec<Vec<(f64, f64)>> {
            let curve = |a: f64| (1..100).map(|i| f64::from(i) / 100.0).map(|s| (s, a * s * s)).collect();
            weights.into_iter().map(curve).collect()
        };
        let equal = by_loss(&errors([1.0; 3]), &sizes, 0.5).unwrap();
        assert!(equal.iter().all(|s| (s - 0.5).abs() < 0.011), "{equal:?}");
        let some = by_loss(&errors([1.0, 1.0, 1.25]), &sizes, 0.5).unwrap();
        assert!((some.iter().sum::<f64>() - 1.5).abs() < 1e-9 && (some[2] - 0.4286).abs() < 0.011, "{some:?}");
        // One that loses little stops at the cap, here between two measured shares.
        let coarse: Vec<_> = [0.01, 1.0, 1.0].map(|a| vec![(0.3, a * 0.09), (0.6, a * 0.36), (0.9, a * 0.81)]).to_vec();
        let capped = by_loss(&coarse, &sizes, 0.5).unwrap();
        assert!((capped[0] - 0.65).abs() < 1e-9 && (capped.iter().sum::<f64>() - 1.5).abs() < 1e-9, "{capped:?}");
        assert!(by_loss(&[vec![(0.2, 1.0)]], &sizes[..1], 0.5).unwrap_err().contains("the most is 0.2"));
        assert_eq!(loss_shares(0.2).len(), 3);
    }

    #[test]
    fn blocks_have_one_share_and_the_whole_has_the_target() {
        let sizes = sizes();
        let all: f64 = sizes.iter().map(|s| s.count()).sum();
        let total = |shares: &[f64]| shares.iter().zip(&sizes).map(|(s, n)| s * n.count()).sum::<f64>() / all;
        for shares in [
            by_block(&[0.3, 0.6], &[0, 0, 1, 1], &sizes, 0.5).unwrap(),
            by_scores(&[1.0, 2.5], &[0, 0, 1, 1], &sizes, 0.5, 0.1).unwrap(),
        ] {
            assert!((total(&shares) - 0.5).abs() < 1e-4, "{shares:?}");
            assert!(shares[0] == shares[1] && shares[2] == shares[3] && shares[0] != shares[2]);
        }
        let capped = by_scores(&[1.0, 1e9], &[0, 0, 1, 1], &sizes, 0.5, 0.1).unwrap();
        assert!((capped[0] - 0.6).abs() < 1e-3 && capped[2] < 0.5, "{capped:?}");
    }

    #[test]
    fn slips_and_impossible_targets_are_named() {
        assert!(Ratios::parse("lam").unwrap_err().contains("did you mean `lamp`"));
        assert_eq!(Ratios::parse("erk").unwrap().name(), "erk");
        let none = Ratios::Erk.allocate::<String>(0.995, &[Size { outputs: 4, inputs: 4 }], |_| Ok(vec![]));
        assert!(none.unwrap_err().contains("the most is 0.99"));
    }
}
