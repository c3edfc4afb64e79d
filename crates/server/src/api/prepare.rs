//! From the fields of a request to jobs.

use super::{Arrival, State};
use crate::{
    constraint::{Constraint, Form, Limits, Refused},
    error::{Error, Result},
    fields::{Input, Values},
    schedule::{Events, Generate, Job, Task},
    tools::Tools,
};
use lacuna::engine::sampler::SamplerOptions;
use serde_json::Value;
use std::{sync::Arc, time::Duration};

/// Most answers of one request, over all its prompts.
const ANSWERS: usize = 256;

/// Tokens of a stream that come faster than this share a write to the socket: nobody reads 200 events in a second, and each
/// write costs as much as a tenth of a token of a small model.
const GROUP: Duration = Duration::from_millis(5);
/// The same where the answer is sent as a whole.
const GROUP_UNSEEN: Duration = Duration::from_millis(200);

/// A request that was checked.
pub(super) struct Prepared {
    /// The index of the model's name.
    pub plan: usize,
    pub prompts: Vec<Arc<[u32]>>,
    /// Answers per prompt.
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub echo: bool,
    /// Log-probabilities, of so many best.
    pub top: Option<usize>,
    /// What the answers may call.
    pub tools: Option<Tools>,
    /// Calls of one answer at most.
    pub calls: usize,
    /// One per answer, in the order of the answers.
    generate: Vec<Generate>,
}

impl Prepared {
    /// Checks what is common to both kinds of completions. Compiles the grammar: call it aside.
    pub fn new(state: &State, values: &Values, prompts: Vec<Vec<u32>>, chat: bool) -> Result<Self> {
        let n = values.count("n").unwrap_or(1);
        if prompts.len() * n > ANSWERS {
            let problem =
                format!("{} prompts times {n} answers are more than the {ANSWERS} of one request", prompts.len());
            return Err(Error::field("n", problem));
        }
        let top = match chat {
            true => values.flag("logprobs").then(|| values.count("top_logprobs").unwrap_or(0)),
            false => values.count("logprobs"),
        };
        let echo = !chat && values.flag("echo");
        let max_tokens = values.count("max_tokens").unwrap_or(if chat { state.bounds.context } else { 16 });
        let sampling = sampling(values);
        sampling.check().map_err(|e| Error::invalid(e.to_string()))?;
        let activity = values.flag("return_activity").then(|| values.count("activity_layer").unwrap_or(0));
        let form = form(values)?;
        let answers = prompts.len() * n;
        let mut generate = Vec::with_capacity(answers);
        for answer in 0..answers {
            let seed = sampling.seed.wrapping_add((answer % n) as u64);
            generate.push(Generate {
                sampling: SamplerOptions { seed, ..sampling },
                max_tokens,
                stop: values.texts("stop"),
                ignore_eos: values.flag("ignore_eos"),
                bias: values.bias("logit_bias"),
                top,
                score_prompt: echo && top.is_some(),
                activity,
                constraint: form.as_ref().map(|form| compile(state, form)).transpose()?,
                reuse: values.flag("cache_prompt"),
                every: if values.flag("stream") { GROUP } else { GROUP_UNSEEN },
            });
        }
        Ok(Self {
            plan: state.plan(values)?,
            prompts: prompts.into_iter().map(Arc::from).collect(),
            n,
            stream: values.flag("stream"),
            include_usage: include_usage(values)?,
            echo,
            top,
            tools: super::text::offered(values)?,
            calls: if !chat || values.flag("parallel_tool_calls") { usize::MAX } else { 1 },
            generate,
        })
    }

    /// The jobs, one per answer; the settings are taken out.
    pub fn jobs(&mut self, group: u64, arrival: &Arrival, events: &Events) -> Vec<Job> {
        let generate = std::mem::take(&mut self.generate);
        let job = |(index, generate): (usize, Generate)| Job {
            plan: self.plan,
            prompt: self.prompts[index / self.n].clone(),
            task: Task::Generate(Box::new(generate)),
            index,
            group,
            since: arrival.at,
            events: events.clone(),
        };
        generate.into_iter().enumerate().map(job).collect()
    }

    /// Number of answers.
    pub fn answers(&self) -> usize {
        self.prompts.len() * self.n
    }
}

