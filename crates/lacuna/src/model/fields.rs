//! Typed, capped reading of hyperparameters: the settings of a config.json, or those of a GGUF header under their short names.

use crate::error::{Error, Result};
use serde_json::{Map, Value};

/// Largest count accepted for any size (width, vocabulary, context, ...); products of three stay far below 2^64.
const COUNT_CAP: u64 = 1 << 21;
/// Contexts may be longer than other sizes.
const CONTEXT_CAP: u64 = 1 << 28;
/// Blocks of a decoder.
const LAYER_CAP: u64 = 4096;

/// The settings of one model. GGUF keys lose the prefix `<architecture>.`; keys of other groups stay whole.
#[derive(Clone, Debug)]
pub struct Fields {
    /// What error messages call the source.
    pub file: String,
    /// Context that the user asked for; decides between the short and long factors of longrope.
    pub context: Option<usize>,
    map: Map<String, Value>,
}

impl Fields {
    /// Settings `map` of `file`.
    pub fn new(file: String, context: Option<usize>, map: Map<String, Value>) -> Self {
        Self { file, context, map }
    }

    /// The settings inside `key` if it is an object (`text_config` of models that also see pictures), with the same origin.
    pub fn inside(&self, key: &str) -> Option<Fields> {
        let map = self.get(key)?.as_object()?.clone();
        Some(Fields { file: self.file.clone(), context: self.context, map })
    }

    /// The same settings with another value of one.
    #[must_use]
    pub fn with(&self, key: &str, value: usize) -> Fields {
        let mut fields = self.clone();
        fields.map.insert(key.into(), value.into());
        fields
    }

    /// The raw setting; null counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// An error about `key`.
    pub fn wrong(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::config(&self.file, key, problem)
    }

    /// An error about something this architecture cannot do; `remedy` starts with `; ` or is empty.
    pub fn unsupported(&self, what: impl Into<String>, remedy: &str) -> Error {
        Error::Unsupported { file: self.file.clone(), what: what.into(), remedy: remedy.into() }
    }

