//! Searches for budgets: which share to drop at which place, given a share for the whole model.
//!
//! Both searches run single blocks on the residual stream that the dense model has before them, and compare what the
//! block leaves with what the dense block leaves. [`Search::greedy`] is TEAL's: within each block, take the next slice of
//! weights where it hurts least. [`Curves::equal_error`] gives every block the share at which its relative error is the
//! same for all (the idea of CETT): one number, bisected. Neither knows which method it searches for.

use super::{Subject, checkpoint::Checkpoint};
use crate::{
    engine::{Engine, compile::masked_layer, probe::Probe},
    error::{Error, Result},
};
use lacuna_core::{
    method::{Budgets, Params, PlanContext},
    plan::{Entry, Rule, Selector},
    site::Proj,
    statistics::Statistics,
};
use lacuna_methods::registry::Resolved;
use std::{collections::BTreeMap, path::Path};

/// Share of a block's weights that one greedy step takes away.
pub const GREEDY_STEP: f64 = 0.02;

/// Largest share that is dropped at one place.
const MOST: f64 = 0.99;

/// A search for the budgets of one method.
pub struct Search<'a> {
    /// The method; its first parameter is a share.
    pub step: &'a Resolved,
    /// The model as methods see it.
    pub subject: &'a Subject,
    /// What the method wanted to see.
    pub statistics: &'a Statistics,
    /// The dense engine.
    pub engine: &'a Engine,
    /// Sequences that errors are measured on.
    pub windows: &'a [Vec<u32>],
}

/// What a search found for one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerFound {
    /// Error of the block with what was found, and with the same share everywhere.
    pub errors: (f64, f64),
    /// Shares by place.
    pub dropped: BTreeMap<Proj, f64>,
}

/// Places that share one selection, and the weights behind them.
struct Group {
    places: Vec<Proj>,
    weights: f64,
}

impl Search<'_> {
    /// TEAL's greedy search within every block for `share` of its weights, `grain` of them per step. Layers that `stored`
    /// already has are taken from there, and each finished one is added to it. `progress(layer, layers)`.
    ///
    /// # Errors
    /// The method takes no share, or what passes return.
    pub fn greedy(
        &self,
        (share, grain): (f64, f64),
        stored: Option<&Path>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(Budgets, Vec<LayerFound>)> {
        let layers = self.subject.layers.len();
        let key = self.key(&format!("greedy {share} {grain}"));
        let mut checkpoint = Checkpoint::open(stored, &key);
        let mut walk = Walk::new(self)?;
        for layer in 0..layers {
            if checkpoint.layer(layer).is_none() {
                let found = self.greedy_layer(&mut walk, layer, share, grain)?;
                checkpoint.add(layer, found)?;
            }
            walk.advance(layer)?;
            progress(layer + 1, layers);
        }
        let found: Vec<LayerFound> = (0..layers).filter_map(|l| checkpoint.layer(l)).collect();
        let mut budgets = Budgets::default();
        for (layer, f) in found.iter().enumerate() {
            budgets.dropped.extend(f.dropped.iter().map(|(p, s)| ((layer, *p), *s)));
        }
        Ok((budgets, found))
    }

    fn greedy_layer(&self, walk: &mut Walk<'_>, layer: usize, share: f64, grain: f64) -> Result<LayerFound> {
        let groups = self.groups(layer)?;
        let all: f64 = groups.iter().map(|g| g.weights).sum();
        let mut dropped = vec![0.0; groups.len()];
        let mut left = share * all;
        let mut error = 0.0;
        while left > 1e-9 * all {
            let slice = left.min(grain * all);
            let mut best: Option<(usize, f64, f64)> = None;
            for (g, group) in groups.iter().enumerate().filter(|(g, _)| dropped[*g] < MOST - 1e-9) {
                let next = (dropped[g] + slice / group.weights).min(MOST);
                let shares = |i: usize| if i == g { next } else { dropped[i] };
                let e = walk.error(layer, &budgets_of(layer, &groups, shares))?;
                if best.is_none_or(|b| e < b.1) {
                    best = Some((g, e, next));
                }
            }
            let Some((g, e, next)) = best else { break };
            left -= (next - dropped[g]) * groups[g].weights;
            (dropped[g], error) = (next, e);
        }
        let uniform = walk.error(layer, &budgets_of(layer, &groups, |_| share))?;
        let places = groups.iter().zip(&dropped).flat_map(|(g, s)| g.places.iter().map(move |p| (*p, *s)));
        Ok(LayerFound { errors: (error, uniform), dropped: places.collect() })
    }

    /// The same share at every place of every layer.
    pub fn everywhere(subject: &Subject, share: f64) -> Budgets {
        let places = |l: usize| Proj::ALL.map(|p| ((l, p), share));
        Budgets { dropped: (0..subject.layers.len()).flat_map(places).collect() }
    }

    /// A name for what is searched, for the file of its state.
    pub fn name(&self) -> String {
        self.key("search")[..24].to_owned()
    }

    /// Relative errors `||sparse - dense|| / ||dense||` of every block at shares from 0.1 to 0.9, the same at all places.
    ///
    /// # Errors
    /// As [`Search::greedy`].
    pub fn curves(&self, progress: &mut dyn FnMut(usize, usize)) -> Result<Curves> {
        let layers = self.subject.layers.len();
        let (mut walk, mut all) = (Walk::new(self)?, Vec::with_capacity(layers));
        for layer in 0..layers {
            let groups = self.groups(layer)?;
            let mut errors = vec![0.0];
            for i in 1..=GRID {
                let share = i as f64 * 0.1;
                let e = walk.relative(layer, &budgets_of(layer, &groups, |_| share))?;
                // Errors rise with the share; noise must not make the curve ambiguous.
                errors.push(f64::max(e, errors[i - 1]));
            }
            let places = groups.iter().flat_map(|g| g.places.clone()).collect();
            all.push(Curve { errors, places, weights: groups.iter().map(|g| g.weights).sum() });
            walk.advance(layer)?;
            progress(layer + 1, layers);
        }
        Ok(Curves(all))
    }

    /// Places of `layer` that share a selection, by the plan at the middle of the scale.
    fn groups(&self, layer: usize) -> Result<Vec<Group>> {
        let shape = &self.subject.layers[layer];
        let mut groups: Vec<(Option<(Selector, Proj)>, Group)> = Vec::new();
        for entry in self.entries(layer, &Budgets::default())? {
            let (place, reads) = match &entry.rule {
                Rule::Inputs { proj, .. } => (*proj, Some(shape.observed_as(*proj))),
                Rule::Neurons { .. } | Rule::Predicted { .. } => (Proj::Up, None),
            };
            let shapes = entry.rule.covers().iter().filter_map(|p| shape.projection(*p));
            let weights: usize = shapes.map(|(o, i)| o * i).sum();
            let key = reads.map(|r| (entry.rule.selector().clone(), r));
            match groups.iter_mut().find(|(k, _)| k.is_some() && *k == key && self.is_joint()) {
                Some((_, group)) => {
                    group.places.push(place);
                    group.weights += weights as f64;
                }
                None => groups.push((key, Group { places: vec![place], weights: weights as f64 })),
            }
        }
        Ok(groups.into_iter().map(|g| g.1).collect())
    }

    /// Whether the method scores projections together that read one vector: then they have one share.
    fn is_joint(&self) -> bool {
        self.step.params.iter().any(|(name, value)| name == "joint" && value >= 0.5)
    }

    /// The entries of one layer under `budgets`.
    fn entries(&self, layer: usize, budgets: &Budgets) -> Result<Vec<Entry>> {
        let subject = self.subject;
        let ctx =
            PlanContext { layers: &subject.layers, statistics: self.statistics, weights: &*subject.weights, budgets };
        let all = self.step.method.plan(&self.step.params, ctx)?;
        Ok(all.into_iter().filter(|e| e.layer == layer).collect())
    }

    fn key(&self, what: &str) -> String {
        let mut text = format!("{what} {} {}", self.subject.hash, self.step.label());
        self.windows.iter().for_each(|w| text += &format!(" {w:?}"));
        lacuna_core::hash::sha256(text.as_bytes())
    }
}

