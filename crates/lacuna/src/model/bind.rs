//! Puts the tensors of a source into their places in a [`Model`], with every shape checked against the spec.

use super::checkpoint::NORM_WIDTH;
use super::names::{Experts, GateUp, Names, Qkv, fill};
use super::source::{Source, plain};
use super::spec::{BlockSpec, MlpSpec, NormKind, Position, Spec};
use super::weights::{Block, Gated, LatentWeights, Linear, Mlp, Model, Norm, Shortcuts, StoredPredictor};
use crate::error::{Error, Result};
use lacuna_core::weight::{Orientation, Weight};
use std::ops::Range;

mod latent;
mod per_layer;
mod relu_experts;

/// Endings of tensors that some checkpoints carry and no forward pass needs: causal masks and frequency tables.
const BUFFERS: [&str; 6] =
    [".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "inv_freq", "rope_freqs.weight"];

/// Binds all tensors. `tied`: what the configuration says about the head, if anything.
///
/// # Errors
/// Missing tensors, or shapes that do not fit the spec.
pub fn bind(source: &Source, names: &Names, spec: Spec, tied: Option<bool>, hash: String) -> Result<Model> {
    let prefix = prefix(source, names);
    let b = Binder { source, names, spec: &spec, prefix };
    let embed = source.matrix(&format!("{prefix}{}.weight", names.embed), spec.vocab, spec.width)?;
    let positions = match spec.position {
        Position::Rotary => None,
        Position::Learned { offset } => {
            let name = format!("{prefix}{}.weight", names.positions);
            Some(source.matrix(&name, spec.context + offset, spec.width)?)
        }
    };
    let per_layer = b.per_layer_inputs()?;
    let blocks = (0..spec.blocks.len()).map(|i| b.block(i)).collect::<Result<_>>()?;
    let mut final_norm = b.stream_norm(names.final_norm, &[])?;
    final_norm.gain.iter_mut().chain(final_norm.bias.iter_mut().flatten()).for_each(|g| *g *= spec.logit_scale);
    let head = match b.head(tied)? {
        Some(head) => head,
        None => plain(embed.clone()),
    };
    let unused: Vec<&str> = source.unused().into_iter().filter(|n| !BUFFERS.iter().any(|b| n.ends_with(b))).collect();
    if !unused.is_empty() {
        tracing::warn!(file = source.file, count = unused.len(), first = unused[0], "tensors of the file are not used");
    }
    Ok(Model { embed, positions, per_layer, blocks, final_norm, head, hash, spec, packed: None })
}

/// Binds the tensors of block `i` alone.
///
/// # Errors
/// As [`bind`].
pub(crate) fn bind_block(source: &Source, names: &Names, spec: &Spec, i: usize) -> Result<Block> {
    Binder { source, names, spec, prefix: prefix(source, names) }.block(i)
}

/// What stands before the names of everything but the head.
pub(crate) fn prefix(source: &Source, names: &Names) -> &'static str {
    let exists = |p: &&&str| source.has(&format!("{p}{}.weight", names.embed));
    names.prefixes.iter().find(exists).copied().unwrap_or(names.prefixes[0])
}

struct Binder<'a> {
    source: &'a Source,
    names: &'a Names,
    spec: &'a Spec,
    prefix: &'static str,
}

