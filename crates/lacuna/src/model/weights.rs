//! The weights of a model, bound to their places. All matrices are [`Weight`]s, usually parts of a mapped file.

use super::spec::Spec;
use lacuna_core::{format::packed::PackedFile, site::Proj, weight::Weight};
use std::sync::Arc;

/// `y = W x + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The matrix `W[out, in]`.
    pub weight: Weight,
    /// The bias, one per output.
    pub bias: Option<Vec<f32>>,
}

/// Gain and bias of a normalisation.
#[derive(Clone, Debug)]
pub struct Norm {
    /// One per channel; offsets of the checkpoint (Gemma's `1 +`) already added.
    pub gain: Vec<f32>,
    /// One per channel, layer norm only.
    pub bias: Option<Vec<f32>>,
    /// What the sum of squares is divided by: the number of channels, or the width before the residual stream was cut.
    pub over: usize,
}

/// A gated MLP, or one expert.
#[derive(Clone, Debug)]
pub struct Gated {
    /// `[inner, width]`.
    pub gate: Linear,
    /// `[inner, width]`.
    pub up: Linear,
    /// `[width, inner]`.
    pub down: Linear,
}

/// An expert without a gate.
#[derive(Clone, Debug)]
pub struct Ungated {
    /// `[inner, width]`.
    pub up: Linear,
    /// `[width, inner]`.
    pub down: Linear,
}

/// The MLP of a block.
#[derive(Clone, Debug)]
pub enum Mlp {
    /// `down(act(gate x) * up x)`.
    Gated(Gated),
    /// `down(act(up x))`.
    Plain {
        /// `[inner, width]`.
        up: Linear,
        /// `[width, inner]`.
        down: Linear,
    },
    /// Router and experts.
    Experts {
        /// `[experts, width]`.
        router: Linear,
        /// One gated MLP each.
        experts: Vec<Gated>,
    },
    /// Router with a ReLU and experts without gates.
    ReluExperts {
        /// `[experts, width]`.
        router: Linear,
        /// One per expert, for [`super::spec::RouterScale::Rms`].
        gain: Option<Vec<f32>>,
        /// One each.
        experts: Vec<Ungated>,
    },
}

/// What latent attention has beside the matrices of [`Block`].
#[derive(Clone, Debug)]
pub struct LatentWeights {
    /// From the residual stream to the query's latent `[q_rank, width]`, and the norm of that; `None`: there is no such latent.
    pub query: Option<(Linear, Norm)>,
    /// The norm of the latent of keys and values, `kv_rank` gains.
    pub kv_norm: Norm,
}

/// How a residual stream passes from one basis to the next: `x <- S x + branch` in the place of `x <- x + branch`, for the
/// branch of the attention and for that of the MLP (SliceGPT, 2024). A parallel block adds both branches at once and has one.
#[derive(Clone, Debug)]
pub struct Shortcuts {
    /// `[width, width]`, where the attention's output is added; in a parallel block, where both are.
    pub attn: Linear,
    /// `[width, width]`, where the MLP's output is added.
    pub mlp: Option<Linear>,
}

/// Where the inputs of per-layer embeddings come from ([`super::spec::PerLayer`]); `inputs`: numbers of all blocks.
#[derive(Clone, Debug)]
pub struct PerLayerInputs {
    /// `[inputs, width]`, of the embedding.
    pub projection: Linear,
    /// Of the numbers of each block.
    pub norm: Norm,
    /// One row per token, `[vocab, inputs]`.
    pub table: Weight,
}

/// What a block makes of its inputs.
#[derive(Clone, Debug)]
pub struct PerLayerBranch {
    /// `[P, width]`.
    pub gate: Linear,
    /// `[width, P]`.
    pub out: Linear,
    /// Of what is added.
    pub norm: Norm,
}

/// The weights of one block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Before the attention.
    pub attn_norm: Norm,
    /// `[heads * head_dim, width]`; of a query's latent `[heads * head_dim, q_rank]`.
    pub q: Linear,
    /// `[kv_heads * head_dim, width]`; in latent attention what gives the latent of keys and values and, behind it, the
    /// rotated part of the keys: `[kv_rank + rope, width]`.
    pub k: Linear,
    /// `[kv_heads * head_dim, width]`; in latent attention what expands the latent, per head to the rest of its key and then
    /// to its value: `[heads * (nope + value), kv_rank]`.
    pub v: Linear,
    /// `[width, heads * head_dim]`; in latent attention `[width, heads * value]`.
    pub o: Linear,
    /// Latent attention, where it is of that kind.
    pub latent: Option<LatentWeights>,
    /// Norm of each query head before the rotation (Qwen3, Gemma 3), `head_dim` gains.
    pub q_norm: Option<Norm>,
    /// Norm of each key head.
    pub k_norm: Option<Norm>,
    /// On the attention's output, before it is added (Gemma 2 and 3).
    pub attn_post_norm: Option<Norm>,
    /// Before the MLP.
    pub mlp_norm: Norm,
    /// On the MLP's output, before it is added (Gemma 2 and 3).
    pub mlp_post_norm: Option<Norm>,
    /// The MLP.
    pub mlp: Mlp,
    /// Where the residual stream has a basis of its own in every block ([`Spec::norm_width`]).
    pub shortcuts: Option<Shortcuts>,
    /// Its own embedding of the token, where it has one.
    pub per_layer: Option<PerLayerBranch>,
    /// The predictor of active neurons that came with it.
    pub predictor: Option<StoredPredictor>,
}

