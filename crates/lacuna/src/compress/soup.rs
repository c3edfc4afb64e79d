//! Sparse model soups: the mean of several outputs that have the same zeros (Zimmer et al., arXiv:2306.16788). What was pruned
//! once and then changed in several ways (other texts, other seeds, training elsewhere) often does better as a mean, at the
//! cost of one.

use super::{
    lock,
    output::{Unfinished, beside_files, check_place, pretty, put},
    store::beside,
    tensors::{Target, numbers},
};
use crate::{
    error::{Error, Result},
    model::checkpoint::NORM_WIDTH,
};
use lacuna_core::{
    atomic::{replace_folder, write_atomically},
    bytes::Bytes,
    format::safetensors::{self, Entry, NewTensor},
    map::{LoadMode, read_small},
    size::cap,
};
use lacuna_kernels::{Format, convert::decode_run};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Bytes of weights in one file at most; as many are in memory.
const SHARD: u64 = 1 << 30;

/// Fewer zeros than this share are accidents and no mask.
const MASK: f64 = 0.01;

/// What a soup has become.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SoupReport {
    /// Tensors.
    pub tensors: usize,
    /// Tensors with a mask.
    pub masked: usize,
    /// Share of their numbers that is zero.
    pub zeros: f64,
    /// Bytes of the weights.
    pub bytes: u64,
}

/// Writes the mean of `models` (Hugging Face directories of one architecture) to `output`.
///
/// # Errors
/// Fewer than two models, GGUF files, configurations that differ, numbers that are not finite, weights in codes, tensors that not all have or whose shapes, types or zeros differ (the
/// first one is named); what the system says.
pub fn soup(models: &[PathBuf], output: &Path) -> Result<SoupReport> {
    let wrong = |problem: String| Error::Argument { name: "soup", problem };
    if models.len() < 2 {
        return Err(wrong("a mean needs two models at least: --soup A,B".into()));
    }
    if let Some(file) = models.iter().find(|m| !m.is_dir()) {
        let problem = format!("{} is no Hugging Face directory; average those, and convert the mean", file.display());
        return Err(wrong(problem));
    }
    models.iter().try_for_each(|m| check_place(m, output, Target::HuggingFace))?;
    for model in models {
        let config = read_small(model.join("config.json"), cap::CONFIG)?;
        if serde_json::from_slice::<Value>(&config).is_ok_and(|c| c.get(NORM_WIDTH).is_some()) {
            let problem = format!("{}: its residual stream has bases of its own, which have no mean", model.display());
            return Err(wrong(problem + "; average models first, and turn the mean"));
        }
    }
    let all: Vec<safetensors::Model> =
        models.iter().map(|m| safetensors::Model::open(m, LoadMode::Map)).collect::<lacuna_core::error::Result<_>>()?;
    same_settings(models)?;
    let kitchen = Kitchen { models, all: &all };
    let (names, mut report) = kitchen.check()?;
    let hashes: Vec<_> = models.iter().map(|m| lock::source_files(m)).collect::<Result<_>>()?;

    let new = Unfinished(beside(output, "lacuna-new")?);
    let _ = fs::remove_dir_all(&new.0);
    fs::create_dir_all(&new.0).map_err(Error::io(&new.0))?;
    let mut file = |path: &Path, size: u64, body: &mut dyn FnMut(&mut dyn std::io::Write) -> std::io::Result<()>| {
        Ok(write_atomically(path, Some(size), |out| body(out))?)
    };
    beside_files(&models[0], &new.0, &mut file)?;
    let config = models[0].join("config.json");
    put(&mut file, &new.0.join("config.json"), &fs::read(&config).map_err(Error::io(&config))?)?;
    report.bytes = kitchen.write(&names, &new.0)?;
    let lock = json!({"version": 1, "lacuna": env!("CARGO_PKG_VERSION"), "soup": hashes});
    put(&mut file, &new.0.join(lock::NAME), &pretty(&lock))?;
    replace_folder(&new.0, output)?;
    Ok(report)
}

