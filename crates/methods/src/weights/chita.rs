//! `chita`: weights and their places by the best least-squares fit with few weights that can be found.
//!
//! CHITA (Benbaki et al., arXiv:2302.14623; code mazumder-lab/CHITA) prunes by `min 1/2 ||y - A w||^2 + lambda ||w - w0||^2`
//! with at most k weights that are not zero: iterative hard thresholding with line searches, then an exact solution on the
//! places that were found. The paper takes `A` from gradients of the whole network. This is the form per layer: `A` is the
//! matrix of the inputs, so `A^T A` is the Gram matrix, no gradients are needed, and each row is a problem of its own, but for
//! the weights that all rows share. A step is `w + (A^T A)(w0 - w) / L`, the largest entries stay. Columns are scaled to one
//! norm first (the step is then the same for strong and weak inputs, and the first places are Wanda's). The damping of the
//! Gram matrix takes the place of `lambda`. With `steps` 0 the places are those of magnitude (the paper's fast heuristic): equal
//! masks for all texts, so that several outputs can be averaged.
//!
//! `steps` of thresholding cost a product of the matrix with the Gram matrix each; the exact solution factors a matrix as wide
//! as each row has weights, so wide layers take long: `outputs * (kept per row)^3 / 3` multiplications.

use super::tools::{
    KEEP, OF, check_finite,
    factor::{Damped, damped},
    select, share,
    solve::{noted, solved},
};
use crate::common::SPARSITY;
use faer::{Accum, Mat, MatRef, Par, linalg::matmul::matmul};
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Pattern, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};
use std::ops::Bound;

/// CHITA, per layer.
#[derive(Debug)]
pub struct Chita;

impl Method for Chita {
    fn name(&self) -> &'static str {
        "chita"
    }

    fn title(&self) -> &'static str {
        "CHITA per layer"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Fast as CHITA: Neural Network Pruning with Combinatorial Optimization (2023)",
            arxiv: Some("2302.14623"),
        }
    }

    fn summary(&self) -> &'static str {
        "Searches the places of the weights by iterative hard thresholding on the least-squares problem of the layer, and solves it exactly on them."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            SPARSITY,
            KEEP,
            OF,
            ParamSpec {
                name: "steps",
                doc: "steps of hard thresholding at most; 0: the places of the largest weights, solved exactly",
                default: 60.0,
                range: (Bound::Included(0.0), Bound::Included(10_000.0)),
            },
        ];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Chita {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Gram
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let (pattern, share) = (Pattern::of(params), share(params, layer));
        select::check_runs(layer, pattern)?;
        let damped = damped(layer)?;
        if share == 0.0 && pattern == Pattern::Free && layer.kept.is_none() {
            return Ok(Changed {
                weight: layer.weight.to_vec(),
                kept: None,
                codes: None,
                books: None,
                low_rank: None,
                notes: Vec::new(),
            });
        }
        let problem = Problem::new(layer, &damped);
        let choose = |w: &[f64]| -> Result<Vec<bool>, MethodError> {
            let mut scores: Vec<f32> = w.iter().map(|x| x.abs() as f32).collect();
            select::after_earlier(&mut scores, layer.kept);
            let mut kept = select::mask(layer, &scores, select::Scope::Layer, pattern, share)?;
            // A run may have lost more before than its pattern takes.
            layer.kept.into_iter().for_each(|before| kept.iter_mut().zip(before).for_each(|(k, b)| *k &= b));
            Ok(kept)
        };
        let kept = match params.get("steps") as usize {
            0 => choose(&layer.weight.iter().map(|w| f64::from(*w)).collect::<Vec<f64>>())?,
            steps => search(&problem, steps, &choose)?,
        };
        let (mut weight, unsolved) = solved(layer, &damped.gram, &kept);
        weight.iter_mut().enumerate().filter(|(i, _)| damped.dead[i % layer.inputs]).for_each(|(_, w)| *w = 0.0);
        Ok(Changed {
            weight,
            kept: Some(kept),
            codes: None,
            books: None,
            low_rank: None,
            notes: noted(layer, damped.notes, &unsolved),
        })
    }
}

/// `min 1/2 tr((V - V0) H (V - V0)^T)` in columns of one norm: `V = W D`, `H = D^-1 C D^-1` for the damped Gram matrix `C`
/// and the roots `D` of its diagonal.
struct Problem {
    rows: usize,
    cols: usize,
    start: Vec<f64>,
    gram: Mat<f64>,
    /// Above the largest eigenvalue of `gram`.
    lipschitz: f64,
}

impl Problem {
    fn new(layer: &Layer<'_>, damped: &Damped) -> Self {
        let (rows, cols) = (layer.outputs, layer.inputs);
        let roots: Vec<f64> = (0..cols).map(|j| damped.gram[(j, j)].sqrt()).collect();
        // Weights of inputs that were always zero do nothing, and go first.
        let scale = |j: usize| if damped.dead[j] { 0.0 } else { roots[j] };
        let start = layer.weight.iter().enumerate().map(|(i, w)| f64::from(*w) * scale(i % cols)).collect();
        let gram = Mat::from_fn(cols, cols, |i, j| damped.gram[(i, j)] / (roots[i] * roots[j]));
        let lipschitz = 1.05 * largest_eigenvalue(&gram);
        Self { rows, cols, start, gram, lipschitz }
    }

