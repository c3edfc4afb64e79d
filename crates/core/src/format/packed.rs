//! Lacuna's own container: weights in layouts that no other format has, beside the files that other programs read.
//!
//! The file is a safetensors file whose tensors are pieces of bytes (U8), each in a layout of the kernels that says by itself
//! what it holds. Its metadata are `format`: `lacuna-packed`, `version`: `1`, `model`: the hash of the weights it lies
//! beside, and `crc32c`: a JSON object with the checksum (CRC-32C, eight hex digits) of every piece. It is mapped; a piece is
//! checked in full when it is taken.

use super::safetensors::{self, Dtype, NewTensor, Tensors};
use crate::{
    bytes::Bytes,
    error::{Error, Result},
    hash::crc32c,
    map::{self, LoadMode},
};
use serde_json::{Map, Value};
use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Name of the file in a model's directory.
pub const NAME: &str = "model.lacuna";

const FORMAT: &str = "lacuna-packed";
const VERSION: &str = "1";
const REMEDY: &str = "Compress the model again, or remove the file: the weights beside it are complete";

/// An open container.
#[derive(Clone, Debug)]
pub struct PackedFile {
    path: PathBuf,
    tensors: Tensors,
    model: String,
    sums: Map<String, Value>,
}

impl PackedFile {
    /// Opens and checks the header of `path`; pieces are not looked at.
    ///
    /// # Errors
    /// A file that is none, of another version, or without a checksum for each of its pieces.
    pub fn open(path: &Path) -> Result<Self> {
        let parse = || -> Result<Self> {
            let tensors = Tensors::parse(map::open(path, LoadMode::Map)?)?;
            let metadata = tensors.metadata();
            let text = |key: &str| metadata.get(key).map(String::as_str).unwrap_or_default();
            let bad = |found: String, expected: &str| Error::Malformed {
                at: Box::default(),
                found,
                expected: expected.into(),
                remedy: REMEDY,
            };
            if text("format") != FORMAT {
                return Err(bad(format!("the format `{}`", text("format")), FORMAT));
            }
            if text("version") != VERSION {
                return Err(Error::unsupported(format!("version `{}` of this format", text("version")), REMEDY));
            }
            let sums: Map<String, Value> =
                serde_json::from_str(text("crc32c")).map_err(|e| bad(e.to_string(), "an object of checksums"))?;
            for e in tensors.entries() {
                if e.dtype != Dtype::U8 || e.shape.len() != 1 || !sums.contains_key(&e.name) {
                    return Err(
                        bad(format!("{} {:?}", e.dtype.name(), e.shape), "bytes with a checksum").in_item(&e.name)
                    );
                }
            }
            if sums.len() != tensors.entries().len() {
                let (found, expected) = (tensors.entries().len(), sums.len());
                return Err(bad(format!("{found} pieces"), &format!("{expected}, one for each checksum")));
            }
            let model = text("model").to_owned();
            Ok(Self { path: path.to_owned(), model, sums, tensors })
        };
        parse().map_err(|e| e.in_file(path))
    }

    /// Hash of the weights that it lies beside.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Names of all pieces, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.entries().iter().map(|e| e.name.as_str())
    }

    /// Bytes of all pieces.
    pub fn bytes(&self) -> u64 {
        self.tensors.entries().iter().map(|e| e.range.len() as u64).sum()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The piece `name`, after a look at all of its bytes.
    ///
    /// # Errors
    /// No such piece, or bytes that are not those that were written.
    pub fn get(&self, name: &str) -> Result<Bytes> {
        let at = |e: Error| e.in_item(name).in_file(&self.path);
        let entry = self.tensors.get(name).ok_or_else(|| at(Error::missing("this piece", REMEDY)))?;
        let bytes = self.tensors.bytes(entry).map_err(at)?;
        let (found, expected) = (sum(&bytes), self.sums.get(name).and_then(Value::as_str).unwrap_or_default());
        if found == expected {
            return Ok(bytes);
        }
        let (found, expected) = (format!("bytes with the checksum {found}"), expected.to_owned());
        Err(at(Error::Malformed { at: Box::default(), found, expected, remedy: REMEDY }))
    }
}

