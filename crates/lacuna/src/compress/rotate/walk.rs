//! The walk through the blocks: the stream before each norm is seen, gets its basis and is cut, and what reads and writes it
//! turns with it.
//!
//! The streams of the text stay in the model's own coordinates. What a cut does to them is the projector on the kept directions,
//! because a plain norm over the original width sees lengths alone; so the original halves of each block, run on projected
//! streams, show exactly what the cut model would compute there before its next cut.

use super::{
    BASIS, Sliced,
    halves::{Half, runner},
    matrix::{centre, squares, times, turned},
};
use crate::{
    compress::{
        LayerReport, Plan,
        block::{Runner, decoded, rounded},
        choices::place,
        fold::Norms,
        gram::Gather,
        hidden::Hidden,
        homes::Home,
        store::Finished,
        tensors::{Target, finished, numbers},
    },
    error::{Error, Result},
    model::{
        Model,
        source::Source,
        spec::NormKind,
        weights::{Linear, Norm},
    },
};
use lacuna_core::{
    compress::{Changed, Rotator, Stream},
    format::safetensors::{Dtype, Tensors},
    method::MethodError,
    observer::Observer,
    site::{Point, Proj},
};
use lacuna_kernels::{Format, Pool, convert::decode_run};
use lacuna_methods::registry::Resolved;
use std::collections::BTreeMap;

/// The kept directions of a basis.
pub struct Cut {
    /// `[kept, width]`.
    pub rows: Vec<f32>,
    /// Share of the stream's squares that was cut off, if the stream was seen.
    pub lost: Option<f64>,
}

/// What a walk works on.
pub struct Walk<'a> {
    pub plan: &'a Plan<'a>,
    pub model: &'a Model,
    pub source: &'a Source,
    pub prefix: &'a str,
    pub sliced: &'a Sliced,
    pub step: &'a Resolved,
    pub rotator: &'static dyn Rotator,
    /// Its threads.
    pub runner: Runner,
}

/// What became of a block.
#[derive(Default)]
pub struct Turned {
    pub tensors: Vec<Finished>,
    pub layers: Vec<LayerReport>,
    pub notes: Vec<String>,
}