/// The method's parameters with another share.
///
/// # Errors
/// The method's first parameter is not a share.
pub fn with_share(step: &Resolved, share: f64) -> Result<Resolved> {
    let first = step.method.params().first().filter(|p| p.name == "sparsity");
    let Some(first) = first else {
        let problem = format!("`{}` has no sparsity that a search could spread", step.method.name());
        return Err(Error::Argument { name: "search", problem });
    };
    let given = step.params.iter().map(|(n, v)| (n, if n == first.name { share } else { v }));
    Ok(Resolved { method: step.method, params: Params::new(step.method, given)? })
}

fn budgets_of(layer: usize, groups: &[Group], share: impl Fn(usize) -> f64) -> Budgets {
    let places = groups.iter().enumerate().flat_map(|(g, group)| group.places.iter().map(move |p| (g, *p)));
    Budgets { dropped: places.map(|(g, p)| ((layer, p), share(g))).collect() }
}

/// Points of a curve above zero.
const GRID: usize = 9;

/// One block's relative error by share (0, 0.1, ..., 0.9).
#[derive(Clone, Debug, PartialEq)]
struct Curve {
    errors: Vec<f64>,
    places: Vec<Proj>,
    weights: f64,
}

impl Curve {
    /// The largest share whose error is at most `error`.
    fn share(&self, error: f64) -> f64 {
        let above = self.errors.iter().position(|e| *e > error).unwrap_or(self.errors.len());
        let Some(&high) = self.errors.get(above) else { return GRID as f64 * 0.1 };
        let low = self.errors[above - 1];
        ((above - 1) as f64 + (error - low) / (high - low)) * 0.1
    }
}

/// What [`Search::curves`] measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Curves(Vec<Curve>);

