//! Typed metadata.

use super::{cursor::Cursor, shown};
use crate::{
    bytes::Bytes,
    error::{Error, Result},
    size::{Size, cap},
};
use std::ops::RangeInclusive;

/// Bytes of the smallest pair: key of one byte, type, value of one byte.
pub const SMALLEST_PAIR: usize = 8 + 1 + 4 + 1;

const CHECK: &str = "Convert the model again with a current converter";

/// Type of a value, numbered as in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the definition")]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

use ValueType as V;

impl ValueType {
    const ALL: [V; 13] =
        [V::U8, V::I8, V::U16, V::I16, V::U32, V::I32, V::F32, V::Bool, V::String, V::Array, V::U64, V::I64, V::F64];

    fn parse(id: u32) -> Result<Self> {
        let found = || Error::malformed(format!("value type {id}"), "0 to 12");
        Self::ALL.get(id as usize).copied().ok_or_else(found)
    }

    /// Bytes of a value; `None` for strings and arrays.
    fn width(self) -> Option<usize> {
        match self {
            V::U8 | V::I8 | V::Bool => Some(1),
            V::U16 | V::I16 => Some(2),
            V::U32 | V::I32 | V::F32 => Some(4),
            V::U64 | V::I64 | V::F64 => Some(8),
            V::String | V::Array => None,
        }
    }
}

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names are the definition")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A list of values of one type, kept in its stored form: a vocabulary of a million pieces costs nothing until read.
/// Lists of lists are refused, as in llama.cpp.
#[derive(Clone, Debug)]
pub struct Array {
    kind: ValueType,
    count: usize,
    bytes: Bytes,
}

impl PartialEq for Array {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind && self.count == other.count && *self.bytes == *other.bytes
    }
}

impl Array {
    /// A list of strings.
    pub fn strings<S: AsRef<str>>(items: impl IntoIterator<Item = S>) -> Self {
        let (mut bytes, mut count) = (Vec::new(), 0);
        for s in items {
            put_string(s.as_ref(), &mut bytes);
            count += 1;
        }
        Self { kind: V::String, count, bytes: bytes.into() }
    }

    /// A list of f32.
    pub fn floats(items: &[f32]) -> Self {
        let bytes: Vec<u8> = items.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { kind: V::F32, count: items.len(), bytes: bytes.into() }
    }

    /// A list of i32.
    pub fn ints(items: &[i32]) -> Self {
        let bytes: Vec<u8> = items.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { kind: V::I32, count: items.len(), bytes: bytes.into() }
    }

    /// Type of its elements.
    pub fn kind(&self) -> ValueType {
        self.kind
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The elements one after the other.
    ///
    /// # Errors
    /// Only where a string is no UTF-8; lengths were checked when the file was parsed.
    pub fn iter(&self) -> impl Iterator<Item = Result<Value>> {
        let mut c = Cursor::new(&self.bytes);
        (0..self.count).map(move |_| parse_scalar(&mut c, self.kind))
    }

    /// The elements of a list of strings.
    ///
    /// # Errors
    /// If it is a list of something else, or a string is no UTF-8.
    pub fn as_strings(&self) -> Result<Vec<&str>> {
        if self.kind != V::String {
            return Err(Error::malformed(format!("a list of {:?}", self.kind), "a list of strings"));
        }
        let mut c = Cursor::new(&self.bytes);
        (0..self.count).map(|_| c.string("the length of a string", cap::STRING)).collect()
    }

    fn parse(c: &mut Cursor<'_>, file: &Bytes) -> Result<Self> {
        let kind = ValueType::parse(c.u32()?)?;
        let smallest = kind.width().unwrap_or(8);
        let count = c.count("the length of a list", cap::ARRAY, smallest)?;
        let start = c.position();
        match kind {
            V::Array => return Err(Error::unsupported("a list of lists", CHECK)),
            V::String => {
                for _ in 0..count {
                    let n = c.count("the length of a string", cap::STRING, 1)?;
                    c.take(n)?;
                }
            }
            _ => {
                c.take(Size::from(count).times(Size::from(smallest))?.index()?)?;
            }
        }
        let bytes = file.slice(start..c.position()).ok_or_else(|| Error::malformed("a list", "one inside the file"))?;
        Ok(Self { kind, count, bytes })
    }
}

fn parse_scalar(c: &mut Cursor<'_>, kind: ValueType) -> Result<Value> {
    Ok(match kind {
        V::U8 => Value::U8(u8::from_le_bytes(c.array()?)),
        V::I8 => Value::I8(i8::from_le_bytes(c.array()?)),
        V::U16 => Value::U16(u16::from_le_bytes(c.array()?)),
        V::I16 => Value::I16(i16::from_le_bytes(c.array()?)),
        V::U32 => Value::U32(u32::from_le_bytes(c.array()?)),
        V::I32 => Value::I32(i32::from_le_bytes(c.array()?)),
        V::F32 => Value::F32(f32::from_le_bytes(c.array()?)),
        V::U64 => Value::U64(u64::from_le_bytes(c.array()?)),
        V::I64 => Value::I64(i64::from_le_bytes(c.array()?)),
        V::F64 => Value::F64(f64::from_le_bytes(c.array()?)),
        V::Bool => match c.array::<1>()? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => return Err(Error::malformed(format!("a bool of {other}"), "0 or 1")),
        },
        V::String => Value::String(c.string("the length of a string", cap::STRING)?.to_owned()),
        V::Array => return Err(Error::unsupported("a list of lists", CHECK)),
    })
}

