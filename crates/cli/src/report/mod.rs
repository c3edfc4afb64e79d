//! A comparison as a reader meets it: a page, a table, rows, or the stored form. Every number comes from
//! [`lacuna::compare::report::Report`]; nothing is measured here.

mod axis;
mod chart;
mod csv;
mod escape;
mod heat;
mod html;
pub mod layers;
mod table;

pub use table::terminal;

use anyhow::{Context, Result, bail};
use lacuna::compare::report::Report;
use lacuna_core::atomic::write_atomically;
use std::path::Path;

/// Form of a stored report.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// What this program reads back.
    Json,
    /// A page with charts, complete in itself.
    Html,
    /// The chart of quality against bytes.
    Svg,
    /// One row per plan.
    Csv,
    /// Tables that paste into an issue.
    Markdown,
}

impl Form {
    /// The form that the extension of `path` names.
    ///
    /// # Errors
    /// Another extension, or none.
    pub fn of(path: &Path) -> Result<Self> {
        Ok(match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
            Some("html") => Self::Html,
            Some("svg") => Self::Svg,
            Some("json") => Self::Json,
            Some("csv") => Self::Csv,
            Some("md") => Self::Markdown,
            _ => bail!("{}: the extension decides the form: .html, .svg, .json, .csv or .md", path.display()),
        })
    }
}

/// Writes `report` to `path`; a reader sees the old file or the new one.
///
/// # Errors
/// The file cannot be written.
pub fn write(report: &Report, form: Form, path: &Path) -> Result<()> {
    let text = match form {
        Form::Json => serde_json::to_string_pretty(report)? + "\n",
        Form::Html => html::page(report),
        Form::Svg => html::svg(report),
        Form::Csv => csv::rows(report),
        Form::Markdown => table::markdown(report),
    };
    write_atomically(path, Some(text.len() as u64), |out| out.write_all(text.as_bytes()))
        .with_context(|| format!("{}", path.display()))
}

#[cfg(test)]
pub mod tests;
