//! The notation as a tree: names, escapes and ranges resolved.

use std::collections::HashMap;

/// Most repetitions of repetitions.
const REPEATED: usize = 8;

/// What stands on the right of a rule.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    /// Characters one after the other; may be empty.
    Text(String),
    /// One character of these ranges, or one that is in none of them.
    Set { negated: bool, ranges: Vec<(char, char)> },
    /// What the rule of this number says.
    Rule(usize),
    /// One after the other.
    All(Vec<Node>),
    /// One of these.
    One(Vec<Node>),
    /// At least, and at most.
    Repeat(Box<Node>, u32, Option<u32>),
}

/// All rules; the one called `root` comes first.
#[derive(Debug, PartialEq)]
pub(super) struct Grammar {
    pub rules: Vec<Node>,
}

/// Parses `text`.
///
/// # Errors
/// Names the line and what is wrong there.
pub(super) fn parse(text: &str) -> Result<Grammar, String> {
    let mut parser = Parser { text, at: 0, numbers: HashMap::from([("root", 0)]), rules: vec![None], uses: vec![None] };
    parser.skip();
    while !parser.rest().is_empty() {
        parser.rule()?;
    }
    let Parser { numbers, rules, uses, .. } = parser;
    let name = |n: usize| numbers.iter().find(|(_, number)| **number == n).map_or("", |(name, _)| name);
    let given = rules.into_iter().zip(uses).enumerate().map(|(n, (rule, used))| {
        rule.ok_or_else(|| match used {
            Some(at) => format!("GBNF line {}: there is no rule {:?}", line(text, at), name(n)),
            None => "GBNF: there is no rule \"root\", with which every text begins".into(),
        })
    });
    Ok(Grammar { rules: given.collect::<Result<_, _>>()? })
}

