//! Log-probabilities in the two shapes that clients read.

use crate::schedule::Scored;
use lacuna::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

/// The classic shape of completions, filled token by token: four lists of the same length.
#[derive(Default)]
pub(super) struct Classic {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
    /// Characters before the next token.
    offset: usize,
}

impl Classic {
    /// The first token of a prompt, which nothing precedes.
    pub fn first(&mut self, tokenizer: &Tokenizer, token: u32) {
        self.push(tokenizer.literal(token), Value::Null, Value::Null);
    }

    /// A token with its scores. Its own entry is among the best even if it is none of them: clients find out whether a
    /// token was the most likely one by comparing it with the largest entry.
    pub fn add(&mut self, tokenizer: &Tokenizer, scored: &Scored) {
        let mut top = Map::new();
        for (id, logprob) in scored.top.iter().chain([&(scored.token, scored.logprob)]) {
            // Tokens of equal text share an entry, that of the more likely one.
            top.entry(tokenizer.literal(*id)).or_insert_with(|| Value::from(*logprob));
        }
        self.push(tokenizer.literal(scored.token), Value::from(scored.logprob), Value::Object(top));
    }

    fn push(&mut self, text: String, logprob: Value, top: Value) {
        self.text_offset.push(self.offset.into());
        self.offset += text.chars().count();
        self.tokens.push(text.into());
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }

    /// What was added since the last call.
    pub fn take(&mut self) -> Value {
        let mut list = |l: fn(&mut Self) -> &mut Vec<Value>| Value::Array(std::mem::take(l(self)));
        json!({
            "tokens": list(|s| &mut s.tokens),
            "token_logprobs": list(|s| &mut s.token_logprobs),
            "top_logprobs": list(|s| &mut s.top_logprobs),
            "text_offset": list(|s| &mut s.text_offset),
        })
    }
}

/// One entry of the chat shape.
pub(super) fn chat(tokenizer: &Tokenizer, scored: &Scored) -> Value {
    let entry = |id: u32, logprob: f64| {
        let bytes = tokenizer.pieces().bytes(id);
        json!({ "token": tokenizer.literal(id), "logprob": logprob, "bytes": bytes })
    };
    let mut one = entry(scored.token, scored.logprob);
    one["top_logprobs"] = scored.top.iter().map(|(id, l)| entry(*id, *l)).collect();
    one
}