/// That the configurations say the same, but for what only tells who wrote them.
fn same_settings(models: &[PathBuf]) -> Result<()> {
    const TOLD: [&str; 4] = ["_name_or_path", "transformers_version", "torch_dtype", "dtype"];
    let read = |model: &PathBuf| -> Result<(PathBuf, Value)> {
        let path = model.join("config.json");
        let text = read_small(&path, cap::CONFIG)?;
        let bad = |e: serde_json::Error| Error::config(&path.display().to_string(), "config.json", e.to_string());
        let value = serde_json::from_slice(&text).map_err(bad)?;
        Ok((path, value))
    };
    let (first, settings) = read(&models[0])?;
    for model in &models[1..] {
        let (path, others) = read(model)?;
        let keys = |v: &Value| v.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
        let mut all = [keys(&settings), keys(&others)].concat();
        all.retain(|k| !TOLD.contains(&k.as_str()));
        if let Some(key) = all.into_iter().find(|k| settings.get(k) != others.get(k)) {
            let shown = |v: &Value| v.get(&key).map_or("absent".to_owned(), Value::to_string);
            let (path, first) = (path.display(), first.display());
            let problem = format!(
                "{path}: `{key}` is {}, but {} in {first}; a mean is one of models with the same settings",
                shown(&others),
                shown(&settings)
            );
            return Err(Error::Argument { name: "soup", problem });
        }
    }
    Ok(())
}

/// The models that are averaged.
struct Kitchen<'a> {
    models: &'a [PathBuf],
    all: &'a [safetensors::Model],
}

