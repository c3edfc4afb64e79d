//! How a text is cut into windows, and which of their tokens are scored.

use crate::error::{Error, Result};

/// A sequence that is run on its own, from an empty context.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Logits after the tokens `first..tokens.len() - 1` are scored, each against the token that follows.
    pub first: usize,
    /// Whether this window begins a text (and not in its middle).
    pub begins_text: bool,
}

impl Window {
    /// Number of scored predictions.
    pub fn predictions(&self) -> usize {
        (self.tokens.len().saturating_sub(1)).saturating_sub(self.first)
    }
}

/// A protocol of perplexity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// llama.cpp's default: chunks of `context` tokens, the second half of each is scored.
    Chunks {
        /// Tokens per chunk.
        context: usize,
    },
    /// llama.cpp's `--ppl-stride`: windows of `context + stride / 2` tokens that advance by `stride`; the last `stride`
    /// predictions of each are scored.
    Stride {
        /// `-c` as given.
        context: usize,
        /// Tokens between two windows.
        stride: usize,
    },
    /// Each document alone, begun with BOS, cut to `context` tokens in all; every token after the first is scored.
    Documents {
        /// Longest window.
        context: usize,
    },
}

/// Cuts one tokenised text (as the tokenizer gave it, with BOS if the model adds one) by [`Protocol::Chunks`] or
/// [`Protocol::Stride`]. `bos`: the token that replaces the first one of each window where the model adds BOS
/// (`examples/perplexity` does the same). At most `limit` windows.
///
/// # Errors
/// Too short a text (llama.cpp asks for two contexts), or a context or stride that makes no sense.
pub fn cut(tokens: &[u32], protocol: Protocol, bos: Option<u32>, limit: Option<usize>) -> Result<Vec<Window>> {
    let (length, advance, first) = match protocol {
        Protocol::Chunks { context } => (context, context, context / 2),
        Protocol::Stride { context, stride } => {
            let length = context + stride / 2;
            (length, stride, length.saturating_sub(stride + 1))
        }
        Protocol::Documents { .. } => {
            let problem = "documents are cut by `documents`, not from one text".into();
            return Err(Error::Argument { name: "protocol", problem });
        }
    };
    if advance == 0 || length < 4 || advance >= length && matches!(protocol, Protocol::Stride { .. }) {
        let problem = format!("{protocol:?} cannot be used: contexts have at least 4 tokens, strides 1 to the context");
        return Err(Error::Argument { name: "protocol", problem });
    }
    if tokens.len() < 2 * length {
        let problem = format!(
            "{} tokens; a context of {length} needs at least {} (a longer text or a shorter -c)",
            tokens.len(),
            2 * length
        );
        return Err(Error::Argument { name: "text", problem });
    }
    let count = match protocol {
        Protocol::Stride { stride, .. } => (tokens.len() - length).div_ceil(stride),
        _ => tokens.len() / length,
    };
    let windows = (0..count.min(limit.unwrap_or(count))).map(|i| {
        let mut window = tokens[i * advance..i * advance + length].to_vec();
        if let Some(bos) = bos {
            window[0] = bos;
        }
        Window { tokens: window, first, begins_text: i == 0 }
    });
    Ok(windows.collect())
}

/// One window per document, each already begun with BOS by its encoding; documents without a prediction are left out.
pub fn documents(documents: impl IntoIterator<Item = Vec<u32>>, context: usize) -> Vec<Window> {
    let cut = |mut tokens: Vec<u32>| {
        tokens.truncate(context);
        Window { tokens, first: 0, begins_text: true }
    };
    documents.into_iter().map(cut).filter(|w| w.predictions() > 0).collect()
}

/// The documents of a text file: parts between lines that consist of `mark`, stripped of white space around them.
pub fn split_documents<'a>(text: &'a str, mark: &str) -> Vec<&'a str> {
    let mut parts = Vec::new();
    let (mut start, mut at) = (0, 0);
    for line in text.split_inclusive('\n') {
        if line.trim() == mark {
            parts.push(&text[start..at]);
            start = at + line.len();
        }
        at += line.len();
    }
    parts.push(&text[start..]);
    parts.into_iter().map(str::trim).filter(|p| !p.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_score_their_second_half() {
        let tokens: Vec<u32> = (0..35).collect();
        let w = cut(&tokens, Protocol::Chunks { context: 10 }, Some(99), None).unwrap();
        assert_eq!(w.len(), 3);
        assert_eq!((w[1].tokens[0], w[1].tokens[1], w[1].first, w[1].predictions()), (99, 11, 5, 4));
        assert_eq!(cut(&tokens, Protocol::Chunks { context: 10 }, None, Some(2)).unwrap()[1].tokens[0], 10);
        let e = cut(&tokens, Protocol::Chunks { context: 20 }, None, None).unwrap_err().to_string();
        assert!(e.contains("at least 40"), "{e}");
    }

    #[test]
    fn strides_score_each_token_once() {
        let tokens: Vec<u32> = (0..40).collect();
        let w = cut(&tokens, Protocol::Stride { context: 8, stride: 4 }, None, None).unwrap();
        assert_eq!(w.len(), (40 - 10usize).div_ceil(4));
        let scored: Vec<u32> = w.iter().flat_map(|w| w.tokens[w.first + 1..].to_vec()).collect();
        assert_eq!(scored, (6..6 + scored.len() as u32).collect::<Vec<_>>());
        assert!(cut(&tokens, Protocol::Stride { context: 8, stride: 0 }, None, None).is_err());
    }

    #[test]
    fn documents_are_cut_at_marks() {
        let text = "one\n<|endoftext|>\n\n two\nlines \n<|endoftext|>\n";
        assert_eq!(split_documents(text, "<|endoftext|>"), ["one", "two\nlines"]);
        let w = documents([vec![0, 1, 2, 3], vec![0]], 3);
        assert_eq!((w.len(), w[0].predictions()), (1, 2));
    }
}
