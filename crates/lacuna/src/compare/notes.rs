//! What a reader must know before quoting a number: derived from the report alone.

use super::report::{Point, Report};

/// Standard errors within which two values count as equal.
const SIGMAS: f64 = 2.0;

/// Sentences about `report`, most important first.
pub fn notes(report: &Report) -> Vec<String> {
    let mut list = Vec::new();
    list.extend(order(report));
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

/// The families at one share of the dense bytes that as many as possible reach, best first. Between two points of a
/// family the loss is interpolated.
fn order(report: &Report) -> Option<String> {
    let curves: Vec<(&str, Vec<(f64, f64)>)> = report.families().into_iter().map(|f| (f, curve(report, f))).collect();
    let at = |share: f64| -> Vec<(&str, f64)> {
        curves.iter().filter_map(|(name, c)| Some((*name, interpolate(c, share)?))).collect()
    };
    let mut shares: Vec<f64> = report.points.iter().map(|p| report.density(p)).filter(|d| d.is_finite()).collect();
    shares.sort_by(f64::total_cmp);
    let most = shares.iter().map(|s| at(*s).len()).max()?;
    shares.retain(|s| at(*s).len() == most);
    let share = shares[shares.len() / 2];
    let mut found = at(share);
    found.sort_by(|a, b| a.1.total_cmp(&b.1));
    let list: Vec<String> = found.iter().map(|(name, loss)| format!("{name} {:+.2} %", 100.0 * loss)).collect();
    (list.len() > 1).then(|| {
        format!(
            "At {:.0} % of the dense bytes (interpolated on each curve), bits per byte above dense: {}.",
            100.0 * share,
            list.join(", ")
        )
    })
}

/// Share of the dense bytes and loss as a share of dense, by rising bytes.
fn curve(report: &Report, family: &str) -> Vec<(f64, f64)> {
    let base = report.dense.quality.bits_per_byte.value;
    let own = report.points.iter().filter(|p| p.family == family);
    let mut list: Vec<_> = own.map(|p| (report.density(p), p.quality.change.value / base)).collect();
    list.sort_by(|a, b| a.0.total_cmp(&b.0));
    list
}

/// The loss at `share`; `None` outside the curve.
fn interpolate(curve: &[(f64, f64)], share: f64) -> Option<f64> {
    curve.windows(2).find(|w| (w[0].0..=w[1].0).contains(&share)).map(|w| {
        let width = w[1].0 - w[0].0;
        let part = if width > 0.0 { (share - w[0].0) / width } else { 0.0 };
        w[0].1 + part * (w[1].1 - w[0].1)
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::report::{Cost, Measured, Quality, Speed, TaskFacts, TaskScore};

    fn point(label: &str, family: &str, bytes: f64, change: f64) -> Point {
        let m = |value, error| Measured { value, error };
        Point {
            label: label.into(),
            family: family.into(),
            quality: Quality { bits_per_byte: m(1.0 + change, 0.1), change: m(change, 0.01), ..Quality::default() },
            cost: Cost { bytes_per_token: bytes, ..Cost::default() },
            ..Point::default()
        }
    }

    fn report() -> Report {
        let points = vec![
            point("a=1", "a", 80.0, 0.1),
            point("a=2", "a", 60.0, 0.3),
            point("b=1", "b", 90.0, 0.005),
            point("b=2", "b", 50.0, 0.405),
        ];
        Report { dense: point("dense", "dense", 100.0, 0.0), points, ..Report::default() }
    }

    #[test]
    fn families_are_ordered_where_both_have_points() {
        let text = order(&report()).unwrap();
        assert!(text.contains("At 80 %") && text.contains("a +10.00 %, b +10.50 %"), "{text}");
        let lone = Report { points: report().points[..2].to_vec(), ..report() };
        assert_eq!(order(&lone), None);
    }

    #[test]
    fn what_is_equal_or_slower_is_named() {
        let mut r = report();
        assert!(equal(&r).unwrap().contains("b=1") && !equal(&r).unwrap().contains("a=1"));
        assert_eq!(slower(&r), None);
        let speed = |ratio| Some(Speed { samples: vec![], quartiles: [1.0; 3], speedup: [ratio; 3] });
        r.points[0].speed = speed(0.9);
        r.points[1].speed = speed(1.2);
        assert!(slower(&r).unwrap().contains("(1 of 4 plans): a=1."), "{:?}", slower(&r));
    }

    #[test]
    fn a_task_at_chance_is_called_so() {
        let score = |right: usize, gained_lost| TaskScore {
            right,
            items: 100,
            accuracy: Measured { value: right as f64 / 100.0, error: 0.045 },
            gained_lost,
        };
        let mut r = report();
        r.task = Some(TaskFacts { name: "t".into(), description: String::new(), items: 100, chance: 0.25 });
        r.dense.task = Some(score(30, [0, 0]));
        assert!(task(&r)[0].contains("not better than guessing"));
        r.dense.task = Some(score(80, [0, 0]));
        r.points[0].task = Some(score(76, [3, 7]));
        assert!(task(&r)[0].contains("no plan differs"));
        r.points[0].task = Some(score(50, [2, 32]));
        assert!(task(&r)[0].contains("chance: a=1."), "{:?}", task(&r));
    }
}
