//! Weights in fewer bytes: which matrices of a model are read from the container beside it or as bitmaps, and the model that
//! holds them.
//!
//! What the container has ([`Model::packed`]) goes before. Among the others a matrix becomes a [`lacuna_kernels::bitmap`] if that takes fewer bytes and its zeros are above the share from which on this
//! machine multiplies bitmaps faster ([`BreakEven::zeros`]). The share is that of some rows spread over the matrix, so that
//! a model without zeros is not read for it. The numbers stay the same: products agree with dense ones up to the order of
//! sums.

use super::{
    break_even::BreakEven,
    compiled::CompiledPlan,
    layouts::{LayoutCache, Wanted},
};
use crate::{
    error::{Error, Result},
    model::weights::Model,
};
use lacuna_core::{
    bytes::Bytes,
    pair,
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Matrix, Pool, bitmap, codebook, isa};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

/// Rows of a matrix whose zeros are counted.
const SAMPLE: usize = 16;
/// Bytes of weights that caches hold.
const CACHED: usize = 32 << 20;
/// Share of zeros from which on bitmaps pay there: on a model of 11 MB in BF16 they took 1.06 of the dense time with 50 % zeros and
/// 0.86 with 70 %.
const CACHED_ZEROS: f32 = 0.65;

/// Where bitmaps are kept, and from which share of zeros on they are faster.
#[derive(Clone, Debug)]
pub struct BitmapOptions {
    /// Converted layouts.
    pub cache: LayoutCache,
    /// The shares.
    pub break_even: BreakEven,
}

impl BitmapOptions {
    /// The user's cache for the model of this hash, and what was measured on this machine with `threads`.
    pub fn for_model(root: Option<&Path>, hash: &str, threads: usize) -> Self {
        Self { cache: LayoutCache::new(root, hash), break_even: BreakEven::load(root, threads) }
    }

    /// For `model`: where the caches hold all of its blocks, fewer bytes save less time than is measured on large matrices, and
    /// bitmaps want a larger share of zeros.
    #[must_use]
    pub fn for_size(mut self, model: &Model) -> Self {
        let parts = model.blocks.iter().flat_map(|b| Proj::ALL.into_iter().flat_map(|p| b.parts(p)));
        if parts.map(|l| l.weight.bytes().len()).sum::<usize>() <= CACHED {
            for format in bitmap::FORMATS {
                let share = self.break_even.zeros(format).max(CACHED_ZEROS);
                self.break_even.set_zeros(format, share);
            }
        }
        self
    }
}

/// A model some of whose matrices are bitmaps.
#[derive(Clone, Debug)]
pub struct Packed {
    /// The model.
    pub model: Arc<Model>,
    /// Matrices of the blocks that are bitmaps.
    pub matrices: usize,
    /// Matrices of the blocks that come from the container as codes of pairs.
    pub books: usize,
    /// Matrices of the blocks that come from there as products of two smaller ones.
    pub low_rank: usize,
    /// The bytes of both as they were.
    pub dense_bytes: u64,
    /// Their bytes now.
    pub bytes: u64,
    /// Why others with zeros are not, for the log.
    pub notes: Vec<String>,
    /// Neurons that were left out because nothing depends on them.
    pub dead: usize,
}

impl Packed {
    /// `model` without bitmaps.
    pub(super) fn nothing(model: &Arc<Model>) -> Self {
        Self {
            model: model.clone(),
            matrices: 0,
            books: 0,
            low_rank: 0,
            dense_bytes: 0,
            bytes: 0,
            notes: Vec::new(),
            dead: 0,
        }
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let share = 100.0 * self.bytes as f64 / self.dense_bytes.max(1) as f64;
        let counts = [(self.books, "codes of pairs"), (self.low_rank, "two factors"), (self.matrices, "bitmaps")];
        let parts = counts.iter().filter(|c| c.0 > 0).map(|(n, what)| format!("{n} matrices are read as {what}"));
        let parts = parts.collect::<Vec<_>>().join(", ");
        if parts.is_empty() { "all matrices are dense".into() } else { format!("{parts}, {share:.1} % of their bytes") }
    }

    /// What a listing adds to the name of the plan.
    pub fn label(&self) -> String {
        let counts = [(self.low_rank, "+low rank"), (self.books, "+codebooks"), (self.matrices, "+bitmaps")];
        let parts: String = counts.iter().filter(|c| c.0 > 0).map(|c| c.1).collect();
        if parts.is_empty() { "-dead neurons".into() } else { parts }
    }
}

/// What a sample says of a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Zeros {
    /// Share of numbers that are zero.
    pub share: f32,
    /// Bytes as a bitmap over bytes as it is.
    pub bytes: f32,
}

