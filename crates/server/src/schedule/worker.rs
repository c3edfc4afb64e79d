//! The engine's thread.

use super::{
    Event, Failure, Job, Prefixes, Shared,
    sequence::{Sequence, State, failure},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

/// How long a turn of prompts may take, so that answers flow and a client that leaves is noticed.
const TURN: Duration = Duration::from_millis(250);
/// Prompt tokens of a turn before any speed is known, and at least: every turn reads all weights, and below this the
/// reading is most of its time (with 16, a 1B model in bf16 took 41 s for 1,025 tokens).
const LEAST: usize = 128;

struct Worker<'a> {
    shared: &'a Shared,
    active: Vec<Sequence<'a>>,
    prefixes: Prefixes,
    /// Prompt tokens of a turn.
    turn: usize,
    /// Whose prompt has the next turn: turns go round, so that each of k prompts gets a k-th of them.
    next: usize,
}

/// Works until the queue is closed and empty. A panic outside of any answer's own work costs the answers under way, and
/// not the server.
pub(super) fn run(shared: &Shared) {
    while guarded(|| work(shared)).is_none() {
        shared.metrics.panics.add(1);
        tracing::error!("the scheduler failed and begins again; the answers under way are lost");
    }
}

fn work(shared: &Shared) {
    let prefixes = Prefixes::new(shared.options.prefixes);
    let mut worker = Worker { shared, active: Vec::new(), prefixes, turn: LEAST, next: 0 };
    while worker.admit() {
        worker.drop_abandoned();
        worker.prefill();
        worker.decode();
        worker.retire();
    }
}

impl<'a> Worker<'a> {
    /// Takes waiting jobs while there is room, the oldest first; waits if there is nothing to do. False at the end.
    fn admit(&mut self) -> bool {
        let room = self.shared.options.parallel.saturating_sub(self.active.len());
        let wanted = |job: &Job| !job.events.is_closed();
        let Some(taken) = self.shared.queue.take(room, self.active.is_empty(), wanted) else { return false };
        self.shared.metrics.cancelled.add(taken.dropped as u64);
        taken.items.into_iter().for_each(|job| self.begin(job));
        self.shared.metrics.running.set(self.active.len());
        true
    }

    fn begin(&mut self, job: Job) {
        let (shared, index, events) = (self.shared, job.index, job.events.clone());
        let Some(engine) = shared.engines.get(job.plan) else { return };
        shared.metrics.queue_seconds.observe(job.since.elapsed());
        let made = guarded(|| Sequence::new(job, engine, shared.options.context, &shared.tokenizer));
        match made.unwrap_or_else(|| Err(self.panicked())) {
            Ok(sequence) => self.active.push(sequence),
            // As everywhere: a receiver that is gone needs no news.
            Err(failure) => drop(events.send((index, Event::Failed(failure)))),
        }
    }

    fn panicked(&self) -> Failure {
        self.shared.metrics.panics.add(1);
        Failure::Panic
    }

    /// Lets go of answers that nobody waits for; their keys and values go back.
    fn drop_abandoned(&mut self) {
        let metrics = &self.shared.metrics;
        self.active.retain(|s| {
            let stays = !s.is_abandoned();
            metrics.cancelled.add(u64::from(!stays));
            stays
        });
    }

    /// Whether the prompt of `i` waits for an equal one of the same request, whose blocks it will share.
    fn waits_for_another(&self, i: usize) -> bool {
        let me = &self.active[i];
        !me.begun
            && me.may_reuse()
            && self.active[..i].iter().any(|other| {
                let same = other.group == me.group && other.plan == me.plan && other.prompt == me.prompt;
                same && other.state == State::Prefill
            })
    }

    /// A turn of prompts.
    fn prefill(&mut self) {
        if self.active.iter().any(|s| s.state == State::Prefill) {
            // It may take long.
            self.active.iter_mut().for_each(Sequence::tell);
        }
        let mut left = self.turn;
        let (start, mut tokens) = (Instant::now(), 0);
        for _ in 0..self.active.len() {
            let i = self.next % self.active.len();
            self.next = i + 1;
            if self.active[i].state != State::Prefill || self.waits_for_another(i) {
                continue;
            }
            let done = self.prefill_one(i, left);
            tokens += done;
            left = left.saturating_sub(done);
            if left == 0 {
                break;
            }
        }
        let took = start.elapsed();
        self.shared.metrics.prompt_tokens.add(tokens as u64);
        // Short turns say little about the speed.
        if tokens * 2 >= self.turn {
            let fits = (tokens as f64 * TURN.as_secs_f64() / took.as_secs_f64().max(1e-6)) as usize;
            let most = self.shared.engines.first().map_or(LEAST, |e| e.prefill_chunk());
            self.turn = ((self.turn + fits) / 2).clamp(LEAST.min(most), most) / LEAST.min(most) * LEAST.min(most);
        }
    }

