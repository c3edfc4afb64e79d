//! One block: run it, see the inputs of its layers, replace their weights.

use super::{
    LayerReport,
    choices::{Choice, Choices, UNROUNDED, place},
    fold::{self, Norms},
    gram::Gather,
    hidden::Hidden,
    low_rank, neurons,
    store::Finished,
};
use crate::{
    calibrate::layer_shapes,
    engine::{Engine, KvType, Options, probe::Probe},
    error::{Error, Result},
    model::{
        Model,
        spec::{BlockSpec, Spec},
        weights::{Block, Linear},
    },
};
use lacuna_core::{
    compress::{Changed, Inputs, Layer, Sight},
    method::{LayerShape, MethodError},
    site::{Point, Proj},
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Format, Matrix, Pool, convert::decode_run, gemm};
use lacuna_methods::registry::Resolved;
use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// A model of one block, ready to run.
pub struct Runner {
    engine: Engine,
}

impl Runner {
    /// `block` alone, as block `layer` of `model`.
    ///
    /// # Errors
    /// As the engine's.
    pub fn new(model: &Model, layer: usize, block: Block, threads: usize) -> Result<Self> {
        Self::of(model, model.spec.blocks[layer].clone(), block, threads)
    }

    /// `block` alone, of the shape `spec`, with what is around the blocks of `model`.
    ///
    /// # Errors
    /// As the engine's.
    pub fn of(model: &Model, spec: BlockSpec, block: Block, threads: usize) -> Result<Self> {
        let spec = Spec { blocks: vec![spec], ..model.spec.clone() };
        let one = Model { spec, blocks: vec![block], ..model.clone() };
        let options = Options { threads, kv: KvType::F32, ..Options::default() };
        Ok(Self { engine: Engine::new(Arc::new(one), options)? })
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        self.engine.pool()
    }

    /// What the embedding makes of a window.
    ///
    /// # Errors
    /// Tokens outside the vocabulary.
    pub fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        Probe::new(&self.engine).embed(tokens)
    }

    /// What the block makes of the residual stream `x` of `tokens`.
    ///
    /// # Errors
    /// Rows that do not fit.
    pub fn run(&self, x: &[f32], tokens: &[u32]) -> Result<Vec<f32>> {
        let mut probe = Probe::new(&self.engine);
        probe.over(tokens)?;
        Ok(probe.block(0, x, None)?.to_vec())
    }

    /// Runs all of `hidden` and gathers the inputs of `projs` (their observed names); `layer` is for messages.
    ///
    /// # Errors
    /// A number that is not finite.
    pub fn observe(
        &self,
        layer: usize,
        hidden: &mut Hidden,
        projs: &[(Proj, usize)],
        gram: bool,
    ) -> Result<BTreeMap<Proj, Inputs>> {
        let points = projs.iter().map(|(proj, n)| (Point::Input { layer: 0, proj: *proj }, *n));
        let mut gather = Gather::new(self.pool(), points, gram);
        let mut probe = Probe::new(&self.engine);
        for i in 0..hidden.len() {
            probe.over(hidden.tokens(i))?;
            probe.observed(0, &hidden.get(i)?, &mut gather)?;
            if let Some((Point::Input { proj, .. }, value)) = gather.broken {
                return Err(MethodError::NonFinite {
                    point: Point::Input { layer, proj },
                    value,
                    token: gather.tokens(),
                }
                .into());
            }
        }
        let named = |(point, inputs): (Point, Inputs)| match point {
            Point::Input { proj, .. } => Some((proj, inputs)),
            _ => None,
        };
        Ok(gather.finish().into_iter().filter_map(named).collect())
    }
}

/// What a block is compressed with.
pub struct Task<'a> {
    /// The model, whose blocks are not changed.
    pub model: &'a Model,
    /// Number of the block.
    pub layer: usize,
    /// The methods, one after the other.
    pub steps: &'a [Resolved],
    /// What was decided for single projections.
    pub choices: &'a Choices,
    /// The norms that factors of inputs can be folded into.
    pub norms: Norms<'a>,
    /// Seed of the run.
    pub seed: u64,
    /// Threads; 0: one per core.
    pub threads: usize,
    /// Whether dropped neurons leave smaller matrices.
    pub narrow: bool,
    /// Projections that may be stored as two factors.
    pub pairs: Vec<Proj>,
}

/// Where time went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Passes of the text through blocks, Gram matrices included.
    pub observing: Duration,
    /// New weights and their errors.
    pub solving: Duration,
}

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, other: Self) {
        self.observing += other.observing;
        self.solving += other.solving;
    }
}

