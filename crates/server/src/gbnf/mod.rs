//! GBNF, llama.cpp's grammar notation, rewritten as the Lark that llguidance reads (llama.cpp, `grammars/README.md`).
//!
//! llguidance matches terminals, which are regular expressions, as a lexer does: the longest match counts. GBNF knows no lexer;
//! it means every way to read a text. A grammar without recursion therefore becomes one regular expression. In others, pieces
//! without recursion become terminals as far as no match of a terminal begins with a match of one
//! (`terminals::clashes`), and the rest stays single characters: always right, but masks take longer.

mod parse;
mod terminals;

use parse::{Grammar, Node};
use std::collections::{HashMap, HashSet};
use std::fmt::Write;

/// Most bytes of a regular expression.
const LONGEST: usize = 8192;
/// Deepest nesting of groups in one; those who parse it allow 250.
const DEEPEST: usize = 60;
/// Most items in a row that are tried as one terminal.
const RUN: usize = 12;
/// Most bytes of expressions that are built of items in a row.
const BYTES: usize = 16 << 20;
/// Most automata that are built to find the terminals of one grammar. One that grows too large takes as long as many others: up to
/// 20 ms, for which nobody who waits has the time often.
const TRIALS: usize = 300;
/// What one that grows too large counts.
const TOO_LARGE: usize = 30;
/// After so many attempts to find terminals that do not clash, there are none but single characters.
const PASSES: usize = 16;

/// Whether `text` is GBNF: Lark has no `::=`.
pub fn is(text: &str) -> bool {
    text.contains("::=")
}

/// The same grammar in Lark. Recursion follows the brackets in `text`: bound their depth.
///
/// # Errors
/// Names the line and what is wrong there.
pub fn to_lark(text: &str) -> Result<String, String> {
    let grammar = parse::parse(text)?;
    let patterns = patterns(&grammar);
    if let Some(whole) = &patterns[0]
        && terminals::clashes(&[&whole.text]).is_some()
    {
        return Ok(format!("start: /{}/\n", whole.text));
    }
    let mut writer =
        Writer { patterns, tried: HashMap::new(), trials: TRIALS, banned: HashSet::new(), plain: false, bytes: BYTES };
    for pass in 0.. {
        writer.plain = pass == PASSES;
        let (lark, used) = writer.write(&grammar);
        if writer.plain {
            return Ok(lark);
        }
        let mut used: Vec<&str> = used.iter().map(String::as_str).collect();
        used.sort_unstable();
        let clashing: Vec<String> = match terminals::clashes(&used) {
            Some(clashing) => clashing.into_iter().map(|i| used[i].to_owned()).collect(),
            None => used.iter().map(|t| (*t).to_owned()).collect(),
        };
        // Those that go on behind another are cut into smaller ones, until none clashes.
        let before = writer.banned.len();
        writer.banned.extend(clashing);
        if writer.banned.len() == before {
            return Ok(lark);
        }
    }
    unreachable!("the last pass returns")
}

/// A part of a grammar as a regular expression.
#[derive(Clone)]
struct Pattern {
    text: String,
    /// Levels of groups.
    depth: usize,
    /// Whether it matches the empty text.
    empty: bool,
}

impl Pattern {
    fn nothing() -> Self {
        Self { text: String::new(), depth: 0, empty: true }
    }

    fn fits(&self) -> bool {
        self.text.len() <= LONGEST && self.depth <= DEEPEST
    }

    /// Puts `between` and then `next`, as a group, behind it: with nothing between, one after the other, with `|` one of both.
    /// `None` if it gets too large.
    fn append(&mut self, between: &str, next: &Self) -> Option<()> {
        let first = self.text.is_empty();
        let _ = write!(self.text, "{between}(?:{})", next.text);
        self.depth = self.depth.max(next.depth + 1);
        self.empty = match between {
            _ if first => next.empty,
            "" => self.empty && next.empty,
            _ => self.empty || next.empty,
        };
        self.fits().then_some(())
    }
}

