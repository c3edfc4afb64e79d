//! Opening a model: a Hugging Face directory or a GGUF file, parsed and understood, but not yet bound.

use super::arch::{self, Architecture};
use super::bind::bind;
use super::fields::Fields;
use super::memory::{Demand, MemoryEstimate, tokenizer};
use super::names::Names;
use super::packed::{self, Scheme};
use super::source::{Source, Stored};
use super::spec::{NormKind, Spec};
use super::validate::validate;
use super::weights::Model;
use crate::embedded;
use crate::error::{Error, Result};
use lacuna_core::format::{
    config::Config,
    packed::{self as packed_file, PackedFile},
    safetensors,
};
use lacuna_core::map::{self, LoadMode};
use lacuna_core::size::cap;
use serde_json::Map;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The setting of a directory whose residual stream was given a basis in every block and cut there: the width it had before.
pub const NORM_WIDTH: &str = "lacuna_norm_width";

/// How to load.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Mapped or read.
    pub mode: LoadMode,
    /// Look at every weight for NaN and infinity (reads the whole file).
    pub check_tensors: bool,
    /// The context that will be used; decides between the short and the long table of longrope models.
    pub context: Option<usize>,
}

/// A model whose headers are read and understood, and whose weights are not touched yet: what `inspect` shows, and what memory estimates are made from.
#[derive(Debug)]
pub struct Checkpoint {
    /// What the model computes.
    pub spec: Spec,
    /// Its tensors.
    pub source: Source,
    pub(crate) names: &'static Names,
    pub(super) tied: Option<bool>,
    pub(super) hash: String,
    pub(super) mode: LoadMode,
    pub(super) check: bool,
    /// Lacuna's own container beside the weights.
    pub(super) packed: Option<PathBuf>,
    /// Bytes that the tokenizer beside the weights takes, about.
    pub(super) tokenizer: u64,
}

impl Checkpoint {
    /// Opens the directory or file `path`.
    ///
    /// # Errors
    /// What is not there, damaged, unknown or impossible, by file, key and tensor.
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        let checkpoint = if path.is_dir() {
            open_directory(path, options)?
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            super::gguf::open(path, options)?
        } else {
            let problem = if path.exists() {
                "expected a directory with config.json and safetensors files, or a file that ends in .gguf"
            } else {
                "there is no such file or directory"
            };
            return Err(Error::NoModel { file: path.into(), problem: problem.into() });
        };
        checkpoint.checked()
    }

    /// Opens the model inside the library.
    ///
    /// # Errors
    /// The library was built without one, or its files are damaged.
    pub fn embedded(options: &LoadOptions) -> Result<Self> {
        let part = |name: &str| {
            let problem = format!("this build has no embedded {name}");
            embedded::file(name).ok_or_else(|| Error::NoModel { file: embedded::NAME.into(), problem })
        };
        let weights = safetensors::Tensors::parse(part("model.safetensors")?)?;
        let files = safetensors::Model::from_files(vec![weights])?;
        understand(Path::new(embedded::NAME), &part("config.json")?, options, || Ok(files))?.checked()
    }

    fn checked(self) -> Result<Self> {
        validate(&self.source.file, &self.spec)?;
        Ok(self)
    }

    /// Memory that the model takes when it is used as `demand` says.
    pub fn memory(&self, demand: &Demand) -> MemoryEstimate {
        MemoryEstimate::new(self, demand)
    }

    /// Hex hash that binds plans and converted layouts to these weights.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Loads the weights (reads or converts what must be), looks for NaN if that was asked for, and puts every tensor
    /// in its place.
    ///
    /// # Errors
    /// Missing tensors, shapes that do not fit the spec, files that cannot be read, numbers that are none.
    pub fn bind(mut self) -> Result<Model> {
        self.source.load(self.mode)?;
        if self.check {
            self.source.check_finite()?;
        }
        let packed = self.packed.map(|path| PackedFile::open(&path)).transpose()?;
        let own = packed.filter(|p| {
            let own = p.model() == self.hash;
            if !own {
                tracing::warn!(
                    "{}: was made for other weights than those beside it, and is not used",
                    p.path().display()
                );
            }
            own
        });
        let model = bind(&self.source, self.names, self.spec, self.tied, self.hash)?;
        Ok(Model { packed: own.map(Arc::new), ..model })
    }
}

