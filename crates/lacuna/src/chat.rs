//! Chat templates: a model's own Jinja program turns a conversation into the text it was trained on.
//!
//! Templates come with the weights, so they are untrusted: they run without access to anything outside, with a budget
//! of instructions and caps on their own size, on what one repetition or range makes (minijinja: 100 MB and 100,000
//! numbers) and on what they write. What that does not cap is how often a template doubles a string inside its budget: a
//! program that opens models of strangers renders in a [`Worker`], as `lacuna chat` and `lacuna serve` do.

mod worker;

pub use worker::{Worker, work};

use crate::{
    error::{Error, Result},
    tokenizer::Tokenizer,
};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};
use std::{
    io,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// Instructions that one rendering may take.
const FUEL: u64 = 500_000;
/// Longest template, in bytes.
const MAX_TEMPLATE: usize = 1 << 20;
/// Longest rendered prompt, in bytes.
const MAX_OUTPUT: usize = 16 << 20;

/// ChatML, for models that bring no template.
const FALLBACK: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + \
                        '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template.
pub struct ChatTemplate {
    rendering: Rendering,
    text: String,
    source: String,
    fallback: bool,
    bos: String,
    eos: String,
}

/// Where a template runs.
enum Rendering {
    /// In this process.
    Here(Box<Environment<'static>>),
    /// In a process of its own.
    Apart(Arc<Worker>),
}

impl ChatTemplate {
    /// The template of `tokenizer`'s model; ChatML with a note in the log where it has none.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn of(tokenizer: &Tokenizer, worker: Option<Arc<Worker>>) -> Result<Self> {
        let literal = |id: Option<u32>| id.map(|id| tokenizer.literal(id)).unwrap_or_default();
        let bos = literal(tokenizer.special().bos);
        let eos = literal(tokenizer.special().eos.first().copied());
        match tokenizer.chat_template() {
            Some(text) => Self::new(text, bos, eos, tokenizer.source(), worker),
            None => {
                tracing::warn!(model = tokenizer.source(), "no chat template in the model: ChatML is used");
                Ok(Self { fallback: true, ..Self::new(FALLBACK, bos, eos, tokenizer.source(), worker)? })
            }
        }
    }

    /// Compiles `text`, in `worker` or in this process; `source` names the file in messages.
    ///
    /// # Errors
    /// A template that is too long or does not compile, or a worker that cannot be started.
    pub fn new(text: &str, bos: String, eos: String, source: &str, worker: Option<Arc<Worker>>) -> Result<Self> {
        let template =
            |rendering| Self { rendering, text: text.into(), source: source.into(), fallback: false, bos, eos };
        let error = |problem| Error::Template { file: source.into(), problem };
        if text.len() > MAX_TEMPLATE {
            return Err(error(format!("{} bytes, more than the {MAX_TEMPLATE} allowed", text.len())));
        }
        if let Some(worker) = worker {
            let template = template(Rendering::Apart(worker.clone()));
            template.ask(&worker, None::<&()>, &(), false)?;
            return Ok(template);
        }
        let mut env = environment();
        env.add_template_owned("chat", text.to_owned()).map_err(|e| error(describe(&e)))?;
        Ok(template(Rendering::Here(Box::new(env))))
    }

    fn error(&self, problem: String) -> Error {
        Error::Template { file: self.source.clone(), problem }
    }

    /// Whether the model had no template.
    pub fn is_fallback(&self) -> bool {
        self.fallback
    }

    /// The prompt for `messages`; with `answer`, up to where the assistant's turn begins.
    ///
    /// # Errors
    /// The template refuses the conversation (`raise_exception`), fails, runs out of its budget or writes too much.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        self.render_with(&messages, &(), answer)
    }

    /// [`ChatTemplate::render`] of messages that hold more than texts (calls of functions, their results), with the
    /// functions that may be called.
    ///
    /// # Errors
    /// As there.
    pub fn render_with(&self, messages: &impl Serialize, tools: &impl Serialize, answer: bool) -> Result<String> {
        let env = match &self.rendering {
            Rendering::Here(env) => env,
            Rendering::Apart(worker) => return self.ask(worker, Some(messages), tools, answer),
        };
        let template = env.get_template("chat").map_err(|e| self.error(describe(&e)))?;
        let values = context! {
            messages => Value::from_serialize(messages),
            add_generation_prompt => answer,
            bos_token => self.bos,
            eos_token => self.eos,
            tools => Value::from_serialize(tools),
        };
        let mut out = Capped(Vec::new());
        match template.render_captured_to(values, &mut out) {
            Ok(_) => String::from_utf8(out.0).map_err(|e| self.error(e.to_string())),
            Err(e) if e.kind() == ErrorKind::OutOfFuel => {
                Err(self.error(format!("it needs more than {FUEL} instructions; the template is damaged or hostile")))
            }
            Err(e) => Err(self.error(describe(&e))),
        }
    }

    /// What `worker` makes of the template: nothing but a check without `messages`.
    fn ask(
        &self,
        worker: &Worker,
        messages: Option<&impl Serialize>,
        tools: &impl Serialize,
        answer: bool,
    ) -> Result<String> {
        let (template, bos, eos) = (&self.text[..], &self.bos[..], &self.eos[..]);
        worker.ask(&worker::Request { template, bos, eos, messages, tools, answer }).map_err(|e| self.error(e))
    }

    /// Ids of the prompt. The template writes BOS itself where the model wants one; where it does not, the tokenizer's
    /// own rule adds it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode`].
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Message], answer: bool) -> Result<Vec<u32>> {
        self.ids(tokenizer, &self.render(messages, answer)?)
    }

    /// Ids of a prompt that [`ChatTemplate::render_with`] has made.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn ids(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        let has_bos = !self.bos.is_empty() && text.starts_with(&self.bos);
        tokenizer.encode(text, !has_bos)
    }
}