/// The regular expression of each rule; `None` for rules that reach themselves, or would be too large.
fn patterns(grammar: &Grammar) -> Vec<Option<Pattern>> {
    let n = grammar.rules.len();
    let mut users = vec![Vec::new(); n];
    let mut waits = vec![0; n];
    for (rule, node) in grammar.rules.iter().enumerate() {
        let mut uses = HashSet::new();
        references(node, &mut uses);
        waits[rule] = uses.len();
        uses.into_iter().for_each(|used: usize| users[used].push(rule));
    }
    let mut all = vec![None; n];
    let mut ready: Vec<usize> = (0..n).filter(|&rule| waits[rule] == 0).collect();
    while let Some(rule) = ready.pop() {
        all[rule] = pattern(&grammar.rules[rule], &all);
        for &user in &users[rule] {
            waits[user] -= 1;
            if waits[user] == 0 {
                ready.push(user);
            }
        }
    }
    all
}

fn references(node: &Node, uses: &mut HashSet<usize>) {
    match node {
        Node::Rule(rule) => drop(uses.insert(*rule)),
        Node::All(parts) | Node::One(parts) => parts.iter().for_each(|part| references(part, uses)),
        Node::Repeat(inner, ..) => references(inner, uses),
        Node::Text(_) | Node::Set { .. } => {}
    }
}

fn pattern(node: &Node, rules: &[Option<Pattern>]) -> Option<Pattern> {
    let joined = |parts: &[Node], between: &str| {
        let mut all = Pattern::nothing();
        for (i, part) in parts.iter().enumerate() {
            all.append(if i > 0 { between } else { "" }, &pattern(part, rules)?)?;
        }
        Some(all)
    };
    let made = match node {
        Node::Text(text) => Pattern { text: text.chars().map(escaped).collect(), depth: 0, empty: text.is_empty() },
        Node::Set { negated, ranges } => Pattern { text: set(*negated, ranges), depth: 0, empty: false },
        Node::Rule(rule) => rules.get(*rule)?.clone()?,
        Node::All(parts) => joined(parts, "")?,
        Node::One(parts) => joined(parts, "|")?,
        Node::Repeat(inner, least, most) => {
            let (inner, mut all) = (pattern(inner, rules)?, Pattern::nothing());
            all.append("", &inner)?;
            all.text += &times(*least, *most);
            Pattern { empty: inner.empty || *least == 0, ..all }
        }
    };
    made.fits().then_some(made)
}

/// A character in a regular expression, inside and outside of sets.
fn escaped(c: char) -> String {
    match c {
        c if c.is_ascii_alphanumeric() || matches!(c, ' ' | '_' | ',' | ':' | ';') => c.to_string(),
        c => format!("\\x{{{:x}}}", u32::from(c)),
    }
}

fn set(negated: bool, ranges: &[(char, char)]) -> String {
    if ranges.is_empty() {
        return r"[\x{0}-\x{10ffff}]".into();
    }
    let mut out = String::from(if negated { "[^" } else { "[" });
    for &(first, last) in ranges {
        out += &escaped(first);
        if last > first {
            out.push('-');
            out += &escaped(last);
        }
    }
    out.push(']');
    out
}

fn times(least: u32, most: Option<u32>) -> String {
    match (least, most) {
        (0, None) => "*".into(),
        (1, None) => "+".into(),
        (0, Some(1)) => "?".into(),
        (n, None) => format!("{{{n},}}"),
        (n, Some(m)) if n == m => format!("{{{n}}}"),
        (n, Some(m)) => format!("{{{n},{m}}}"),
    }
}

/// Writes Lark.
struct Writer {
    patterns: Vec<Option<Pattern>>,
    /// Terminals of several characters that were tried alone, and whether they are fit to be one.
    tried: HashMap<String, bool>,
    /// How many more may be tried.
    trials: usize,
    /// Those that clash with others.
    banned: HashSet<String>,
    /// Whether every terminal is a single character.
    plain: bool,
    /// How many bytes of expressions may still be built of items in a row.
    bytes: usize,
}

/// The rules that are still to be written, and the terminals so far.
#[derive(Default)]
struct Work {
    rules: Vec<usize>,
    known: HashSet<usize>,
    terminals: HashSet<String>,
}

