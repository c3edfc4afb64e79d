//! `gpfq`: greedy path following.
//!
//! Zhang, Zhou and Saab (arXiv:2201.11113; code YixuanSeanZhou/Quantized_Neural_Nets): walk through the inputs of a neuron,
//! carry the running error `u` of its outputs over the calibration tokens, and choose each code so that `u` stays small:
//! `u += w_t X_t; q_t = Q(<X_t, u> / ||X_t||^2); u -= q_t X_t`. No inverse is needed, and the error has a proof. The tokens
//! themselves are not kept: `<X_t, u> = w_t G_tt + sum over s < t of (w_s - q_s) G_ts` with the Gram matrix `G`, which is the
//! same number. Both `X` of the paper are the inputs behind compressed predecessors here.
//!
//! Differences: one scale for each group of columns, as all grids here have, instead of one per layer, which is too coarse for
//! language models; columns in the order of falling norms (`order`), which leaves less error; the hard
//! form puts survivors on the same grid, so that codes stay whole numbers. `soft` and `hard` give zeros along with codes: an
//! L1 and an L0 penalty, in steps of the grid. With fewer tokens than inputs prefer `gptq`.

use super::tools::{
    GROUP, bits, check_finite,
    factor::seen,
    grid::{self, Grid},
    rows,
};
use crate::common::switch;
use lacuna_core::{
    compress::{Changed, Compressor, Layer, Sight},
    method::{Citation, Method, MethodError, ParamSpec, Params},
    site::Site,
};
use std::ops::Bound;

/// GPFQ.
#[derive(Debug)]
pub struct Gpfq;

const fn penalty(name: &'static str, doc: &'static str) -> ParamSpec {
    ParamSpec { name, doc, default: 0.0, range: (Bound::Included(0.0), Bound::Included(64.0)) }
}

impl Method for Gpfq {
    fn name(&self) -> &'static str {
        "gpfq"
    }

    fn title(&self) -> &'static str {
        "Greedy path following quantization"
    }

    fn site(&self) -> Site {
        Site::Weights
    }

    fn citation(&self) -> Citation {
        Citation {
            paper: "Post-training Quantization for Neural Networks with Provable Guarantees (2022)",
            arxiv: Some("2201.11113"),
        }
    }

    fn summary(&self) -> &'static str {
        "Rounds weights one after the other so that the running error of the outputs stays small, without an inverse; can give zeros along with codes."
    }

    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            bits("bits of a code", 2.0, 4.0),
            GROUP,
            penalty("soft", "magnitude that is taken off before rounding, in steps of the grid (L1)"),
            penalty("hard", "magnitude up to which codes are zero, in steps of the grid (L0)"),
            switch("order", "columns in the order of falling norms instead of their own", true),
        ];
        PARAMS
    }

    fn compressor(&self) -> Option<&dyn Compressor> {
        Some(self)
    }
}

impl Compressor for Gpfq {
    fn sight(&self, _: &Params) -> Sight {
        Sight::Gram
    }

    fn compress(&self, params: &Params, layer: &Layer<'_>) -> Result<Changed, MethodError> {
        check_finite(layer)?;
        let Some(grid) = Grid::of(params, layer)? else { unreachable!("bits are at least 2 by their range") };
        let walk = Walk::new(layer, params.get("order") > 0.0)?;
        let (soft, hard) = (params.get("soft") as f32, params.get("hard") as f32);
        let rule = Rule { grid, soft, hard };
        let mut codes = grid.codes(layer);
        for (w, scale) in layer.weight.chunks_exact(grid.group).zip(&mut codes.scales) {
            *scale = grid.scale(w.iter().copied());
        }
        let (n, scales) = (layer.inputs, &codes.scales);
        rows::each(layer.pool, &mut codes.codes, n, |r, out| {
            let w = &layer.weight[r * n..][..n];
            let kept = layer.kept.map(|k| &k[r * n..][..n]);
            walk.row(rule, w, kept, &scales[r * n / grid.group..][..n / grid.group], out);
        });
        let (weight, kept) = (grid::decode(&codes), layer.kept.map(<[bool]>::to_vec));
        Ok(Changed { weight, kept, codes: Some(codes), books: None, low_rank: None, notes: walk.notes })
    }
}

/// How a number becomes a code.
#[derive(Clone, Copy)]
struct Rule {
    grid: Grid,
    soft: f32,
    hard: f32,
}

impl Rule {
    fn code(self, p: f32, scale: f32) -> i8 {
        if p.abs() <= self.hard * scale && self.hard > 0.0 {
            return 0;
        }
        let shrunk = (p.abs() - self.soft * scale).max(0.0);
        self.grid.code(shrunk.copysign(p), scale)
    }
}

/// The order of the columns, and what each takes from the errors of those before it.
struct Walk {
    order: Vec<usize>,
    /// `G_ts / G_tt` for `s` before `t` in the order, row after row of a triangle; zero where `G_tt` is.
    pulls: Vec<f32>,
    dead: Vec<bool>,
    notes: Vec<String>,
}

impl Walk {
    fn new(layer: &Layer<'_>, by_norm: bool) -> Result<Self, MethodError> {
        let (_, gram) = seen(layer)?;
        let n = layer.inputs;
        let square = |j: usize| gram[j * n + j];
        let mut order: Vec<usize> = (0..n).collect();
        if by_norm {
            order.sort_by(|a, b| square(*b).total_cmp(&square(*a)));
        }
        let mut pulls = Vec::with_capacity(n * (n + 1) / 2);
        for (t, j) in order.iter().enumerate() {
            let whole = square(*j);
            let pull = |s: &usize| if whole > 0.0 { (gram[j * n + s] / whole) as f32 } else { 0.0 };
            pulls.extend(order[..t].iter().map(pull));
        }
        let dead: Vec<bool> = (0..n).map(|j| square(j) <= 0.0).collect();
        let count = dead.iter().filter(|d| **d).count();
        let place = layer.place;
        let told = format!("{place}: {count} of {n} inputs were zero for all tokens; their weights become zero");
        let notes = if count > 0 { vec![told] } else { Vec::new() };
        Ok(Self { order, pulls, dead, notes })
    }

