//! One answer while it is computed.

use super::{
    Activity, Done, Event, Failure, Finish, Job, Pooling, Probe, Scored, Step, Strip, Task, Usage,
    job::{Events, Generate},
};
use crate::constraint::Stopped;
use lacuna::{
    engine::{Counters, Engine, KvBlock, Session, generate::Stops, sampler::Sampler},
    error::Error,
    eval::LogSoftmax,
    tokenizer::{TextStream, Tokenizer},
};
use lacuna_core::{
    observer::Observer,
    site::{Point, Proj},
};
use std::{sync::Arc, time::Instant};

/// Cells of a strip at most.
const CELLS: usize = 256;

/// Whether an answer goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It has parts of its prompt to compute.
    Prefill,
    /// It has a token to decode.
    Decode,
    /// It has ended, and everything was told.
    Ended,
}

/// One answer.
pub(super) struct Sequence<'t> {
    pub plan: usize,
    pub group: u64,
    pub index: usize,
    pub prompt: Arc<[u32]>,
    pub session: Session,
    pub state: State,
    /// The token that is decoded next.
    pub pending: u32,
    /// Whether a turn of its prompt was taken.
    pub begun: bool,
    work: Work<'t>,
    events: Events,
    /// What was not told yet, and when something was told last. Telling wakes the thread that writes to sockets.
    held: Vec<Event>,
    told: Option<Instant>,
    usage: Usage,
    since: Instant,
}

enum Work<'t> {
    Text(Box<Text<'t>>),
    Vector { pooling: Pooling, sum: Vec<f64> },
}

struct Text<'t> {
    wanted: Generate,
    sampler: Sampler,
    stops: Stops,
    stream: TextStream<'t>,
    tokenizer: &'t Tokenizer,
    changed: Vec<f32>,
}

impl<'t> Sequence<'t> {
    pub fn new(job: Job, engine: &Engine, context: usize, tokenizer: &'t Tokenizer) -> Result<Self, Failure> {
        let refused = |e: Error| {
            tracing::error!("a request that was checked is refused: {e}");
            Failure::Engine
        };
        let work = match job.task {
            Task::Embed(pooling) => Work::Vector { pooling, sum: Vec::new() },
            Task::Generate(wanted) => Work::Text(Box::new(Text {
                sampler: Sampler::new(wanted.sampling).map_err(refused)?,
                stops: Stops::new(&wanted.stop).map_err(refused)?,
                stream: tokenizer.stream(&job.prompt),
                tokenizer,
                changed: Vec::new(),
                wanted: *wanted,
            })),
        };
        let usage = Usage { prompt: job.prompt.len(), queued: job.since.elapsed(), ..Usage::default() };
        Ok(Self {
            plan: job.plan,
            group: job.group,
            index: job.index,
            prompt: job.prompt,
            session: engine.session(context).map_err(refused)?,
            state: State::Prefill,
            pending: 0,
            begun: false,
            work,
            events: job.events,
            held: Vec::new(),
            told: None,
            usage,
            since: Instant::now(),
        })
    }

    /// Whether nobody waits for it any more.
    pub fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether a kept prefix may stand in for the beginning of its prompt.
    pub fn may_reuse(&self) -> bool {
        matches!(&self.work, Work::Text(t) if t.wanted.reuse && !t.wanted.score_prompt)
    }

    /// Whether its steps are watched, which is done one by one.
    pub fn is_watched(&self) -> bool {
        matches!(&self.work, Work::Text(t) if t.wanted.activity.is_some())
    }

    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Begins with blocks that are there already.
    pub fn begin_with(&mut self, blocks: &[KvBlock]) {
        if self.session.begin_with(blocks).is_ok() {
            self.usage.cached = self.session.len();
        }
    }

    fn send(&mut self, event: Event) {
        self.held.push(event);
        self.tell();
    }

    /// Tells what was held back.
    pub fn tell(&mut self) {
        for event in self.held.drain(..) {
            // A receiver that is gone is noticed before the next turn.
            let _ = self.events.send((self.index, event));
        }
        self.told = Some(Instant::now());
    }

