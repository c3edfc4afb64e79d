//! Writing GGUF version 3.

use super::{ALIGNMENT, MAGIC, TensorType, Value, value::put_string};
use std::{
    collections::BTreeSet,
    io::{self, Write},
};

/// What a file will hold; the data of the tensors is asked for one by one while writing, so it need never be in memory
/// together.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, Value)>,
    tensors: Vec<NewTensor>,
}

#[derive(Clone, Debug)]
struct NewTensor {
    name: String,
    kind: TensorType,
    dims: Vec<u64>,
    bytes: u64,
}

fn refuse(item: &str, why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("`{item}`: {why}"))
}

impl Writer {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata pair; the last one of a key counts.
    pub fn set(&mut self, key: &str, value: Value) -> &mut Self {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.to_owned(), value));
        self
    }

    /// Adds a tensor with these axes, **fastest first**. Returns the bytes its data must have.
    ///
    /// # Errors
    /// `InvalidInput` if name or shape are not possible.
    pub fn tensor(&mut self, name: &str, kind: TensorType, dims: &[u64]) -> io::Result<u64> {
        if name.is_empty() || dims.is_empty() || dims.len() > super::MAX_AXES || dims.contains(&0) {
            return Err(refuse(name, "a tensor needs a name and 1 to 4 axes above 0"));
        }
        let bytes = kind.size(dims).map_err(|e| refuse(name, e))?.0;
        self.tensors.push(NewTensor { name: name.to_owned(), kind, dims: dims.to_vec(), bytes });
        Ok(bytes)
    }

    /// Exact number of bytes that [`Writer::write`] will write.
    ///
    /// # Errors
    /// As there.
    pub fn file_size(&self) -> io::Result<u64> {
        let data: u64 = self.tensors.iter().map(|t| t.bytes.next_multiple_of(ALIGNMENT)).sum();
        Ok(self.header()?.len() as u64 + data)
    }

    /// Writes the file; use it inside [`write_atomically`](crate::atomic::write_atomically). `data` is called with the
    /// index and the name of each tensor, in the order they were added, and writes its bytes.
    ///
    /// # Errors
    /// Those of `out` and `data`; `InvalidInput` if a name occurs twice or `data` writes another number of bytes.
    pub fn write(
        &self,
        out: &mut dyn Write,
        mut data: impl FnMut(usize, &str, &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        out.write_all(&self.header()?)?;
        for (i, t) in self.tensors.iter().enumerate() {
            let mut counted = Counted { out, left: t.bytes };
            data(i, &t.name, &mut counted)?;
            if counted.left != 0 {
                return Err(refuse(&t.name, format!("{} of its {} bytes were not written", counted.left, t.bytes)));
            }
            let padding = t.bytes.next_multiple_of(ALIGNMENT) - t.bytes;
            out.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
        }
        Ok(())
    }

    /// Everything before the data, padded.
    fn header(&self) -> io::Result<Vec<u8>> {
        let mut names = BTreeSet::new();
        if let Some(t) = self.tensors.iter().find(|t| !names.insert(&t.name)) {
            return Err(refuse(&t.name, "the name is taken"));
        }
        let mut out = MAGIC.to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(key, &mut out);
            value.put(&mut out);
        }
        let mut offset = 0_u64;
        for t in &self.tensors {
            put_string(&t.name, &mut out);
            out.extend((t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.kind.id().to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += t.bytes.next_multiple_of(ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        Ok(out)
    }
}

/// Refuses more bytes than were announced.
struct Counted<'a> {
    out: &'a mut dyn Write,
    left: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            return Err(refuse("data", "more bytes than the shape has"));
        }
        let n = self.out.write(bytes)?;
        self.left -= n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
