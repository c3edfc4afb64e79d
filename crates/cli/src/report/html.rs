//! The page: one file, no scripts, nothing from outside.

use super::{
    chart::{COLOURS, Chart, Dot, draw, shape},
    escape::escape,
    heat,
    table::{Cell, cells, facts, on_front},
};
use crate::text::{percent, plural};
use lacuna::compare::{
    notes::{is_slower, within_error},
    pareto,
    report::{Point, Report},
};
use std::fmt::Write;

/// The style, in the page.
const STYLE: &str = concat!(include_str!("colours.css"), include_str!("page.css"), include_str!("chart.css"));

/// The style of a chart that stands alone.
const CHART_STYLE: &str = concat!(include_str!("colours.css"), include_str!("chart.css"));

/// The page of `report`.
pub fn page(report: &Report) -> String {
    let title = format!("{}: {} plans against dense", report.model.name, report.points.len());
    let mut out = head(&title);
    let m = &report.machine;
    out += &format!(
        "<p class=\"lead\">What skipping costs in quality and saves in bytes and time: {} tokens of {}, {} of {}, {}.</p>\n",
        report.text.tokens,
        escape(report.text.file.rsplit('/').next().unwrap_or_default()),
        plural(m.threads, "thread"),
        escape(&m.cpu),
        escape(&report.date)
    );
    tiles(&mut out, report);
    charts(&mut out, report);
    table(&mut out, report);
    maps(&mut out, report);
    notes(&mut out, report);
    protocol(&mut out, report);
    out + &foot(&report.program)
}

/// The beginning of a page up to its title.
pub fn head(title: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n\
         <title>{0}</title>\n<link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{0}</h1>\n",
        escape(title)
    )
}

/// The end of a page.
pub fn foot(program: &str) -> String {
    format!(
        "<footer>Made by lacuna {}. This page asks nothing of the network.</footer>\n</main>\n</body>\n</html>\n",
        escape(program)
    )
}

/// Loss in bits per byte that the tiles accept, as a share.
const SMALL: f64 = 0.01;

fn tiles(out: &mut String, report: &Report) {
    let dense = &report.dense;
    let speed = |p: &Point| p.speed.as_ref().map_or(String::new(), |s| format!(", {:.0} tokens/s", s.quartiles[1]));
    out.push_str("<ul class=\"tiles\">\n");
    let mut tile = |what: &str, big: &str, more: &str| {
        *out += &format!(
            "<li><div class=\"what\">{}</div><div class=\"big\">{}</div><div class=\"more\">{}</div></li>\n",
            escape(what),
            escape(big),
            escape(more)
        );
    };
    tile(
        "Dense",
        &format!("{:.3} bits/byte", dense.quality.bits_per_byte.value),
        &format!("{:.2} MB per token{}", dense.cost.bytes_per_token / 1e6, speed(dense)),
    );
    let good = || report.points.iter().filter(|p| loss(report, p)[1] <= 100.0 * SMALL);
    let limit = percent(SMALL);
    match good().min_by(|a, b| a.cost.bytes_per_token.total_cmp(&b.cost.bytes_per_token)) {
        Some(p) => tile(
            &format!("Fewest bytes at a loss of up to {limit}"),
            &p.label,
            &format!("reads {} of dense, {}", percent(report.density(p)), loss_text(report, p)),
        ),
        None => tile(&format!("Fewest bytes at a loss of up to {limit}"), "none", "every plan loses more on this text"),
    }
    let ratio = |p: &&Point| p.speed.as_ref().map(|s| s.speedup[1]);
    match good()
        .filter(|p| ratio(p).is_some())
        .max_by(|a, b| ratio(a).unwrap_or(0.0).total_cmp(&ratio(b).unwrap_or(0.0)))
    {
        Some(p) if ratio(&p).is_some_and(|r| r > 1.0) => tile(
            &format!("Fastest at a loss of up to {limit}"),
            &p.label,
            &format!("{:.2} times dense, {}", ratio(&p).unwrap_or(1.0), loss_text(report, p)),
        ),
        Some(_) => {
            tile(&format!("Fastest at a loss of up to {limit}"), "dense", "no such plan is faster here; see the notes")
        }
        None => {}
    }
    out.push_str("</ul>\n");
}

/// Bits per byte above dense in per cent of dense: with one standard error below and above.
fn loss(report: &Report, point: &Point) -> [f64; 3] {
    let (m, base) = (point.quality.change, report.dense.quality.bits_per_byte.value);
    [m.value - m.error, m.value, m.value + m.error].map(|v| 100.0 * v / base)
}

fn loss_text(report: &Report, point: &Point) -> String {
    let [low, mid, high] = loss(report, point);
    format!("{mid:+.2} ± {:.2} % bits/byte", (high - low) / 2.0)
}

