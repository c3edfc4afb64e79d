//! `cett`: drop as many inputs of down as a given relative error of its output allows, in every layer alike.
//!
//! Luo et al., Sparsing Law (arXiv:2411.02335). With `n_i = |h_i| * ||W_down[:, i]||`, CETT(t) is the mean over tokens of
//! `||sum over n_i <= t of h_i W_down[:, i]|| / ||W_down h||`; each layer gets the largest `t` with CETT at most `error`.
//! One number sets every layer's budget. Bisecting it until the perplexity rises by p % is PPL-p%
//! (`lacuna calibrate --ppl-percent`). The rule needs `h`, hence gate and up in full: it saves a third of the MLP at most,
//! and is the yardstick for other methods. The search starts from the error that columns at right angles would have and
//! corrects it with three exact evaluations on sampled tokens.

use crate::common::{mlp_layers, not_applicable};
use lacuna_core::{
    method::{Citation, Method, MethodError, Needs, ParamSpec, Params, PlanContext},
    plan::{Cut, Entry, Rule, Selector},
    site::{Point, Proj, Site},
    statistics::{Gather, Observation, Rows},
    weight::Orientation,
};
use std::ops::Bound;

/// Equal errors of down.
#[derive(Debug)]
pub struct Cett;

/// Sampled tokens per layer.
const TOKENS: usize = 128;

fn point(layer: usize) -> Point {
    Point::Input { layer, proj: Proj::Down }
}

impl Method for Cett {
    fn name(&self) -> &'static str {
        "cett"
    }

    fn title(&self) -> &'static str {
        "CETT, equal relative errors of down"
    }

    fn site(&self) -> Site {
        Site::Activations
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity (2024)",
            arxiv: Some("2411.02335"),
        }
    }

    fn summary(&self) -> &'static str {
        "Drops inputs of down by magnitude times column norm until its output is wrong by a given share, in every layer alike."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[ParamSpec {
            name: "error",
            doc: "mean relative error of each layer's down output (the CETT value)",
            default: 0.2,
            range: (Bound::Included(0.0), Bound::Included(1.0)),
        }];
        PARAMS
    }

    fn layouts(&self) -> &'static [Orientation] {
        &[Orientation::InputMajor]
    }

    fn needs(&self, _: &Params, ctx: PlanContext<'_>) -> Needs {
        let mut observations = Vec::new();
        for (layer, _) in mlp_layers(&ctx) {
            observations.push(Observation { point: point(layer), gather: Gather::Rows { every: 61, most: TOKENS } });
            let norms = ctx.weights.column_norms(layer, &[Proj::Down]);
            observations.extend(norms.map(|n| Observation::scores(point(layer), n)));
        }
        Needs { observations, tokens: 8_000 }
    }

    fn plan(&self, params: &Params, ctx: PlanContext<'_>) -> Result<Vec<Entry>, MethodError> {
        ctx.statistics.check()?;
        let error = params.get("error");
        let mut entries = Vec::new();
        for (layer, _) in mlp_layers(&ctx) {
            let missing = || MethodError::NoStatistics { method: self.name().into(), point: point(layer) };
            let norms = ctx.weights.column_norms(layer, &[Proj::Down]).ok_or_else(missing)?;
            let rows = ctx.statistics.rows(point(layer)).ok_or_else(missing)?;
            let seen = ctx.statistics.scores(point(layer), Some(&norms)).ok_or_else(missing)?;
            let matrix = ctx.weights.matrix(layer, Proj::Down).ok_or_else(missing)?;
            let (selector, kept) = if error <= 0.0 {
                (Selector::non_zero(), seen.nonzero_share())
            } else {
                let threshold = Tail { rows, norms: norms.values(), matrix: &matrix }.threshold(error);
                (
                    Selector { scale: Some(norms.clone()), unit: false, cut: Cut::Above { threshold } },
                    seen.kept_share(threshold),
                )
            };
            entries.push(Entry { layer, rule: Rule::inputs(Proj::Down, selector), kept: Some(kept as f32) });
        }
        if entries.is_empty() {
            return not_applicable(self, "it has no MLP outside experts");
        }
        Ok(entries)
    }
}

/// Inputs of one down projection, its column norms and `W`, `[outputs, inputs]`.
struct Tail<'a> {
    rows: &'a Rows,
    norms: &'a [f32],
    matrix: &'a [f32],
}