fn sum(bytes: &[u8]) -> String {
    format!("{:08x}", crc32c(bytes))
}

/// A container that is to be written.
pub struct Packing<'a> {
    pieces: Vec<(&'a str, [u64; 1], &'a [u8])>,
    model: &'a str,
    sums: String,
}

impl<'a> Packing<'a> {
    /// Pieces, by name, to lie beside the weights of this hash.
    pub fn new(pieces: impl IntoIterator<Item = (&'a str, &'a [u8])>, model: &'a str) -> Self {
        let pieces: Vec<_> = pieces.into_iter().map(|(name, data)| (name, [data.len() as u64], data)).collect();
        let sums: Map<String, Value> = pieces.iter().map(|p| (p.0.to_owned(), sum(p.2).into())).collect();
        Self { pieces, model, sums: Value::Object(sums).to_string() }
    }

    fn parts(&self) -> (Vec<NewTensor<'_>>, [(&str, &str); 4]) {
        let new = self.pieces.iter().map(|(name, shape, data)| NewTensor { name, dtype: Dtype::U8, shape, data });
        let metadata = [("format", FORMAT), ("version", VERSION), ("model", self.model), ("crc32c", &self.sums)];
        (new.collect(), metadata)
    }

    /// Exact number of bytes that [`Packing::write`] will write.
    ///
    /// # Errors
    /// As there.
    pub fn file_size(&self) -> io::Result<u64> {
        let (new, metadata) = self.parts();
        safetensors::file_size(&new, &metadata)
    }

    /// Writes the file; use it inside [`write_atomically`](crate::atomic::write_atomically).
    ///
    /// # Errors
    /// Those of `out`; `InvalidInput` if a name occurs twice.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let (new, metadata) = self.parts();
        safetensors::write(&new, &metadata, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_is_written_is_read_and_damage_is_told_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let (a, b) = (vec![7_u8; 1000], (0..=255).collect::<Vec<u8>>());
        let packing = Packing::new([("layers.0.attn.q", &a[..]), ("layers.1.mlp.down", &b[..])], "abc");
        let mut bytes = Vec::new();
        packing.write(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, packing.file_size().unwrap());
        fs::write(&path, &bytes).unwrap();
        let file = PackedFile::open(&path).unwrap();
        assert_eq!((file.model(), file.bytes(), file.names().count()), ("abc", 1256, 2));
        assert_eq!(
            (&*file.get("layers.0.attn.q").unwrap(), &*file.get("layers.1.mlp.down").unwrap()),
            (&a[..], &b[..])
        );
        assert!(file.get("layers.2.mlp.down").unwrap_err().to_string().contains("layers.2.mlp.down"));
        drop(file);
        let open = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            PackedFile::open(&path)
        };
        // Every byte of the data, one bit of it.
        let data = bytes.len() - 1256;
        for at in (data..bytes.len()).step_by(97) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            let file = open(&flipped).unwrap();
            let wrong: Vec<String> = file.names().filter_map(|n| Some(file.get(n).err()?.to_string())).collect();
            assert_eq!(wrong.len(), 1);
            let name = if at - data < 1000 { "layers.0.attn.q" } else { "layers.1.mlp.down" };
            assert!(wrong[0].contains(name) && wrong[0].contains(NAME) && wrong[0].contains("checksum"), "{wrong:?}");
        }
        for cut in (0..bytes.len()).step_by(61) {
            assert!(open(&bytes[..cut]).unwrap_err().to_string().contains(NAME), "{cut}");
        }
        let header = String::from_utf8(bytes[8..data].to_vec()).unwrap();
        let other = |from: &str, to: &str| {
            assert!(header.contains(from));
            let mut all = bytes[..8].to_vec();
            all.extend(header.replacen(from, to, 1).bytes());
            all.extend(&bytes[data..]);
            open(&all).unwrap_err().to_string()
        };
        assert!(other("\"version\":\"1\"", "\"version\":\"2\"").contains("version `2`"));
        assert!(other("lacuna-packed", "lacuna-pickle").contains("lacuna-pickle"));
        assert!(other("U8", "I8").contains("I8"));
    }
}