    fn typed<T>(&self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match read(v) {
                Some(t) => Ok(Some(t)),
                None => Err(self.wrong(key, format!("expected {expected}, found {}", shorten(v)))),
            },
        }
    }

    fn need<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.wrong(key, "is missing; is this file the configuration of a language model?"))
    }

    /// A size from 1 to 2^21, if set.
    pub fn opt_count(&self, key: &str) -> Result<Option<usize>> {
        self.capped(key, COUNT_CAP)
    }

    fn capped(&self, key: &str, cap: u64) -> Result<Option<usize>> {
        let read = |v: &Value| v.as_u64().filter(|n| (1..=cap).contains(n)).map(|n| n as usize);
        self.typed(key, &format!("a whole number from 1 to {cap}"), read)
    }

    /// A size from 1 to 2^21.
    pub fn count(&self, key: &str) -> Result<usize> {
        let value = self.opt_count(key)?;
        self.need(key, value)
    }

    /// A size from 1 to 2^21, or `default`.
    pub fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.opt_count(key)?.unwrap_or(default))
    }

    /// A number of blocks.
    pub fn layers(&self, key: &str) -> Result<usize> {
        let value = self.capped(key, LAYER_CAP)?;
        self.need(key, value)
    }

    /// A length in positions.
    pub fn positions(&self, key: &str) -> Result<usize> {
        let value = self.opt_positions(key)?;
        self.need(key, value)
    }

    /// A length in positions, if set.
    pub fn opt_positions(&self, key: &str) -> Result<Option<usize>> {
        self.capped(key, CONTEXT_CAP)
    }

    /// A size that GGUF may store as one number or as one number per block, which then must all be equal.
    pub fn uniform_count(&self, key: &str) -> Result<Option<usize>> {
        let Some(Value::Array(list)) = self.get(key) else { return self.opt_count(key) };
        match list.first() {
            Some(first) if list.iter().all(|v| v == first) => {
                let one = Map::from_iter([(key.to_owned(), first.clone())]);
                Fields { map: one, file: self.file.clone(), context: None }.opt_count(key)
            }
            _ => Err(self.unsupported(format!("`{key}` with values that differ from block to block"), "")),
        }
    }

    /// A finite number, if set.
    pub fn opt_number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", |v| v.as_f64().filter(|n| n.is_finite()))
    }

    /// A finite number, or `default`.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.opt_number(key)?.unwrap_or(default))
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<f64> {
        let value = self.opt_number(key)?;
        self.need(key, value)
    }

    /// A number above zero, if set.
    pub fn opt_positive(&self, key: &str) -> Result<Option<f64>> {
        match self.opt_number(key)? {
            Some(n) if n <= 0.0 => Err(self.wrong(key, format!("expected a number above 0, found {n}"))),
            n => Ok(n),
        }
    }

    /// An epsilon: from 0 (exclusive) to 0.1.
    pub fn epsilon(&self, key: &str, default: Option<f64>) -> Result<f32> {
        let value = self.opt_positive(key)?.or(default);
        let eps = self.need(key, value)?;
        if eps > 0.1 { Err(self.wrong(key, format!("expected at most 0.1, found {eps}"))) } else { Ok(eps as f32) }
    }

    /// A switch, or `default`.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A text, if set.
    pub fn opt_text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match v.as_str() {
                Some(s) => Ok(Some(s)),
                None => Err(self.wrong(key, format!("expected a text, found {}", shorten(v)))),
            },
        }
    }

    /// A list of exactly `n` positive finite numbers, if set.
    pub fn opt_factors(&self, key: &str, n: usize) -> Result<Option<Vec<f64>>> {
        let read = |v: &Value| {
            let list = v.as_array()?;
            let numbers: Vec<f64> =
                list.iter().filter_map(Value::as_f64).filter(|f| f.is_finite() && *f > 0.0).collect();
            (numbers.len() == list.len() && list.len() == n).then_some(numbers)
        };
        self.typed(key, &format!("a list of {n} numbers above 0"), read)
    }

    /// A list of texts, one per block, if set.
    pub fn opt_texts(&self, key: &str, n: usize) -> Result<Option<Vec<&str>>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let texts: Option<Vec<&str>> = v.as_array().and_then(|l| l.iter().map(Value::as_str).collect());
        match texts {
            Some(t) if t.len() == n => Ok(Some(t)),
            _ => Err(self.wrong(key, format!("expected a list of {n} texts, one per block, found {}", shorten(v)))),
        }
    }

    /// A list of block numbers, empty if not set.
    pub fn indices(&self, key: &str) -> Result<Vec<usize>> {
        let read = |v: &Value| v.as_array()?.iter().map(|i| i.as_u64().map(|n| n as usize)).collect::<Option<Vec<_>>>();
        Ok(self.typed(key, "a list of block numbers", read)?.unwrap_or_default())
    }
}

/// A value as it appears in messages: never longer than a line.
fn shorten(v: &Value) -> String {
    let text = v.to_string();
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        let Ok(Value::Object(map)) = serde_json::from_str(json) else { panic!("an object") };
        Fields::new("config.json".into(), None, map)
    }

    #[test]
    fn impossible_counts_are_errors_that_name_file_and_key() {
        for bad in ["0", "-1", "2.5", "1e30", "\"8\"", "18446744073709551615", "2097153", "[]"] {
            let e = fields(&format!("{{\"hidden_size\": {bad}}}")).count("hidden_size").unwrap_err().to_string();
            assert!(e.starts_with("config.json: `hidden_size`: expected a whole number"), "{e}");
        }
        assert!(fields("{\"hidden_size\": null}").count("hidden_size").unwrap_err().to_string().contains("missing"));
        assert_eq!(fields("{\"a\": 2097152}").count("a").unwrap(), 1 << 21);
    }

    #[test]
    fn numbers_must_be_finite_and_in_range() {
        let f = fields("{\"b\": -1, \"c\": 0.5, \"d\": [1, 0], \"e\": [[1]]}");
        assert!(f.opt_positive("b").is_err());
        assert!(f.epsilon("c", None).is_err());
        assert!(f.opt_factors("d", 2).is_err());
        assert!(f.opt_factors("d", 3).is_err());
        assert!(f.uniform_count("d").is_err());
    }
}