fn line(text: &str, at: usize) -> usize {
    1 + text[..at].matches('\n').count()
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    numbers: HashMap<&'a str, usize>,
    rules: Vec<Option<Node>>,
    /// Where each rule was used first.
    uses: Vec<Option<usize>>,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn error<T>(&self, what: &str) -> Result<T, String> {
        Err(format!("GBNF line {}: {what}", line(self.text, self.at)))
    }

    /// White space and comments. Line breaks mean nothing: a rule ends where the next one begins.
    fn skip(&mut self) {
        loop {
            let rest = self.rest().trim_start();
            self.at = self.text.len() - rest.len();
            match rest.strip_prefix('#') {
                Some(comment) => self.at += 1 + comment.find('\n').unwrap_or(comment.len()),
                None => return,
            }
        }
    }

    fn eat(&mut self, what: &str) -> bool {
        let found = self.rest().starts_with(what);
        if found {
            self.at += what.len();
            self.skip();
        }
        found
    }

    fn word(&self) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_')).unwrap_or(rest.len());
        &rest[..end]
    }

    fn number_of(&mut self, name: &'a str) -> usize {
        let next = self.rules.len();
        let number = *self.numbers.entry(name).or_insert(next);
        if number == next {
            self.rules.push(None);
            self.uses.push(None);
        }
        number
    }

    fn rule(&mut self) -> Result<(), String> {
        let name = self.word();
        if name.is_empty() {
            return self.error("a character that begins nothing in this notation");
        }
        self.at += name.len();
        self.skip();
        if !self.eat("::=") {
            return self.error(&format!("`::=` must follow the name {name:?}"));
        }
        let number = self.number_of(name);
        if self.rules[number].is_some() {
            return self.error(&format!("a second rule {name:?}"));
        }
        let node = self.alternatives()?;
        self.rules[number] = Some(node);
        Ok(())
    }

    fn alternatives(&mut self) -> Result<Node, String> {
        let mut all = vec![self.sequence()?];
        while self.eat("|") {
            all.push(self.sequence()?);
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Node::One(all) })
    }

    fn sequence(&mut self) -> Result<Node, String> {
        let mut items = Vec::new();
        while let Some(item) = self.item()? {
            items.push(self.repeated(item)?);
        }
        Ok(if items.len() == 1 { items.remove(0) } else { Node::All(items) })
    }

    /// `None` where a sequence ends.
    fn item(&mut self) -> Result<Option<Node>, String> {
        let node = match self.rest().chars().next() {
            None | Some('|' | ')') => return Ok(None),
            Some('"') => Node::Text(self.literal()?),
            Some('[') => self.set()?,
            Some('.') => {
                self.at += 1;
                Node::Set { negated: true, ranges: Vec::new() }
            }
            // Depth is bounded by whoever calls `to_lark`.
            Some('(') => {
                self.eat("(");
                let inner = self.alternatives()?;
                if !self.rest().starts_with(')') {
                    return self.error("a bracket is not closed");
                }
                self.at += 1;
                inner
            }
            Some('<' | '!') => {
                return self.error("tokens by name or number (`<...>`) are not supported; write their text");
            }
            Some(_) => {
                let (start, name) = (self.at, self.word());
                if name.is_empty() {
                    return self.error("a character that begins nothing in this notation");
                }
                self.at += name.len();
                self.skip();
                if self.rest().starts_with("::=") {
                    self.at = start;
                    return Ok(None);
                }
                let number = self.number_of(name);
                self.uses[number].get_or_insert(start);
                return Ok(Some(Node::Rule(number)));
            }
        };
        self.skip();
        Ok(Some(node))
    }

    fn repeated(&mut self, mut node: Node) -> Result<Node, String> {
        for _ in 0..=REPEATED {
            let (least, most) = match self.rest().chars().next() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => self.bounds()?,
                _ => return Ok(node),
            };
            self.at += 1;
            self.skip();
            node = Node::Repeat(Box::new(node), least, most);
        }
        self.error(&format!("more than {REPEATED} repetitions of one another"))
    }

    /// Numbers between curly brackets; the closing one is left.
    fn bounds(&mut self) -> Result<(u32, Option<u32>), String> {
        let rest = &self.rest()[1..];
        let Some(inner) = rest.find('}').map(|end| &rest[..end]) else {
            return self.error("a repetition is not closed");
        };
        let number = |text: &str| text.trim().parse::<u32>().ok();
        let bounds = match inner.split_once(',') {
            None => number(inner).map(|n| (n, Some(n))),
            Some((least, most)) if most.trim().is_empty() => number(least).map(|n| (n, None)),
            Some((least, most)) => number(least).zip(number(most)).map(|(n, m)| (n, Some(m))),
        };
        match bounds {
            Some((least, most)) if most.is_none_or(|m| m >= least) => {
                self.at += 1 + inner.len();
                Ok((least, most))
            }
            _ => self.error(&format!("{{{inner}}} is no repetition: write {{2}}, {{2,}} or {{2,5}}")),
        }
    }

    fn literal(&mut self) -> Result<String, String> {
        let mut text = String::new();
        self.at += 1;
        loop {
            match self.rest().chars().next() {
                Some('"') => break,
                Some(c) if c != '\n' => text.push(self.character()?),
                _ => return self.error("a string is not closed"),
            }
        }
        self.at += 1;
        Ok(text)
    }

    fn set(&mut self) -> Result<Node, String> {
        self.at += 1;
        let negated = self.rest().starts_with('^');
        self.at += usize::from(negated);
        let mut ranges = Vec::new();
        loop {
            match self.rest().chars().next() {
                Some(']') => break,
                Some(c) if c != '\n' => {
                    let first = self.character()?;
                    let mut last = first;
                    if self.rest().starts_with('-') && !self.rest().starts_with("-]") {
                        self.at += 1;
                        last = self.character()?;
                    }
                    if last < first {
                        return self.error(&format!("the range {first:?}-{last:?} is empty"));
                    }
                    ranges.push((first, last));
                }
                _ => return self.error("a set is not closed"),
            }
        }
        self.at += 1;
        match ranges.is_empty() && !negated {
            true => self.error("a set without characters, which nothing satisfies"),
            false => Ok(Node::Set { negated, ranges }),
        }
    }

    /// A character, which may be written as an escape.
    fn character(&mut self) -> Result<char, String> {
        let mut chars = self.rest().chars();
        let plain = |c: Option<char>| c.map(|c| (c, c.len_utf8()));
        let found = match chars.next() {
            Some('\\') => {
                let escape = chars.next();
                let hex = |digits: usize| {
                    let text = self.rest().get(2..2 + digits)?;
                    let code =
                        text.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u32::from_str_radix(text, 16).ok())??;
                    Some((char::from_u32(code)?, 2 + digits))
                };
                match escape {
                    Some('n') => Some(('\n', 2)),
                    Some('r') => Some(('\r', 2)),
                    Some('t') => Some(('\t', 2)),
                    Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^' | '/')) => Some((c, 2)),
                    Some('x') => hex(2),
                    Some('u') => hex(4),
                    Some('U') => hex(8),
                    _ => None,
                }
            }
            c => plain(c),
        };
        let Some((c, len)) = found else {
            let shown: String = self.rest().chars().take(2).collect();
            return self.error(&format!("the escape `{shown}` is unknown, or not followed by its digits"));
        };
        self.at += len;
        Ok(c)
    }
}
