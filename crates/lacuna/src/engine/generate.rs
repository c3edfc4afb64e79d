//! From a prompt to a stream of text.

use super::{decoding::Decoder, sampler::Sampler, session::Session};
use crate::{
    error::{Error, Result},
    tokenizer::Tokenizer,
};
use std::time::{Duration, Instant};

/// Most stop strings, and the length of the longest in bytes.
const MAX_STOPS: usize = 64;
const MAX_STOP_BYTES: usize = 1024;

/// When to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it. Found across the borders of tokens.
    pub stop: Vec<String>,
    /// Goes on after tokens that end a text.
    pub ignore_eos: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_tokens: 128, stop: Vec::new(), ignore_eos: false }
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A token that ends a text, or a stop string.
    Stop,
    /// `max_tokens`.
    Length,
    /// The context is full.
    Context,
    /// The caller asked.
    Cancelled,
}

/// Whether to go on after a piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// End here.
    Stop,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The whole text.
    pub text: String,
    /// Its tokens, the one that ended it included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Time for the prompt.
    pub prefill: Duration,
    /// Time for the generated tokens, sampling and callbacks included.
    pub decode: Duration,
}

impl Generated {
    /// Generated tokens per second; the first comes from the prompt's pass and does not count.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens.len().saturating_sub(1) as f64 / self.decode.as_secs_f64().max(1e-9)
    }

    /// Prompt tokens per second.
    pub fn prompt_tokens_per_second(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(1e-9)
    }
}

/// Appends `prompt` to the session's context and generates. `on_text` gets the text as soon as it is certain: whole
/// characters, and nothing that may turn out to be a stop string. The session's cancel flag ends it between tokens.
///
/// The last generated token is not in the session's context when this returns.
///
/// # Errors
/// As [`Session::prefill`], which a prompt that does not fit fails before any work; stop strings that are empty, too
/// long or too many.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampler: &mut Sampler,
    limits: &Limits,
    on_text: &mut dyn FnMut(&str) -> Flow,
) -> Result<Generated> {
    generate_with(&mut Decoder::plain(), session, tokenizer, prompt, sampler, limits, on_text)
}

/// [`generate`] with the tokens behind the first chosen by `decoder`.
///
/// # Errors
/// As [`generate`].
pub fn generate_with(
    decoder: &mut Decoder,
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampler: &mut Sampler,
    limits: &Limits,
    on_text: &mut dyn FnMut(&str) -> Flow,
) -> Result<Generated> {
    decoder.begin();
    let ends = |id: u32| tokenizer.is_eos(id) && !limits.ignore_eos;
    let mut stops = Stops::new(&limits.stop)?;
    let start = Instant::now();
    let mut out = Generated {
        text: String::new(),
        tokens: Vec::new(),
        finish: Finish::Length,
        prompt_tokens: prompt.len(),
        prefill: Duration::ZERO,
        decode: Duration::ZERO,
    };
    match session.prompt(prompt) {
        Ok(_) => {}
        Err(Error::Cancelled) => {
            out.finish = Finish::Cancelled;
            return Ok(out);
        }
        Err(e) => return Err(e),
    }
    prompt.iter().for_each(|&id| sampler.accept(id));
    out.prefill = start.elapsed();
    let start = Instant::now();
    let mut stream = tokenizer.stream(prompt);
    out.finish = loop {
        if out.tokens.len() == limits.max_tokens {
            break Finish::Length;
        }
        let id = match out.tokens.last() {
            None => first(session, sampler),
            Some(_) if session.len() == session.context() => break Finish::Context,
            Some(&last) => match decoder.next(session, last, sampler, &ends) {
                Ok(id) => id,
                Err(Error::Cancelled) => break Finish::Cancelled,
                Err(e) => return Err(e),
            },
        };
        out.tokens.push(id);
        if ends(id) {
            break Finish::Stop;
        }
        let (text, stopped) = stops.push(&stream.push(id));
        out.text.push_str(&text);
        if !text.is_empty() && on_text(&text) == Flow::Stop {
            break Finish::Cancelled;
        }
        if stopped {
            break Finish::Stop;
        }
    };
    let rest = stops.finish(&stream.finish());
    if !rest.is_empty() {
        out.text.push_str(&rest);
        on_text(&rest);
    }
    out.decode = start.elapsed();
    Ok(out)
}