/// Loads the model at `path`: [`Checkpoint::open`], then [`Checkpoint::bind`].
///
/// # Errors
/// Those of both.
pub fn load(path: &Path, options: &LoadOptions) -> Result<Model> {
    Checkpoint::open(path, options)?.bind()
}

fn open_directory(dir: &Path, options: &LoadOptions) -> Result<Checkpoint> {
    let file = dir.join("config.json");
    if !file.exists() {
        return Err(Error::NoModel { file: dir.into(), problem: "the directory has no config.json".into() });
    }
    let there = |name: &str| dir.join(name).exists();
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"].into_iter().find(|n| there(n));
    if let Some(name) = pickled.filter(|_| !there("model.safetensors") && !there("model.safetensors.index.json")) {
        let problem = format!(
            "its weights are in {name}, a pickle, which may hold a program and is not read; write them as safetensors once \
             (tools/bin_to_safetensors.py)"
        );
        return Err(Error::NoModel { file: dir.into(), problem });
    }
    let json = map::read_small(&file, cap::CONFIG)?;
    let checkpoint = understand(dir, &json, options, || Ok(safetensors::Model::open(dir, LoadMode::Map)?))?;
    let packed = Some(dir.join(packed_file::NAME)).filter(|p| p.exists());
    Ok(Checkpoint { packed, ..checkpoint })
}

/// A directory's configuration `json` and its files, which are opened once the configuration is understood.
fn understand(
    dir: &Path,
    json: &[u8],
    options: &LoadOptions,
    files: impl FnOnce() -> Result<safetensors::Model>,
) -> Result<Checkpoint> {
    let fields = fields(&dir.join("config.json"), json, options.context)?;
    let arch = arch::of_config(&fields)?;
    let scheme = Scheme::of(&fields)?;
    let spec = rotated(&fields, arch)?;
    let files = files()?;
    let hash = files.hash(json);
    let source = source_of(dir, &files, scheme)?;
    let tied = fields.flag_or("tie_word_embeddings", false)?.then_some(true).or_else(|| {
        let said = fields.get("tie_word_embeddings").is_some();
        said.then_some(false)
    });
    let (mode, check, tokenizer) = (options.mode, options.check_tensors, tokenizer(false, spec.vocab));
    Ok(Checkpoint { spec, source, names: arch.names, tied, hash, mode, check, packed: None, tokenizer })
}

/// What the architecture computes. Where the residual stream was cut, everything else follows from the width that it had
/// before, and all norms are plain: others would depend on the basis.
fn rotated(fields: &Fields, arch: &Architecture) -> Result<Spec> {
    let Some(before) = fields.opt_count(NORM_WIDTH)? else { return (arch.spec)(fields) };
    let width = fields.count(arch.names.width)?;
    if width > before {
        let problem = format!("is {before}, below the width {width} (`{}`) that was cut out of it", arch.names.width);
        return Err(fields.wrong(NORM_WIDTH, problem));
    }
    let spec = (arch.spec)(&fields.with(arch.names.width, before))?;
    Ok(Spec { width, norm_width: Some(before), norm: NormKind::Rms, ..spec })
}

/// The settings of a config.json, `file` in messages.
///
/// # Errors
/// Something that is no JSON object.
pub(super) fn fields(file: &Path, json: &[u8], context: Option<usize>) -> Result<Fields> {
    let config = Config::parse(json).map_err(|e| e.in_file(file))?;
    let settings: Map<_, _> = config.keys().filter_map(|k| Some((k.to_owned(), config.get(k)?.clone()))).collect();
    Ok(Fields::new(file.display().to_string(), context, settings))
}

/// The tensors of `files`; with a scheme, quantised ones too.
///
/// # Errors
/// Codes and scales that do not belong together.
pub(crate) fn source_of(dir: &Path, files: &safetensors::Model, scheme: Option<Scheme>) -> Result<Source> {
    let mut source = Source::new(dir.display().to_string(), BTreeMap::new());
    for name in files.names() {
        let Some((entry, bytes)) = files.get(name) else { continue };
        if let Some(scheme) = scheme
            && (packed::is_part(name) || packed::add(scheme, files, name, &mut source)?)
        {
            continue;
        }
        match entry.dtype.format() {
            Some(format) => {
                let shape = entry.shape.iter().map(|n| *n as usize).collect();
                source.tensors.insert(name.into(), Stored::new(format, shape, bytes));
            }
            None => {
                source.unusable.insert(name.into(), entry.dtype.name());
            }
        }
    }
    Ok(source)
}
