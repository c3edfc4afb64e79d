//! What `lacuna compress` did to each layer, as a page: maps of errors, zeros and bits, and bytes by projection.

use super::{
    escape::escape,
    html::{foot, head},
};
use crate::text::{bytes, percent, plural};
use lacuna::compress::{LayerReport, Report};
use lacuna_core::site::Proj;

/// Width of the column with the names of projections, and the drawing's width.
const NAMES: f64 = 78.0;
const WIDTH: f64 = 560.0;
/// Height of a row.
const ROW: f64 = 24.0;
/// Most columns whose cells hold their number.
const NUMBERED: usize = 12;

/// What a page tells besides the report.
pub struct Facts<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// The methods with their parameters.
    pub methods: &'a str,
    /// Seconds of the run.
    pub seconds: f64,
}

/// The page.
pub fn page(report: &Report, facts: &Facts<'_>) -> String {
    let mut out = head(&format!("{}: {}", facts.model, facts.methods));
    out += &format!(
        "<p class=\"lead\">What {} of {} lost, layer by layer, in {:.1} s.</p>\n",
        plural(report.layers.len(), "matrix").replace("matrixs", "matrices"),
        escape(facts.model),
        facts.seconds
    );
    out += &tiles(report);
    out += "<h2>Errors</h2>\n<div class=\"maps wide\">\n";
    let seen = report.layers.iter().any(|l| l.output_error.is_some());
    if seen {
        let title = "Error of outputs on the calibration text, relative to their energy";
        out += &map(report, title, &Shade::errors(report, &|l: &LayerReport| l.output_error));
    }
    let title = "Error of weights, relative to their energy";
    out += &map(report, title, &Shade::errors(report, &|l: &LayerReport| Some(l.weight_error)));
    out += "</div>\n<h2>What is left</h2>\n<div class=\"maps wide\">\n";
    out +=
        &map(report, "Zeros, per cent", &Shade { of: &|l| Some(100.0 * zeros(l)), low: 0.0, high: 100.0, log: false });
    let most = report.layers.iter().map(|l| width(l, l.bytes.0)).fold(1.0, f64::max);
    out += &map(
        report,
        "Bits per weight in the file, scales included",
        &Shade { of: &|l| Some(width(l, l.bytes.1)), low: 0.0, high: most, log: false },
    );
    out += "</div>\n<h2>Bytes</h2>\n<figure>\n";
    out += &bars(report);
    out += "<figcaption>All layers together: before (light) and after (dark).</figcaption></figure>\n";
    if !report.notes.is_empty() {
        let notes: String = report.notes.iter().map(|n| format!("<li>{}</li>\n", escape(n))).collect();
        out += &format!("<h2>Notes</h2>\n<ul class=\"notes\">\n{notes}</ul>\n");
    }
    // Two maps beside each other at most.
    let out = out.replacen(
        "</style>",
        ".maps.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }\n</style>",
        1,
    );
    out + &foot(env!("CARGO_PKG_VERSION"))
}

fn count(l: &LayerReport) -> f64 {
    (l.outputs * l.inputs).max(1) as f64
}

fn zeros(l: &LayerReport) -> f64 {
    l.zeros as f64 / count(l)
}

/// Bits per weight.
fn width(l: &LayerReport, bytes: u64) -> f64 {
    8.0 * bytes as f64 / count(l)
}

fn tiles(report: &Report) -> String {
    let mut out = String::from("<ul class=\"tiles\">\n");
    let mut tile = |what: &str, big: &str, more: &str| {
        out += &format!(
            "<li><div class=\"what\">{}</div><div class=\"big\">{}</div><div class=\"more\">{}</div></li>\n",
            escape(what),
            escape(big),
            escape(more)
        );
    };
    let (before, after) = report.bytes;
    let share = after as f64 / before.max(1) as f64;
    tile("Weights", &bytes(after), &format!("{} of {}", percent(share), bytes(before)));
    tile("Dropped", &percent(report.sparsity()), "of the weights of these layers");
    let error = |l: &&LayerReport| l.output_error.unwrap_or(l.weight_error);
    if let Some(worst) = report.layers.iter().max_by(|a, b| error(a).total_cmp(&error(b))) {
        let kind = if worst.output_error.is_some() { "outputs" } else { "weights" };
        let name = format!("layers.{}.{}", worst.layer, worst.proj);
        tile("Largest error", &name, &format!("{} of {kind}", short(error(&worst))));
    }
    if let Some(kl) = report.divergence {
        tile("KL on the held-out text", &format!("{kl:.4}"), "nats from the dense model");
    }
    out + "</ul>\n"
}

