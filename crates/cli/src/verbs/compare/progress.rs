//! What a comparison shows while it runs, and what it leaves behind if it is interrupted.

use super::Args;
use crate::{
    report::{self, Form},
    text,
};
use indicatif::{ProgressBar, ProgressStyle};
use lacuna::compare::{
    Event,
    report::{Point, Report},
};
use std::{
    fs,
    io::{IsTerminal, stderr},
    path::PathBuf,
};

/// Finished points on disk, so that an interrupted comparison goes on where it stopped.
pub(super) struct Store {
    partial: Option<PathBuf>,
    sources: Vec<PathBuf>,
}

impl Store {
    pub(super) fn new(args: &Args) -> Self {
        let partial = args.output.first().map(|p| {
            let mut name = p.as_os_str().to_owned();
            name.push(".partial.json");
            PathBuf::from(name)
        });
        let reports = args.output.iter().filter(|p| p.extension().is_some_and(|e| e == "json")).cloned();
        let sources = if args.fresh { Vec::new() } else { reports.chain(partial.clone()).collect() };
        Self { partial, sources }
    }

    pub(super) fn known(&self) -> Vec<Point> {
        let reports = self.sources.iter().filter_map(|p| Report::parse(&fs::read(p).ok()?));
        reports.flat_map(|r| [vec![r.dense], r.points].concat()).collect()
    }

    pub(super) fn save(&mut self, report: &Report) {
        let Some(path) = &self.partial else { return };
        if let Err(e) = report::write(report, Form::Json, path) {
            tracing::warn!("finished points are not kept: {e:#}");
            self.partial = None;
        }
    }

    pub(super) fn finish(&self) {
        if let Some(path) = &self.partial {
            // Gone already, or it stays and is read again: both are fine.
            let _ = fs::remove_file(path);
        }
    }
}

/// One bar on a terminal; elsewhere one line per plan.
pub(super) struct Bar {
    bar: ProgressBar,
    plans: usize,
}

impl Bar {
    pub(super) fn new(plans: usize) -> Self {
        let bar = if stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{msg:50} {wide_bar} {pos}/{len} {eta}") {
            bar.set_style(style);
        }
        Self { bar, plans }
    }

    pub(super) fn set(&self, what: &str, done: usize, all: usize) {
        self.bar.set_message(what.to_owned());
        self.bar.set_length(all as u64);
        self.bar.set_position(done as u64);
    }

    pub(super) fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Quality(label, done, all) => self.set(&format!("{label}: scoring"), done, all),
            Event::Task(label, done, all) => self.set(&format!("{label}: asking"), done, all),
            Event::Race(done, all) => self.set("timing, all plans in turns", done, all),
            Event::Measured(dense, points) => {
                let Some(p) = points.last() else { return };
                let line = format!(
                    "[{}/{}] {}: {:+.4} bits/byte, KL {:.4}, {} of dense bytes",
                    points.len(),
                    self.plans,
                    p.label,
                    p.quality.change.value,
                    p.quality.kld.value,
                    text::percent(p.cost.bytes_per_token / dense.cost.bytes_per_token)
                );
                if self.bar.is_hidden() { eprintln!("{line}") } else { self.bar.println(line) }
            }
        }
    }

    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}