fn charts(out: &mut String, report: &Report) {
    let families = report.families();
    out.push_str("<h2>Quality against cost</h2>\n<ul class=\"legend\">\n");
    for (i, family) in families.iter().enumerate() {
        *out += &format!("<li class=\"l{i}\" tabindex=\"0\">{}{}</li>\n", swatch(Some(i)), escape(family));
    }
    *out += &format!("<li>{}dense</li>\n</ul>\n<div class=\"charts\">\n", swatch(None));
    figure(out, report, Against::Bytes);
    figure(out, report, Against::Time);
    out.push_str("</div>\n<style>");
    // A family that is pointed at in the legend stands out in both charts.
    for i in 0..families.len() {
        *out += &format!("main:has(.l{i}:is(:hover,:focus)) .chart :is(.dot,.curve):not(.f{i},.dense){{opacity:.13}}");
    }
    out.push_str("</style>\n");
}

fn swatch(family: Option<usize>) -> String {
    let class = family.map_or("dense".to_owned(), |f| format!("c{}", f % COLOURS));
    format!(
        "<svg viewBox=\"-7.5 -7.5 15 15\" aria-hidden=\"true\"><path class=\"{class}\" d=\"{}\"/></svg>",
        shape(family)
    )
}

/// What a chart has on its x axis.
#[derive(Clone, Copy, PartialEq)]
enum Against {
    Bytes,
    Time,
}

impl Against {
    /// Low, value and high of a point.
    fn cost(self, p: &Point) -> Option<[f64; 3]> {
        match self {
            Self::Bytes => Some([p.cost.bytes_per_token / 1e6; 3]),
            Self::Time => p.speed.as_ref().map(|s| s.milliseconds()),
        }
    }
}

/// The chart as an `<svg>`; `None` where fewer than two points have such a cost.
fn chart(report: &Report, against: Against) -> Option<String> {
    let families = report.families();
    let points: Vec<_> = report.all().filter_map(|p| Some((p, against.cost(p)?))).collect();
    if points.len() < 2 {
        return None;
    }
    let pairs: Vec<_> = points.iter().map(|(p, x)| (x[1], p.quality.change.value)).collect();
    let front = pareto::front(&pairs);
    let dot = |(i, (p, x)): (usize, &(&Point, [f64; 3]))| Dot {
        family: families.iter().position(|f| *f == p.family),
        x: *x,
        y: loss(report, p),
        front: front.contains(&i),
        tip: tip(report, p),
    };
    let dots: Vec<Dot> = points.iter().enumerate().map(dot).collect();
    let (id, x_name) = match against {
        Against::Bytes => ("bytes", "megabytes read per token"),
        Against::Time => ("time", "milliseconds per token"),
    };
    let on: Vec<&str> = front.iter().map(|i| points[*i].0.label.as_str()).collect();
    let summary = format!("Loss of quality against {x_name}. Not beaten by any other: {}.", on.join(", "));
    let y_name = "bits per byte above dense, square-root scale";
    Some(draw(&Chart { id, summary: &summary, x_name, y_name, dots: &dots, families: &families }))
}

/// The chart of quality against bytes as a file of its own.
pub fn svg(report: &Report) -> String {
    let chart = chart(report, Against::Bytes).unwrap_or_else(|| "<svg class=\"chart\"></svg>".into());
    let (chart, rules) = chart.split_once("</svg>").unwrap_or((&chart, ""));
    let rules = rules.replace("<style>", "").replace("</style>", "");
    let (start, body) = chart.split_once('>').unwrap_or((chart, ""));
    format!(
        "{start} xmlns=\"http://www.w3.org/2000/svg\"><style>{CHART_STYLE}{}</style>\
         <rect width=\"100%\" height=\"100%\" fill=\"var(--card)\"/>{body}</svg>\n",
        rules.trim()
    )
}

fn figure(out: &mut String, report: &Report, against: Against) {
    let Some(svg) = chart(report, against) else { return };
    let (title, whiskers) = match against {
        Against::Bytes => ("Bytes read per token", ""),
        Against::Time => ("Time per token", "Horizontal whiskers: quartiles of the rounds. "),
    };
    *out += &format!(
        "<figure><h3>{title}</h3>\n{svg}<figcaption>Lower left is better. Filled: no other plan is better in both. Vertical \
         whiskers: one standard error of the difference to dense on the same tokens. {whiskers}Shaded: costs more than \
         dense.</figcaption></figure>\n"
    );
}

fn tip(report: &Report, p: &Point) -> Vec<String> {
    let mut lines = vec![p.label.clone()];
    if p.family != "dense" {
        lines.push(loss_text(report, p));
        lines.push(format!("KL {:.4}, same top token {}", p.quality.kld.value, percent(p.quality.same_top.value)));
    }
    lines.push(format!("{:.3} MB per token, {} of dense", p.cost.bytes_per_token / 1e6, percent(report.density(p))));
    if let Some(s) = &p.speed {
        let [low, mid, high] = s.speedup;
        lines.push(format!("{:.0} tokens/s, {mid:.2} ({low:.2} to {high:.2}) of dense", s.quartiles[1]));
    }
    lines
}

