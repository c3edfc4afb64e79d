//! What a comparison found, in the form that is stored, read back and drawn. Nothing here is computed from the page that
//! shows it: every number a reader sees is in this struct.

use serde::{Deserialize, Serialize};

/// Version of the stored form; a reader refuses others.
pub const REPORT_VERSION: u32 = 1;

/// A value with its standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The value.
    pub value: f64,
    /// Its standard error.
    pub error: f64,
}

/// A comparison of plans on one model, one text and one machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_VERSION`].
    pub version: u32,
    /// Version of the program.
    pub program: String,
    /// When it was made, UTC, `2026-11-22 05:40`.
    pub date: String,
    /// The command line.
    pub command: String,
    /// Seed of everything that is drawn.
    pub seed: u64,
    /// The machine.
    pub machine: Machine,
    /// The model.
    pub model: ModelFacts,
    /// What was scored and what was observed.
    pub text: TextFacts,
    /// The task; `None` if none could be made, and the notes say why.
    pub task: Option<TaskFacts>,
    /// How it was measured, one sentence per fact.
    pub protocol: Vec<String>,
    /// The model without a plan.
    pub dense: Point,
    /// The plans, in the order they were asked for.
    pub points: Vec<Point>,
    /// What a reader must know before quoting a number.
    pub notes: Vec<String>,
}

/// Where it was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: String,
    /// Instruction set in use.
    pub isa: String,
    /// Cores of the machine.
    pub cores: usize,
    /// Threads in use.
    pub threads: usize,
    /// Bytes of the last-level cache; `None` if unknown.
    pub cache_bytes: Option<u64>,
    /// Streaming read before and after the timings, GB/s, with those threads; `None` if it was not measured.
    pub stream_gb_per_s: Option<[f64; 2]>,
    /// Load of the machine over the last minute when the timings began and ended, ours included; `None` if unknown.
    pub load: Option<[f64; 2]>,
}

/// What was run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// What the user called it.
    pub name: String,
    /// Hash that binds plans to it.
    pub hash: String,
    /// Architecture.
    pub architecture: String,
    /// Parameters.
    pub parameters: u64,
    /// Bytes of all weights.
    pub bytes: u64,
    /// Blocks.
    pub layers: usize,
    /// Type of the KV cache.
    pub kv: String,
}

/// The texts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TextFacts {
    /// File that was scored.
    pub file: String,
    /// SHA-256 of that file.
    pub sha256: String,
    /// Tokens scored.
    pub tokens: usize,
    /// Bytes behind them.
    pub bytes: usize,
    /// Windows.
    pub windows: usize,
    /// How it was cut.
    pub cut: String,
    /// File that was observed; `None` if nothing had to be.
    pub calibration: Option<Calibration>,
}

/// What a calibration read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The file.
    pub file: String,
    /// Its SHA-256.
    pub sha256: String,
    /// Tokens observed, once for all plans.
    pub tokens: usize,
}

/// What the task asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskFacts {
    /// Short name.
    pub name: String,
    /// What it asks, in a sentence.
    pub description: String,
    /// Questions.
    pub items: usize,
    /// Accuracy of guessing.
    pub chance: f64,
}

/// One plan, or the dense model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// What was measured, by content: plan, model, text and settings. Equal keys need not be measured again.
    pub key: String,
    /// Methods and parameters, `relu,teal=0.4`; `dense`.
    pub label: String,
    /// Points of one family are one curve: the methods without the swept value.
    pub family: String,
    /// The swept value.
    pub value: Option<f64>,
    /// Command that gives an engine with this plan.
    pub command: String,
    /// Distance from the dense model on the text.
    pub quality: Quality,
    /// The task's result.
    pub task: Option<TaskScore>,
    /// What decode read.
    pub cost: Cost,
    /// How fast it was.
    pub speed: Option<Speed>,
    /// What must be known about this point.
    pub notes: Vec<String>,
}

/// Quality on the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Perplexity per token.
    pub ppl: Measured,
    /// Bits per byte of text; the error is that of the text as a sample, which all plans share.
    pub bits_per_byte: Measured,
    /// Bits per byte above the dense model; the error is that of the difference on the same tokens.
    pub change: Measured,
    /// Mean Kullback-Leibler divergence from the dense model, in nats.
    pub kld: Measured,
    /// Its 99 % quantile.
    pub kld_p99: f64,
    /// Share of tokens where both rank the same token first.
    pub same_top: Measured,
}

/// Result of the task.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    /// Questions answered rightly.
    pub right: usize,
    /// Questions.
    pub items: usize,
    /// Share that is right, with the binomial error.
    pub accuracy: Measured,
    /// Questions that this plan gets right and the dense model wrong, and the other way round.
    pub gained_lost: [usize; 2],
}

/// What decode reads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Bytes of weights, keys and values per token.
    pub bytes_per_token: f64,
    /// Bytes of weights alone.
    pub weight_bytes_per_token: f64,
    /// Bytes of the input-major copies that the plan needs on disk or in memory.
    pub copies_bytes: u64,
    /// What was kept, per place of a block.
    pub kept: Vec<SiteKept>,
}

/// Kept share of one place over the layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteKept {
    /// The place: `attn.q`, `mlp neurons`.
    pub site: String,
    /// Per layer; `None` where nothing is skipped.
    pub layers: Vec<Option<f64>>,
}

/// Decode speed over rounds in which all plans took turns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Tokens per second of each round.
    pub samples: Vec<f64>,
    /// Lower quartile, median and upper quartile of them.
    pub quartiles: [f64; 3],
    /// The same of the ratio to the dense model in the same round.
    pub speedup: [f64; 3],
}

impl Speed {
    /// Milliseconds per token: at the upper quartile of the speed, the median, the lower quartile.
    pub fn milliseconds(&self) -> [f64; 3] {
        let [low, mid, high] = self.quartiles;
        [1e3 / high, 1e3 / mid, 1e3 / low]
    }
}

impl Report {
    /// The dense model and all plans.
    pub fn all(&self) -> impl Iterator<Item = &Point> {
        std::iter::once(&self.dense).chain(&self.points)
    }

    /// The families in the order of their first point.
    pub fn families(&self) -> Vec<&str> {
        let mut list: Vec<&str> = Vec::new();
        for p in &self.points {
            if !list.contains(&p.family.as_str()) {
                list.push(&p.family);
            }
        }
        list
    }

    /// Bytes per token of a point over those of the dense model.
    pub fn density(&self, point: &Point) -> f64 {
        point.cost.bytes_per_token / self.dense.cost.bytes_per_token
    }

    /// A stored report, or `None` where the bytes are not one of this version.
    pub fn parse(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok().filter(|r: &Self| r.version == REPORT_VERSION)
    }
}
