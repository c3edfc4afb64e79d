//! The one place that makes threads: a pool whose workers claim chunks of one job at a time.
//!
//! Decode runs hundreds of regions of some 100 µs per token, and other processes may take a core at any moment. Hence:
//! chunks are claimed by an atomic counter, a region ends when its *chunks* are done (a worker that never got a core
//! is not waited for), and a waiter spins only briefly, then parks, so that the operating system can move a preempted
//! worker to the idle core.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a waiter spins before it parks. A parked thread needs some 5 to 50 µs to wake, so a spin of that order
/// costs at most twice the best possible choice.
const SPIN: Duration = Duration::from_micros(40);

/// What is run for each chunk: `f(worker, chunk)`.
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// A fixed set of threads; the caller of [`Pool::run`] is worker 0.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Serialises callers: one job at a time.
    caller: Mutex<()>,
}

/// State of the current job. `ticket` holds the job's number in the upper half and the next unclaimed chunk in the
/// lower half, so that a claim (a compare-exchange) can never hit a later job.
struct Shared {
    ticket: AtomicU64,
    /// Halves of the `&Task` of the current job.
    task: [AtomicUsize; 2],
    chunks: AtomicUsize,
    done: AtomicUsize,
    sleepers: AtomicUsize,
    caller_sleeps: AtomicBool,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    gate: Mutex<()>,
    work: Condvar,
    finished: Condvar,
    spin: Duration,
}

/// Lower half of a ticket whose job takes no more claims.
const CLOSED: u64 = u32::MAX as u64;

