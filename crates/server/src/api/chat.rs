//! `POST /v1/chat/completions`.

use super::{
    Arrival, State,
    answer::{self, Common, activity},
    aside, logprobs,
    prepare::{Prepared, fits},
    text,
};
use crate::{
    error::{Error, Result},
    fields::Endpoint,
    http::{Reply, Request},
    schedule::{Event, Step},
    tools::{Call, Delta, Reader},
};
use serde_json::{Value, json};
use std::sync::Arc;

/// Answers a request.
pub(super) async fn answer(state: Arc<State>, request: Request) -> Result<Reply> {
    let arrival = Arrival::new();
    state.has_room()?;
    let reader = state.clone();
    let prepared = aside(move || prepare(&reader, &request)).await?;
    answer::reply::<Answers>(state, prepared, arrival).await
}

fn prepare(state: &State, request: &Request) -> Result<Prepared> {
    let values = state.read(Endpoint::Chat, &request.body)?;
    state.plan(&values)?;
    let text = text::conversation(state, &values)?;
    let template = state.template.as_ref().map_err(|e| Error::field("messages", e))?;
    let ids = template.ids(&state.tokenizer, &text).map_err(|e| Error::field("messages", e))?;
    Prepared::new(state, &values, vec![fits(state, "messages", ids)?], true)
}

struct Answers {
    common: Common,
    choices: Vec<Choice>,
}

#[derive(Default)]
struct Choice {
    text: String,
    /// Finds calls in the text, where there is something to call.
    reader: Option<Reader>,
    /// Calls and their names.
    calls: Vec<(String, Call)>,
    /// Calls that have begun, those included that are more than were asked for.
    called: usize,
    /// Parts of calls that a stream has not told yet.
    parts: Vec<Value>,
    logprobs: Vec<Value>,
    finish: Option<&'static str>,
    lacuna: Option<Value>,
}

impl Choice {
    /// Takes a piece of the answer; `end`: the last.
    fn say(&mut self, state: &State, piece: &str, most: usize, end: bool) {
        let Some(reader) = &mut self.reader else { return self.text.push_str(piece) };
        let mut deltas = reader.push(piece);
        if end {
            deltas.extend(reader.finish());
        }
        for delta in deltas {
            match delta {
                Delta::Text(text) => self.text.push_str(&text),
                Delta::Begin(name) => {
                    self.called += 1;
                    if self.called <= most {
                        let (id, call) = (state.id("call"), Call { name, arguments: String::new() });
                        self.parts.push(call.to_json(&id, Some(self.calls.len())));
                        self.calls.push((id, call));
                    }
                }
                Delta::Arguments(part) if self.called <= most => {
                    let place = self.calls.len().saturating_sub(1);
                    if let Some((_, call)) = self.calls.last_mut() {
                        call.arguments.push_str(&part);
                    }
                    self.parts.push(json!({ "index": place, "function": { "arguments": part } }));
                }
                Delta::Arguments(_) => {}
            }
        }
    }

    /// The object `message` of an answer that is sent whole.
    fn message(&self) -> Value {
        let mut message = json!({ "role": "assistant", "content": self.text });
        if !self.calls.is_empty() {
            message["tool_calls"] = self.calls.iter().map(|(id, call)| call.to_json(id, None)).collect();
            if self.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        message
    }
}

impl Answers {
    fn event(&self, index: usize, delta: Value, logprobs: Value, finish: Option<&str>) -> Value {
        let choice = json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish });
        self.common.frame(<Self as answer::Answers>::PART, vec![choice])
    }
}

impl answer::Answers for Answers {
    const ID: &'static str = "chatcmpl";
    const WHOLE: &'static str = "chat.completion";
    const PART: &'static str = "chat.completion.chunk";

    fn new(_: &State, common: Common) -> Self {
        let prepared = &common.prepared;
        let choice = |_| Choice { reader: prepared.tools.as_ref().map(Reader::new), ..Choice::default() };
        Self { choices: (0..prepared.answers()).map(choice).collect(), common }
    }

    fn common(&self) -> &Common {
        &self.common
    }

    fn take(&mut self, state: &State, index: usize, event: Event) {
        let most = self.common.prepared.calls;
        let choice = &mut self.choices[index];
        match event {
            Event::Step(Step { text, scored, activity: seen, .. }) => {
                choice.say(state, &text, most, false);
                choice.logprobs.extend(scored.map(|s| logprobs::chat(&state.tokenizer, &s)));
                choice.lacuna = seen.as_deref().map(activity);
            }
            Event::Done(done) => {
                choice.say(state, &done.text, most, true);
                choice.finish = Some(match self.common.ended(state, index, &done) {
                    "stop" if choice.called > 0 => "tool_calls",
                    other => other,
                });
            }
            Event::Failed(failure) => choice.finish = Some(self.common.failed(state, failure)),
            Event::Prompt(_) | Event::Vector(_) => {}
        }
    }

    fn choices(&mut self) -> Vec<Value> {
        let top = self.common.prepared.top;
        let choice = |(index, c): (usize, &Choice)| {
            json!({
                "index": index,
                "message": c.message(),
                "logprobs": top.map(|_| json!({ "content": c.logprobs })),
                "finish_reason": c.finish,
            })
        };
        self.choices.iter().enumerate().map(choice).collect()
    }

    fn begin(&mut self) -> Vec<Value> {
        let role = |i| self.event(i, json!({ "role": "assistant", "content": "" }), Value::Null, None);
        (0..self.choices.len()).map(role).collect()
    }

    fn tell(&mut self, index: usize) -> Vec<Value> {
        let choice = &mut self.choices[index];
        let (text, scores) = (std::mem::take(&mut choice.text), std::mem::take(&mut choice.logprobs));
        let (lacuna, finish) = (choice.lacuna.take(), choice.finish);
        let parts = std::mem::take(&mut choice.parts);
        let mut events = Vec::new();
        if !text.is_empty() || !scores.is_empty() || lacuna.is_some() {
            let scores = self.common.prepared.top.map_or(Value::Null, |_| json!({ "content": scores }));
            let mut event = self.event(index, json!({ "content": text }), scores, None);
            if let Some(lacuna) = lacuna {
                event["lacuna"] = lacuna;
            }
            events.push(event);
        }
        for part in parts {
            events.push(self.event(index, json!({ "tool_calls": [part] }), Value::Null, None));
        }
        if let Some(finish) = finish {
            let mut event = self.event(index, json!({}), Value::Null, Some(finish));
            event["timings"] = self.common.timings();
            events.push(event);
        }
        events
    }
}