impl Tail<'_> {
    /// About the largest threshold whose CETT is at most `error`.
    fn threshold(&self, error: f64) -> f32 {
        let full = self.outputs(f32::NEG_INFINITY, true);
        let sizes: Vec<f64> = full.iter().map(|y| norm(y)).collect();
        let mut scores: Vec<f32> =
            self.rows.values.iter().zip(self.norms.iter().cycle()).map(|(h, c)| (h * c).abs()).collect();
        scores.sort_unstable_by(f32::total_cmp);
        let (mut factor, mut best) = (1.0, 0.0_f32);
        for _ in 0..3 {
            // The largest candidate whose corrected estimate fits.
            let (mut low, mut high) = (0, scores.len());
            while low < high {
                let middle = (low + high) / 2;
                if self.estimate(scores[middle], &sizes) * factor <= error { low = middle + 1 } else { high = middle }
            }
            let Some(t) = low.checked_sub(1).map(|i| scores[i]) else { break };
            let exact = self.cett(t, &sizes);
            if exact <= error {
                best = best.max(t);
            }
            let guess = self.estimate(t, &sizes);
            if guess <= 0.0 || exact <= 0.0 {
                break;
            }
            factor = exact / guess;
        }
        best
    }

    /// CETT(t).
    fn cett(&self, t: f32, sizes: &[f64]) -> f64 {
        let tails = self.outputs(t, false);
        mean(tails.iter().zip(sizes).map(|(y, size)| if *size > 0.0 { norm(y) / size } else { 0.0 }))
    }

    /// CETT(t) if the columns were at right angles.
    fn estimate(&self, t: f32, sizes: &[f64]) -> f64 {
        let rows = self.rows.values.chunks_exact(self.rows.width);
        mean(rows.zip(sizes).map(|(row, size)| {
            let scores = row.iter().zip(self.norms).map(|(h, c)| (h * c).abs());
            let dropped: f64 = scores.filter(|n| *n <= t).map(|n| f64::from(n) * f64::from(n)).sum();
            if *size > 0.0 { dropped.sqrt() / size } else { 0.0 }
        }))
    }

    /// `W h` of every row, over all inputs or those with `n_i <= t`.
    fn outputs(&self, t: f32, all: bool) -> Vec<Vec<f32>> {
        let width = self.rows.width;
        let keep = |h: f32, c: f32| all || (h * c).abs() <= t;
        let part = |row: &[f32]| -> Vec<f32> {
            row.iter().zip(self.norms).map(|(h, c)| if keep(*h, *c) { *h } else { 0.0 }).collect()
        };
        let dot = |h: &[f32]| self.matrix.chunks_exact(width).map(|w| dot(w, h)).collect();
        self.rows.values.chunks_exact(width).map(|row| dot(&part(row))).collect()
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

fn norm(y: &[f32]) -> f64 {
    y.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0_u32), |(s, n), v| (s + v, n + 1));
    sum / f64::from(n.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Columns, kept_of, layers, normal, planned};

    fn entry(error: f64, norms: &[f32]) -> Entry {
        let data = |_: Point, width: usize| normal(8, width * 2000);
        let mut all = planned(&Cett, &[("error", error)], &layers(1, "silu"), &Columns(norms.to_vec()), data);
        all.remove(0)
    }

    #[test]
    fn no_error_drops_nothing_and_full_error_may_drop_everything() {
        let norms = [1.0; 8];
        assert_eq!(entry(0.0, &norms).rule.selector(), &Selector::non_zero());
        assert!(entry(1.0, &norms).kept.unwrap() < 0.01);
        let shares: Vec<f32> = [0.05, 0.1, 0.2, 0.4].iter().map(|e| entry(*e, &norms).kept.unwrap()).collect();
        assert!(shares.array_windows().all(|[a, b]| a > b), "{shares:?}");
    }

    #[test]
    fn the_error_on_orthogonal_columns_is_the_asked_one() {
        let norms = [1.0, 0.5, 2.0, 1.0, 3.0, 0.1, 1.0, 1.5];
        let e = entry(0.3, &norms);
        let rows = normal(8, 8 * 2000);
        let errors = rows.chunks_exact(8).step_by(61).map(|h| {
            let kept = kept_of(e.rule.selector(), h);
            let size = |i: &usize| f64::from(h[*i] * norms[*i]).powi(2);
            let all: f64 = (0..8).map(|i| size(&i)).sum();
            ((0..8).filter(|i| !kept.contains(&(*i as u32))).map(|i| size(&i)).sum::<f64>() / all).sqrt()
        });
        let error = mean(errors);
        assert!(error <= 0.3 + 1e-6 && error > 0.25, "{error}");
    }

    /// A larger down projection scales the threshold and leaves the mask.
    #[test]
    fn scaling_down_leaves_the_mask() {
        let norms = [1.0_f32, 0.5, 2.0, 1.0, 3.0, 0.1, 1.0, 1.5];
        let (a, b) = (entry(0.3, &norms), entry(0.3, &norms.map(|n| 4.0 * n)));
        let x = normal(3, 8);
        assert_eq!(kept_of(a.rule.selector(), &x), kept_of(b.rule.selector(), &x));
        assert_eq!(a.kept, b.kept);
    }
}