impl Value {
    fn parse(c: &mut Cursor<'_>, file: &Bytes) -> Result<Self> {
        match ValueType::parse(c.u32()?)? {
            V::Array => Array::parse(c, file).map(Value::Array),
            kind => parse_scalar(c, kind),
        }
    }

    fn kind(&self) -> ValueType {
        match self {
            Value::U8(_) => V::U8,
            Value::I8(_) => V::I8,
            Value::U16(_) => V::U16,
            Value::I16(_) => V::I16,
            Value::U32(_) => V::U32,
            Value::I32(_) => V::I32,
            Value::F32(_) => V::F32,
            Value::Bool(_) => V::Bool,
            Value::String(_) => V::String,
            Value::Array(_) => V::Array,
            Value::U64(_) => V::U64,
            Value::I64(_) => V::I64,
            Value::F64(_) => V::F64,
        }
    }

    /// Appends type and value as they are stored.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.extend((self.kind() as u32).to_le_bytes());
        match self {
            Value::U8(v) => out.push(*v),
            Value::I8(v) => out.extend(v.to_le_bytes()),
            Value::U16(v) => out.extend(v.to_le_bytes()),
            Value::I16(v) => out.extend(v.to_le_bytes()),
            Value::U32(v) => out.extend(v.to_le_bytes()),
            Value::I32(v) => out.extend(v.to_le_bytes()),
            Value::F32(v) => out.extend(v.to_le_bytes()),
            Value::U64(v) => out.extend(v.to_le_bytes()),
            Value::I64(v) => out.extend(v.to_le_bytes()),
            Value::F64(v) => out.extend(v.to_le_bytes()),
            Value::Bool(v) => out.push(u8::from(*v)),
            Value::String(v) => put_string(v, out),
            Value::Array(a) => {
                out.extend((a.kind as u32).to_le_bytes());
                out.extend((a.count as u64).to_le_bytes());
                out.extend_from_slice(&a.bytes);
            }
        }
    }

    /// A whole number of any width.
    pub fn as_int(&self) -> Option<i64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::I8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::I16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::I32(v) => Some(v.into()),
            Value::U64(v) => v.try_into().ok(),
            Value::I64(v) => Some(v),
            _ => None,
        }
    }

    /// A finite number of any type.
    pub fn as_float(&self) -> Option<f32> {
        let v = match *self {
            Value::F32(v) => v,
            Value::F64(v) => v as f32,
            _ => self.as_int()? as f32,
        };
        v.is_finite().then_some(v)
    }
}

/// Appends length and bytes.
pub fn put_string(s: &str, out: &mut Vec<u8>) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

/// The key-value pairs of a file, with getters whose errors name the key, what is there and what should be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// In the order of the file.
    pairs: Vec<(String, Value)>,
    /// Indices of `pairs`, sorted by key.
    by_key: Vec<u32>,
}

impl Metadata {
    pub(super) fn parse(c: &mut Cursor<'_>, count: usize, file: &Bytes) -> Result<Self> {
        let mut pairs = Vec::with_capacity(count);
        for _ in 0..count {
            let at = c.position() as u64;
            let key = c.string("the length of a key", 65_535)?.to_owned();
            let value = Value::parse(c, file).map_err(|e| e.in_item(&key).at_byte(at))?;
            pairs.push((key, value));
        }
        let key = |i: u32| &pairs[i as usize].0;
        let mut by_key: Vec<u32> = (0..count as u32).collect();
        by_key.sort_unstable_by(|a, b| key(*a).cmp(key(*b)));
        if let Some([twice, _]) = by_key.array_windows().find(|[a, b]| key(*a) == key(*b)) {
            return Err(Error::malformed("this key twice", "once").in_item(key(*twice)));
        }
        Ok(Self { pairs, by_key })
    }

