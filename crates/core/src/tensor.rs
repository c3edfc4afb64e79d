//! Numbers that belong to a plan: scales per channel, index lists, low-rank factors. They lie in a file beside the plan.

use half::bf16;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{fmt, sync::Arc};

use crate::{
    bytes::Bytes,
    error::{Error, Result},
    format::safetensors::Dtype,
    hash::sha256,
};

/// An immutable array that is named by its content: equal names mean equal numbers, so a plan stores each once and a
/// damaged one does not go by its name.
#[derive(Clone)]
pub struct Tensor {
    name: Arc<str>,
    shape: Vec<usize>,
    data: Data,
}

#[derive(Clone)]
enum Data {
    /// Read from a plan, whose side file has not been read yet.
    Missing,
    F32(Arc<[f32]>),
    U32(Arc<[u32]>),
    Bf16(Bytes),
}

impl Tensor {
    /// A vector of numbers.
    pub fn vector(values: Vec<f32>) -> Self {
        Self::new(vec![values.len()], Data::F32(values.into()))
    }

    /// A list of positions.
    pub fn list(positions: Vec<u32>) -> Self {
        Self::new(vec![positions.len()], Data::U32(positions.into()))
    }

    /// A matrix of `rows` runs, stored as bf16.
    ///
    /// # Panics
    /// If `values` cannot be cut into `rows` equal runs.
    pub fn matrix(rows: usize, values: &[f32]) -> Self {
        assert!(rows > 0 && values.len().is_multiple_of(rows), "a matrix has equal rows");
        let bytes: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        Self::new(vec![rows, values.len() / rows], Data::Bf16(bytes.into()))
    }

    fn new(shape: Vec<usize>, data: Data) -> Self {
        let mut tensor = Self { name: "".into(), shape, data };
        tensor.name = tensor.content_name().into();
        tensor
    }

    /// From the bytes of a side file.
    ///
    /// # Errors
    /// A type that plans do not use, bytes that do not fit the shape, a number that is not finite, or numbers that are
    /// not those the name was made from.
    pub fn read(name: &str, dtype: Dtype, shape: Vec<usize>, bytes: Bytes) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::malformed(found, expected.to_owned()).in_item(name));
        let count = shape.iter().try_fold(1_usize, |n, axis| n.checked_mul(*axis));
        if count.and_then(|n| n.checked_mul(dtype.bits() as usize / 8)) != Some(bytes.len()) {
            return bad(format!("{} bytes for shape {shape:?}", bytes.len()), "as many as the shape says");
        }
        let (words, _) = bytes.as_chunks::<4>();
        let data = match dtype {
            Dtype::F32 => Data::F32(words.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            Dtype::U32 => Data::U32(words.iter().map(|b| u32::from_le_bytes(*b)).collect()),
            Dtype::BF16 => Data::Bf16(bytes),
            other => return bad(format!("type {}", other.name()), "F32, U32 or BF16"),
        };
        let tensor = Self { name: name.into(), shape, data };
        if let Some(x) = tensor.to_f32().iter().find(|x| !x.is_finite()) {
            return bad(format!("{x}"), "finite numbers");
        }
        if tensor.content_name() != name {
            return bad(
                "other numbers than its name says".into(),
                "those it was stored with; delete the plan and calibrate again",
            );
        }
        Ok(tensor)
    }

    /// The name: the beginning of the SHA-256 of type, shape and numbers.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape, slowest axis first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Type as stored; `None` for one that was not read from its side file.
    pub fn dtype(&self) -> Option<Dtype> {
        match self.data {
            Data::Missing => None,
            Data::F32(_) => Some(Dtype::F32),
            Data::U32(_) => Some(Dtype::U32),
            Data::Bf16(_) => Some(Dtype::BF16),
        }
    }

    /// The numbers of a vector; empty for other kinds.
    pub fn values(&self) -> &[f32] {
        if let Data::F32(v) = &self.data { v } else { &[] }
    }

    /// The positions of a list; empty for other kinds.
    pub fn positions(&self) -> &[u32] {
        if let Data::U32(v) = &self.data { v } else { &[] }
    }

    /// The bytes as stored.
    pub fn bytes(&self) -> Bytes {
        match &self.data {
            Data::Missing => Vec::new().into(),
            Data::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into(),
            Data::U32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into(),
            Data::Bf16(b) => b.clone(),
        }
    }

    /// All numbers as f32 (positions too).
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            Data::Missing => Vec::new(),
            Data::F32(v) => v.to_vec(),
            Data::U32(v) => v.iter().map(|x| *x as f32).collect(),
            Data::Bf16(b) => b.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        }
    }

    fn content_name(&self) -> String {
        let mut bytes = format!("{} {:?} ", self.dtype().map_or("none", Dtype::name), self.shape).into_bytes();
        bytes.extend_from_slice(&self.bytes());
        let mut name = sha256(&bytes);
        name.truncate(24);
        name
    }
}

impl PartialEq for Tensor {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?})", self.name, self.shape)
    }
}

impl Serialize for Tensor {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.serialize_str(&self.name)
    }
}

impl<'de> Deserialize<'de> for Tensor {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        let name = String::deserialize(d)?;
        Ok(Self { name: name.into(), shape: vec![], data: Data::Missing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_by_content_and_read_back() {
        let all = [
            Tensor::vector(vec![1.0, -2.5]),
            Tensor::list(vec![7, 9]),
            Tensor::matrix(2, &[1.0, 2.0, 3.0, 4.0]),
            Tensor::vector(vec![]),
        ];
        for t in &all {
            let dtype = t.dtype().unwrap();
            let back = Tensor::read(t.name(), dtype, t.shape().to_vec(), t.bytes()).unwrap();
            assert_eq!((&back, back.to_f32()), (t, t.to_f32()));
        }
        assert_ne!(all[0], Tensor::vector(vec![1.0, -2.0]));
        assert_eq!(all[2].to_f32(), [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn damage_is_named() {
        let t = Tensor::vector(vec![1.0, 2.0]);
        let read = |bytes: Vec<u8>, shape: Vec<usize>| {
            Tensor::read(t.name(), Dtype::F32, shape, bytes.into()).unwrap_err().to_string()
        };
        let other: Vec<u8> = [1.0_f32, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(read(other, vec![2]).contains("calibrate again"));
        let nan: Vec<u8> = [1.0_f32, f32::NAN].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(read(nan, vec![2]).contains("NaN"));
        assert!(read(vec![0; 8], vec![3]).contains("8 bytes"));
        assert!(read(vec![0; 8], vec![usize::MAX, 2]).contains("8 bytes"));
    }
}
