//! One row per plan, one number per column.

use crate::text::csv_field;
use lacuna::compare::report::{Point, Report, SiteKept};
use std::fmt::Write;

/// Columns beside the kept shares.
const COLUMNS: &[&str] = &[
    "label",
    "family",
    "value",
    "bits_per_byte",
    "bits_per_byte_error",
    "change",
    "change_error",
    "ppl",
    "ppl_error",
    "kld_mean",
    "kld_mean_error",
    "kld_p99",
    "same_top",
    "same_top_error",
    "task_accuracy",
    "task_error",
    "bytes_per_token",
    "bytes_of_dense",
    "copies_bytes",
    "tokens_per_s",
    "tokens_per_s_low",
    "tokens_per_s_high",
    "speedup",
    "speedup_low",
    "speedup_high",
];

/// The dense model and all plans under a header; behind [`COLUMNS`] the mean kept share of every place. Fields are empty
/// where nothing was measured.
pub fn rows(report: &Report) -> String {
    let mut sites: Vec<&str> = Vec::new();
    for kept in report.points.iter().flat_map(|p| &p.cost.kept) {
        if !sites.contains(&kept.site.as_str()) {
            sites.push(&kept.site);
        }
    }
    let header = COLUMNS.iter().map(|c| (*c).to_owned()).chain(sites.iter().map(|s| format!("kept {s}")));
    let mut out = header.map(|h| csv_field(&h)).collect::<Vec<_>>().join(",") + "\n";
    for point in report.all() {
        let mut cells = vec![csv_field(&point.label), csv_field(&point.family)];
        cells.extend(numbers(report, point).into_iter().map(cell));
        cells.extend(sites.iter().map(|s| cell(point.cost.kept.iter().find(|k| k.site == *s).map(mean))));
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}", cells.join(","));
    }
    out
}

fn cell(value: Option<f64>) -> String {
    value.map_or_else(String::new, |v| v.to_string())
}

fn numbers(report: &Report, p: &Point) -> Vec<Option<f64>> {
    let q = &p.quality;
    let mut list = vec![p.value];
    for m in [q.bits_per_byte, q.change, q.ppl, q.kld] {
        list.extend([Some(m.value), Some(m.error)]);
    }
    list.extend([Some(q.kld_p99), Some(q.same_top.value), Some(q.same_top.error)]);
    list.extend([p.task.map(|t| t.accuracy.value), p.task.map(|t| t.accuracy.error)]);
    list.extend([Some(p.cost.bytes_per_token), Some(report.density(p)), Some(p.cost.copies_bytes as f64)]);
    for triple in [p.speed.as_ref().map(|s| s.quartiles), p.speed.as_ref().map(|s| s.speedup)] {
        list.extend([1, 0, 2].map(|i| triple.map(|t| t[i])));
    }
    list
}

/// Mean over the layers; layers where nothing is skipped count as 1.
pub fn mean(kept: &SiteKept) -> f64 {
    kept.layers.iter().map(|s| s.unwrap_or(1.0)).sum::<f64>() / kept.layers.len().max(1) as f64
}
