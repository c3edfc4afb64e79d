//! Writing safetensors.

use super::Dtype;
use std::io::{self, Write};

/// A tensor to be written.
#[derive(Clone, Copy, Debug)]
pub struct NewTensor<'a> {
    /// Its name, unique in the file.
    pub name: &'a str,
    /// Type of its numbers.
    pub dtype: Dtype,
    /// Its shape, slowest axis first.
    pub shape: &'a [u64],
    /// Its bytes.
    pub data: &'a [u8],
}

/// Writes a whole file; use it inside [`write_atomically`](crate::atomic::write_atomically). Tensors lie in the given
/// order, the data begins at a multiple of 8 bytes, and equal input gives equal bytes.
///
/// # Errors
/// Those of `out`; `InvalidInput` if a name occurs twice, the header gets too long, or data and shape do not fit.
pub fn write(tensors: &[NewTensor<'_>], metadata: &[(&str, &str)], out: &mut dyn Write) -> io::Result<()> {
    let header = header(tensors, metadata)?;
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    tensors.iter().try_for_each(|t| out.write_all(t.data))
}

/// Exact number of bytes that [`write()`] will write.
///
/// # Errors
/// As [`write()`].
pub fn file_size(tensors: &[NewTensor<'_>], metadata: &[(&str, &str)]) -> io::Result<u64> {
    let data: u64 = tensors.iter().map(|t| t.data.len() as u64).sum();
    Ok(8 + header(tensors, metadata)?.len() as u64 + data)
}

fn header(tensors: &[NewTensor<'_>], metadata: &[(&str, &str)]) -> io::Result<String> {
    let refuse = |name: &str, why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("tensor `{name}`: {why}"));
    let mut map = serde_json::Map::new();
    if !metadata.is_empty() {
        let text = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).into()));
        map.insert("__metadata__".to_owned(), serde_json::Value::Object(text.collect()));
    }
    let mut start = 0;
    for t in tensors {
        let bits = t.shape.iter().try_fold(t.dtype.bits(), |n, axis| n.checked_mul(*axis));
        if bits != Some(8 * t.data.len() as u64) {
            return Err(refuse(t.name, "its bytes do not fit its shape"));
        }
        let end = start + t.data.len() as u64;
        let info = serde_json::json!({"dtype": t.dtype.name(), "shape": t.shape, "data_offsets": [start, end]});
        if map.insert(t.name.to_owned(), info).is_some() {
            return Err(refuse(t.name, "the name is taken"));
        }
        start = end;
    }
    let mut header = serde_json::Value::Object(map).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    Ok(header)
}
