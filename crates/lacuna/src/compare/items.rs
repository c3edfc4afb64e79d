//! Questions: made from the scored text, or read from a file of a known benchmark.

use super::{
    report::TaskFacts,
    task::{Item, Rule, Task},
};
use crate::{
    engine::sampler::Rng,
    error::{Error, Result},
    tokenizer::Tokenizer,
};
use lacuna_core::map::read_small;
use serde_json::Value;
use std::path::Path;

/// Choices of a question that is made from a text.
const CHOICES: usize = 4;
/// Bytes of an ending, so that it says something and a question stays short.
const ENDING: std::ops::RangeInclusive<usize> = 30..=200;
/// Bytes of the story before it, at least.
const STORY: usize = 120;
/// Fewest questions that are worth a column.
const FEWEST: usize = 8;
/// Longest task file in bytes.
const FILE_BYTES: u64 = 64 << 20;

/// Where questions are made for: the tokenizer, the longest sequence, how many, and what decides which.
#[derive(Clone, Copy)]
pub struct Maker<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Longest context in tokens.
    pub context: usize,
    /// Questions at most.
    pub most: usize,
    /// Decides which, and in which order choices stand.
    pub seed: u64,
}

impl Maker<'_> {
    /// Which of four endings belongs to a passage: the true last sentence against those of three other passages. `None`
    /// where the passages give fewer than eight questions.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn endings(&self, passages: &[&str]) -> Result<Option<Task>> {
        let mut stories: Vec<(&str, &str)> = passages.iter().filter_map(|p| split_ending(p)).collect();
        let mut rng = Rng::new(self.seed);
        shuffle(&mut stories, &mut rng);
        let mut items = Vec::new();
        for (i, (story, own)) in stories.iter().enumerate().take_while(|_| stories.len() >= FEWEST) {
            let others = (1..CHOICES).map(|k| stories[(i + k) % stories.len()].1);
            let mut choices: Vec<&str> = [*own].into_iter().chain(others).collect();
            shuffle(&mut choices, &mut rng);
            let answer = choices.iter().position(|c| c == own).unwrap_or(0);
            items.extend(self.item(story, &choices, answer)?);
            if items.len() == self.most {
                break;
            }
        }
        let description = format!(
            "which of {CHOICES} sentences ends a passage of the text: its own, or the last sentences of other passages; the \
             highest log-likelihood per byte decides"
        );
        Ok((items.len() >= FEWEST).then(|| task("endings", description, Rule::Choice, items)))
    }

    /// The questions of a JSON-lines file: `text` (the last word, as LAMBADA), `goal`, `sol1`, `sol2` with labels in
    /// `NAME-labels.lst` beside `NAME.jsonl` (as PIQA), or `query`, `choices`, `gold`.
    ///
    /// # Errors
    /// Not there, too large, or a line of another form.
    pub fn file(&self, path: &Path) -> Result<Task> {
        let bad = |problem: String| Error::Argument { name: "task", problem: format!("{}: {problem}", path.display()) };
        let read = |p: &Path| -> Result<String> {
            String::from_utf8(read_small(p, FILE_BYTES)?.to_vec()).map_err(|_| bad("not UTF-8".into()))
        };
        let text = read(path)?;
        let labels = labels_of(path).filter(|p| p.exists()).map(|p| read(&p)).transpose()?;
        let labels: Vec<&str> = labels.as_deref().map(|t| t.lines().collect()).unwrap_or_default();
        let mut lines: Vec<(usize, &str)> = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).collect();
        shuffle(&mut lines, &mut Rng::new(self.seed));
        let (mut items, mut rule) = (Vec::new(), Rule::Choice);
        for (at, line) in lines {
            let value: Value = serde_json::from_str(line).map_err(|e| bad(format!("line {}: {e}", at + 1)))?;
            let question = question(&value, labels.get(at).copied()).ok_or_else(|| {
                bad(format!(
                    "line {}: expected `text`; `goal`, `sol1`, `sol2` with labels; or `query`, `choices`, `gold`",
                    at + 1
                ))
            })?;
            rule = question.rule;
            let choices: Vec<&str> = question.choices.iter().map(String::as_str).collect();
            items.extend(self.item(&question.context, &choices, question.answer)?);
            if items.len() == self.most {
                break;
            }
        }
        if items.is_empty() {
            return Err(bad(format!("no question fits into {} tokens", self.context)));
        }
        let description = match rule {
            Rule::Exact => "the last word of a passage: right where every token of it is the most likely one",
            Rule::Choice => "the right one of the given answers; the highest log-likelihood per byte decides",
        };
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Ok(task(&name, description.into(), rule, items))
    }

    /// A question in tokens; `None` where it does not fit, or the border between context and answer is inside a token.
    fn item(&self, context: &str, choices: &[&str], answer: usize) -> Result<Option<Item>> {
        let encode = |text: &str| -> Result<Vec<u32>> {
            let mut ids = self.tokenizer.encode(text, true)?;
            if ids.len() > 1
                && self.tokenizer.special().add_eos
                && ids.last().is_some_and(|t| self.tokenizer.is_eos(*t))
            {
                ids.pop();
            }
            Ok(ids)
        };
        let before = encode(context)?;
        let mut tokens = Vec::new();
        for choice in choices {
            let whole = encode(&format!("{context}{choice}"))?;
            match whole.strip_prefix(before.as_slice()) {
                Some(rest) if !rest.is_empty() && whole.len() <= self.context => {
                    tokens.push((rest.to_vec(), choice.len()))
                }
                _ => return Ok(None),
            }
        }
        Ok((!before.is_empty()).then_some(Item { context: before, choices: tokens, answer }))
    }
}

