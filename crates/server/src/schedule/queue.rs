//! The queue between those who ask and the engine's thread. Its locks come from the module `sync` beside it, so that a test
//! can put a model checker's in their place (`tests/queue_model.rs`).

use super::sync::{Condvar, Mutex, MutexGuard};
use std::{collections::VecDeque, sync::PoisonError};

/// A bounded queue with one reader that may wait.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    /// Something was added, or the end was asked for.
    work: Condvar,
    limit: usize,
}

struct State<T> {
    waiting: VecDeque<T>,
    closed: bool,
}

/// There is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// The server is about to end.
    pub closed: bool,
}

/// What the reader gets.
pub(super) struct Taken<T> {
    /// The oldest, in order.
    pub items: Vec<T>,
    /// How many were dropped because nobody wants them any more.
    pub dropped: usize,
}

impl<T> Queue<T> {
    /// Takes items while fewer than `limit` wait.
    pub fn new(limit: usize) -> Self {
        let state = State { waiting: VecDeque::new(), closed: false };
        Self { state: Mutex::new(state), work: Condvar::new(), limit }
    }

    /// Adds all of `items` or none: the queue may grow beyond its limit by the items of one call.
    ///
    /// # Errors
    /// The queue is full, or closed.
    pub fn push(&self, items: Vec<T>) -> Result<(), Full> {
        let mut state = self.lock();
        self.room(&state)?;
        state.waiting.extend(items);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Whether [`Queue::push`] would refuse now.
    ///
    /// # Errors
    /// It would.
    pub fn has_room(&self) -> Result<(), Full> {
        self.room(&self.lock())
    }

    fn room(&self, state: &State<T>) -> Result<(), Full> {
        let refused = state.closed || state.waiting.len() >= self.limit;
        if refused { Err(Full { closed: state.closed }) } else { Ok(()) }
    }

    /// Adds nothing more; what waits is still taken.
    pub fn close(&self) {
        self.lock().closed = true;
        self.work.notify_one();
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Takes up to `room` items and drops those that are not `wanted`. With `idle` it waits for one of either kind; `None`
    /// when it would wait for ever.
    pub fn take(&self, room: usize, idle: bool, wanted: impl Fn(&T) -> bool) -> Option<Taken<T>> {
        let mut state = self.lock();
        loop {
            let before = state.waiting.len();
            state.waiting.retain(&wanted);
            let dropped = before - state.waiting.len();
            if !idle || dropped > 0 || !state.waiting.is_empty() {
                let count = room.min(state.waiting.len());
                return Some(Taken { items: state.waiting.drain(..count).collect(), dropped });
            }
            if state.closed {
                return None;
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing that could panic runs between two halves of a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