impl Binder<'_> {
    fn name(&self, template: &str, numbers: &[usize], part: &str) -> String {
        format!("{}{}.{part}", self.prefix, fill(template, numbers))
    }

    fn head(&self, tied: Option<bool>) -> Result<Option<Linear>> {
        let plain_name = format!("{}.weight", self.names.head);
        let prefixed = format!("{}{plain_name}", self.prefix.strip_suffix("model.").unwrap_or(self.prefix));
        let name = if self.source.has(&plain_name) { plain_name } else { prefixed };
        if tied == Some(true) || (tied.is_none() && !self.source.has(&name)) {
            return Ok(None);
        }
        let weight = self.source.matrix(&name, self.spec.vocab, self.spec.width)?;
        let bias = name.replace(".weight", ".bias");
        let bias = if self.source.has(&bias) { Some(self.source.vector(&bias, self.spec.vocab)?) } else { None };
        Ok(Some(Linear { weight, bias }))
    }

    fn norm(&self, template: &str, numbers: &[usize], n: usize) -> Result<Norm> {
        let mut gain = self.source.vector(&self.name(template, numbers, "weight"), n)?;
        gain.iter_mut().for_each(|g| *g += self.names.gain_offset);
        let bias = match self.spec.norm {
            NormKind::Rms => None,
            NormKind::Layer => Some(self.source.vector(&self.name(template, numbers, "bias"), n)?),
        };
        Ok(Norm { gain, bias, over: n })
    }

    /// A norm of the residual stream.
    fn stream_norm(&self, template: &str, numbers: &[usize]) -> Result<Norm> {
        let width = self.spec.width;
        Ok(Norm { over: self.spec.norm_width.unwrap_or(width), ..self.norm(template, numbers, width)? })
    }

    /// The shortcuts of block `i`, stored `[inputs, outputs]`, in a model whose residual stream has a basis in every block.
    fn shortcuts(&self, i: usize) -> Result<Option<Shortcuts>> {
        let width = self.spec.width;
        let [attn, mlp] = self.names.shortcuts(i).map(|name| format!("{}{name}", self.prefix));
        if self.spec.norm_width.is_none() {
            // Without its shortcuts such a model would run, and say nonsense.
            let problem = || format!("is missing, but there is a tensor `{attn}`; restore the configuration");
            return if self.source.has(&attn) {
                Err(Error::config(&self.source.file, NORM_WIDTH, problem()))
            } else {
                Ok(None)
            };
        }
        let one = |name: &str| self.source.transposed(name, width, width, 0..width).map(plain);
        let mlp = if self.spec.blocks[i].parallel { None } else { Some(one(&mlp)?) };
        Ok(Some(Shortcuts { attn: one(&attn)?, mlp }))
    }

    fn optional_norm(&self, template: &str, i: usize, n: usize, needed: bool) -> Result<Option<Norm>> {
        let there = !template.is_empty() && self.source.has(&self.name(template, &[i], "weight"));
        if needed || there { self.norm(template, &[i], n).map(Some) } else { Ok(None) }
    }

    fn bias(&self, template: &str, numbers: &[usize], n: usize, needed: bool) -> Result<Option<Vec<f32>>> {
        let name = self.name(template, numbers, "bias");
        if needed || self.source.has(&name) { self.source.vector(&name, n).map(Some) } else { Ok(None) }
    }

    fn linear(&self, template: &str, numbers: &[usize], outputs: usize, inputs: usize) -> Result<Linear> {
        let bias = self.bias(template, numbers, outputs, self.names.biased)?;
        self.rows(template, numbers, outputs, inputs, 0..outputs, bias)
    }

    /// Outputs `part` of a stored layer that has `all` of them, with the `bias` of these outputs.
    fn rows(
        &self,
        template: &str,
        numbers: &[usize],
        all: usize,
        inputs: usize,
        part: Range<usize>,
        bias: Option<Vec<f32>>,
    ) -> Result<Linear> {
        let name = self.name(template, numbers, "weight");
        let weight = if self.names.transposed {
            self.source.transposed(&name, all, inputs, part)?
        } else {
            self.source.rows(&name, all, inputs, part)?
        };
        Ok(Linear { weight, bias })
    }

    /// A stored layer cut into layers of `sizes` outputs, one after the other.
    fn split<const N: usize>(
        &self,
        template: &str,
        i: usize,
        sizes: [usize; N],
        needed: bool,
    ) -> Result<[Result<Linear>; N]> {
        let all = sizes.iter().sum();
        let bias = self.bias(template, &[i], all, needed)?;
        let mut start = 0;
        Ok(sizes.map(|n| {
            let part = start..start + n;
            start += n;
            let bias = bias.as_ref().map(|b| b[part.clone()].to_vec());
            self.rows(template, &[i], all, self.spec.width, part, bias)
        }))
    }

    fn block(&self, i: usize) -> Result<Block> {
        let (n, width, b) = (self.names, self.spec.width, &self.spec.blocks[i]);
        let ([q, k, v], latent) = self.attention(i, b)?;
        let post = |template: &str| self.optional_norm(template, i, width, !template.is_empty());
        Ok(Block {
            attn_norm: self.stream_norm(n.attn_norm, &[i])?,
            q,
            k,
            v,
            o: self.linear(n.o, &[i], width, b.attended())?,
            latent,
            q_norm: self.optional_norm(n.q_norm, i, b.head_dim, n.qk_normed)?,
            k_norm: self.optional_norm(n.k_norm, i, b.head_dim, n.qk_normed)?,
            attn_post_norm: post(n.attn_post_norm)?,
            mlp_norm: self.stream_norm(n.mlp_norm, &[i])?,
            mlp_post_norm: post(n.mlp_post_norm)?,
            mlp: self.mlp(i, &b.mlp)?,
            shortcuts: self.shortcuts(i)?,
            per_layer: b.per_layer.map(|p| self.per_layer(i, p)).transpose()?,
            predictor: self.predictor(i, &b.mlp)?,
        })
    }

    fn attention(&self, i: usize, b: &BlockSpec) -> Result<([Linear; 3], Option<LatentWeights>)> {
        match b.latent {
            None => Ok((self.qkv(i, b)?, None)),
            Some(spec) => self.latent(i, b, spec).map(|(qkv, latent)| (qkv, Some(latent))),
        }
    }

    fn qkv(&self, i: usize, b: &BlockSpec) -> Result<[Linear; 3]> {
        let (width, d) = (self.spec.width, b.head_dim);
        let sizes = [b.heads * d, b.kv_heads * d, b.kv_heads * d];
        let needed = self.names.biased || self.names.qkv_biased;
        let [q, k, v] = match self.names.qkv {
            Qkv::Split(q, k, v) => {
                let one = |name, n| -> Result<Linear> {
                    self.rows(name, &[i], n, width, 0..n, self.bias(name, &[i], n, needed)?)
                };
                [one(q, sizes[0]), one(k, sizes[1]), one(v, sizes[2])]
            }
            Qkv::Rows(name) => self.split(name, i, sizes, needed)?,
            Qkv::PerHead(name) => {
                let all = sizes.iter().sum();
                let bias = self.bias(name, &[i], all, needed)?;
                [0, 1, 2].map(|p| {
                    let rows: Vec<usize> = (0..b.heads).flat_map(|h| (3 * h + p) * d..(3 * h + p + 1) * d).collect();
                    let bias = bias.as_ref().map(|b| rows.iter().map(|r| b[*r]).collect());
                    let weight = self.source.gathered(&self.name(name, &[i], "weight"), all, width, &rows)?;
                    Ok(Linear { bias, weight })
                })
            }
        };
        Ok([q?, k?, v?])
    }

    fn mlp(&self, i: usize, mlp: &MlpSpec) -> Result<Mlp> {
        let (n, width) = (self.names, self.spec.width);
        match *mlp {
            MlpSpec::Plain { inner } => {
                Ok(Mlp::Plain { up: self.linear(n.up, &[i], inner, width)?, down: self.down(i, inner)? })
            }
            MlpSpec::Gated { inner } => {
                let (gate, up) = match n.gate_up {
                    GateUp::Split(gate, up) => {
                        (self.linear(gate, &[i], inner, width)?, self.linear(up, &[i], inner, width)?)
                    }
                    GateUp::Rows(name) => {
                        let [gate, up] = self.split(name, i, [inner, inner], false)?;
                        (gate?, up?)
                    }
                };
                Ok(Mlp::Gated(Gated { gate, up, down: self.down(i, inner)? }))
            }
            MlpSpec::ReluExperts { experts, inner, scale } => self.relu_experts(i, experts, inner, scale),
            MlpSpec::Experts { experts, inner, .. } => {
                let router = self.linear(n.router, &[i], experts, width)?;
                Ok(Mlp::Experts { router, experts: self.experts(i, experts, inner)? })
            }
        }
    }

    /// The down projection of an MLP, which may be stored input-major.
    fn down(&self, i: usize, inner: usize) -> Result<Linear> {
        let (n, width) = (self.names, self.spec.width);
        let name = self.name(n.down_t, &[i], "weight");
        if n.down_t.is_empty() || !self.source.has(&name) {
            return self.linear(n.down, &[i], width, inner);
        }
        let stored = self.source.matrix(&name, inner, width)?;
        let what = || format!("tensor `{name}` of type {} in `[inputs, outputs]` order", stored.format().name());
        // Runs of the longer blocks have no kernel that adds them one by one.
        let kept = stored.format().block_len() <= 32;
        let bytes = stored.bytes().clone();
        let weight = Weight::new(stored.format(), Orientation::InputMajor, width, inner, bytes).filter(|_| kept);
        let weight = weight.ok_or_else(|| Error::Unsupported {
            file: self.source.file.clone(),
            what: what(),
            remedy: "; convert the model to F16, Q8_0 or Q4_0".into(),
        })?;
        Ok(Linear { weight, bias: self.bias(n.down, &[i], width, false)? })
    }

    fn predictor(&self, i: usize, mlp: &MlpSpec) -> Result<Option<StoredPredictor>> {
        let (MlpSpec::Gated { inner } | MlpSpec::Plain { inner }) = *mlp else { return Ok(None) };
        let [fc1, fc2] = self.names.predictor.map(|n| self.name(n, &[i], "weight"));
        let Some(rank) = self.source.tensors.get(&fc1).and_then(|t| t.shape.first().copied()) else { return Ok(None) };
        if rank == 0 {
            let what = format!("tensor `{fc1}`: a predictor of rank 0");
            return Err(Error::Unsupported {
                file: self.source.file.clone(),
                what,
                remedy: "; convert the file again".into(),
            });
        }
        let (fc1, fc2) = (self.source.matrix(&fc1, rank, self.spec.width)?, self.source.matrix(&fc2, inner, rank)?);
        Ok(Some(StoredPredictor { fc1, fc2 }))
    }

    fn experts(&self, i: usize, count: usize, inner: usize) -> Result<Vec<Gated>> {
        let width = self.spec.width;
        match self.names.experts {
            Experts::None => Err(Error::Unsupported {
                file: self.source.file.clone(),
                what: format!("a mixture of experts in `{}`", self.spec.arch),
                remedy: String::new(),
            }),
            Experts::Each(gate, up, down) => {
                let one = |e: usize| -> Result<Gated> {
                    Ok(Gated {
                        gate: self.linear(gate, &[i, e], inner, width)?,
                        up: self.linear(up, &[i, e], inner, width)?,
                        down: self.linear(down, &[i, e], width, inner)?,
                    })
                };
                (0..count).map(one).collect()
            }
            Experts::Stacked(gate, up, down) => {
                let all = |t: &str, rows, cols| self.source.stacked(&self.name(t, &[i], "weight"), count, rows, cols);
                let (gates, ups, downs) = (all(gate, inner, width)?, all(up, inner, width)?, all(down, width, inner)?);
                let parts = gates.into_iter().zip(ups).zip(downs);
                Ok(parts.map(|((g, u), d)| Gated { gate: plain(g), up: plain(u), down: plain(d) }).collect())
            }
        }
    }
}