/// The token behind the prompt.
fn first(session: &Session, sampler: &mut Sampler) -> u32 {
    let id = sampler.sample(session.logits());
    sampler.accept(id);
    id
}

/// Finds stop strings in a stream of text and holds back what may become one.
#[derive(Debug)]
pub struct Stops {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl Stops {
    /// For these stop strings.
    ///
    /// # Errors
    /// Strings that are empty, too long or too many.
    pub fn new(stops: &[String]) -> Result<Self> {
        let error = |problem: String| Err(Error::Argument { name: "stop", problem });
        if stops.len() > MAX_STOPS {
            return error(format!("{} texts, more than the {MAX_STOPS} allowed", stops.len()));
        }
        if let Some(bad) = stops.iter().find(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
            return error(format!("a text has {} bytes, allowed are 1 to {MAX_STOP_BYTES}", bad.len()));
        }
        Ok(Self { stops: stops.to_vec(), held: String::new(), stopped: false })
    }

    /// The text that is certain after `text`, and whether a stop string was found behind it.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            self.stopped = true;
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back when the text ended without a stop string.
    pub fn finish(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        let held = std::mem::take(&mut self.held);
        match self.stops.iter().filter_map(|s| held.find(s.as_str())).min() {
            Some(at) => held[..at].to_owned(),
            None => held,
        }
    }
}

/// Length of the longest end of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len() - 1);
    let begins = |&n: &usize| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]);
    (1..=most).rev().find(begins).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn stop_strings_across_pieces_are_never_shown() {
        let list = stops(&["<end>", "\n\nUser:"]);
        let mut s = Stops::new(&list).expect("valid");
        assert_eq!(s.push("Hi <e"), ("Hi ".into(), false));
        assert_eq!(s.push("nt"), ("<ent".into(), false), "it was not the stop string");
        assert_eq!(s.push("\n"), (String::new(), false));
        assert_eq!(s.push("\nUs"), (String::new(), false));
        assert_eq!(s.push("er: x"), (String::new(), true));
        assert_eq!(s.finish("more"), "");
    }

    #[test]
    fn held_text_comes_out_at_the_end() {
        let list = stops(&["abc"]);
        let mut s = Stops::new(&list).expect("valid");
        assert_eq!(s.push("xab"), ("x".into(), false));
        assert_eq!(s.finish("\u{fffd}"), "ab\u{fffd}");
        let mut none = Stops::new(&[]).expect("valid");
        assert_eq!(none.push("abc"), ("abc".into(), false));
    }

    #[test]
    fn repeated_beginnings_and_multibyte_characters() {
        let list = stops(&["aab", "\u{1F600}!"]);
        let mut s = Stops::new(&list).expect("valid");
        assert_eq!(s.push("aa"), (String::new(), false));
        assert_eq!(s.push("a"), ("a".into(), false));
        assert_eq!(s.push("b"), (String::new(), true));
        let mut s = Stops::new(&list).expect("valid");
        assert_eq!(s.push("x\u{1F600}"), ("x".into(), false));
        assert_eq!(s.push("?"), ("\u{1F600}?".into(), false));
    }

    #[test]
    fn bad_stop_strings_are_refused() {
        for bad in [stops(&[""]), vec!["x".repeat(MAX_STOP_BYTES + 1)], stops(&["a"; MAX_STOPS + 1])] {
            assert!(matches!(Stops::new(&bad), Err(Error::Argument { name: "stop", .. })));
        }
    }
}
