//! Small random models, made in memory.

use lacuna::model::{
    spec::{Act, BlockSpec, Latent, MlpSpec, NormKind, PerLayer, Position, Rope, RopePairs, RouterScale, Spec},
    weights::{Block, Gated, LatentWeights, Linear, Mlp, Model, Norm, PerLayerBranch, PerLayerInputs, Ungated},
};
use lacuna_core::weight::{Orientation, Weight};
use lacuna_kernels::{Format, convert::encode_run};

/// What varies between the models.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub format: Format,
    pub mlp: MlpKind,
    pub act: Act,
    /// The activation also on up.
    pub drelu: bool,
    pub window: Option<usize>,
    /// Layer norms, biases, learned positions, parallel blocks; otherwise root mean square and rotary.
    pub classic: bool,
    /// Latent attention.
    pub latent: bool,
    /// Per-layer embeddings.
    pub per_layer: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MlpKind {
    Gated,
    Plain,
    Experts,
    ReluExperts,
}

pub const PLAIN_LLAMA: Kind = Kind {
    format: Format::F32,
    mlp: MlpKind::Gated,
    act: Act::Silu,
    drelu: false,
    window: None,
    classic: false,
    latent: false,
    per_layer: false,
};

const LATENT: Latent = Latent { q_rank: Some(32), kv_rank: 32, nope: 10, rope: 6, value: 8, eps: 1e-6 };

/// Numbers of a block's own embedding.
const OWN: usize = 32;

pub const WIDTH: usize = 64;
pub const INNER: usize = 96;
pub const VOCAB: usize = 77;
pub const LAYERS: usize = 3;
pub const CONTEXT: usize = 300;

/// A linear congruential stream (Knuth, MMIX), enough for weights.
pub struct Stream(u64);

impl Stream {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }

    pub fn values(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.next() * size).collect()
    }
}

struct Maker {
    stream: Stream,
    kind: Kind,
}

impl Maker {
    fn weight(&mut self, outputs: usize, inputs: usize) -> Weight {
        let f = self.kind.format;
        let run = f.run_bytes(inputs).expect("whole blocks");
        let mut bytes = vec![0; run * outputs];
        for row in bytes.chunks_exact_mut(run) {
            let values = self.stream.values(inputs, 3.0 / (inputs as f32).sqrt());
            encode_run(f, &values, row);
        }
        Weight::new(f, Orientation::OutputMajor, outputs, inputs, bytes.into()).expect("a fitting length")
    }

    fn linear(&mut self, outputs: usize, inputs: usize) -> Linear {
        let bias = self.kind.classic.then(|| self.stream.values(outputs, 0.2));
        Linear { weight: self.weight(outputs, inputs), bias }
    }

    fn norm(&mut self) -> Norm {
        Norm { gain: self.gains(WIDTH), bias: self.kind.classic.then(|| self.stream.values(WIDTH, 0.1)), over: WIDTH }
    }

    fn gains(&mut self, n: usize) -> Vec<f32> {
        self.stream.values(n, 0.4).into_iter().map(|g| g + 1.0).collect()
    }

    /// Query, key, value and output of latent attention, and what it has besides.
    fn latent(&mut self) -> ([Linear; 4], LatentWeights) {
        let l = LATENT;
        let [q, k] = [self.linear(64, 32), self.linear(l.kv_rank + l.rope, WIDTH)];
        let [v, o] = [self.linear(4 * (l.nope + l.value), l.kv_rank), self.linear(WIDTH, 4 * l.value)];
        let down = self.linear(32, WIDTH);
        let norms = [self.gains(32), self.gains(l.kv_rank)].map(|gain| Norm { over: gain.len(), gain, bias: None });
        let [q_norm, kv_norm] = norms;
        ([q, k, v, o], LatentWeights { query: Some((down, q_norm)), kv_norm })
    }

    fn gated(&mut self) -> Gated {
        let (gate, up) = (self.linear(INNER, WIDTH), self.linear(INNER, WIDTH));
        Gated { gate, up, down: self.linear(WIDTH, INNER) }
    }

    fn mlp(&mut self) -> Mlp {
        match self.kind.mlp {
            MlpKind::Gated => Mlp::Gated(self.gated()),
            MlpKind::Plain => Mlp::Plain { up: self.linear(INNER, WIDTH), down: self.linear(WIDTH, INNER) },
            MlpKind::Experts => {
                Mlp::Experts { router: self.linear(5, WIDTH), experts: (0..5).map(|_| self.gated()).collect() }
            }
            MlpKind::ReluExperts => {
                let router = self.linear(7, WIDTH);
                let one = |m: &mut Self| Ungated { up: m.linear(32, WIDTH), down: m.linear(WIDTH, 32) };
                let experts = (0..7).map(|_| one(self)).collect();
                Mlp::ReluExperts { router, gain: Some(self.gains(7)), experts }
            }
        }
    }

