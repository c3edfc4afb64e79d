//! `config.json` and its relatives: JSON with typed getters whose errors name the key, what is there and what should be.

use crate::{
    error::{Error, Printable, Result},
    map::read_small,
    size::cap,
};
use serde_json::Value;
use std::{ops::RangeInclusive, path::Path};

const CHECK: &str = "Check the file against the model's original, or fetch it again";

/// A JSON object. Getters take keys as they are; [`Config::section`] descends.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    root: Value,
    /// Path of keys from the top of the file, for messages (`text_config.`).
    prefix: String,
}

impl Config {
    /// Parses an object of at most 4 MiB.
    ///
    /// # Errors
    /// If it is larger, no JSON, no object, or nested more than 128 deep.
    pub fn parse(json: &[u8]) -> Result<Self> {
        Self::parse_within(json, cap::CONFIG)
    }

    /// As [`Config::parse`] with another limit on the size.
    ///
    /// # Errors
    /// As there.
    pub fn parse_within(json: &[u8], limit: u64) -> Result<Self> {
        Error::check_limit("the size of the file", json.len() as u64, limit)?;
        let root: Value = serde_json::from_slice(json)
            .map_err(|e| Error::malformed(format!("text that is no JSON ({e})"), "a JSON object"))?;
        let config = Self { root, prefix: String::new() };
        if config.root.is_object() { Ok(config) } else { Err(config.wrong("", "an object")) }
    }

