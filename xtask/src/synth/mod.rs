//! Synthetic models: true shapes, seeded random weights, one random layer repeated, in a GGUF file of architecture
//! `llama` that Lacuna and llama.cpp both load. The text they produce means nothing; their speed does.
//!
//! Matrices are N(0, 1/fan_in), the embedding N(0, 0.02), norms 1. All layers hold the same numbers, written again and
//! again, so that a large file takes seconds: a program that reads them cannot tell.
//!
//! **ReLU models** (`--act relu --open 0.1`): the key `lacuna.hidden_act` says `relu`; llama.cpp does not know it and
//! computes SiLU, at the same dense speed. Random gates would open for half of the inputs, and there is no bias to shift
//! them. So every embedding gets a common component (N(1, 1) instead of N(0, 0.02)), the outputs of all layers together
//! are kept small beside it (attention output and down projection times 0.3 / layers), and every gate row a small common
//! component against it. After the norm an input is `sqrt(d) (a u + sqrt(1 - a^2) w)` with `u = 1/sqrt(d)` and
//! `a^2 = 1/2`; a gate row `n + b u` with n ~ N(0, 1/d) meets it at N(sqrt(d) a b, 1), so `b = z / (sqrt(d) a)` opens
//! the share whose normal quantile is `z`. The shift is about 1.8 / sqrt(d) standard deviations of a weight: blocks are
//! quantised as before.

mod fill;
mod shape;

use anyhow::{Context, Result, bail, ensure};
use fill::{Filled, Source};
use lacuna_core::{
    atomic::write_atomically,
    format::gguf::{Array, TensorType, Value, Writer},
};
use lacuna_kernels::Format;
use shape::{Act, Kind, ROLES, Shape};
use std::{collections::HashMap, path::PathBuf, time::Instant};

/// Options of `cargo xtask synth`.
#[derive(clap::Args)]
pub struct Args {
    /// Shape: llama-3.2-1b, llama-3.2-3b, llama-3-8b, llama-2-7b, mistral-7b, smollm2-135m, tiny.
    #[arg(long)]
    shape: String,
    /// Types of the weights: f32, f16, bf16, q8_0, q4_0, q4_k_m (the last two with llama-quantize's mixture).
    #[arg(long = "type")]
    kind: Kind,
    /// The file to write.
    #[arg(short, long)]
    output: PathBuf,
    /// Activation of the MLP.
    #[arg(long, default_value = "silu")]
    act: Act,
    /// Share of the neurons that open on random tokens (with `--act relu`).
    #[arg(long, default_value_t = 0.1)]
    open: f64,
    /// Share of the weights of layers that are zero: the smallest ones, as magnitude pruning leaves them.
    #[arg(long, default_value_t = 0.0)]
    zeros: f64,
    /// Number of layers, if not the shape's.
    #[arg(long)]
    layers: Option<usize>,
    /// Seed of the weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// What fills a tensor of the file.
enum Part {
    Constant(f32, usize),
    Layer(usize, Format),
    Rows(Source, Format),
}

pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let mut shape = Shape::named(&args.shape)?;
    if let Some(layers) = args.layers {
        ensure!((1..=10_000).contains(&layers), "--layers must be from 1 to 10000");
        shape.layers = layers;
    }
    ensure!(args.open > 0.0 && args.open < 1.0, "--open must be above 0 and below 1");
    if args.act == Act::Relu && args.open > 0.5 {
        bail!("--open above 0.5 is no sparse model");
    }
    ensure!((0.0..1.0).contains(&args.zeros), "--zeros must be at least 0 and below 1");
    let mut writer = Writer::new();
    describe(&mut writer, &shape, args);
    let parts = parts(&mut writer, &shape, args)?;
    let mut layer = encode_layer(&parts, &shape, args);
    eprintln!("one layer encoded after {:.1} s", start.elapsed().as_secs_f64());
    let size = writer.file_size()?;
    write_atomically(&args.output, Some(size), |out| {
        writer.write(out, |i, _, out| match &parts[i] {
            Part::Constant(gain, n) => out.write_all(&gain.to_le_bytes().repeat(*n)),
            Part::Layer(role, format) => out.write_all(layer.entry((*role, *format)).or_default()),
            Part::Rows(source, format) => source.write(*format, out),
        })
    })
    .context("the model was not written")?;
    eprintln!("{}: {size} bytes in {:.1} s", args.output.display(), start.elapsed().as_secs_f64());
    Ok(())
}

