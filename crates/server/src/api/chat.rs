//! `POST /v1/chat/completions`.

use super::{
    Arrival, Running, State,
    answer::{Sum, activity, ended, failed, reason},
    aside, logprobs,
    prepare::{Prepared, fits},
    stream, text,
};
use crate::{
    error::{Error, Result},
    fields::Endpoint,
    http::{Reply, Request, StatusCode},
    schedule::{Event, Failure, Step},
    tools::{Call, Delta, Reader},
};
use serde_json::{Value, json};
use std::sync::{Arc, atomic::Ordering};

/// Answers a request.
pub(super) async fn answer(state: Arc<State>, request: Request) -> Result<Reply> {
    let arrival = Arrival::new();
    let reader = state.clone();
    let mut prepared = aside(move || prepare(&reader, &request)).await?;
    let group = state.ids.fetch_add(1, Ordering::Relaxed);
    let running = state.submit(|events| prepared.jobs(group, &arrival, &events))?;
    let answers = Answers::new(&state, prepared, &arrival);
    if answers.prepared.stream {
        return Ok(stream::reply(state, running, answers));
    }
    whole(&state, running, answers).await
}

fn prepare(state: &State, request: &Request) -> Result<Prepared> {
    let values = state.read(Endpoint::Chat, &request.body)?;
    state.plan(&values)?;
    let text = text::conversation(state, &values)?;
    let template = state.template.as_ref().map_err(|e| Error::field("messages", e))?;
    let ids = template.ids(&state.tokenizer, &text).map_err(|e| Error::field("messages", e))?;
    Prepared::new(state, &values, vec![fits(state, "messages", ids)?], true)
}

async fn whole(state: &State, mut running: Running, mut answers: Answers) -> Result<Reply> {
    while let Some((index, event)) = running.next().await {
        if let Event::Failed(Failure::Panic | Failure::Engine) = event {
            failed(state, &answers.id, Failure::Panic);
            return Err(Error::internal("the answer failed by a fault of the server; others are not affected"));
        }
        answers.take(state, index, event);
    }
    running.check()?;
    let choices = std::mem::take(&mut answers.choices);
    let choice = |(index, c): (usize, Choice)| {
        let mut message = json!({ "role": "assistant", "content": c.text });
        if !c.calls.is_empty() {
            let calls = c.calls.iter().map(|(id, call)| call.to_json(id, None));
            message["tool_calls"] = calls.collect();
            if c.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        json!({
            "index": index,
            "message": message,
            "logprobs": answers.prepared.top.map(|_| json!({ "content": c.logprobs })),
            "finish_reason": c.finish,
        })
    };
    let choices: Vec<Value> = choices.into_iter().enumerate().map(choice).collect();
    let mut body = answers.frame("chat.completion", choices);
    body["usage"] = answers.sum.usage();
    body["timings"] = answers.sum.timings();
    Ok(Reply::json(StatusCode::OK, body.to_string()))
}

/// The answers of a request as they grow. In a stream, what was told is taken out.
struct Answers {
    id: String,
    created: u64,
    model: String,
    prepared: Prepared,
    choices: Vec<Choice>,
    sum: Sum,
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

impl Answers {
    fn new(state: &State, prepared: Prepared, arrival: &Arrival) -> Self {
        let mut choices = Vec::new();
        let reader = || prepared.tools.as_ref().map(Reader::new);
        choices.resize_with(prepared.answers(), || Choice { reader: reader(), ..Choice::default() });
        Self {
            id: state.id("chatcmpl"),
            created: arrival.seconds,
            model: state.names[prepared.plan].clone(),
            prepared,
            choices,
            sum: Sum::default(),
        }
    }

    fn take(&mut self, state: &State, index: usize, event: Event) {
        let most = self.prepared.calls;
        let choice = &mut self.choices[index];
        match event {
            Event::Step(Step { text, scored, activity: seen, .. }) => {
                choice.say(state, &text, most, false);
                choice.logprobs.extend(scored.map(|s| logprobs::chat(&state.tokenizer, &s)));
                choice.lacuna = seen.as_deref().map(activity);
            }
            Event::Done(done) => {
                choice.say(state, &done.text, most, true);
                choice.finish = Some(match reason(done.finish) {
                    "stop" if choice.called > 0 => "tool_calls",
                    other => other,
                });
                self.sum.add(index, self.prepared.n, &done.usage);
                ended(state, &self.id, done.finish, &done.usage);
            }
            Event::Failed(failure) => {
                choice.finish = Some("error");
                failed(state, &self.id, failure);
            }
            Event::Prompt(_) | Event::Vector(_) => {}
        }
    }

    fn frame(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, finish: Option<&str>) -> Value {
        let choice = json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish });
        self.frame("chat.completion.chunk", vec![choice])
    }
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
}

impl stream::Events for Answers {
    fn begin(&mut self) -> Vec<Value> {
        let role = |i| self.chunk(i, json!({ "role": "assistant", "content": "" }), Value::Null, None);
        (0..self.choices.len()).map(role).collect()
    }

    fn news(&mut self, state: &State, index: usize, event: Event) -> Vec<Value> {
        self.take(state, index, event);
        let choice = &mut self.choices[index];
        let (text, scores) = (std::mem::take(&mut choice.text), std::mem::take(&mut choice.logprobs));
        let (lacuna, finish) = (choice.lacuna.take(), choice.finish);
        let parts = std::mem::take(&mut choice.parts);
        let mut events = Vec::new();
        if !text.is_empty() || !scores.is_empty() || lacuna.is_some() {
            let scores = self.prepared.top.map_or(Value::Null, |_| json!({ "content": scores }));
            let mut event = self.chunk(index, json!({ "content": text }), scores, None);
            if let Some(lacuna) = lacuna {
                event["lacuna"] = lacuna;
            }
            events.push(event);
        }
        for part in parts {
            events.push(self.chunk(index, json!({ "tool_calls": [part] }), Value::Null, None));
        }
        if let Some(finish) = finish {
            let mut event = self.chunk(index, json!({}), Value::Null, Some(finish));
            event["timings"] = self.sum.timings();
            events.push(event);
        }
        events
    }

    fn end(&mut self) -> Vec<Value> {
        if !self.prepared.include_usage {
            return Vec::new();
        }
        let mut last = self.frame("chat.completion.chunk", Vec::new());
        last["usage"] = self.sum.usage();
        vec![last]
    }
}
