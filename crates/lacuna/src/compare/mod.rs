//! Plans side by side on one model: quality against cost. [`run`] measures, [`report::Report`] is what is stored and drawn.
//!
//! Quality is measured plan by plan, in lockstep with the dense model on the same text; a point that is known by its key
//! is not measured again. Speed is measured at the end, with all plans taking turns.

pub mod items;
pub mod notes;
pub mod pareto;
pub mod quality;
pub mod report;
pub mod speed;
pub mod sweep;
pub mod task;
pub mod texts;

use crate::{
    cache,
    engine::{
        Engine, Options,
        break_even::BreakEven,
        compile::{CompileOptions, compile},
        layouts::LayoutCache,
        transpose::CopyForm,
    },
    error::{Error, Result},
    eval::Window,
    model::Model,
    tokenizer::Tokenizer,
};
use lacuna_core::{
    hash::sha256,
    plan::{Entry, Plan},
};
use report::{Cost, Point, Quality, TaskScore};
use speed::Race;
use task::Task;

/// A plan that is to be measured.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The plan.
    pub plan: Plan,
    /// Curve it belongs to.
    pub family: String,
    /// Its place on the curve.
    pub value: Option<f64>,
    /// Command that gives an engine with this plan.
    pub command: String,
}

/// What everything is measured with.
pub struct Setup<'a> {
    /// The model without a plan.
    pub dense: &'a Engine,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// What is scored.
    pub windows: &'a [Window],
    /// What is asked.
    pub task: Option<&'a Task>,
    /// What is timed; nothing: no speeds.
    pub race: Option<Race<'a>>,
    /// Leaves places dense where the plan keeps more than the machine's break-even share, as `run` does; otherwise plans are
    /// followed everywhere.
    pub fall_back: bool,
    /// Command that gives the dense engine.
    pub command: String,
    /// Points of an earlier report; those with the same key are taken from there.
    pub known: &'a [Point],
}

/// Where a comparison is.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Windows scored for a plan.
    Quality(&'a str, usize, usize),
    /// Questions asked of a plan.
    Task(&'a str, usize, usize),
    /// Rounds timed.
    Race(usize, usize),
    /// The dense model and the points measured so far; the newest is last.
    Measured(&'a Point, &'a [Point]),
}

/// The dense model and the plans.
pub struct Measurement {
    /// Without a plan.
    pub dense: Point,
    /// The plans, in their order.
    pub points: Vec<Point>,
}

/// Measures `plans` (at least one) against the dense model. `on` hears how far it is.
///
/// # Errors
/// A plan for another model; what scoring, asking and decoding return; no plans.
pub fn run(setup: &Setup<'_>, plans: &[Planned], on: &mut dyn FnMut(Event<'_>)) -> Result<Measurement> {
    let mut meter = Meter::new(setup);
    let mut engines = vec![setup.dense.clone()];
    let (mut dense, mut points) = (None, Vec::new());
    for planned in plans {
        let (engine, notes) = meter.engine(&planned.plan)?;
        let (base, point) = meter.point(planned, &engine, dense.as_ref(), on)?;
        points.push(Point { notes, ..point });
        engines.push(engine);
        on(Event::Measured(dense.insert(base), &points));
    }
    let problem = "there are none to compare";
    let mut dense = dense.ok_or_else(|| Error::Argument { name: "plans", problem: problem.into() })?;
    if let Some(race) = setup.race {
        let all: Vec<&Engine> = engines.iter().collect();
        let speeds = speed::race(&all, race, |done, all| on(Event::Race(done, all)))?;
        for (point, speed) in std::iter::once(&mut dense).chain(&mut points).zip(speeds) {
            point.speed = Some(speed);
        }
    }
    Ok(Measurement { dense, points })
}

/// Measures one plan after the other and remembers what they share.
struct Meter<'a> {
    setup: &'a Setup<'a>,
    cache: LayoutCache,
    break_even: BreakEven,
    /// Hash of everything but the plan that a point depends on.
    settings: String,
    dense_answers: Option<Vec<bool>>,
}

impl<'a> Meter<'a> {
    fn new(setup: &'a Setup<'a>) -> Self {
        let (root, hash) = (cache::root(), &setup.dense.model().hash);
        let break_even = BreakEven::load(root.as_deref(), setup.dense.threads());
        let followed = setup.fall_back.then(|| format!("{break_even:?}"));
        let kv = setup.dense.kv();
        let isa = lacuna_kernels::isa::get();
        let settings = format!("{hash} {isa} {kv:?} {followed:?} {:?} {:?}", setup.windows, setup.task);
        let settings = sha256(settings.as_bytes());
        Self { setup, cache: LayoutCache::new(root.as_deref(), hash), break_even, settings, dense_answers: None }
    }

