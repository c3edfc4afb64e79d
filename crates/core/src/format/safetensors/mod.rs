//! safetensors: 8 bytes of header length, a JSON header, one buffer without holes.
//!
//! The rules are those of the format's README and reference implementation (huggingface/safetensors): header of at most
//! 100 MB that starts with `{`, unique names, byte ranges that are disjoint, start at 0, leave no hole and end with the
//! file, and a shape whose size is exactly the range. Values are not looked at.

mod dtype;
mod header;
mod shards;
mod write;

pub use dtype::Dtype;
pub use shards::{Model, shard_names};
pub use write::{NewTensor, file_size, write};

use crate::{
    bytes::Bytes,
    error::{Error, Result},
    size::{Size, cap},
};
use std::{collections::BTreeMap, ops::Range};

/// Remedy for a tensor whose type cannot be computed with.
const CONVERT: &str =
    "Convert the checkpoint to F32, F16 or BF16 (for example with `save_pretrained` after `.to(torch.bfloat16)`)";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Type of its numbers.
    pub dtype: Dtype,
    /// Its shape, slowest axis first (`[out, in]` for a linear weight).
    pub shape: Vec<u64>,
    /// Where its bytes are in the file.
    pub range: Range<usize>,
}

/// A checked safetensors file.
#[derive(Clone, Debug)]
pub struct Tensors {
    bytes: Bytes,
    /// Sorted by name.
    entries: Vec<Entry>,
    metadata: BTreeMap<String, String>,
}

impl Tensors {
    /// Checks `bytes`, the whole file.
    ///
    /// # Errors
    /// If any rule of the format is broken; the error names the tensor and the byte.
    pub fn parse(bytes: Bytes) -> Result<Self> {
        let header = header_range(&bytes)?;
        let buffer = header.end;
        let parsed = header::parse(&bytes[header.clone()]).map_err(|e| e.at_byte(header.start as u64))?;
        let mut entries = parsed.tensors;
        for e in &mut entries {
            e.range = check_entry(e, buffer, bytes.len()).map_err(|error| error.in_item(&e.name))?;
        }
        check_coverage(&entries, buffer..bytes.len())?;
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        if let Some(twice) = entries.array_windows().find(|[a, b]| a.name == b.name) {
            return Err(Error::malformed("two tensors of this name", "one").in_item(&twice[0].name));
        }
        Ok(Self { bytes, entries, metadata: parsed.metadata })
    }

    /// All tensors, sorted by name.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        let i = self.entries.binary_search_by(|e| e.name.as_str().cmp(name)).ok()?;
        Some(&self.entries[i])
    }

    /// The bytes of `entry`, which must be one of this file's.
    ///
    /// # Errors
    /// If it is another file's and does not fit here.
    pub fn bytes(&self, entry: &Entry) -> Result<Bytes> {
        let part = self.bytes.slice(entry.range.clone());
        part.ok_or_else(|| Error::malformed("a tensor of another file", "one of this file").in_item(&entry.name))
    }

    /// Says that the file is not read soon; see [`Bytes::release`].
    pub fn release(&self) {
        self.bytes.release();
    }

    /// The `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

impl Entry {
    /// The kernel format of this tensor.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming tensor and type, if it is not F32, F16 or BF16.
    pub fn format(&self) -> Result<lacuna_kernels::Format> {
        self.dtype.format().ok_or_else(|| {
            let what = format!("type {} as a weight", self.dtype.name());
            Error::unsupported(what, CONVERT).in_item(&self.name)
        })
    }

    /// Its shape as a matrix: `[rows, cols]`, with `[cols]` counting as one row.
    ///
    /// # Errors
    /// [`Error::Malformed`] if it has another number of axes.
    pub fn matrix_shape(&self) -> Result<(usize, usize)> {
        let (rows, cols) = match *self.shape.as_slice() {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            _ => return Err(Error::malformed(format!("shape {:?}", self.shape), "one or two axes").in_item(&self.name)),
        };
        Ok((Size(rows).index()?, Size(cols).index()?))
    }
}

/// The bytes of the JSON header.
fn header_range(bytes: &[u8]) -> Result<Range<usize>> {
    let short = |length: usize| Error::malformed(format!("the end of the file after {length} bytes"), "a header");
    let length = bytes.first_chunk::<8>().ok_or_else(|| short(bytes.len()).at_byte(bytes.len() as u64))?;
    let length = u64::from_le_bytes(*length);
    Error::check_limit("the length of the header", length, cap::HEADER).map_err(|e| e.at_byte(0))?;
    let end = Size(length).plus(Size(8))?.index()?;
    let header = bytes.get(8..end).ok_or_else(|| {
        let found = format!("the end of the file after {} bytes", bytes.len());
        Error::malformed(found, format!("a header that ends at byte {end}")).at_byte(bytes.len() as u64)
    })?;
    if header.first() != Some(&b'{') {
        return Err(Error::malformed("another character", "`{` as the first of the header").at_byte(8));
    }
    Ok(8..end)
}

/// The range in the file of a tensor with a range relative to the buffer, if it is inside and exactly as long as shape
/// and type ask for.
fn check_entry(info: &Entry, buffer: usize, file: usize) -> Result<Range<usize>> {
    let elements = Size::product(info.shape.iter().copied())?;
    Error::check_limit("the number of elements", elements.0, cap::ELEMENTS)?;
    let wanted = elements.times(Size(info.dtype.bits()))?.exactly_over(Size(8))?;
    let (start, end) = (Size::from(info.range.start), Size::from(info.range.end));
    let length = end.minus(start)?;
    let start = Size::from(buffer).plus(start)?;
    let end = Size::from(buffer).plus(end)?;
    if length != wanted {
        let expected = format!("{} for {} {:?}", wanted.0, info.dtype.name(), info.shape);
        return Err(Error::malformed(format!("{} bytes", length.0), expected).at_byte(start.0));
    }
    if end > Size::from(file) {
        let found = format!("the end of the file at byte {file}");
        return Err(Error::malformed(found, format!("data up to byte {}", end.0)).at_byte(start.0));
    }
    Ok(start.index()?..end.index()?)
}

/// Every byte of `buffer` belongs to exactly one tensor.
fn check_coverage(entries: &[Entry], buffer: Range<usize>) -> Result<()> {
    let mut order: Vec<&Entry> = entries.iter().collect();
    order.sort_unstable_by_key(|e| (e.range.start, e.range.end));
    let mut at = buffer.start;
    for e in order {
        if e.range.start != at {
            let found =
                if e.range.start < at { "data that overlaps the tensor before" } else { "a hole before the data" };
            let expected = format!("data that starts at byte {at}");
            return Err(Error::malformed(found, expected).in_item(&e.name).at_byte(e.range.start as u64));
        }
        at = e.range.end;
    }
    if at != buffer.end {
        let found = format!("{} bytes that belong to no tensor", buffer.end - at);
        return Err(Error::malformed(found, "the end of the file").at_byte(at as u64));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
