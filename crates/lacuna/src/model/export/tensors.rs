//! Which tensors a GGUF file gets, and how each is made from the stored ones.

use super::super::{
    arch::GgufSide,
    bind::prefix,
    checkpoint::Checkpoint,
    names::{Experts, GateUp, Names, Qkv, fill},
    source::{Source, Stored},
    spec::{BlockSpec, MlpSpec, NormKind, Position, RopePairs, Spec},
};
use crate::error::{Error, Result};
use lacuna_core::{bytes::Bytes, format::gguf::TensorType};
use lacuna_kernels::{Format, convert::decode_run};
use std::io::{self, Write};

/// A tensor of the file.
pub struct Part {
    pub name: String,
    pub kind: TensorType,
    /// Fastest axis first.
    pub dims: Vec<u64>,
    how: How,
}

/// Where its numbers come from.
enum How {
    /// Rows of a stored matrix, in an order of their own.
    Rows(String, Option<Vec<usize>>),
    /// A matrix that is stored `[inputs, outputs]`.
    Turned(String),
    /// Numbers in F32 with something added to each.
    Floats(String, Option<Vec<usize>>, f32),
    /// Matrices one behind the other.
    Stack(Vec<String>),
    /// These.
    Values(Vec<f32>),
}

impl Part {
    /// These numbers, in F32.
    pub fn values(name: &str, values: Vec<f32>) -> Self {
        Self { name: name.into(), kind: TensorType::F32, dims: vec![values.len() as u64], how: How::Values(values) }
    }

    /// The numbers of [`Part::values`].
    pub fn given(&self) -> Option<&[f32]> {
        if let How::Values(v) = &self.how { Some(v) } else { None }
    }

    /// Writes its data.
    pub fn put(&self, source: &Source, out: &mut dyn Write) -> io::Result<()> {
        match &self.how {
            How::Values(values) => values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())),
            How::Rows(tensor, order) => {
                let (stored, bytes) = loaded(source, tensor)?;
                let row = bytes.len() / stored.shape.first().copied().unwrap_or(1).max(1);
                match order {
                    None => out.write_all(&bytes),
                    Some(order) => order.iter().try_for_each(|r| out.write_all(&bytes[r * row..][..row])),
                }
            }
            How::Turned(tensor) => {
                let (stored, bytes) = loaded(source, tensor)?;
                let (size, all) = (stored.format.block_bytes(), stored.shape.last().copied().unwrap_or(1));
                for column in 0..all {
                    let numbers = bytes[column * size..].chunks(all * size).flat_map(|n| &n[..size]);
                    out.write_all(&numbers.copied().collect::<Vec<u8>>())?;
                }
                Ok(())
            }
            How::Floats(tensor, order, offset) => {
                let (stored, bytes) = loaded(source, tensor)?;
                let mut numbers = vec![0.0; stored.shape.iter().product()];
                decode_run(stored.format, &bytes, &mut numbers);
                let at = |i: usize| (numbers[order.as_ref().map_or(i, |o| o[i])] + offset).to_le_bytes();
                (0..numbers.len()).try_for_each(|i| out.write_all(&at(i)))
            }
            How::Stack(tensors) => tensors.iter().try_for_each(|t| out.write_all(&loaded(source, t)?.1)),
        }
    }
}

/// A stored tensor and its bytes in the format that it is used in.
fn loaded<'a>(source: &'a Source, name: &str) -> io::Result<(&'a Stored, Bytes)> {
    let stored = source.tensors.get(name).ok_or_else(|| io::Error::other(format!("tensor `{name}` is gone")))?;
    let bytes = stored.in_memory(&source.file, name).map_err(|e| io::Error::other(e.to_string()))?;
    Ok((stored, bytes))
}

/// Every tensor of the model, in the order of the forward pass.
///
/// # Errors
/// Missing tensors, or an arrangement that the GGUF side has no names for.
pub fn all(checkpoint: &Checkpoint, side: &GgufSide, rows: RopePairs) -> Result<Vec<Part>> {
    let (source, from) = (&checkpoint.source, checkpoint.names);
    let adjacent = rows == RopePairs::Adjacent;
    let prefix = prefix(source, from);
    let mut c = Collector { source, from, to: side.names, prefix, spec: &checkpoint.spec, adjacent, parts: Vec::new() };
    let spec = c.spec;
    c.matrix(from.embed, side.names.embed, &[], None)?;
    if let Position::Learned { .. } = spec.position {
        let name = c.stored(from.positions, &[], "weight");
        c.floats(name, format!("{}.weight", side.names.positions), None, 0.0)?;
    }
    for i in 0..spec.blocks.len() {
        c.block(i, &spec.blocks[i])?;
    }
    c.norm(from.final_norm, side.names.final_norm, &[])?;
    c.head(checkpoint.tied)?;
    Ok(c.parts)
}

