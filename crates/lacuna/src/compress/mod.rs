//! Pruning and quantising a model into a smaller one: block by block, each on the outputs of its compressed predecessors.
//!
//! The way of a block (`block`): its layers' inputs are observed, each layer is solved by the methods, the new tensors are
//! written to a work folder (`store`), and the block runs again from what was written to give the next one its inputs. At
//! the end the output is put together beside its place and moved there (`output`). Memory: one block in single precision,
//! one Gram matrix and its factor, and the residual streams (in a file where they do not fit).

mod block;
mod choices;
mod fold;
mod gguf;
pub mod gram;
mod hidden;
mod homes;
mod influence;
mod lock;
mod low_rank;
mod measure;
mod neurons;
mod order;
mod output;
mod rotate;
mod search;
mod soup;
mod store;
mod tensors;

#[cfg(test)]
mod container_tests;
#[cfg(test)]
mod pruning_tests;
#[cfg(test)]
mod tests;

use crate::{
    error::{Error, Result},
    model::{
        Checkpoint, LoadOptions, Model,
        bind::{bind_block, prefix},
        checkpoint::source_of,
        packed::Scheme,
        source::{Original, Source, Stored},
        spec::{MlpSpec, Spec},
    },
};
pub use block::Spent;
#[cfg(test)]
pub(crate) use block::decoded;
use block::{Runner, Task};
use choices::{Choices, UNROUNDED};
use fold::Norms;
pub use gguf::convert;
use hidden::Hidden;
use homes::{Home, homes};
use lacuna_core::{
    atomic::free_space,
    compress::Sight,
    format::safetensors::{self, Tensors},
    hash::sha256,
    method::MethodError,
    site::Proj,
    weight::Orientation,
};
use lacuna_kernels::Format;
use lacuna_methods::{registry::Resolved, weights::ratios::Ratios};
use neurons::Narrowed;
use rotate::Sliced;
use serde::{Deserialize, Serialize};
pub use soup::{SoupReport, soup};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};
use store::{Finished, Work};
use tensors::{Target, block_format, finished, packed, packed_name, stored_bits};

/// Tokens of calibration text that are read where nothing else is said.
pub const DEFAULT_TOKENS: usize = 16_384;

/// The text that inputs are observed on.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// Windows of tokens, each run from an empty context.
    pub windows: Vec<Vec<u32>>,
    /// SHA-256 of the text.
    pub sha256: String,
    /// Tokens of the whole text.
    pub available: usize,
}

impl Calibration {
    fn tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }
}

/// What is searched for.
#[derive(Clone, Debug, PartialEq)]
pub enum Goal {
    /// The smallest error in this many bytes of weights: bits are chosen per matrix.
    Bytes(u64),
    /// The fewest bytes (or, where nothing is rounded, the largest share dropped) with at most this divergence from the
    /// model on `held_out`.
    Divergence {
        /// Mean Kullback-Leibler divergence, in nats.
        most: f64,
        /// Windows of the text that are not observed.
        held_out: Vec<Vec<u32>>,
    },
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Request {
    /// A Hugging Face directory or a GGUF file.
    pub model: PathBuf,
    /// A directory, or a file that ends in .gguf for a model that is one, or with `gguf`.
    pub output: PathBuf,
    /// Write a GGUF file, whatever the model is.
    pub gguf: bool,
    /// The methods, one after the other: those that drop before those that round.
    pub steps: Vec<Resolved>,
    /// How the share is spread over layers.
    pub ratios: Ratios,
    /// What is searched for, if anything.
    pub goal: Option<Goal>,
    /// A lock of an earlier run that this one must follow from.
    pub lock: Option<PathBuf>,
    /// The text, for methods that need one.
    pub calibration: Option<Calibration>,
    /// Decides what is drawn.
    pub seed: u64,
    /// Threads; 0: one per core.
    pub threads: usize,
    /// Bytes of residual streams that are kept in memory; more go to a file.
    pub streams_in_memory: u64,
}

/// What became of one linear layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Block.
    pub layer: usize,
    /// Projection, such as `mlp.down`.
    pub proj: String,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// Weights that a mask holds at zero.
    pub dropped: u64,
    /// Weights that are zero, by a mask or by rounding.
    pub zeros: u64,
    /// Bits of its codes, if it was rounded.
    pub bits: Option<u32>,
    /// Bytes before and after; of a stored tensor that holds several projections, its part by weights.
    pub bytes: (u64, u64),
    /// `||W - W'||^2 / ||W||^2`.
    pub weight_error: f64,
    /// The same of the outputs on the calibration text, by what the methods saw of the inputs.
    pub output_error: Option<f64>,
}