/// How numbers become shades.
struct Shade<'a> {
    of: &'a dyn Fn(&LayerReport) -> Option<f64>,
    low: f64,
    high: f64,
    log: bool,
}

impl<'a> Shade<'a> {
    /// A logarithmic scale over the errors there are, of two decades at least.
    fn errors(report: &Report, of: &'a dyn Fn(&LayerReport) -> Option<f64>) -> Self {
        let all = report.layers.iter().filter_map(of).filter(|e| *e > 0.0);
        let (low, high) = all.fold((f64::MAX, f64::MIN_POSITIVE), |(l, h), e| (l.min(e), h.max(e)));
        Self { of, low: low.min(high / 100.0), high, log: true }
    }

    /// 0 to 1.
    fn at(&self, value: f64) -> f64 {
        let scale = |v: f64| if self.log { v.max(1e-30).ln() } else { v };
        let (low, high) = (scale(self.low), scale(self.high));
        if high > low { ((scale(value) - low) / (high - low)).clamp(0.0, 1.0) } else { 0.0 }
    }
}

/// Three digits at most.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        v if v >= 99.5 => format!("{v:.0}"),
        v if v >= 9.95 => format!("{v:.1}"),
        v if v >= 0.01 => format!("{v:.2}"),
        v => format!("{v:.0e}"),
    }
}

/// A row per projection, a column per layer.
fn map(report: &Report, title: &str, shade: &Shade<'_>) -> String {
    let rows: Vec<Proj> = projections(report);
    let layers = report.layers.iter().map(|l| l.layer + 1).max().unwrap_or(0);
    let (cell, height) = ((WIDTH - NAMES) / layers.max(1) as f64, ROW * rows.len() as f64 + 18.0);
    let mut out = format!(
        "<figure><h3>{0}</h3><svg class=\"heat\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{0}, from {1} to {2}\">",
        escape(title),
        short(shade.low),
        short(shade.high)
    );
    for (row, proj) in rows.iter().enumerate() {
        let y = ROW * row as f64;
        let (x, name) = (NAMES - 6.0, proj.name());
        out += &format!("<text class=\"site\" x=\"{x}\" y=\"{}\" text-anchor=\"end\">{name}</text>", y + 15.5);
        for l in report.layers.iter().filter(|l| l.proj == name) {
            let Some(value) = (shade.of)(l) else { continue };
            let (x, depth, text) = (NAMES + cell * l.layer as f64, shade.at(value), short(value));
            out += &format!(
                "<g><title>layers.{}.{name}: {text}</title><rect class=\"full\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\"/>\
                 <rect class=\"cell\" fill-opacity=\"{depth:.2}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\"/>",
                l.layer,
                w = (cell - 1.5).max(0.5),
                h = ROW - 1.5
            );
            if layers <= NUMBERED {
                let on = if depth > 0.6 { " on" } else { "" };
                let (x, y) = (x + cell / 2.0 - 0.75, y + 15.5);
                out += &format!(
                    "<text class=\"share{on}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{text}</text>"
                );
            }
            out += "</g>";
        }
    }
    let y = height - 4.0;
    for layer in (0..layers).step_by(layers.div_ceil(12).max(1)) {
        let x = NAMES + cell * (layer as f64 + 0.5) - 0.75;
        out += &format!("<text class=\"site\" x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{layer}</text>");
    }
    let scale = if shade.log { ", logarithmic" } else { "" };
    out + &format!(
        "<text class=\"site\" x=\"{}\" y=\"{y}\" text-anchor=\"end\">layer</text></svg><figcaption>{}<span class=\"ramp\"></span>{}{scale}</figcaption></figure>\n",
        NAMES - 6.0,
        short(shade.low),
        short(shade.high)
    )
}

