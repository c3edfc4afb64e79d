//! Writing a Hugging Face model as a GGUF file: the inverse of reading one.
//!
//! The tables that readers go by are used backwards: tensors by both sides' names (`tensors`), settings by what the spec
//! says (`metadata`), the vocabulary by [`GgufVocab::from_dir`]. Conventions are those of llama.cpp's
//! `convert_hf_to_gguf.py`: vectors, routers and learned positions in F32, other matrices in the type that they have (codes of
//! compressed-tensors as Q4_0 or Q8_0 blocks, which hold the same numbers), rows of query and key of the llama family turned
//! from halves to neighbours. Before anything is written the settings are read back: what a GGUF file cannot say of a model is
//! refused by name and never dropped.

mod metadata;
mod tensors;

use super::{
    arch::{self, GgufSide},
    checkpoint::{Checkpoint, LoadOptions, NORM_WIDTH},
    fields::Fields,
    source::Source,
};
use crate::{
    error::{Error, Result},
    tokenizer::GgufVocab,
};
use lacuna_core::{atomic::write_atomically, format::gguf::Writer, map::read_small, size::cap};
use std::path::Path;
use tensors::Part;

/// A GGUF file that is ready to be written.
pub struct Export {
    source: Source,
    writer: Writer,
    parts: Vec<Part>,
    bytes: u64,
    notes: Vec<String>,
}

impl Export {
    /// Decides everything but the data: reads headers, settings and the vocabulary of the Hugging Face model at `dir`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Checkpoint::bind`]; architectures without a GGUF form, and settings, tensors or vocabularies that such a file
    /// cannot hold.
    pub fn new(dir: &Path) -> Result<Self> {
        let (fields, side) = understand(dir)?;
        // Binding holds every tensor's shape against the settings, which the writer relies on.
        drop(Checkpoint::open(dir, &LoadOptions::default())?.bind()?);
        let checkpoint = Checkpoint::open(dir, &LoadOptions::default())?;
        let mut notes = Vec::new();
        let settings = metadata::all(dir, &fields, side, &checkpoint.spec, &mut notes)?;
        let mut parts = tensors::all(&checkpoint, side, settings.rows)?;
        let mut writer = Writer::new();
        for (key, value) in settings.pairs {
            writer.set(&key, value);
        }
        writer.set("general.file_type", metadata::file_type(tensors::main_type(&parts)));
        parts.extend(settings.parts);
        match GgufVocab::from_dir(dir, checkpoint.spec.vocab)? {
            Some(vocab) => {
                for (key, value) in vocab.entries() {
                    writer.set(&key, value);
                }
            }
            None => {
                writer.set("tokenizer.ggml.model", lacuna_core::format::gguf::Value::String("no_vocab".into()));
                notes.push("there is no tokenizer.json beside the weights: the GGUF file has no vocabulary".into());
            }
        }
        let mut bytes = 0;
        for part in &parts {
            bytes += writer.tensor(&part.name, part.kind, &part.dims).map_err(Error::io(dir))?;
        }
        Ok(Self { source: checkpoint.source, writer, parts, bytes, notes })
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What a user should know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Writes the file; `output` is complete or untouched. One tensor at a time is in memory.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, output: &Path) -> Result<()> {
        let size = self.writer.file_size().map_err(Error::io(output))?;
        write_atomically(output, Some(size), |out| {
            self.writer.write(out, |i, _, out| self.parts[i].put(&self.source, out))
        })?;
        Ok(())
    }
}

/// The settings of a directory, and the GGUF side of its architecture.
fn understand(dir: &Path) -> Result<(Fields, &'static GgufSide)> {
    let file = dir.join("config.json");
    let json = read_small(&file, cap::CONFIG)?;
    let fields = super::checkpoint::fields(&file, &json, None)?;
    let found = arch::of_config(&fields)?;
    if fields.get(NORM_WIDTH).is_some() {
        let what = format!("a residual stream with other bases (`{NORM_WIDTH}`) in a GGUF file");
        return Err(fields.unsupported(what, "; use the directory, or start from the original model"));
    }
    let side = arch::gguf_side(found).ok_or_else(|| {
        let able: Vec<&str> =
            arch::ARCHITECTURES.iter().filter(|a| arch::gguf_side(a).is_some()).map(|a| a.name).collect();
        fields.unsupported(
            format!("writing the architecture `{}` as GGUF", found.name),
            &format!("; GGUF files can be written of {}", able.join(", ")),
        )
    })?;
    let inner = fields.inside("text_config").filter(|_| found.name == "gemma3");
    Ok((inner.unwrap_or(fields), side))
}

#[cfg(test)]
mod tests;