/// What became of a model.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Every compressed layer.
    pub layers: Vec<LayerReport>,
    /// What a user should know, each once.
    pub notes: Vec<String>,
    /// Bytes of the weights before and after.
    pub bytes: (u64, u64),
    /// Blocks that an earlier, killed run had finished.
    pub resumed: usize,
    /// The divergence on the held-out windows, if that was searched for.
    pub divergence: Option<f64>,
    /// Where the time of this run went; the rest was reading and writing.
    pub spent: Spent,
}

impl Report {
    /// Share of the weights of compressed layers that a mask holds at zero.
    pub fn sparsity(&self) -> f64 {
        let all: u64 = self.layers.iter().map(|l| (l.outputs * l.inputs) as u64).sum();
        self.layers.iter().map(|l| l.dropped).sum::<u64>() as f64 / all.max(1) as f64
    }
}

/// What a run tells while it works.
pub enum Progress<'a> {
    /// Blocks that are finished, of all.
    Block(usize, usize),
    /// A layer is finished.
    Layer(&'a LayerReport),
    /// Blocks whose errors at several settings were measured, of all.
    Measured(usize, usize),
    /// A setting was tried, and diverged this much: what it was, and how much.
    Tried(&'a str, f64),
}

/// Compresses a model.
///
/// # Errors
/// Before any work: steps that do not fit together or the model, a text that is missing or too short, targets that cannot
/// be reached, an output that is something else, too little room on the disk. Later: what a method says of a layer, numbers
/// that are not finite, what the system says. The output is untouched then, and a further run goes on where this one was.
pub fn compress(request: &Request, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Report> {
    if request.gguf && request.model.is_dir() {
        return gguf::compress(request, progress, by_goal);
    }
    by_goal(request, progress)
}

fn by_goal(request: &Request, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Report> {
    if rotate::rotator(&request.steps).is_some() {
        return rotate::run(request, progress);
    }
    match &request.goal {
        Some(Goal::Divergence { most, held_out }) => search::by_divergence(request, *most, held_out, progress),
        _ => run(request, None, progress),
    }
}

/// What a search found.
#[derive(Clone, Copy)]
struct Found<'a> {
    choices: &'a Choices,
    divergence: Option<f64>,
    /// The request that was searched for.
    asked: &'a Request,
}

/// One run over all blocks.
fn run(request: &Request, found: Option<Found<'_>>, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Report> {
    let options = LoadOptions::default();
    let checkpoint = Checkpoint::open(&request.model, &options)?;
    let mut plan = Plan::new(request, &checkpoint)?;
    let model = Checkpoint::open(&request.model, &options)?.bind()?;
    plan.check_formats(&model)?;
    let files = lock::source_files(&request.model)?;
    lock::check(request, checkpoint.hash(), &files)?;
    let work = Work::open(&request.output, &plan.key(&files, found.map(|f| f.choices)))?;
    plan.choices = match (found, work.choices()) {
        (Some(found), _) => found.choices.clone(),
        (None, Some(choices)) => choices,
        (None, None) => {
            let decided = plan.decide(&model, &checkpoint.source, &work.spill(), progress);
            work.add_choices(decided.inspect_err(|_| work.discard_empty())?)?
        }
    };
    plan.check_space(&checkpoint.source)?;
    plan.narrowed = plan.narrowed(prefix(&checkpoint.source, checkpoint.names));
    let mut report = Report { divergence: found.and_then(|f| f.divergence), ..Report::default() };
    let mut hidden = if plan.sight() == Sight::Nothing { None } else { plan.embed(&model, &work.spill())? };
    let mut blocks = Vec::new();
    let all = model.spec.blocks.len();
    for layer in 0..all {
        progress(Progress::Block(layer, all));
        let (tensors, note) = match work.block(layer) {
            Some(found) => {
                report.resumed += 1;
                found
            }
            None => {
                let task = plan.task(&model, &checkpoint.source, layer);
                let done = task.run(hidden.as_mut(), &mut |l| progress(Progress::Layer(l)))?;
                report.spent += done.spent;
                let made = plan.tensors(layer, &checkpoint.source, &done);
                let layers = plan.with_bytes(layer, &checkpoint.source, done.layers, &made);
                work.add(layer, &made, layers, done.notes)?
            }
        };
        if let (Some(hidden), true) = (&mut hidden, layer + 1 < all) {
            let start = Instant::now();
            plan.advance(&model, &checkpoint.source, layer, &tensors, hidden)?;
            report.spent.observing += start.elapsed();
        }
        release(&model, layer);
        report.layers.extend(note.layers);
        report.notes.extend(note.notes.into_iter().filter(|n| !n.is_empty()));
        blocks.push(tensors);
    }
    report.notes.extend(plan.notes());
    drop(hidden);
    progress(Progress::Block(all, all));
    let asked = found.map_or(request, |f| f.asked);
    let lock = lock::lock(asked, checkpoint.hash(), &files, &report);
    report.bytes = output::write(&plan, &blocks, &lock)?;
    drop(blocks);
    work.remove()?;
    Ok(report)
}

/// Gives the pages of a block's original weights back to the system.
fn release(model: &Model, layer: usize) {
    let block = &model.blocks[layer];
    Proj::ALL.into_iter().filter_map(|p| block.linear(p)).for_each(|l| l.weight.bytes().release());
}

/// A checked request.
pub(crate) struct Plan<'a> {
    request: &'a Request,
    target: Target,
    /// By block.
    homes: Vec<Vec<Home>>,
    names: &'static crate::model::names::Names,
    spec: Spec,
    /// Bits and group of the codes, if a step rounds to a grid.
    grid: Option<Grid>,
    /// Bits of a weight, if a step gives pairs and books.
    books: Option<u32>,
    /// What was decided for single projections.
    choices: Choices,
    /// The shape of the output, where it is another.
    narrowed: Option<Narrowed>,
    /// The same, where its residual stream gets other bases.
    sliced: Option<Sliced>,
}

impl<'a> Plan<'a> {
    fn new(request: &'a Request, checkpoint: &Checkpoint) -> Result<Self> {
        let target = if request.model.is_dir() { Target::HuggingFace } else { Target::Gguf };
        let (names, spec) = (checkpoint.names, checkpoint.spec.clone());
        check_reach(&checkpoint.source.file, &spec)?;
        let prefix = prefix(&checkpoint.source, names);
        let homes = (0..spec.blocks.len()).map(|l| homes(names, prefix, &spec, l)).collect();
        let (grid, books) = rounding(&request.steps)?;
        let choices = Choices::default();
        let (narrowed, sliced) = (None, None);
        let plan = Self { request, target, homes, names, spec, grid, books, choices, narrowed, sliced };
        if books.is_some() && plan.in_blocks() {
            let (file, what) = (request.output.display().to_string(), "codes of pairs in a GGUF file".into());
            let remedy = "; write a directory, or use gptq, awq or rtn".into();
            return Err(Error::Unsupported { file, what, remedy });
        }
        let coded = |t: &&Stored| matches!(t.from, Some(Original::Codes(_)));
        if checkpoint.source.tensors.values().find(coded).is_some() {
            let (what, remedy) = ("compressing a model that is quantised already", "; start from the original".into());
            return Err(Error::Unsupported { file: checkpoint.source.file.clone(), what: what.into(), remedy });
        }
        plan.check_neurons()?;
        plan.check_rotation()?;
        plan.check_text()?;
        plan.check_goal()?;
        output::check_place(&request.model, &request.output, target)?;
        if let Some(((bits, _), true)) = plan.grid.map(|g| (g, names.transposed && target == Target::HuggingFace)) {
            let what = format!("{bits}-bit codes for an architecture that stores its matrices transposed");
            let remedy = "; prune alone, or compress a GGUF file of the model".into();
            return Err(Error::Unsupported { file: request.model.display().to_string(), what, remedy });
        }
        Ok(plan)
    }

    /// What the steps must see.
    fn sight(&self) -> Sight {
        let of = |s: &Resolved| s.method.compressor().map(|c| c.sight(&s.params));
        self.request.steps.iter().filter_map(of).max().unwrap_or(Sight::Nothing)
    }

    /// How block `layer` of `model` is compressed.
    fn task<'t>(&'t self, model: &'t Model, source: &'t Source, layer: usize) -> Task<'t> {
        let (steps, choices) = (&self.request.steps[..], &self.choices);
        let norms = Norms { source, names: self.names, prefix: prefix(source, self.names) };
        let Request { seed, threads, .. } = *self.request;
        let pairs = self.pairs(layer);
        Task { model, layer, steps, choices, norms, seed, threads, narrow: self.narrowed.is_some(), pairs }
    }

    /// Projections of a block whose factors can lie in a container: of directories, and where codes are written of tensors
    /// that hold one projection alone (the others stay together in one tensor of codes).
    fn pairs(&self, layer: usize) -> Vec<Proj> {
        if self.in_blocks() {
            return Vec::new();
        }
        let able = self.homes[layer].iter().filter(|h| self.grid.is_none() || h.parts.len() == 1);
        able.flat_map(|h| h.parts.iter().map(|p| p.0)).collect()
    }

    /// Where the projections of block `layer` lie in the output, and what the output computes.
    fn made(&self, layer: usize) -> (&[Home], &Spec) {
        match (&self.narrowed, &self.sliced) {
            (Some(narrowed), _) => (&narrowed.homes[layer], &narrowed.spec),
            (_, Some(sliced)) => (&sliced.homes[layer], &sliced.spec),
            _ => (&self.homes[layer], &self.spec),
        }
    }

    /// Bits of the codes of a home, if it is rounded.
    fn bits(&self, layer: usize, home: &Home) -> Option<u32> {
        let of = |parts: &(Proj, Vec<usize>)| self.choices.get(layer, parts.0).bits;
        let bits = home.parts.first().and_then(of).or(self.grid.map(|g| g.0))?;
        self.grid.filter(|_| bits < UNROUNDED).map(|_| bits)
    }

    /// The reports of a block's projections with the bytes they have.
    fn with_bytes(
        &self,
        layer: usize,
        source: &Source,
        mut layers: Vec<LayerReport>,
        tensors: &[Finished],
    ) -> Vec<LayerReport> {
        for (home, made) in self.homes[layer].iter().zip(self.made(layer).0) {
            let smaller = (made.outputs * made.inputs) as f64 / (home.outputs * home.inputs).max(1) as f64;
            let (before, after) = (dense_bytes(source, home), self.home_bytes(source, home, self.bits(layer, home)));
            let after = (after as f64 * smaller).round() as u64;
            for (proj, rows) in &home.parts {
                let part = |bytes: u64| (bytes as f64 * rows.len() as f64 / home.outputs as f64).round() as u64;
                let of = |l: &&mut LayerReport| l.proj == proj.name();
                let packed = tensors.iter().find(|t| t.name == packed_name(layer, *proj));
                let packed = packed.map(|t| t.data.len() as u64);
                layers.iter_mut().filter(of).for_each(|l| l.bytes = (part(before), packed.unwrap_or(part(after))));
            }
        }
        layers
    }

    /// Every home and its block.
    fn all_homes(&self) -> impl Iterator<Item = (usize, &Home)> {
        self.homes.iter().enumerate().flat_map(|(layer, homes)| homes.iter().map(move |h| (layer, h)))
    }

    /// That there is a text where one is needed, and that it says enough.
    fn check_text(&self) -> Result<()> {
        let sight = if self.request.ratios.needs_text() { self.sight().max(Sight::Norms) } else { self.sight() };
        let widest = match rotate::rotator(&self.request.steps) {
            Some(_) => self.spec.width,
            None => self.homes.iter().flatten().map(|h| h.inputs).max().unwrap_or(0),
        };
        let least = match sight {
            Sight::Nothing => return Ok(()),
            Sight::Norms => 128,
            Sight::Gram => widest.max(128),
        };
        let wrong = |problem| Err(Error::Argument { name: "calibration", problem });
        let Some(text) = &self.request.calibration else {
            return wrong("these methods observe a text; give one (-f FILE)".into());
        };
        let vocab = self.spec.vocab;
        if let Some(id) = text.windows.iter().flatten().find(|t| **t as usize >= vocab) {
            return wrong(format!(
                "token {id} is outside of the vocabulary of {vocab}; was the text cut by another tokenizer?"
            ));
        }
        if text.tokens() >= least {
            return Ok(());
        }
        let why = if sight == Sight::Gram {
            format!("as many as the widest layer has inputs, {least}")
        } else {
            least.to_string()
        };
        let (tokens, available) = (text.tokens(), text.available);
        wrong(format!("{tokens} tokens (of {available} in the text) are too few: these methods need at least {why}"))
    }

    /// That the stored weights are of types whose numbers can be replaced.
    fn check_formats(&self, model: &Model) -> Result<()> {
        self.check_group()?;
        for (layer, block) in model.blocks.iter().enumerate() {
            for (proj, linear) in Proj::ALL.into_iter().filter_map(|p| Some((p, block.linear(p)?))) {
                let format = linear.weight.format();
                let kept = matches!(format, Format::F32 | Format::F16 | Format::Bf16 | Format::Q8_0);
                let grouped = |g: usize| g != 0 && g.is_multiple_of(32);
                if linear.weight.orientation() == Orientation::InputMajor {
                    // Its file says by its magic alone that the model uses ReLU, which the output could not say.
                    let file = self.request.model.display().to_string();
                    let what = "compressing a PowerInfer file".into();
                    let remedy = "; start from the Hugging Face model it was made from".into();
                    return Err(Error::Unsupported { file, what, remedy });
                }
                let what = match self.grid {
                    _ if !kept => format!("compressing weights of type {} (layers.{layer}.{proj})", format.name()),
                    // Whole rows count by what they are.
                    Some((_, 0)) if self.in_blocks() && self.target == Target::HuggingFace => {
                        let inputs = linear.weight.inputs();
                        if inputs.is_multiple_of(32) {
                            continue;
                        }
                        format!("rows of {inputs} codes in a GGUF file (layers.{layer}.{proj})")
                    }
                    Some((_, group)) if self.in_blocks() && !grouped(group) => {
                        format!("a group of {group} in a GGUF file")
                    }
                    _ => continue,
                };
                let remedy =
                    if kept { "; use a multiple of 32" } else { "; start from the F32, F16, BF16 or Q8_0 model" };
                return Err(Error::Unsupported {
                    file: self.request.model.display().to_string(),
                    what,
                    remedy: remedy.into(),
                });
            }
        }
        Ok(())
    }

    /// Whether codes become the blocks of a GGUF file.
    fn in_blocks(&self) -> bool {
        self.target == Target::Gguf || self.request.gguf
    }

    /// That the group of the codes divides the rows of every layer.
    fn check_group(&self) -> Result<()> {
        let Some((_, group)) = self.grid.filter(|g| g.1 > 0) else { return Ok(()) };
        let widths: Vec<usize> = self.homes.iter().flatten().map(|h| h.inputs).collect();
        let Some(width) = widths.iter().find(|w| !w.is_multiple_of(group)) else { return Ok(()) };
        let fits = |g: &usize| widths.iter().all(|w| w.is_multiple_of(*g));
        let most = (1..=group).rev().find(fits).unwrap_or(1);
        let problem = format!(
            "groups of {group} do not divide rows of {width} weights; the largest that divides all is {most} (0: whole rows)"
        );
        Err(Error::Argument { name: "group", problem })
    }

    /// Hash of everything that finished blocks depend on.
    fn key(&self, files: &BTreeMap<String, String>, found: Option<&Choices>) -> String {
        let r = self.request;
        let windows = r.calibration.as_ref().map(|c| &c.windows);
        let ratios = r.ratios.name();
        let target = self.target;
        let steps: Vec<_> = r.steps.iter().map(Resolved::label).collect();
        let version = env!("CARGO_PKG_VERSION");
        let gguf = if r.gguf { " gguf" } else { "" };
        let goal = if found.is_some() { &None } else { &r.goal };
        let text = format!(
            "{version} {target:?} {files:?} {steps:?} {ratios} {} {windows:?} {goal:?} {found:?}{gguf}",
            r.seed
        );
        sha256(text.as_bytes())
    }

    /// Room for the work folder and for the output beside it.
    fn check_space(&self, source: &Source) -> Result<()> {
        let all: u64 = source.tensors.values().map(|t| t.bytes.len() as u64).sum();
        let before: u64 = self.all_homes().map(|(_, h)| dense_bytes(source, h)).sum();
        let after: u64 = self.all_homes().map(|(l, h)| self.home_bytes(source, h, self.bits(l, h))).sum();
        let streams = self.request.calibration.as_ref().map_or(0, |c| 4 * (c.tokens() * self.spec.width) as u64);
        let spilled = if streams > self.request.streams_in_memory { streams } else { 0 };
        // What is packed lies beside the dense numbers.
        let after = after + if self.books.is_some() { before / 3 } else { 0 };
        let after = after + self.sliced.as_ref().map_or(0, Sliced::added);
        let needed = all.saturating_sub(before) + 2 * after + spilled + (16 << 20);
        let path = &self.request.output;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match free_space(folder) {
            Some(free) if free < needed => {
                Err(lacuna_core::error::Error::Space { path: path.clone(), needed, free }.into())
            }
            _ => Ok(()),
        }
    }

    /// The residual streams before the first block, if there is a text.
    fn embed(&self, model: &Model, spill: &Path) -> Result<Option<Hidden>> {
        let Some(text) = &self.request.calibration else { return Ok(None) };
        let mut hidden = Hidden::new(text.windows.clone(), self.spec.width, self.request.streams_in_memory, spill)?;
        let runner = Runner::new(model, 0, model.blocks[0].clone(), self.request.threads)?;
        for (i, window) in text.windows.iter().enumerate() {
            hidden.set(i, &runner.embed(window)?)?;
        }
        Ok(Some(hidden))
    }

    /// The tensors that a compressed block becomes.
    fn tensors(&self, layer: usize, source: &Source, done: &block::Compressed) -> Vec<Finished> {
        let format = |h: &Home| source.tensors.get(&h.tensor).map_or(Format::F32, |t| t.format);
        let changed = |h: &&Home| h.parts.iter().any(|p| done.changed.contains_key(&p.0));
        let homes = self.made(layer).0.iter().filter(changed);
        let homes = homes.flat_map(|h| finished(h, &done.changed, format(h), self.target));
        let format_of = |proj: &Proj| {
            let home = self.homes[layer].iter().find(|h| h.parts.iter().any(|p| p.0 == *proj));
            home.map_or(Format::F32, &format)
        };
        let packed = done.changed.iter().filter_map(|(proj, c)| packed(layer, *proj, c, format_of(proj)));
        homes.chain(done.beside.iter().cloned()).chain(packed).collect()
    }

    /// Runs a block with its new weights, as they were written, over all streams.
    fn advance(
        &self,
        model: &Model,
        source: &Source,
        layer: usize,
        tensors: &Tensors,
        hidden: &mut Hidden,
    ) -> Result<()> {
        let mut overlay = self.overlay(source, layer, tensors)?;
        overlay.load(lacuna_core::map::LoadMode::Map)?;
        let block = bind_block(&overlay, self.names, self.made(layer).1, layer)?;
        let runner = Runner::new(model, layer, block, self.request.threads)?;
        for i in 0..hidden.len() {
            let x = runner.run(&hidden.get(i)?, hidden.tokens(i))?;
            hidden.set(i, &x)?;
        }
        Ok(())
    }

    /// The source with the new tensors of one block in the place of its old ones.
    fn overlay(&self, source: &Source, layer: usize, tensors: &Tensors) -> Result<Source> {
        let homes = self.made(layer).0;
        let mut all = source.tensors.clone();
        homes.iter().filter(|h| holds(tensors, &h.tensor)).for_each(|h| drop(all.remove(&h.tensor)));
        match self.target {
            Target::HuggingFace => {
                let files = safetensors::Model::from_files(vec![tensors.clone()])?;
                let scheme =
                    self.grid.map(|_| Scheme::new(homes.iter().filter_map(|h| self.bits(layer, h)).map(stored_bits)));
                all.extend(source_of(&self.request.output, &files, scheme)?.tensors);
            }
            Target::Gguf => {
                for home in homes {
                    let Some(entry) = tensors.get(&home.tensor) else { continue };
                    let stored = source.tensors.get(&home.tensor);
                    let format =
                        self.bits(layer, home).map_or_else(|| stored.map_or(Format::F32, |s| s.format), block_format);
                    let shape = vec![home.outputs, home.inputs];
                    all.insert(home.tensor.clone(), Stored::new(format, shape, tensors.bytes(entry)?));
                }
                for entry in tensors.entries().iter().filter(|e| homes.iter().all(|h| h.tensor != e.name)) {
                    let Some(stored) = source.tensors.get(&entry.name) else { continue };
                    let (bytes, shape) = (tensors.bytes(entry)?, entry.shape.iter().map(|n| *n as usize).collect());
                    all.insert(entry.name.clone(), Stored::new(stored.format, shape, bytes));
                }
            }
        }
        Ok(Source::new(source.file.clone(), all))
    }

    /// What is left alone.
    fn notes(&self) -> Vec<String> {
        let experts = self.spec.blocks.iter().any(|b| matches!(b.mlp, MlpSpec::Experts { .. }));
        let mut notes = Vec::new();
        if experts {
            notes.push("experts and their router are left as they are: only the attention was compressed".into());
        }
        notes.extend(self.choices.notes.iter().cloned());
        if neurons::pruner(&self.request.steps).is_some() {
            notes.push(match &self.narrowed {
                Some(n) => format!("MLPs have {} neurons now; the model is dense and loads everywhere", n.width),
                None => "MLPs keep their width, zeros stand for what was dropped: the file saves nothing, and lacuna leaves \
                         dead neurons out when it starts (with uniform ratios files become smaller)"
                    .into(),
            });
        }
        if self.all_homes().any(|(l, h)| matches!(self.bits(l, h), Some(3 | 5..=7))) {
            notes.push("codes of 3 bits take 4 bits in the file, those of 5 to 7 take 8".into());
        }
        if self.in_blocks() && self.all_homes().any(|(l, h)| self.bits(l, h) == Some(2)) {
            notes.push("codes of 2 bits take 4 bits in a GGUF file".into());
        }
        notes
    }
}

