//! What is asked of the engine, and what comes back.

use crate::constraint::Constraint;
use lacuna::engine::sampler::SamplerOptions;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc::UnboundedSender;

/// Where events go, with the number of the answer. When its receiver is gone, the work ends. It is bounded by what one
/// answer can be: the context.
pub type Events = UnboundedSender<(usize, Event)>;

/// One answer that is wanted.
pub struct Job {
    /// Which engine.
    pub plan: usize,
    /// The prompt, not empty and no longer than the context.
    pub prompt: Arc<[u32]>,
    /// What is done with it.
    pub task: Task,
    /// The number of the answer in its request.
    pub index: usize,
    /// The number of the request: answers to equal prompts wait for the first, whose keys and values they share.
    pub group: u64,
    /// When the request came.
    pub since: Instant,
    /// Where the results go.
    pub events: Events,
}

/// What is done with a prompt.
pub enum Task {
    /// Text.
    Generate(Box<Generate>),
    /// One vector.
    Embed(Pooling),
}

/// How text is generated.
pub struct Generate {
    /// How tokens are chosen.
    pub sampling: SamplerOptions,
    /// Most tokens; 0 only scores the prompt.
    pub max_tokens: usize,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Goes on behind tokens that end a text.
    pub ignore_eos: bool,
    /// Added to logits.
    pub bias: Vec<(u32, f32)>,
    /// Log-probabilities of the tokens and of so many best.
    pub top: Option<usize>,
    /// The same for the prompt.
    pub score_prompt: bool,
    /// Measures of what is skipped, with a strip of this layer.
    pub activity: Option<usize>,
    /// A grammar.
    pub constraint: Option<Constraint>,
    /// Whether kept prefixes may be used.
    pub reuse: bool,
    /// Tokens that follow one another faster than this are told together, the first at once.
    pub every: Duration,
}

/// How hidden states become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The last.
    Last,
}

/// News of one answer.
#[derive(Clone, Debug)]
pub enum Event {
    /// Scores of tokens of the prompt, in order; the first token has none.
    Prompt(Vec<Scored>),
    /// A token was chosen.
    Step(Step),
    /// The vector.
    Vector(Vec<f32>),
    /// The end.
    Done(Done),
    /// The end, by a fault.
    Failed(Failure),
}

/// A token with its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability at its place, before penalties and temperature.
    pub logprob: f64,
    /// The most likely tokens there, best first.
    pub top: Vec<(u32, f64)>,
}

/// A token that was chosen, and the text that is certain with it.
#[derive(Clone, Debug)]
pub struct Step {
    /// The token.
    pub token: u32,
    /// Whole characters that are no part of a stop string; possibly none.
    pub text: String,
    /// Its scores, if asked for.
    pub scored: Option<Scored>,
    /// What the step that led to it read, if asked for and it was a decode step.
    pub activity: Option<Box<Activity>>,
}

/// What one decode step read and kept.
#[derive(Clone, Debug)]
pub struct Activity {
    /// Bytes of weights, keys and values.
    pub bytes: u64,
    /// Places where something is skipped.
    pub sites: Vec<String>,
    /// Per layer, the share kept at each of these.
    pub kept: Vec<Vec<f64>>,
    /// The neurons of one layer.
    pub strip: Strip,
}

/// How strongly the neurons of a layer were used.
#[derive(Clone, Debug, Default)]
pub struct Strip {
    /// The layer.
    pub layer: usize,
    /// Mean magnitudes of neighbouring neurons, 255 for the strongest cell; none in a mixture of experts.
    pub cells: Vec<u8>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A token that ends a text, a stop string, or the end of the grammar.
    Stop,
    /// As many tokens as were asked for, or fit.
    Length,
}

/// The end of an answer.
#[derive(Clone, Debug)]
pub struct Done {
    /// Text that was held back.
    pub text: String,
    /// Why.
    pub finish: Finish,
    /// How much and how long.
    pub usage: Usage,
}

/// Counts and times of one answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Of these, how many were not computed again.
    pub cached: usize,
    /// Tokens generated.
    pub generated: usize,
    /// Time in the queue.
    pub queued: Duration,
    /// Time from the queue to the first token.
    pub prefill: Duration,
    /// Time from the first token to the end.
    pub decode: Duration,
}

/// Why an answer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The model gave numbers that are none.
    NotFinite,
    /// The grammar cannot go on.
    Constraint,
    /// A panic.
    Panic,
    /// Anything else; the log has it.
    Engine,
}