fn include_usage(values: &Values) -> Result<bool> {
    match values.json("stream_options").and_then(|o| o.get("include_usage")) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        Some(_) => Err(Error::field("stream_options", "`include_usage` takes true or false")),
    }
}

fn sampling(values: &Values) -> SamplerOptions {
    let clock = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        since.as_nanos() as u64
    };
    SamplerOptions {
        seed: values.int("seed").map_or_else(clock, |s| s as u64),
        temp: values.float("temperature"),
        top_k: values.count("top_k").unwrap_or(0),
        top_p: values.float("top_p"),
        min_p: values.float("min_p"),
        repeat_penalty: values.float("repetition_penalty"),
        repeat_last: values.count("repeat_last_n").unwrap_or(64),
        presence_penalty: values.float("presence_penalty"),
        frequency_penalty: values.float("frequency_penalty"),
    }
}

/// The form that the answer must have; at most one.
fn form(values: &Values) -> Result<Option<Form>> {
    let mut forms = Vec::new();
    if let Some(format) = values.json("response_format") {
        forms.extend(response_format(format)?);
    }
    if let Some(schema) = values.json("json_schema") {
        forms.push(Form::Schema { schema: schema.clone(), strict: false });
    }
    if let Some(grammar) = values.text("grammar").filter(|g| !g.is_empty()) {
        forms.push(Form::Grammar(grammar.to_owned()));
    }
    forms.extend(super::text::offered(values)?.and_then(|tools| tools.form()));
    if forms.len() > 1 {
        let problem = "give one of `response_format`, `json_schema`, `grammar` and a forced `tool_choice`";
        return Err(Error::field("response_format", problem));
    }
    Ok(forms.pop())
}

fn response_format(format: &Value) -> Result<Option<Form>> {
    let wrong = |problem: &str| Err(Error::field("response_format", problem));
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(match format.get("schema") {
            Some(schema @ Value::Object(_)) => Form::Schema { schema: schema.clone(), strict: false },
            _ => Form::JsonObject,
        })),
        Some("json_schema") => {
            let given = format.get("json_schema").unwrap_or(&Value::Null);
            let strict = given.get("strict").and_then(Value::as_bool).unwrap_or(false);
            match given.get("schema") {
                Some(schema @ Value::Object(_)) => Ok(Some(Form::Schema { schema: schema.clone(), strict })),
                _ => wrong("`json_schema.schema` must be an object"),
            }
        }
        _ => wrong("`type` is one of text, json_object, json_schema"),
    }
}

fn compile(state: &State, form: &Form) -> Result<Constraint> {
    let grammars = state.grammars.as_ref().map_err(|e| Error::invalid(e.clone()))?;
    grammars.compile(form, &Limits::default()).map_err(|e| match e {
        Refused::Invalid(problem) => Error::field("response_format", problem),
        Refused::Busy(_) => Error::busy(&e.to_string()),
    })
}

/// The token ids of prompts, each checked against the context.
pub(super) fn tokens(state: &State, name: &str, inputs: Vec<Input>) -> Result<Vec<Vec<u32>>> {
    let one = |input| {
        let ids = match input {
            Input::Ids(ids) => ids,
            Input::Text(text) => {
                short_enough(state, name, &text)?;
                state.tokenizer.encode(&text, true).map_err(|e| Error::field(name, e))?
            }
        };
        fits(state, name, ids)
    };
    inputs.into_iter().map(one).collect()
}

/// Refuses a text that cannot fit, whatever its tokens are, before it is cut into tokens.
pub(super) fn short_enough(state: &State, name: &str, text: &str) -> Result<()> {
    let least = text.len() / state.longest;
    if least > state.bounds.context {
        return Err(Error::context(name, format_args!("at least {least}"), state.bounds.context));
    }
    Ok(())
}

/// Refuses prompts that are empty or do not fit.
pub(super) fn fits(state: &State, name: &str, ids: Vec<u32>) -> Result<Vec<u32>> {
    match ids.len() {
        0 => Err(Error::field(name, "it is empty, and this model has no token that begins a text")),
        n if n > state.bounds.context => Err(Error::context(name, n, state.bounds.context)),
        _ => Ok(ids),
    }
}
