//! The named tensors of a model, whatever files they come from, and how parts of them become weights.

use super::packed::Codes;
use super::weights::Linear;
use crate::error::{Error, Result};
use lacuna_core::bytes::Bytes;
use lacuna_core::format::gguf::{TensorType, convert_tensor};
use lacuna_core::map::LoadMode;
use lacuna_core::weight::{Orientation, Weight};
use lacuna_kernels::convert::{decode_run, first_non_finite};
use lacuna_kernels::{Format, Pool};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Mutex;

/// A stored tensor.
#[derive(Clone, Debug)]
pub struct Stored {
    /// How its rows are stored once it is loaded.
    pub format: Format,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Its bytes, usually a part of a mapped file.
    pub bytes: Bytes,
    /// What `bytes` are where no kernel reads them: [`Source::load`] converts them to `format`.
    pub from: Option<Original>,
}

/// Stored forms that no kernel reads.
#[derive(Clone, Debug)]
pub enum Original {
    /// A type of GGUF files.
    Gguf(TensorType),
    /// Codes of a quantised Hugging Face checkpoint.
    Codes(Codes),
}

impl Original {
    /// What messages call it.
    pub fn name(&self) -> &'static str {
        match self {
            Original::Gguf(kind) => kind.name(),
            Original::Codes(codes) => codes.name(),
        }
    }
}

impl Stored {
    /// A tensor whose bytes are in `format` already.
    pub fn new(format: Format, shape: Vec<usize>, bytes: Bytes) -> Self {
        Self { format, shape, bytes, from: None }
    }

    /// Rows (all axes but the last) and columns.
    fn rows_cols(&self) -> (usize, usize) {
        let cols = self.shape.last().copied().unwrap_or(1);
        (self.shape.iter().rev().skip(1).product(), cols)
    }

    /// Bytes it takes once it is loaded.
    pub fn loaded_bytes(&self) -> u64 {
        let (rows, cols) = self.rows_cols();
        match (&self.from, self.format.run_bytes(cols)) {
            (Some(_), Some(run)) => (rows as u64).saturating_mul(run as u64),
            _ => self.bytes.len() as u64,
        }
    }

    /// Its bytes in memory of their own, in `format`. Nothing of a mapped original stays resident.
    ///
    /// # Errors
    /// A file that cannot be read any more, or became shorter.
    pub(super) fn in_memory(&self, file: &str, name: &str) -> Result<Bytes> {
        let bytes = self.bytes.in_memory().map_err(Error::io(file.as_ref()))?;
        self.bytes.release();
        let (rows, cols) = self.rows_cols();
        match &self.from {
            None => Ok(bytes),
            Some(Original::Gguf(kind)) => {
                let converted = convert_tensor(*kind, &bytes, rows, cols);
                let (_, bytes) = converted.map_err(|e| e.in_item(name).in_file(file))?;
                Ok(bytes.into())
            }
            Some(Original::Codes(codes)) => {
                let converted = codes.convert(&bytes, (rows, cols), self.format);
                let wrong = |problem| Error::Config { file: file.into(), key: name.into(), problem };
                Ok(converted.map_err(wrong)?.into())
            }
        }
    }
}

/// All tensors of a model.
#[derive(Debug, Default)]
pub struct Source {
    /// What error messages call it: a file, or the directory of shards.
    pub file: String,
    /// The tensors by name.
    pub tensors: BTreeMap<String, Stored>,
    /// Tensors of types that weights cannot have, with the name of the type.
    pub unusable: BTreeMap<String, &'static str>,
    used: RefCell<BTreeSet<String>>,
}

