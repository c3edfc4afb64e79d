//! Puts an output together beside its place and moves it there when it is whole.

use super::{
    Plan, holds,
    homes::Home,
    lock,
    rotate::{self, BASIS},
    store::beside,
    tensors::{PACKED, Target, block_format, packed_name, stored_bits},
};
use crate::error::{Error, Result};
use lacuna_core::{
    atomic::{replace_folder, write_atomically},
    bytes::Bytes,
    format::{
        gguf::{Gguf, TensorType, Writer},
        packed::{self, Packing},
        safetensors::{self, Dtype, NewTensor, Tensors},
    },
    map::{LoadMode, read_small},
    site::Proj,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

/// Bytes of weights in one file at most.
const SHARD: u64 = 4 << 30;
/// Longest file beside the weights that is copied.
const BESIDE: u64 = 256 << 20;

/// Writes a file of a known size through a body.
pub(super) type WriteFile<'a> =
    dyn FnMut(&Path, u64, &mut dyn FnMut(&mut dyn io::Write) -> io::Result<()>) -> Result<()> + 'a;

/// That the output's place is free, or holds an earlier output of this command.
///
/// # Errors
/// It holds something else, or it is the model itself.
pub(super) fn check_place(model: &Path, path: &Path, target: Target) -> Result<()> {
    let wrong = |problem: String| Err(Error::Argument { name: "output", problem });
    let shown = path.display();
    beside(path, "new")?;
    let gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    match (target, gguf) {
        (Target::Gguf, false) => {
            return wrong(format!("{shown}: this becomes a GGUF file; end the name in .gguf"));
        }
        (Target::HuggingFace, true) => {
            return wrong(format!(
                "{shown}: a Hugging Face model becomes a directory; choose a name without .gguf, or --gguf"
            ));
        }
        _ => {}
    }
    if !path.exists() {
        return Ok(());
    }
    let same = fs::canonicalize(path).ok() == fs::canonicalize(model).ok();
    let own = if gguf { lock_beside(path).exists() } else { path.join(lock::NAME).exists() };
    let empty = path.is_dir() && fs::read_dir(path).is_ok_and(|mut d| d.next().is_none());
    if same || !(own || empty) {
        return wrong(format!("{shown} is there already and is no output of this command; choose another place"));
    }
    Ok(())
}

/// Where the lock of a GGUF file lies.
pub(super) fn lock_beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(lock::NAME);
    name.into()
}

/// Writes the output; gives the bytes of the weights before and after.
///
/// # Errors
/// What the system says; the output's place is then as it was.
pub(super) fn write(plan: &Plan<'_>, blocks: &[Tensors], lock: &Value) -> Result<(u64, u64)> {
    let mut atomically = |path: &Path, size: u64, body: &mut dyn FnMut(&mut dyn io::Write) -> io::Result<()>| {
        Ok(write_atomically(path, Some(size), |out| body(out))?)
    };
    write_through(plan, blocks, lock, &mut atomically)
}

/// As [`write()`], with every file passing through `file`: the tests make those fail.
pub(super) fn write_through(
    plan: &Plan<'_>,
    blocks: &[Tensors],
    lock: &Value,
    file: &mut WriteFile<'_>,
) -> Result<(u64, u64)> {
    match plan.target {
        Target::HuggingFace => directory(plan, blocks, lock, file),
        Target::Gguf => gguf(plan, blocks, lock, file),
    }
}

pub(super) fn put(file: &mut WriteFile<'_>, path: &Path, bytes: &[u8]) -> Result<()> {
    file(path, bytes.len() as u64, &mut |out| out.write_all(bytes))
}