impl Writer {
    /// The grammar, and its terminals.
    fn write(&mut self, grammar: &Grammar) -> (String, HashSet<String>) {
        let mut out = String::new();
        let mut work = Work { rules: vec![0], known: HashSet::from([0]), ..Work::default() };
        while let Some(rule) = work.rules.pop() {
            out += &name(rule);
            out.push(':');
            let node = &grammar.rules[rule];
            match node {
                // Brackets are only needed inside.
                Node::One(parts) => self.choice(parts, &mut out, &mut work),
                _ => self.node(node, &mut out, &mut work),
            }
            out.push('\n');
        }
        (out, work.terminals)
    }

    fn node(&mut self, node: &Node, out: &mut String, work: &mut Work) {
        if let Some(terminal) = self.terminal(node) {
            return put(&terminal, out, work);
        }
        match node {
            Node::Text(text) if text.is_empty() => *out += " \"\"",
            Node::Text(text) => text.chars().for_each(|c| put(&escaped(c), out, work)),
            Node::Set { negated, ranges } => put(&set(*negated, ranges), out, work),
            Node::Rule(rule) => {
                if work.known.insert(*rule) {
                    work.rules.push(*rule);
                }
                let _ = write!(out, " {}", name(*rule));
            }
            Node::All(parts) if parts.is_empty() => *out += " \"\"",
            Node::All(parts) => self.row(parts, out, work),
            Node::One(parts) => {
                *out += " (";
                self.choice(parts, out, work);
                *out += " )";
            }
            Node::Repeat(inner, least, most) => {
                *out += " (";
                self.node(inner, out, work);
                *out += " )";
                *out += &times(*least, *most);
            }
        }
    }

    fn choice(&mut self, parts: &[Node], out: &mut String, work: &mut Work) {
        for (i, part) in parts.iter().enumerate() {
            if i > 0 {
                *out += " |";
            }
            self.node(part, out, work);
        }
    }

    /// Items one after the other: as many as possible as one terminal.
    fn row(&mut self, parts: &[Node], out: &mut String, work: &mut Work) {
        let mut at = 0;
        while at < parts.len() {
            let mut made = Pattern::nothing();
            let mut runs = Vec::new();
            for (i, part) in parts[at..].iter().take(RUN).enumerate() {
                let next = pattern(part, &self.patterns);
                if next.is_none_or(|next| made.append("", &next).is_none()) || !self.afford(made.text.len()) {
                    break;
                }
                runs.push((at + i + 1, made.clone()));
            }
            let found = runs.into_iter().skip(1).rev().find_map(|(end, made)| Some((end, self.fit(made)?)));
            match found {
                Some((end, terminal)) => {
                    put(&terminal, out, work);
                    at = end;
                }
                None => {
                    self.node(&parts[at], out, work);
                    at += 1;
                }
            }
        }
    }

    /// A terminal for the node, if there is one that no longer match can be mistaken for.
    fn terminal(&mut self, node: &Node) -> Option<String> {
        match node {
            // Single characters.
            Node::Set { .. } => None,
            Node::Text(text) if text.chars().count() == 1 => None,
            _ => self.fit(pattern(node, &self.patterns)?),
        }
    }

    /// The same for an expression.
    fn fit(&mut self, made: Pattern) -> Option<String> {
        if self.plain || made.empty || self.banned.contains(&made.text) {
            return None;
        }
        if let Some(&good) = self.tried.get(&made.text) {
            return good.then_some(made.text);
        }
        self.trials = self.trials.checked_sub(1)?;
        let clashing = terminals::clashes(&[&made.text]);
        if clashing.is_none() {
            self.trials = self.trials.saturating_sub(TOO_LARGE);
        }
        let good = clashing.is_some_and(|clashing| clashing.is_empty());
        self.tried.insert(made.text.clone(), good);
        good.then_some(made.text)
    }

    /// Whether expressions of `bytes` more may be built.
    fn afford(&mut self, bytes: usize) -> bool {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.bytes > 0
    }
}

fn put(terminal: &str, out: &mut String, work: &mut Work) {
    let _ = write!(out, " /{terminal}/");
    work.terminals.insert(terminal.to_owned());
}

/// Lark's name of a rule.
fn name(rule: usize) -> String {
    match rule {
        0 => "start".into(),
        n => format!("r_{n}"),
    }
}

#[cfg(test)]
mod tests;