/// What became of a block.
#[derive(Default)]
pub struct Compressed {
    /// By projection.
    pub changed: BTreeMap<Proj, Changed>,
    /// Other tensors that change with them: norms that factors of inputs were folded into, biases of dropped neurons.
    pub beside: Vec<Finished>,
    /// One per projection.
    pub layers: Vec<LayerReport>,
    /// What a user should know.
    pub notes: Vec<String>,
    /// Where the time went.
    pub spent: Spent,
}

impl Task<'_> {
    pub(super) fn sight(&self) -> Sight {
        let of = |s: &Resolved| s.method.compressor().map(|c| c.sight(&s.params));
        self.steps.iter().filter_map(of).max().unwrap_or(Sight::Nothing)
    }

    /// Compresses the block's projections, those that read one vector together. Gram matrices are gathered for one such
    /// group at a time, with the groups before it already compressed. `done` is told each finished layer.
    ///
    /// # Errors
    /// What a method says of a layer, numbers that are not finite.
    pub fn run(&self, mut hidden: Option<&mut Hidden>, done: &mut dyn FnMut(&LayerReport)) -> Result<Compressed> {
        if let Some(step) = neurons::pruner(self.steps) {
            return self.neurons(step, hidden, done);
        }
        let shape = &layer_shapes(&self.model.spec)[self.layer];
        let mut runner = Runner::new(self.model, self.layer, self.model.blocks[self.layer].clone(), self.threads)?;
        let (mut block, beside) = self.ordered(runner.pool());
        runner = Runner::new(self.model, self.layer, block.clone(), self.threads)?;
        let mut out = Compressed { beside, ..Compressed::default() };
        let mut groups = groups(shape);
        // Experts are not reached.
        groups.retain(|g| block.linear(g[0]).is_some());
        let width = |proj: Proj| shape.projection(proj).map_or(0, |p| p.1);
        let all: Vec<_> = groups.iter().map(|g| (g[0], width(g[0]))).collect();
        let start = Instant::now();
        let mut seen = match (&mut hidden, self.sight()) {
            (Some(hidden), Sight::Norms) => runner.observe(self.layer, hidden, &all, false)?,
            _ => BTreeMap::new(),
        };
        out.spent.observing = start.elapsed();
        for (group, observed) in groups.iter().zip(&all) {
            let start = Instant::now();
            if let (Some(hidden), Sight::Gram) = (&mut hidden, self.sight()) {
                if !out.changed.is_empty() {
                    runner = Runner::new(self.model, self.layer, block.clone(), self.threads)?;
                }
                seen = runner.observe(self.layer, hidden, &[*observed], true)?;
            }
            let mut here = seen.remove(&observed.0);
            let observed = Instant::now();
            if let Some(factors) = self.factors(group, &block, here.as_ref(), runner.pool())? {
                fold::into(&mut block, group, &factors);
                here.iter_mut().for_each(|seen| fold::seen(seen, &factors));
                out.beside.extend(self.norms.finished(self.layer, &block, group[0]));
            }
            for proj in group {
                let Some(linear) = block.linear_mut(*proj) else { continue };
                let choice = self.choices.get(self.layer, *proj);
                let (changed, report) = self.layer(*proj, linear, here.as_ref(), runner.pool(), choice)?;
                linear.weight = replaced(&changed, linear);
                out.notes.extend(changed.notes.iter().cloned());
                done(&report);
                out.layers.push(report);
                out.changed.insert(*proj, changed);
            }
            out.spent += Spent { observing: observed - start, solving: observed.elapsed() };
        }
        Ok(out)
    }

    /// Factors of the inputs of a group, if a method wants some and they can be folded exactly.
    fn factors(&self, group: &[Proj], block: &Block, seen: Option<&Inputs>, pool: &Pool) -> Result<Option<Vec<f32>>> {
        let Some(format) = self.norms.format(self.layer, group[0]) else { return Ok(None) };
        let mut weights = Vec::new();
        for proj in group {
            weights.extend(block.linear(*proj).map(|l| (place(self.layer, *proj), l, decoded(&l.weight))));
        }
        let layers: Vec<Layer<'_>> = weights
            .iter()
            .map(|(place, linear, weight)| Layer {
                place,
                outputs: linear.weight.outputs(),
                inputs: linear.weight.inputs(),
                weight,
                kept: None,
                seen,
                sparsity: None,
                seed: self.seed,
                pool,
            })
            .collect();
        for step in self.steps {
            let Some(compressor) = step.method.compressor() else { continue };
            if let Some(factors) = compressor.factors(&step.params, &layers)? {
                return Ok(Some(factors).filter(|f| fold::fits(block, group, f, format)));
            }
        }
        Ok(None)
    }

    /// Compresses one projection as `choice` says.
    ///
    /// # Errors
    /// What a method says of it.
    pub fn layer(
        &self,
        proj: Proj,
        linear: &Linear,
        seen: Option<&Inputs>,
        pool: &Pool,
        choice: Choice,
    ) -> Result<(Changed, LayerReport)> {
        let place = place(self.layer, proj);
        let dense = decoded(&linear.weight);
        let (outputs, inputs) = (linear.weight.outputs(), linear.weight.inputs());
        let mut now =
            Changed { weight: dense.clone(), kept: None, codes: None, books: None, low_rank: None, notes: Vec::new() };
        for step in self.steps {
            let Some(step) = chosen(step, choice)? else { continue };
            let Some(compressor) = step.method.compressor().filter(|c| c.applies(proj)) else { continue };
            let layer = Layer {
                place: &place,
                outputs,
                inputs,
                weight: &now.weight,
                kept: now.kept.as_deref(),
                seen,
                sparsity: choice.share,
                seed: self
                    .seed
                    .wrapping_add(((self.layer as u64) << 8 | proj as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                pool,
            };
            let rounds = step.has("bits") && !step.has("sparsity");
            let of_factors = match now.low_rank.as_ref().filter(|_| rounds) {
                Some(pair) => low_rank::round(&step, compressor, &layer, pair)?,
                None => None,
            };
            let mut next = match of_factors {
                Some(next) => next,
                None => compressor.compress(&step.params, &layer)?,
            };
            next.low_rank = next.low_rank.filter(|_| self.pairs.contains(&proj));
            let notes = now.notes.into_iter().chain(next.notes).collect();
            now = Changed { notes, ..next };
        }
        if let Some(bad) = now.weight.iter().position(|w| !w.is_finite()) {
            let reason =
                format!("the new weight at row {}, column {} is {}", bad / inputs, bad % inputs, now.weight[bad]);
            return Err(Error::Method(MethodError::Layer { place, reason }));
        }
        now = low_rank::stored(pool, now, inputs, linear.weight.format());
        // Books stand for numbers that every float format holds.
        if now.codes.is_none() && now.books.is_none() {
            now.weight = rounded(&now.weight, linear.weight.format());
        }
        let dropped = match &now.kept {
            Some(kept) => kept.iter().filter(|k| !**k).count(),
            None => 0,
        };
        let report = LayerReport {
            layer: self.layer,
            proj: proj.name().into(),
            outputs,
            inputs,
            dropped: dropped as u64,
            zeros: now.weight.iter().filter(|w| **w == 0.0).count() as u64,
            bits: now
                .codes
                .as_ref()
                .map(|c| c.bits)
                .or(now.books.as_ref().map(|b| b.bits))
                .or(now.low_rank.as_deref().and_then(low_rank::bits)),
            bytes: (0, 0),
            weight_error: relative(&dense, &now.weight, None, inputs),
            output_error: seen.map(|s| output_error(pool, s, &dense, &now.weight, inputs)),
        };
        Ok((now, report))
    }
}

/// The step with the bits of `choice`; `None` if it would round and must not.
fn chosen(step: &Resolved, choice: Choice) -> Result<Option<Cow<'_, Resolved>>> {
    let rounds = step.has("bits") && step.params.get("bits") > 0.0;
    match choice.bits.filter(|_| rounds) {
        None => Ok(Some(Cow::Borrowed(step))),
        Some(UNROUNDED) if !step.has("sparsity") => Ok(None),
        Some(bits) => {
            let bits = if bits == UNROUNDED { 0 } else { bits };
            Ok(Some(Cow::Owned(step.with("bits", f64::from(bits))?)))
        }
    }
}

