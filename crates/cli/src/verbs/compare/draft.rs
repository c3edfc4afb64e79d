//! The facts that a report begins with: machine, model, texts, protocol.

use super::{
    Args,
    subject::{Subject, Texts},
};
use crate::{
    text,
    verbs::doctor::{all_threads, cpu_name},
};
use anyhow::Result;
use lacuna::{
    compare::{
        report::{Machine, Point, REPORT_VERSION, Report, TextFacts},
        task::Task,
    },
    eval::{Scoring, Window},
};
use lacuna_kernels::isa;
use std::{env, fs};

/// The report before anything is measured.
pub(super) fn draft(args: &Args, subject: &Subject, texts: &Texts, task: &Result<Task, String>) -> Result<Report> {
    let scored = texts.windows.iter().map(Window::predictions).sum();
    let pieces = subject.ready.tokenizer()?.pieces();
    let bytes = texts.windows.iter().flat_map(|w| &w.tokens[w.first + 1..]).map(|t| pieces.bytes(*t).len()).sum();
    let threads = subject.ready.dense.threads();
    let machine = Machine {
        cpu: cpu_name().unwrap_or_else(|| "unknown processor".into()),
        isa: isa::get().name().into(),
        cores: cores(),
        threads,
        cache_bytes: last_cache(),
        stream_gb_per_s: None,
        load: None,
    };
    let text = TextFacts {
        file: args.file().display().to_string(),
        sha256: texts.sha256.clone(),
        tokens: scored,
        bytes,
        windows: texts.windows.len(),
        cut: texts.cut.clone(),
        calibration: None,
    };
    Ok(Report {
        version: REPORT_VERSION,
        program: env!("CARGO_PKG_VERSION").into(),
        date: text::utc_now(),
        command: env::args().map(|a| text::shell(&a)).collect::<Vec<_>>().join(" "),
        seed: args.seed,
        machine,
        model: subject.facts.clone(),
        text,
        task: task.as_ref().ok().map(|t| t.facts.clone()),
        protocol: protocol(args),
        dense: Point::default(),
        points: Vec::new(),
        notes: task.as_ref().err().cloned().into_iter().collect(),
    })
}

pub(super) fn protocol(args: &Args) -> Vec<String> {
    let mut list = vec![
        format!(
            "Quality: the dense model and the plan score the same text, every token through its own selection as decode \
             would choose it ({}).",
            Scoring::Masked.describe()
        ),
        "Bytes: weights, keys and values that decode reads on that text.".to_owned(),
        "Task: contexts are prefilled, which is dense, and answers are decoded under the plan.".to_owned(),
    ];
    list.push(if args.fall_back {
        "Places that keep more than this machine's break-even share are left dense, as `run` does (--fall-back)."
            .to_owned()
    } else {
        "Plans are followed everywhere; `run` leaves places dense where that is faster (compare with --fall-back)."
            .to_owned()
    });
    if args.n_gen > 0 {
        list.push(format!(
            "Speed: {} rounds behind one that warms up; in each, all engines decode the same {} tokens of the text in turns. Shown \
             are the median and the quartiles; speed-ups are ratios within a round.",
            args.repetitions, args.n_gen
        ));
    }
    list
}

pub(super) fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// Cores of the machine, of which this program may be given fewer.
pub(super) fn cores() -> usize {
    let listed =
        fs::read_to_string("/proc/cpuinfo").map_or(0, |t| t.lines().filter(|l| l.starts_with("processor")).count());
    listed.max(all_threads())
}

/// Bytes of the largest cache that the first core sees.
pub(super) fn last_cache() -> Option<u64> {
    let size = |i: usize| fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size")).ok();
    (0..8).filter_map(size).filter_map(|t| text::parse_bytes(t.trim()).ok()).max()
}