pub(super) fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// Removes a folder that did not become the output.
pub(super) struct Unfinished(pub PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn directory(plan: &Plan<'_>, blocks: &[Tensors], lock: &Value, file: &mut WriteFile<'_>) -> Result<(u64, u64)> {
    let (model, output) = (&plan.request.model, &plan.request.output);
    let new = Unfinished(beside(output, "lacuna-new")?);
    let _ = fs::remove_dir_all(&new.0);
    fs::create_dir_all(&new.0).map_err(Error::io(&new.0))?;
    beside_files(model, &new.0, file)?;
    put(file, &new.0.join("config.json"), &configuration(plan, blocks)?)?;
    let source = safetensors::Model::open(model, LoadMode::Map)?;
    let mut tensors = all_tensors(plan, &source, blocks)?;
    let packed: Vec<Tensor> = tensors.extract_if(.., |t| t.0.starts_with(PACKED)).collect();
    let before = source.names().filter_map(|n| source.get(n)).map(|t| t.1.len() as u64).sum();
    let mut after = tensors.iter().map(|t| t.3.len() as u64).sum();
    weights(&new.0, &tensors, file)?;
    if !packed.is_empty() {
        after -= saved(plan, &tensors, &packed).min(after);
        container(&new.0, &packed, file)?;
    }
    put(file, &new.0.join(lock::NAME), &pretty(lock))?;
    replace_folder(&new.0, output)?;
    Ok((before, after))
}

/// Copies what goes along with the weights, but for the configuration.
pub(super) fn beside_files(model: &Path, to: &Path, file: &mut WriteFile<'_>) -> Result<()> {
    for entry in fs::read_dir(model).map_err(Error::io(model))? {
        let path = entry.map_err(Error::io(model))?.path();
        if goes_along(&path) {
            let bytes = read_small(&path, BESIDE)?;
            put(file, &to.join(path.file_name().unwrap_or_default()), &bytes)?;
        }
    }
    Ok(())
}

/// Bytes by which the pieces of the container are smaller than the dense matrices that Lacuna reads them for.
fn saved(plan: &Plan<'_>, tensors: &[Tensor], packed: &[Tensor]) -> u64 {
    let sizes: BTreeMap<&str, u64> = packed.iter().map(|t| (&t.0[..], t.3.len() as u64)).collect();
    let of = |(layer, home): (usize, &Home)| {
        let dense = size_of(tensors, &home.tensor);
        let part = |(proj, rows): &(Proj, Vec<usize>)| {
            let dense = dense * rows.len() as u64 / home.outputs.max(1) as u64;
            sizes.get(&packed_name(layer, *proj)[..]).map_or(0, |own| dense.saturating_sub(*own))
        };
        home.parts.iter().map(part).sum::<u64>()
    };
    plan.all_homes().map(of).sum()
}

fn size_of(tensors: &[Tensor], name: &str) -> u64 {
    let at = tensors.binary_search_by(|t| t.0.as_str().cmp(name));
    at.map_or(0, |i| tensors[i].3.len() as u64)
}

/// Writes what no other program reads, bound to the weights in `dir`.
fn container(dir: &Path, packed: &[Tensor], file: &mut WriteFile<'_>) -> Result<()> {
    let json = read_small(dir.join("config.json"), lacuna_core::size::cap::CONFIG)?;
    let hash = safetensors::Model::open(dir, LoadMode::Map)?.hash(&json);
    let pieces = packed.iter().map(|t| (t.0.strip_prefix(PACKED).unwrap_or(&t.0), &t.3[..]));
    let packing = Packing::new(pieces, &hash);
    let path = dir.join(packed::NAME);
    let size = packing.file_size().map_err(Error::io(&path))?;
    file(&path, size, &mut |out| packing.write(out))
}

/// Configuration of tokenizer, generation and chat; texts for people.
fn goes_along(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let ending = path.extension().unwrap_or_default().to_string_lossy();
    let known = ["json", "txt", "model", "jinja", "md"].contains(&ending.as_ref()) || name.starts_with("LICENSE");
    let replaced = name == "config.json" || name == lock::NAME || name.ends_with(".safetensors.index.json");
    path.is_file() && known && !replaced
}

/// The configuration of the model, with what the codes are.
fn configuration(plan: &Plan<'_>, blocks: &[Tensors]) -> Result<Vec<u8>> {
    let path = plan.request.model.join("config.json");
    let text = read_small(&path, lacuna_core::size::cap::CONFIG)?;
    let bad = |e: serde_json::Error| Error::config(&path.display().to_string(), "config.json", e.to_string());
    if let Some(sliced) = &plan.sliced {
        let mut config: Value = serde_json::from_slice(&text).map_err(bad)?;
        rotate::configure(&mut config, plan, sliced);
        return Ok(pretty(&config));
    }
    if let Some(narrowed) = &plan.narrowed {
        let mut config: Value = serde_json::from_slice(&text).map_err(bad)?;
        let key = plan.names.inner;
        let inside = config.get(key).is_none() && config["text_config"].get(key).is_some();
        if inside {
            config["text_config"][key] = json!(narrowed.width);
        } else {
            config[key] = json!(narrowed.width);
        }
        return Ok(pretty(&config));
    }
    let Some((_, group)) = plan.grid else { return Ok(text.to_vec()) };
    let mut config: Value = serde_json::from_slice(&text).map_err(bad)?;
    // The layers of every number of bits.
    let mut modules: BTreeMap<Option<u32>, Vec<&str>> = BTreeMap::new();
    for (layer, home) in plan.all_homes() {
        let name = home.tensor.strip_suffix(".weight").unwrap_or(&home.tensor);
        // Two factors in the container have a dense product beside them.
        let plain = blocks.get(layer).is_some_and(|b| b.get(&home.tensor).is_some());
        let bits = plan.bits(layer, home).filter(|_| !plain).map(stored_bits);
        modules.entry(bits).or_default().push(name);
    }
    let one = modules.len() == 1;
    let mut ignored = vec!["lm_head", "re:.*router.*", "re:.*experts.*", "re:.*block_sparse_moe.*", "re:.*mlp[.]gate$"];
    ignored.extend(modules.remove(&None).unwrap_or_default());
    if modules.is_empty() {
        return Ok(text.to_vec());
    }
    let mut groups = serde_json::Map::new();
    for (i, (bits, names)) in modules.into_iter().enumerate() {
        let targets = if one { vec!["Linear"] } else { names };
        groups.insert(format!("group_{i}"), config_group(targets, bits.unwrap_or_default(), group));
    }
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": ignored,
        "kv_cache_scheme": null, "global_compression_ratio": null,
    });
    Ok(pretty(&config))
}

