//! Answers that must have a form: JSON, JSON of a schema, or a grammar. Once per token, llguidance says which tokens may
//! come next; the others lose their logits.
//!
//! A grammar comes from a stranger. It is compiled in a thread of its own with a limit on the wall clock, on its nesting
//! (the compiler recurses) and on what llguidance may build; a thread that outlives its limit is given up and counted,
//! and while too many of those still run, new grammars are refused. Masks have limits of their own, so that a grammar
//! cannot hold up the other requests of a batch.

use crate::gbnf;
use lacuna::tokenizer::Tokenizer;
use llguidance::{
    Matcher, ParserFactory, TokenParser,
    api::{ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId},
};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{RecvTimeoutError, sync_channel},
    },
    thread,
    time::Duration,
};

/// The byte that marks the name of a special token in llguidance's trie; no text has it.
const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
/// Stack of the compiling thread, in bytes: the compiler recurses once per level of nesting.
const STACK: usize = 64 << 20;
/// Spaces between the parts of a JSON answer: none, one, or a line break with an indentation. Without a limit a small
/// model may write white space for ever.
const WHITE_SPACE: &str = r" |\n[ ]{0,20}";

/// What a request may ask of its answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// Any JSON object (`response_format: {"type": "json_object"}`).
    JsonObject,
    /// JSON of a schema (`json_schema`).
    Schema {
        /// The schema.
        schema: Value,
        /// Keywords that cannot be enforced are errors; otherwise they are ignored.
        strict: bool,
    },
    /// A grammar: Lark as llguidance reads it, or GBNF (whatever has a `::=`).
    Grammar(String),
    /// A regular expression for the whole answer.
    Regex(String),
}

/// Limits on compiling; [`Default`] are the server's.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest schema or grammar, in bytes.
    pub bytes: usize,
    /// Deepest nesting of brackets.
    pub depth: usize,
    /// Longest compilation.
    pub time: Duration,
    /// Compilations at once, those given up included.
    pub running: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 256 << 10, depth: 64, time: Duration::from_secs(2), running: 4 }
    }
}

/// Why there is no constraint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The request is wrong (400); the text says how.
    #[error("{0}")]
    Invalid(String),
    /// Too many grammars are being compiled (503).
    #[error("{0} grammars are being compiled already; try again")]
    Busy(usize),
}

/// Whether the answer is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Tokens may follow.
    No,
    /// Nothing but the end of the text may follow.
    Yes,
}

/// A token that the grammar forbids, or a mask over its limits; the request ends, others go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the grammar cannot go on: {0}")]
pub struct Broken(String);

/// Compiles forms for one tokenizer; made once per server.
pub struct Grammars {
    factory: Arc<ParserFactory>,
    running: Arc<AtomicUsize>,
}