/// The projections that were compressed, in the order of the forward pass.
fn projections(report: &Report) -> Vec<Proj> {
    Proj::ALL.into_iter().filter(|p| report.layers.iter().any(|l| l.proj == p.name())).collect()
}

/// Bytes by projection, before and after.
fn bars(report: &Report) -> String {
    let rows: Vec<(Proj, u64, u64)> = projections(report)
        .into_iter()
        .map(|p| {
            let of = || report.layers.iter().filter(move |l| l.proj == p.name()).map(|l| l.bytes);
            (p, of().map(|b| b.0).sum(), of().map(|b| b.1).sum())
        })
        .collect();
    let most = rows.iter().map(|r| r.1.max(r.2)).max().unwrap_or(1).max(1) as f64;
    let (full, height) = (2.0 * WIDTH, ROW * rows.len() as f64);
    let mut out = format!(
        "<svg class=\"heat\" viewBox=\"0 0 {full} {height}\" role=\"img\" aria-label=\"Bytes by projection, before and after\">"
    );
    for (row, (proj, before, after)) in rows.iter().enumerate() {
        let y = ROW * row as f64;
        let length = |n: u64| n as f64 / most * (full - NAMES - 190.0);
        let text = format!("{} of {}", bytes(*after), bytes(*before));
        out += &format!(
            "<text class=\"site\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{proj}</text>\
             <rect class=\"full\" x=\"{NAMES}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{h:.1}\"/>\
             <rect class=\"cell\" x=\"{NAMES}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{h:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{text}</text>",
            NAMES - 6.0,
            y + 15.5,
            length(*before),
            length(*after),
            NAMES + length((*before).max(*after)) + 8.0,
            y + 15.5,
            h = ROW - 4.0
        );
    }
    out + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let layer = |layer: usize, proj: &str, error: f64| LayerReport {
            layer,
            proj: proj.into(),
            outputs: 8,
            inputs: 16,
            dropped: 64,
            zeros: 64,
            bits: Some(4),
            bytes: (256, 72),
            weight_error: error,
            output_error: Some(error / 2.0),
        };
        let layers = vec![layer(0, "attn.q", 0.1), layer(0, "mlp.down", 0.2), layer(1, "attn.q", 0.004)];
        Report {
            layers,
            notes: vec!["a <note>".into()],
            bytes: (1000, 400),
            resumed: 0,
            divergence: Some(0.03),
            spent: lacuna::compress::Spent::default(),
        }
    }

    #[test]
    fn a_page_tells_every_layer_and_nothing_from_outside() {
        let page = page(&report(), &Facts { model: "<b>", methods: "gptq=4", seconds: 1.5 });
        assert!(page.contains("layers.0.mlp.down") && page.contains("layers.1.attn.q: 2e-3") && !page.contains("<b>"));
        assert!(page.contains("a &lt;note&gt;") && page.contains("0.0300") && page.contains("4.5"), "bits per weight");
        assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script"));
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert_eq!(page.matches("<svg").count(), 5);
    }

    #[test]
    fn shades_run_from_the_smallest_to_the_largest_error() {
        let report = report();
        let of = |l: &LayerReport| Some(l.weight_error);
        let shade = Shade::errors(&report, &of);
        assert_eq!((shade.at(0.2), shade.at(0.0), shade.at(0.002)), (1.0, 0.0, 0.0));
        assert!((shade.at(0.02) - 0.5).abs() < 1e-9);
        assert_eq!([0.0, 0.05, 12.34, 250.0, 0.0004].map(short), ["0", "0.05", "12.3", "250", "4e-4"]);
    }
}
