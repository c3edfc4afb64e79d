//! Reading a body by the table.

use super::{Absent, Endpoint, FIELDS, Field, Kind, Most, page::takes};
use crate::error::{Error, Result, shown};
use serde_json::{Map, Value};
use std::collections::HashMap;

/// Most values in a body: a list of two-letter numbers takes some forty times its text in memory.
const MAX_VALUES: usize = 1 << 21;

/// Bounds that depend on the model.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Tokens of the context.
    pub context: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

/// A prompt as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A text.
    Text(String),
    /// Token ids, all of the vocabulary.
    Ids(Vec<u32>),
}

/// A value that its field takes.
#[derive(Clone, Debug, PartialEq)]
pub enum Given {
    /// A truth.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Prompts.
    Inputs(Vec<Input>),
    /// Token ids.
    Ids(Vec<u32>),
    /// An object, a list of objects, or a text where one may stand for an object.
    Json(Value),
    /// Token ids and numbers.
    Bias(Vec<(u32, f32)>),
}

/// The fields of one request, with what stands in for absent ones.
#[derive(Debug, Default)]
pub struct Values(HashMap<&'static str, Given>);

impl Values {
    /// Whether the field is true.
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.0.get(name), Some(Given::Bool(true)))
    }

    /// A whole number.
    pub fn int(&self, name: &str) -> Option<i64> {
        match self.0.get(name) {
            Some(Given::Int(n)) => Some(*n),
            _ => None,
        }
    }

    /// A whole number that the table keeps from being negative.
    pub fn count(&self, name: &str) -> Option<usize> {
        self.int(name).and_then(|n| usize::try_from(n).ok())
    }

    /// A number, 0 without one.
    pub fn float(&self, name: &str) -> f32 {
        match self.0.get(name) {
            Some(Given::Float(x)) => *x as f32,
            _ => 0.0,
        }
    }

    /// A text.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name) {
            Some(Given::Text(t)) => Some(t),
            _ => None,
        }
    }

    /// Texts; none without the field.
    pub fn texts(&self, name: &str) -> Vec<String> {
        match self.0.get(name) {
            Some(Given::Texts(t)) => t.clone(),
            _ => Vec::new(),
        }
    }

    /// Takes the prompts out.
    pub fn take_inputs(&mut self, name: &str) -> Vec<Input> {
        match self.0.remove(name) {
            Some(Given::Inputs(i)) => i,
            _ => Vec::new(),
        }
    }

    /// Takes token ids out.
    pub fn take_ids(&mut self, name: &str) -> Vec<u32> {
        match self.0.remove(name) {
            Some(Given::Ids(i)) => i,
            _ => Vec::new(),
        }
    }

    /// An object or a list of objects.
    pub fn json(&self, name: &str) -> Option<&Value> {
        match self.0.get(name) {
            Some(Given::Json(v)) => Some(v),
            _ => None,
        }
    }

    /// Token ids and what is added to their logits.
    pub fn bias(&self, name: &str) -> Vec<(u32, f32)> {
        match self.0.get(name) {
            Some(Given::Bias(b)) => b.clone(),
            _ => Vec::new(),
        }
    }
}

/// Reads the body of a request. Fields that the table does not know are returned, and otherwise ignored.
///
/// # Errors
/// No JSON object, or a field with a value it does not take.
pub fn read(endpoint: Endpoint, body: &[u8], bounds: &Bounds) -> Result<(Values, Vec<String>)> {
    let count = body.iter().filter(|b| **b == b',').count();
    if count > MAX_VALUES && !mostly_text(body) {
        return Err(Error::invalid(format!("the body has about {count} values, more than the {MAX_VALUES} taken")));
    }
    let parsed = serde_json::from_slice(body).map_err(|e| Error::invalid(format!("the body is not JSON: {e}")))?;
    let Value::Object(mut object) = parsed else {
        return Err(Error::invalid("the body must be a JSON object"));
    };
    let mut values = Values::default();
    for field in FIELDS.iter().filter(|f| f.on.contains(&endpoint)) {
        if let Some(given) = one(field, &mut object, bounds)? {
            values.0.insert(field.name, given);
        }
    }
    let unknown = object.into_iter().filter(|(_, v)| !v.is_null()).map(|(name, _)| shown(&name)).collect();
    Ok((values, unknown))
}