    /// `(V0 - V) H`, which is the way down, and the objective.
    fn descent(&self, v: &[f64]) -> (Vec<f64>, f64) {
        let lost: Vec<f64> = self.start.iter().zip(v).map(|(a, b)| a - b).collect();
        let mut out = Mat::<f64>::zeros(self.rows, self.cols);
        let e = MatRef::from_row_major_slice(&lost, self.rows, self.cols);
        matmul(out.as_mut(), Accum::Replace, e, self.gram.as_ref(), 1.0, Par::rayon(0));
        let down: Vec<f64> = (0..lost.len()).map(|i| out[(i / self.cols, i % self.cols)]).collect();
        let objective = 0.5 * lost.iter().zip(&down).map(|(a, b)| a * b).sum::<f64>();
        (down, objective)
    }
}

/// By power iterations from a vector of ones with small differences; the trace bounds it.
fn largest_eigenvalue(a: &Mat<f64>) -> f64 {
    let n = a.nrows();
    let mut x = Mat::from_fn(n, 1, |i, _| 1.0 + 0.01 * ((i * 37 % 101) as f64 / 101.0));
    let mut found = 0.0;
    for _ in 0..50 {
        let y = a * &x;
        let norm = (0..n).map(|i| y[(i, 0)] * y[(i, 0)]).sum::<f64>().sqrt();
        if norm <= 0.0 {
            break;
        }
        found = norm / (0..n).map(|i| x[(i, 0)] * x[(i, 0)]).sum::<f64>().sqrt();
        x = Mat::from_fn(n, 1, |i, _| y[(i, 0)] / norm);
    }
    let trace = (0..n).map(|i| a[(i, i)]).sum::<f64>();
    if found > 0.0 { found.min(trace) } else { trace.max(1.0) }
}

/// Relative gain below which the search ends.
const LEAST_GAIN: f64 = 1e-6;
/// Doublings of a step that are tried.
const DOUBLINGS: usize = 5;

/// Which entries stay, by their values.
type Choose<'a> = dyn Fn(&[f64]) -> Result<Vec<bool>, MethodError> + 'a;

/// A point of the search.
struct Point {
    kept: Vec<bool>,
    v: Vec<f64>,
    /// The way down from it.
    down: Vec<f64>,
    objective: f64,
}

impl Point {
    /// The point one step from `v` along `down`, with the largest entries.
    fn at(p: &Problem, v: &[f64], down: &[f64], step: f64, choose: &Choose<'_>) -> Result<Self, MethodError> {
        let mut v: Vec<f64> = v.iter().zip(down).map(|(v, d)| v + step * d).collect();
        let kept = choose(&v)?;
        v.iter_mut().zip(&kept).filter(|(_, k)| !**k).for_each(|(v, _)| *v = 0.0);
        let (down, objective) = p.descent(&v);
        Ok(Self { kept, v, down, objective })
    }
}