    /// Ends it by a fault.
    pub fn fail(&mut self, failure: Failure) {
        if self.state != State::Ended {
            self.state = State::Ended;
            self.send(Event::Failed(failure));
        }
    }

    /// Computes at most `most` tokens of the prompt; returns how many.
    pub fn prefill(&mut self, most: usize, probe: Option<&Probe>) -> usize {
        let (from, whole) = (self.session.len(), self.prompt.len());
        let matrix = self.session.matrix_part(whole);
        let to = match &self.work {
            Work::Text(text) if !text.wanted.score_prompt && from < matrix => matrix.min(from + most),
            Work::Text(text) if !text.wanted.score_prompt => whole,
            _ => whole.min(from + most),
        };
        let last = to == whole;
        let prompt = self.prompt.clone();
        let done = match &mut self.work {
            Work::Vector { sum, pooling } => {
                self.session.observe(&prompt[from..to], &mut Hidden { sum, pooling: *pooling })
            }
            Work::Text(text) if text.wanted.score_prompt => {
                text.score(&mut self.session, &prompt, from, to).and_then(|scores| {
                    // As in `send`: a receiver that is gone is noticed before the next turn.
                    let _ = self.events.send((self.index, Event::Prompt(scores)));
                    if last && matrix < whole && text.wanted.max_tokens > 0 {
                        // The text goes on as it does without scores.
                        self.session.truncate(matrix);
                        self.session.prompt(&prompt[matrix..])?;
                    }
                    Ok(())
                })
            }
            Work::Text(_) if last => self.session.prompt(&prompt[from..]).map(|_| ()),
            Work::Text(_) => self.session.observe(&prompt[from..to], &mut Unseen),
        };
        if let Err(e) = done {
            self.fail(failure(&e));
        } else if last {
            self.prefilled(probe);
        }
        to - from
    }

    /// The prompt is computed: the first token, or the vector.
    fn prefilled(&mut self, probe: Option<&Probe>) {
        self.usage.prefill = self.since.elapsed();
        self.since = Instant::now();
        match &mut self.work {
            Work::Vector { sum, pooling } => {
                let n = if *pooling == Pooling::Mean { self.prompt.len() as f64 } else { 1.0 };
                let vector = sum.iter().map(|v| (v / n) as f32).collect();
                self.send(Event::Vector(vector));
                self.end(Finish::Stop, String::new());
            }
            Work::Text(text) => {
                self.prompt.iter().for_each(|&id| text.sampler.accept(id));
                if text.wanted.max_tokens == 0 {
                    self.end(Finish::Length, String::new());
                } else {
                    self.choose(None, probe);
                }
            }
        }
    }

    /// Chooses the next token from the session's logits and tells it.
    pub fn choose(&mut self, activity: Option<Box<Activity>>, probe: Option<&Probe>) {
        let Work::Text(text) = &mut self.work else { return };
        let chosen = text.choose(&self.prompt, self.session.logits(), probe);
        let (id, scored, complete) = match chosen {
            Ok(chosen) => chosen,
            Err(failure) => return self.fail(failure),
        };
        self.usage.generated += 1;
        let ends = text.tokenizer.is_eos(id) && !text.wanted.ignore_eos;
        let (shown, stopped) = if ends { Default::default() } else { text.stops.push(&text.stream.push(id)) };
        let full = self.usage.generated == text.wanted.max_tokens || self.session.len() == self.session.context();
        let finish = match () {
            () if ends || stopped || complete => Some(Finish::Stop),
            () if full => Some(Finish::Length),
            () => None,
        };
        let rest = finish.map(|_| text.stops.finish(&text.stream.finish())).unwrap_or_default();
        let every = text.wanted.every;
        self.held.push(Event::Step(Step { token: id, text: shown, scored, activity }));
        self.pending = id;
        self.state = State::Decode;
        match finish {
            Some(finish) => self.end(finish, rest),
            None if self.told.is_none_or(|told| told.elapsed() >= every) => self.tell(),
            None => {}
        }
    }

