//! What is decided for single projections before any is compressed: the share each loses, and the bits of its codes.

use super::{
    Goal, Plan, Progress, dense_bytes,
    homes::Home,
    influence,
    measure::{Tried, measure},
    tensors::{Target, block_format, stored_bits},
};
use crate::{
    error::{Error, Result},
    model::{Model, source::Source},
};
use lacuna_core::{
    bytes::Bytes,
    compress::{Pattern, Sight},
    format::{gguf::Gguf, safetensors},
    map::LoadMode,
    site::Proj,
};
use lacuna_methods::{
    registry::Resolved,
    weights::ratios::{
        self, Ratios, Size,
        budget::{self, Point},
    },
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path};

/// Instead of bits: the matrix is not rounded.
pub const UNROUNDED: u32 = 16;

/// What was decided for one projection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// The share it loses.
    pub share: Option<f64>,
    /// Bits of its codes; [`UNROUNDED`]: none.
    pub bits: Option<u32>,
}

/// What was decided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Choices {
    /// By the name of the projection (`layers.3.mlp.down`).
    places: BTreeMap<String, Choice>,
    /// What a user should know of it.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// What the model was run for before shares are spread.
pub enum Measured {
    /// Nothing: weights are enough.
    Nothing,
    /// The errors of every projection at several shares.
    Errors(BTreeMap<String, Vec<(f64, f64)>>),
    /// A number for every block, and what a user should know of them.
    Blocks(Vec<f64>, Vec<String>),
}

impl Choices {
    /// What was decided for a projection.
    pub fn get(&self, layer: usize, proj: Proj) -> Choice {
        self.places.get(&place(layer, proj)).copied().unwrap_or_default()
    }

    /// The same, to be changed.
    pub fn entry(&mut self, layer: usize, proj: Proj) -> &mut Choice {
        self.places.entry(place(layer, proj)).or_default()
    }
}

/// What every home costs and loses at each number of bits.
pub struct Curves {
    /// [`UNROUNDED`] is the last.
    bits: Vec<u32>,
    /// In the order of [`Plan::all_homes`], one point for each number of bits; costs are bytes.
    homes: Vec<Vec<Point>>,
    /// Bytes of everything else.
    fixed: u64,
}

impl Curves {
    /// Bytes of all weights at the fewest and at the most bits.
    pub fn range(&self) -> (u64, u64) {
        let of = |f: fn(f64, f64) -> f64| {
            let homes = self.homes.iter().filter_map(|h| h.iter().map(|p| p.cost).reduce(f));
            self.fixed + homes.sum::<f64>() as u64
        };
        (of(f64::min), of(f64::max))
    }
}

/// What a projection is called in messages and choices.
pub fn place(layer: usize, proj: Proj) -> String {
    format!("layers.{layer}.{proj}")
}