    fn block(&mut self) -> Block {
        let attn_norm = self.norm();
        let ([q, k, v, o], latent) = if self.kind.latent {
            let (linears, latent) = self.latent();
            (linears, Some(latent))
        } else {
            let sizes = [(64, WIDTH), (32, WIDTH), (32, WIDTH), (WIDTH, 64)];
            (sizes.map(|(outputs, inputs)| self.linear(outputs, inputs)), None)
        };
        Block {
            attn_norm,
            q,
            k,
            v,
            o,
            latent,
            q_norm: None,
            k_norm: None,
            attn_post_norm: None,
            mlp_norm: self.norm(),
            mlp_post_norm: None,
            mlp: self.mlp(),
            shortcuts: None,
            per_layer: self.kind.per_layer.then(|| PerLayerBranch {
                gate: self.linear(OWN, WIDTH),
                out: self.linear(WIDTH, OWN),
                norm: self.norm(),
            }),
            predictor: None,
        }
    }
}

/// A model of `kind`; equal kinds and seeds give equal models.
pub fn model(kind: Kind, seed: u64) -> Model {
    let mut m = Maker { stream: Stream(seed), kind };
    let mlp = match kind.mlp {
        MlpKind::Gated => MlpSpec::Gated { inner: INNER },
        MlpKind::Plain => MlpSpec::Plain { inner: INNER },
        MlpKind::Experts => MlpSpec::Experts { experts: 5, active: 2, inner: INNER, normalise: true },
        MlpKind::ReluExperts => MlpSpec::ReluExperts { experts: 7, inner: 32, scale: RouterScale::Rms { eps: 1e-5 } },
    };
    let block = BlockSpec {
        heads: 4,
        kv_heads: if kind.latent { 4 } else { 2 },
        head_dim: 16,
        latent: kind.latent.then_some(LATENT),
        scale: 0.25,
        window: kind.window,
        score_cap: None,
        rope: (!kind.classic).then_some(0),
        parallel: kind.classic,
        mlp,
        act: kind.act,
        up_act: kind.drelu.then_some(kind.act),
        residual_scale: 1.0,
        per_layer: None,
    };
    let rotated = if kind.latent { LATENT.rope } else { 16 };
    let freqs = (0..rotated / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotated as f32)).collect();
    let spec = Spec {
        arch: "random".into(),
        vocab: VOCAB,
        width: WIDTH,
        context: CONTEXT,
        embed_scale: 1.0,
        position: if kind.classic { Position::Learned { offset: 2 } } else { Position::Rotary },
        ropes: vec![Rope { dims: rotated, pairs: RopePairs::Half, freqs, factor: 1.0 }],
        norm: if kind.classic { NormKind::Layer } else { NormKind::Rms },
        norm_eps: 1e-5,
        logit_scale: 1.0,
        norm_width: None,
        logit_cap: None,
        predictor_threshold: 0.0,
        blocks: vec![block; LAYERS],
    };
    let mut spec = spec;
    if kind.per_layer {
        for (i, b) in spec.blocks.iter_mut().enumerate() {
            b.per_layer = Some(PerLayer { first: i * OWN, width: OWN, act: Act::Gelu });
        }
    }
    let embed = m.weight(VOCAB, WIDTH);
    Model {
        per_layer: kind.per_layer.then(|| PerLayerInputs {
            projection: m.linear(LAYERS * OWN, WIDTH),
            norm: Norm { gain: m.gains(OWN), bias: None, over: OWN },
            table: m.weight(VOCAB, LAYERS * OWN),
        }),
        positions: kind.classic.then(|| m.weight(CONTEXT + 2, WIDTH)),
        blocks: (0..LAYERS).map(|_| m.block()).collect(),
        final_norm: m.norm(),
        packed: None,
        head: Linear { weight: embed.clone(), bias: None },
        embed,
        hash: format!("random-{seed}"),
        spec,
    }
}

/// Tokens of the vocabulary.
pub fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut s = Stream(seed ^ 0x1234_5678);
    (0..n).map(|_| ((s.next() + 0.5) * VOCAB as f32) as u32 % VOCAB as u32).collect()
}

/// Largest difference over the range of `b`.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let (low, high) = b.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / (high - low)
}
