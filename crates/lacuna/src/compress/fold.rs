//! Factors of the inputs of some projections, folded into the norm before them: columns are multiplied, the norm is divided.
//! Factors are powers of two, so that both are exact, and the model computes the same bits until something is rounded.

use super::{block::decoded, store::Finished, tensors::numbers};
use crate::model::{
    names::{Names, fill},
    source::Source,
    weights::{Block, Norm},
};
use lacuna_core::{
    compress::Inputs,
    format::safetensors::Dtype,
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_kernels::{Format, convert::decode_run};

/// The norm whose output the projections of a group (named by their first) read.
fn norm(block: &Block, first: Proj) -> Option<&Norm> {
    match first {
        Proj::Q => Some(&block.attn_norm),
        Proj::Gate | Proj::Up => Some(&block.mlp_norm),
        _ => None,
    }
}

/// Where the norms of a model are stored.
#[derive(Clone, Copy)]
pub struct Norms<'a> {
    /// The stored tensors.
    pub source: &'a Source,
    /// Their names.
    pub names: &'a Names,
    /// What their names begin with.
    pub prefix: &'a str,
}

impl Norms<'_> {
    /// What its weight or bias (`end`) is called.
    pub fn name(self, layer: usize, first: Proj, end: &str) -> Option<String> {
        let template = match first {
            Proj::Q => self.names.attn_norm,
            Proj::Gate | Proj::Up => self.names.mlp_norm,
            _ => return None,
        };
        Some(format!("{}{}.{end}", self.prefix, fill(template, &[layer])))
    }

    /// How the norm before `first` is stored; `None` where there is none, or where its numbers are stored with an offset.
    pub fn format(self, layer: usize, first: Proj) -> Option<Format> {
        let name = self.name(layer, first, "weight").filter(|_| self.names.gain_offset == 0.0)?;
        self.source.tensors.get(&name).map(|t| t.format)
    }

    /// The tensors of the norm before `first` of block `layer`, as they are in `block`.
    pub fn finished(self, layer: usize, block: &Block, first: Proj) -> Vec<Finished> {
        let Some(norm) = norm(block, first) else { return Vec::new() };
        let tensor = |(end, values): (&str, Option<&Vec<f32>>)| {
            let name = self.name(layer, first, end)?;
            let stored = self.source.tensors.get(&name)?;
            let shape = stored.shape.iter().map(|n| *n as u64).collect();
            Some(Finished { name, dtype: Dtype::of(stored.format)?, shape, data: numbers(stored.format, values?) })
        };
        [("weight", Some(&norm.gain)), ("bias", norm.bias.as_ref())].into_iter().filter_map(tensor).collect()
    }
}

/// Whether `factors` can be folded exactly where the group reads.
pub fn fits(block: &Block, group: &[Proj], factors: &[f32], format: Format) -> bool {
    let exact = |numbers_: &[f32]| {
        let divided: Vec<f32> = numbers_.iter().zip(factors).map(|(g, f)| g / f).collect();
        let mut back = vec![0.0; divided.len()];
        decode_run(format, &numbers(format, &divided), &mut back);
        back == divided && divided.iter().zip(factors).zip(numbers_).all(|((d, f), g)| d * f == *g)
    };
    let plain = matches!(format, Format::F32 | Format::F16 | Format::Bf16);
    plain && norm(block, group[0]).is_some_and(|n| exact(&n.gain) && n.bias.as_deref().is_none_or(exact))
}

/// Multiplies the columns of the group's weights, and divides the norm before them.
pub fn into(block: &mut Block, group: &[Proj], factors: &[f32]) {
    let norm = if group[0] == Proj::Q { &mut block.attn_norm } else { &mut block.mlp_norm };
    let divide = |numbers: &mut Vec<f32>| numbers.iter_mut().zip(factors).for_each(|(g, f)| *g /= f);
    divide(&mut norm.gain);
    norm.bias.iter_mut().for_each(divide);
    for proj in group {
        let Some(linear) = block.linear_mut(*proj) else { continue };
        let (outputs, inputs) = (linear.weight.outputs(), linear.weight.inputs());
        let mut all = decoded(&linear.weight);
        all.chunks_exact_mut(inputs).for_each(|row| row.iter_mut().zip(factors).for_each(|(w, f)| *w *= f));
        let same = linear.weight.format();
        let format = if same == Format::Q8_0 { Format::F32 } else { same };
        let bytes = numbers(format, &all).into();
        linear.weight =
            Weight::new(format, Orientation::OutputMajor, outputs, inputs, bytes).expect("as many numbers as before");
    }
}

/// What is seen of the inputs once they are divided.
pub fn seen(inputs: &mut Inputs, factors: &[f32]) {
    let n = factors.len();
    let of = |j: usize| f64::from(factors[j]);
    inputs.squares.iter_mut().enumerate().for_each(|(j, s)| *s /= of(j) * of(j));
    if let Some(gram) = &mut inputs.gram {
        gram.iter_mut().enumerate().for_each(|(i, g)| *g /= of(i / n) * of(i % n));
    }
}
