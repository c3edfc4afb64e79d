//! The table of plans, for the terminal, for Markdown and for the page.

use super::csv::mean;
use crate::{table::Table, text};
use lacuna::compare::{
    pareto,
    report::{Point, Report},
};
use std::fmt::Write;

/// A column: its head, whether less is better (`None`: no best), and its cell with the number that is ranked.
struct Column {
    head: &'static str,
    less: Option<bool>,
    cell: fn(&Report, &Point) -> (String, Option<f64>),
}

const DASH: &str = "-";

fn shown(value: Option<f64>, show: impl Fn(f64) -> String) -> (String, Option<f64>) {
    (value.map_or_else(|| DASH.to_owned(), show), value)
}

const COLUMNS: &[Column] = &[
    Column {
        head: "bits/byte",
        less: Some(true),
        cell: |_, p| {
            let m = p.quality.bits_per_byte;
            (format!("{:.4} ± {:.4}", m.value, m.error), Some(m.value))
        },
    },
    Column {
        head: "to dense",
        less: None,
        cell: |_, p| {
            let m = p.quality.change;
            (
                if p.quality.same_top.error + m.error == 0.0 {
                    DASH.into()
                } else {
                    format!("{:+.4} ± {:.4}", m.value, m.error)
                },
                None,
            )
        },
    },
    Column {
        head: "ppl",
        less: Some(true),
        cell: |_, p| (format!("{:.3}", p.quality.ppl.value), Some(p.quality.ppl.value)),
    },
    Column {
        head: "KL mean",
        less: Some(true),
        cell: |_, p| {
            let m = p.quality.kld;
            (format!("{:.4} ± {:.4}", m.value, m.error), Some(m.value))
        },
    },
    Column {
        head: "KL 99 %",
        less: Some(true),
        cell: |_, p| (format!("{:.3}", p.quality.kld_p99), Some(p.quality.kld_p99)),
    },
    Column {
        head: "same top",
        less: Some(false),
        cell: |_, p| (text::percent(p.quality.same_top.value), Some(p.quality.same_top.value)),
    },
    Column {
        head: "task",
        less: Some(false),
        cell: |_, p| {
            let m = p.task.map(|t| t.accuracy);
            let text = m.map_or_else(|| DASH.into(), |m| format!("{:.1} ± {:.1} %", 100.0 * m.value, 100.0 * m.error));
            (text, m.map(|m| m.value))
        },
    },
    Column {
        head: "MB/token",
        less: Some(true),
        cell: |r, p| {
            let bytes = p.cost.bytes_per_token;
            (format!("{:.3} ({})", bytes / 1e6, text::percent(r.density(p))), Some(bytes))
        },
    },
    Column {
        head: "t/s",
        less: Some(false),
        cell: |_, p| shown(p.speed.as_ref().map(|s| s.quartiles[1]), |v| format!("{v:.1}")),
    },
    Column {
        head: "speed-up",
        less: Some(false),
        cell: |_, p| {
            let s = p.speed.as_ref().map(|s| s.speedup);
            let text = s.map_or_else(|| DASH.into(), |[low, mid, high]| format!("{mid:.2} ({low:.2}-{high:.2})"));
            (text, s.map(|s| s[1]))
        },
    },
    Column { head: "copies", less: None, cell: |_, p| (text::bytes(p.cost.copies_bytes), None) },
];

/// A cell, and whether no other plan is better in its column.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// What it shows.
    pub text: String,
    /// Marked as the best of the plans (the dense model does not compete).
    pub best: bool,
}

/// Heads and rows, the dense model first; columns that nothing was measured for are left out.
pub fn cells(report: &Report) -> (Vec<&'static str>, Vec<Vec<Cell>>) {
    let points: Vec<&Point> = report.all().collect();
    let mut heads = Vec::new();
    let mut rows = vec![Vec::new(); points.len()];
    for column in COLUMNS {
        let made: Vec<_> = points.iter().map(|p| (column.cell)(report, p)).collect();
        if made.iter().all(|(text, _)| text == DASH) {
            continue;
        }
        heads.push(column.head);
        let ranked = made.iter().skip(1).filter_map(|(_, v)| *v);
        let best = match column.less {
            Some(true) => ranked.reduce(f64::min),
            Some(false) => ranked.reduce(f64::max),
            None => None,
        };
        for (i, ((text, value), row)) in made.into_iter().zip(&mut rows).enumerate() {
            row.push(Cell { text, best: i > 0 && points.len() > 2 && value.is_some() && value == best });
        }
    }
    (heads, rows)
}

