//! SentencePiece BPE with scores, as GGUF files of tokenizer model `llama` use it: characters are merged pair by pair,
//! always the pair whose joined piece has the highest score, the leftmost on ties (llama.cpp, `llama-vocab.cpp`, SPM).

use super::{Pieces, pieces};
use std::{
    cmp::{Ordering, Reverse},
    collections::{BinaryHeap, HashMap},
};

/// Vocabulary of an SPM tokenizer.
pub(super) struct Spm {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    bytes: Box<[Option<u32>; 256]>,
    unknown: Option<u32>,
    /// Literals of control and user-defined tokens, longest first.
    literals: Vec<(String, u32)>,
    /// A space is put in front of each run of text.
    space_prefix: bool,
}

/// What the constructor takes.
pub(super) struct SpmParts<'a> {
    pub tokens: &'a [String],
    pub scores: Vec<f32>,
    pub literals: Vec<(String, u32)>,
    pub unknown: Option<u32>,
    pub space_prefix: bool,
}

/// A pair of neighbours that may be joined.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| Reverse(self.left).cmp(&Reverse(other.left)))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

/// A run of the text; `len` 0 once it was joined to its left neighbour.
struct Symbol {
    start: usize,
    len: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

impl Spm {
    /// Builds the tables; of equal pieces the first id counts.
    pub fn new(parts: SpmParts<'_>) -> Self {
        let mut ids = HashMap::with_capacity(parts.tokens.len());
        let mut bytes = Box::new([None; 256]);
        for (token, id) in parts.tokens.iter().zip(0u32..) {
            if let Some(b) = pieces::byte_literal(token) {
                bytes[usize::from(b)].get_or_insert(id);
            }
            ids.entry(token.clone()).or_insert(id);
        }
        let mut literals = parts.literals;
        literals.retain(|(text, _)| !text.is_empty());
        literals.sort_by_key(|(text, _)| Reverse(text.len()));
        let (scores, unknown, space_prefix) = (parts.scores, parts.unknown, parts.space_prefix);
        Self { ids, scores, bytes, unknown, literals, space_prefix }
    }

    /// Ids of `text`; literals of special tokens become those tokens.
    pub fn encode(&self, text: &str, pieces: &Pieces) -> Result<Vec<u32>, String> {
        let mut out = Vec::new();
        let mut rest = text;
        // As in llama.cpp, a run of text gets its space when it starts the text or follows a control token.
        let mut prefix = self.space_prefix;
        while !rest.is_empty() {
            let (run, literal) = self.next_literal(rest);
            if !run.is_empty() {
                self.encode_run(run, prefix, &mut out)?;
                prefix = false;
            }
            let Some((text, id)) = literal else { break };
            out.push(id);
            prefix = self.space_prefix && (pieces.is_special(id) || prefix);
            rest = &rest[run.len() + text..];
        }
        Ok(out)
    }

    /// The text before the first literal, and that literal's length and id.
    fn next_literal<'t>(&self, text: &'t str) -> (&'t str, Option<(usize, u32)>) {
        let found = self
            .literals
            .iter()
            .filter_map(|(lit, id)| text.find(lit.as_str()).map(|at| (at, Reverse(lit.len()), *id)))
            .min();
        match found {
            Some((at, Reverse(len), id)) => (&text[..at], Some((len, id))),
            None => (text, None),
        }
    }

