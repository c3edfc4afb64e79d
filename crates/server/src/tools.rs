//! Tools: what a request offers, how the model is told, and the calls in its answer.
//!
//! Models write calls in the style they were trained on. A template that knows `tools` teaches its own style; for the
//! others [`Tools::told`] puts the tools into the instructions and asks for one JSON object. Answers are read in all
//! styles, whichever was taught, for small models mix them up:
//!
//! | style | what the answer holds |
//! |---|---|
//! | Hermes, Qwen | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, text before |
//! | Mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` |
//! | Llama 3 | `{"name": ..., "parameters": {...}}` as the whole answer, several with `;` between |
//! | generic | `{"tool_calls": [{"name": ..., "arguments": {...}}, ...]}` or one call as the whole answer |
//!
//! A JSON answer that names no offered tool is text.

mod stream;

use crate::constraint::Form;
use serde_json::{Map, Value, json};
use stream::{After, Scan};

/// Longest call that is held back in an answer, in bytes; a longer one is text.
const LONGEST: usize = 1 << 20;
/// What opens a call inside a text.
const OPEN: &str = "<tool_call>";
/// What closes it.
const CLOSE: &str = "</tool_call>";
/// What opens a list of calls.
const LIST: &str = "[TOOL_CALLS]";

/// What the answer may do with the tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The model decides.
    Auto,
    /// It must call one of them.
    Required,
    /// It must call this one.
    Function(String),
}

/// The tools that a request offers.
#[derive(Clone, Debug, PartialEq)]
pub struct Tools {
    /// As the request gave them, for templates.
    pub list: Vec<Value>,
    /// What may be done with them.
    pub choice: Choice,
}

impl Tools {
    /// Reads the fields `tools` and `tool_choice`; none where nothing is offered, or `tool_choice` is `none`.
    ///
    /// # Errors
    /// The field that is wrong, and how.
    pub fn read(tools: Option<&Value>, choice: Option<&Value>) -> Result<Option<Self>, (&'static str, String)> {
        let list: Vec<Value> = match tools {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list.clone(),
            Some(_) => return Err(("tools", "takes a list".into())),
        };
        for (i, tool) in list.iter().enumerate() {
            let function = &tool["function"];
            let named = function["name"].as_str().is_some_and(|n| !n.is_empty() && n.len() <= 256);
            if tool["type"] != "function" || !named {
                let form = "`{\"type\": \"function\", \"function\": {\"name\": ...}}` is known";
                return Err(("tools", format!("entry {i}: only {form}")));
            }
            if !matches!(function.get("parameters"), None | Some(Value::Null | Value::Object(_))) {
                return Err(("tools", format!("entry {i}: `parameters` must be a schema")));
            }
        }
        let wrong = || Err(("tool_choice", "is one of none, auto, required, or a function of `tools`".to_owned()));
        let choice = match choice {
            None | Some(Value::Null) => Choice::Auto,
            Some(Value::String(s)) => match s.as_str() {
                "none" => return Ok(None),
                "auto" => Choice::Auto,
                "required" => Choice::Required,
                _ => return wrong(),
            },
            Some(value) => match value["function"]["name"].as_str() {
                Some(name) => Choice::Function(name.to_owned()),
                None => return wrong(),
            },
        };
        let tools = Self { list, choice };
        match &tools.choice {
            Choice::Required if tools.list.is_empty() => wrong(),
            Choice::Function(name) if !tools.names().any(|n| n == name) => wrong(),
            _ => Ok((!tools.list.is_empty()).then_some(tools)),
        }
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.list.iter().filter_map(|t| t["function"]["name"].as_str())
    }