impl Source {
    /// A source named `file` of these tensors.
    pub fn new(file: String, tensors: BTreeMap<String, Stored>) -> Self {
        Self { file, tensors, ..Self::default() }
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor `name`, which must have this shape.
    fn get(&self, name: &str, shape: &[usize]) -> Result<&Stored> {
        let t = self.tensors.get(name).ok_or_else(|| self.absent(name))?;
        if t.shape != shape {
            let (expected, found) = (shape.to_vec(), t.shape.clone());
            return Err(Error::Shape { file: self.file.clone(), tensor: name.into(), expected, found });
        }
        self.used.borrow_mut().insert(name.into());
        Ok(t)
    }

    /// Brings the weights into the form that they are used in: reads them in read mode, and converts those of types
    /// that no kernel has. Mapped weights stay as they are, untouched.
    ///
    /// # Errors
    /// A file that cannot be read any more, or became shorter.
    pub fn load(&mut self, mode: LoadMode) -> Result<()> {
        let file = &self.file;
        let tensors = self.tensors.iter_mut().filter(|(_, t)| mode == LoadMode::Read || t.from.is_some());
        let work: Vec<_> = tensors.map(|(name, t)| (name.as_str(), Mutex::new((t, Ok(()))))).collect();
        let mut converted: BTreeMap<(&str, &str), (usize, u64)> = BTreeMap::new();
        let run = |i: usize| {
            let (name, slot) = &work[i];
            // Each slot is taken by one chunk, so the lock is never waited for.
            if let Ok(mut slot) = slot.lock() {
                let (t, result) = &mut *slot;
                *result = t.in_memory(file, name).map(|bytes| t.bytes = bytes);
            }
        };
        if work.iter().any(|(_, slot)| slot.lock().is_ok_and(|s| s.0.from.is_some())) {
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
            Pool::new(cores).run(work.len(), &|_, i| run(i));
        } else {
            (0..work.len()).for_each(run);
        }
        for (_, slot) in work {
            let Ok((t, result)) = slot.into_inner() else { continue };
            result?;
            if let Some(kind) = t.from.take() {
                let entry = converted.entry((kind.name(), t.format.name())).or_default();
                *entry = (entry.0 + 1, entry.1 + t.bytes.len() as u64);
            }
        }
        for ((from, to), (count, bytes)) in converted {
            tracing::info!(file, from, to, count, bytes, "tensors of a type without a kernel were converted");
        }
        Ok(())
    }

    fn absent(&self, name: &str) -> Error {
        let file = self.file.clone();
        match self.unusable.get(name) {
            None => Error::MissingTensor { file, tensor: name.into() },
            Some(kind) => {
                let remedy = "; convert the checkpoint to F32, F16 or BF16".into();
                Error::Unsupported { file, what: format!("tensor `{name}` of type {kind}"), remedy }
            }
        }
    }

    /// Tensors that nothing asked for.
    pub fn unused(&self) -> Vec<&str> {
        let used = self.used.borrow();
        self.tensors.keys().filter(|k| !used.contains(*k)).map(String::as_str).collect()
    }

    /// The matrix `name` of `rows` runs of `cols`: a view.
    ///
    /// # Errors
    /// No such tensor, or another shape.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Weight> {
        self.rows(name, rows, cols, 0..rows)
    }

    /// Some rows of the matrix `name[all, cols]`: a view.
    ///
    /// # Errors
    /// As [`Source::matrix`].
    pub fn rows(&self, name: &str, all: usize, cols: usize, rows: Range<usize>) -> Result<Weight> {
        let t = self.get(name, &[all, cols])?;
        self.part(name, t, cols, rows)
    }

    /// The matrices of the tensor `name[count, rows, cols]`: views.
    ///
    /// # Errors
    /// As [`Source::matrix`].
    pub fn stacked(&self, name: &str, count: usize, rows: usize, cols: usize) -> Result<Vec<Weight>> {
        let t = self.get(name, &[count, rows, cols])?;
        (0..count).map(|i| self.part(name, t, cols, i * rows..(i + 1) * rows)).collect()
    }

    /// A copy of the given rows of the matrix `name[all, cols]`, in the given order.
    ///
    /// # Errors
    /// As [`Source::matrix`].
    pub fn gathered(&self, name: &str, all: usize, cols: usize, rows: &[usize]) -> Result<Weight> {
        let whole = self.matrix(name, all, cols)?;
        let m = whole.matrix();
        let bytes: Vec<u8> = rows.iter().flat_map(|r| m.row(*r)).copied().collect();
        whole.bytes().release();
        self.weight(name, m.format(), rows.len(), cols, bytes.into())
    }

