//! GGUF: magic, counts, typed metadata, tensor table, aligned data (ggml, `docs/gguf.md`); versions 2 and 3.
//!
//! Stricter than most readers where a well-formed file cannot differ: tensors lie one after the other with nothing but
//! padding between them, names and keys are unique, and after the last tensor comes nothing but padding.

mod convert;
mod cursor;
mod decode;
mod types;
mod value;
mod write;

pub use convert::{convert_rows, convert_tensor, nearest};
pub use decode::decode_run;
pub use types::TensorType;
pub use value::{Array, Metadata, Value, ValueType};
pub use write::Writer;

use crate::{
    bytes::Bytes,
    error::{Error, Printable, Result},
    hash::{HashedTensor, model_hash},
    map::{LoadMode, open},
    size::{Size, cap},
};
use cursor::Cursor;
use std::{ops::Range, path::Path};

/// First bytes of every file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Magic of PowerInfer's files, which are GGUF otherwise: models with ReLU and predictors of their active neurons.
pub const POWERINFER_MAGIC: [u8; 4] = *b"PWRI";
/// Alignment where `general.alignment` is absent.
pub const ALIGNMENT: u64 = 32;
const MAX_AXES: usize = cap::AXES as usize;
/// Bytes of the smallest table entry: name of one byte, one axis, type, offset.
const SMALLEST_ENTRY: usize = 8 + 1 + 4 + 8 + 4 + 8;

/// A checked GGUF file.
#[derive(Clone, Debug)]
pub struct Gguf {
    bytes: Bytes,
    powerinfer: bool,
    version: u32,
    metadata: Metadata,
    /// In the order of the file.
    tensors: Vec<Slot>,
    /// Indices of `tensors`, sorted by name.
    by_name: Vec<u32>,
    /// Bytes of the header: magic, metadata and tensor table.
    header: usize,
}

/// A tensor as stored here: ranges instead of copies, since a hostile file may name a million of them.
#[derive(Clone, Debug)]
struct Slot {
    name: Range<usize>,
    dims: [u64; MAX_AXES],
    axes: u8,
    kind: TensorType,
    data: Range<usize>,
}

/// One tensor of a file.
#[derive(Clone, Copy, Debug)]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// How its numbers are stored.
    pub kind: TensorType,
    /// Its axes, **fastest first**: a linear weight `[out, in]` has `dims = [in, out]`.
    pub dims: &'a [u64],
    /// Byte of the file where its data begins.
    pub offset: u64,
    /// Bytes of its data.
    pub bytes: u64,
}

impl TensorInfo<'_> {
    /// Rows (product of all axes but the fastest) and columns (the fastest axis).
    pub fn rows_cols(&self) -> (usize, usize) {
        // Checked when the file was parsed: the product of all axes is at most 2^40, and each is at least 1.
        (self.dims[1..].iter().product::<u64>() as usize, self.dims[0] as usize)
    }
}

