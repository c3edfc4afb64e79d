//! GBNF, llama.cpp's grammar notation, rewritten as the Lark that llguidance reads (llama.cpp, `grammars/README.md`).
//!
//! `root ::= "a" [0-9]+ item{2,3}` becomes `start: "a" /[0-9]/+ item{2,3}`: names lose their hyphens, `root` becomes
//! `start`, sets become regular expressions, `.` any character.

/// Whether `text` is GBNF: Lark has no `::=`.
pub fn is(text: &str) -> bool {
    text.contains("::=")
}

/// The same grammar in Lark.
///
/// # Errors
/// Names the line and what is wrong there.
pub fn to_lark(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len() + 64);
    let mut scan = Scan { text: text.as_bytes(), at: 0 };
    // GBNF is indifferent to white space between tokens: line breaks are only kept in front of the next rule.
    while let Some(token) = scan.next()? {
        match token {
            Token::Name(name) if scan.peek_define() => {
                if !out.is_empty() {
                    out.push('\n');
                }
                out.push_str(&rule(name));
            }
            Token::Name(name) => spaced(&mut out, &rule(name)),
            Token::Define => out.push(':'),
            Token::Literal(s) => spaced(&mut out, s),
            Token::Set(s) => spaced(&mut out, &set(s)),
            Token::Any => spaced(&mut out, r"/(.|\n)/"),
            // Repetitions belong to what they follow.
            Token::Repeat(s) => out.push_str(s),
            Token::Other(c) => spaced(&mut out, &c.to_string()),
        }
    }
    out.push('\n');
    Ok(out)
}

enum Token<'a> {
    Name(&'a str),
    Define,
    /// With its quotes.
    Literal(&'a str),
    /// With its brackets.
    Set(&'a str),
    Any,
    Repeat(&'a str),
    Other(char),
}

fn spaced(out: &mut String, text: &str) {
    out.push(' ');
    out.push_str(text);
}

/// Lark's rules are lower case with `_`; an `r_` keeps names apart from Lark's own words.
fn rule(name: &str) -> String {
    match name {
        "root" => "start".to_owned(),
        _ => {
            // Upper case letters would make a terminal, which cannot recurse.
            let mut out = String::from("r_");
            for c in name.chars() {
                match c {
                    '-' => out.push_str("__"),
                    c if c.is_ascii_uppercase() => {
                        out.push_str("_u");
                        out.push(c.to_ascii_lowercase());
                    }
                    c => out.push(c),
                }
            }
            out
        }
    }
}

/// A set as a regular expression between slashes.
fn set(text: &str) -> String {
    format!("/{}/", text.replace('/', r"\/").replace("[[", r"[\["))
}

struct Scan<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Scan<'a> {
    fn slice(&self, from: usize) -> &'a str {
        // Tokens begin and end at ASCII bytes, so this never cuts a character; if it did, the piece would be empty.
        std::str::from_utf8(&self.text[from..self.at]).unwrap_or("")
    }

    fn error(&self, what: &str) -> String {
        let line = 1 + self.text[..self.at.min(self.text.len())].iter().filter(|&&b| b == b'\n').count();
        format!("GBNF line {line}: {what}")
    }

    fn skip(&mut self) {
        while let Some(&b) = self.text.get(self.at) {
            if b == b'#' {
                while self.text.get(self.at).is_some_and(|&b| b != b'\n') {
                    self.at += 1;
                }
            } else if b.is_ascii_whitespace() {
                self.at += 1;
            } else {
                break;
            }
        }
    }

    fn peek_define(&mut self) -> bool {
        self.skip();
        self.text[self.at..].starts_with(b"::=")
    }

    /// Up to and with `end`; a backslash takes the next byte along.
    fn until(&mut self, end: u8, what: &str) -> Result<(), String> {
        self.at += 1;
        while let Some(&b) = self.text.get(self.at) {
            self.at += 1;
            match b {
                b'\\' => self.at += 1,
                b if b == end => return Ok(()),
                b'\n' => break,
                _ => {}
            }
        }
        Err(self.error(&format!("{what} is not closed")))
    }

    fn next(&mut self) -> Result<Option<Token<'a>>, String> {
        self.skip();
        let from = self.at;
        let Some(&b) = self.text.get(from) else { return Ok(None) };
        let token = match b {
            b':' if self.peek_define() => {
                self.at += 3;
                Token::Define
            }
            b'"' => {
                self.until(b'"', "a string")?;
                Token::Literal(self.slice(from))
            }
            b'[' => {
                self.until(b']', "a set")?;
                Token::Set(self.slice(from))
            }
            b'{' => {
                self.until(b'}', "a repetition")?;
                Token::Repeat(self.slice(from))
            }
            b'*' | b'+' | b'?' => {
                self.at += 1;
                Token::Repeat(self.slice(from))
            }
            b'.' => {
                self.at += 1;
                Token::Any
            }
            b'|' | b'(' | b')' => {
                self.at += 1;
                Token::Other(char::from(b))
            }
            b if b.is_ascii_alphanumeric() || b == b'_' => {
                while self.text.get(self.at).is_some_and(|b| b.is_ascii_alphanumeric() || b"_-".contains(b)) {
                    self.at += 1;
                }
                Token::Name(self.slice(from))
            }
            _ => return Err(self.error("a character that begins nothing in this notation")),
        };
        Ok(Some(token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_sets_and_repetitions() {
        let cases = [
            ("root ::= \"yes\" | \"no\"", "start: \"yes\" | \"no\"\n"),
            (
                "root ::= item-a{2,3}\n\n# c\nitem-a ::= [a-z/]+ .?",
                "start: r_item__a{2,3}\nr_item__a: /[a-z\\/]/+ /(.|\\n)/?\n",
            ),
            (
                "root ::= (\n  \"a\" |\n  Bee\n)*\nBee ::= [^\"\\]]",
                "start: ( \"a\" | r__ubee )*\nr__ubee: /[^\"\\]]/\n",
            ),
        ];
        for (gbnf, lark) in cases {
            assert_eq!(to_lark(gbnf).as_deref(), Ok(lark));
        }
    }

    #[test]
    fn what_is_not_closed_is_an_error_with_its_line() {
        for (text, wanted) in [
            ("root ::= \"a", "line 1"),
            ("root ::= a\na ::= [b", "line 2"),
            ("root ::= é", "line 1"),
            ("root ::= \"\\", "line 1"),
        ] {
            let e = to_lark(text).expect_err(text);
            assert!(e.contains(wanted), "{text}: {e}");
        }
    }
}