impl Zeros {
    /// Of an output-major weight whose format has bitmaps, by some of its rows; `None` for others.
    pub fn sample(weight: &Weight) -> Option<Self> {
        if weight.orientation() != Orientation::OutputMajor || bitmap::unit(weight.format()).is_none() {
            return None;
        }
        let (w, inputs) = (weight.matrix(), weight.inputs());
        let rows = SAMPLE.min(w.rows());
        let (mut zeros, mut bytes) = (0, 0);
        for i in 0..rows {
            let row = Matrix::new(w.format(), 1, inputs, w.row(i * w.rows() / rows))?;
            let (packed, none) = bitmap::packed_bytes(&row)?;
            zeros += none;
            // One offset per row; a matrix of one row has two, and the padding.
            bytes += packed - bitmap::PADDING - 8;
        }
        let all = (rows * inputs).max(1) as f32;
        Some(Self { share: zeros as f32 / all, bytes: bytes as f32 / (rows * w.row_bytes()).max(1) as f32 })
    }

    /// Whether a bitmap takes fewer bytes and is faster from a share of `limit` zeros on.
    pub fn pay(&self, limit: f32) -> bool {
        self.bytes < 1.0 && self.share >= limit
    }
}

/// The bitmap of an output-major weight.
///
/// # Panics
/// If `weight` is not output-major, or its format has no bitmaps.
pub fn bitmap_of(weight: &Weight) -> Weight {
    assert_eq!(weight.orientation(), Orientation::OutputMajor, "only output-major weights are packed");
    let bytes = bitmap::pack(&weight.matrix()).expect("callers choose formats that have bitmaps");
    Weight::new(weight.format(), Orientation::Bitmap, weight.outputs(), weight.inputs(), Bytes::from(bytes))
        .expect("the bytes were packed for this shape")
}

