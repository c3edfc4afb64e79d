//! Kept shares as maps: one per plan, a row per place of the block, a column per layer.

use super::escape::escape;
use crate::text::percent;
use lacuna::compare::report::Point;
use std::fmt::Write;

/// Width of the column with the names of places, and the drawing's width.
const NAMES: f64 = 78.0;
const WIDTH: f64 = 340.0;
/// Height of a row.
const ROW: f64 = 20.0;
/// Most columns whose cells hold their number.
const NUMBERED: usize = 8;

/// The map of one plan as an `<svg>`; `None` where nothing is skipped.
pub fn draw(point: &Point) -> Option<String> {
    let layers = point.cost.kept.iter().map(|k| k.layers.len()).max().filter(|n| *n > 0)?;
    let cell = (WIDTH - NAMES) / layers as f64;
    let height = ROW * point.cost.kept.len() as f64 + 16.0;
    let mut out = String::new();
    let mut put = |text: String| out.push_str(&text);
    let label = format!("Kept shares of {}: {}", point.label, summary(point));
    put(format!(
        "<svg class=\"heat\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">",
        escape(&label)
    ));
    for (row, kept) in point.cost.kept.iter().enumerate() {
        let y = ROW * row as f64;
        let name = kept.site.trim_end_matches(" inputs");
        put(format!(
            "<text class=\"site\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            NAMES - 6.0,
            y + 13.5,
            escape(name)
        ));
        for (layer, share) in kept.layers.iter().enumerate() {
            let x = NAMES + cell * layer as f64;
            let title = format!(
                "{}, layer {layer}: {}",
                kept.site,
                share.map_or("dense".to_owned(), |s| format!("{} kept", percent(s)))
            );
            let fill = share.map_or("class=\"full\"".to_owned(), |s| {
                format!("class=\"cell\" fill-opacity=\"{:.2}\"", s.clamp(0.0, 1.0))
            });
            put(format!(
                "<g><title>{}</title><rect {fill} x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                escape(&title),
                cell - 1.5,
                ROW - 1.5
            ));
            if layers <= NUMBERED {
                let text = share.map_or("\u{2013}".to_owned(), |s| format!("{:.0}", 100.0 * s));
                let dark = if share.is_some_and(|s| s > 0.6) { " on" } else { "" };
                put(format!(
                    "<text class=\"share{dark}\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                    x + cell / 2.0 - 0.75,
                    y + 13.5
                ));
            }
            put("</g>".into());
        }
    }
    let y = height - 4.0;
    let step = layers.div_ceil(8);
    for layer in (0..layers).step_by(step) {
        put(format!(
            "<text class=\"site\" x=\"{:.1}\" y=\"{y}\" text-anchor=\"middle\">{layer}</text>",
            NAMES + cell * (layer as f64 + 0.5) - 0.75
        ));
    }
    put(format!("<text class=\"site\" x=\"{}\" y=\"{y}\" text-anchor=\"end\">layer</text></svg>", NAMES - 6.0));
    Some(out)
}

fn summary(point: &Point) -> String {
    let mut text = String::new();
    for kept in &point.cost.kept {
        // Writing to a string cannot fail.
        let _ = write!(text, "{} {}; ", kept.site, percent(super::csv::mean(kept)));
    }
    text
}
