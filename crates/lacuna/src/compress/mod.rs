//! Pruning and quantising a model into a smaller one: block by block, each on the outputs of its compressed predecessors.
//!
//! The way of a block (`block`): its layers' inputs are observed, each layer is solved by the methods, the new tensors are
//! written to a work folder (`store`), and the block runs again from what was written to give the next one its inputs. At
//! the end the output is put together beside its place and moved there (`output`). Memory: one block in single precision,
//! one Gram matrix and its factor, and the residual streams (in a file where they do not fit).

mod block;
mod gram;
mod hidden;
mod homes;
mod lock;
mod output;
mod store;
mod tensors;

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
    },
};
use block::{Runner, Task, decoded};
use hidden::Hidden;
use homes::{Home, homes};
use lacuna_core::{
    atomic::free_space,
    compress::{Pattern, Sight},
    format::safetensors::{self, Tensors},
    hash::sha256,
    method::MethodError,
    site::Proj,
    weight::Orientation,
};
use lacuna_kernels::Format;
use lacuna_methods::{
    registry::Resolved,
    weights::ratios::{Ratios, Size},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use store::{Finished, Work};
use tensors::{Target, block_format, finished, stored_bits};

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

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Request {
    /// A Hugging Face directory or a GGUF file.
    pub model: PathBuf,
    /// A directory, or a file that ends in .gguf for a model that is one.
    pub output: PathBuf,
    /// The methods, one after the other: those that drop before those that round.
    pub steps: Vec<Resolved>,
    /// How the share is spread over layers.
    pub ratios: Ratios,
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
}

/// Compresses a model.
///
/// # Errors
/// Before any work: steps that do not fit together or the model, a text that is missing or too short, targets that cannot
/// be reached, an output that is something else, too little room on the disk. Later: what a method says of a layer, numbers
/// that are not finite, what the system says. The output is untouched then, and a further run goes on where this one was.
pub fn compress(request: &Request, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Report> {
    let options = LoadOptions::default();
    let checkpoint = Checkpoint::open(&request.model, &options)?;
    let target = if request.model.is_dir() { Target::HuggingFace } else { Target::Gguf };
    let plan = Plan::new(request, &checkpoint, target)?;
    let model = Checkpoint::open(&request.model, &options)?.bind()?;
    plan.check_formats(&model)?;
    let shares = plan.shares(&model)?;
    let files = lock::source_files(&request.model)?;
    let work = Work::open(&request.output, &plan.key(&files))?;
    plan.check_space(&checkpoint.source)?;
    let mut report = Report::default();
    let mut hidden = plan.embed(&model, &work)?;
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
                let task = Task {
                    model: &model,
                    layer,
                    steps: &request.steps,
                    shares: &shares,
                    seed: request.seed,
                    threads: request.threads,
                };
                let done = task.run(hidden.as_mut(), &mut |l| progress(Progress::Layer(l)))?;
                let made = plan.tensors(layer, &checkpoint.source, &done);
                work.add(layer, &made, done.layers, done.notes)?
            }
        };
        if let (Some(hidden), true) = (&mut hidden, layer + 1 < all) {
            plan.advance(&model, &checkpoint.source, layer, &tensors, hidden)?;
        }
        release(&model, layer);
        report.layers.extend(note.layers);
        report.notes.extend(note.notes.into_iter().filter(|n| !n.is_empty()));
        blocks.push(tensors);
    }
    report.notes.extend(plan.notes());
    drop(hidden);
    progress(Progress::Block(all, all));
    let lock = lock::lock(request, checkpoint.hash(), &files, &report);
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
    spec: crate::model::spec::Spec,
    /// Bits and group of the codes, if a step rounds.
    grid: Option<(u32, usize)>,
}

impl<'a> Plan<'a> {
    fn new(request: &'a Request, checkpoint: &Checkpoint, target: Target) -> Result<Self> {
        let (names, spec) = (checkpoint.names, checkpoint.spec.clone());
        let prefix = prefix(&checkpoint.source, names);
        let homes = (0..spec.blocks.len()).map(|l| homes(names, prefix, &spec, l)).collect();
        let plan = Self { request, target, homes, names, spec, grid: grid(&request.steps)? };
        let coded = |t: &&Stored| matches!(t.from, Some(Original::Codes(_)));
        if checkpoint.source.tensors.values().find(coded).is_some() {
            let (what, remedy) = ("compressing a model that is quantised already", "; start from the original".into());
            return Err(Error::Unsupported { file: checkpoint.source.file.clone(), what: what.into(), remedy });
        }
        plan.check_text()?;
        output::check_place(request, target)?;
        if let Some(((bits, _), true)) = plan.grid.map(|g| (g, names.transposed && target == Target::HuggingFace)) {
            let what = format!("{bits}-bit codes for an architecture that stores its matrices transposed");
            let remedy = "; prune alone, or compress a GGUF file of the model".into();
            return Err(Error::Unsupported { file: request.model.display().to_string(), what, remedy });
        }
        Ok(plan)
    }