/// Refuses models whose blocks have matrices of kinds that no step reaches.
fn check_reach(file: &str, spec: &Spec) -> Result<()> {
    let latent = spec.blocks.iter().any(|b| b.latent.is_some());
    let relu = spec.blocks.iter().any(|b| matches!(b.mlp, MlpSpec::ReluExperts { .. }));
    let what = match (latent, relu) {
        (_, true) => "compressing experts behind a router with a ReLU (BlockFFN)",
        (true, _) => "compressing latent attention (MLA)",
        _ => return Ok(()),
    };
    let remedy = "; run the model as it is, with a plan if it should read less".into();
    Err(Error::Unsupported { file: file.into(), what: what.into(), remedy })
}

/// Whether `tensors` have the tensor `name`, plain or in codes.
fn holds(tensors: &Tensors, name: &str) -> bool {
    tensors.get(name).is_some() || tensors.get(&format!("{name}_packed")).is_some()
}

/// Bytes of a home as it is stored now.
fn dense_bytes(source: &Source, home: &Home) -> u64 {
    source.tensors.get(&home.tensor).map_or(0, |t| t.bytes.len() as u64)
}

/// Bits and group of codes.
type Grid = (u32, usize);

/// The grid of the codes, or bits of books, after a check of the order of the steps.
fn rounding(steps: &[Resolved]) -> Result<(Option<Grid>, Option<u32>)> {
    let (mut grid, mut books) = (None, None);
    for step in steps {
        let (method, name) = (step.method, step.method.name());
        let refuse =
            |reason: &str| Err(MethodError::NotApplicable { method: name.into(), reason: reason.into() }.into());
        if method.compressor().is_none() {
            return refuse("it skips while the model runs and changes no weights; use `lacuna calibrate` or --sparse");
        }
        if grid.is_some() || books.is_some() {
            return refuse("it comes after a step that rounds to codes, and would undo it; put steps that drop first");
        }
        if step.has("bits") && step.params.get("bits") > 0.0 {
            let bits = step.params.get("bits") as u32;
            match step.has("group") {
                true => grid = Some((bits, step.params.get("group") as usize)),
                false => books = Some(bits),
            }
        }
    }
    if steps.is_empty() {
        return Err(Error::Argument { name: "steps", problem: "no method: nothing to do".into() });
    }
    Ok((grid, books))
}