    /// The form that a forced call has: one JSON object with `name` and `arguments`.
    pub fn form(&self) -> Option<Form> {
        let allowed = |name: &str| match &self.choice {
            Choice::Auto => false,
            Choice::Required => true,
            Choice::Function(wanted) => wanted == name,
        };
        let one = |tool: &Value| {
            let function = &tool["function"];
            let parameters = match &function["parameters"] {
                Value::Object(schema) => Value::Object(schema.clone()),
                _ => json!({"type": "object"}),
            };
            json!({
                "type": "object",
                "properties": { "name": { "const": function["name"] }, "arguments": parameters },
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        };
        let wanted = self.list.iter().filter(|t| t["function"]["name"].as_str().is_some_and(allowed));
        let mut forms: Vec<Value> = wanted.map(one).collect();
        let schema = match forms.len() {
            0 => return None,
            1 => forms.remove(0),
            _ => json!({ "anyOf": forms }),
        };
        Some(Form::Schema { schema, strict: false })
    }

    /// The instructions for a model whose template knows no tools.
    fn instructions(&self) -> String {
        let mut text = String::from("You can call these functions:\n");
        for tool in &self.list {
            text += &tool["function"].to_string();
            text.push('\n');
        }
        text + "To call one, answer with nothing but a JSON object of this form: \
                {\"name\": \"the function\", \"arguments\": {...}}. Otherwise answer in words."
    }

    /// `messages` for a template that knows no tools: the tools go into the instructions, earlier calls and their
    /// results become text.
    pub fn told(&self, messages: &Value) -> Value {
        let mut out: Vec<Value> = Vec::new();
        let mut said = false;
        for message in messages.as_array().into_iter().flatten() {
            let content = message["content"].as_str().unwrap_or("");
            match message["role"].as_str() {
                Some("system" | "developer") if !said => {
                    said = true;
                    out.push(json!({"role": "system", "content": format!("{content}\n\n{}", self.instructions())}));
                }
                Some("tool") => {
                    let name = message["name"].as_str().map_or(String::new(), |n| format!(" of {n}"));
                    out.push(json!({"role": "user", "content": format!("The result{name}: {content}")}));
                }
                Some("assistant") if message["tool_calls"].is_array() => {
                    let calls = message["tool_calls"].as_array().into_iter().flatten().map(|c| {
                        let f = &c["function"];
                        json!({"name": f["name"], "arguments": opened(&f["arguments"])}).to_string()
                    });
                    let text: Vec<String> =
                        std::iter::once(content.to_owned()).filter(|c| !c.is_empty()).chain(calls).collect();
                    out.push(json!({"role": "assistant", "content": text.join("\n")}));
                }
                _ => out.push(message.clone()),
            }
        }
        if !said {
            out.insert(0, json!({"role": "system", "content": self.instructions()}));
        }
        Value::Array(out)
    }
}

/// `messages` as templates that know tools want them: the arguments of earlier calls are objects there, while clients send
/// their JSON as a string; a missing content is empty.
pub fn for_template(messages: &Value) -> Value {
    let mut messages = messages.clone();
    for message in messages.as_array_mut().into_iter().flatten() {
        let Some(object) = message.as_object_mut() else { continue };
        for call in object.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) {
                let arguments = function.get("arguments").map_or_else(|| json!({}), opened);
                function.insert("arguments".into(), arguments);
            }
        }
        if object.get("content").is_none_or(Value::is_null) {
            object.insert("content".into(), Value::String(String::new()));
        }
    }
    messages
}

/// The value of a JSON text; the text where it is none.
fn opened(arguments: &Value) -> Value {
    match arguments.as_str() {
        Some(text) => serde_json::from_str(text).unwrap_or_else(|_| arguments.clone()),
        None => arguments.clone(),
    }
}

/// Whether a template does something with `tools`.
pub fn template_knows(source: &str) -> bool {
    source.contains("tools")
}

/// A call of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The function.
    pub name: String,
    /// Its arguments, JSON as text.
    pub arguments: String,
}

impl Call {
    /// The object of OpenAI's answers; `id` is unique in the conversation, `index` counts the calls of the answer.
    pub fn to_json(&self, id: &str, index: Option<usize>) -> Value {
        let mut call = Map::new();
        if let Some(index) = index {
            call.insert("index".into(), index.into());
        }
        call.insert("id".into(), id.into());
        call.insert("type".into(), "function".into());
        call.insert("function".into(), json!({ "name": self.name, "arguments": self.arguments }));
        Value::Object(call)
    }
}

/// What an answer says next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// Text for the user.
    Text(String),
    /// A call of this function begins.
    Begin(String),
    /// A part of the JSON of its arguments.
    Arguments(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Nothing but white space has come.
    Start,
    /// Text, perhaps with a call in tags.
    Text,
    /// Inside tags.
    Tagged,
    /// The whole answer is JSON, perhaps calls.
    Json,
    /// In the arguments of a call, which are told as they come.
    Arguments { tagged: bool, scan: Scan },
    /// Behind them, where the objects and lists around the call close.
    Closing { tagged: bool, scan: Scan },
}

/// Finds the calls in an answer that comes piece by piece. What cannot be told from the beginning of a call yet is held
/// back. A call in one of the usual orders (the name, then the arguments) is told while it is written, and then stays a
/// call, whatever follows; others are told when they are complete.
#[derive(Debug)]
pub struct Reader {
    names: Vec<String>,
    mode: Mode,
    held: String,
    calls: usize,
}

