//! `lacuna inspect`: what is in a model, tensor by tensor, and the memory it will take.

use crate::{Outcome, open::Place, table::Table, text};
use anyhow::{Context, Result};
use lacuna::{
    engine::KvType,
    model::{Checkpoint, Demand, LoadOptions, MemoryEstimate},
};
use lacuna_core::{
    bytes::Bytes,
    format::{
        gguf::{self, Gguf},
        safetensors,
    },
    map::{LoadMode, open as map_file},
};
use lacuna_kernels::{Format, Matrix, bitmap};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    fs,
    io::{Write, stdout},
    path::Path,
};

/// Numbers decoded at once while zeros are counted.
const CHUNK: usize = 1 << 16;

/// Arguments of `lacuna inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A GGUF or safetensors file, a Hugging Face directory, or a name in the local hub cache.
    file: String,
    /// Do not read the weights to count zeros.
    #[arg(long)]
    no_zeros: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    r#type: String,
    /// Outermost first.
    shape: Vec<u64>,
    bytes: u64,
    /// Share of numbers that are exactly zero.
    zeros: Option<f64>,
    /// Bytes as a bitmap, where that takes fewer.
    bitmap_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Report {
    file: String,
    architecture: Option<String>,
    /// Why the file cannot be run, if it cannot.
    problem: Option<String>,
    parameters: u64,
    bytes: u64,
    context: Option<usize>,
    metadata: Map<String, Value>,
    bytes_per_type: BTreeMap<String, u64>,
    memory: Vec<Memory>,
    tensors: Vec<Tensor>,
}

#[derive(Serialize)]
struct Memory {
    context: usize,
    weights: u64,
    kv_f16: u64,
    scratch: u64,
    program: u64,
    total: u64,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    let path =
        if args.file.ends_with(".safetensors") { args.file.clone().into() } else { lacuna::hub::locate(&args.file)? };
    let report = report(&path, !args.no_zeros)?;
    let mut out = stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        show(&mut out, &report)?;
    }
    Ok(Outcome::Good)
}

fn report(path: &Path, zeros: bool) -> Result<Report> {
    let (metadata, tensors) = if path.is_dir() {
        directory(path, zeros)?
    } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
        let file = safetensors::Tensors::parse(map_file(path, LoadMode::Map)?).map_err(|e| e.in_file(path))?;
        let metadata = file.metadata().iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        (metadata, safetensors_list(&[file], zeros)?)
    } else {
        gguf_file(path, zeros)?
    };
    let opened = Place::Path(path.to_owned()).open(&LoadOptions::default());
    let mut memory = Vec::new();
    if let Ok(checkpoint) = &opened {
        let own = checkpoint.spec.context;
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        for context in [512, 4096, 32_768, own].into_iter().filter(|c| *c <= own) {
            let need = checkpoint.memory(&Demand { context, kv: KvType::F16, batch: 512, threads });
            let MemoryEstimate { weights, kv, scratch, program } = need;
            memory.push(Memory { context, weights, kv_f16: kv, scratch, program, total: need.total() });
        }
        memory.dedup_by_key(|m| m.context);
    }
    // Packed codes are words in the file and several weights each; an opened model knows what they hold.
    let held = |c: &Checkpoint| c.source.tensors.values().map(|t| t.shape.iter().product::<usize>() as u64).sum();
    let listed = || tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum();
    let parameters = opened.as_ref().map_or_else(|_| listed(), held);
    let mut bytes_per_type = BTreeMap::new();
    for t in &tensors {
        *bytes_per_type.entry(t.r#type.clone()).or_insert(0) += t.bytes;
    }
    Ok(Report {
        file: path.display().to_string(),
        architecture: opened.as_ref().ok().map(|c| c.spec.arch.clone()),
        context: opened.as_ref().ok().map(|c| c.spec.context),
        problem: opened.err().map(|e| format!("{e:#}")),
        parameters,
        bytes: tensors.iter().map(|t| t.bytes).sum(),
        metadata,
        bytes_per_type,
        memory,
        tensors,
    })
}

type Contents = (Map<String, Value>, Vec<Tensor>);

fn directory(dir: &Path, zeros: bool) -> Result<Contents> {
    let file = dir.join("config.json");
    let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    let metadata = serde_json::from_str(&text).with_context(|| format!("{}", file.display()))?;
    let model = safetensors::Model::open(dir, LoadMode::Map)?;
    Ok((metadata, safetensors_list(model.files(), zeros)?))
}

fn safetensors_list(files: &[safetensors::Tensors], zeros: bool) -> Result<Vec<Tensor>> {
    let mut list = Vec::new();
    for file in files {
        for entry in file.entries() {
            let bytes = file.bytes(entry)?;
            let format = entry.dtype.format().filter(|_| zeros).map(gguf::TensorType::of);
            list.push(Tensor {
                name: entry.name.clone(),
                r#type: entry.dtype.name().to_owned(),
                shape: entry.shape.clone(),
                bytes: bytes.len() as u64,
                zeros: format.map(|kind| zero_share(kind, &bytes)).transpose()?,
                bitmap_bytes: entry.dtype.format().filter(|_| zeros).and_then(|f| as_bitmap(f, &entry.shape, &bytes)),
            });
        }
    }
    Ok(list)
}