/// Projections that read the same vector, in the order of the forward pass; the first is the one it is observed as.
pub fn groups(shape: &LayerShape) -> Vec<Vec<Proj>> {
    let mut groups: Vec<Vec<Proj>> = Vec::new();
    for proj in Proj::ALL.into_iter().filter(|p| shape.projection(*p).is_some()) {
        match groups.iter_mut().find(|g| shape.observed_as(g[0]) == shape.observed_as(proj)) {
            Some(group) => group.push(proj),
            None => groups.push(vec![proj]),
        }
    }
    groups
}

/// `W[outputs, inputs]`.
pub fn decoded(weight: &Weight) -> Vec<f32> {
    let (m, outputs, inputs) = (weight.matrix(), weight.outputs(), weight.inputs());
    let mut all = vec![0.0; outputs * inputs];
    match weight.orientation() {
        Orientation::OutputMajor => {
            (0..outputs).for_each(|r| decode_run(m.format(), m.row(r), &mut all[r * inputs..][..inputs]));
        }
        _ => {
            let mut run = vec![0.0; outputs];
            for c in 0..inputs {
                decode_run(m.format(), m.row(c), &mut run);
                (0..outputs).for_each(|r| all[r * inputs + c] = run[r]);
            }
        }
    }
    all
}

/// The numbers that a format holds.
pub(super) fn rounded(values: &[f32], format: Format) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    decode_run(format, &super::tensors::numbers(format, values), &mut out);
    out
}