/// Which points (the dense model is 0) no other beats in bytes and bits per byte together.
pub fn on_front(report: &Report) -> Vec<usize> {
    let pairs: Vec<_> = report.all().map(|p| (p.cost.bytes_per_token, p.quality.bits_per_byte.value)).collect();
    pareto::front(&pairs)
}

fn table(report: &Report) -> Table {
    let (heads, rows) = cells(report);
    let numbers: Vec<String> = heads.iter().map(|h| format!("{h}:")).collect();
    let mut columns = vec!["plan", "front"];
    columns.extend(numbers.iter().map(String::as_str));
    let mut table = Table::new(&columns);
    let front = on_front(report);
    for (i, (point, row)) in report.all().zip(rows).enumerate() {
        let mark = if front.contains(&i) { "yes" } else { "" };
        let cells = row.into_iter().map(|c| if c.best { format!("**{}**", c.text) } else { c.text });
        table.row([point.label.clone(), mark.to_owned()].into_iter().chain(cells));
    }
    table
}

/// The table and the notes.
pub fn terminal(report: &Report) -> String {
    let mut out = table(report).to_string();
    for note in &report.notes {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "note: {note}");
    }
    out
}

/// A page in Markdown: facts, table, kept shares, notes, commands.
pub fn markdown(report: &Report) -> String {
    let mut out = format!("# {}: {} plans compared\n\n", report.model.name, report.points.len());
    for (name, value) in facts(report) {
        out += &format!("* {name}: {value}\n");
    }
    out += &format!(
        "\n{}\nBold: the best of the plans. `front`: no other is better in bytes and in bits per byte.\n",
        table(report)
    );
    out += &format!("\n## Kept\n\n{}", kept(report));
    out += "\n## Notes\n\n";
    for note in &report.notes {
        out += &format!("* {note}\n");
    }
    for point in &report.points {
        for note in &point.notes {
            out += &format!("* `{}`: {note}\n", point.label);
        }
    }
    out += "\n## How to repeat\n\n";
    for command in std::iter::once(&report.command).chain(report.all().map(|p| &p.command)) {
        out += &format!("    {command}\n");
    }
    out
}

fn kept(report: &Report) -> Table {
    let mut sites: Vec<&str> = Vec::new();
    for kept in report.points.iter().flat_map(|p| &p.cost.kept) {
        if !sites.contains(&kept.site.as_str()) {
            sites.push(&kept.site);
        }
    }
    let heads: Vec<String> = sites.iter().map(|s| format!("{s}:")).collect();
    let columns: Vec<&str> = std::iter::once("plan").chain(heads.iter().map(String::as_str)).collect();
    let mut table = Table::new(&columns);
    for point in &report.points {
        let share = |site: &&str| point.cost.kept.iter().find(|k| k.site == **site).map(mean);
        let cells = sites.iter().map(|s| text::or_dash(share(s).map(text::percent)));
        table.row(std::iter::once(point.label.clone()).chain(cells));
    }
    table
}

/// Names and values of what the measurement rests on.
pub fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let (m, model, t) = (&report.machine, &report.model, &report.text);
    let short = |hash: &str| hash.chars().take(12).collect::<String>();
    let mut list = vec![
        (
            "Model",
            format!(
                "{}, {}, {} parameters, {}, {} layers, KV {}, hash {}",
                model.name,
                model.architecture,
                text::count(model.parameters),
                text::bytes(model.bytes),
                model.layers,
                model.kv,
                short(&model.hash)
            ),
        ),
        (
            "Text",
            format!(
                "{}, {} tokens ({}) scored; {}; sha256 {}",
                t.file,
                t.tokens,
                text::bytes(t.bytes as u64),
                t.cut,
                short(&t.sha256)
            ),
        ),
    ];
    if let Some(c) = &t.calibration {
        let same = if c.sha256 == t.sha256 { " (its beginning; what is scored is its end)" } else { "" };
        list.push((
            "Calibration",
            format!("{}{same}, {} tokens, one pass for all plans; sha256 {}", c.file, c.tokens, short(&c.sha256)),
        ));
    }
    if let Some(task) = &report.task {
        list.push((
            "Task",
            format!(
                "{}: {}; {} questions, guessing gives {}",
                task.name,
                task.description,
                task.items,
                text::percent(task.chance)
            ),
        ));
    }
    let stream = m
        .stream_gb_per_s
        .map_or(String::new(), |[a, b]| format!(", streaming read {a:.1} GB/s before and {b:.1} after"));
    list.push((
        "Machine",
        format!(
            "{}, {}, {} in use, {}{stream}",
            m.cpu,
            text::plural(m.cores, "core"),
            text::plural(m.threads, "thread"),
            m.isa
        ),
    ));
    list.push(("Made", format!("{} by lacuna {}, seed {}", report.date, report.program, report.seed)));
    list
}