    fn prefill_one(&mut self, i: usize, most: usize) -> usize {
        let shared = self.shared;
        let engine = &shared.engines[self.active[i].plan];
        let reusable = !engine.follows_prompts();
        let sequence = &mut self.active[i];
        if !sequence.begun && reusable && sequence.may_reuse() {
            let blocks = self.prefixes.find(sequence.plan, &sequence.prompt);
            if !blocks.is_empty() {
                sequence.begin_with(&blocks);
            }
            shared.metrics.prefix_queries.add(sequence.prompt.len() as u64);
            shared.metrics.prefix_hits.add(sequence.usage().cached as u64);
        }
        sequence.begun = true;
        let done = guarded(|| sequence.prefill(most, shared.options.probe.as_ref()));
        let Some(done) = done else {
            let failure = self.panicked();
            self.active[i].fail(failure);
            return 1;
        };
        let sequence = &mut self.active[i];
        let whole = sequence.session.len() == sequence.prompt.len();
        if whole && reusable && sequence.may_reuse() && shared.options.prefixes > 0 {
            let blocks = sequence.session.blocks();
            self.prefixes.insert(sequence.plan, &sequence.prompt, &blocks);
            shared.metrics.prefix_bytes.set(self.prefixes.bytes());
        }
        if sequence.state == State::Decode || sequence.state == State::Ended {
            shared.metrics.generated_tokens.add(sequence.usage().generated as u64);
            shared.metrics.first_token_seconds.observe(sequence.usage().queued + sequence.usage().prefill);
        }
        done
    }

    /// One step of every answer, plan by plan.
    fn decode(&mut self) {
        let start = Instant::now();
        let mut steps = 0;
        for plan in 0..self.shared.engines.len() {
            let mine = |s: &&mut Sequence<'_>| s.plan == plan && s.state == State::Decode;
            let (watched, mut plain): (Vec<_>, Vec<_>) =
                self.active.iter_mut().filter(mine).partition(|s| s.is_watched());
            steps += watched.len() + plain.len();
            if !plain.is_empty() {
                batch(self.shared, plan, &mut plain);
            }
            watched.into_iter().for_each(|s| alone(self.shared, s));
        }
        if steps > 0 {
            self.shared.metrics.generated_tokens.add(steps as u64);
            self.shared.metrics.token_seconds.observe(start.elapsed());
        }
    }

    /// Drops what has ended.
    fn retire(&mut self) {
        self.active.retain(|s| s.state != State::Ended);
        let metrics = &self.shared.metrics;
        metrics.running.set(self.active.len());
        metrics.blocks.set(self.shared.engines.iter().map(lacuna::engine::Engine::blocks_in_use).sum());
    }
}

/// One step of several answers in one pass. If the pass fails as a whole, each answer takes its step alone, so that only
/// those fail that cannot go on.
fn batch(shared: &Shared, plan: usize, sequences: &mut [&mut Sequence<'_>]) {
    let lengths: Vec<usize> = sequences.iter().map(|s| s.session.len()).collect();
    let passed = guarded(|| {
        let mut rows: Vec<_> = sequences.iter_mut().map(|s| (&mut s.session, s.pending)).collect();
        shared.engines[plan].decode_batch(&mut rows).is_ok()
    });
    for (sequence, before) in sequences.iter_mut().zip(lengths) {
        let stepped = sequence.session.len() == before + 1;
        match passed {
            Some(true) => choose(shared, sequence, None),
            // A pass with bad logits in one row has extended all sessions.
            Some(false) if stepped && sequence.session.logits().iter().all(|l| l.is_finite()) => {
                choose(shared, sequence, None);
            }
            Some(false) if stepped => sequence.fail(Failure::NotFinite),
            _ => {
                sequence.session.truncate(before);
                alone(shared, sequence);
            }
        }
    }
}

/// One step of one answer.
fn alone(shared: &Shared, sequence: &mut Sequence<'_>) {
    match guarded(|| sequence.decode_alone()) {
        Some(Ok(activity)) => choose(shared, sequence, activity),
        Some(Err(e)) => sequence.fail(failure(&e)),
        None => {
            shared.metrics.panics.add(1);
            sequence.fail(Failure::Panic);
        }
    }
}

fn choose(shared: &Shared, sequence: &mut Sequence<'_>, activity: Option<Box<super::Activity>>) {
    if guarded(|| sequence.choose(activity, shared.options.probe.as_ref())).is_none() {
        shared.metrics.panics.add(1);
        sequence.fail(Failure::Panic);
    }
}

/// Runs `f`; `None` if it panics. What it was working on is thrown away then.
fn guarded<T>(f: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(f)).ok()
}