fn describe(w: &mut Writer, s: &Shape, args: &Args) {
    let text = |t: &str| Value::String(t.to_owned());
    let count = |n: usize| Value::U32(n as u32);
    w.set("general.architecture", text("llama"))
        .set("general.name", text(&format!("synthetic {} {}", s.name, args.kind.name())))
        .set("general.file_type", Value::U32(args.kind.file_type()))
        .set("general.quantization_version", Value::U32(2))
        .set("llama.vocab_size", count(s.vocab))
        .set("llama.context_length", count(s.context))
        .set("llama.embedding_length", count(s.width))
        .set("llama.block_count", count(s.layers))
        .set("llama.feed_forward_length", count(s.inner))
        .set("llama.attention.head_count", count(s.heads))
        .set("llama.attention.head_count_kv", count(s.kv_heads))
        .set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
        .set("llama.rope.dimension_count", count(s.head_dim))
        .set("llama.rope.freq_base", Value::F32(s.rope_base));
    if args.act == Act::Relu {
        w.set("lacuna.hidden_act", text("relu"));
    }
    // A SentencePiece vocabulary that loads everywhere: three special pieces, 256 bytes, then words without meaning.
    let piece = |i: usize| match i {
        0 => "<unk>".to_owned(),
        1 => "<s>".to_owned(),
        2 => "</s>".to_owned(),
        3..259 => format!("<0x{:02X}>", i - 3),
        _ => format!("tok{}", i - 259),
    };
    let kind = |i: usize| [2, 3, 3].get(i).copied().unwrap_or(if i < 259 { 6 } else { 1 });
    let scores: Vec<f32> = (0..s.vocab).map(|i| if i < 259 { 0.0 } else { -((i - 259) as f32) }).collect();
    w.set("tokenizer.ggml.model", text("llama"))
        .set("tokenizer.ggml.tokens", Value::Array(Array::strings((0..s.vocab).map(piece))))
        .set("tokenizer.ggml.scores", Value::Array(Array::floats(&scores)))
        .set("tokenizer.ggml.token_type", Value::Array(Array::ints(&(0..s.vocab).map(kind).collect::<Vec<_>>())))
        .set("tokenizer.ggml.bos_token_id", Value::U32(1))
        .set("tokenizer.ggml.eos_token_id", Value::U32(2))
        .set("tokenizer.ggml.unknown_token_id", Value::U32(0));
}

/// The table of tensors, and what fills each.
struct Layout<'a> {
    writer: &'a mut Writer,
    parts: Vec<Part>,
}

impl Layout<'_> {
    fn matrix(&mut self, name: &str, format: Format, (rows, cols): (usize, usize), part: Part) -> Result<()> {
        self.writer.tensor(name, TensorType::of(format), &[cols as u64, rows as u64])?;
        self.parts.push(part);
        Ok(())
    }

    fn gain(&mut self, name: &str, width: usize, value: f32) -> Result<()> {
        self.writer.tensor(name, TensorType::F32, &[width as u64])?;
        self.parts.push(Part::Constant(value, width));
        Ok(())
    }
}

/// The tensors in the order of the file; entry i fills tensor i of `writer`.
fn parts(writer: &mut Writer, s: &Shape, args: &Args) -> Result<Vec<Part>> {
    let relu = args.act == Act::Relu;
    let mut layout = Layout { writer, parts: Vec::new() };
    let vocab_rows = |seed, filled| Source { seed: args.seed ^ seed, rows: s.vocab, cols: s.width, filled };
    let embedding = Filled { mean: if relu { 1.0 } else { 0.0 }, deviation: if relu { 1.0 } else { 0.02 }, zeros: 0.0 };
    let format = args.kind.of_embedding(s);
    let part = Part::Rows(vocab_rows(0xE0, embedding), format);
    layout.matrix("token_embd.weight", format, (s.vocab, s.width), part)?;
    for layer in 0..s.layers {
        layout.gain(&format!("blk.{layer}.attn_norm.weight"), s.width, 1.0)?;
        layout.gain(&format!("blk.{layer}.ffn_norm.weight"), s.width, 1.0)?;
        for (i, role) in ROLES.iter().enumerate() {
            let format = args.kind.of_layer(s, role, layer);
            let name = format!("blk.{layer}.{}.weight", role.name);
            layout.matrix(&name, format, (role.size)(s), Part::Layer(i, format))?;
        }
    }
    // With embeddings of size 1 a gain of 1 would give logits in the hundreds.
    layout.gain("output_norm.weight", s.width, if relu { 0.02 } else { 1.0 })?;
    if !s.tied {
        let format = args.kind.of_head(s);
        let head = Filled { mean: 0.0, deviation: (s.width as f32).sqrt().recip(), zeros: 0.0 };
        layout.matrix("output.weight", format, (s.vocab, s.width), Part::Rows(vocab_rows(0xF0, head), format))?;
    }
    Ok(layout.parts)
}

/// The bytes of each matrix of a layer, in each format that some layer stores it in.
fn encode_layer(parts: &[Part], s: &Shape, args: &Args) -> HashMap<(usize, Format), Vec<u8>> {
    let mut layer = HashMap::new();
    for part in parts {
        let Part::Layer(i, format) = part else { continue };
        layer.entry((*i, *format)).or_insert_with(|| {
            let (rows, cols) = (ROLES[*i].size)(s);
            let filled = Filled { zeros: args.zeros, ..fill::of_role(&ROLES[*i], s, args.act, args.open) };
            Source { seed: args.seed ^ (*i as u64 + 1) << 8, rows, cols, filled }.encode(*format)
        });
    }
    layer
}

#[cfg(test)]
mod tests;