impl Grammars {
    /// Builds the trie of the vocabulary; `tokenizer` may come from `tokenizer.json` or from a GGUF file.
    ///
    /// # Errors
    /// The vocabulary is one that llguidance cannot use.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, Broken> {
        let broken = |e: &dyn std::fmt::Display| Broken(first_line(&e.to_string()));
        let env = trie(tokenizer);
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&env, InferenceCapabilities::default(), &slices).map_err(|e| broken(&e))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            // By llguidance's own figures (14,000 units of lexer fuel and 20,000 items per ms) several times as much would do, but
            // items of ambiguous grammars cost far more: 30,000 of those of `start: start start | /[a-z]/` took 280 ms. A row of
            // a large schema may have 2,000 items (`max_items_in_row`).
            step_lexer_fuel: 12_000,
            step_max_items: 2_000,
            max_lexer_states: 50_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory: Arc::new(factory), running: Arc::default() })
    }

    /// The constraint for `form`. Blocks for at most `limits.time`: call it where that does no harm.
    ///
    /// # Errors
    /// [`Refused::Invalid`] for a form that is too large, wrong, or not compiled in time; [`Refused::Busy`].
    pub fn compile(&self, form: &Form, limits: &Limits) -> Result<Constraint, Refused> {
        check(form, limits).map_err(Refused::Invalid)?;
        let before = self.running.fetch_add(1, Ordering::AcqRel);
        let guard = Running(Arc::clone(&self.running));
        if before >= limits.running {
            return Err(Refused::Busy(before));
        }
        let (send, receive) = sync_channel(1);
        let (factory, owned) = (Arc::clone(&self.factory), form.clone());
        let work = move || {
            let made = grammar(owned).and_then(|grammar| compile(&factory, grammar));
            drop(guard);
            // A receiver that is gone has given up waiting.
            let _ = send.send(made);
        };
        let thread = thread::Builder::new().name("grammar".into()).stack_size(STACK);
        thread.spawn(work).map_err(|e| Refused::Invalid(format!("no thread to compile the grammar: {e}")))?;
        let what = match form {
            Form::JsonObject | Form::Schema { .. } => "schema",
            Form::Grammar(_) => "grammar",
            Form::Regex(_) => "regex",
        };
        let wrong = |problem: String| Refused::Invalid(format!("the {what} cannot be used: {problem}"));
        match receive.recv_timeout(limits.time) {
            Ok(made) => made.map(|matcher| Constraint { matcher, stopped: false }).map_err(wrong),
            Err(RecvTimeoutError::Timeout) => Err(wrong(format!("compiling takes more than {:?}", limits.time))),
            Err(RecvTimeoutError::Disconnected) => Err(wrong("the compiler failed on it".into())),
        }
    }
}

/// Counts a compilation for as long as it lives.
struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Where one answer stands in its grammar.
pub struct Constraint {
    matcher: Matcher,
    stopped: bool,
}

impl Constraint {
    /// Sets the logit of every token that may not come next to minus infinity; once the answer is complete, of every
    /// token but those that end a text.
    ///
    /// # Errors
    /// The grammar is over its limits at this place.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), Broken> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|e| Broken(first_line(&e.to_string())))?;
        let known = allowed.len();
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= known || !allowed.get(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes the token that was drawn.
    ///
    /// # Errors
    /// The grammar does not allow it.
    pub fn accept(&mut self, token: u32) -> Result<Stopped, Broken> {
        if self.stopped {
            return Ok(Stopped::Yes);
        }
        self.matcher.consume_token(token).map_err(|e| Broken(first_line(&e.to_string())))?;
        self.stopped = self.matcher.is_stopped();
        Ok(if self.stopped { Stopped::Yes } else { Stopped::No })
    }
}

/// The vocabulary as llguidance sees it. Special tokens have names that no text has; where no token ends a text, one is
/// added behind the vocabulary, where no logit is.
fn trie(tokenizer: &Tokenizer) -> TokEnv {
    let pieces = tokenizer.pieces();
    let mut words: Vec<Vec<u8>> = (0..pieces.len() as u32)
        .map(|id| match pieces.bytes(id) {
            bytes if pieces.is_special(id) || tokenizer.is_eos(id) => [&[MARKER], bytes].concat(),
            // The marker is not UTF-8: a text token that starts with it has no place in a text.
            [MARKER, ..] => Vec::new(),
            bytes => bytes.to_vec(),
        })
        .collect();
    let mut ends: Vec<TokenId> =
        tokenizer.special().eos.iter().copied().filter(|&id| (id as usize) < words.len()).collect();
    if ends.is_empty() {
        ends.push(words.len() as u32);
        words.push([&[MARKER], &b"<end>"[..]].concat());
    }
    let info = TokRxInfo {
        vocab_size: words.len() as u32,
        tok_eos: ends[0],
        tok_bos: None,
        tok_pad: None,
        tok_unk: None,
        tok_end_of_turn: None,
    };
    Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words).with_eos_tokens(&ends)))
}

