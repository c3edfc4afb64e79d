//! Row 34: the scheduler's queue under loom, which runs every order that its locks and wake-ups can take (up to three switches
//! away from a thread that could go on). A wake-up that is lost, or a lock that is held for ever, shows as a deadlock.

#[path = "../src/schedule/queue.rs"]
#[allow(dead_code, reason = "a part of the queue is modelled")]
mod queue;

/// The locks that the queue takes.
mod sync {
    pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
}

use loom::{
    model::Builder,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};
use queue::{Full, Queue};

fn explored(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// The engine's thread: takes until the end, one at a time and waiting where it has nothing to do.
fn taken_by_worker(queue: &Queue<usize>, gone: &AtomicBool) -> (Vec<usize>, usize) {
    let (mut all, mut dropped) = (Vec::new(), 0);
    while let Some(taken) = queue.take(1, true, |item| *item != 2 || !gone.load(Ordering::Relaxed)) {
        assert!(taken.items.len() <= 1 && (taken.dropped > 0 || !taken.items.is_empty()), "it woke up for something");
        all.extend(taken.items);
        dropped += taken.dropped;
    }
    (all, dropped)
}

#[test]
fn everything_that_was_accepted_is_taken_once_and_the_end_comes() {
    explored(|| {
        let queue = Arc::new(Queue::new(2));
        let accepted = Arc::new(AtomicUsize::new(0));
        let worker = thread::spawn({
            let queue = queue.clone();
            move || taken_by_worker(&queue, &AtomicBool::new(false))
        });
        let client = thread::spawn({
            let (queue, accepted) = (queue.clone(), accepted.clone());
            move || {
                // A request of two answers is taken whole or refused whole.
                let sent = queue.push(vec![10, 11]);
                accepted.fetch_add(if sent.is_ok() { 2 } else { 0 }, Ordering::Relaxed);
            }
        });
        let sent = queue.push(vec![1]);
        accepted.fetch_add(usize::from(sent.is_ok()), Ordering::Relaxed);
        client.join().expect("no panic");
        queue.close();
        assert_eq!(queue.push(vec![3]), Err(Full { closed: true }));
        let (taken, dropped) = worker.join().expect("no panic");
        assert_eq!((taken.len(), dropped), (accepted.load(Ordering::Relaxed), 0));
        let pair: Vec<_> = taken.iter().filter(|i| **i >= 10).collect();
        assert!(pair.is_empty() || pair == [&10, &11], "in order: {taken:?}");
        assert_eq!(queue.len(), 0);
    });
}

#[test]
fn closing_beside_a_client_loses_nothing() {
    explored(|| {
        let queue = Arc::new(Queue::new(1));
        let worker = thread::spawn({
            let queue = queue.clone();
            move || taken_by_worker(&queue, &AtomicBool::new(false)).0
        });
        let client = thread::spawn({
            let queue = queue.clone();
            move || (queue.push(vec![1]), queue.push(vec![4]))
        });
        queue.close();
        let (first, second) = client.join().expect("no panic");
        let accepted = usize::from(first.is_ok()) + usize::from(second.is_ok());
        assert_eq!(worker.join().expect("no panic").len(), accepted);
    });
}

#[test]
fn clients_that_leave_the_queue_are_counted_or_served() {
    explored(|| {
        let (queue, gone) = (Arc::new(Queue::new(4)), Arc::new(AtomicBool::new(false)));
        let worker = thread::spawn({
            let (queue, gone) = (queue.clone(), gone.clone());
            move || taken_by_worker(&queue, &gone)
        });
        queue.push(vec![2, 5]).expect("room");
        gone.store(true, Ordering::Relaxed);
        queue.push(vec![6]).expect("room");
        queue.close();
        let (taken, dropped) = worker.join().expect("no panic");
        assert_eq!(taken.len() + dropped, 3);
        assert!(taken.ends_with(&[5, 6]) && dropped <= 1, "{taken:?}");
    });
}

#[test]
fn a_busy_worker_never_waits() {
    explored(|| {
        let queue = Arc::new(Queue::new(1));
        let client = thread::spawn({
            let queue = queue.clone();
            move || queue.push(vec![1]).is_ok()
        });
        // It has answers to go on with: nothing to take is no reason to stop, nor is the end.
        let first = queue.take(1, false, |_| true).expect("never the end").items.len();
        assert!(client.join().expect("no panic"));
        queue.close();
        let rest = queue.take(1, false, |_| true).expect("never the end").items.len();
        assert_eq!(first + rest, 1);
        assert!(queue.take(1, true, |_| true).is_none());
    });
}
