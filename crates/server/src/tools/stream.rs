//! Reading a call while it is written.

use super::LIST;

/// The beginning of a call, up to its arguments.
pub(super) struct Begun {
    pub name: String,
    /// Where the arguments begin.
    pub at: usize,
    /// Objects and lists that are open there.
    pub open: usize,
}

/// The beginning of a call at the beginning of `text`: `{"name": "NAME", "arguments": {`, in the lists and objects that the
/// styles put around it.
pub(super) fn begun(text: &str) -> Option<Begun> {
    let mut s = Cursor { text, at: 0 };
    s.skip();
    if s.rest().starts_with(LIST) {
        s.at += LIST.len();
    }
    let mut open = 0;
    loop {
        open += 1;
        if s.take('[').is_some() {
            continue;
        }
        s.take('{')?;
        while let Some(key) = s.string() {
            s.take(':')?;
            match key.as_str() {
                "tool_calls" | "function" => break,
                "type" | "id" => {
                    s.string()?;
                    s.take(',')?;
                }
                "name" => {
                    let name = s.string()?;
                    s.take(',')?;
                    let arguments = ["arguments", "parameters"].contains(&s.string()?.as_str());
                    s.take(':')?;
                    s.skip();
                    let begun = Begun { name, at: s.at, open };
                    return (arguments && s.rest().starts_with('{')).then_some(begun);
                }
                _ => return None,
            }
        }
    }
}

/// A place in a JSON text.
struct Cursor<'t> {
    text: &'t str,
    at: usize,
}

impl Cursor<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn skip(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn take(&mut self, wanted: char) -> Option<()> {
        self.skip();
        let found = self.rest().starts_with(wanted);
        self.at += usize::from(found);
        found.then_some(())
    }

    fn string(&mut self) -> Option<String> {
        self.skip();
        let mut escaped = false;
        let end = self.rest().char_indices().skip(1).find(|(_, c)| {
            let ends = *c == '"' && !escaped;
            escaped = *c == '\\' && !escaped;
            ends
        });
        let (end, _) = end.filter(|_| self.rest().starts_with('"'))?;
        let value = serde_json::from_str(&self.rest()[..=end]).ok();
        self.at += end + 1;
        value
    }
}

/// What stands behind a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// Nothing that tells.
    Nothing,
    /// An object: perhaps the next call.
    Object,
    /// The text that ends the calls.
    End,
    /// Words.
    Words,
}

/// How far the text of a call was read, character by character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scan {
    /// Objects and lists that are open in the arguments.
    depth: usize,
    begun: bool,
    quoted: bool,
    escaped: bool,
    /// Those around the arguments.
    around: usize,
}

impl Scan {
    /// Before the arguments of a call, inside `around` objects and lists.
    pub fn behind(around: usize) -> Self {
        Self { depth: 0, begun: false, quoted: false, escaped: false, around }
    }

    /// Whether the arguments are complete.
    pub fn is_done(&self) -> bool {
        self.begun && self.depth == 0
    }

    /// Whether `c` stands in a string, its quotation marks included.
    fn string(&mut self, c: char) -> bool {
        let inside = self.quoted || c == '"';
        if c == '"' && !self.escaped {
            self.quoted = !self.quoted;
        }
        self.escaped = self.quoted && c == '\\' && !self.escaped;
        inside
    }

    /// The part of the arguments that `text` has, without white space between its values, and its length in `text`.
    pub fn object(&mut self, text: &str) -> (String, usize) {
        let mut out = String::new();
        for (at, c) in text.char_indices() {
            if self.string(c) || !c.is_whitespace() {
                out.push(c);
            }
            match c {
                _ if self.quoted => {}
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            self.begun = true;
            if self.depth == 0 {
                return (out, at + c.len_utf8());
            }
        }
        (out, text.len())
    }

    /// Skips what closes around a call: the length of that in `text`, and what follows. `end` ends the calls, if it is not
    /// empty.
    pub fn rest(&mut self, text: &str, end: &str) -> (usize, After) {
        for (at, c) in text.char_indices() {
            if self.string(c) && self.around > 0 {
                continue;
            }
            let from = &text[at..];
            match c {
                '{' => return (at, After::Object),
                '}' | ']' => self.around = self.around.saturating_sub(1),
                ',' | ';' => {}
                _ if c.is_whitespace() => {}
                _ if !end.is_empty() && from.starts_with(end) => return (at, After::End),
                _ if !end.is_empty() && end.starts_with(from) => return (at, After::Nothing),
                _ if end.is_empty() && self.around == 0 => return (at, After::Words),
                _ => {}
            }
        }
        (text.len(), After::Nothing)
    }
}