impl Kitchen<'_> {
    fn wrong(&self, tensor: &str, i: usize, problem: &str) -> Error {
        let (first, other) = (self.models[0].display(), self.models[i].display());
        Error::Argument { name: "soup", problem: format!("tensor `{tensor}` of {other}: {problem} {first}") }
    }

    /// That a tensor of model `i` has no NaN and no infinity.
    fn finite(&self, name: &str, i: usize, format: Format, bytes: &[u8]) -> Result<()> {
        let values = decoded(format, bytes);
        let Some(at) = values.iter().position(|v| !v.is_finite()) else { return Ok(()) };
        let (file, value) = (self.models[i].display(), values[at]);
        let problem = format!("tensor `{name}` of {file}: number {at} is {value}; a mean with it would be none");
        Err(Error::Argument { name: "soup", problem })
    }

    fn get(&self, i: usize, name: &str) -> Result<(&Entry, Bytes)> {
        let missing = || self.wrong(name, i, "it is not there, but in");
        self.all[i].get(name).ok_or_else(missing)
    }

    /// That all have the same tensors with the same zeros; gives their names.
    fn check(&self) -> Result<(Vec<String>, SoupReport)> {
        let names: Vec<String> = self.all[0].names().map(str::to_owned).collect();
        for (i, model) in self.all.iter().enumerate() {
            if let Some(more) = model.names().find(|n| self.all[0].get(n).is_none()) {
                return Err(self.wrong(more, i, "it is there, but not in"));
            }
        }
        let mut report = SoupReport { tensors: names.len(), ..SoupReport::default() };
        let (mut zeros, mut count) = (0, 0);
        for name in &names {
            let (first, bytes) = self.get(0, name)?;
            let Some(format) = averaged(first) else {
                let what = format!("averaging tensor `{name}` of type {}", first.dtype.name());
                let file = self.models[0].display().to_string();
                let remedy = "; average before rounding to codes".into();
                return Err(Error::Unsupported { file, what, remedy });
            };
            self.finite(name, 0, format, &bytes)?;
            let mask = mask(format, &bytes);
            let none = mask.iter().filter(|z| **z).count();
            let mut pruned = first.shape.len() > 1 && none as f64 >= MASK * mask.len() as f64;
            for i in 1..self.all.len() {
                let (other, bytes) = self.get(i, name)?;
                if (&other.shape, other.dtype) != (&first.shape, first.dtype) {
                    return Err(self.wrong(name, i, "its shape or type is not that of"));
                }
                self.finite(name, i, format, &bytes)?;
                let theirs = self::mask(format, &bytes);
                let many = theirs.iter().filter(|z| **z).count() as f64 >= MASK * theirs.len() as f64;
                pruned |= first.shape.len() > 1 && many;
                if pruned && let Some(at) = mask.iter().zip(&theirs).position(|(a, b)| a != b) {
                    let problem = format!("its zeros are others (first at number {at}) than those of");
                    return Err(self.wrong(name, i, &problem));
                }
            }
            if pruned {
                report.masked += 1;
                (zeros, count) = (zeros + none, count + mask.len());
            }
            (0..self.all.len()).for_each(|i| drop(self.get(i, name).map(|t| t.1.release())));
        }
        report.zeros = zeros as f64 / (count as f64).max(1.0);
        Ok((names, report))
    }

    /// Writes the means into files of at most [`SHARD`] bytes; gives the bytes of all.
    fn write(&self, names: &[String], dir: &Path) -> Result<u64> {
        let mut shards: Vec<Vec<&str>> = vec![Vec::new()];
        let (mut size, mut total) = (0, 0);
        for name in names {
            let bytes = self.get(0, name)?.1.len() as u64;
            if size + bytes > SHARD && size > 0 {
                shards.push(Vec::new());
                size = 0;
            }
            (size, total) = (size + bytes, total + bytes);
            shards.last_mut().expect("there is always one").push(name);
        }
        let metadata = [("format", "pt")];
        let mut map = serde_json::Map::new();
        let count = shards.len();
        for (i, shard) in shards.iter().enumerate() {
            let file = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            let means: Vec<(&Entry, Vec<u8>)> = shard.iter().map(|n| self.mean(n)).collect::<Result<_>>()?;
            let parts = shard.iter().zip(&means);
            let new: Vec<NewTensor<'_>> =
                parts.map(|(name, (e, data))| NewTensor { name, dtype: e.dtype, shape: &e.shape, data }).collect();
            let path = dir.join(&file);
            let size = safetensors::file_size(&new, &metadata).map_err(Error::io(&path))?;
            write_atomically(&path, Some(size), |out| safetensors::write(&new, &metadata, out))?;
            shard.iter().for_each(|n| drop(map.insert((*n).to_owned(), json!(file))));
        }
        if count > 1 {
            let index = pretty(&json!({"metadata": {"total_size": total}, "weight_map": map}));
            let path = dir.join("model.safetensors.index.json");
            write_atomically(&path, Some(index.len() as u64), |out| out.write_all(&index))?;
        }
        Ok(total)
    }

    /// The mean of one tensor, in its own type.
    fn mean(&self, name: &str) -> Result<(&Entry, Vec<u8>)> {
        let (entry, _) = self.get(0, name)?;
        let format = averaged(entry).unwrap_or(Format::F32);
        let mut sums: Vec<f64> = Vec::new();
        for i in 0..self.all.len() {
            let (_, bytes) = self.get(i, name)?;
            let values = decoded(format, &bytes);
            sums.resize(values.len(), 0.0);
            sums.iter_mut().zip(&values).for_each(|(s, v)| *s += f64::from(*v));
            bytes.release();
        }
        let mean: Vec<f32> = sums.iter().map(|s| (s / self.all.len() as f64) as f32).collect();
        Ok((entry, numbers(format, &mean)))
    }
}

/// The format of numbers that can be averaged.
fn averaged(entry: &Entry) -> Option<Format> {
    entry.dtype.format().filter(|f| matches!(f, Format::F32 | Format::F16 | Format::Bf16))
}

fn decoded(format: Format, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / format.block_bytes()];
    decode_run(format, bytes, &mut values);
    values
}

/// Which numbers are zero.
fn mask(format: Format, bytes: &[u8]) -> Vec<bool> {
    decoded(format, bytes).iter().map(|v| *v == 0.0).collect()
}