/// Whether the commas of `body` stand inside strings, by a count of those that do not.
fn mostly_text(body: &[u8]) -> bool {
    let (mut inside, mut escaped, mut outside) = (false, false, 0usize);
    for b in body {
        match b {
            _ if escaped => escaped = false,
            b'\\' if inside => escaped = true,
            b'"' => inside = !inside,
            b',' if !inside => outside += 1,
            _ => {}
        }
        if outside > MAX_VALUES {
            return false;
        }
    }
    true
}

/// The value of one field, taken out of `object`; two names of one field are an error.
fn one(field: &Field, object: &mut Map<String, Value>, bounds: &Bounds) -> Result<Option<Given>> {
    let mut found: Option<(&str, Value)> = None;
    for name in std::iter::once(&field.name).chain(field.aliases) {
        let Some(value) = object.remove(*name).filter(|v| !v.is_null()) else { continue };
        if let Some((first, before)) = &found
            && *before != value
        {
            return Err(Error::field(name, format!("it says otherwise than `{first}`, which is the same field")));
        }
        found = Some((name, value));
    }
    if let Some((name, value)) = found {
        return check(field.kind, name, value, bounds).map(Some);
    }
    Ok(match field.absent {
        Absent::Nothing(_) => None,
        Absent::Refused => {
            return Err(Error::field(field.name, format!("it is missing; it takes {}", takes(field.kind))));
        }
        Absent::Bool(b) => Some(Given::Bool(b)),
        Absent::Int(n) => Some(Given::Int(n)),
        Absent::Float(x) => Some(Given::Float(x)),
        Absent::Word(w) => Some(Given::Text(w.to_owned())),
    })
}

fn check(kind: Kind, name: &str, value: Value, bounds: &Bounds) -> Result<Given> {
    let given = match (kind, &value) {
        (Kind::Bool, Value::Bool(b)) => Some(Given::Bool(*b)),
        (Kind::Int { min, max }, Value::Number(_)) => {
            whole(&value).filter(|n| (min..=limit(max, bounds)).contains(n)).map(Given::Int)
        }
        (Kind::Float { min, max }, Value::Number(n)) => {
            n.as_f64().filter(|x| (min..=max).contains(x)).map(Given::Float)
        }
        (Kind::Text(bytes), Value::String(t)) => (t.len() <= bytes).then(|| Given::Text(t.clone())),
        (Kind::Choice(words), Value::String(t)) => words.contains(&t.as_str()).then(|| Given::Text(t.clone())),
        (Kind::Texts { items, bytes }, _) => texts(&value, items, bytes).map(Given::Texts),
        (Kind::Inputs { items }, _) => return inputs(name, value, items, bounds.vocab).map(Given::Inputs),
        (Kind::Ids, Value::Array(list)) => return ids(name, list, bounds.vocab).map(Given::Ids),
        (Kind::Messages { items }, Value::Array(list)) => return messages(name, list, items).map(Given::Json),
        (Kind::Object(bytes), Value::Object(_)) => fits(&value, bytes).then_some(Given::Json(value.clone())),
        (Kind::TextOrObject(bytes), Value::Object(_) | Value::String(_)) => {
            fits(&value, bytes).then_some(Given::Json(value.clone()))
        }
        (Kind::Objects { items, bytes }, Value::Array(list)) => {
            let all = list.len() <= items && list.iter().all(Value::is_object) && fits(&value, bytes);
            all.then_some(Given::Json(value.clone()))
        }
        (Kind::Bias { items, most }, Value::Object(map)) => bias(map, items, most, bounds.vocab).map(Given::Bias),
        _ => None,
    };
    given.ok_or_else(|| {
        let range = match kind {
            Kind::Int { min, max } if max != Most::Is(i64::MAX) => {
                format!("a whole number from {min} to {}", limit(max, bounds))
            }
            _ => takes(kind),
        };
        Error::field(name, format!("it is {}, but it takes {range}", describe(&value)))
    })
}

fn limit(max: Most, bounds: &Bounds) -> i64 {
    match max {
        Most::Is(n) => n,
        Most::Context => bounds.context as i64,
        Most::Layer => bounds.layers as i64 - 1,
    }
}

/// A whole number, also one that is written with a point.
fn whole(value: &Value) -> Option<i64> {
    let exact = |x: &f64| x.fract() == 0.0 && x.abs() < 9e15;
    value.as_i64().or_else(|| value.as_f64().filter(exact).map(|x| x as i64))
}

