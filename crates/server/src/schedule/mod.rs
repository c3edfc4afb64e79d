//! Many requests on one engine: a bounded queue, and one thread that lets all of them take turns.
//!
//! A turn is a part of a prompt or one decode step of every answer that is being written. Rows of a batch have the bits
//! that they have alone, chunks of a prompt those of the whole, and each answer has its own random stream: what a client
//! gets does not depend on the others.

mod job;
mod prefix;
mod sequence;
mod worker;

pub use job::{
    Activity, Done, Event, Events, Failure, Finish, Generate, Job, Pooling, Scored, Step, Strip, Task, Usage,
};
pub use prefix::Prefixes;

use crate::metrics::Metrics;
use lacuna::{engine::Engine, tokenizer::Tokenizer};
use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
};

/// Sees the prompt of an answer and the logits of its next token, and may change them: for tests of what happens when a
/// model gives numbers that are none, or a request panics.
pub type Probe = Arc<dyn Fn(&[u32], &mut [f32]) + Send + Sync>;

/// Limits of the scheduler.
#[derive(Clone)]
pub struct Options {
    /// Answers that are computed side by side.
    pub parallel: usize,
    /// Answers that wait for their turn; further requests are refused.
    pub queue: usize,
    /// Tokens of each answer's context.
    pub context: usize,
    /// Bytes of keys and values kept of earlier prompts.
    pub prefixes: usize,
    /// For tests.
    pub probe: Option<Probe>,
}

/// The queue and its thread.
pub struct Scheduler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and the others see.
struct Shared {
    queue: Mutex<Queue>,
    /// Something was queued, or the end was asked for.
    work: Condvar,
    engines: Vec<Engine>,
    tokenizer: Arc<Tokenizer>,
    options: Options,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl Scheduler {
    /// Starts the thread. A job names one of `engines`, which are one model under several plans.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn new(
        engines: Vec<Engine>,
        tokenizer: Arc<Tokenizer>,
        options: Options,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let (queue, work) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { queue, work, engines, tokenizer, options, metrics });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || worker::run(&theirs))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Queues the jobs of one request; gives them back if there is no room. A request is taken whole: the queue may
    /// grow beyond its limit by the jobs of one.
    ///
    /// # Errors
    /// The queue is full, or closed.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), Full> {
        let mut queue = self.shared.lock();
        if queue.closed || queue.jobs.len() >= self.shared.options.queue {
            return Err(Full { closed: queue.closed });
        }
        queue.jobs.extend(jobs);
        self.shared.metrics.waiting.set(queue.jobs.len());
        drop(queue);
        self.shared.work.notify_one();
        Ok(())
    }

    /// Takes no more jobs; those that are queued are finished.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_one();
    }

    /// Blocks of keys and values in use by answers and kept prefixes, over all plans.
    pub fn blocks_in_use(&self) -> usize {
        self.shared.engines.iter().map(Engine::blocks_in_use).sum()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread ended with a panic");
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// There is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// The server is about to end.
    pub closed: bool,
}
