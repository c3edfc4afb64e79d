//! `POST /v1/completions`.

use super::{
    Arrival, State,
    answer::{self, Common, activity},
    aside,
    logprobs::Classic,
    prepare::{Prepared, tokens},
};
use crate::{
    error::Result,
    fields::Endpoint,
    http::{Reply, Request},
    schedule::{Event, Step},
};
use serde_json::{Value, json};
use std::sync::Arc;

/// Answers a request.
pub(super) async fn answer(state: Arc<State>, request: Request) -> Result<Reply> {
    let arrival = Arrival::new();
    state.has_room()?;
    let reader = state.clone();
    let prepared = aside(move || {
        let mut values = reader.read(Endpoint::Completions, &request.body)?;
        // The name of the model first: it costs nothing.
        reader.plan(&values)?;
        let prompts = tokens(&reader, "prompt", values.take_inputs("prompt"))?;
        Prepared::new(&reader, &values, prompts, false)
    })
    .await?;
    answer::reply::<Answers>(state, prepared, arrival).await
}

struct Answers {
    common: Common,
    choices: Vec<Choice>,
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
    /// The object of one choice, with what was not told yet.
    fn choice(&mut self, index: usize) -> Value {
        let choice = &mut self.choices[index];
        let logprobs = self.common.prepared.top.map(|_| choice.logprobs.take());
        let text = std::mem::take(&mut choice.text);
        choice.news = false;
        json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish })
    }
}

impl answer::Answers for Answers {
    const ID: &'static str = "cmpl";
    const WHOLE: &'static str = "text_completion";
    const PART: &'static str = "text_completion";

    fn new(state: &State, common: Common) -> Self {
        let prepared = &common.prepared;
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
        Self { common, choices }
    }

    fn common(&self) -> &Common {
        &self.common
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
                choice.finish = Some(self.common.ended(state, index, &done));
            }
            Event::Failed(failure) => choice.finish = Some(self.common.failed(state, failure)),
        }
    }

    fn choices(&mut self) -> Vec<Value> {
        (0..self.choices.len()).map(|i| self.choice(i)).collect()
    }

    fn begin(&mut self) -> Vec<Value> {
        // Scores of the prompt follow with it, so that texts and scores keep their order.
        (0..self.choices.len()).flat_map(|i| self.tell(i)).collect()
    }

    fn tell(&mut self, index: usize) -> Vec<Value> {
        if !self.choices[index].news {
            return Vec::new();
        }
        let (choice, lacuna) = (self.choice(index), self.choices[index].lacuna.take());
        let mut event = self.common.frame(Self::PART, vec![choice]);
        if let Some(lacuna) = lacuna {
            event["lacuna"] = lacuna;
        }
        if self.choices[index].finish.is_some() {
            event["timings"] = self.common.timings();
        }
        vec![event]
    }
}