/// What the container of `model` has for its places, after a look at all those bytes: what `plan` does not read by rows or
/// channels, where it takes fewer bytes than the dense matrix and is not slower. What is left dense is told in `notes`.
fn contained(
    model: &Model,
    plan: Option<&CompiledPlan>,
    pool: &Pool,
    notes: &mut Vec<String>,
) -> Result<Vec<((usize, Proj), Weight)>> {
    let Some(file) = &model.packed else { return Ok(Vec::new()) };
    let places: Vec<(usize, Proj)> =
        (0..model.blocks.len()).flat_map(|l| Proj::ALL.into_iter().map(move |p| (l, p))).collect();
    let name = |(layer, proj): (usize, Proj)| format!("layers.{layer}.{proj}");
    let known: BTreeSet<String> = places.iter().map(|p| name(*p)).collect();
    let bad = |tensor: &str, what: &str| Error::Unsupported {
        file: file.path().display().to_string(),
        what: format!("tensor `{tensor}`: {what}"),
        remedy: "; compress the model again, or remove the file: the weights beside it are complete".into(),
    };
    if let Some(foreign) = file.names().find(|n| !known.contains(*n)) {
        return Err(bad(foreign, "a matrix that this model does not have"));
    }
    let there: BTreeSet<&str> = file.names().collect();
    let (planned, wanted): (Vec<_>, Vec<_>) = places
        .into_iter()
        .filter(|place| there.contains(name(*place).as_str()))
        .partition(|(l, p)| by_rows(plan, *l, *p));
    if let Some(first) = planned.first() {
        let (n, file, first) = (planned.len(), file.path().display(), name(*first));
        notes.push(format!(
            "{n} matrices of {file} (such as {first}) are read dense: the plan reads them by rows or channels"
        ));
    }
    let made: Vec<Mutex<Option<Result<Weight>>>> = wanted.iter().map(|_| Mutex::new(None)).collect();
    pool.run(wanted.len(), &|_, i| {
        let (layer, proj) = wanted[i];
        let one = || {
            let tensor = name((layer, proj));
            let bytes = file.get(&tensor)?;
            let dense = &model.blocks[layer].linear(proj).ok_or_else(|| bad(&tensor, "a matrix of experts"))?.weight;
            piece(dense, bytes).map_err(|what| bad(&tensor, &what))
        };
        *made[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(one());
    });
    let take = |m: Mutex<Option<_>>| m.into_inner().unwrap_or_else(PoisonError::into_inner);
    let all = wanted.into_iter().zip(made).filter_map(|(place, m)| Some(take(m)?.map(|w| (place, w))));
    let mut all: Vec<_> = all.collect::<Result<_>>()?;
    // Where it would be slower, or larger (books of small matrices), the dense form beside it is read.
    let before = all.len();
    let smaller = |l: usize, p, w: &Weight| {
        model.blocks[l].linear(p).is_some_and(|dense| w.bytes().len() < dense.weight.bytes().len())
    };
    all.retain(|((l, p), w)| pays(w) && smaller(*l, *p, w));
    if all.len() < before {
        let (n, isa, file) = (before - all.len(), isa::get(), file.path().display());
        notes.push(format!("{n} matrices of {file} are read dense: codes of pairs are slower with {isa}, or larger"));
    }
    Ok(all)
}

/// What a piece of a container holds in the place of `dense`.
fn piece(dense: &Weight, bytes: Bytes) -> std::result::Result<Weight, String> {
    let (outputs, inputs) = (dense.outputs(), dense.inputs());
    if !bytes.starts_with(&pair::MAGIC) {
        let weight = Weight::new(codebook::DENSE, Orientation::Codebook, outputs, inputs, bytes);
        return weight.ok_or_else(|| format!("no codes of pairs of {outputs} rows of {inputs}"));
    }
    let format = pair::parse(outputs, inputs, &bytes).map(|f| f[0].format());
    let weight = format.and_then(|f| Weight::new(f, Orientation::LowRank, outputs, inputs, bytes));
    weight.ok_or_else(|| format!("no two factors of {outputs} rows of {inputs}"))
}

/// Whether a weight of a container is not slower than the dense one.
fn pays(w: &Weight) -> bool {
    let one = |w: &Weight| w.orientation() != Orientation::Codebook || codebook::pays(isa::get(), w.codebook().bits());
    w.factors().map_or_else(|| one(w), |f| f.iter().all(one))
}

/// `model` with what its container has, and with bitmaps where they pay; `None` if that is nowhere. What `plan` reads by rows
/// or channels stays as it is. Missing bitmaps are made by the threads of `pool`, with `progress(done, all)` called from them.
///
/// # Errors
/// A damaged container, with the tensor.
pub fn pack(
    model: &Arc<Model>,
    plan: Option<&CompiledPlan>,
    options: &BitmapOptions,
    pool: &Pool,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Option<Packed>> {
    let mut notes = Vec::new();
    let books = contained(model, plan, pool, &mut notes)?;
    let (mut wanted, mut places, mut left) = (Vec::new(), Vec::new(), BTreeMap::new());
    for (layer, block) in model.blocks.iter().enumerate() {
        let own = |p: Proj| books.iter().any(|b| b.0 == (layer, p));
        for proj in Proj::ALL.into_iter().filter(|p| !by_rows(plan, layer, *p) && !own(*p)) {
            let parts = block.parts(proj);
            let several = parts.len() > 1;
            for (part, linear) in parts.into_iter().enumerate() {
                let (weight, expert) = (&linear.weight, several.then_some(part));
                let Some(zeros) = Zeros::sample(weight) else { continue };
                let limit = options.break_even.zeros(weight.format());
                if zeros.pay(limit) {
                    wanted.push(Wanted { layer, expert, proj, weight });
                    places.push((layer, proj, part));
                } else if zeros.share > 0.05 {
                    let key = (proj.to_string(), weight.format().name());
                    let entry = left.entry(key).or_insert((0, zeros.share, zeros.share, limit));
                    *entry = (entry.0 + 1, entry.1.min(zeros.share), entry.2.max(zeros.share), limit);
                }
            }
        }
    }
    let line = |((proj, format), (n, low, high, limit)): ((String, &str), (usize, f32, f32, f32))| {
        let [low, high, limit] = [low, high, limit].map(|s| 100.0 * s);
        format!("{n} x {proj}: {low:.0}-{high:.0} % zeros stay dense ({format} bitmaps pay from {limit:.0} % on)")
    };
    notes.extend(left.into_iter().map(line));
    notes.iter().for_each(|n| tracing::info!("{n}"));
    if wanted.is_empty() && books.is_empty() {
        return Ok(None);
    }
    let size = |weights: &mut dyn Iterator<Item = &Weight>| weights.map(|w| w.bytes().len() as u64).sum::<u64>();
    let replaced = books.iter().filter_map(|((l, p), _)| model.blocks[*l].linear(*p)).map(|l| &l.weight);
    let dense_bytes = size(&mut wanted.iter().map(|w| w.weight).chain(replaced));
    let weights = options.cache.bitmaps(&wanted, pool, progress);
    let bytes = size(&mut weights.iter().chain(books.iter().map(|b| &b.1)));
    let low_rank = books.iter().filter(|b| b.1.factors().is_some()).count();
    let (matrices, of_books) = (weights.len(), books.len() - low_rank);
    let mut packed = Model::clone(model);
    for ((layer, proj), weight) in books {
        if let Some(linear) = packed.blocks[layer].linear_mut(proj) {
            linear.weight = weight;
        }
    }
    for ((layer, proj, part), weight) in places.into_iter().zip(weights) {
        if let Some(linear) = packed.blocks[layer].part_mut(proj, part) {
            linear.weight = weight;
        }
    }
    let packed =
        Packed { model: Arc::new(packed), matrices, books: of_books, low_rank, dense_bytes, bytes, notes, dead: 0 };
    tracing::info!("{}", packed.describe());
    Ok(Some(packed))
}

/// Whether the plan computes single rows of a projection.
fn by_rows(plan: Option<&CompiledPlan>, layer: usize, proj: Proj) -> bool {
    let Some(rules) = plan.and_then(|p| p.layers.get(layer)) else { return false };
    let by_neurons = rules.neurons.is_some() || !rules.experts.is_empty();
    rules.input(proj).is_some() || (by_neurons && matches!(proj, Proj::Gate | Proj::Up | Proj::Down))
}