struct Collector<'a> {
    source: &'a Source,
    from: &'a Names,
    to: &'a Names,
    prefix: &'a str,
    spec: &'a Spec,
    /// Query and key rows are turned from halves to neighbours.
    adjacent: bool,
    parts: Vec<Part>,
}

type Order = Option<Vec<usize>>;

impl Collector<'_> {
    fn stored(&self, template: &str, numbers: &[usize], end: &str) -> String {
        format!("{}{}.{end}", self.prefix, fill(template, numbers))
    }

    fn get(&self, name: &str) -> Result<&Stored> {
        let missing = || Error::MissingTensor { file: self.source.file.clone(), tensor: name.into() };
        self.source.tensors.get(name).ok_or_else(missing)
    }

    /// A vector or a table, in F32.
    fn floats(&mut self, from: String, to: String, order: Order, offset: f32) -> Result<()> {
        let dims = self.get(&from)?.shape.iter().rev().map(|n| *n as u64).collect();
        self.parts.push(Part { name: to, kind: TensorType::F32, dims, how: How::Floats(from, order, offset) });
        Ok(())
    }

    fn norm(&mut self, from: &str, to: &str, numbers: &[usize]) -> Result<()> {
        let offset = self.from.gain_offset - self.to.gain_offset;
        let to = fill(to, numbers);
        self.floats(self.stored(from, numbers, "weight"), format!("{to}.weight"), None, offset)?;
        if self.spec.norm == NormKind::Layer {
            self.floats(self.stored(from, numbers, "bias"), format!("{to}.bias"), None, 0.0)?;
        }
        Ok(())
    }

    /// A norm that is there only in some models.
    fn optional_norm(&mut self, from: &str, to: &str, i: usize) -> Result<()> {
        let there = !from.is_empty() && self.source.has(&self.stored(from, &[i], "weight"));
        if there { self.norm(from, to, &[i]) } else { Ok(()) }
    }

    /// A matrix in the type that it has.
    fn matrix(&mut self, from: &str, to: &str, numbers: &[usize], order: Order) -> Result<()> {
        let (name, to) = (self.stored(from, numbers, "weight"), format!("{}.weight", fill(to, numbers)));
        let block = !numbers.is_empty();
        let turned = self.from.transposed && block;
        let stored = self.get(&name)?;
        let kind = TensorType::of(stored.format);
        let mut dims: Vec<u64> = stored.shape.iter().rev().map(|n| *n as u64).collect();
        if turned {
            dims.reverse();
            if stored.format.block_len() != 1 {
                return Err(self.unsupported(format!("codes of the transposed tensor `{name}`")));
            }
        }
        let how = if turned { How::Turned(name) } else { How::Rows(name, order) };
        self.parts.push(Part { name: to, kind, dims, how });
        Ok(())
    }

    /// A linear layer: its matrix, and its bias where there is one.
    fn linear(&mut self, from: &str, to: &str, i: usize, order: Order) -> Result<()> {
        let bias = self.stored(from, &[i], "bias");
        self.matrix(from, to, &[i], order.clone())?;
        if self.source.has(&bias) {
            self.floats(bias, format!("{}.bias", fill(to, &[i])), order, 0.0)?;
        }
        Ok(())
    }

    fn unsupported(&self, what: String) -> Error {
        Error::Unsupported {
            file: self.source.file.clone(),
            what: format!("{what} in a GGUF file"),
            remedy: String::new(),
        }
    }

    fn block(&mut self, i: usize, b: &BlockSpec) -> Result<()> {
        let (from, to) = (self.from, self.to);
        self.norm(from.attn_norm, to.attn_norm, &[i])?;
        self.qkv(i, b)?;
        self.linear(from.o, to.o, i, None)?;
        self.optional_norm(from.q_norm, to.q_norm, i)?;
        self.optional_norm(from.k_norm, to.k_norm, i)?;
        self.optional_norm(from.attn_post_norm, to.attn_post_norm, i)?;
        self.norm(from.mlp_norm, to.mlp_norm, &[i])?;
        self.mlp(i, &b.mlp)?;
        self.optional_norm(from.mlp_post_norm, to.mlp_post_norm, i)
    }

    fn qkv(&mut self, i: usize, b: &BlockSpec) -> Result<()> {
        let turn = |heads: usize| self.adjacent.then(|| neighbours(heads, b.head_dim));
        match (self.from.qkv, self.to.qkv) {
            (Qkv::Split(q, k, v), Qkv::Split(to_q, to_k, to_v)) => {
                let orders = (turn(b.heads), turn(b.kv_heads));
                self.linear(q, to_q, i, orders.0)?;
                self.linear(k, to_k, i, orders.1)?;
                self.linear(v, to_v, i, None)
            }
            (Qkv::Rows(all), Qkv::Rows(to)) if !self.adjacent => self.linear(all, to, i, None),
            (Qkv::PerHead(all), Qkv::Rows(to)) if !self.adjacent => {
                let d = b.head_dim;
                let rows = |p: usize| (0..b.heads).flat_map(move |h| (3 * h + p) * d..(3 * h + p + 1) * d);
                self.linear(all, to, i, Some((0..3).flat_map(rows).collect()))
            }
            _ => Err(self.unsupported("this arrangement of query, key and value".into())),
        }
    }

    fn mlp(&mut self, i: usize, mlp: &MlpSpec) -> Result<()> {
        let (from, to) = (self.from, self.to);
        match *mlp {
            MlpSpec::Plain { .. } => self.linear(from.up, to.up, i, None)?,
            MlpSpec::Gated { .. } => match (from.gate_up, to.gate_up) {
                (GateUp::Split(gate, up), GateUp::Split(to_gate, to_up)) => {
                    self.linear(gate, to_gate, i, None)?;
                    self.linear(up, to_up, i, None)?;
                }
                (GateUp::Rows(all), GateUp::Rows(to)) => self.linear(all, to, i, None)?,
                _ => return Err(self.unsupported("this arrangement of gate and up".into())),
            },
            MlpSpec::Experts { experts, .. } => return self.experts(i, experts),
            MlpSpec::ReluExperts { .. } => return Err(self.unsupported("experts behind a router with a ReLU".into())),
        }
        self.linear(from.down, to.down, i, None)
    }

    fn experts(&mut self, i: usize, count: usize) -> Result<()> {
        let router = self.stored(self.from.router, &[i], "weight");
        self.floats(router, format!("{}.weight", fill(self.to.router, &[i])), None, 0.0)?;
        let (Experts::Each(a, b, c), Experts::Stacked(to_a, to_b, to_c)) = (self.from.experts, self.to.experts) else {
            return Err(self.unsupported("this arrangement of experts".into()));
        };
        for (from, to) in [(a, to_a), (b, to_b), (c, to_c)] {
            let names: Vec<String> = (0..count).map(|e| self.stored(from, &[i, e], "weight")).collect();
            let first = self.get(&names[0])?;
            let (format, shape) = (first.format, first.shape.clone());
            for name in &names {
                let t = self.get(name)?;
                if (t.format, &t.shape) != (format, &shape) {
                    return Err(self.unsupported(format!("experts of different shapes or types (`{name}`)")));
                }
            }
            let dims = shape.iter().rev().map(|n| *n as u64).chain([count as u64]).collect();
            let name = format!("{}.weight", fill(to, &[i]));
            self.parts.push(Part { name, kind: TensorType::of(format), dims, how: How::Stack(names) });
        }
        Ok(())
    }

    /// The output head, unless it is the embedding.
    fn head(&mut self, tied: Option<bool>) -> Result<()> {
        let plain = format!("{}.weight", self.from.head);
        let prefixed = format!("{}{plain}", self.prefix.strip_suffix("model.").unwrap_or(self.prefix));
        let name = if self.source.has(&plain) { plain } else { prefixed };
        if tied == Some(true) || !self.source.has(&name) {
            return Ok(());
        }
        let stored = self.get(&name)?;
        let (kind, dims) = (TensorType::of(stored.format), stored.shape.iter().rev().map(|n| *n as u64).collect());
        let bias = name.replace(".weight", ".bias");
        let to = self.to.head;
        self.parts.push(Part { name: format!("{to}.weight"), kind, dims, how: How::Rows(name, None) });
        if self.source.has(&bias) {
            self.floats(bias, format!("{to}.bias"), None, 0.0)?;
        }
        Ok(())
    }
}

/// The rows of heads whose rotated pairs lie half a head apart, in the order in which they are neighbours: row `2 i + p` of a
/// head is its row `p d/2 + i`.
fn neighbours(heads: usize, d: usize) -> Vec<usize> {
    (0..heads * d).map(|r| r / d * d + r % 2 * (d / 2) + r % d / 2).collect()
}

/// The type most of the numbers of `parts` have.
pub fn main_type(parts: &[Part]) -> TensorType {
    let matrices = || parts.iter().filter(|p| p.dims.len() > 1);
    let size =
        |kind: TensorType| matrices().filter(|p| p.kind == kind).map(|p| p.dims.iter().product::<u64>()).sum::<u64>();
    let kinds = [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4_0].map(TensorType::of);
    kinds.into_iter().max_by_key(|k| size(*k)).unwrap_or(TensorType::F32)
}

#[cfg(test)]
mod tests {
    use super::neighbours;

    #[test]
    fn halves_become_neighbours() {
        assert_eq!(neighbours(2, 6), [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }
}
