//! The JSON header, read as a stream so that no hostile header costs more memory than its own length or so.

use super::{Dtype, Entry};
use crate::{
    error::{Error, Result},
    size::{Size, cap},
};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use std::{borrow::Cow, collections::BTreeMap, fmt};

/// What the header says about one tensor.
struct Info {
    dtype: Dtype,
    shape: Vec<u64>,
    /// Start and end, from the start of the buffer.
    offsets: [usize; 2],
}

/// The parsed header.
#[derive(Default)]
pub struct Header {
    /// In the order of the file; ranges are still relative to the buffer and not checked in any way.
    pub tensors: Vec<Entry>,
    pub metadata: BTreeMap<String, String>,
}

pub fn parse(json: &[u8]) -> Result<Header> {
    serde_json::from_slice(json)
        .map_err(|e| Error::malformed(format!("a header that is wrong ({e})"), "safetensors JSON"))
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header::default();
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            if name == "__metadata__" {
                if has_metadata {
                    return Err(A::Error::custom("`__metadata__` twice"));
                }
                has_metadata = true;
                header.metadata = map.next_value::<Metadata>()?.0;
            } else if header.tensors.len() as u64 >= cap::TENSORS {
                return Err(A::Error::custom(format!("more than {} tensors", cap::TENSORS)));
            } else {
                let info = map.next_value::<Info>();
                let info = info.map_err(|e| A::Error::custom(format!("tensor `{}`: {e}", short(&name))))?;
                let [start, end] = info.offsets;
                header.tensors.push(Entry {
                    name: name.into_owned(),
                    dtype: info.dtype,
                    shape: info.shape,
                    range: start..end,
                });
            }
        }
        Ok(header)
    }
}

/// Names in messages stay readable.
fn short(name: &str) -> String {
    name.chars().take(120).collect()
}

struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_map(MetadataVisitor).map(Metadata)
    }
}

struct MetadataVisitor;

impl<'de> Visitor<'de> for MetadataVisitor {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a map of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut metadata = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if metadata.len() as u64 >= cap::KEYS {
                return Err(A::Error::custom(format!("more than {} metadata keys", cap::KEYS)));
            }
            if metadata.insert(key, value).is_some() {
                return Err(A::Error::custom("a metadata key twice"));
            }
        }
        Ok(metadata)
    }
}

impl<'de> Deserialize<'de> for Info {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_map(InfoVisitor)
    }
}

struct InfoVisitor;

impl<'de> Visitor<'de> for InfoVisitor {
    type Value = Info;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Info, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            let twice = match &*key {
                "dtype" => {
                    let name = map.next_value::<Cow<'de, str>>()?;
                    let known = Dtype::parse(&name);
                    dtype
                        .replace(known.ok_or_else(|| A::Error::custom(format!("unknown dtype `{}`", short(&name))))?)
                        .is_some()
                }
                "shape" => shape.replace(map.next_value::<Numbers<8>>()?.0).is_some(),
                "data_offsets" => offsets.replace(map.next_value::<Numbers<2>>()?.0).is_some(),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if twice {
                return Err(A::Error::custom(format!("`{key}` twice")));
            }
        }
        let missing = |what| A::Error::custom(format!("`{what}` is missing"));
        let offsets = offsets.ok_or_else(|| missing("data_offsets"))?;
        Ok(Info {
            dtype: dtype.ok_or_else(|| missing("dtype"))?,
            shape: shape.ok_or_else(|| missing("shape"))?,
            offsets: match *offsets.as_slice() {
                [start, end] => {
                    [Size(start).index().map_err(A::Error::custom)?, Size(end).index().map_err(A::Error::custom)?]
                }
                _ => return Err(A::Error::custom("`data_offsets` needs two numbers")),
            },
        })
    }
}

/// Up to `N` unsigned numbers.
struct Numbers<const N: usize>(Vec<u64>);

impl<'de, const N: usize> Deserialize<'de> for Numbers<N> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_seq(NumbersVisitor::<N>).map(Numbers)
    }
}

struct NumbersVisitor<const N: usize>;

impl<'de, const N: usize> Visitor<'de> for NumbersVisitor<N> {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "up to {N} numbers that are not negative")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut numbers = Vec::with_capacity(2);
        while let Some(n) = seq.next_element()? {
            if numbers.len() == N {
                return Err(A::Error::custom(format!("more than {N} numbers")));
            }
            numbers.push(n);
        }
        Ok(numbers)
    }
}