thread_local! {
    /// The pool this thread works for at the moment (address of its state), and as which worker.
    static CURRENT: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

impl Pool {
    /// A pool of `threads` workers including the caller; 0 counts as 1.
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(CLOSED),
            task: [AtomicUsize::new(0), AtomicUsize::new(0)],
            chunks: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            caller_sleeps: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            gate: Mutex::new(()),
            work: Condvar::new(),
            finished: Condvar::new(),
            spin: if threads > cores { Duration::ZERO } else { SPIN },
        });
        let workers = (1..threads).map_while(|worker| {
            let shared = shared.clone();
            let name = format!("lacuna-{worker}");
            // A system that refuses another thread leaves a smaller pool, which computes the same.
            std::thread::Builder::new().name(name).spawn(move || shared.serve(worker)).ok()
        });
        let workers = workers.collect();
        Self { shared, workers, caller: Mutex::new(()) }
    }

    /// Number of workers, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(part, claim)` for every claim in `0..claims(part)` of every part, all in one region.
    ///
    /// # Panics
    /// As [`Pool::run`].
    pub(crate) fn run_parts<P: Sync>(&self, parts: &[P], claims: fn(&P) -> usize, f: impl Fn(&P, usize) + Sync) {
        self.run(parts.iter().map(claims).sum(), &|_, mut claim| {
            for part in parts {
                let own = claims(part);
                if claim < own {
                    return f(part, claim);
                }
                claim -= own;
            }
        });
    }

    /// Runs `f(worker, chunk)` for every chunk in `0..chunks`, each exactly once, and returns when all are done.
    ///
    /// `worker` is below [`Pool::threads`]; no two chunks run at the same time under the same worker number. A call
    /// from inside a job of the same pool runs its chunks one after the other on the calling worker. (Two pools whose
    /// jobs call each other in a circle wait for each other for ever.)
    ///
    /// # Panics
    /// If `f` panics, with its payload, after all chunks have ended.
    pub fn run(&self, chunks: usize, f: &Task<'_>) {
        let (pool, worker) = CURRENT.get();
        let nested = pool == self.shared.address();
        if nested || self.workers.is_empty() || chunks <= 1 {
            let worker = if nested { worker } else { 0 };
            return self.run_alone(chunks, worker, f);
        }
        let guard = lock(&self.caller);
        // Chunk numbers have 32 bits in the ticket; longer jobs run in rounds.
        let round = (CLOSED - 1) as usize;
        let mut start = 0;
        while start < chunks {
            let n = round.min(chunks - start);
            self.shared.run_round(n, &|worker, chunk| f(worker, start + chunk));
            start += n;
        }
        let panic = lock(&self.shared.panic).take();
        drop(guard);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    fn run_alone(&self, chunks: usize, worker: usize, f: &Task<'_>) {
        if self.workers.is_empty() || CURRENT.get().0 == self.shared.address() {
            return (0..chunks).for_each(|chunk| f(worker, chunk));
        }
        // A lone chunk still counts as worker 0, which another caller may be at the same time.
        let _guard = lock(&self.caller);
        let _as = Membership::enter(self.shared.address(), worker);
        (0..chunks).for_each(|chunk| f(worker, chunk));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        {
            let _gate = lock(&self.shared.gate);
            self.shared.work.notify_all();
        }
        for worker in self.workers.drain(..) {
            // Workers catch the panics of tasks, so a join error cannot carry one that the caller has not seen.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Publishes a job, takes part in it and waits for its end. Only one thread at a time calls this.
    fn run_round(&self, chunks: usize, f: &Task<'_>) {
        // SAFETY: only the layout of the reference is read: `&dyn Trait` is two words (data, table), which `task`
        // turns back into the same reference while the job is open, that is before this function returns.
        let words: [usize; 2] = unsafe { std::mem::transmute::<&Task<'_>, [usize; 2]>(f) };
        let job = (self.ticket.load(Relaxed) >> 32).wrapping_add(1) & CLOSED;
        // The last job is closed, so nobody can claim with a mix of old and new fields; see `claim`.
        self.task[0].store(words[0], Release);
        self.task[1].store(words[1], Release);
        self.chunks.store(chunks, Release);
        self.done.store(0, Relaxed);
        self.ticket.store(job << 32, SeqCst);
        if self.sleepers.load(SeqCst) > 0 {
            let _gate = lock(&self.gate);
            self.work.notify_all();
        }
        self.work_on(job, 0);
        self.wait_done(chunks);
        self.ticket.store(job << 32 | CLOSED, SeqCst);
    }

    /// Claims and runs chunks of `job` until none is left.
    fn work_on(&self, job: u64, worker: usize) {
        let task = [self.task[0].load(Acquire), self.task[1].load(Acquire)];
        let chunks = self.chunks.load(Acquire);
        let _as = Membership::enter(self.address(), worker);
        let mut ran = 0;
        while let Some(chunk) = self.claim(job, chunks) {
            // SAFETY: the words are a live `&Task`: the claim succeeded, so `job` is open and the fields read above
            // are its own, and `run_round`, which borrows the task, returns only after this chunk is counted in
            // `done`.
            let f = unsafe { std::mem::transmute::<[usize; 2], &Task<'_>>(task) };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| f(worker, chunk))) {
                lock(&self.panic).get_or_insert(payload);
            }
            ran += 1;
        }
        if ran > 0 && self.done.fetch_add(ran, SeqCst) + ran == chunks && self.caller_sleeps.load(SeqCst) {
            let _gate = lock(&self.gate);
            self.finished.notify_all();
        }
    }

    /// The next chunk of `job`, if it is still the open one and has any left.
    ///
    /// The fields of a later job are written after the ticket was closed, so a claimer that has read any of them
    /// (acquire) also sees the closed ticket here, and its compare-exchange fails.
    fn claim(&self, job: u64, chunks: usize) -> Option<usize> {
        let mut ticket = self.ticket.load(Acquire);
        loop {
            let chunk = (ticket & CLOSED) as usize;
            if ticket >> 32 != job || chunk >= chunks || chunk as u64 == CLOSED {
                return None;
            }
            match self.ticket.compare_exchange_weak(ticket, ticket + 1, AcqRel, Acquire) {
                Ok(_) => return Some(chunk),
                Err(now) => ticket = now,
            }
        }
    }

    fn wait_done(&self, chunks: usize) {
        if self.spin_until(|| self.done.load(Acquire) == chunks) {
            return;
        }
        let mut gate = lock(&self.gate);
        self.caller_sleeps.store(true, SeqCst);
        while self.done.load(SeqCst) != chunks {
            gate = self.finished.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, SeqCst);
    }

    /// The life of a worker: wait for a job, work on it, again.
    fn serve(&self, worker: usize) {
        let mut last = 0;
        loop {
            let news = || self.stop.load(Acquire) || self.ticket.load(Acquire) >> 32 != last;
            if !self.spin_until(news) {
                let mut gate = lock(&self.gate);
                self.sleepers.fetch_add(1, SeqCst);
                while !(self.stop.load(SeqCst) || self.ticket.load(SeqCst) >> 32 != last) {
                    gate = self.work.wait(gate).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, SeqCst);
            }
            if self.stop.load(Acquire) {
                return;
            }
            last = self.ticket.load(Acquire) >> 32;
            self.work_on(last, worker);
        }
    }

    /// Spins until `ready` or until the time is over; true if ready.
    fn spin_until(&self, ready: impl Fn() -> bool) -> bool {
        let mut start = None;
        loop {
            for _ in 0..16 {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let start = *start.get_or_insert_with(Instant::now);
            if start.elapsed() >= self.spin {
                return ready();
            }
        }
    }
}

/// Marks the current thread as a worker of a pool, until dropped.
struct Membership((usize, usize));

impl Membership {
    fn enter(pool: usize, worker: usize) -> Self {
        Self(CURRENT.replace((pool, worker)))
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Locks; a poisoned lock is as good, since no data behind these locks can be left half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pool: &Pool, chunks: usize) -> Vec<usize> {
        let counts: Vec<_> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(chunks, &|worker, chunk| {
            assert!(worker < pool.threads());
            counts[chunk].fetch_add(1, Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_chunk_runs_once() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for chunks in [0, 1, 2, 3, 64, 1000] {
                assert!(counts(&pool, chunks).iter().all(|&n| n == 1));
            }
        }
    }

    #[test]
    fn many_tiny_runs() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        for _ in 0..20_000 {
            pool.run(3, &|_, chunk| {
                sum.fetch_add(chunk + 1, Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 20_000 * 6);
    }

    #[test]
    fn runs_after_the_workers_parked() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            std::thread::sleep(SPIN * 10);
            assert!(counts(&pool, 5).iter().all(|&n| n == 1));
        }
    }

    #[test]
    fn nested_pools_and_the_same_pool_inside_itself() {
        let (outer, inner) = (Pool::new(2), Pool::new(2));
        let sum = AtomicUsize::new(0);
        for _ in 0..200 {
            outer.run(4, &|_, _| {
                inner.run(4, &|_, _| {
                    inner.run(2, &|worker, _| {
                        assert!(worker < 2);
                        sum.fetch_add(1, Relaxed);
                    });
                });
                outer.run(3, &|_, _| {
                    sum.fetch_add(1, Relaxed);
                });
            });
        }
        assert_eq!(sum.into_inner(), 200 * 4 * (4 * 2 + 3));
    }

    #[test]
    fn several_callers_share_one_pool() {
        let pool = Pool::new(2);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| assert!(counts(&pool, 7).iter().all(|&n| n == 1))));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        for bad in 0..4 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(4, &|_, chunk| {
                    if chunk == bad {
                        panic!("chunk {chunk}")
                    }
                });
            }));
            let payload = result.expect_err("the panic must arrive");
            assert_eq!(*payload.downcast::<String>().expect("a message"), format!("chunk {bad}"));
            assert!(counts(&pool, 9).iter().all(|&n| n == 1));
        }
    }
}