impl Curves {
    /// Budgets under which every block has the same relative error and `share` of all weights is dropped, and that error.
    pub fn equal_error(&self, share: f64) -> (Budgets, f64) {
        let all: f64 = self.0.iter().map(|c| c.weights).sum();
        let dropped = |e: f64| self.0.iter().map(|c| c.share(e) * c.weights).sum::<f64>() / all;
        let most = self.0.iter().flat_map(|c| &c.errors).copied().fold(0.0, f64::max);
        let (mut low, mut high) = (0.0, most);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if dropped(middle) < share { low = middle } else { high = middle }
        }
        let places = self.0.iter().enumerate().flat_map(|(layer, c)| {
            let share = c.share(high).min(MOST);
            c.places.iter().map(move |p| ((layer, *p), share))
        });
        (Budgets { dropped: places.collect() }, high)
    }
}

/// A walk through the blocks along the dense residual stream.
struct Walk<'a> {
    search: &'a Search<'a>,
    probe: Probe,
    /// Residual stream before the current block, and what the dense block makes of it, per window.
    before: Vec<Vec<f32>>,
    dense: Vec<Vec<f32>>,
    width: usize,
}

impl<'a> Walk<'a> {
    fn new(search: &'a Search<'a>) -> Result<Self> {
        with_share(search.step, 0.5)?;
        let mut probe = Probe::new(search.engine);
        let before = search.windows.iter().map(|w| probe.embed(w)).collect::<Result<Vec<_>>>()?;
        let width = search.engine.model().spec.width;
        let mut walk = Self { search, probe, before, dense: Vec::new(), width };
        walk.dense_outputs(0)?;
        Ok(walk)
    }

    fn dense_outputs(&mut self, layer: usize) -> Result<()> {
        let Self { search, probe, before, .. } = self;
        let mut dense = |(x, tokens): (&Vec<f32>, &Vec<u32>)| {
            probe.over(tokens)?;
            Ok(probe.block(layer, x, None)?.to_vec())
        };
        self.dense = before.iter().zip(search.windows).map(&mut dense).collect::<Result<_>>()?;
        Ok(())
    }

    /// Goes on behind block `layer`.
    fn advance(&mut self, layer: usize) -> Result<()> {
        self.before = std::mem::take(&mut self.dense);
        if layer + 1 < self.search.subject.layers.len() { self.dense_outputs(layer + 1) } else { Ok(()) }
    }

    /// Differences of the block under `budgets` from the dense block, at the last quarter of the positions (the first
    /// tokens see little context and weigh nothing in TEAL's code either): `sink(difference, dense)` per row.
    fn rows(&mut self, layer: usize, budgets: &Budgets, sink: &mut dyn FnMut(&[f32], &[f32])) -> Result<()> {
        let entries = self.search.entries(layer, budgets)?;
        let rules = masked_layer(&entries, self.search.engine.model(), layer)?;
        let mut difference = vec![0.0; self.width];
        for ((x, dense), tokens) in self.before.iter().zip(&self.dense).zip(self.search.windows) {
            self.probe.over(tokens)?;
            let sparse = self.probe.block(layer, x, Some(&rules))?;
            let from = x.len() / self.width * 3 / 4 * self.width;
            for (s, d) in sparse[from..].chunks_exact(self.width).zip(dense[from..].chunks_exact(self.width)) {
                difference.iter_mut().zip(s.iter().zip(d)).for_each(|(o, (s, d))| *o = s - d);
                sink(&difference, d);
            }
        }
        Ok(())
    }

    /// TEAL's error: the norm over positions, averaged over channels.
    fn error(&mut self, layer: usize, budgets: &Budgets) -> Result<f64> {
        let mut squares = vec![0.0_f64; self.width];
        self.rows(layer, budgets, &mut |difference, _| {
            squares.iter_mut().zip(difference).for_each(|(s, d)| *s += f64::from(*d) * f64::from(*d));
        })?;
        Ok(squares.iter().map(|s| s.sqrt()).sum::<f64>() / self.width as f64)
    }

    fn relative(&mut self, layer: usize, budgets: &Budgets) -> Result<f64> {
        let (mut off, mut all) = (0.0_f64, 0.0_f64);
        self.rows(layer, budgets, &mut |difference, dense| {
            off += difference.iter().map(|d| f64::from(*d) * f64::from(*d)).sum::<f64>();
            all += dense.iter().map(|d| f64::from(*d) * f64::from(*d)).sum::<f64>();
        })?;
        Ok((off / all.max(f64::MIN_POSITIVE)).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_errors_reach_the_share_and_spare_the_fragile() {
        let curve = |k: f64| Curve {
            errors: (0..=GRID).map(|i| k * (i as f64 * 0.1).powi(2)).collect(),
            places: vec![Proj::Q],
            weights: 1.0,
        };
        let curves = Curves(vec![curve(1.0), curve(4.0)]);
        for share in [0.1, 0.3, 0.5] {
            let (budgets, error) = curves.equal_error(share);
            let [a, b] = [0, 1].map(|l| budgets.dropped[&(l, Proj::Q)]);
            assert!(((a + b) / 2.0 - share).abs() < 1e-6 && a > b, "{share}: {a} {b}");
            assert!((curves.0[0].share(error) - a).abs() < 1e-9);
        }
        assert_eq!(curves.equal_error(0.95).0.dropped[&(0, Proj::Q)], 0.9, "no further than was measured");
    }
}