    /// That there is a text where one is needed, and that it says enough.
    fn check_text(&self) -> Result<()> {
        let of = |s: &Resolved| s.method.compressor().map(|c| c.sight(&s.params));
        let sight = self.request.steps.iter().filter_map(of).max().unwrap_or(Sight::Nothing);
        let widest = self.homes.iter().flatten().map(|h| h.inputs).max().unwrap_or(0);
        let least = match sight {
            Sight::Nothing => return Ok(()),
            Sight::Norms => 128,
            Sight::Gram => widest.max(128),
        };
        let wrong = |problem| Err(Error::Argument { name: "calibration", problem });
        let Some(text) = &self.request.calibration else {
            return wrong("these methods observe a text; give one (-f FILE)".into());
        };
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
                    Some((_, group)) if self.target == Target::Gguf && !grouped(group) => {
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

    /// The share of each projection, where they differ.
    fn shares(&self, model: &Model) -> Result<BTreeMap<(usize, Proj), f64>> {
        let has = |s: &&Resolved, name: &str| s.method.params().iter().any(|p| p.name == name);
        let pruner = self.request.steps.iter().find(|s| has(s, "sparsity"));
        let Some(step) = pruner.filter(|_| self.request.ratios != Ratios::Uniform) else { return Ok(BTreeMap::new()) };
        let wrong = |problem: String| Error::Argument { name: "ratios", problem };
        if Pattern::of(&step.params) != Pattern::Free {
            return Err(wrong("a pattern fixes the share of every layer; use uniform ratios, or no pattern".into()));
        }
        let places: Vec<(usize, Proj)> = (0..model.blocks.len())
            .flat_map(|l| Proj::ALL.into_iter().map(move |p| (l, p)))
            .filter(|(l, p)| model.blocks[*l].linear(*p).is_some())
            .collect();
        let weight = |i: usize| model.blocks[places[i].0].linear(places[i].1).map(|l| &l.weight);
        let size = |i: usize| weight(i).map_or((0, 0), |w| (w.outputs(), w.inputs()));
        let sizes: Vec<Size> = (0..places.len()).map(size).map(|(outputs, inputs)| Size { outputs, inputs }).collect();
        let weights = |i: usize| Ok::<_, String>(weight(i).map(decoded).unwrap_or_default());
        let shares = self.request.ratios.allocate(step.params.get("sparsity"), &sizes, weights).map_err(wrong)?;
        Ok(places.into_iter().zip(shares).collect())
    }

    /// Hash of everything that finished blocks depend on.
    fn key(&self, files: &BTreeMap<String, String>) -> String {
        let r = self.request;
        let windows = r.calibration.as_ref().map(|c| &c.windows);
        let ratios = r.ratios.name();
        let target = self.target;
        let steps: Vec<_> = r.steps.iter().map(Resolved::label).collect();
        let version = env!("CARGO_PKG_VERSION");
        sha256(format!("{version} {target:?} {files:?} {steps:?} {ratios} {} {windows:?}", r.seed).as_bytes())
    }

    /// Room for the work folder and for the output beside it.
    fn check_space(&self, source: &Source) -> Result<()> {
        let all: u64 = source.tensors.values().map(|t| t.bytes.len() as u64).sum();
        let homes = || self.homes.iter().flatten();
        let before: u64 = homes().filter_map(|h| source.tensors.get(&h.tensor)).map(|t| t.bytes.len() as u64).sum();
        let bits = |h: &Home| match self.grid {
            None => source.tensors.get(&h.tensor).map_or(0, |t| t.bytes.len() as u64),
            Some((bits, group)) => {
                let group = if group == 0 { h.inputs } else { group };
                let scale = 32.0 / group as f64;
                ((h.outputs * h.inputs) as f64 * (f64::from(stored_bits(bits)) + scale) / 8.0) as u64 + 64
            }
        };
        let after: u64 = homes().map(bits).sum();
        let streams = self.request.calibration.as_ref().map_or(0, |c| 4 * (c.tokens() * self.spec.width) as u64);
        let spilled = if streams > self.request.streams_in_memory { streams } else { 0 };
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
    fn embed(&self, model: &Model, work: &Work) -> Result<Option<Hidden>> {
        let Some(text) = &self.request.calibration else { return Ok(None) };
        let lengths = text.windows.iter().map(|w| w.len() * self.spec.width).collect();
        let mut hidden = Hidden::new(lengths, self.request.streams_in_memory, &work.spill())?;
        let runner = Runner::new(model, 0, model.blocks[0].clone(), self.request.threads)?;
        for (i, window) in text.windows.iter().enumerate() {
            hidden.set(i, &runner.embed(window)?)?;
        }
        Ok(Some(hidden))
    }

    /// The tensors that a compressed block becomes.
    fn tensors(&self, layer: usize, source: &Source, done: &block::Compressed) -> Vec<Finished> {
        let format = |h: &Home| source.tensors.get(&h.tensor).map_or(Format::F32, |t| t.format);
        self.homes[layer].iter().flat_map(|h| finished(h, &done.changed, format(h), self.target)).collect()
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
        let block = bind_block(&overlay, self.names, &self.spec, layer)?;
        let runner = Runner::new(model, layer, block, self.request.threads)?;
        for i in 0..hidden.len() {
            let x = runner.run(&hidden.get(i)?)?;
            hidden.set(i, &x)?;
        }
        Ok(())
    }

    /// The source with the new tensors of one block in the place of its old ones.
    fn overlay(&self, source: &Source, layer: usize, tensors: &Tensors) -> Result<Source> {
        let homes = &self.homes[layer];
        let mut all = source.tensors.clone();
        homes.iter().for_each(|h| drop(all.remove(&h.tensor)));
        match self.target {
            Target::HuggingFace => {
                let files = safetensors::Model::from_files(vec![tensors.clone()])?;
                let scheme = self.grid.map(|(bits, _)| Scheme::new(stored_bits(bits)));
                all.extend(source_of(&self.request.output, &files, scheme)?.tensors);
            }
            Target::Gguf => {
                for home in homes {
                    let Some(entry) = tensors.get(&home.tensor) else { continue };
                    let stored = source.tensors.get(&home.tensor);
                    let format =
                        self.grid.map_or_else(|| stored.map_or(Format::F32, |s| s.format), |g| block_format(g.0));
                    let shape = stored.map(|s| s.shape.clone()).unwrap_or_default();
                    all.insert(home.tensor.clone(), Stored::new(format, shape, tensors.bytes(entry)?));
                }
            }
        }
        Ok(Source::new(source.file.clone(), all))
    }

    /// What is left alone.
    fn notes(&self) -> Vec<String> {
        let experts = self.spec.blocks.iter().any(|b| matches!(b.mlp, crate::model::spec::MlpSpec::Experts { .. }));
        let mut notes = Vec::new();
        if experts {
            notes.push("experts and their router are left as they are: only the attention was compressed".into());
        }
        if matches!(self.grid, Some((3 | 5..=7, _))) {
            notes.push("codes of 3 bits take 4 bits in the file, those of 5 to 7 take 8".into());
        }
        notes
    }
}

/// Bits and group of the codes, after a check of the order of the steps.
fn grid(steps: &[Resolved]) -> Result<Option<(u32, usize)>> {
    let mut grid = None;
    for step in steps {
        let (method, name) = (step.method, step.method.name());
        let refuse =
            |reason: &str| Err(MethodError::NotApplicable { method: name.into(), reason: reason.into() }.into());
        if method.compressor().is_none() {
            return refuse("it skips while the model runs and changes no weights; use `lacuna calibrate` or --sparse");
        }
        if grid.is_some() {
            return refuse("it comes after a step that rounds to codes, and would undo it; put steps that drop first");
        }
        let has = |n: &str| method.params().iter().any(|p| p.name == n);
        if has("bits") && step.params.get("bits") > 0.0 {
            grid = Some((step.params.get("bits") as u32, step.params.get("group") as usize));
        }
    }
    if steps.is_empty() {
        return Err(Error::Argument { name: "steps", problem: "no method: nothing to do".into() });
    }
    Ok(grid)
}
