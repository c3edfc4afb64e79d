//! One file for two purposes: its beginning calibrates, its end is scored, and no passage is both.

use crate::{
    error::{Error, Result},
    eval::{Protocol, Window, windows},
    tokenizer::Tokenizer,
};

/// How a text is divided.
#[derive(Clone, Copy, Debug)]
pub struct Division<'a> {
    /// Observed.
    pub calibration: &'a str,
    /// Scored.
    pub test: &'a str,
}

/// The line that parts the documents of `text`, such as `<|endoftext|>`, if at least two lines are one.
pub fn mark(text: &str) -> Option<&str> {
    let is_mark = |l: &&str| l.starts_with("<|endof") && l.ends_with("|>") && l.len() < 40;
    let first = text.lines().map(str::trim).find(is_mark)?;
    (text.lines().filter(|l| l.trim() == first).take(2).count() == 2).then_some(first)
}

/// Cuts `text` so that its end, `bytes` or half of the text, whichever is less, is scored; the border is behind a line
/// that is `mark`, else behind an empty line, else behind any line.
pub fn divide<'a>(text: &'a str, mark: Option<&str>, bytes: usize) -> Division<'a> {
    let wanted = text.len() - bytes.min(text.len() / 2);
    let mut borders = [None; 2];
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        at += line.len();
        let good = mark.map_or(line.trim().is_empty(), |m| line.trim() == m);
        if at <= wanted {
            borders[0] = Some(at);
            borders[1] = if good { Some(at) } else { borders[1] };
        }
    }
    let at = borders[1].or(borders[0]).unwrap_or(0);
    Division { calibration: &text[..at], test: &text[at..] }
}

/// The passages of a text: documents where a mark parts them, else paragraphs behind empty lines, else lines.
pub fn passages<'a>(text: &'a str, mark: Option<&str>) -> Vec<&'a str> {
    if let Some(mark) = mark {
        return windows::split_documents(text, mark);
    }
    let paragraphs: Vec<&str> = text.split("\n\n").map(str::trim).filter(|p| !p.is_empty()).collect();
    if paragraphs.len() > 1 { paragraphs } else { text.lines().filter(|l| !l.trim().is_empty()).collect() }
}

/// Windows of at most `context` tokens over `text` with about `tokens` predictions: each document alone, or llama.cpp's
/// chunks of which the second half is scored; and a sentence that says so.
///
/// # Errors
/// As [`windows::cut`] and [`Tokenizer::encode`].
pub fn scored(
    text: &str,
    mark: Option<&str>,
    tokenizer: &Tokenizer,
    context: usize,
    tokens: usize,
) -> Result<(Vec<Window>, String)> {
    if let Some(mark) = mark {
        let mut encoded = Vec::new();
        let mut left = tokens;
        for document in windows::split_documents(text, mark) {
            if left == 0 {
                break;
            }
            let ids = tokenizer.encode(document, true)?;
            left = left.saturating_sub(ids.len().min(context).saturating_sub(1));
            encoded.push(ids);
        }
        let list = windows::documents(encoded, context);
        if list.is_empty() {
            return Err(Error::Argument { name: "text", problem: format!("no document between lines of {mark}") });
        }
        return Ok((list, format!("documents between lines of {mark}, each alone, at most {context} tokens")));
    }
    let ids = tokenizer.encode(text, true)?;
    let bos = tokenizer.special().bos.filter(|b| ids.first() == Some(b));
    let context = context.min(ids.len() / 2).max(4);
    let limit = tokens.div_ceil((context - context / 2 - 1).max(1));
    let list = windows::cut(&ids, Protocol::Chunks { context }, bos, Some(limit))?;
    Ok((list, format!("chunks of {context} tokens, the second half of each scored")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_in_both_halves() {
        let text = "one\n<|endoftext|>\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n";
        assert_eq!(mark(text), Some("<|endoftext|>"));
        let d = divide(text, mark(text), 20);
        assert!(d.calibration.ends_with("two\n<|endoftext|>\n") && d.test.starts_with("three"), "{d:?}");
        let d = divide(text, mark(text), 10_000);
        assert_eq!(format!("{}{}", d.calibration, d.test), text);
        assert!(d.test.len() >= text.len() / 2);
    }

    #[test]
    fn plain_texts_are_cut_at_empty_lines() {
        let text = "a b c.\n\nd e\nf g.\n\nh i j.\n";
        assert_eq!(mark(text), None);
        assert_eq!(divide(text, None, 7).test, "h i j.\n");
        assert_eq!(divide("a\nb\nc\n", None, 2).test, "c\n");
        assert_eq!(divide("one line", None, 2).calibration, "");
        assert_eq!(passages(text, None).len(), 3);
        assert_eq!(passages("a\nb\n", None), ["a", "b"]);
    }
}
