//! Where the projections of a block are stored: which tensor, which of its rows. Some architectures keep several in one.

use crate::model::{
    names::{GateUp, Names, Qkv, fill},
    spec::{BlockSpec, MlpSpec, Spec},
};
use lacuna_core::site::Proj;

/// A stored tensor and the projections in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Home {
    /// Name of the tensor, with `.weight`.
    pub tensor: String,
    /// Rows of all projections in it (columns of the stored tensor, if it is transposed).
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// Stored `[inputs, outputs]`.
    pub transposed: bool,
    /// The projections, and which rows are theirs, in their order.
    pub parts: Vec<(Proj, Vec<usize>)>,
}

/// The homes of the projections of block `layer`, in the order of the forward pass. Experts are not reached.
pub fn homes(names: &Names, prefix: &str, spec: &Spec, layer: usize) -> Vec<Home> {
    let b = &spec.blocks[layer];
    let home = |template: &str, inputs: usize, parts: Vec<(Proj, Vec<usize>)>| Home {
        tensor: format!("{prefix}{}.weight", fill(template, &[layer])),
        outputs: parts.iter().map(|p| p.1.len()).sum(),
        inputs,
        transposed: names.transposed,
        parts,
    };
    let one = |template: &str, proj: Proj, outputs: usize, inputs: usize| {
        home(template, inputs, vec![(proj, (0..outputs).collect())])
    };
    let (width, q_width) = (spec.width, b.attended());
    let mut all = attention(names, b).into_iter().map(|(t, parts)| home(t, width, parts)).collect::<Vec<_>>();
    all.push(one(names.o, Proj::O, width, q_width));
    match b.mlp {
        MlpSpec::Experts { .. } | MlpSpec::ReluExperts { .. } => {}
        MlpSpec::Plain { inner } => {
            all.extend([one(names.up, Proj::Up, inner, width), one(names.down, Proj::Down, width, inner)]);
        }
        MlpSpec::Gated { inner } => {
            match names.gate_up {
                GateUp::Split(gate, up) => {
                    all.extend([one(gate, Proj::Gate, inner, width), one(up, Proj::Up, inner, width)]);
                }
                GateUp::Rows(name) => {
                    let parts = vec![(Proj::Gate, (0..inner).collect()), (Proj::Up, (inner..2 * inner).collect())];
                    all.push(home(name, width, parts));
                }
            }
            all.push(one(names.down, Proj::Down, width, inner));
        }
    }
    all
}

type Parts = Vec<(Proj, Vec<usize>)>;

fn attention(names: &Names, b: &BlockSpec) -> Vec<(&'static str, Parts)> {
    let d = b.head_dim;
    let sizes = [(Proj::Q, b.heads * d), (Proj::K, b.kv_heads * d), (Proj::V, b.kv_heads * d)];
    match names.qkv {
        Qkv::Split(q, k, v) => {
            [q, k, v].into_iter().zip(sizes).map(|(t, (proj, n))| (t, vec![(proj, (0..n).collect())])).collect()
        }
        Qkv::Rows(name) => {
            let mut start = 0;
            let next = |(proj, n): (Proj, usize)| {
                start += n;
                (proj, (start - n..start).collect())
            };
            vec![(name, sizes.into_iter().map(next).collect())]
        }
        Qkv::PerHead(name) => {
            let rows = |p: usize| (0..b.heads).flat_map(|h| (3 * h + p) * d..(3 * h + p + 1) * d).collect();
            vec![(name, [Proj::Q, Proj::K, Proj::V].into_iter().zip([rows(0), rows(1), rows(2)]).collect())]
        }
    }
}