impl Gguf {
    /// Opens and checks the file at `path`.
    ///
    /// # Errors
    /// As [`Gguf::parse`], and those of [`open`]; the file is named.
    pub fn open(path: impl AsRef<Path>, mode: LoadMode) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(open(path, mode)?).map_err(|e| e.in_file(path))
    }

    /// Checks `bytes`, the whole file.
    ///
    /// # Errors
    /// If any rule of the format is broken; the error names the key or tensor and the byte.
    pub fn parse(bytes: Bytes) -> Result<Self> {
        let mut c = Cursor::new(&bytes);
        let (powerinfer, version) = parse_version(&mut c)?;
        let tensor_count = c.count("the number of tensors", cap::TENSORS, SMALLEST_ENTRY)?;
        let key_count = c.count("the number of metadata keys", cap::KEYS, value::SMALLEST_PAIR)?;
        let metadata = Metadata::parse(&mut c, key_count, &bytes)?;
        let alignment = alignment(&metadata)?;
        let mut tensors = Vec::with_capacity(tensor_count);
        for _ in 0..tensor_count {
            tensors.push(parse_slot(&mut c)?);
        }
        let header = c.position();
        let by_name = index_names(&bytes, &tensors)?;
        place_data(&bytes, &mut tensors, header, alignment)?;
        Ok(Self { bytes, powerinfer, version, metadata, tensors, by_name, header })
    }

    /// Version of the container, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Whether it is PowerInfer's ([`POWERINFER_MAGIC`]).
    pub fn is_powerinfer(&self) -> bool {
        self.powerinfer
    }

    /// The key-value pairs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|slot| self.view(slot))
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<TensorInfo<'_>> {
        let find = |i: &u32| self.bytes[self.tensors[*i as usize].name.clone()].cmp(name.as_bytes());
        let i = self.by_name.binary_search_by(find).ok()?;
        Some(self.view(&self.tensors[self.by_name[i] as usize]))
    }

    /// As [`Gguf::get`].
    ///
    /// # Errors
    /// [`Error::Missing`] with the name.
    pub fn require(&self, name: &str) -> Result<TensorInfo<'_>> {
        let remedy = "The file does not fit its architecture: convert the model again";
        self.get(name).ok_or_else(|| Error::missing("this tensor", remedy).in_item(name))
    }

    /// The bytes of `tensor`, shared with the file.
    ///
    /// # Errors
    /// If it is another file's and does not fit here.
    pub fn bytes(&self, tensor: &TensorInfo<'_>) -> Result<Bytes> {
        let end = Size(tensor.offset).plus(Size(tensor.bytes))?.index()?;
        let part = self.bytes.slice(Size(tensor.offset).index()?..end);
        part.ok_or_else(|| Error::malformed("a tensor of another file", "one of this file").in_item(tensor.name))
    }

    /// See [`model_hash`]; the configuration is the whole header with metadata and tokenizer.
    pub fn hash(&self) -> String {
        let tensors = self.tensors.iter().map(|slot| {
            let t = self.view(slot);
            HashedTensor { name: t.name, kind: t.kind.name(), shape: t.dims, data: &self.bytes[slot.data.clone()] }
        });
        let hash = model_hash(&self.bytes[..self.header], tensors.collect());
        // The pieces lie everywhere, and the system maps whole neighbourhoods of what is touched.
        self.bytes.release();
        hash
    }

    fn view<'a>(&'a self, slot: &'a Slot) -> TensorInfo<'a> {
        TensorInfo {
            // Checked when the name was read; an empty name cannot be.
            name: str::from_utf8(&self.bytes[slot.name.clone()]).unwrap_or_default(),
            kind: slot.kind,
            dims: &slot.dims[..usize::from(slot.axes)],
            offset: slot.data.start as u64,
            bytes: slot.data.len() as u64,
        }
    }
}

/// Whether the file is PowerInfer's, and its version.
fn parse_version(c: &mut Cursor<'_>) -> Result<(bool, u32)> {
    let magic = c.take(4)?;
    let powerinfer = magic == POWERINFER_MAGIC;
    if magic != MAGIC && !powerinfer {
        let found = format!("{:?}", String::from_utf8_lossy(magic));
        return Err(Error::Malformed {
            at: Box::default(),
            found,
            expected: "`GGUF`".to_owned(),
            remedy: "This is no GGUF file (an interrupted download or an error page looks like this)",
        }
        .at_byte(0));
    }
    match c.u32()? {
        version @ (2 | 3) => Ok((powerinfer, version)),
        version if version.swap_bytes() <= 3 => {
            Err(Error::unsupported("a big-endian GGUF file", "Convert the model again with little-endian output")
                .at_byte(4))
        }
        version => {
            let what = format!("GGUF version {version}");
            Err(Error::unsupported(what, "Convert the model again with a current converter (version 3)").at_byte(4))
        }
    }
}

fn alignment(metadata: &Metadata) -> Result<u64> {
    const KEY: &str = "general.alignment";
    let found = metadata.maybe(KEY, |m, k| m.int(k, 8..=cap::ALIGNMENT as i64))?.unwrap_or(ALIGNMENT as i64) as u64;
    if found.is_power_of_two() { Ok(found) } else { Err(metadata.wrong(KEY, "a power of two")) }
}