/// A writer that refuses more than [`MAX_OUTPUT`] bytes.
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_OUTPUT - self.0.len() {
            return Err(io::Error::other(format!("the template writes more than {MAX_OUTPUT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The environment that `transformers` gives templates: trimmed blocks, Python's string and list methods,
/// `raise_exception`, `strftime_now`, and a `tojson` that does not escape for HTML.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(64);
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", |format: &str| strftime(format, now()));
    env.add_filter("tojson", tojson);
    env
}

/// JSON as `json.dumps(value, ensure_ascii=False, indent=indent)` writes it.
fn tojson(value: Value, kwargs: minijinja::value::Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    kwargs.assert_all_used()?;
    let fail = |e: serde_json::Error| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string());
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = vec![b' '; n.min(16)];
            let format = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, format)).map_err(fail)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonJson)).map_err(fail)?,
    }
    String::from_utf8(out).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// One line with Python's separators `, ` and `: `.
struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

/// Longest problem that is told, in characters: `raise_exception` takes texts of any length.
const MAX_PROBLEM: usize = 2000;

/// Message of an error with its cause and line.
fn describe(e: &minijinja::Error) -> String {
    let mut text = e.to_string();
    let mut cause = std::error::Error::source(e);
    while let Some(c) = cause {
        text.push_str(": ");
        text.push_str(&c.to_string());
        cause = c.source();
    }
    if let Some((end, _)) = text.char_indices().nth(MAX_PROBLEM) {
        text.replace_range(end.., "...");
    }
    text
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The date of a day since 1970-01-01 (H. Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`).
fn civil(days: u64) -> (u64, usize, u64) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month as usize, doy - (153 * mp + 2) / 5 + 1)
}

/// `strftime` in UTC for the letters that chat templates use; others stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{:02}", second / 3600)),
            Some('M') => out.push_str(&format!("{:02}", second / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> ChatTemplate {
        ChatTemplate::new(text, "<s>".into(), "</s>".into(), "x.json", None).expect("a template that compiles")
    }

    fn turns() -> Vec<Message> {
        vec![Message::new("system", " Be brief. "), Message::new("user", "Hi <b>"), Message::new("assistant", "Ho")]
    }

    #[test]
    fn llama3_style_template_with_python_methods() {
        let text = "{{- bos_token }}\n{%- for m in messages %}\n    {{- '<' + m['role'].upper() + '>' + \
                    m['content'].strip() + '|' }}\n{%- endfor %}\n{%- if add_generation_prompt %}{{ '<A>' }}{%- endif %}\n\
                    {%- if not tools is defined or tools is none %}{{ eos_token }}{% endif %}";
        assert_eq!(
            template(text).render(&turns(), true).expect("renders"),
            "<s><SYSTEM>Be brief.|<USER>Hi <b>|<ASSISTANT>Ho|<A></s>"
        );
    }

    #[test]
    fn json_is_python_json() {
        let t = template("{{ messages[1] | tojson }}");
        assert_eq!(t.render(&turns(), false).expect("renders"), r#"{"role": "user", "content": "Hi <b>"}"#);
    }

    #[test]
    fn the_fallback_is_chatml() {
        let t = template(FALLBACK);
        let text = t.render(&turns()[1..], true).expect("renders");
        assert_eq!(
            text,
            "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn hostile_templates_end_in_errors() {
        let cases = [
            ("{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}", "instructions"),
            ("{{ 'a' * 90000000 }}", "writes more than"),
            ("{{ 'a' * 9000000000 }}", "too large"),
            ("{{ 'a' * 10 ** 9 }}", "too large"),
            ("{{ ('a' * 90000000) * 90000000 }}", "too large"),
            ("{{ range(10 ** 9) | list | length }}", "range"),
            ("{% for a in 'a' * 90000000 %}{% endfor %}", "instructions"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% include 'other' %}", "other"),
            ("{{ messages[0].content.nothing() }}", "nothing"),
        ];
        for (text, wanted) in cases {
            let message = template(text).render(&turns(), true).expect_err(text).to_string();
            assert!(message.contains(wanted) && message.starts_with("x.json"), "{text}: {message}");
        }
        let long = template("{{ raise_exception('\u{e4}' * 40000000) }}").render(&turns(), true).expect_err("raised");
        assert!(long.to_string().len() < 3 * MAX_PROBLEM);
        let new = |text: &str| ChatTemplate::new(text, String::new(), String::new(), "x.json", None).map(|_| ());
        assert!(new("{% for %}").is_err());
        assert!(new(&" ".repeat(MAX_TEMPLATE + 1)).is_err());
        assert!(new(&"{% if 1 %}".repeat(10_000)).is_err());
        assert!(new(&format!("{{{{ {}1 }}}}", "(".repeat(100_000))).is_err());
    }

    #[test]
    fn dates() {
        assert_eq!(
            strftime("%Y-%m-%d %A %d %b %B %H:%M:%S %% %q", 0),
            "1970-01-01 Thursday 01 Jan January 00:00:00 % %q"
        );
        assert_eq!(strftime("%a %d %b %Y", 1_709_164_800), "Thu 29 Feb 2024");
        assert_eq!(strftime("%d %B %Y", 4_102_444_799), "31 December 2099");
    }
}
