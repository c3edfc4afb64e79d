//! Many requests on one engine: a bounded queue, and one thread that lets all of them take turns.
//!
//! A turn is a part of a prompt or one decode step of every answer that is being written. Rows of a batch have the bits
//! that they have alone, chunks of a prompt those of the whole, and each answer has its own random stream: what a client
//! gets does not depend on the others.

mod job;
mod prefix;
mod queue;
mod sequence;
mod worker;

/// The locks of the queue.
mod sync {
    pub(super) use std::sync::{Condvar, Mutex, MutexGuard};
}

pub use job::{
    Activity, Done, Event, Events, Failure, Finish, Generate, Job, Pooling, Scored, Step, Strip, Task, Usage,
};
pub use prefix::Prefixes;
pub use queue::Full;

use crate::metrics::Metrics;
use lacuna::{engine::Engine, tokenizer::Tokenizer};
use queue::Queue;
use std::{sync::Arc, thread::JoinHandle};

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
    queue: Queue<Job>,
    engines: Vec<Engine>,
    tokenizer: Arc<Tokenizer>,
    options: Options,
    metrics: Arc<Metrics>,
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
        let queue = Queue::new(options.queue);
        let shared = Arc::new(Shared { queue, engines, tokenizer, options, metrics });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || worker::run(&theirs))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Queues the jobs of one request, all or none: the queue may grow beyond its limit by the jobs of one.
    ///
    /// # Errors
    /// The queue is full, or closed.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), Full> {
        self.shared.queue.push(jobs)
    }

    /// Whether [`Scheduler::submit`] would take jobs now: asked before a request is prepared, which costs much more.
    ///
    /// # Errors
    /// It would not.
    pub fn has_room(&self) -> Result<(), Full> {
        self.shared.queue.has_room()
    }

    /// Jobs that wait for their turn.
    pub fn waiting(&self) -> usize {
        self.shared.queue.len()
    }

    /// Takes no more jobs; those that are queued are finished.
    pub fn close(&self) {
        self.shared.queue.close();
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
