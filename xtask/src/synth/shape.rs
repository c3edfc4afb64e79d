//! Shapes of real models, and which tensor gets which type.

use anyhow::{Result, anyhow};
use lacuna_kernels::Format;

/// Sizes of a llama-type decoder.
#[derive(Clone, Debug)]
pub struct Shape {
    pub name: &'static str,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub inner: usize,
    pub vocab: usize,
    pub tied: bool,
    pub rope_base: f32,
    pub context: usize,
}

/// A row of the table below.
type Row = (&'static str, [usize; 7], bool, f32, usize);

/// name, [width, layers, heads, kv heads, head size, neurons, vocabulary], tied, rotary base, context: from the
/// config.json of the models.
const SHAPES: [Row; 7] = [
    ("llama-3.2-1b", [2048, 16, 32, 8, 64, 8192, 128_256], true, 500_000.0, 131_072),
    ("llama-3.2-3b", [3072, 28, 24, 8, 128, 8192, 128_256], true, 500_000.0, 131_072),
    ("llama-3-8b", [4096, 32, 32, 8, 128, 14_336, 128_256], false, 500_000.0, 8192),
    ("llama-2-7b", [4096, 32, 32, 32, 128, 11_008, 32_000], false, 10_000.0, 4096),
    ("mistral-7b", [4096, 32, 32, 8, 128, 14_336, 32_000], false, 10_000.0, 32_768),
    ("smollm2-135m", [576, 30, 9, 3, 64, 1536, 49_152], true, 100_000.0, 8192),
    ("tiny", [256, 3, 4, 2, 64, 768, 512], false, 10_000.0, 512),
];

impl Shape {
    /// The shape called `name`.
    pub fn named(name: &str) -> Result<Self> {
        let row = SHAPES.iter().find(|row| row.0 == name);
        let (name, [width, layers, heads, kv_heads, head_dim, inner, vocab], tied, rope_base, context) =
            *row.ok_or_else(|| anyhow!("unknown shape `{name}`; there are {}", SHAPES.map(|row| row.0).join(", ")))?;
        Ok(Self { name, width, layers, heads, kv_heads, head_dim, inner, vocab, tied, rope_base, context })
    }
}

/// One matrix of a layer.
pub struct Role {
    /// Its name in the file, between `blk.N.` and `.weight`.
    pub name: &'static str,
    /// Rows (outputs) and columns (inputs).
    pub size: fn(&Shape) -> (usize, usize),
}

/// The matrices of a layer.
pub const ROLES: [Role; 7] = [
    Role { name: "attn_q", size: |s| (s.heads * s.head_dim, s.width) },
    Role { name: "attn_k", size: |s| (s.kv_heads * s.head_dim, s.width) },
    Role { name: "attn_v", size: |s| (s.kv_heads * s.head_dim, s.width) },
    Role { name: "attn_output", size: |s| (s.width, s.heads * s.head_dim) },
    Role { name: "ffn_gate", size: |s| (s.inner, s.width) },
    Role { name: "ffn_up", size: |s| (s.inner, s.width) },
    Role { name: "ffn_down", size: |s| (s.width, s.inner) },
];

/// Activation of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Act {
    Silu,
    Relu,
}

/// Types of the weights of a file, named as llama-quantize does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_k_m")]
    Q4KM,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Q4KM => "Q4_K_M",
            _ => self.base().name(),
        }
    }

    /// `general.file_type` (llama.cpp, `llama_ftype`).
    pub fn file_type(self) -> u32 {
        match self {
            Kind::F32 => 0,
            Kind::F16 => 1,
            Kind::Q4_0 => 2,
            Kind::Q8_0 => 7,
            Kind::Q4KM => 15,
            Kind::Bf16 => 32,
        }
    }

    fn base(self) -> Format {
        match self {
            Kind::F32 => Format::F32,
            Kind::F16 => Format::F16,
            Kind::Bf16 => Format::Bf16,
            Kind::Q8_0 => Format::Q8_0,
            Kind::Q4_0 => Format::Q4_0,
            Kind::Q4KM => Format::Q4K,
        }
    }

    /// The output matrix: llama-quantize stores it in Q6_K in every 4-bit file.
    pub fn of_head(self, s: &Shape) -> Format {
        match self {
            Kind::Q4_0 | Kind::Q4KM => fitting(Format::Q6K, s.width),
            _ => self.base(),
        }
    }

    /// The embedding: treated as the output matrix where it is both.
    pub fn of_embedding(self, s: &Shape) -> Format {
        if s.tied { self.of_head(s) } else { fitting(self.base(), s.width) }
    }

    /// A matrix of a layer: Q4_K_M files have Q6_K for values and down projections of the first eighth, the last eighth
    /// and every third layer between (llama.cpp, `use_more_bits`).
    pub fn of_layer(self, s: &Shape, role: &Role, layer: usize) -> Format {
        let (n, cols) = (s.layers, (role.size)(s).1);
        let more_bits = layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
        let careful = self == Kind::Q4KM && more_bits && ["attn_v", "ffn_down"].contains(&role.name);
        fitting(if careful { Format::Q6K } else { self.base() }, cols)
    }
}

/// `format`, or Q8_0 where a row is no multiple of its block (llama-quantize takes Q5_0 instead of Q4_K there; Q5_0 has no
/// encoder here).
fn fitting(format: Format, cols: usize) -> Format {
    if cols.is_multiple_of(format.block_len()) { format } else { Format::Q8_0 }
}