fn fits(value: &Value, bytes: usize) -> bool {
    value.to_string().len() <= bytes
}

fn texts(value: &Value, items: usize, bytes: usize) -> Option<Vec<String>> {
    let list: Vec<&str> = match value {
        Value::String(t) => vec![t],
        Value::Array(list) if list.len() <= items => list.iter().map(Value::as_str).collect::<Option<_>>()?,
        _ => return None,
    };
    list.iter().all(|t| (1..=bytes).contains(&t.len())).then(|| list.into_iter().map(str::to_owned).collect())
}

fn inputs(name: &str, value: Value, items: usize, vocab: usize) -> Result<Vec<Input>> {
    let wrong = |v: &Value| {
        Error::field(name, format!("it is {}, but it takes {}", describe(v), takes(Kind::Inputs { items })))
    };
    let Value::Array(list) = value else {
        return match value {
            Value::String(t) => Ok(vec![Input::Text(t)]),
            other => Err(wrong(&other)),
        };
    };
    if list.is_empty() {
        return Err(Error::field(name, "the list is empty"));
    }
    if list[0].is_number() {
        return Ok(vec![Input::Ids(ids(name, &list, vocab)?)]);
    }
    if list.len() > items {
        return Err(Error::field(name, format!("{} prompts, more than the {items} of one request", list.len())));
    }
    let each = |v: Value| match v {
        Value::String(t) => Ok(Input::Text(t)),
        Value::Array(list) if !list.is_empty() => Ok(Input::Ids(ids(name, &list, vocab)?)),
        other => Err(wrong(&other)),
    };
    list.into_iter().map(each).collect()
}

fn ids(name: &str, list: &[Value], vocab: usize) -> Result<Vec<u32>> {
    let id = |v: &Value| v.as_u64().filter(|id| *id < vocab as u64).map(|id| id as u32);
    let all = list.iter().map(|v| {
        id(v).ok_or_else(|| {
            Error::field(name, format!("{} among token ids, which go from 0 to {}", describe(v), vocab - 1))
        })
    });
    all.collect()
}

/// Messages with their contents as texts: lists of parts are joined.
fn messages(name: &str, list: &[Value], items: usize) -> Result<Value> {
    if !(1..=items).contains(&list.len()) {
        return Err(Error::field(name, format!("{} messages, allowed are 1 to {items}", list.len())));
    }
    let one = |(i, value): (usize, &Value)| {
        let at = format!("{name}[{i}]");
        let Value::Object(message) = value else {
            return Err(Error::field(&at, format!("it is {}, but a message is an object", describe(value))));
        };
        if !message.get("role").is_some_and(|r| r.as_str().is_some_and(|r| (1..=64).contains(&r.len()))) {
            return Err(Error::field(&at, "`role` must be a text such as user, assistant, system or tool"));
        }
        let mut message = message.clone();
        let text = content(message.get("content")).map_err(|problem| Error::field(&at, problem))?;
        message.insert("content".into(), Value::String(text));
        Ok(Value::Object(message))
    };
    Ok(Value::Array(list.iter().enumerate().map(one).collect::<Result<_>>()?))
}

fn content(value: Option<&Value>) -> Result<String, String> {
    match value {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(t)) => Ok(t.clone()),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| match (part.get("type").and_then(Value::as_str), part.get("text")) {
                (Some("text"), Some(Value::String(t))) => Ok(t.clone()),
                (kind, _) => Err(format!(
                    "a part of type {:?}; this server reads parts of type text",
                    shown(kind.unwrap_or("none"))
                )),
            };
            parts.iter().map(text).collect()
        }
        Some(other) => Err(format!("`content` is {}, but it takes a text or a list of parts", describe(other))),
    }
}

fn bias(map: &Map<String, Value>, items: usize, most: f64, vocab: usize) -> Option<Vec<(u32, f32)>> {
    let one = |(id, value): (&String, &Value)| {
        let id = id.parse::<u32>().ok().filter(|id| (*id as usize) < vocab)?;
        Some((id, value.as_f64().filter(|x| x.abs() <= most)? as f32))
    };
    (map.len() <= items).then(|| map.iter().map(one).collect())?
}