fn config_group(targets: Vec<&str>, bits: u32, group: usize) -> Value {
    let (strategy, size) = if group == 0 { ("channel", Value::Null) } else { ("group", json!(group)) };
    let weights = json!({
        "num_bits": bits, "type": "int", "symmetric": true, "strategy": strategy, "group_size": size,
        "dynamic": false, "actorder": null, "observer": "minmax", "observer_kwargs": {}, "block_structure": null,
    });
    json!({"targets": targets, "weights": weights, "input_activations": null, "output_activations": null})
}

type Tensor = (String, Dtype, Vec<u64>, Bytes);

/// Those of the blocks in the place of the model's own, sorted by name.
fn all_tensors(plan: &Plan<'_>, source: &safetensors::Model, blocks: &[Tensors]) -> Result<Vec<Tensor>> {
    let made = |layer: usize, home: &&Home| blocks.get(layer).is_some_and(|b| holds(b, &home.tensor));
    let homes = plan.homes.iter().enumerate().flat_map(|(l, homes)| homes.iter().filter(move |h| made(l, h)));
    let replaced: BTreeSet<&str> = homes.map(|h| h.tensor.as_str()).collect();
    let mut all: BTreeMap<String, Tensor> = BTreeMap::new();
    let gone = |name: &str| plan.sliced.as_ref().is_some_and(|s| s.gone.contains(name));
    for name in source.names().filter(|n| !replaced.contains(n) && !gone(n)) {
        let (entry, bytes) = source.require(name)?;
        all.insert(name.into(), (name.into(), entry.dtype, entry.shape.clone(), bytes));
    }
    for block in blocks {
        for e in block.entries().iter().filter(|e| !e.name.starts_with(BASIS)) {
            all.insert(e.name.clone(), (e.name.clone(), e.dtype, e.shape.clone(), block.bytes(e)?));
        }
    }
    Ok(all.into_values().collect())
}