    /// All pairs, in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.pairs.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let i = self.by_key.binary_search_by(|i| self.pairs[*i as usize].0.as_str().cmp(key)).ok()?;
        Some(&self.pairs[self.by_key[i] as usize].1)
    }

    /// A whole number in `range`, whatever its width in the file.
    ///
    /// # Errors
    /// If it is absent, no whole number, or outside.
    pub fn int(&self, key: &str, range: RangeInclusive<i64>) -> Result<i64> {
        let expected = || self.wrong(key, &format!("a whole number from {} to {}", range.start(), range.end()));
        self.require(key)?.as_int().filter(|n| range.contains(n)).ok_or_else(expected)
    }

    /// A size or count from 0 to 2^31 - 1.
    ///
    /// # Errors
    /// As [`Metadata::int`].
    pub fn count(&self, key: &str) -> Result<usize> {
        self.int(key, 0..=i64::from(i32::MAX)).map(|n| n as usize)
    }

    /// A size or count from 1 to 2^31 - 1: for everything that divides.
    ///
    /// # Errors
    /// As [`Metadata::int`].
    pub fn positive(&self, key: &str) -> Result<usize> {
        self.int(key, 1..=i64::from(i32::MAX)).map(|n| n as usize)
    }

    /// A finite number.
    ///
    /// # Errors
    /// If it is absent or none.
    pub fn float(&self, key: &str) -> Result<f32> {
        self.require(key)?.as_float().ok_or_else(|| self.wrong(key, "a finite number"))
    }

    /// A finite number above 0.
    ///
    /// # Errors
    /// As [`Metadata::float`], and if it is not above 0.
    pub fn positive_float(&self, key: &str) -> Result<f32> {
        let n = self.float(key)?;
        if n > 0.0 { Ok(n) } else { Err(self.wrong(key, "a number above 0")) }
    }

    /// A truth value.
    ///
    /// # Errors
    /// If it is absent or none.
    pub fn bool(&self, key: &str) -> Result<bool> {
        match self.require(key)? {
            Value::Bool(b) => Ok(*b),
            _ => Err(self.wrong(key, "a bool")),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// If it is absent or none.
    pub fn str(&self, key: &str) -> Result<&str> {
        match self.require(key)? {
            Value::String(s) => Ok(s),
            _ => Err(self.wrong(key, "a string")),
        }
    }

    /// A list of anything.
    ///
    /// # Errors
    /// If it is absent or none.
    pub fn array(&self, key: &str) -> Result<&Array> {
        match self.require(key)? {
            Value::Array(a) => Ok(a),
            _ => Err(self.wrong(key, "a list")),
        }
    }

    /// A list of strings.
    ///
    /// # Errors
    /// If it is absent or anything else.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>> {
        self.array(key)?.as_strings().map_err(|e| e.in_item(key))
    }

    /// A list of finite numbers.
    ///
    /// # Errors
    /// If it is absent or anything else.
    pub fn floats(&self, key: &str) -> Result<Vec<f32>> {
        let numbers = self.array(key)?.iter().map(|v| Ok(v?.as_float()));
        numbers.collect::<Result<Option<_>>>()?.ok_or_else(|| self.wrong(key, "a list of finite numbers"))
    }

    /// One whole number or a list of them (`head_count_kv` per layer), each in `range`.
    ///
    /// # Errors
    /// If it is absent or anything else.
    pub fn ints(&self, key: &str, range: RangeInclusive<i64>) -> Result<Vec<i64>> {
        if !matches!(self.require(key)?, Value::Array(_)) {
            return Ok(vec![self.int(key, range)?]);
        }
        let expected = || self.wrong(key, &format!("whole numbers from {} to {}", range.start(), range.end()));
        let numbers = self.array(key)?.iter().map(|v| Ok(v?.as_int().filter(|n| range.contains(n))));
        numbers.collect::<Result<Option<_>>>()?.ok_or_else(expected)
    }

    /// `read(key)` if the key is there: `metadata.maybe("llama.rope.freq_base", Metadata::float)?`.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn maybe<'a, T>(&'a self, key: &str, read: impl FnOnce(&'a Self, &str) -> Result<T>) -> Result<Option<T>> {
        self.get(key).map(|_| read(self, key)).transpose()
    }

    /// An error on `key` that says what was expected; for checks beyond those here.
    pub fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = match self.get(key) {
            None => "nothing".to_owned(),
            Some(Value::String(s)) => shown(s),
            Some(Value::Array(a)) => format!("a list of {} {:?}", a.count, a.kind),
            Some(other) => format!("{other:?}"),
        };
        Error::Malformed { at: Box::default(), found, expected: expected.to_owned(), remedy: CHECK }.in_item(key)
    }

    fn require(&self, key: &str) -> Result<&Value> {
        self.get(key).ok_or_else(|| Error::missing("this metadata key", CHECK).in_item(key))
    }
}