/// One entry of the tensor table; `data` holds offset and size, still relative to the data section.
fn parse_slot(c: &mut Cursor<'_>) -> Result<Slot> {
    let start = c.position() as u64;
    let name = c.string("the length of a tensor name", 65_535)?;
    let name_range = c.position() - name.len()..c.position();
    let rest = |c: &mut Cursor<'_>| {
        if name.is_empty() {
            return Err(Error::malformed("an empty tensor name", "a name"));
        }
        let axes = c.u32()?;
        if axes == 0 || u64::from(axes) > cap::AXES {
            return Err(Error::malformed(format!("{axes} axes"), format!("1 to {}", cap::AXES)));
        }
        let mut dims = [1; MAX_AXES];
        for d in &mut dims[..axes as usize] {
            *d = c.u64()?;
            if *d == 0 {
                return Err(Error::malformed("an axis of length 0", "at least 1"));
            }
        }
        let kind = TensorType::parse(c.u32()?)?;
        let size = kind.size(&dims)?.index()?;
        let offset = Size(c.u64()?).index()?;
        let end = Size::from(offset).plus(Size::from(size))?.index()?;
        Ok(Slot { name: name_range.clone(), dims, axes: axes as u8, kind, data: offset..end })
    };
    rest(c).map_err(|e| e.in_item(name).at_byte(start))
}

fn index_names(bytes: &[u8], tensors: &[Slot]) -> Result<Vec<u32>> {
    let name = |i: u32| &bytes[tensors[i as usize].name.clone()];
    let mut order: Vec<u32> = (0..tensors.len() as u32).collect();
    order.sort_unstable_by(|a, b| name(*a).cmp(name(*b)));
    match order.array_windows().find(|[a, b]| name(*a) == name(*b)) {
        None => Ok(order),
        Some([_, b]) => {
            let slot = &tensors[*b as usize];
            let twice = String::from_utf8_lossy(&bytes[slot.name.clone()]);
            Err(Error::malformed("two tensors of this name", "one").in_item(&twice).at_byte(slot.name.start as u64))
        }
    }
}

/// Turns the relative ranges into ranges of the file and checks that they fill the data section without overlap.
fn place_data(bytes: &[u8], tensors: &mut [Slot], header: usize, alignment: u64) -> Result<()> {
    let start = Size::from(header).aligned(Size(alignment))?.index()?;
    let mut order: Vec<u32> = (0..tensors.len() as u32).collect();
    order.sort_unstable_by_key(|i| (tensors[*i as usize].data.start, *i));
    let mut at = Size::from(start);
    for i in order {
        let slot = &mut tensors[i as usize];
        let offset = Size::from(start).plus(Size::from(slot.data.start))?;
        let end = Size::from(start).plus(Size::from(slot.data.end))?;
        let named = |e: Error| e.in_item(&String::from_utf8_lossy(&bytes[slot.name.clone()])).at_byte(offset.0);
        if offset != at {
            let found = if offset < at { "data that overlaps the tensor before" } else { "a hole before the data" };
            return Err(named(Error::malformed(found, format!("data that starts at byte {}", at.0))));
        }
        if end > Size::from(bytes.len()) {
            let found = format!("the end of the file at byte {}", bytes.len());
            return Err(named(Error::malformed(found, format!("{} data up to byte {}", slot.kind.name(), end.0))));
        }
        slot.data = offset.index()?..end.index()?;
        at = end.aligned(Size(alignment))?;
    }
    // The last tensor may or may not be padded; a file without tensors may end with its header.
    if Size::from(bytes.len()) > at {
        let found = format!("{} bytes that belong to no tensor", bytes.len() as u64 - at.0);
        return Err(Error::malformed(found, "the end of the file").at_byte(at.0));
    }
    Ok(())
}

/// For messages about a value of the file.
fn shown(text: &str) -> String {
    format!("`{}`", Printable(text))
}

#[cfg(test)]
mod tests;