    fn encode_run(&self, run: &str, prefix: bool, out: &mut Vec<u32>) -> Result<(), String> {
        let mut text = String::with_capacity(run.len() + 8);
        if prefix {
            text.push('\u{2581}');
        }
        run.chars().for_each(|c| text.push(if c == ' ' { '\u{2581}' } else { c }));
        let mut symbols = characters(&text);
        let mut heap = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.offer(&text, &symbols, right - 1, right, &mut heap);
        }
        while let Some(pair) = heap.pop() {
            let (l, r) = (&symbols[pair.left], &symbols[pair.right]);
            if l.len == 0 || r.len == 0 || l.len + r.len != pair.len {
                continue;
            }
            let next = r.next;
            symbols[pair.left].len = pair.len;
            symbols[pair.left].next = next;
            symbols[pair.right].len = 0;
            if let Some(n) = next {
                symbols[n].prev = Some(pair.left);
                self.offer(&text, &symbols, pair.left, n, &mut heap);
            }
            if let Some(p) = symbols[pair.left].prev {
                self.offer(&text, &symbols, p, pair.left, &mut heap);
            }
        }
        symbols.iter().filter(|s| s.len > 0).try_for_each(|s| self.emit(&text[s.start..s.start + s.len], out))
    }

    fn offer(&self, text: &str, symbols: &[Symbol], left: usize, right: usize, heap: &mut BinaryHeap<Pair>) {
        let start = symbols[left].start;
        let len = symbols[left].len + symbols[right].len;
        if let Some(&id) = self.ids.get(&text[start..start + len]) {
            heap.push(Pair { score: self.scores[id as usize], left, right, len });
        }
    }

    fn emit(&self, piece: &str, out: &mut Vec<u32>) -> Result<(), String> {
        if let Some(&id) = self.ids.get(piece) {
            out.push(id);
            return Ok(());
        }
        for b in piece.bytes() {
            let id = self.bytes[usize::from(b)].or(self.unknown);
            out.push(id.ok_or_else(|| {
                format!("{piece:?} is not in the vocabulary, which has neither byte <0x{b:02X}> nor an unknown token")
            })?);
        }
        Ok(())
    }
}

fn characters(text: &str) -> Vec<Symbol> {
    let count = text.chars().count();
    let link = |i: usize, c: char, start: usize| Symbol {
        start,
        len: c.len_utf8(),
        prev: i.checked_sub(1),
        next: (i + 1 < count).then_some(i + 1),
    };
    text.char_indices().enumerate().map(|(i, (start, c))| link(i, c, start)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spm(space_prefix: bool) -> (Spm, Pieces) {
        let vocab = [
            ("<unk>", 0.0),
            ("<s>", 0.0),
            ("<0xC3>", 0.0),
            ("<0xA9>", 0.0),
            ("\u{2581}", -9.0),
            ("a", -9.0),
            ("b", -9.0),
            ("ab", -2.0),
            ("aa", -1.0),
            ("\u{2581}a", -3.0),
            ("aab", -0.5),
        ];
        let tokens: Vec<String> = vocab.iter().map(|v| v.0.to_owned()).collect();
        let mut table = Pieces::new(true);
        tokens.iter().zip(0..).for_each(|(t, i)| table.push(&pieces::spm(t), i < 2));
        let parts = SpmParts {
            tokens: &tokens,
            scores: vocab.iter().map(|v| v.1).collect(),
            literals: vec![("<s>".into(), 1)],
            unknown: Some(0),
            space_prefix,
        };
        (Spm::new(parts), table)
    }

    #[test]
    fn merges_the_highest_score_first_and_the_leftmost_on_ties() {
        let (s, p) = spm(false);
        assert_eq!(s.encode("aab", &p), Ok(vec![10]), "aa first (-1), then aab (-0.5)");
        assert_eq!(s.encode("aaa", &p), Ok(vec![8, 5]), "two equal pairs: the left one");
        assert_eq!(s.encode("ba", &p), Ok(vec![6, 5]));
    }

    #[test]
    fn bytes_stand_in_for_unknown_characters_and_unknown_for_missing_bytes() {
        let (s, p) = spm(false);
        assert_eq!(s.encode("\u{e9}", &p), Ok(vec![2, 3]));
        assert_eq!(s.encode("z", &p), Ok(vec![0]));
    }

    #[test]
    fn space_prefix_after_control_tokens() {
        let (s, p) = spm(true);
        assert_eq!(s.encode("a", &p), Ok(vec![9]));
        assert_eq!(s.encode("<s>a<s>b", &p), Ok(vec![1, 9, 1, 4, 6]));
        assert_eq!(s.encode("", &p), Ok(vec![]));
    }
}