/// A value in a few words.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => shown(&n.to_string()),
        Value::String(t) if t.is_empty() => "an empty text".into(),
        Value::String(t) => format!("a text of {} bytes", t.len()),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(map) => format!("an object of {}", map.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { context: 100, layers: 4, vocab: 50 };

    fn completion(body: &str) -> Result<(Values, Vec<String>)> {
        read(Endpoint::Completions, body.as_bytes(), &BOUNDS)
    }

    #[test]
    fn all_four_forms_of_a_prompt() {
        let prompts = |body: &str| completion(body).expect("valid").0.take_inputs("prompt");
        assert_eq!(prompts(r#"{"prompt": "a"}"#), [Input::Text("a".into())]);
        assert_eq!(prompts(r#"{"prompt": ["a", "b"]}"#), [Input::Text("a".into()), Input::Text("b".into())]);
        assert_eq!(prompts(r#"{"prompt": [1, 2]}"#), [Input::Ids(vec![1, 2])]);
        assert_eq!(prompts(r#"{"prompt": [[1], [2, 3]]}"#), [Input::Ids(vec![1]), Input::Ids(vec![2, 3])]);
        for bad in ["[]", "[[]]", "[1, 50]", "[1, -1]", "[1.5]", "7", "{}", "[\"a\", [1], 3]", "[null]"] {
            let e = completion(&format!(r#"{{"prompt": {bad}}}"#)).expect_err(bad);
            assert_eq!((e.status.as_u16(), e.param.as_deref()), (400, Some("prompt")), "{bad}: {e}");
        }
    }

    #[test]
    fn defaults_aliases_and_unknown_fields() {
        let body = r#"{"prompt": "a", "max_completion_tokens": 7, "seed": null, "temperature": 0, "what": 1, "nothing": null}"#;
        let (values, unknown) = completion(body).expect("valid");
        assert_eq!((values.count("max_tokens"), values.int("seed")), (Some(7), None));
        assert_eq!((values.float("temperature"), values.float("top_p"), values.int("n")), (0.0, 1.0, Some(1)));
        assert_eq!(unknown, ["what"]);
        let two = completion(r#"{"prompt": "a", "max_tokens": 1, "n_predict": 2}"#).expect_err("contradiction");
        assert!(two.message.contains("max_tokens") && two.message.contains("n_predict"), "{two}");
    }

    #[test]
    fn messages_name_field_value_and_range() {
        let e = completion(r#"{"prompt": "a", "max_tokens": 101}"#).expect_err("too many");
        assert_eq!(e.message, "`max_tokens`: it is 101, but it takes a whole number from 0 to 100");
        let e = completion(r#"{"prompt": "a", "activity_layer": 4}"#).expect_err("no such layer");
        assert!(e.message.ends_with("from 0 to 3"), "{e}");
        let e = completion(r#"{"prompt": "a", "temperature": 1e308}"#).expect_err("too large");
        assert!(e.message.contains("temperature") && e.message.contains("from 0 to 100"), "{e}");
    }

    #[test]
    fn parts_become_one_text() {
        let body = br#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": []}]}"#;
        let (values, _) = read(Endpoint::Chat, body, &BOUNDS).expect("valid");
        let messages = values.json("messages").expect("given");
        assert_eq!((&messages[0]["content"], &messages[1]["content"]), (&Value::from("ab"), &Value::from("")));
        for bad in [r#"[]"#, r#"[{}]"#, r#"["a"]"#, r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#] {
            let body = format!(r#"{{"messages": {bad}}}"#);
            assert!(read(Endpoint::Chat, body.as_bytes(), &BOUNDS).is_err(), "{bad}");
        }
    }

    #[test]
    fn lists_of_millions_are_refused_before_they_are_read() {
        let body = format!("{{\"prompt\": [{}1]}}", "1,".repeat(MAX_VALUES + 1));
        assert!(completion(&body).expect_err("too many").message.contains("values"));
        let text = format!("{{\"prompt\": \"{}\"}}", ",".repeat(MAX_VALUES + 1));
        assert!(completion(&text).is_ok(), "commas in a text are text");
    }

    #[test]
    fn every_name_stands_once_per_endpoint() {
        for endpoint in Endpoint::ALL {
            let fields = FIELDS.iter().filter(|f| f.on.contains(&endpoint));
            let mut names: Vec<_> = fields.flat_map(|f| std::iter::once(&f.name).chain(f.aliases)).collect();
            names.sort_unstable();
            assert!(names.windows(2).all(|w| w[0] != w[1]), "{endpoint:?}: {names:?}");
        }
    }
}
