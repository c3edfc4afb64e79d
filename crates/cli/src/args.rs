//! Groups of flags that several verbs share.

use crate::text::parse_bytes;
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use lacuna::engine::sampler::SamplerOptions;
use std::path::PathBuf;

/// How to load a model and what to skip in it.
#[derive(Args, Clone)]
pub struct LoadArgs {
    /// Threads; default: all cores.
    #[arg(short, long, env = "LACUNA_THREADS")]
    pub threads: Option<usize>,
    /// Type of the KV cache, keys and values.
    #[arg(long, value_enum, default_value = "f16", env = "LACUNA_KV")]
    pub kv: Kv,
    /// The same (-ctk); keys and values have one type.
    #[arg(long, value_enum, env = "LACUNA_CACHE_TYPE_K")]
    pub cache_type_k: Option<Kv>,
    /// The same (-ctv).
    #[arg(long, value_enum, env = "LACUNA_CACHE_TYPE_V")]
    pub cache_type_v: Option<Kv>,
    /// Skip by these methods: `relu`, `teal=0.5` (see `lacuna methods`).
    #[arg(long, value_name = "SPEC", env = "LACUNA_SPARSE", conflicts_with = "plan")]
    pub sparse: Option<String>,
    /// Skip by a plan that `lacuna calibrate` stored.
    #[arg(long, value_name = "FILE", env = "LACUNA_PLAN")]
    pub plan: Option<PathBuf>,
    /// Refuse to load what needs more memory than this (such as 6G).
    #[arg(long, value_name = "LIMIT", value_parser = parse_bytes, env = "LACUNA_MEMORY")]
    pub memory: Option<u64>,
    /// Map the file, or read it into memory (safe against files that change underneath).
    #[arg(long, value_enum, default_value = "map", env = "LACUNA_LOAD_MODE")]
    pub load_mode: LoadMode,
    /// Look for NaN and infinities in all weights first.
    #[arg(long, env = "LACUNA_CHECK_TENSORS")]
    pub check_tensors: bool,
    /// Read all matrices as they are: none as bitmaps (done where many zeros make that faster), none from `model.lacuna`.
    #[arg(long, env = "LACUNA_NO_BITMAPS")]
    pub no_bitmaps: bool,
    /// Prompt tokens processed together.
    #[arg(short, long, default_value_t = 512, env = "LACUNA_BATCH")]
    pub batch: usize,
    /// What the user called the model, for messages.
    #[arg(skip)]
    pub model_name: Option<String>,
}

impl LoadArgs {
    /// The type of the KV cache that all three flags agree on.
    ///
    /// # Errors
    /// Keys and values of different types.
    pub fn kv(&self) -> Result<Kv> {
        match (self.cache_type_k, self.cache_type_v) {
            (None, None) => Ok(self.kv),
            (Some(k), Some(v)) if k != v => bail!("-ctk and -ctv differ: keys and values have one type here"),
            (Some(one), _) | (None, Some(one)) => Ok(one),
        }
    }
}

/// How a file gets into memory.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum LoadMode {
    /// Memory-mapped.
    Map,
    /// Read as a whole.
    Read,
}

/// Type of a cache.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Kv {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// How the next token is chosen; the defaults are llama.cpp's.
#[derive(Args, Clone)]
pub struct SamplingArgs {
    /// Seed; the same seed gives the same text at any number of threads. Default: from the clock.
    #[arg(short, long, env = "LACUNA_SEED")]
    pub seed: Option<u64>,
    /// Temperature; 0 always takes the most likely token.
    #[arg(long, default_value_t = 0.8, env = "LACUNA_TEMP")]
    pub temp: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    #[arg(long, default_value_t = 40, env = "LACUNA_TOP_K")]
    pub top_k: usize,
    /// Keep the most likely tokens until their probabilities sum to this.
    #[arg(long, default_value_t = 0.95, env = "LACUNA_TOP_P")]
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the most likely one.
    #[arg(long, default_value_t = 0.05, env = "LACUNA_MIN_P")]
    pub min_p: f32,
    /// Divide the logits of recent tokens by this; 1 is off.
    #[arg(long, default_value_t = 1.0, env = "LACUNA_REPEAT_PENALTY")]
    pub repeat_penalty: f32,
    /// Tokens that count as recent.
    #[arg(long, default_value_t = 64, env = "LACUNA_REPEAT_LAST_N")]
    pub repeat_last_n: usize,
    /// Subtract this from the logit of each recent token.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, env = "LACUNA_PRESENCE_PENALTY")]
    pub presence_penalty: f32,
    /// Subtract this for each time a recent token occurred.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, env = "LACUNA_FREQUENCY_PENALTY")]
    pub frequency_penalty: f32,
    /// End before this text appears (may be given several times).
    #[arg(long, value_name = "TEXT", env = "LACUNA_STOP")]
    pub stop: Vec<String>,
    /// Go on behind the end-of-text token.
    #[arg(long, env = "LACUNA_IGNORE_EOS")]
    pub ignore_eos: bool,
}

impl SamplingArgs {
    /// The engine's form.
    pub fn options(&self) -> SamplerOptions {
        SamplerOptions {
            seed: self.seed.unwrap_or_else(clock_seed),
            temp: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last: self.repeat_last_n,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
        }
    }
}

fn clock_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_nanos() as u64 & 0xffff_ffff
}