fn task(name: &str, description: String, rule: Rule, items: Vec<Item>) -> Task {
    let chance = match rule {
        Rule::Exact => 0.0,
        Rule::Choice => items.iter().map(|i| 1.0 / i.choices.len() as f64).sum::<f64>() / items.len() as f64,
    };
    let facts = TaskFacts { name: name.into(), description, items: items.len(), chance };
    Task { facts, rule, items }
}

/// The passage before its last sentence, and that sentence with the space before it; `None` where either has an
/// unusable length.
fn split_ending(passage: &str) -> Option<(&str, &str)> {
    let text = passage.trim_end();
    let bytes = text.as_bytes();
    let border = |i: &usize| {
        bytes[*i].is_ascii_whitespace()
            && bytes[..*i].iter().rev().find(|b| **b != b'"' && **b != b'\'').is_some_and(|b| b".!?".contains(b))
    };
    let at = (STORY..text.len()).rev().filter(border).find(|i| text.len() - i >= *ENDING.start())?;
    ENDING.contains(&(text.len() - at)).then(|| text.split_at(at))
}

struct Question {
    context: String,
    choices: Vec<String>,
    answer: usize,
    rule: Rule,
}

fn question(value: &Value, label: Option<&str>) -> Option<Question> {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    if let (Some(goal), Some(a), Some(b)) = (text("goal"), text("sol1"), text("sol2")) {
        let answer = label?.trim().parse().ok().filter(|n| *n < 2)?;
        let context = format!("Question: {goal}\nAnswer:");
        return Some(Question { context, choices: [a, b].map(|s| format!(" {s}")).into(), answer, rule: Rule::Choice });
    }
    if let (Some(query), Some(list)) = (text("query"), value.get("choices").and_then(Value::as_array)) {
        let choices: Vec<String> = list.iter().filter_map(Value::as_str).map(|s| format!(" {s}")).collect();
        let answer = usize::try_from(value.get("gold")?.as_u64()?).ok().filter(|n| *n < choices.len())?;
        return Some(Question { context: query.to_owned(), choices, answer, rule: Rule::Choice });
    }
    let all = text("text")?.trim_end();
    let at = all.rfind(char::is_whitespace)?;
    let (context, word) = all.split_at(at);
    Some(Question { context: context.into(), choices: vec![word.into()], answer: 0, rule: Rule::Exact })
}

/// `valid-labels.lst` beside `valid.jsonl`.
fn labels_of(path: &Path) -> Option<std::path::PathBuf> {
    Some(path.with_file_name(format!("{}-labels.lst", path.file_stem()?.to_str()?)))
}

fn shuffle<T>(list: &mut [T], rng: &mut Rng) {
    for i in (1..list.len()).rev() {
        list.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn endings_are_last_sentences() {
        let story = "A fox lived in a wood. ".repeat(8);
        let text = format!("{story}He said, \"I like you very much, Tom.\" Then they all went home to sleep.\n");
        let (before, ending) = split_ending(&text).unwrap();
        assert_eq!(ending, " Then they all went home to sleep.");
        assert!(before.ends_with("Tom.\""));
        assert_eq!(split_ending("Too short. This one is."), None);
        assert_eq!(split_ending(&"no end here ".repeat(40)), None);
    }

    #[test]
    fn known_files() {
        let q = question(&json!({"text": "the cat sat on the mat"}), None).unwrap();
        assert_eq!((q.context.as_str(), q.choices[0].as_str(), q.rule), ("the cat sat on the", " mat", Rule::Exact));
        let piqa = json!({"goal": "g", "sol1": "a", "sol2": "b"});
        assert_eq!(question(&piqa, Some("1")).unwrap().answer, 1);
        assert!(question(&piqa, None).is_none() && question(&piqa, Some("2")).is_none());
        let q = question(&json!({"query": "q", "choices": ["x", "y"], "gold": 1}), None).unwrap();
        assert_eq!((q.choices.len(), q.answer), (2, 1));
        assert!(question(&json!({"query": "q", "choices": ["x"], "gold": 1}), None).is_none());
        assert!(question(&json!(["x"]), None).is_none());
    }
}