/// The places that hard thresholding finds; the objective falls with every step.
fn search(p: &Problem, steps: usize, choose: &Choose<'_>) -> Result<Vec<bool>, MethodError> {
    let mut now = Point::at(p, &p.start, &vec![0.0; p.start.len()], 0.0, choose)?;
    for _ in 0..steps {
        let mut best: Option<Point> = None;
        let mut step = 1.0 / p.lipschitz;
        for _ in 0..=DOUBLINGS {
            let next = Point::at(p, &now.v, &now.down, step, choose)?;
            if next.objective >= best.as_ref().map_or(now.objective, |b| b.objective) {
                break;
            }
            best = Some(next);
            step *= 2.0;
        }
        let Some(best) = best else { break };
        let gain = now.objective - best.objective;
        now = best;
        if gain < LEAST_GAIN * now.objective {
            break;
        }
    }
    Ok(now.kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{
        magnitude::Magnitude,
        tools::{
            factor::solve,
            testing::{Case, run},
        },
        wanda::Wanda,
    };

    #[test]
    fn inputs_that_do_not_hang_together_leave_magnitude() {
        let mut case = Case::random(70, 12, 20, 0);
        case.seen.gram = Some((0..400).map(|i| if i % 21 == 0 { 5.0 } else { 0.0 }).collect());
        let out = run(&Chita, &[("sparsity", 0.5)], &case.layer()).unwrap();
        assert_eq!(out, run(&Magnitude, &[("sparsity", 0.5)], &case.layer()).unwrap());
    }

    #[test]
    fn the_objective_falls_with_every_step() {
        let case = Case::random(71, 8, 40, 120);
        let damped = damped(&case.layer()).unwrap();
        let problem = Problem::new(&case.layer(), &damped);
        let choose = |w: &[f64]| {
            let scores: Vec<f32> = w.iter().map(|x| x.abs() as f32).collect();
            select::mask(&case.layer(), &scores, select::Scope::Layer, Pattern::Free, 0.6)
        };
        let error = |steps: usize| {
            let kept = search(&problem, steps, &choose).unwrap();
            assert_eq!(kept.iter().filter(|k| **k).count(), 128);
            case.output_error(&solved(&case.layer(), &damped.gram, &kept).0)
        };
        let errors: Vec<f64> = [0, 1, 3, 10, 60].map(error).to_vec();
        assert!(errors[4] < errors[0], "{errors:?}");
    }

    /// The exact step against the normal equations by another route, in double precision.
    #[test]
    fn the_last_step_solves_the_normal_equations() {
        let case = Case::random(72, 3, 30, 100);
        let damped = damped(&case.layer()).unwrap();
        let kept: Vec<bool> = (0..90).map(|i| i * 7 % 3 != 0).collect();
        let weight = solved(&case.layer(), &damped.gram, &kept).0;
        for r in 0..3 {
            let places: Vec<usize> = (0..30).filter(|j| kept[r * 30 + j]).collect();
            let at = |i: usize, j: usize| damped.gram[(places[i], places[j])];
            let right = |i: usize| {
                (0..30).map(|j| damped.gram[(places[i], j)] * f64::from(case.weight[r * 30 + j])).sum::<f64>()
            };
            let x = solve(places.len(), at, &Mat::from_fn(places.len(), 1, |i, _| right(i))).unwrap();
            for (i, j) in places.iter().enumerate() {
                assert!((f64::from(weight[r * 30 + j]) - x[(i, 0)]).abs() < 1e-6, "{r} {j}");
            }
        }
    }

    /// One row of ten inputs, three of which stay: the found places are mostly those of the best of all 120 choices, and never
    /// better.
    #[test]
    fn small_problems_against_all_choices() {
        let mut best_found = 0;
        for seed in 0..20 {
            let case = Case::random(100 + seed, 1, 10, 60);
            let damped = damped(&case.layer()).unwrap();
            let error = |weight: &[f32]| {
                let d: Vec<f64> = case.weight.iter().zip(weight).map(|(a, b)| f64::from(a - b)).collect();
                (0..100).map(|i| d[i / 10] * damped.gram[(i / 10, i % 10)] * d[i % 10]).sum::<f64>()
            };
            let of = |bits: u32| (0..10).map(|j| bits >> j & 1 == 1).collect::<Vec<bool>>();
            let all = (0..1024_u32).filter(|b| b.count_ones() == 3);
            let best = all.map(|b| error(&solved(&case.layer(), &damped.gram, &of(b)).0)).fold(f64::MAX, f64::min);
            let out = run(&Chita, &[("sparsity", 0.7)], &case.layer()).unwrap();
            let found = error(&out.weight);
            assert!(found >= best * (1.0 - 1e-6), "{seed}: {found} {best}");
            best_found += usize::from(found <= best * (1.0 + 1e-6));
        }
        assert!(best_found >= 8, "{best_found} of 20");
    }

    #[test]
    fn outputs_change_less_than_wandas() {
        let case = Case::random(73, 40, 200, 600);
        for given in [&[("sparsity", 0.5)][..], &[("keep", 2.0), ("of", 4.0)]] {
            let ours = case.output_error(&run(&Chita, given, &case.layer()).unwrap().weight);
            let wanda = case.output_error(&run(&Wanda, given, &case.layer()).unwrap().weight);
            assert!(ours < 0.8 * wanda, "{given:?}: {ours} {wanda}");
        }
    }

    #[test]
    fn without_steps_the_mask_does_not_depend_on_the_text() {
        let (a, mut b) = (Case::random(75, 10, 60, 200), Case::random(76, 10, 60, 200));
        b.weight.clone_from(&a.weight);
        let [of_a, of_b] = [&a, &b].map(|c| run(&Chita, &[("sparsity", 0.5), ("steps", 0.0)], &c.layer()).unwrap());
        assert_eq!(of_a.kept, of_b.kept);
        assert_ne!(of_a.weight, of_b.weight);
        let magnitude = run(&Magnitude, &[("sparsity", 0.5)], &a.layer()).unwrap();
        assert_eq!(of_a.kept, magnitude.kept);
        assert!(a.output_error(&of_a.weight) < a.output_error(&magnitude.weight));
    }

    #[test]
    fn what_an_earlier_step_left_is_its_goal() {
        let case = Case::random(74, 10, 60, 200);
        let early = run(&Magnitude, &[("sparsity", 0.5)], &case.layer()).unwrap();
        let layer = Layer { weight: &early.weight, kept: early.kept.as_deref(), ..case.layer() };
        let late = run(&Chita, &[("sparsity", 0.0)], &layer).unwrap();
        assert_eq!(late.kept, early.kept);
        assert_eq!(late.weight, early.weight, "the zeros of the earlier step are part of what it is held to");
    }
}