impl Reader {
    /// A reader that knows the offered functions.
    pub fn new(tools: &Tools) -> Self {
        Self { names: tools.names().map(str::to_owned).collect(), mode: Mode::Start, held: String::new(), calls: 0 }
    }

    /// Calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Takes a piece of the answer.
    pub fn push(&mut self, piece: &str) -> Vec<Delta> {
        self.held.push_str(piece);
        let mut out = Vec::new();
        while self.step(&mut out) {}
        out
    }

    /// The end of the answer: what was held back is a call or text.
    pub fn finish(&mut self) -> Vec<Delta> {
        let mut out = Vec::new();
        while self.step(&mut out) {}
        let held = std::mem::take(&mut self.held);
        match self.mode {
            Mode::Tagged => match self.read(&held) {
                Some(calls) => self.emit(calls, &mut out),
                None => text(format!("{OPEN}{held}"), &mut out),
            },
            Mode::Json => match self.read(held.trim_start().trim_start_matches(LIST)) {
                Some(calls) => self.emit(calls, &mut out),
                None => text(held, &mut out),
            },
            Mode::Arguments { .. } | Mode::Closing { .. } => {}
            // White space behind the last call belongs to nobody.
            Mode::Start | Mode::Text if self.calls > 0 && held.trim().is_empty() => {}
            Mode::Start | Mode::Text => text(held, &mut out),
        }
        out
    }

    /// One decision; false when more text is needed for the next.
    fn step(&mut self, out: &mut Vec<Delta>) -> bool {
        let mode = self.mode;
        match mode {
            Mode::Start => {
                let start = self.held.trim_start();
                let json = start.starts_with(['{', '[']);
                match start {
                    "" => return false,
                    _ => self.mode = if json { Mode::Json } else { Mode::Text },
                }
                true
            }
            Mode::Text => {
                if let Some(at) = self.held.find(OPEN) {
                    let after = self.held.split_off(at + OPEN.len());
                    self.held.truncate(at);
                    // Templates put a line break between words and a call.
                    text(self.held.trim_end().to_owned(), out);
                    self.held = after;
                    self.mode = Mode::Tagged;
                    return true;
                }
                let keep = open_end(&self.held);
                let rest = self.held.split_off(self.held.len() - keep);
                text(std::mem::replace(&mut self.held, rest), out);
                false
            }
            Mode::Tagged | Mode::Json if self.begin(out) => true,
            Mode::Arguments { tagged, scan } => self.arguments(tagged, scan, out),
            Mode::Closing { tagged, scan } => self.closing(tagged, scan),
            Mode::Tagged => {
                let Some(at) = self.held.find(CLOSE) else {
                    return self.give_up(OPEN, out);
                };
                let after = self.held.split_off(at + CLOSE.len());
                self.held.truncate(at);
                let inside = std::mem::replace(&mut self.held, after);
                match self.read(&inside) {
                    Some(calls) => {
                        self.emit(calls, out);
                        self.held.drain(..self.held.len() - self.held.trim_start().len());
                    }
                    None => text(format!("{OPEN}{inside}{CLOSE}"), out),
                }
                self.mode = Mode::Text;
                true
            }
            Mode::Json => {
                // A whole answer in JSON can be told from calls by its first key.
                let start = self.held.trim_start();
                let start = start.strip_prefix(LIST).unwrap_or(start).trim_start();
                if hopeless(start) {
                    self.mode = Mode::Text;
                    return true;
                }
                self.give_up("", out)
            }
        }
    }

    /// Whether what is held back begins a call of an offered function; its arguments stay held.
    fn begin(&mut self, out: &mut Vec<Delta>) -> bool {
        let Some(begun) = stream::begun(&self.held) else { return false };
        if !self.names.contains(&begun.name) {
            return false;
        }
        let scan = Scan::behind(begun.open);
        self.mode = Mode::Arguments { tagged: self.mode == Mode::Tagged, scan };
        self.held.drain(..begun.at);
        self.calls += 1;
        out.push(Delta::Begin(begun.name));
        true
    }

    /// Tells the arguments that are there, without the white space between them.
    fn arguments(&mut self, tagged: bool, mut scan: Scan, out: &mut Vec<Delta>) -> bool {
        let (piece, rest) = scan.object(&self.held);
        self.held.drain(..rest);
        if !piece.is_empty() {
            out.push(Delta::Arguments(piece));
        }
        let done = scan.is_done();
        self.mode = if done { Mode::Closing { tagged, scan } } else { Mode::Arguments { tagged, scan } };
        done
    }