    /// A copy of some columns of the matrix `name[rows, all]`, which must be whole blocks of its format.
    ///
    /// # Errors
    /// As [`Source::matrix`].
    pub fn columns(&self, name: &str, rows: usize, all: usize, columns: Range<usize>) -> Result<Weight> {
        let whole = self.matrix(name, rows, all)?;
        let (m, block) = (whole.matrix(), whole.format().block_len());
        let bytes = |column: usize| column / block * whole.format().block_bytes();
        let cut = bytes(columns.start)..bytes(columns.end);
        let part = |r: usize| m.row(r).get(cut.clone()).unwrap_or_default();
        let copy: Vec<u8> = (0..rows).flat_map(part).copied().collect();
        let aligned = columns.start.is_multiple_of(block) && columns.end.is_multiple_of(block);
        whole.bytes().release();
        // Bytes that are not those of whole blocks are refused there.
        self.weight(name, m.format(), rows, columns.len(), if aligned { copy.into() } else { Vec::new().into() })
    }

    /// A transposed copy of some columns of `name[inputs, all]`: `W[outputs, inputs]`.
    ///
    /// # Errors
    /// As [`Source::matrix`], or a block format, whose columns cannot be taken apart.
    pub fn transposed(&self, name: &str, all: usize, inputs: usize, columns: Range<usize>) -> Result<Weight> {
        let t = self.get(name, &[inputs, all])?;
        if t.format.block_len() != 1 {
            let what = format!("tensor `{name}` of type {} in `[inputs, outputs]` order", t.format.name());
            return Err(Error::Unsupported { file: self.file.clone(), what, remedy: "; use a GGUF file".into() });
        }
        let size = t.format.block_bytes();
        let mut bytes = Vec::with_capacity(columns.len() * inputs * size);
        for column in columns.clone() {
            for input in 0..inputs {
                bytes.extend_from_slice(&t.bytes[(input * all + column) * size..][..size]);
            }
        }
        t.bytes.release();
        self.weight(name, t.format, columns.len(), inputs, bytes.into())
    }

    /// The vector `name` of `n` numbers, decoded.
    ///
    /// # Errors
    /// As [`Source::matrix`].
    pub fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let t = self.get(name, &[n])?;
        let weight = self.part(name, t, n, 0..1)?;
        let mut out = vec![0.0; n];
        decode_run(t.format, weight.bytes(), &mut out);
        Ok(out)
    }

    fn part(&self, name: &str, t: &Stored, cols: usize, rows: Range<usize>) -> Result<Weight> {
        let run = t.format.run_bytes(cols).unwrap_or(0);
        let bytes = t.bytes.slice(rows.start.saturating_mul(run)..rows.end.saturating_mul(run));
        self.weight(name, t.format, rows.len(), cols, bytes.unwrap_or_else(|| Vec::new().into()))
    }

    /// The last check: the bytes are exactly those of the shape in this format.
    fn weight(&self, name: &str, format: Format, rows: usize, cols: usize, bytes: Bytes) -> Result<Weight> {
        let held = bytes.len();
        Weight::new(format, Orientation::OutputMajor, rows, cols, bytes).ok_or_else(|| Error::Unsupported {
            file: self.file.clone(),
            what: format!("tensor `{name}`: {rows} rows of {cols} numbers as {} in {held} bytes", format.name()),
            remedy: "; rows must be whole blocks: convert the file again".into(),
        })
    }

    /// Looks at every number for NaN and infinity, without decoding (block formats: at the scales, since their codes
    /// are always finite).
    ///
    /// # Errors
    /// [`Error::NotFinite`] with the first one.
    pub fn check_finite(&self) -> Result<()> {
        for (name, t) in &self.tensors {
            let Some(index) = first_non_finite(t.format, &t.bytes) else { continue };
            let (block, size) = (t.format.block_len(), t.format.block_bytes());
            let mut numbers = vec![0.0; block];
            decode_run(t.format, &t.bytes[index / block * size..][..size], &mut numbers);
            let value = numbers.into_iter().find(|v| !v.is_finite()).unwrap_or(f32::NAN);
            return Err(Error::NotFinite { file: self.file.clone(), tensor: name.clone(), index, value });
        }
        Ok(())
    }
}

/// A linear layer without a bias.
pub fn plain(weight: Weight) -> Linear {
    Linear { weight, bias: None }
}