    /// The codes of one row.
    fn row(&self, rule: Rule, w: &[f32], kept: Option<&[bool]>, scales: &[f32], codes: &mut [i8]) {
        let mut errors: Vec<f32> = Vec::with_capacity(w.len());
        let mut pulls = &self.pulls[..];
        for (t, &j) in self.order.iter().enumerate() {
            let (now, rest) = pulls.split_at(t);
            pulls = rest;
            let carried: f32 = now.iter().zip(&errors).map(|(g, e)| g * e).sum();
            let scale = scales[j / rule.grid.group];
            let stays = !self.dead[j] && kept.is_none_or(|k| k[j]);
            codes[j] = if stays { rule.code(w[j] + carried, scale) } else { 0 };
            errors.push(w[j] - f32::from(codes[j]) * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;
    use crate::weights::{
        rtn::Rtn,
        tools::testing::{Case, run},
        wanda::Wanda,
    };

    #[test]
    fn columns_that_do_not_hang_together_leave_rounding_to_nearest() {
        let mut case = Case::random(30, 12, 40, 0);
        case.seen.gram = Some((0..1600).map(|i| if i % 41 == 0 { 5.0 } else { 0.0 }).collect());
        let given = [("bits", 3.0), ("group", 20.0)];
        assert_eq!(run(&Gpfq, &given, &case.layer()).unwrap(), run(&Rtn, &given, &case.layer()).unwrap());
    }

    /// The published walk over the tokens themselves, in double precision.
    #[test]
    fn the_gram_matrix_tells_what_the_tokens_tell() {
        let (tokens, n) = (50, 24);
        let x: Vec<f64> = normal(31, tokens * n).into_iter().map(f64::from).collect();
        let column = |t: usize| x.iter().skip(t).step_by(n);
        let dot = |a: usize, b: usize| column(a).zip(column(b)).map(|(a, b)| a * b).sum::<f64>();
        let mut case = Case::random(32, 1, n, 0);
        case.seen.gram = Some((0..n * n).map(|i| dot(i / n, i % n)).collect());
        let out = run(&Gpfq, &[("bits", 3.0), ("order", 0.0)], &case.layer()).unwrap();
        let codes = out.codes.unwrap();
        let (grid, scale) = (Grid { bits: 3, group: n }, codes.scales[0]);
        let mut u = vec![0.0; tokens];
        for t in 0..n {
            u.iter_mut().zip(column(t)).for_each(|(u, x)| *u += f64::from(case.weight[t]) * x);
            let p = u.iter().zip(column(t)).map(|(u, x)| u * x).sum::<f64>() / dot(t, t);
            let q = grid.code(p as f32, scale);
            assert_eq!(codes.codes[t], q, "column {t}");
            u.iter_mut().zip(column(t)).for_each(|(u, x)| *u -= f64::from(q) * f64::from(scale) * x);
        }
        let error = u.iter().map(|u| u * u).sum::<f64>();
        assert!((case.output_error(&out.weight) / error - 1.0).abs() < 1e-4, "{error}");
    }

    #[test]
    fn outputs_change_less_than_by_rounding_to_nearest() {
        let better = (0..100).filter(|seed| {
            let case = Case::random(500 + seed, 8, 64, 200);
            let error = |m: &dyn Method| {
                case.output_error(&run(m, &[("bits", 3.0), ("group", 32.0)], &case.layer()).unwrap().weight)
            };
            error(&Gpfq) <= error(&Rtn)
        });
        let better = better.count();
        assert!(better >= 95, "only {better} of 100 layers");
    }

    #[test]
    fn fine_grids_leave_no_error_and_penalties_give_zeros() {
        let case = Case::random(33, 8, 64, 200);
        let out = |given: &[(&str, f64)]| run(&Gpfq, given, &case.layer()).unwrap().weight;
        let all = case.output_error(&vec![0.0; 8 * 64]);
        assert!(case.output_error(&out(&[("bits", 8.0), ("group", 16.0)])) < 1e-4 * all);
        let zeros = |w: &[f32]| w.iter().filter(|w| **w == 0.0).count();
        let plain = zeros(&out(&[("bits", 4.0)]));
        for name in ["soft", "hard"] {
            let (one, two) = (zeros(&out(&[(name, 1.0)])), zeros(&out(&[(name, 2.0)])));
            assert!(plain < one && one < two, "{name}: {plain} {one} {two}");
        }
    }

    #[test]
    fn zeros_of_a_mask_stay_and_dead_inputs_give_zeros() {
        let mut case = Case::random(34, 16, 32, 300);
        if let Some(gram) = &mut case.seen.gram {
            (0..32).for_each(|i| (gram[3 * 32 + i], gram[i * 32 + 3]) = (0.0, 0.0));
        }
        let pruned = run(&Wanda, &[("sparsity", 0.5)], &case.layer()).unwrap();
        let layer = Layer { weight: &pruned.weight, kept: pruned.kept.as_deref(), ..case.layer() };
        let out = run(&Gpfq, &[], &layer).unwrap();
        assert_eq!(out.kept, pruned.kept);
        assert!(out.weight.iter().zip(pruned.kept.unwrap()).all(|(w, k)| k || *w == 0.0));
        assert!((0..16).all(|r| out.weight[r * 32 + 3] == 0.0) && out.notes[0].contains("1 of 32"), "{:?}", out.notes);
    }
}