/// One file, or several and their index.
fn weights(dir: &Path, tensors: &[Tensor], file: &mut WriteFile<'_>) -> Result<()> {
    let mut shards: Vec<Vec<&Tensor>> = vec![Vec::new()];
    let mut size = 0;
    for t in tensors {
        if size + t.3.len() as u64 > SHARD && size > 0 {
            shards.push(Vec::new());
            size = 0;
        }
        size += t.3.len() as u64;
        shards.last_mut().expect("there is always one").push(t);
    }
    let metadata = [("format", "pt")];
    let mut map = serde_json::Map::new();
    let count = shards.len();
    for (i, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let new: Vec<NewTensor<'_>> =
            shard.iter().map(|t| NewTensor { name: &t.0, dtype: t.1, shape: &t.2, data: &t.3 }).collect();
        let path = dir.join(&name);
        let size = safetensors::file_size(&new, &metadata).map_err(Error::io(&path))?;
        file(&path, size, &mut |out| safetensors::write(&new, &metadata, out))?;
        shard.iter().for_each(|t| drop(map.insert(t.0.clone(), json!(name))));
        shard.iter().for_each(|t| t.3.release());
    }
    if count > 1 {
        let total: u64 = tensors.iter().map(|t| t.3.len() as u64).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        put(file, &dir.join("model.safetensors.index.json"), &pretty(&index))?;
    }
    Ok(())
}

/// The model's GGUF file with the new tensors in it.
fn gguf(plan: &Plan<'_>, blocks: &[Tensors], lock: &Value, file: &mut WriteFile<'_>) -> Result<(u64, u64)> {
    let (model, output) = (&plan.request.model, &plan.request.output);
    let source = Gguf::open(model, LoadMode::Map)?;
    let mut new: BTreeMap<&str, Bytes> = BTreeMap::new();
    for block in blocks {
        for e in block.entries() {
            new.insert(&e.name, block.bytes(e)?);
        }
    }
    let mut writer = Writer::new();
    for (key, value) in source.metadata().iter() {
        writer.set(key, value.clone());
    }
    if let Some(narrowed) = &plan.narrowed {
        let arch = source.metadata().str("general.architecture")?;
        let key = format!("{arch}.{}", plan.names.inner);
        writer.set(&key, lacuna_core::format::gguf::Value::U32(narrowed.width as u32));
    }
    let shapes = shapes(plan, blocks);
    let bits: BTreeMap<&str, Option<u32>> = plan.all_homes().map(|(l, h)| (&h.tensor[..], plan.bits(l, h))).collect();
    let (mut data, mut before, mut after) = (Vec::new(), 0, 0);
    for t in source.tensors() {
        let old = source.bytes(&t)?;
        let coded = bits.get(t.name).copied().flatten().filter(|_| new.contains_key(t.name));
        let kind = coded.map_or(t.kind, |bits| TensorType::of(block_format(bits)));
        let dims = shapes.get(t.name).map_or(t.dims, |dims| &dims[..]);
        writer.tensor(t.name, kind, dims).map_err(Error::io(output))?;
        before += old.len() as u64;
        data.push(new.remove(t.name).unwrap_or(old));
        after += data.last().map_or(0, |d: &Bytes| d.len() as u64);
    }
    let size = writer.file_size().map_err(Error::io(output))?;
    file(output, size, &mut |out| writer.write(out, |i, _, out| out.write_all(&data[i])))?;
    put(file, &lock_beside(output), &pretty(lock))?;
    Ok((before, after))
}

/// The axes, fastest first, of tensors whose shape may be another than the model's.
fn shapes(plan: &Plan<'_>, blocks: &[Tensors]) -> BTreeMap<String, Vec<u64>> {
    let mut all = BTreeMap::new();
    if let Some(narrowed) = &plan.narrowed {
        for home in narrowed.homes.iter().flatten() {
            all.insert(home.tensor.clone(), vec![home.inputs as u64, home.outputs as u64]);
        }
        for entry in blocks.iter().flat_map(|b| b.entries()) {
            // Matrices lie there as plain bytes.
            all.entry(entry.name.clone()).or_insert_with(|| entry.shape.iter().rev().copied().collect());
        }
    }
    all
}