    /// The engine that follows `plan`, and what a reader must know of it.
    fn engine(&self, plan: &Plan) -> Result<(Engine, Vec<String>)> {
        let (dense, fall_back) = (self.setup.dense, self.setup.fall_back);
        let break_even = if fall_back { self.break_even.clone() } else { BreakEven::never_dense() };
        let options = CompileOptions { cache: self.cache.clone(), break_even, masked: false };
        let compiled = compile(plan, dense.model(), &options, dense.pool(), &|_, _| {})?;
        let mut notes = compiled.notes;
        if !fall_back {
            notes.extend(self.would_fall_back(plan, dense.model()));
        }
        let options = Options {
            threads: dense.threads(),
            kv: dense.kv(),
            prefill_chunk: dense.prefill_chunk(),
            plan: Some(compiled.plan),
        };
        Ok((Engine::new(compiled.model, options)?, notes))
    }

    /// How many places the engine would leave dense on this machine.
    fn would_fall_back(&self, plan: &Plan, model: &Model) -> Option<String> {
        let above = |e: &&Entry| {
            let proj = e.rule.covers().last().copied();
            let weight = proj.and_then(|p| model.blocks.get(e.layer)?.parts(p).first().map(|l| &l.weight));
            e.kept.zip(weight).is_some_and(|(k, w)| k > self.break_even.share(CopyForm::for_weight(w).0.format))
        };
        let (n, all) = (plan.entries.iter().filter(above).count(), plan.entries.len());
        (n > 0).then(|| {
            format!("`run` leaves {n} of its {all} places dense on this machine (break-even shares of `doctor`)")
        })
    }

    /// The dense model and `planned`, measured or taken from what is known; their speeds are not in them.
    fn point(
        &mut self,
        planned: &Planned,
        engine: &Engine,
        dense: Option<&Point>,
        on: &mut dyn FnMut(Event<'_>),
    ) -> Result<(Point, Point)> {
        let setup = self.setup;
        let plan = serde_json::to_string(&planned.plan).unwrap_or_default();
        let (base_key, key) = (self.settings.clone(), sha256(format!("{} {plan}", self.settings).as_bytes()));
        let known = |key: &str| setup.known.iter().find(|p| p.key == key).map(|p| Point { speed: None, ..p.clone() });
        if let (Some(base), Some(point)) = (dense.cloned().or_else(|| known(&base_key)), known(&key)) {
            return Ok((base, point));
        }
        let label = sweep::short(&planned.plan.method);
        let label = label.as_str();
        let pieces = setup.tokenizer.pieces();
        let pass = quality::pass(setup.dense, engine, setup.windows, pieces, |done, all| {
            on(Event::Quality(label, done, all));
        })?;
        let (dense_score, score) = self.scores(label, engine, on)?.unzip();
        let name = Name { label: "dense", family: "dense", value: None, command: &setup.command };
        let base = point(base_key, name, (pass.dense, pass.dense_cost), dense_score);
        let Planned { family, value, command, .. } = planned;
        let name = Name { label, family, value: *value, command };
        Ok((base, point(key, name, (pass.quality, pass.cost), score)))
    }

    /// The task's scores of the dense model and of `engine`.
    fn scores(
        &mut self,
        label: &str,
        engine: &Engine,
        on: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<(TaskScore, TaskScore)>> {
        let Some(task) = self.setup.task else { return Ok(None) };
        let dense = match self.dense_answers.take() {
            Some(known) => known,
            None => task::answers(self.setup.dense, task, |done, all| on(Event::Task("dense", done, all)))?,
        };
        let own = task::answers(engine, task, |done, all| on(Event::Task(label, done, all)))?;
        let scores = (task::score(&dense, &dense), task::score(&own, &dense));
        self.dense_answers = Some(dense);
        Ok(Some(scores))
    }
}

/// What a point is called.
struct Name<'a> {
    label: &'a str,
    family: &'a str,
    value: Option<f64>,
    command: &'a str,
}

fn point(key: String, name: Name<'_>, (quality, cost): (Quality, Cost), task: Option<TaskScore>) -> Point {
    let Name { label, family, value, command } = name;
    let [label, family, command] = [label, family, command].map(str::to_owned);
    Point { key, label, family, value, command, quality, task, cost, speed: None, notes: Vec::new() }
}