impl Plan<'_> {
    /// Decides what the request leaves open.
    ///
    /// # Errors
    /// Targets that cannot be reached, with the nearest that can; what methods say of layers.
    pub(super) fn decide(
        &self,
        model: &Model,
        source: &Source,
        spill: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Choices> {
        let mut choices = self.shares(model, source, spill, progress)?;
        if let Some(Goal::Bytes(budget)) = self.request.goal {
            let curves = self.curves(model, source, &choices, spill, progress)?;
            self.choose_bits(&curves, budget, &mut choices)?;
        }
        Ok(choices)
    }

    /// Whether a step rounds, to a grid or to books.
    pub(super) fn rounds(&self) -> bool {
        self.grid.is_some() || self.books.is_some()
    }

    /// The step that drops a share, if one does.
    pub(super) fn pruner(&self) -> Option<&Resolved> {
        self.request.steps.iter().find(|s| s.has("sparsity"))
    }

    /// The pattern of a step; anywhere, if it knows none.
    fn pattern(step: &Resolved) -> Pattern {
        if step.has("of") { Pattern::of(&step.params) } else { Pattern::Free }
    }

    /// Whether the step that drops a share changes `proj`.
    fn drops(&self, proj: Proj) -> bool {
        self.pruner().and_then(|s| s.method.compressor()).is_none_or(|c| c.applies(proj))
    }

    /// All projections that lose a share, and their sizes.
    fn dropping(&self, model: &Model) -> Vec<((usize, Proj), Size)> {
        Self::places(model).into_iter().filter(|((_, p), _)| self.drops(*p)).collect()
    }

    /// All projections and their sizes.
    pub(super) fn places(model: &Model) -> Vec<((usize, Proj), Size)> {
        let all = (0..model.blocks.len()).flat_map(|l| Proj::ALL.into_iter().map(move |p| (l, p)));
        let sized = |(l, p): (usize, Proj)| {
            let w = &model.blocks[l].linear(p)?.weight;
            Some(((l, p), Size { outputs: w.outputs(), inputs: w.inputs() }))
        };
        all.filter_map(sized).collect()
    }

    /// The share of each projection, where they differ.
    pub(super) fn shares(
        &self,
        model: &Model,
        source: &Source,
        spill: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Choices> {
        let Some(step) = self.pruner().filter(|_| self.request.ratios != Ratios::Uniform) else {
            return Ok(Choices::default());
        };
        let wrong = |problem: String| Error::Argument { name: "ratios", problem };
        if Self::pattern(step) != Pattern::Free {
            return Err(wrong("a pattern fixes the share of every layer; use uniform ratios, or no pattern".into()));
        }
        let target = step.params.get("sparsity");
        let measured = self.measured((model, source), &ratios::loss_shares(target), spill, progress)?;
        self.spread(model, &measured, target)
    }

    /// What the ratios of the request need to be measured; errors at the shares `grid`.
    pub(super) fn measured(
        &self,
        (model, source): (&Model, &Source),
        grid: &[f64],
        spill: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Measured> {
        Ok(match self.request.ratios {
            Ratios::Loss => Measured::Errors(self.share_errors((model, source), grid, spill, progress)?),
            Ratios::Angular => Measured::Blocks(influence::angles(self, model, spill, progress)?, Vec::new()),
            Ratios::Ecoflap => {
                let (scores, agreement) = influence::scores(self, model, &|p| self.drops(p), progress)?;
                let note = format!(
                    "ecoflap: two halves of the draws agree on the order of the blocks with a rank correlation of {agreement:.2}"
                );
                Measured::Blocks(scores, vec![note])
            }
            _ => Measured::Nothing,
        })
    }

    /// Shares by the ratios of the request, for a share of the whole.
    pub(super) fn spread(&self, model: &Model, measured: &Measured, target: f64) -> Result<Choices> {
        let places = self.dropping(model);
        let sizes: Vec<Size> = places.iter().map(|p| p.1).collect();
        let blocks: Vec<usize> = places.iter().map(|p| p.0.0).collect();
        let wrong = |problem| Error::Argument { name: "ratios", problem };
        let (shares, notes) = match (self.request.ratios, measured) {
            (Ratios::Uniform, _) => return Ok(Choices::default()),
            (_, Measured::Errors(errors)) => (self.by_loss(&places, errors, target)?, Vec::new()),
            (Ratios::Ecoflap, Measured::Blocks(scores, notes)) => {
                // What the scripts have for SparseGPT and for Wanda.
                let headroom = if self.sight() == Sight::Gram { 0.2 } else { 0.1 };
                let shares = ratios::by_scores(scores, &blocks, &sizes, target, headroom).map_err(wrong)?;
                (shares, notes.clone())
            }
            (_, Measured::Blocks(angles, notes)) => {
                let shares = ratios::angular::shares(angles, target);
                (ratios::by_block(&shares, &blocks, &sizes, target).map_err(wrong)?, notes.clone())
            }
            (_, Measured::Nothing) => (self.by_weights(model, &places, target)?, Vec::new()),
        };
        Ok(Choices { notes, ..shared(&places, shares) })
    }

    /// Shares by the weights alone.
    fn by_weights(&self, model: &Model, places: &[((usize, Proj), Size)], target: f64) -> Result<Vec<f64>> {
        let sizes: Vec<Size> = places.iter().map(|p| p.1).collect();
        let weights = |i: usize| {
            let (layer, proj) = places[i].0;
            Ok::<_, String>(
                model.blocks[layer].linear(proj).map(|l| super::block::decoded(&l.weight)).unwrap_or_default(),
            )
        };
        let shares = self.request.ratios.allocate(target, &sizes, weights);
        shares.map_err(|problem| Error::Argument { name: "ratios", problem })
    }

    /// The errors of every projection at the shares `tried`.
    pub(super) fn share_errors(
        &self,
        (model, source): (&Model, &Source),
        tried: &[f64],
        spill: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<BTreeMap<String, Vec<(f64, f64)>>> {
        // What dropping costs is wanted, not what rounding costs.
        let bits = self.rounds().then_some(UNROUNDED);
        let tried: Vec<Choice> = tried.iter().map(|s| Choice { share: Some(*s), bits }).collect();
        let errors = measure(self, (model, source), spill, progress, &|_, _| tried.clone())?;
        let pairs = |e: Vec<Tried>| tried.iter().zip(e).map(|(c, e)| (c.share.unwrap_or(0.0), e.error)).collect();
        Ok(errors.into_iter().map(|(place, e)| (place, pairs(e))).collect())
    }

    /// Shares by measured errors.
    fn by_loss(
        &self,
        places: &[((usize, Proj), Size)],
        errors: &BTreeMap<String, Vec<(f64, f64)>>,
        target: f64,
    ) -> Result<Vec<f64>> {
        let sizes: Vec<Size> = places.iter().map(|p| p.1).collect();
        let curve = |((l, p), _): &((usize, Proj), Size)| errors.get(&place(*l, *p)).cloned().unwrap_or_default();
        let curves: Vec<_> = places.iter().map(curve).collect();
        ratios::by_loss(&curves, &sizes, target).map_err(|problem| Error::Argument { name: "ratios", problem })
    }

    /// The bits that can be had, and what each home costs and loses with them.
    pub(super) fn curves(
        &self,
        model: &Model,
        source: &Source,
        choices: &Choices,
        spill: &Path,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Curves> {
        let step = self.request.steps.iter().find(|s| s.has("bits") && s.params.get("bits") > 0.0);
        let able = |bits: &u32| match bits {
            &UNROUNDED => true,
            // A GGUF file has no smaller blocks than those of 4 bits.
            2 if self.in_blocks() => false,
            bits => step.is_some_and(|s| s.with("bits", f64::from(*bits)).is_ok()),
        };
        // Books have 2 to 4 bits; codes of a grid take 2, 4 or 8 in a file.
        let sizes = if self.books.is_some() { [2, 3, 4, UNROUNDED] } else { [2, 4, 8, UNROUNDED] };
        let bits: Vec<u32> = sizes.into_iter().filter(able).collect();
        let tried = |layer, proj| bits.iter().map(|b| Choice { bits: Some(*b), ..choices.get(layer, proj) }).collect();
        let errors = measure(self, (model, source), spill, progress, &tried)?;
        let by_blocks = |s: &Resolved| s.method.compressor().is_some_and(|c| c.weighs_blocks());
        let influence = match self.request.steps.iter().any(by_blocks) {
            true => influence::angles(self, model, spill, progress)?,
            false => vec![1.0; model.blocks.len()],
        };
        let point = |layer: usize, home: &Home, i: usize| {
            let of = |parts: &(Proj, Vec<usize>)| errors.get(&place(layer, parts.0)).and_then(|e| e.get(i));
            let error = influence[layer] * home.parts.iter().filter_map(of).map(|t| t.error).sum::<f64>();
            let coded = Some(bits[i]).filter(|b| *b < UNROUNDED);
            let all = self.home_bytes(source, home, coded) as f64;
            let cost = |parts: &(Proj, Vec<usize>)| {
                let own = all * parts.1.len() as f64 / home.outputs as f64;
                // What is larger in the container is read dense.
                of(parts).and_then(|t| t.packed).map_or(own, |packed| own.min(packed as f64))
            };
            Point { cost: home.parts.iter().map(cost).sum::<f64>().round(), error }
        };
        let homes = self.all_homes().map(|(l, h)| (0..bits.len()).map(|i| point(l, h, i)).collect()).collect();
        Ok(Curves {
            homes,
            fixed: self.all_bytes()?.saturating_sub(self.all_homes().map(|(_, h)| dense_bytes(source, h)).sum()),
            bits,
        })
    }

    /// Chooses bits for a number of bytes of all weights.
    ///
    /// # Errors
    /// A number that cannot be reached, with the smallest that can.
    pub(super) fn choose_bits(&self, curves: &Curves, budget: u64, choices: &mut Choices) -> Result<()> {
        let chosen = budget::choose(&curves.homes, budget as f64 - curves.fixed as f64).map_err(|least| {
            let least = least as u64 + curves.fixed;
            let problem = format!(
                "{budget} bytes cannot be reached: the smallest that these methods make of this model is {least} bytes"
            );
            Error::Argument { name: "target-bytes", problem }
        })?;
        for ((layer, home), i) in self.all_homes().zip(chosen) {
            home.parts.iter().for_each(|(proj, _)| choices.entry(layer, *proj).bits = Some(curves.bits[i]));
        }
        Ok(())
    }

    /// Bytes of a home in the output with codes of `bits` bits.
    pub(super) fn home_bytes(&self, source: &Source, home: &Home, bits: Option<u32>) -> u64 {
        let Some((bits, (_, group))) = bits.zip(self.grid) else { return dense_bytes(source, home) };
        let (rows, cols) = (home.outputs as u64, home.inputs as u64);
        if self.in_blocks() {
            return rows * block_format(bits).run_bytes(home.inputs).unwrap_or(0) as u64;
        }
        let groups = if group == 0 { 1 } else { cols / group as u64 };
        let scale = source.tensors.get(&home.tensor).and_then(|t| t.format.run_bytes(1)).unwrap_or(4) as u64;
        rows * ((cols * u64::from(stored_bits(bits))).div_ceil(32) * 4 + groups * scale) + 16
    }

    /// Bytes of all weights of the model.
    fn all_bytes(&self) -> Result<u64> {
        if self.target == Target::Gguf {
            let file = Gguf::open(&self.request.model, LoadMode::Map)?;
            let sizes = file.tensors().map(|t| Ok(file.bytes(&t)?.len() as u64));
            return sizes.sum();
        }
        let files = safetensors::Model::open(&self.request.model, LoadMode::Map)?;
        let size = |(entry, bytes): (&safetensors::Entry, Bytes)| match entry.shape.len() {
            // Vectors are F32 there.
            1 if self.request.gguf => 4 * entry.shape[0],
            _ => bytes.len() as u64,
        };
        Ok(files.names().filter_map(|n| files.get(n)).map(size).sum())
    }

    /// That the goal is one that these methods can be searched for.
    ///
    /// # Errors
    /// What is missing.
    pub(super) fn check_goal(&self) -> Result<()> {
        let wrong = |name, problem: &str| Err(Error::Argument { name, problem: problem.into() });
        match &self.request.goal {
            Some(Goal::Bytes(budget)) if !self.rounds() => {
                let all: u64 = self.all_bytes()?;
                let problem = format!(
                    "{budget} bytes cannot be reached: zeros alone save none in these files, so the smallest is {all} bytes; add a \
                     method that rounds, such as gptq"
                );
                wrong("target-bytes", &problem)
            }
            Some(Goal::Divergence { most, .. }) if !(most.is_finite() && *most > 0.0) => {
                wrong("max-kl", "it must be a number above 0")
            }
            Some(Goal::Divergence { held_out, .. }) if held_out.iter().all(|w| w.len() < 2) => {
                wrong("max-kl", "the text has no part to hold out for the measurement; give a longer one")
            }
            Some(Goal::Divergence { .. }) if !self.rounds() => match self.pruner() {
                Some(s) if Self::pattern(s) == Pattern::Free => Ok(()),
                _ => wrong(
                    "max-kl",
                    "a pattern leaves nothing to search; drop it, or add a method that rounds, such as gptq",
                ),
            },
            _ => Ok(()),
        }
    }
}

fn shared(places: &[((usize, Proj), Size)], shares: Vec<f64>) -> Choices {
    let mut choices = Choices::default();
    for (((layer, proj), _), share) in places.iter().zip(shares) {
        choices.entry(*layer, *proj).share = Some(share);
    }
    choices
}
