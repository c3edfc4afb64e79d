//! Scatter charts as inline SVG: quality that is lost against what a token costs.

use super::{
    axis::{Axis, Spread, label},
    escape::escape,
};
use std::fmt::Write;

/// Width and height of the drawing, in its own units.
const SIZE: (f64, f64) = (560.0, 400.0);
/// Left, top, right and bottom of the plot inside it.
const PLOT: (f64, f64, f64, f64) = (58.0, 18.0, 546.0, 350.0);
/// Colours of families; the page's style has as many.
pub const COLOURS: usize = 6;
/// Shapes of families: no divisor of [`COLOURS`], so that the pairs repeat late.
const SHAPES: usize = 7;

/// A point of a chart.
#[derive(Clone, Debug)]
pub struct Dot {
    /// Index of its family; `None`: the dense model.
    pub family: Option<usize>,
    /// Cost: low, value, high.
    pub x: [f64; 3],
    /// Loss: low, value, high.
    pub y: [f64; 3],
    /// Whether no other point beats it.
    pub front: bool,
    /// Lines of its tooltip.
    pub tip: Vec<String>,
}

/// A chart.
pub struct Chart<'a> {
    /// Name of the drawing, unique in the page.
    pub id: &'a str,
    /// What a reader who cannot see it is told.
    pub summary: &'a str,
    /// Name of the x axis.
    pub x_name: &'a str,
    /// Name of the y axis.
    pub y_name: &'a str,
    /// The points; one of them is the dense model.
    pub dots: &'a [Dot],
    /// Names of the families.
    pub families: &'a [&'a str],
}

struct Axes {
    x: Axis,
    y: Axis,
}

/// The chart as an `<svg>` element with the rules that show its tooltips.
pub fn draw(chart: &Chart<'_>) -> String {
    let all = |axis: fn(&Dot) -> [f64; 3]| chart.dots.iter().flat_map(axis);
    let (left, top, right, bottom) = PLOT;
    let axes = Axes {
        x: Axis::over(all(|d| d.x), Spread::Linear, left, right),
        y: Axis::over(all(|d| d.y).chain([0.0]), Spread::Root, bottom, top),
    };
    let mut out = String::new();
    let (w, h) = SIZE;
    put(
        &mut out,
        format_args!(
            "<svg id=\"{}\" class=\"chart\" viewBox=\"0 0 {w} {h}\" role=\"group\" aria-label=\"{}\">\n",
            chart.id,
            escape(chart.summary)
        ),
    );
    grid(&mut out, chart, &axes);
    lines(&mut out, chart, &axes);
    for (i, dot) in chart.dots.iter().enumerate() {
        mark(&mut out, chart.id, i, dot, &axes);
    }
    names(&mut out, chart, &axes);
    for (i, dot) in chart.dots.iter().enumerate() {
        tooltip(&mut out, chart.id, i, dot, &axes);
    }
    out += "</svg>\n<style>";
    for i in 0..chart.dots.len() {
        let id = chart.id;
        put(&mut out, format_args!("#{id}:has(#{id}-{i}:is(:hover,:focus)) #{id}-t{i}{{opacity:1}}"));
    }
    out + "</style>\n"
}

/// Writing to a string cannot fail.
fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

fn grid(out: &mut String, chart: &Chart<'_>, axes: &Axes) {
    let (left, top, right, bottom) = PLOT;
    if let Some(dense) = chart.dots.iter().find(|d| d.family.is_none()) {
        let x = axes.x.at(dense.x[1]);
        put(
            out,
            format_args!(
                "<rect class=\"beyond\" x=\"{x:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                right - x,
                bottom - top
            ),
        );
    }
    for v in axes.y.ticks(26.0) {
        let (y, zero) = (axes.y.at(v), if v == 0.0 { " zero" } else { "" });
        put(out, format_args!("<path class=\"grid{zero}\" d=\"M{left} {y:.1}H{right}\"/>"));
        let sign = if v > 0.0 { "+" } else { "" };
        put(
            out,
            format_args!(
                "<text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{sign}{} %</text>",
                left - 7.0,
                y + 3.5,
                label(v)
            ),
        );
    }
    for v in axes.x.ticks(64.0) {
        let x = axes.x.at(v);
        put(out, format_args!("<path class=\"grid\" d=\"M{x:.1} {top}V{bottom}\"/>"));
        put(
            out,
            format_args!(
                "<text class=\"tick\" x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                bottom + 17.0,
                label(v)
            ),
        );
    }
    put(
        out,
        format_args!(
            "<text class=\"axis\" x=\"{right}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            bottom + 38.0,
            escape(chart.x_name)
        ),
    );
    put(out, format_args!("<text class=\"axis\" x=\"{left}\" y=\"{}\">\u{2190} better</text>", bottom + 38.0));
    put(out, format_args!("<text class=\"axis\" x=\"{left}\" y=\"{}\">{}</text>\n", top - 6.0, escape(chart.y_name)));
}

