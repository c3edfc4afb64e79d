//! What a reader must know before quoting a number: derived from the report alone.

use super::report::{Point, Report};

/// Standard errors within which two values count as equal.
const SIGMAS: f64 = 2.0;

/// Sentences about `report`, most important first.
pub fn notes(report: &Report) -> Vec<String> {
    let mut list = Vec::new();
    list.extend(slower(report));
    list.extend(equal(report));
    list.extend(task(report));
    list.extend(machine(report));
    list
}

/// Whether the quality of `point` cannot be told from that of the dense model on this text.
pub fn within_error(point: &Point) -> bool {
    point.quality.change.value.abs() <= SIGMAS * point.quality.change.error
}

/// Whether three quarters of the rounds were slower than dense.
pub fn is_slower(point: &Point) -> bool {
    point.speed.as_ref().is_some_and(|s| s.speedup[2] < 1.0)
}

fn slower(report: &Report) -> Option<String> {
    let list: Vec<&str> = report.points.iter().filter(|p| is_slower(p)).map(|p| p.label.as_str()).collect();
    (!list.is_empty()).then(|| {
        format!(
            "Slower than dense here, though fewer bytes are read ({} of {} plans): {}.",
            list.len(),
            report.points.len(),
            join(&list)
        )
    })
}

fn equal(report: &Report) -> Option<String> {
    let same: Vec<&str> = report.points.iter().filter(|p| within_error(p)).map(|p| p.label.as_str()).collect();
    (!same.is_empty()).then(|| {
        format!(
            "Within {SIGMAS} standard errors of dense in bits per byte on these {} tokens: {}. A longer text may tell them apart.",
            report.text.tokens,
            join(&same)
        )
    })
}

fn task(report: &Report) -> Vec<String> {
    let (Some(facts), Some(dense)) = (&report.task, &report.dense.task) else { return Vec::new() };
    let sure = dense.accuracy.value - SIGMAS * dense.accuracy.error;
    if sure <= facts.chance {
        return vec![format!(
            "The dense model is not better than guessing at `{}` ({:.0} % of {} against {:.0} %): that column says nothing here.",
            facts.name,
            100.0 * dense.accuracy.value,
            facts.items,
            100.0 * facts.chance
        )];
    }
    let told = |p: &&Point| {
        let Some(score) = &p.task else { return false };
        let [gained, lost] = score.gained_lost.map(|n| n as f64);
        (gained - lost).abs() > SIGMAS * (gained + lost).sqrt().max(1.0)
    };
    let list: Vec<&str> = report.points.iter().filter(told).map(|p| p.label.as_str()).collect();
    vec![if list.is_empty() {
        format!("At `{}` no plan differs from dense by more than chance ({} questions).", facts.name, facts.items)
    } else {
        format!("At `{}` these differ from dense by more than chance: {}.", facts.name, join(&list))
    }]
}

fn machine(report: &Report) -> Vec<String> {
    let mut list = Vec::new();
    let m = &report.machine;
    if let Some([before, after]) = m.stream_gb_per_s
        && (before / after).ln().abs() > 0.1
    {
        list.push(format!(
            "The machine drifted: its streaming read was {before:.1} GB/s before the timings and {after:.1} after. Ratios to dense \
             are taken within a round and suffer less than the speeds."
        ));
    }
    if let Some(load) = m.load.filter(|l| l.iter().any(|x| *x > m.threads as f64 + 0.5)) {
        list.push(format!(
            "The machine was busy (load {:.1} to {:.1} on {} cores, ours {}): quote ratios, not speeds.",
            load[0], load[1], m.cores, m.threads
        ));
    }
    if let Some(cache) = m.cache_bytes.filter(|c| report.model.bytes <= *c) {
        list.push(format!(
            "All weights ({:.1} MiB) fit into the last-level cache ({:.0} MiB): time does not follow bytes here as it does on \
             models that are read from memory.",
            report.model.bytes as f64 / 1048576.0,
            cache as f64 / 1048576.0
        ));
    }
    list
}

fn join(list: &[&str]) -> String {
    const SHOWN: usize = 8;
    let shown = list[..list.len().min(SHOWN)].join("; ");
    if list.len() > SHOWN { format!("{shown}; and {} more", list.len() - SHOWN) } else { shown }
}
