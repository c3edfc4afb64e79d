//! A checkpoint of one or several safetensors files: `model.safetensors`, or the shards that
//! `model.safetensors.index.json` lists, or else the only such file of the folder.

use super::{Entry, Tensors};
use crate::{
    bytes::Bytes,
    error::{Error, Result},
    format::config::Config,
    hash::{HashedTensor, model_hash},
    map::{LoadMode, open, read_small},
    size::cap,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const INCOMPLETE: &str = "The download is incomplete: fetch the missing file, or the whole model, again";

/// The name of the only safetensors file of `dir`, if there is one and it is no shard of several.
fn only(dir: &Path) -> Option<String> {
    let names = std::fs::read_dir(dir).ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok());
    let mut names = names.filter(|n| n.ends_with(".safetensors"));
    let name = names.next().filter(|n| !n.contains("-of-") && !n.starts_with("adapter"))?;
    names.next().is_none().then_some(name)
}

/// All tensors of a checkpoint, whatever files they are in.
#[derive(Clone, Debug)]
pub struct Model {
    files: Vec<Tensors>,
    /// Name to index in `files`.
    homes: BTreeMap<String, usize>,
}

impl Model {
    /// The checkpoint in the folder `dir`.
    ///
    /// # Errors
    /// If it has neither file, if a shard or a tensor of the index is missing, or if a file is damaged.
    pub fn open(dir: impl AsRef<Path>, mode: LoadMode) -> Result<Self> {
        let dir = dir.as_ref();
        let load = |name: &str| {
            let path = dir.join(name);
            Tensors::parse(open(&path, mode)?).map_err(|e| e.in_file(&path))
        };
        let index = dir.join(INDEX);
        if !index.exists() {
            if dir.join(SINGLE).exists() {
                return Self::from_files(vec![load(SINGLE)?]).map_err(|e| e.in_file(dir));
            }
            let Some(name) = only(dir) else {
                let what = format!("`{SINGLE}` or `{INDEX}`");
                let remedy = "Give a folder with safetensors weights (PyTorch `.bin` files must be converted first)";
                return Err(Error::missing(what, remedy).in_file(dir));
            };
            return Self::from_files(vec![load(&name)?]).map_err(|e| e.in_file(dir));
        }
        let map = read_small(&index, cap::HEADER).and_then(|json| shard_names(&json)).map_err(|e| e.in_file(&index))?;
        let mut files = Vec::new();
        for shard in map.values().collect::<BTreeSet<_>>() {
            if !dir.join(shard).exists() {
                return Err(Error::missing(format!("shard `{shard}`"), INCOMPLETE).in_file(dir));
            }
            let file = load(shard)?;
            let absent = map.iter().find(|(name, home)| *home == shard && file.get(name).is_none());
            if let Some((name, _)) = absent {
                let remedy = "Index and shards do not belong together: fetch the model again";
                return Err(Error::missing("this tensor of the index", remedy).in_item(name).in_file(dir.join(shard)));
            }
            files.push(file);
        }
        Self::from_files(files).map_err(|e| e.in_file(dir))
    }

    /// A checkpoint of files that are open already.
    ///
    /// # Errors
    /// If a tensor is in two of them.
    pub fn from_files(files: Vec<Tensors>) -> Result<Self> {
        let mut homes = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for e in file.entries() {
                if homes.insert(e.name.clone(), i).is_some() {
                    return Err(Error::malformed("this tensor in two shards", "one").in_item(&e.name));
                }
            }
        }
        Ok(Self { files, homes })
    }

    /// The tensor called `name`, and its bytes.
    pub fn get(&self, name: &str) -> Option<(&Entry, Bytes)> {
        let file = &self.files[*self.homes.get(name)?];
        let entry = file.get(name)?;
        Some((entry, file.bytes(entry).ok()?))
    }

    /// As [`Model::get`].
    ///
    /// # Errors
    /// [`Error::Missing`] with the name.
    pub fn require(&self, name: &str) -> Result<(&Entry, Bytes)> {
        self.get(name)
            .ok_or_else(|| Error::missing("this tensor", "The checkpoint does not fit its config.json").in_item(name))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.homes.keys().map(String::as_str)
    }

    /// The files.
    pub fn files(&self) -> &[Tensors] {
        &self.files
    }

    /// See [`model_hash`]; `config` is the content of `config.json`.
    pub fn hash(&self, config: &[u8]) -> String {
        let all = self.files.iter().flat_map(|f| f.entries().iter().map(move |e| (f, e)));
        let tensors = all.map(|(f, e)| HashedTensor {
            name: &e.name,
            kind: e.dtype.name(),
            shape: &e.shape,
            data: &f.bytes[e.range.clone()],
        });
        let hash = model_hash(config, tensors.collect());
        // The pieces lie everywhere, and the system maps whole neighbourhoods of what is touched.
        self.files.iter().for_each(Tensors::release);
        hash
    }
}

/// The `weight_map` of an index: tensor to shard.
///
/// # Errors
/// If it is no index, or a shard is not a plain file name: names with a folder could reach outside the model.
pub fn shard_names(json: &[u8]) -> Result<BTreeMap<String, String>> {
    let index = Config::parse_within(json, cap::HEADER)?;
    let map = index.section("weight_map")?;
    let mut names = BTreeMap::new();
    for tensor in map.keys() {
        let shard = map.entry_str(tensor)?;
        let plain = shard.len() <= 255
            && shard.ends_with(".safetensors")
            && !shard.starts_with('.')
            && shard.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !plain {
            let found = format!("shard `{}`", crate::error::Printable(shard));
            return Err(Error::malformed(found, "a plain file name that ends in .safetensors").in_item(tensor));
        }
        names.insert(tensor.to_owned(), shard.to_owned());
    }
    Ok(names)
}