    /// Skips what closes around a call, up to the next call or text.
    fn closing(&mut self, tagged: bool, mut scan: Scan) -> bool {
        let end = if tagged { CLOSE } else { "" };
        let (skipped, next) = scan.rest(&self.held, end);
        self.held.drain(..skipped);
        self.mode = match next {
            After::Nothing => Mode::Closing { tagged, scan },
            After::Object if tagged => Mode::Tagged,
            After::Object => Mode::Json,
            After::End => {
                self.held.drain(..end.len());
                self.held.drain(..self.held.len() - self.held.trim_start().len());
                Mode::Text
            }
            After::Words => Mode::Text,
        };
        next != After::Nothing
    }

    /// Holds a call back only up to [`LONGEST`] bytes.
    fn give_up(&mut self, before: &str, out: &mut Vec<Delta>) -> bool {
        if self.held.len() <= LONGEST {
            return false;
        }
        text(format!("{before}{}", std::mem::take(&mut self.held)), out);
        self.mode = Mode::Text;
        true
    }

    fn emit(&mut self, calls: Vec<Call>, out: &mut Vec<Delta>) {
        self.calls += calls.len();
        out.extend(calls.into_iter().flat_map(|c| [Delta::Begin(c.name), Delta::Arguments(c.arguments)]));
    }

    /// The calls of a JSON text; none if it is something else.
    fn read(&self, json: &str) -> Option<Vec<Call>> {
        let mut calls = Vec::new();
        let mut rest = json.trim();
        while !rest.is_empty() {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            let value = values.next()?.ok()?;
            rest = rest[values.byte_offset()..].trim_start_matches(|c: char| c == ';' || c.is_whitespace());
            match value {
                Value::Array(list) => calls.extend(list.iter().map(|v| self.call(v)).collect::<Option<Vec<_>>>()?),
                Value::Object(ref o) if o.contains_key("tool_calls") => {
                    let list = o["tool_calls"].as_array()?;
                    calls.extend(list.iter().map(|v| self.call(v)).collect::<Option<Vec<_>>>()?);
                }
                value => calls.push(self.call(&value)?),
            }
        }
        (!calls.is_empty()).then_some(calls)
    }

    fn call(&self, value: &Value) -> Option<Call> {
        let value = value.get("function").filter(|f| f.is_object()).unwrap_or(value);
        let name = value["name"].as_str().filter(|n| self.names.iter().any(|k| k == n))?;
        let arguments = value.get("arguments").or_else(|| value.get("parameters"));
        let arguments = match arguments {
            None | Some(Value::Null) => "{}".to_owned(),
            // Some models write the JSON as a string already.
            Some(Value::String(s)) if serde_json::from_str::<serde::de::IgnoredAny>(s).is_ok() => s.clone(),
            Some(Value::Object(o)) => Value::Object(o.clone()).to_string(),
            Some(_) => return None,
        };
        Some(Call { name: name.to_owned(), arguments })
    }
}

fn text(text: String, out: &mut Vec<Delta>) {
    if !text.is_empty() {
        out.push(Delta::Text(text));
    }
}

/// Bytes at the end of `text` that may begin [`OPEN`], with the white space before them.
fn open_end(text: &str) -> usize {
    let tag = (1..OPEN.len()).rev().find(|&n| text.ends_with(&OPEN[..n])).unwrap_or(0);
    let before = &text[..text.len() - tag];
    tag + before.len() - before.trim_end().len()
}

/// Whether a JSON text cannot become a call: its first key is none of a call's.
fn hopeless(json: &str) -> bool {
    // A list of calls holds an object; a list of something else is text.
    let inner = json.trim_start_matches('[').trim_start();
    let Some(object) = inner.strip_prefix('{') else {
        let begun = LIST.starts_with(json) || inner.is_empty();
        return !begun;
    };
    let Some(key) = object.trim_start().strip_prefix('"') else { return !object.trim_start().is_empty() };
    const KEYS: [&str; 7] = ["name", "arguments", "parameters", "tool_calls", "type", "function", "id"];
    match key.split_once('"') {
        Some((key, _)) => !KEYS.contains(&key),
        None => !KEYS.iter().any(|k| k.starts_with(key)),
    }
}

#[cfg(test)]
#[path = "tools_tests.rs"]
mod tests;