    fn end(&mut self, finish: Finish, text: String) {
        self.usage.decode = self.since.elapsed();
        self.state = State::Ended;
        self.send(Event::Done(Done { text, finish, usage: self.usage }));
    }

    /// Decodes the pending token alone, and looks at what is skipped where that was asked for.
    ///
    /// # Errors
    /// As [`Session::decode`].
    pub fn decode_alone(&mut self) -> Result<Option<Box<Activity>>, Error> {
        let layer = match &self.work {
            Work::Text(text) => text.wanted.activity,
            Work::Vector { .. } => None,
        };
        let Some(layer) = layer else { return self.session.decode(self.pending).map(|_| None) };
        let mut neurons = Neurons { layer, values: Vec::new() };
        self.session.reset_counters();
        self.session.decode_observed(self.pending, &mut neurons)?;
        let strip = Strip { layer, cells: cells(&neurons.values) };
        Ok(Some(Box::new(activity(self.session.counters(), strip))))
    }
}

impl Text<'_> {
    /// The next token, its scores, and whether a grammar is complete.
    fn choose(
        &mut self,
        prompt: &[u32],
        logits: &[f32],
        probe: Option<&Probe>,
    ) -> Result<(u32, Option<Scored>, bool), Failure> {
        let Self { wanted, sampler, changed, .. } = self;
        let plain = wanted.bias.is_empty() && wanted.constraint.is_none() && probe.is_none();
        let mut model = logits;
        if !plain {
            changed.clear();
            changed.extend_from_slice(logits);
            if let Some(probe) = probe {
                probe(prompt, changed);
                if changed.iter().any(|l| !l.is_finite()) {
                    return Err(Failure::NotFinite);
                }
            }
            wanted.bias.iter().for_each(|&(id, add)| {
                if let Some(logit) = changed.get_mut(id as usize) {
                    *logit += add;
                }
            });
            if let Some(constraint) = &mut wanted.constraint {
                constraint.mask(changed).map_err(|e| broken(&e))?;
                if !changed.iter().any(|l| l.is_finite()) {
                    return Err(Failure::Constraint);
                }
            }
            model = changed;
        }
        let id = sampler.sample(model);
        sampler.accept(id);
        let complete = match &mut wanted.constraint {
            Some(constraint) => constraint.accept(id).map_err(|e| broken(&e))? == Stopped::Yes,
            None => false,
        };
        let scored = wanted.top.map(|top| scored(logits, id, top)).transpose().map_err(|e| failure(&e))?;
        Ok((id, scored, complete))
    }

    /// Scores of the tokens behind `from` up to the one at `to`; the one at `to` itself comes with the next part.
    fn score(&self, session: &mut Session, prompt: &[u32], from: usize, to: usize) -> Result<Vec<Scored>, Error> {
        let (mut scores, mut problem) = (Vec::with_capacity(to - from), None);
        let top = self.wanted.top.unwrap_or(0);
        session.score(&prompt[from..to], &mut |position, logits| {
            let Some(&next) = prompt.get(position + 1) else { return };
            match scored(logits, next, top) {
                Ok(one) => scores.push(one),
                Err(e) => problem = Some(e),
            }
        })?;
        problem.map_or(Ok(scores), Err)
    }
}

fn broken(e: &crate::constraint::Broken) -> Failure {
    tracing::info!("{e}");
    Failure::Constraint
}

/// What an error of the engine means for the request.
pub(super) fn failure(e: &Error) -> Failure {
    match e {
        Error::BadLogits { .. } => Failure::NotFinite,
        other => {
            tracing::error!("{other}");
            Failure::Engine
        }
    }
}

/// The log-probability of `token`, and the `top` best.
fn scored(logits: &[f32], token: u32, top: usize) -> Result<Scored, Error> {
    let softmax = LogSoftmax::new(logits)?;
    let mut best: Vec<u32> = Vec::with_capacity(top + 1);
    let at = |id: u32| logits[id as usize];
    for (id, &logit) in (0u32..).zip(logits) {
        if best.len() == top && best.last().is_none_or(|&last| logit <= at(last)) {
            continue;
        }
        let place = best.partition_point(|&b| at(b) >= logit);
        best.insert(place, id);
        best.truncate(top);
    }
    let of = |id: u32| softmax.of(at(id));
    Ok(Scored { token, logprob: of(token), top: best.into_iter().map(|id| (id, of(id))).collect() })
}