fn gguf_file(path: &Path, zeros: bool) -> Result<Contents> {
    let file = Gguf::open(path, LoadMode::Map)?;
    let metadata = file.metadata().iter().map(|(k, v)| (k.to_owned(), value(v))).collect();
    let mut list = Vec::new();
    for t in file.tensors() {
        let bytes = file.bytes(&t)?;
        let shape: Vec<u64> = t.dims.iter().rev().copied().collect();
        list.push(Tensor {
            name: t.name.to_owned(),
            r#type: t.kind.name().to_owned(),
            shape: shape.clone(),
            bytes: t.bytes,
            // Types without a decoder have no count.
            zeros: if zeros { zero_share(t.kind, &bytes).ok() } else { None },
            bitmap_bytes: t.kind.format().filter(|_| zeros).and_then(|f| as_bitmap(f, &shape, &bytes)),
        });
    }
    Ok((metadata, list))
}

/// A metadata value as JSON; long lists are told by their length.
fn value(v: &gguf::Value) -> Value {
    use gguf::Value as V;
    match v {
        V::Bool(b) => json!(b),
        V::String(s) => json!(s),
        V::F32(x) => json!(x),
        V::F64(x) => json!(x),
        V::Array(a) if a.len() > 16 => json!(format!("{} values of {:?}", a.len(), a.kind())),
        V::Array(a) => a.iter().filter_map(Result::ok).map(|v| value(&v)).collect(),
        V::U64(n) => json!(n),
        other => json!(other.as_int()),
    }
}

fn zero_share(kind: gguf::TensorType, bytes: &Bytes) -> Result<f64> {
    let blocks = (CHUNK / kind.block_len()).max(1);
    let mut numbers = vec![0.0f32; blocks * kind.block_len()];
    let (mut zeros, mut total) = (0usize, 0usize);
    for part in bytes.chunks(blocks * kind.block_bytes()) {
        let out = &mut numbers[..part.len() / kind.block_bytes() * kind.block_len()];
        gguf::decode_run(kind, part, out)?;
        zeros += out.iter().filter(|x| **x == 0.0).count();
        total += out.len();
    }
    Ok(if total == 0 { 0.0 } else { zeros as f64 / total as f64 })
}

/// Bytes of a matrix as a bitmap, if that takes fewer.
fn as_bitmap(format: Format, shape: &[u64], bytes: &[u8]) -> Option<u64> {
    let &[rows, cols] = shape else { return None };
    let w = Matrix::new(format, usize::try_from(rows).ok()?, usize::try_from(cols).ok()?, bytes)?;
    let (packed, _) = bitmap::packed_bytes(&w)?;
    (packed < bytes.len()).then_some(packed as u64)
}

fn show(out: &mut impl Write, r: &Report) -> Result<()> {
    writeln!(out, "{}", r.file)?;
    writeln!(out, "architecture  {}", text::or_dash(r.architecture.as_ref()))?;
    writeln!(out, "parameters    {}", text::count(r.parameters))?;
    writeln!(out, "bytes         {}", text::bytes(r.bytes))?;
    writeln!(out, "context       {}", text::or_dash(r.context))?;
    if let Some(problem) = &r.problem {
        writeln!(out, "cannot run    {problem}")?;
    }
    writeln!(out)?;
    let mut table = Table::new(&["setting", "value"]);
    for (key, value) in &r.metadata {
        let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        table.row([key.clone(), cut(&shown)]);
    }
    writeln!(out, "{table}")?;
    let mut table = Table::new(&["tensor", "type", "shape", "zeros:", "bytes:", "as bitmap:"]);
    for t in &r.tensors {
        let shape = t.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        let zeros = text::or_dash(t.zeros.map(text::percent));
        table.row([
            t.name.clone(),
            t.r#type.clone(),
            shape,
            zeros,
            text::bytes(t.bytes),
            text::or_dash(t.bitmap_bytes.map(text::bytes)),
        ]);
    }
    writeln!(out, "{table}")?;
    let mut table = Table::new(&["type", "bytes:"]);
    for (name, bytes) in &r.bytes_per_type {
        table.row([name.clone(), text::bytes(*bytes)]);
    }
    writeln!(out, "{table}")?;
    let mut table = Table::new(&["context:", "weights:", "KV (f16):", "work space:", "program:", "memory:"]);
    for m in &r.memory {
        let sizes = [m.weights, m.kv_f16, m.scratch, m.program, m.total].map(text::bytes);
        table.row([m.context.to_string()].into_iter().chain(sizes));
    }
    write!(out, "{table}")?;
    Ok(())
}

/// One line of at most 80 characters, without control characters.
fn cut(text: &str) -> String {
    let mut line: String = text.chars().take(80).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().count() > 80 {
        line += "...";
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_counted_across_chunks() {
        let mut numbers = vec![1.0f32; CHUNK + 3];
        numbers[0] = 0.0;
        numbers[CHUNK + 2] = -0.0;
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let share = zero_share(gguf::TensorType::of(Format::F32), &bytes.into()).expect("floats decode");
        assert_eq!(share, 2.0 / (CHUNK + 3) as f64);
    }

    #[test]
    fn long_values_are_cut_and_cleaned() {
        assert_eq!(cut("a\nb"), "a b");
        assert_eq!(cut(&"x".repeat(100)).len(), 83);
    }
}