impl Walk<'_> {
    pub(super) fn pool(&self) -> &Pool {
        self.runner.pool()
    }

    /// Coordinates that stay.
    pub(super) fn kept(&self) -> usize {
        self.sliced.spec.width
    }

    fn centred(&self) -> bool {
        self.model.spec.norm == NormKind::Layer
    }

    /// The basis of the stream before the first block.
    ///
    /// # Errors
    /// As the method's.
    pub fn first(&self, hidden: Option<&mut Hidden>) -> Result<Cut> {
        let mut gram = None;
        if let Some(hidden) = hidden {
            let width = self.model.spec.width;
            let mut gather = self.gather(0);
            for i in 0..hidden.len() {
                let mut x = hidden.get(i)?;
                if self.centred() {
                    centre(&mut x, width);
                    hidden.set(i, &x)?;
                }
                gather.observe(Point::Output { layer: 0 }, width, &x);
            }
            gram = summed(gather, 0)?;
        }
        self.basis(0, false, gram.as_deref())
    }

    fn gather(&self, layer: usize) -> Gather<'_> {
        Gather::new(self.pool(), [(Point::Output { layer }, self.model.spec.width)], true)
    }

    /// The basis of the stream that the MLP of block `layer` reads, or its attention (behind the last block: the head).
    fn basis(&self, layer: usize, mlp: bool, gram: Option<&[f64]>) -> Result<Cut> {
        let block = self.model.blocks.get(layer);
        let name = match (block, mlp) {
            (None, _) => "head".to_owned(),
            (_, false) => format!("layers.{layer}.attention"),
            (_, true) => format!("layers.{layer}.mlp"),
        };
        let reader = |proj: Proj| {
            let block = block?;
            let of_mlp = matches!(proj, Proj::Gate | Proj::Up);
            let read = !matches!(proj, Proj::O | Proj::Down) && mlp == of_mlp;
            let norm = if mlp { &block.mlp_norm } else { &block.attn_norm };
            Some(folded(block.linear(proj).filter(|_| read)?, norm).0)
        };
        let place = 2 * layer as u64 + u64::from(mlp);
        let stream = Stream {
            place: &name,
            width: self.model.spec.width,
            gram,
            reader: &reader,
            seed: self.plan.request.seed.wrapping_add((place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        };
        let basis = self.rotator.basis(&self.step.params, &stream)?;
        let kept = self.kept();
        let rows = basis.rows[..kept * self.model.spec.width].iter().map(|x| *x as f32).collect();
        Ok(Cut { rows, lost: basis.lost.get(kept).copied() })
    }

    /// Runs a half of a block over all streams, cut to `basis` before; with `see`, gives their Gram matrix behind it.
    fn advance(
        &self,
        layer: usize,
        half: Half,
        basis: &Cut,
        hidden: &mut Hidden,
        see: bool,
    ) -> Result<Option<Vec<f64>>> {
        let width = self.model.spec.width;
        let runner = runner(self.model, layer, half, self.plan.request.threads)?;
        // P = Q^T Q of the kept rows Q; where all stay it is the identity.
        let projector = (self.kept() < width).then(|| {
            let columns = turned(&basis.rows, width);
            times(self.pool(), &columns, self.kept(), &columns)
        });
        let mut gather = self.gather(layer);
        for i in 0..hidden.len() {
            let mut x = hidden.get(i)?;
            if let Some(projector) = &projector {
                x = times(self.pool(), &x, width, projector);
            }
            let mut x = runner.run(&x, hidden.tokens(i))?;
            if self.centred() {
                centre(&mut x, width);
            }
            if see {
                gather.observe(Point::Output { layer }, width, &x);
            }
            hidden.set(i, &x)?;
        }
        if see { summed(gather, layer) } else { Ok(None) }
    }

    fn parallel(&self, layer: usize) -> bool {
        self.model.spec.blocks[layer].parallel
    }

    /// Turns block `layer`, whose attention reads the stream in the basis `incoming`; the streams become its outputs.
    ///
    /// # Errors
    /// What the method says, numbers that are not finite.
    pub fn block(&self, layer: usize, incoming: &Cut, hidden: Option<&mut Hidden>) -> Result<Turned> {
        let mut hidden = hidden;
        let mut run = |half: Half, basis: &Cut| match &mut hidden {
            Some(hidden) => self.advance(layer, half, basis, hidden, true),
            None => Ok(None),
        };
        let (middle, out) = if self.parallel(layer) {
            let gram = run(Half::Both, incoming)?;
            (None, self.basis(layer + 1, false, gram.as_deref())?)
        } else {
            let gram = run(Half::Attention, incoming)?;
            let middle = self.basis(layer, true, gram.as_deref())?;
            let gram = run(Half::Mlp, &middle)?;
            (Some(middle), self.basis(layer + 1, false, gram.as_deref())?)
        };
        let mut done = self.turn(layer, incoming, middle.as_ref(), &out)?;
        if layer == 0 {
            done.tensors.extend(self.beginning(incoming));
        }
        if layer + 1 == self.model.blocks.len() {
            done.tensors.extend(self.end(&out));
        }
        done.tensors.push(self.kept_basis("out", &out));
        done.tensors.extend(middle.iter().map(|middle| self.kept_basis("mlp", middle)));
        Ok(done)
    }

    /// Takes the streams through a block that an earlier run finished.
    ///
    /// # Errors
    /// Numbers that are not finite, a finished block without its bases.
    pub fn replay(&self, layer: usize, incoming: &Cut, tensors: &Tensors, hidden: &mut Hidden) -> Result<()> {
        if self.parallel(layer) {
            return self.advance(layer, Half::Both, incoming, hidden, false).map(|_| ());
        }
        self.advance(layer, Half::Attention, incoming, hidden, false)?;
        let middle = self.found(tensors, "mlp", None)?;
        self.advance(layer, Half::Mlp, &middle, hidden, false).map(|_| ())
    }

    /// A basis among the finished tensors of a block.
    ///
    /// # Errors
    /// There is none of this shape.
    pub fn found(&self, tensors: &Tensors, which: &str, lost: Option<f64>) -> Result<Cut> {
        let mut rows = vec![0.0; self.kept() * self.model.spec.width];
        let name = format!("{BASIS}{which}");
        let missing =
            || Error::MissingTensor { file: self.plan.request.output.display().to_string(), tensor: name.clone() };
        let bytes = tensors.bytes(tensors.get(&name).ok_or_else(missing)?)?;
        if bytes.len() != 4 * rows.len() {
            return Err(missing());
        }
        decode_run(Format::F32, &bytes, &mut rows);
        Ok(Cut { rows, lost })
    }

    fn kept_basis(&self, which: &str, cut: &Cut) -> Finished {
        let shape = vec![self.kept() as u64, self.model.spec.width as u64];
        Finished { name: format!("{BASIS}{which}"), dtype: Dtype::F32, shape, data: numbers(Format::F32, &cut.rows) }
    }

    /// The tensors of a block in its bases: that of its attention, of its MLP (none of its own in a parallel block), and of
    /// what follows.
    fn turn(&self, layer: usize, incoming: &Cut, middle: Option<&Cut>, out: &Cut) -> Result<Turned> {
        let block = &self.model.blocks[layer];
        let mut done = Turned::default();
        let (mut changed, mut biases) = (BTreeMap::new(), BTreeMap::new());
        for (proj, linear) in Proj::ALL.into_iter().filter_map(|p| Some((p, block.linear(p)?))) {
            let (dense, turned) = match proj {
                Proj::Q | Proj::K | Proj::V => self.reader(linear, &block.attn_norm, incoming),
                Proj::Gate | Proj::Up => self.reader(linear, &block.mlp_norm, middle.unwrap_or(incoming)),
                Proj::O => self.writer(linear, middle.unwrap_or(out)),
                Proj::Down => self.writer(linear, out),
            };
            let lost = match proj {
                Proj::Q | Proj::K | Proj::V => incoming.lost,
                Proj::Gate | Proj::Up => middle.unwrap_or(incoming).lost,
                Proj::O => middle.unwrap_or(out).lost,
                Proj::Down => out.lost,
            };
            let report = report(layer, proj, linear, &dense, &turned.weight, lost);
            let held = rounded(&turned.weight, linear.weight.format());
            if let Some(bad) = held.iter().chain(turned.bias.iter().flatten()).find(|w| !w.is_finite()) {
                let reason = format!("a turned weight is {bad} in {}", linear.weight.format().name());
                return Err(MethodError::Layer { place: place(layer, proj), reason }.into());
            }
            done.layers.push(report);
            biases.extend(turned.bias.map(|b| (proj, b)));
            let weight = turned.weight;
            changed.insert(
                proj,
                Changed { weight, kept: None, codes: None, books: None, low_rank: None, notes: Vec::new() },
            );
        }
        let homes = &self.sliced.homes[layer];
        let format = |h: &Home| self.source.tensors.get(&h.tensor).map_or(Format::F32, |t| t.format);
        for home in homes {
            done.tensors.extend(finished(home, &changed, format(home), Target::HuggingFace));
            done.tensors.extend(self.bias(home, &biases, format(home)));
        }
        for name in [Proj::Q, Proj::Up].into_iter().filter_map(|p| self.norms().name(layer, p, "weight")) {
            done.tensors.push(ones(self.source, name, self.kept()));
        }
        done.tensors.extend(self.shortcuts(layer, incoming, middle, out));
        if let (Some(cut), true) = (out.lost, self.kept() < self.model.spec.width) {
            let before = |c: Option<f64>| c.map_or("-".into(), |c| format!("{:.2} %", 100.0 * c));
            let middle = middle.map_or(String::new(), |m| format!("{} before its MLP, ", before(m.lost)));
            done.notes.push(format!(
                "layers.{layer}: of the stream's squares, the cuts lose {middle}{:.2} % behind it",
                100.0 * cut
            ));
        }
        Ok(done)
    }

    fn norms(&self) -> Norms<'_> {
        Norms { source: self.source, names: self.plan.names, prefix: self.prefix }
    }

    /// A projection that reads the normalised stream: before (with the norm in it), and in the basis.
    fn reader(&self, linear: &Linear, norm: &Norm, basis: &Cut) -> (Vec<f32>, Matrices) {
        let (dense, bias) = folded(linear, norm);
        let weight = times(self.pool(), &dense, linear.weight.inputs(), &basis.rows);
        (dense, Matrices { weight, bias })
    }

    /// A projection that writes to the stream: before, and in the basis of what reads it.
    fn writer(&self, linear: &Linear, basis: &Cut) -> (Vec<f32>, Matrices) {
        let width = linear.weight.outputs();
        let mut columns = turned(&decoded(&linear.weight), linear.weight.inputs());
        let mut bias = linear.bias.clone();
        if self.centred() {
            centre(&mut columns, width);
            bias.iter_mut().for_each(|b| centre(b, width));
        }
        let weight = times(self.pool(), &basis.rows, width, &columns);
        let bias = bias.map(|b| times(self.pool(), &b, width, &basis.rows));
        (columns, Matrices { weight, bias })
    }

    /// The biases of a home's projections.
    fn bias(&self, home: &Home, biases: &BTreeMap<Proj, Vec<f32>>, format: Format) -> Option<Finished> {
        let name = format!("{}.bias", home.tensor.strip_suffix(".weight")?);
        home.parts.iter().any(|(proj, _)| biases.contains_key(proj)).then_some(())?;
        let mut all = vec![0.0; home.outputs];
        for (proj, rows) in &home.parts {
            let Some(bias) = biases.get(proj) else { continue };
            rows.iter().zip(bias).for_each(|(r, b)| all[*r] = *b);
        }
        let format = self.source.tensors.get(&name).map_or(format, |t| t.format);
        let shape = vec![all.len() as u64];
        Some(Finished { name, dtype: Dtype::of(format)?, shape, data: numbers(format, &all) })
    }

    /// `S = Q_from Q_to^T`, stored `[inputs, outputs]`: half precision holds such numbers better than BF16, in as many bytes,
    /// and products with it do not round the stream.
    fn shortcuts(&self, layer: usize, incoming: &Cut, middle: Option<&Cut>, out: &Cut) -> Vec<Finished> {
        let (kept, width) = (self.kept() as u64, self.model.spec.width);
        let format = match self.model.blocks[layer].o.weight.format() {
            Format::F32 => Format::F32,
            _ => Format::F16,
        };
        let dtype = if format == Format::F32 { Dtype::F32 } else { Dtype::F16 };
        let [attn, mlp] = self.plan.names.shortcuts(layer).map(|name| format!("{}{name}", self.prefix));
        let one = |name: String, from: &Cut, to: &Cut| {
            let s = times(self.pool(), &from.rows, width, &to.rows);
            Finished { name, dtype, shape: vec![kept, kept], data: numbers(format, &s) }
        };
        match middle {
            Some(middle) => vec![one(attn, incoming, middle), one(mlp, middle, out)],
            None => vec![one(attn, incoming, out)],
        }
    }
}

