//! How much memory a model will take, known from its header before anything is loaded.
//!
//! The figure is what the system counts as resident at the peak: everything that the process allocates, and every page of
//! a mapped file that was touched (the system can take such pages back when memory is short, at the price of reading
//! them again). `tests/memory.rs` of the command holds it against measured peaks.

use super::checkpoint::Checkpoint;
use super::spec::{BlockSpec, Latent, MlpSpec, Spec};
use super::weights::Model;
use crate::engine::{kv_bytes, transpose::CopyForm};
use crate::error::{Error, Result};
use lacuna_core::map::LoadMode;
use lacuna_core::plan::{Entry, Plan, Rule};
use lacuna_core::site::Proj;
use lacuna_core::weight::{Orientation, Weight};
use lacuna_kernels::attention::KvType;
use lacuna_kernels::{Format, gemm};

/// Pages that the system maps around one that is touched (Linux: `fault_around_bytes`).
const AROUND: u64 = 64 << 10;
/// The program itself: its code, its libraries, its log; the middle of what runs show, which differ by a million bytes (how much of
/// the program lies in the page cache decides how much is mapped around each page that is touched).
const PROGRAM: u64 = 10_000_000;
/// What a SentencePiece tokenizer holds per entry of the vocabulary.
const SPM_TOKEN: u64 = 150;
/// What a BPE tokenizer holds per entry of the vocabulary: both directions of the table, and the merges.
const BPE_TOKEN: u64 = 610;
/// Code of the library for BPE tokenizers.
const BPE: u64 = 1_800_000;
/// Scratch of one thread in matrix products (see `gemm`), and its stack.
const PER_THREAD: u64 = 1 << 20;
/// Bytes per component of a head that attention in prefill holds for each thread: blocks of 512 rows of queries and
/// results and of 256 keys and values.
const ATTENTION: u64 = 5 << 10;

/// How a model will be used.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Positions of the context.
    pub context: usize,
    /// How keys and values are stored.
    pub kv: KvType,
    /// Most tokens that prefill runs at once.
    pub batch: usize,
    /// Threads.
    pub threads: usize,
}

/// Bytes by purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Weights in the form they are kept in (of a mapped file: once every page was touched).
    pub weights: u64,
    /// Keys and values of a full context.
    pub kv: u64,
    /// Activations of one prefill step, packed operands, scratch of the threads, and the logits.
    pub scratch: u64,
    /// The program and the tokenizer.
    pub program: u64,
}

impl MemoryEstimate {
    /// The estimate for a dense run.
    pub fn new(checkpoint: &Checkpoint, demand: &Demand) -> Self {
        let spec = &checkpoint.spec;
        let positions = demand.context as u64;
        let kv = kv_bytes(spec, demand.kv, demand.context).map_or(u64::MAX, |n| n as u64);
        Self {
            weights: weights(checkpoint, positions),
            kv,
            scratch: scratch(checkpoint, demand),
            program: PROGRAM + checkpoint.tokenizer,
        }
    }

    /// The estimate for a run of `model`, whose dense estimate this is, by `plan`: copies by channels take the place of
    /// the weights that the plan reads by columns.
    #[must_use]
    pub fn with_plan(self, model: &Model, plan: &Plan) -> Self {
        let weights = self.weights.saturating_sub(self.replaced(model, plan));
        Self { weights: weights.saturating_add(Self::copies(model, plan)), ..self }
    }

    /// Bytes of the copies by channels that a run of `model` by `plan` reads.
    pub fn copies(model: &Model, plan: &Plan) -> u64 {
        replaced(model, plan).map(copy_bytes).sum()
    }

    /// Bytes of the weights that have copies by channels in a run by `plan`.
    pub fn replaced(&self, model: &Model, plan: &Plan) -> u64 {
        replaced(model, plan).map(|w| w.bytes().len() as u64).sum()
    }

    /// The sum.
    pub fn total(&self) -> u64 {
        [self.weights, self.kv, self.scratch, self.program].into_iter().fold(0, u64::saturating_add)
    }

    /// Refuses what is above `limit`.
    ///
    /// # Errors
    /// [`Error::Memory`] with the parts of the estimate.
    pub fn within(&self, limit: u64) -> Result<()> {
        if self.total() <= limit {
            return Ok(());
        }
        let Self { weights, kv, scratch, program } = self;
        let detail = format!("weights {weights}, keys and values {kv}, scratch {scratch}, program {program}");
        Err(Error::Memory { need: self.total(), limit, detail })
    }
}

fn replaced<'m>(model: &'m Model, plan: &Plan) -> impl Iterator<Item = &'m Weight> {
    let of = |entry: &Entry| {
        let proj = match &entry.rule {
            Rule::Inputs { proj, .. } => *proj,
            Rule::Neurons { .. } | Rule::Predicted { .. } => Proj::Down,
        };
        model.blocks.get(entry.layer).map(|b| b.parts(proj)).into_iter().flatten().map(|l| &l.weight)
    };
    plan.entries.iter().flat_map(of).filter(|w| w.orientation() == Orientation::OutputMajor)
}