/// Sizes that are refused without compiling.
fn check(form: &Form, limits: &Limits) -> Result<(), String> {
    let size = |what: &str, len: usize| match len <= limits.bytes {
        true => Ok(()),
        false => Err(format!("the {what} has {len} bytes, at most {} are allowed", limits.bytes)),
    };
    let depth = |what: &str, deepest: usize| match deepest <= limits.depth {
        true => Ok(()),
        false => Err(format!("the {what} nests {deepest} levels deep, at most {} are allowed", limits.depth)),
    };
    match form {
        Form::JsonObject => Ok(()),
        Form::Schema { schema, .. } => {
            if !schema.is_object() && !schema.is_boolean() {
                return Err("the schema is not an object".into());
            }
            depth("schema", json_depth(schema))?;
            size("schema", schema.to_string().len())?;
            depth("schema", patterns(schema))
        }
        Form::Grammar(text) => {
            size("grammar", text.len())?;
            depth("grammar", brackets(text))
        }
        Form::Regex(text) => {
            size("regex", text.len())?;
            depth("regex", brackets(text))
        }
    }
}

/// What llguidance is to compile.
fn grammar(form: Form) -> Result<TopLevelGrammar, String> {
    Ok(match form {
        Form::JsonObject => schema(json!({"type": "object"}), false),
        Form::Schema { schema: value, strict } => schema(value, strict),
        Form::Grammar(text) if gbnf::is(&text) => TopLevelGrammar::from_lark(gbnf::to_lark(&text)?),
        Form::Grammar(text) => TopLevelGrammar::from_lark(text),
        Form::Regex(text) => TopLevelGrammar::from_regex(&text),
    })
}

fn schema(mut value: Value, strict: bool) -> TopLevelGrammar {
    if value == Value::Bool(true) {
        value = json!({});
    }
    if let Some(object) = value.as_object_mut() {
        let options = json!({"whitespace_pattern": WHITE_SPACE, "coerce_one_of": !strict, "lenient": !strict});
        object.insert("x-guidance".into(), options);
    }
    TopLevelGrammar::from_json_schema(value)
}

fn compile(factory: &ParserFactory, grammar: TopLevelGrammar) -> Result<Matcher, String> {
    let make = || -> Result<TokenParser, String> {
        let parser = factory.create_parser(grammar).map_err(|e| e.to_string())?;
        if let Some(problem) = parser.error_message() {
            return Err(problem);
        }
        Ok(parser)
    };
    let parser = std::panic::catch_unwind(std::panic::AssertUnwindSafe(make))
        .map_err(|_| "the compiler failed on it".to_owned())?
        .map_err(|e| first_line(&e))?;
    let mut matcher = Matcher::new(Ok(parser));
    // The first mask belongs to compiling: it finds grammars that allow nothing, or too much.
    let first = matcher.compute_mask().map_err(|e| first_line(&e.to_string()))?;
    match first.is_zero() {
        true => Err("no text satisfies it".into()),
        false => Ok(matcher),
    }
}

/// Messages of llguidance may carry a state dump or a stack trace.
fn first_line(message: &str) -> String {
    let line = message.lines().find(|l| !l.trim().is_empty()).unwrap_or("unknown problem");
    line.chars().take(300).collect()
}

/// Levels of arrays and objects.
fn json_depth(value: &Value) -> usize {
    // Requests come from a parser that refuses more than 128 levels, so this recursion is bounded.
    match value {
        Value::Array(items) => 1 + items.iter().map(json_depth).max().unwrap_or(0),
        Value::Object(items) => 1 + items.values().map(json_depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Deepest nesting in any string of a schema: one of them may be a pattern.
fn patterns(value: &Value) -> usize {
    match value {
        Value::String(text) => brackets(text),
        Value::Array(items) => items.iter().map(patterns).max().unwrap_or(0),
        Value::Object(items) => items.iter().map(|(k, v)| brackets(k).max(patterns(v))).max().unwrap_or(0),
        _ => 0,
    }
}

/// Deepest nesting of brackets in a grammar or a pattern. Quoted ones count too: that errs on the safe side, and nobody
/// quotes dozens of them.
fn brackets(text: &str) -> usize {
    let mut stack: Vec<u8> = Vec::new();
    let mut deepest = 0;
    for b in text.bytes() {
        match b {
            b'(' | b'[' | b'{' => stack.push(b),
            b')' | b']' | b'}' => drop(stack.pop()),
            _ => {}
        }
        deepest = deepest.max(stack.len());
    }
    deepest
}

#[cfg(test)]
#[path = "constraint_tests.rs"]
mod tests;
