//! Row 34: the whole scheduler in orders that are drawn by lot. The queue's locks are modelled in `queue_model.rs`; what a
//! model checker cannot run is the engine, so here jobs of all kinds come, go and fail at moments that a seed decides, and
//! every order must keep what the scheduler promises: an end for every job, the events of one that runs alone, and nothing
//! left behind.

mod common;

use common::{Setup, engine, plan, tokenizer};
use lacuna::engine::sampler::SamplerOptions;
use lacuna_server::{
    metrics::Metrics,
    schedule::{Event, Failure, Generate, Job, Options, Pooling, Probe, Scheduler, Task},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc::{UnboundedReceiver, error::TryRecvError, unbounded_channel};

/// A small random stream.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// A prompt that ends with it makes the probe panic, or spoil the logits.
const PANICS: u32 = 4000;
const SPOILS: u32 = 4001;

/// What one of the kinds of jobs asks.
fn task(kind: usize) -> (usize, Vec<u32>, Task) {
    let long = [3, 30, 70, 130, 200, 2][kind % 6];
    let mut prompt: Vec<u32> = (0..long).map(|i| 10 + (i * 7 + kind as u32) % 900).collect();
    match kind {
        10 => prompt.push(PANICS),
        11 => prompt.push(SPOILS),
        _ => {}
    }
    if kind % 7 == 6 {
        return (0, prompt, Task::Embed(Pooling::Mean));
    }
    let generate = Generate {
        sampling: SamplerOptions { seed: kind as u64, temp: (kind % 2) as f32, ..SamplerOptions::default() },
        max_tokens: [1, 6, 12][kind % 3],
        stop: Vec::new(),
        ignore_eos: true,
        bias: Vec::new(),
        top: (kind % 4 == 1).then_some(2),
        score_prompt: kind % 8 == 1,
        activity: (kind % 5 == 4).then_some(0),
        constraint: None,
        reuse: kind % 3 != 2,
        every: Duration::ZERO,
    };
    (kind % 2, prompt, Task::Generate(Box::new(generate)))
}

const KINDS: usize = 16;

/// What one answer says: tokens, or the vector's bits, or the failure.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    tokens: Vec<u32>,
    scores: usize,
    vector: Vec<u32>,
    failed: Option<Failure>,
    ended: bool,
}

impl Said {
    fn take(&mut self, event: Event) {
        assert!(!self.ended, "nothing comes behind the end");
        match event {
            Event::Prompt(scores) => self.scores += scores.len(),
            Event::Step(step) => self.tokens.push(step.token),
            Event::Vector(v) => self.vector = v.iter().map(|v| v.to_bits()).collect(),
            Event::Done(_) => self.ended = true,
            Event::Failed(failure) => (self.failed, self.ended) = (Some(failure), true),
        }
    }
}

struct Bench {
    scheduler: Scheduler,
    metrics: Arc<Metrics>,
}

fn bench(parallel: usize, queue: usize, prefixes: usize, chunk: usize) -> Bench {
    let dense = engine(&Setup { chunk, ..Setup::default() });
    let sparse = dense.with_plan(Some(Arc::new(plan(dense.model())))).expect("a fitting plan");
    let probe: Probe = Arc::new(|prompt, logits| match prompt.last() {
        Some(&PANICS) => panic!("as the test asked"),
        Some(&SPOILS) => logits[3] = f32::NAN,
        _ => {}
    });
    let options = Options { parallel, queue, context: 512, prefixes, probe: Some(probe) };
    let metrics = Arc::new(Metrics::default());
    let scheduler = Scheduler::new(vec![dense, sparse], Arc::new(tokenizer()), options, metrics.clone());
    Bench { scheduler: scheduler.expect("a thread"), metrics }
}

type Receiver = UnboundedReceiver<(usize, Event)>;

impl Bench {
    /// Queues a job of this kind; `None` if there is no room.
    fn ask(&self, kind: usize, group: u64) -> Option<Receiver> {
        let (plan, prompt, task) = task(kind);
        let (events, receiver) = unbounded_channel();
        let job = Job { plan, prompt: prompt.into(), task, index: 0, group, since: Instant::now(), events };
        self.scheduler.submit(vec![job]).ok().map(|()| receiver)
    }
}

/// Reads what is there; whether it has ended.
fn read(receiver: &mut Receiver, said: &mut Said) -> bool {
    loop {
        match receiver.try_recv() {
            Ok((_, event)) => said.take(event),
            Err(TryRecvError::Empty) => return said.ended,
            Err(TryRecvError::Disconnected) => {
                assert!(said.ended, "an answer without an end: {said:?}");
                return true;
            }
        }
    }
}

fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What each kind says when nobody is beside it.
fn alone() -> Vec<Said> {
    let bench = bench(1, 1, 0, 512);
    let one = |kind| {
        let (mut receiver, mut said) = (bench.ask(kind, kind as u64).expect("room"), Said::default());
        until("an end", || read(&mut receiver, &mut said));
        said
    };
    (0..KINDS).map(one).collect()
}

#[test]
fn in_every_drawn_order_all_jobs_end_as_they_do_alone() {
    let want = alone();
    assert!(want[10].failed == Some(Failure::Panic) && want[11].failed == Some(Failure::NotFinite), "{want:?}");
    assert!(want.iter().filter(|w| w.failed.is_none()).all(|w| !w.tokens.is_empty() || !w.vector.is_empty()));
    for seed in 0..12 {
        let mut random = Random(seed);
        let prefixes = if seed % 2 == 0 { 0 } else { 8 << 20 };
        let bench = bench(1 + random.below(6), 1 + random.below(12), prefixes, [512, 48, 7][random.below(3)]);
        let mut open: Vec<(usize, Receiver, Said)> = Vec::new();
        let (mut left, mut refused, mut asked) = (0, 0, 0);
        while asked < 60 || !open.is_empty() {
            match random.below(8) {
                0..=3 if asked < 60 => {
                    let kind = random.below(KINDS);
                    match bench.ask(kind, asked) {
                        Some(receiver) => open.push((kind, receiver, Said::default())),
                        None => refused += 1,
                    }
                    asked += 1;
                }
                4 if !open.is_empty() => {
                    let gone = random.below(open.len());
                    // A client that leaves.
                    if random.below(3) == 0 {
                        drop(open.swap_remove(gone));
                        left += 1;
                    }
                }
                5 => std::thread::sleep(Duration::from_micros(random.below(3000) as u64)),
                _ => open.retain_mut(|(kind, receiver, said)| {
                    let ended = read(receiver, said);
                    assert!(
                        !ended || *said == want[*kind],
                        "seed {seed}, kind {kind}: {said:?}, alone {:?}",
                        want[*kind]
                    );
                    !ended
                }),
            }
        }
        until("nothing runs", || bench.metrics.running.get() == 0 && bench.scheduler.waiting() == 0);
        until("no block is left", || prefixes > 0 || bench.scheduler.blocks_in_use() == 0);
        assert!(bench.metrics.cancelled.get() <= left, "seed {seed}");
        assert!(refused < 60, "seed {seed}: somebody was served");
        // The end with work under way: what is queued is finished.
        let mut last: Vec<_> = [1, 5, 12].iter().filter_map(|&kind| Some((kind, bench.ask(kind, 99)?))).collect();
        bench.scheduler.close();
        assert!(bench.ask(0, 100).is_none(), "closed");
        drop(bench);
        for (kind, receiver) in &mut last {
            let mut said = Said::default();
            assert!(read(receiver, &mut said) && said == want[*kind], "seed {seed}: {said:?}");
        }
    }
}