/// A predictor as PowerInfer stores it: `fc2 relu(fc1 x)` for the residual stream `x` before the norm of the MLP; scores
/// of at least [`Spec::predictor_threshold`] call a neuron active.
#[derive(Clone, Debug)]
pub struct StoredPredictor {
    /// `[rank, width]`.
    pub fc1: Weight,
    /// `[inner, rank]`.
    pub fc2: Weight,
}

/// A loaded model.
#[derive(Clone, Debug)]
pub struct Model {
    /// What it computes.
    pub spec: Spec,
    /// Token embedding `[vocab, width]`, one row per token.
    pub embed: Weight,
    /// Learned positions `[context + offset, width]`.
    pub positions: Option<Weight>,
    /// Where the inputs of per-layer embeddings come from.
    pub per_layer: Option<PerLayerInputs>,
    /// One per entry of `spec.blocks`.
    pub blocks: Vec<Block>,
    /// Before the output head.
    pub final_norm: Norm,
    /// Output head `[vocab, width]`; shares the bytes of `embed` where they are tied.
    pub head: Linear,
    /// Hex hash that binds plans and converted layouts to these weights.
    pub hash: String,
    /// Lacuna's own forms of some matrices of the blocks, named by their places (`layers.3.mlp.down`): the same numbers.
    pub packed: Option<Arc<PackedFile>>,
}

impl Shortcuts {
    /// Bytes of the matrices.
    pub fn bytes(&self) -> u64 {
        [Some(&self.attn), self.mlp.as_ref()].into_iter().flatten().map(|l| l.weight.bytes().len() as u64).sum()
    }
}

impl PerLayerBranch {
    /// Bytes of the matrices.
    pub fn bytes(&self) -> u64 {
        [&self.gate, &self.out].map(|l| l.weight.bytes().len() as u64).iter().sum()
    }
}

impl Block {
    /// The linear layer of a projection; `None` where there is no such single layer of the residual stream (latent attention:
    /// query, key and value; plain MLPs: gate; experts: all three).
    pub fn linear(&self, proj: Proj) -> Option<&Linear> {
        match (proj, &self.mlp) {
            (Proj::Q | Proj::K | Proj::V, _) if self.latent.is_some() => None,
            (Proj::Q, _) => Some(&self.q),
            (Proj::K, _) => Some(&self.k),
            (Proj::V, _) => Some(&self.v),
            (Proj::O, _) => Some(&self.o),
            (Proj::Gate, Mlp::Gated(g)) => Some(&g.gate),
            (Proj::Up, Mlp::Gated(Gated { up, .. }) | Mlp::Plain { up, .. }) => Some(up),
            (Proj::Down, Mlp::Gated(Gated { down, .. }) | Mlp::Plain { down, .. }) => Some(down),
            (Proj::Gate, Mlp::Plain { .. }) | (_, Mlp::Experts { .. } | Mlp::ReluExperts { .. }) => None,
        }
    }

    /// [`Block::linear`], to be changed.
    pub fn linear_mut(&mut self, proj: Proj) -> Option<&mut Linear> {
        self.linear(proj).is_some().then(|| self.part_mut(proj, 0)).flatten()
    }

    /// The linear layers of a projection: one of every expert in a mixture, else what [`Block::linear`] has.
    pub fn parts(&self, proj: Proj) -> Vec<&Linear> {
        match (proj, &self.mlp) {
            (Proj::Gate, Mlp::Experts { experts, .. }) => experts.iter().map(|e| &e.gate).collect(),
            (Proj::Up, Mlp::Experts { experts, .. }) => experts.iter().map(|e| &e.up).collect(),
            (Proj::Down, Mlp::Experts { experts, .. }) => experts.iter().map(|e| &e.down).collect(),
            (Proj::Up, Mlp::ReluExperts { experts, .. }) => experts.iter().map(|e| &e.up).collect(),
            (Proj::Down, Mlp::ReluExperts { experts, .. }) => experts.iter().map(|e| &e.down).collect(),
            _ => self.linear(proj).into_iter().collect(),
        }
    }

    /// Part `part` of [`Block::parts`], to be changed.
    pub fn part_mut(&mut self, proj: Proj, part: usize) -> Option<&mut Linear> {
        match (proj, &mut self.mlp) {
            (Proj::Q, _) => Some(&mut self.q),
            (Proj::K, _) => Some(&mut self.k),
            (Proj::V, _) => Some(&mut self.v),
            (Proj::O, _) => Some(&mut self.o),
            (Proj::Gate, Mlp::Gated(g)) => Some(&mut g.gate),
            (Proj::Up, Mlp::Gated(Gated { up, .. }) | Mlp::Plain { up, .. }) => Some(up),
            (Proj::Down, Mlp::Gated(Gated { down, .. }) | Mlp::Plain { down, .. }) => Some(down),
            (Proj::Gate, Mlp::Plain { .. } | Mlp::ReluExperts { .. }) => None,
            (Proj::Gate, Mlp::Experts { experts, .. }) => experts.get_mut(part).map(|e| &mut e.gate),
            (Proj::Up, Mlp::Experts { experts, .. }) => experts.get_mut(part).map(|e| &mut e.up),
            (Proj::Down, Mlp::Experts { experts, .. }) => experts.get_mut(part).map(|e| &mut e.down),
            (Proj::Up, Mlp::ReluExperts { experts, .. }) => experts.get_mut(part).map(|e| &mut e.up),
            (Proj::Down, Mlp::ReluExperts { experts, .. }) => experts.get_mut(part).map(|e| &mut e.down),
        }
    }
}