    /// Reads and parses `path`.
    ///
    /// # Errors
    /// As [`Config::parse`], and if the file cannot be read; the file is named.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        read_small(path, cap::CONFIG).and_then(|json| Self::parse(&json)).map_err(|e| e.in_file(path))
    }

    /// The value of `key`; `null` counts as absent, as in `transformers`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.root.get(key).filter(|v| !v.is_null())
    }

    /// All keys, in the order of the file.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.root.as_object().into_iter().flat_map(|o| o.keys().map(String::as_str))
    }

    /// The nested object at `key`.
    ///
    /// # Errors
    /// If it is absent or no object.
    pub fn section(&self, key: &str) -> Result<Config> {
        let value = self.require(key)?;
        let prefix = format!("{}{key}.", self.prefix);
        if value.is_object() { Ok(Config { root: value.clone(), prefix }) } else { Err(self.wrong(key, "an object")) }
    }

    /// A whole number in `range`; one written as a float without fraction counts.
    ///
    /// # Errors
    /// If it is absent, no whole number, or outside.
    pub fn int(&self, key: &str, range: RangeInclusive<i64>) -> Result<i64> {
        let value = self.require(key)?;
        let whole = |f: f64| (f.fract() == 0.0 && f.abs() < 9e15).then_some(f as i64);
        let n = value.as_i64().or_else(|| value.as_f64().and_then(whole));
        n.filter(|n| range.contains(n))
            .ok_or_else(|| self.wrong(key, &format!("a whole number from {} to {}", range.start(), range.end())))
    }

    /// A size or count from 0 to 2^31 - 1.
    ///
    /// # Errors
    /// As [`Config::int`].
    pub fn count(&self, key: &str) -> Result<usize> {
        self.int(key, 0..=i64::from(i32::MAX)).map(|n| n as usize)
    }

    /// A size or count from 1 to 2^31 - 1: for everything that divides.
    ///
    /// # Errors
    /// As [`Config::int`].
    pub fn positive(&self, key: &str) -> Result<usize> {
        self.int(key, 1..=i64::from(i32::MAX)).map(|n| n as usize)
    }

    /// A finite number.
    ///
    /// # Errors
    /// If it is absent, no number, or too large for f32.
    pub fn float(&self, key: &str) -> Result<f32> {
        let n = self.require(key)?.as_f64().map(|n| n as f32);
        n.filter(|n| n.is_finite()).ok_or_else(|| self.wrong(key, "a finite number"))
    }

    /// A finite number above 0.
    ///
    /// # Errors
    /// As [`Config::float`], and if it is not above 0.
    pub fn positive_float(&self, key: &str) -> Result<f32> {
        let n = self.float(key)?;
        if n > 0.0 { Ok(n) } else { Err(self.wrong(key, "a number above 0")) }
    }

    /// A truth value.
    ///
    /// # Errors
    /// If it is absent or none.
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.require(key)?.as_bool().ok_or_else(|| self.wrong(key, "true or false"))
    }

    /// A string.
    ///
    /// # Errors
    /// If it is absent or none.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.require(key)?;
        self.entry_str(key)
    }

    /// As [`Config::str`], for a key that comes from the file itself.
    pub(crate) fn entry_str(&self, key: &str) -> Result<&str> {
        self.root.get(key).and_then(Value::as_str).ok_or_else(|| self.wrong(key, "a string"))
    }

    /// One whole number or a list of them (`eos_token_id`), each in `range`.
    ///
    /// # Errors
    /// If it is absent or anything else.
    pub fn ints(&self, key: &str, range: RangeInclusive<i64>) -> Result<Vec<i64>> {
        let value = self.require(key)?;
        let one = std::slice::from_ref(value);
        let list = value.as_array().map_or(one, Vec::as_slice);
        let numbers: Option<Vec<i64>> = list.iter().map(|v| v.as_i64().filter(|n| range.contains(n))).collect();
        let expected = || format!("whole numbers from {} to {}", range.start(), range.end());
        numbers.ok_or_else(|| self.wrong(key, &expected()))
    }

    /// A list of finite numbers.
    ///
    /// # Errors
    /// If it is absent or anything else.
    pub fn floats(&self, key: &str) -> Result<Vec<f32>> {
        let finite = |v: &Value| v.as_f64().map(|n| n as f32).filter(|n| n.is_finite());
        let list = self.require(key)?.as_array().and_then(|l| l.iter().map(finite).collect());
        list.ok_or_else(|| self.wrong(key, "a list of finite numbers"))
    }

    /// A list of strings.
    ///
    /// # Errors
    /// If it is absent or anything else.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>> {
        let list = self.require(key)?.as_array().and_then(|l| l.iter().map(Value::as_str).collect());
        list.ok_or_else(|| self.wrong(key, "a list of strings"))
    }

    /// `read(key)` if the key is there: `config.maybe("head_dim", Config::positive)?`.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn maybe<'a, T>(&'a self, key: &str, read: impl FnOnce(&'a Self, &str) -> Result<T>) -> Result<Option<T>> {
        self.get(key).map(|_| read(self, key)).transpose()
    }

    /// An error on `key` that says what was expected; for checks beyond those here (`heads divides width`).
    pub fn wrong(&self, key: &str, expected: &str) -> Error {
        let value = if key.is_empty() { &self.root } else { self.root.get(key).unwrap_or(&Value::Null) };
        let found = match value {
            Value::Object(_) => "an object".to_owned(),
            Value::Array(a) => format!("a list of {}", a.len()),
            other => Printable(&other.to_string()).to_string(),
        };
        Error::Malformed { at: Box::default(), found, expected: expected.to_owned(), remedy: CHECK }
            .in_item(&format!("{}{key}", self.prefix))
    }

    fn require(&self, key: &str) -> Result<&Value> {
        self.get(key).ok_or_else(|| Error::missing("this key", CHECK).in_item(&format!("{}{key}", self.prefix)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Config {
        Config::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn getters_read_what_is_right() {
        let c = config(
            r#"{"n": 4, "f": 1e-5, "w": 3.0, "s": "llama", "b": true, "none": null,
                "eos": [1, 2], "l": [1.5, 2], "in": {"n": 7}, "names": ["a", "b"]}"#,
        );
        assert_eq!((c.positive("n").unwrap(), c.count("w").unwrap(), c.float("f").unwrap()), (4, 3, 1e-5));
        assert_eq!((c.str("s").unwrap(), c.bool("b").unwrap()), ("llama", true));
        assert_eq!((c.ints("eos", 0..=9).unwrap(), c.ints("n", 0..=9).unwrap()), (vec![1, 2], vec![4]));
        assert_eq!((c.floats("l").unwrap(), c.strings("names").unwrap()), (vec![1.5, 2.0], vec!["a", "b"]));
        assert_eq!(c.section("in").unwrap().count("n").unwrap(), 7);
        assert_eq!(c.maybe("none", Config::count).unwrap(), None);
        assert_eq!(c.maybe("s", Config::str).unwrap(), Some("llama"));
        assert_eq!(c.keys().next(), Some("n"));
    }

    #[test]
    fn errors_name_key_found_and_expected() {
        let c = config(r#"{"in": {"heads": 0, "list": [], "x": -1, "big": 18446744073709551615, "s": 1.5}}"#);
        let s = c.section("in").unwrap();
        let text = s.positive("heads").unwrap_err().to_string();
        assert!(text.starts_with("`in.heads`: found 0, expected a whole number from 1 to 2147483647."), "{text}");
        assert!(s.positive("list").unwrap_err().to_string().contains("found a list of 0"));
        assert!(s.count("nothing").unwrap_err().to_string().starts_with("`in.nothing`: this key is missing."));
        for key in ["x", "big", "s"] {
            assert!(s.count(key).is_err(), "{key}");
        }
        assert!(s.str("x").is_err() && s.bool("x").is_err() && s.floats("x").is_err() && s.section("x").is_err());
    }

    #[test]
    fn numbers_at_the_edges() {
        for n in [
            "0",
            "1",
            "2147483647",
            "2147483648",
            "4294967296",
            "9223372036854775808",
            "18446744073709551615",
            "-1",
            "1e308",
            "1e400",
            "0.5",
        ] {
            let Ok(c) = Config::parse(format!("{{\"n\": {n}}}").as_bytes()) else {
                assert_eq!(n, "1e400");
                continue;
            };
            assert_eq!(c.count("n").is_ok(), ["0", "1", "2147483647"].contains(&n), "{n}");
            assert_eq!(c.positive("n").is_ok(), ["1", "2147483647"].contains(&n), "{n}");
            assert_eq!(c.float("n").is_ok(), n != "1e308", "{n}");
        }
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for bad in [
            "",
            "[]",
            "1",
            "{",
            "{\"a\":}",
            "\u{feff}{}",
            &"[".repeat(100_000),
            &format!("{{\"a\":{}", "{\"a\":".repeat(500)),
        ] {
            assert!(Config::parse(bad.as_bytes()).is_err());
        }
        assert!(matches!(Config::parse(&vec![b' '; (cap::CONFIG + 1) as usize]), Err(Error::Limit { .. })));
    }
}