/// The weight that stands in for a compressed one while the rest of the block is observed. Codes become numbers as exact as
/// those of the model: blocks and BF16 are multiplied in BF16 too, four times as fast as F32 where there are tiles.
fn replaced(changed: &Changed, linear: &Linear) -> Weight {
    let format = match (linear.weight.format(), &changed.codes) {
        (format, None) => format,
        (Format::F32 | Format::F16, _) => Format::F32,
        _ => Format::Bf16,
    };
    let bytes = super::tensors::numbers(format, &changed.weight);
    let (outputs, inputs) = (linear.weight.outputs(), linear.weight.inputs());
    Weight::new(format, Orientation::OutputMajor, outputs, inputs, bytes.into()).expect("as many numbers as before")
}

/// `sum s_j (a_ij - b_ij)^2 / sum s_j a_ij^2`.
pub(super) fn relative(a: &[f32], b: &[f32], squares: Option<&[f64]>, inputs: usize) -> f64 {
    let (mut lost, mut all) = (0.0, 0.0);
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let s = squares.map_or(1.0, |s| s[i % inputs]);
        lost += s * f64::from(a - b).powi(2);
        all += s * f64::from(*a).powi(2);
    }
    if all > 0.0 { lost / all } else { 0.0 }
}

/// Rows that errors of outputs are measured on at most, evenly spread.
const ERROR_ROWS: usize = 256;

/// `||(A - B) X^T||^2 / ||A X^T||^2` by the Gram matrix, over at most 256 rows; without one, as if inputs were not
/// correlated.
pub(super) fn output_error(pool: &Pool, seen: &Inputs, a: &[f32], b: &[f32], inputs: usize) -> f64 {
    let Some(gram) = &seen.gram else { return relative(a, b, Some(&seen.squares), inputs) };
    let step = (a.len() / inputs).div_ceil(ERROR_ROWS).max(1);
    let rows = |x: &[f32]| x.chunks_exact(inputs).step_by(step).flatten().copied().collect::<Vec<f32>>();
    let (a, b) = (rows(a), rows(b));
    let difference: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
    let most = seen.squares.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let bytes: Vec<u8> = gram.iter().flat_map(|g| ((g / most) as f32).to_le_bytes()).collect();
    let w = Matrix::new(Format::F32, inputs, inputs, &bytes).expect("a square matrix");
    let energy = |x: &[f32]| {
        let mut input = gemm::Input::new();
        input.prepare(pool, x, x.len() / inputs, inputs, &[Format::F32]);
        let mut y = vec![0.0; x.len()];
        gemm::run(pool, &mut [gemm::Job { w: gemm::Weights::OutputMajor(w), x: &input, y: &mut y, accumulate: false }]);
        x.iter().zip(&y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>()
    };
    let all = energy(&a);
    if all > 0.0 { (energy(&difference) / all).max(0.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_core::method::MlpShape;

    #[test]
    fn groups_follow_what_is_observed_together() {
        let mlp = |gated| MlpShape { inner: 4, gated, activation: "silu".into(), exact_zeros: false };
        let shape = |mlp| LayerShape { width: 2, query: 2, kv: 2, mlp, experts: None };
        use Proj::{Down, Gate, K, O, Q, Up, V};
        assert_eq!(groups(&shape(Some(mlp(true)))), [vec![Q, K, V], vec![O], vec![Gate, Up], vec![Down]]);
        assert_eq!(groups(&shape(Some(mlp(false)))), [vec![Q, K, V], vec![O], vec![Up], vec![Down]]);
        assert_eq!(groups(&shape(None)), [vec![Q, K, V], vec![O]]);
    }

    #[test]
    fn errors_by_gram_and_by_norms() {
        let pool = Pool::new(1);
        let (a, b) = ([1.0, 2.0, 3.0, -1.0], [1.0, 0.0, 3.0, -1.0]);
        let mut seen = Inputs { tokens: 2, squares: vec![5.0, 2.0], gram: Some(vec![5.0, 1.0, 1.0, 2.0]) };
        // Lost: 2 * 2^2. All: [1 2] and [3 -1] through the matrix, 5 + 4 + 8 and 45 - 6 + 2.
        assert!((output_error(&pool, &seen, &a, &b, 2) - 8.0 / 58.0).abs() < 1e-6);
        seen.gram = None;
        assert!((output_error(&pool, &seen, &a, &b, 2) - 8.0 / (13.0 + 47.0)).abs() < 1e-12);
        assert_eq!(relative(&a, &b, None, 2), 4.0 / 15.0);
    }
}