/// A projection in its new basis.
struct Matrices {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

/// `W diag(gain)` and `b + W shift`: the projection as it reads a plain norm.
fn folded(linear: &Linear, norm: &Norm) -> (Vec<f32>, Option<Vec<f32>>) {
    let inputs = linear.weight.inputs();
    let mut weight = decoded(&linear.weight);
    let mut bias = linear.bias.clone();
    if let Some(shift) = &norm.bias {
        let moved = weight
            .chunks_exact(inputs)
            .map(|row| row.iter().zip(shift).map(|(w, s)| f64::from(*w) * f64::from(*s)).sum::<f64>() as f32);
        bias = Some(match bias {
            Some(bias) => bias.iter().zip(moved).map(|(b, m)| b + m).collect(),
            None => moved.collect(),
        });
    }
    weight.chunks_exact_mut(inputs).for_each(|row| row.iter_mut().zip(&norm.gain).for_each(|(w, g)| *w *= g));
    (weight, bias)
}

/// A plain norm, of the type that the norm `name` had.
pub fn ones(source: &Source, name: String, width: usize) -> Finished {
    let format = source.tensors.get(&name).map_or(Format::F32, |t| t.format);
    let data = numbers(format, &vec![1.0; width]);
    Finished { name, dtype: Dtype::of(format).unwrap_or(Dtype::F32), shape: vec![width as u64], data }
}

/// The Gram matrix of what was gathered.
fn summed(gather: Gather<'_>, layer: usize) -> Result<Option<Vec<f64>>> {
    if let Some((_, value)) = gather.broken {
        let point = Point::Output { layer };
        return Err(MethodError::NonFinite { point, value, token: gather.tokens() }.into());
    }
    Ok(gather.finish().pop().and_then(|(_, inputs)| inputs.gram))
}

/// What became of one projection; its errors are what was cut off, of the matrix and of the stream.
fn report(layer: usize, proj: Proj, linear: &Linear, dense: &[f32], new: &[f32], lost: Option<f64>) -> LayerReport {
    let (all, left) = (squares(dense), squares(new));
    LayerReport {
        layer,
        proj: proj.name().into(),
        outputs: linear.weight.outputs(),
        inputs: linear.weight.inputs(),
        dropped: (dense.len() - new.len()) as u64,
        zeros: 0,
        bits: None,
        bytes: (0, 0),
        weight_error: if all > 0.0 { (1.0 - left / all).max(0.0) } else { 0.0 },
        output_error: lost,
    }
}