/// The curve of every family, and the front as steps: between two of its points nothing better is known.
fn lines(out: &mut String, chart: &Chart<'_>, axes: &Axes) {
    let mut front: Vec<&Dot> = chart.dots.iter().filter(|d| d.front).collect();
    front.sort_by(|a, b| a.x[1].total_cmp(&b.x[1]));
    let mut path = String::new();
    for (i, dot) in front.iter().enumerate() {
        let (x, y) = (axes.x.at(dot.x[1]), axes.y.at(dot.y[1]));
        if i == 0 {
            put(&mut path, format_args!("M{x:.1} {y:.1}"));
        } else {
            put(&mut path, format_args!("H{x:.1}V{y:.1}"));
        }
    }
    put(out, format_args!("<path class=\"front\" d=\"{path}\"/>"));
    for family in 0..chart.families.len() {
        let mut own = chart.dots.iter().filter(|d| d.family == Some(family));
        let mut path = String::new();
        for (i, dot) in own.by_ref().enumerate() {
            put(
                &mut path,
                format_args!("{}{:.1} {:.1}", if i == 0 { "M" } else { "L" }, axes.x.at(dot.x[1]), axes.y.at(dot.y[1])),
            );
        }
        if !path.is_empty() {
            put(out, format_args!("<path class=\"curve f{family} c{}\" d=\"{path}\"/>", family % COLOURS));
        }
    }
    out.push('\n');
}

fn mark(out: &mut String, id: &str, i: usize, dot: &Dot, axes: &Axes) {
    let [x0, x, x1] = dot.x.map(|v| axes.x.at(v));
    let [y0, y, y1] = dot.y.map(|v| axes.y.at(v));
    let class = dot.family.map_or("dense".to_owned(), |f| format!("f{f} c{}", f % COLOURS));
    let hollow = if dot.front || dot.family.is_none() { "" } else { " hollow" };
    put(
        out,
        format_args!(
            "<g id=\"{id}-{i}\" class=\"dot {class}{hollow}\" tabindex=\"0\" role=\"img\" aria-label=\"{}\">",
            escape(&dot.tip.join(", "))
        ),
    );
    put(out, format_args!("<path class=\"bar\" d=\"M{x0:.1} {y:.1}H{x1:.1}M{x:.1} {y0:.1}V{y1:.1}\"/>"));
    put(out, format_args!("<circle class=\"reach\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"13\"/>"));
    put(
        out,
        format_args!("<path class=\"mark\" transform=\"translate({x:.1} {y:.1})\" d=\"{}\"/></g>\n", shape(dot.family)),
    );
}

/// The outline of a family's mark around the origin; the dense model is a cross-hair ring.
pub fn shape(family: Option<usize>) -> &'static str {
    const OUTLINES: [&str; SHAPES] = [
        "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
        "M-4.5-4.5h9v9h-9z",
        "M0-6L5.6 4H-5.6z",
        "M0-6.2L6.2 0L0 6.2L-6.2 0z",
        "M0 6L5.6-4H-5.6z",
        "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
        "M0-6L5.7-1.9L3.5 4.9H-3.5L-5.7-1.9z",
    ];
    match family {
        Some(f) => OUTLINES[f % SHAPES],
        None => "M0-7L1.8-2.4L6.7-2.2L2.8.9L4.1 5.7L0 3L-4.1 5.7L-2.8.9L-6.7-2.2L-1.8-2.4z",
    }
}

/// Families that still have room for their names in the plot; with more, the legend alone tells them apart.
const NAMED: usize = 4;

/// Names beside the cheapest point of every family and the dense point, moved down until they do not touch.
fn names(out: &mut String, chart: &Chart<'_>, axes: &Axes) {
    let cheapest =
        |f: Option<usize>| chart.dots.iter().filter(move |d| d.family == f).min_by(|a, b| a.x[1].total_cmp(&b.x[1]));
    let named = if chart.families.len() <= NAMED { chart.families.len() } else { 0 };
    let families = (0..named).map(|f| (chart.families[f], cheapest(Some(f))));
    let mut placed: Vec<(f64, f64, f64)> = Vec::new();
    for (name, dot) in families.chain([("dense", cheapest(None))]) {
        let Some(dot) = dot else { continue };
        let width = 6.6 * name.chars().count() as f64;
        let (x, mut y) = (axes.x.at(dot.x[1]), axes.y.at(dot.y[1]) - 9.0);
        let right_of = x + 10.0 + width <= PLOT.2;
        let start = if right_of { x + 10.0 } else { x - 10.0 - width };
        let touches = |y: f64| placed.iter().any(|(a, b, v)| (y - v).abs() < 13.0 && start < *b && *a < start + width);
        while touches(y) && y < PLOT.3 - 4.0 {
            y += 2.0;
        }
        placed.push((start, start + width, y));
        put(out, format_args!("<text class=\"name\" x=\"{start:.1}\" y=\"{y:.1}\">{}</text>", escape(name)));
    }
    out.push('\n');
}

fn tooltip(out: &mut String, id: &str, i: usize, dot: &Dot, axes: &Axes) {
    let widest = dot.tip.iter().map(|l| l.chars().count()).max().unwrap_or(0);
    let (w, h) = (6.1 * widest as f64 + 20.0, 16.0 * dot.tip.len() as f64 + 12.0);
    let (x, y) = (axes.x.at(dot.x[1]), axes.y.at(dot.y[1]));
    let left = if x + 14.0 + w < SIZE.0 { x + 14.0 } else { (x - 14.0 - w).max(2.0) };
    let top = (y - h / 2.0).clamp(2.0, SIZE.1 - h - 2.0);
    put(
        out,
        format_args!(
            "<g id=\"{id}-t{i}\" class=\"tip\" aria-hidden=\"true\" transform=\"translate({left:.1} {top:.1})\"><rect width=\"{w:.1}\" height=\"{h:.1}\" rx=\"5\"/>"
        ),
    );
    for (k, line) in dot.tip.iter().enumerate() {
        put(out, format_args!("<text x=\"10\" y=\"{}\">{}</text>", 20 + 16 * k, escape(line)));
    }
    out.push_str("</g>\n");
}
