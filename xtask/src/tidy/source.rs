//! Enough of Rust's lexical structure to judge a file without a parser: what is comment, text or code, where functions
//! begin and end, and which lines are tests.

/// A source file seen three ways; all have the same length and line breaks.
pub struct Source {
    /// As written.
    pub text: String,
    /// Comments blanked.
    pub no_comments: String,
    /// Comments and the insides of strings and character literals blanked.
    pub code: String,
}

/// A function and the lines it spans, both counted from 1.
pub struct Function {
    /// Its name.
    pub name: String,
    /// Line of the `fn` keyword.
    pub line: usize,
    /// Lines up to the closing brace.
    pub lines: usize,
    /// Parameters, the receiver included.
    pub params: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Code,
    Comment,
    Text,
}

impl Source {
    /// Splits `text`.
    pub fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut kinds = vec![Kind::Code; bytes.len()];
        let mut i = 0;
        while i < bytes.len() {
            let (kind, end) = token(bytes, i);
            kinds[i..end].fill(kind);
            i = end;
        }
        let mask = |drop: &dyn Fn(Kind) -> bool| {
            let keep = |(b, k): (&u8, &Kind)| if *b != b'\n' && drop(*k) { b' ' } else { *b };
            String::from_utf8_lossy(&bytes.iter().zip(&kinds).map(keep).collect::<Vec<_>>()).into_owned()
        };
        Self { text: text.to_owned(), no_comments: mask(&|k| k == Kind::Comment), code: mask(&|k| k != Kind::Code) }
    }

    /// For each line, whether it belongs to an item under `#[cfg(test)]`.
    pub fn test_lines(&self) -> Vec<bool> {
        let mut marks = vec![false; self.code.lines().count() + 1];
        for (at, _) in self.code.match_indices("#[cfg(test)]") {
            let end = item_end(&self.code, at + "#[cfg(test)]".len());
            let (first, last) = (line_of(&self.code, at), line_of(&self.code, end));
            marks[first - 1..last].fill(true);
        }
        marks
    }

    /// All functions with a body.
    pub fn functions(&self) -> Vec<Function> {
        let mut found = Vec::new();
        for (at, _) in self.code.match_indices("fn ") {
            let before = self.code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
                continue;
            }
            let rest = &self.code[at + 3..];
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let end = item_end(&self.code, at);
            if name.is_empty() || !self.code[at..end].ends_with('}') {
                continue;
            }
            let (line, last) = (line_of(&self.code, at), line_of(&self.code, end));
            found.push(Function { name, line, lines: last - line + 1, params: params(rest) });
        }
        found
    }
}

/// The token at `i`: its kind and its end. A literal's quotes count as code, its inside as text.
fn token(b: &[u8], i: usize) -> (Kind, usize) {
    let rest = &b[i..];
    if rest.starts_with(b"//") {
        return (Kind::Comment, i + rest.iter().position(|&c| c == b'\n').unwrap_or(rest.len()));
    }
    if rest.starts_with(b"/*") {
        return (Kind::Comment, block_comment_end(b, i));
    }
    if rest[0] == b'"' {
        return (Kind::Text, quoted_end(b, i + 1, b'"'));
    }
    let after_word = i > 0 && (b[i - 1].is_ascii_alphanumeric() || b[i - 1] == b'_');
    if rest[0] == b'r' && (!after_word || b[i - 1] == b'b' || b[i - 1] == b'c') {
        let hashes = rest[1..].iter().take_while(|&&c| c == b'#').count();
        if rest.get(1 + hashes) == Some(&b'"') {
            let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
            let body = i + 2 + hashes;
            let end =
                b[body..].windows(close.len()).position(|w| w == close).map_or(b.len(), |p| body + p + close.len());
            return (Kind::Text, end);
        }
    }
    if rest[0] == b'\'' && is_char_literal(rest) {
        return (Kind::Text, quoted_end(b, i + 1, b'\''));
    }
    (Kind::Code, i + 1)
}

/// `'a'`, `'\n'`, `'é'`, but not the lifetime `'a`.
fn is_char_literal(rest: &[u8]) -> bool {
    match rest.get(1) {
        Some(b'\\') => true,
        Some(c) => {
            let width = if *c < 0x80 { 1 } else { c.leading_ones() as usize };
            rest.get(1 + width) == Some(&b'\'')
        }
        None => false,
    }
}

fn quoted_end(b: &[u8], mut i: usize, quote: u8) -> usize {
    while i < b.len() && b[i] != quote {
        i += if b[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(b.len())
}

fn block_comment_end(b: &[u8], start: usize) -> usize {
    let (mut i, mut depth) = (start, 0);
    while i < b.len() {
        if b[i..].starts_with(b"/*") {
            (depth, i) = (depth + 1, i + 2);
        } else if b[i..].starts_with(b"*/") {
            (depth, i) = (depth - 1, i + 2);
            if depth == 0 {
                return i;
            }
        } else {
            i += 1;
        }
    }
    b.len()
}

/// The end of the item that starts at `from`: behind its `;`, or behind the brace that closes its body.
fn item_end(code: &str, from: usize) -> usize {
    let (mut braces, mut others) = (0, 0);
    for (i, c) in code[from..].char_indices() {
        match c {
            '(' | '[' => others += 1,
            ')' | ']' => others -= 1,
            '{' => braces += 1,
            '}' => {
                braces -= 1;
                if braces == 0 && others == 0 {
                    return from + i + 1;
                }
            }
            ';' if braces == 0 && others == 0 => return from + i + 1,
            _ => {}
        }
    }
    code.len()
}

/// Parameters of the function whose text starts with its name: commas at depth one of its parentheses.
fn params(rest: &str) -> usize {
    let Some(open) = rest.find('(') else { return 0 };
    let (mut depth, mut angle, mut count, mut filled) = (0, 0, 0, false);
    let mut last = ' ';
    for c in rest[open..].chars() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            '<' => angle += 1,
            '>' if last != '-' => angle -= 1,
            ',' if depth == 1 && angle == 0 => {
                count += usize::from(filled);
                filled = false;
            }
            c if !c.is_whitespace() => filled = true,
            _ => {}
        }
        last = c;
        if depth == 0 {
            break;
        }
    }
    count + usize::from(filled)
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at.min(text.len())].matches('\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r####"
// fn not_this() {}
/* nor /* nested */ fn this() { } */
fn short<'a>(x: &'a str, f: impl Fn(u8, u8) -> u8) -> char {
    let s = "fn in_string() { \" }";
    let r = r#"raw " { "#;
    let c = '{';
    'x'
}
fn none();
#[cfg(test)]
mod tests {
    fn helper() { Some(1).unwrap(); }
}
"####;

    #[test]
    fn comments_and_strings_are_not_code() {
        let s = Source::new(SAMPLE);
        assert!(!s.code.contains("not_this") && !s.code.contains("nested") && !s.code.contains("in_string"));
        assert!(!s.code.contains("raw") && s.no_comments.contains("in_string"));
        assert_eq!(s.code.len(), SAMPLE.len());
    }

    #[test]
    fn functions_have_lengths_and_parameters() {
        let found = Source::new(SAMPLE).functions();
        let rows: Vec<_> = found.iter().map(|f| (f.name.as_str(), f.lines, f.params)).collect();
        assert_eq!(rows, [("short", 6, 2), ("helper", 1, 0)]);
    }

    #[test]
    fn test_modules_are_marked() {
        let marks = Source::new(SAMPLE).test_lines();
        let marked: Vec<_> = (1..=marks.len()).filter(|l| marks[l - 1]).collect();
        assert_eq!(marked, [11, 12, 13, 14]);
    }
}