/// Sees nothing.
struct Unseen;

impl Observer for Unseen {
    fn wants(&self, _: Point) -> bool {
        false
    }

    fn observe(&mut self, _: Point, _: usize, _: &[f32]) {}
}

/// Adds up final hidden states.
struct Hidden<'a> {
    sum: &'a mut Vec<f64>,
    pooling: Pooling,
}

impl Observer for Hidden<'_> {
    fn wants(&self, point: Point) -> bool {
        point == Point::Head
    }

    fn observe(&mut self, _: Point, width: usize, values: &[f32]) {
        self.sum.resize(width, 0.0);
        for row in values.chunks_exact(width) {
            if self.pooling == Pooling::Last {
                self.sum.fill(0.0);
            }
            self.sum.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
        }
    }
}

/// Keeps the neurons of one layer.
struct Neurons {
    layer: usize,
    values: Vec<f32>,
}

impl Observer for Neurons {
    fn wants(&self, point: Point) -> bool {
        point == Point::Neurons { layer: self.layer }
    }

    fn observe(&mut self, _: Point, _: usize, values: &[f32]) {
        self.values = values.to_vec();
    }
}

/// Magnitudes in at most [`CELLS`] cells, the strongest cell 255.
fn cells(values: &[f32]) -> Vec<u8> {
    let size = values.len().div_ceil(CELLS).max(1);
    let mean = |part: &[f32]| part.iter().map(|v| v.abs()).sum::<f32>() / part.len() as f32;
    let means: Vec<f32> = values.chunks(size).map(mean).collect();
    let most = means.iter().copied().fold(0.0, f32::max);
    // What is used at all shows.
    let cell = |m: f32| if m > 0.0 && most > 0.0 { (m / most * 255.0).ceil() as u8 } else { 0 };
    means.into_iter().map(cell).collect()
}

fn activity(counters: &Counters, strip: Strip) -> Activity {
    let used: Vec<Proj> = Proj::ALL.into_iter().filter(|p| counters.input(*p).total > 0).collect();
    let neurons = counters.neurons().total > 0;
    let sites = used.iter().map(|p| p.name().to_owned()).chain(neurons.then(|| "mlp.neurons".to_owned()));
    let kept = counters.layers.iter().map(|layer| {
        let inputs = used.iter().map(|p| layer.inputs[*p as usize].share());
        inputs.chain(neurons.then(|| layer.neurons.share())).collect()
    });
    Activity { bytes: counters.weight_bytes + counters.kv_bytes, sites: sites.collect(), kept: kept.collect(), strip }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_in_order_and_equal_to_the_token_itself() {
        let logits = [0.5f32, 2.0, -1.0, 2.0, 1.0];
        let s = scored(&logits, 3, 3).expect("finite");
        assert_eq!(s.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 4]);
        assert_eq!(s.logprob, s.top[1].1, "the same number, not one that is close");
        let sum: f64 = scored(&logits, 0, 5).expect("finite").top.iter().map(|t| t.1.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert!(scored(&logits, 0, 0).expect("finite").top.is_empty());
        assert!(scored(&[0.0, f32::NAN], 0, 1).is_err());
    }

    #[test]
    fn strips_have_few_cells_and_show_what_is_open() {
        assert_eq!(cells(&[]), [0u8; 0]);
        assert_eq!(cells(&[0.0, -2.0, 1.0]), [0, 255, 128]);
        let mut many = vec![0.0; 1000];
        many[999] = 0.001;
        many[0] = 1000.0;
        let cells = cells(&many);
        assert!(cells.len() <= CELLS && cells[0] == 255 && cells.last() == Some(&1), "{cells:?}");
    }
}