fn copy_bytes(weight: &Weight) -> u64 {
    let (form, _) = CopyForm::for_weight(weight);
    form.bytes(weight.outputs(), weight.inputs()).map_or(0, |n| n as u64)
}

/// Every tensor as it is kept. Of an embedding that is not the head as well, a mapped file gives only the pages around
/// the rows that were looked up.
fn weights(checkpoint: &Checkpoint, positions: u64) -> u64 {
    let head = checkpoint.names.head;
    let tied = checkpoint.tied.unwrap_or_else(|| !checkpoint.source.tensors.keys().any(|n| is(n, head)));
    let names = checkpoint.names;
    let table = |name: &str| !names.per_layer.table.is_empty() && is(name, names.per_layer.table);
    let looked_up = |name: &str| checkpoint.mode == LoadMode::Map && (!tied && is(name, names.embed) || table(name));
    let tensors = checkpoint.source.tensors.iter();
    let each = tensors.map(|(name, t)| {
        let all = t.loaded_bytes();
        let rows = t.shape.first().map_or(1, |n| *n as u64).max(1);
        let touched = positions.saturating_mul(all / rows + AROUND);
        if looked_up(name) && t.from.is_none() { all.min(touched) } else { all }
    });
    each.fold(0, u64::saturating_add)
}

/// What a tokenizer takes, about; `spm`: of the SentencePiece kind, otherwise BPE.
pub(super) fn tokenizer(spm: bool, vocab: usize) -> u64 {
    let vocab = vocab as u64;
    if spm { SPM_TOKEN * vocab } else { BPE + BPE_TOKEN * vocab }
}

/// Whether `name` is the weight that `part` of a table of names means.
fn is(name: &str, part: &str) -> bool {
    let stem = name.strip_suffix(".weight").unwrap_or(name);
    stem.strip_suffix(part).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The buffers of a prefill step (`engine::forward::Workspace`) and of sampling.
fn scratch(checkpoint: &Checkpoint, demand: &Demand) -> u64 {
    let (spec, names) = (&checkpoint.spec, checkpoint.names);
    let tokens = demand.batch.min(demand.context).max(1);
    let rows = spec.blocks.iter().map(|b| row_numbers(spec, b)).max().unwrap_or(0);
    let longest = spec.blocks.iter().map(|b| inner(b).max(b.heads * b.head_dim).max(spec.width)).max().unwrap_or(0);
    let mut formats: Vec<Format> = Vec::new();
    for (name, t) in &checkpoint.source.tensors {
        let outside = is(name, names.embed) || is(name, names.head) || is(name, names.positions);
        if t.shape.len() > 1 && !outside && !formats.contains(&t.format) {
            formats.push(t.format);
        }
    }
    let packed = gemm::Input::bytes(tokens, longest, &formats).map_or(u64::MAX, |n| n as u64);
    let head = spec.blocks.iter().map(|b| b.head_dim.next_multiple_of(16) as u64).max().unwrap_or(0);
    let threads = (demand.threads as u64).saturating_mul(PER_THREAD + ATTENTION * head);
    // Logits, and what sampling keeps beside them: candidates of 8 bytes and their weights.
    let logits = 24 * spec.vocab as u64;
    let activations = (4 * tokens as u64).saturating_mul(rows as u64);
    [activations, packed, threads, logits].into_iter().fold(0, u64::saturating_add)
}

/// Numbers per token: residual stream (twice where it passes from basis to basis), normalised input, results of attention
/// and MLP; queries and attended values, keys and values, cosines and sines; gate and up; for experts the gathered inputs,
/// the results and the scores; what latent attention has besides, and per-layer embeddings.
fn row_numbers(spec: &Spec, b: &BlockSpec) -> usize {
    let rotary: usize = spec.ropes.iter().map(|r| 2 * r.freqs.len()).sum();
    let experts = match b.mlp {
        MlpSpec::Experts { experts, .. } | MlpSpec::ReluExperts { experts, .. } => 2 * spec.width + experts,
        _ => 0,
    };
    let gate = if matches!(b.mlp, MlpSpec::Plain { .. } | MlpSpec::ReluExperts { .. }) { 0 } else { inner(b) };
    // Both latents, once as they come and once normalised, and the expanded keys and values.
    let expanded = |l: Latent| 2 * (l.q_rank.unwrap_or(0) + l.kv_rank + l.rope) + b.heads * (l.nope + l.value);
    let latent = b.latent.map_or(0, expanded);
    let up = inner(b).max(if b.rope.is_some() { b.heads * b.head_dim } else { 0 });
    let streams = 4 + usize::from(spec.norm_width.is_some());
    let own = spec.per_layer_inputs() + b.per_layer.map_or(0, |p| p.width);
    own + streams * spec.width + 2 * b.head_dim * (b.heads + b.kv_heads) + rotary + gate + up + experts + latent
}

fn inner(b: &BlockSpec) -> usize {
    match b.mlp {
        MlpSpec::Gated { inner }
        | MlpSpec::Plain { inner }
        | MlpSpec::Experts { inner, .. }
        | MlpSpec::ReluExperts { inner, .. } => inner,
    }
}
