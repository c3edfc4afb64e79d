//! `POST /v1/completions`.

use super::{
    Arrival, Running, State,
    answer::{Sum, activity, ended, failed, reason},
    aside,
    logprobs::Classic,
    prepare::{Prepared, tokens},
    stream,
};
use crate::{
    error::{Error, Result},
    fields::Endpoint,
    http::{Reply, Request, StatusCode},
    schedule::{Event, Failure, Step},
};
use serde_json::{Value, json};
use std::sync::{Arc, atomic::Ordering};

/// Answers a request.
pub(super) async fn answer(state: Arc<State>, request: Request) -> Result<Reply> {
    let arrival = Arrival::new();
    let aside_state = state.clone();
    let mut prepared = aside(move || {
        let mut values = aside_state.read(Endpoint::Completions, &request.body)?;
        // The name of the model first: it costs nothing.
        aside_state.plan(&values)?;
        let prompts = tokens(&aside_state, "prompt", values.take_inputs("prompt"))?;
        Prepared::new(&aside_state, &values, prompts, false)
    })
    .await?;
    let group = state.ids.fetch_add(1, Ordering::Relaxed);
    let running = state.submit(|events| prepared.jobs(group, &arrival, &events))?;
    let answers = Answers::new(&state, prepared, &arrival);
    if answers.prepared.stream {
        return Ok(stream::reply(state, running, answers));
    }
    whole(&state, running, answers).await
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
    let choices: Vec<Value> = (0..answers.choices.len()).map(|i| answers.choice(i)).collect();
    let mut body = answers.frame(choices);
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
    logprobs: Classic,
    finish: Option<&'static str>,
    lacuna: Option<Value>,
    /// Whether there is something to tell.
    news: bool,
}

impl Answers {
    fn new(state: &Arc<State>, prepared: Prepared, arrival: &Arrival) -> Self {
        let mut choices: Vec<Choice> = Vec::new();
        choices.resize_with(prepared.answers(), Choice::default);
        for (i, choice) in choices.iter_mut().enumerate().filter(|_| prepared.echo) {
            let prompt = &prepared.prompts[i / prepared.n];
            choice.text = state.tokenizer.decode(prompt);
            choice.news = true;
            if prepared.top.is_some() {
                choice.logprobs.first(&state.tokenizer, prompt[0]);
            }
        }
        Self {
            id: state.id("cmpl"),
            created: arrival.seconds,
            model: state.names[prepared.plan].clone(),
            prepared,
            choices,
            sum: Sum::default(),
        }
    }

    fn take(&mut self, state: &State, index: usize, event: Event) {
        let choice = &mut self.choices[index];
        choice.news = true;
        match event {
            Event::Prompt(scores) => scores.iter().for_each(|s| choice.logprobs.add(&state.tokenizer, s)),
            Event::Step(Step { text, scored, activity: seen, .. }) => {
                choice.text.push_str(&text);
                if let Some(scored) = &scored {
                    choice.logprobs.add(&state.tokenizer, scored);
                }
                choice.lacuna = seen.as_deref().map(activity);
                choice.news = !text.is_empty() || scored.is_some() || seen.is_some();
            }
            Event::Vector(_) => {}
            Event::Done(done) => {
                choice.text.push_str(&done.text);
                choice.finish = Some(reason(done.finish));
                self.sum.add(index, self.prepared.n, &done.usage);
                ended(state, &self.id, done.finish, &done.usage);
            }
            Event::Failed(failure) => {
                choice.finish = Some("error");
                failed(state, &self.id, failure);
            }
        }
    }

    /// The object of one choice, with what was not told yet.
    fn choice(&mut self, index: usize) -> Value {
        let choice = &mut self.choices[index];
        let logprobs = self.prepared.top.map(|_| choice.logprobs.take());
        let text = std::mem::take(&mut choice.text);
        choice.news = false;
        json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish })
    }

    fn frame(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    fn tell(&mut self, index: usize) -> Value {
        let (choice, lacuna) = (self.choice(index), self.choices[index].lacuna.take());
        let mut event = self.frame(vec![choice]);
        if let Some(lacuna) = lacuna {
            event["lacuna"] = lacuna;
        }
        if self.choices[index].finish.is_some() {
            event["timings"] = self.sum.timings();
        }
        event
    }
}

impl stream::Events for Answers {
    fn begin(&mut self) -> Vec<Value> {
        // Scores of the prompt follow with it, so that texts and scores keep their order.
        let all = 0..self.choices.len();
        if self.prepared.echo { all.map(|i| self.tell(i)).collect() } else { Vec::new() }
    }

    fn news(&mut self, state: &State, index: usize, event: Event) -> Vec<Value> {
        self.take(state, index, event);
        if self.choices[index].news { vec![self.tell(index)] } else { Vec::new() }
    }

    fn end(&mut self) -> Vec<Value> {
        if !self.prepared.include_usage {
            return Vec::new();
        }
        let mut last = self.frame(Vec::new());
        last["usage"] = self.sum.usage();
        vec![last]
    }
}