fn table(out: &mut String, report: &Report) {
    let (heads, rows) = cells(report);
    let (families, front) = (report.families(), on_front(report));
    out.push_str("<h2>All numbers</h2>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Table of all plans\"><table>\n<thead><tr><th scope=\"col\">plan</th>");
    for head in &heads {
        *out += &format!("<th scope=\"col\">{}</th>", escape(head));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    let mut last = report.dense.family.as_str();
    for (i, (point, row)) in report.all().zip(rows).enumerate() {
        let family = families.iter().position(|f| *f == point.family);
        let mark = if front.contains(&i) {
            " <abbr title=\"no other plan is better in bytes and bits per byte\">\u{25c6}</abbr>"
        } else {
            ""
        };
        let base = if i == 0 || last != point.family { " class=\"first\"" } else { "" };
        last = &point.family;
        *out += &format!("<tr{base}><th scope=\"row\">{}{}{mark}</th>", swatch(family), escape(&point.label));
        for (head, cell) in heads.iter().zip(row) {
            *out += &body(head, &cell, point);
        }
        out.push_str("</tr>\n");
    }
    out.push_str(
        "</tbody></table></div>\n<p class=\"key\"><b>Bold</b>: the best of the plans. \u{25c6} on the front of bytes and bits per byte. \
         \u{2248} within two standard errors of dense. \u{25be} slower than dense in three quarters of the rounds. ± one standard error; \
         speed-ups with quartiles. Copies: input-major weights that the plan needs beside the file.</p>\n",
    );
}

fn body(head: &str, cell: &Cell, point: &Point) -> String {
    let plan = point.family != "dense";
    let slow = plan && head == "speed-up" && is_slower(point);
    let same = plan && head == "to dense" && within_error(point);
    let mark = if slow {
        " \u{25be}"
    } else if same {
        " \u{2248}"
    } else {
        ""
    };
    let class = match (cell.best, slow) {
        (_, true) => " class=\"slow\"",
        (true, _) => " class=\"best\"",
        _ => "",
    };
    format!("<td{class}>{}{mark}</td>", number(&cell.text))
}

/// A value with its error in small print.
fn number(text: &str) -> String {
    let at = text.find(" ± ").or_else(|| text.find(" ("));
    let (value, error) = text.split_at(at.unwrap_or(text.len()));
    if error.is_empty() { escape(value) } else { format!("{}<small>{}</small>", escape(value), escape(error)) }
}

/// A sentence whose words between backticks are code.
fn sentence(text: &str) -> String {
    let parts = text.split('`').enumerate();
    parts.map(|(i, part)| if i % 2 == 1 { format!("<code>{}</code>", escape(part)) } else { escape(part) }).collect()
}

fn maps(out: &mut String, report: &Report) {
    let drawn: Vec<_> = report.points.iter().filter_map(|p| Some((p, heat::draw(p)?))).collect();
    if drawn.is_empty() {
        return;
    }
    out.push_str(
        "<h2>What is kept, by layer and place</h2>\n<p class=\"soft\">Share of input channels or neurons that decode used on the scored text: \
         0 %<span class=\"ramp\"></span>100 %. A dash: nothing is skipped there.</p>\n<div class=\"maps\">\n",
    );
    for (point, svg) in drawn {
        *out += &format!(
            "<figure><h3>{} <small>reads {} of dense</small></h3>{svg}</figure>\n",
            escape(&point.label),
            percent(report.density(point))
        );
    }
    out.push_str("</div>\n");
}

fn notes(out: &mut String, report: &Report) {
    let own: Vec<_> = report.points.iter().flat_map(|p| p.notes.iter().map(move |n| (p, n))).collect();
    if report.notes.is_empty() && own.is_empty() {
        return;
    }
    out.push_str("<h2>Before you quote a number</h2>\n<ul class=\"notes\">\n");
    for note in &report.notes {
        *out += &format!("<li>{}</li>\n", sentence(note));
    }
    out.push_str("</ul>\n");
    if own.is_empty() {
        return;
    }
    let open = if own.len() <= 6 { " open" } else { "" };
    *out += &format!("<details{open}><summary>Notes on single plans ({})</summary>\n<ul class=\"notes\">\n", own.len());
    for (point, note) in own {
        *out += &format!("<li><code>{}</code>: {}</li>\n", escape(&point.label), sentence(note));
    }
    out.push_str("</ul></details>\n");
}

fn protocol(out: &mut String, report: &Report) {
    out.push_str("<h2>How it was measured</h2>\n<dl>\n");
    for (name, value) in facts(report) {
        *out += &format!("<dt>{}</dt><dd>{}</dd>\n", escape(name), escape(&value));
    }
    *out += &format!(
        "<dt>Hashes</dt><dd>model <code>{}</code>; text <code>{}</code></dd>\n",
        escape(&report.model.hash),
        escape(&report.text.sha256)
    );
    out.push_str("</dl>\n<ul class=\"notes\">\n");
    for rule in &report.protocol {
        *out += &format!("<li>{}</li>\n", sentence(rule));
    }
    *out += &format!("</ul>\n<h3>Repeat it</h3>\n<pre>{}</pre>\n", escape(&report.command));
    out.push_str("<details><summary>Run one of these plans</summary>\n<pre>");
    for point in report.all() {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}", escape(&point.command));
    }
    out.push_str("</pre></details>\n");
}
