//! `lacuna methods`: what the registry holds.

use crate::{Outcome, table::Table};
use anyhow::Result;
use lacuna_core::{method::Method, site::Site};
use lacuna_methods::registry::{METHODS, find};
use serde_json::{Value, json};
use std::io::{Write, stdout};

/// Arguments of `lacuna methods`.
#[derive(clap::Args)]
pub struct Args {
    /// Describe this method; without it all are listed.
    name: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    let chosen: Vec<&dyn Method> = match &args.name {
        Some(name) => vec![find(name)?],
        None => METHODS.to_vec(),
    };
    let mut out = stdout().lock();
    if args.json {
        let list: Vec<_> = chosen.iter().map(|m| describe(*m)).collect();
        let value = if args.name.is_some() { list[0].clone() } else { Value::Array(list) };
        writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
    } else if args.name.is_some() {
        sheet(&mut out, chosen[0])?;
    } else {
        let mut table = Table::new(&["name", "site", "use", "what it does"]);
        for m in chosen {
            let site = site(m);
            table.row([m.name().to_owned(), site, usage(m), m.summary().to_owned()]);
        }
        write!(out, "{table}")?;
    }
    Ok(Outcome::Good)
}

fn site(m: &dyn Method) -> String {
    format!("{:?}", m.site()).to_lowercase()
}

fn usage(m: &dyn Method) -> String {
    let flag = match m.site() {
        Site::Decoding => "--draft",
        Site::Weights => "compress --method",
        _ => "--sparse",
    };
    let value = m.params().first().map_or(String::new(), |p| format!("={}", p.default));
    format!("{flag} {}{value}", m.name())
}

fn layouts(m: &dyn Method) -> Vec<&'static str> {
    m.layouts().iter().map(|o| o.name()).collect()
}

fn describe(m: &dyn Method) -> Value {
    let params: Vec<_> = m
        .params()
        .iter()
        .map(|p| json!({"name": p.name, "default": p.default, "range": p.range_text(), "doc": p.doc}))
        .collect();
    json!({
        "name": m.name(),
        "title": m.title(),
        "site": site(m),
        "summary": m.summary(),
        "paper": m.citation().paper,
        "arxiv": m.citation().arxiv,
        "layouts": layouts(m),
        "params": params,
    })
}

fn sheet(out: &mut impl Write, m: &dyn Method) -> Result<()> {
    writeln!(out, "{} ({}): {}\n", m.name(), site(m), m.title())?;
    writeln!(out, "{}\n", m.summary())?;
    let arxiv = m.citation().arxiv.map_or(String::new(), |id| format!(", arXiv:{id}"));
    writeln!(out, "source   {}{arxiv}", m.citation().paper)?;
    writeln!(out, "layouts  {}", layouts(m).join(", "))?;
    writeln!(out, "use      {}", usage(m))?;
    if !m.params().is_empty() {
        let mut table = Table::new(&["parameter", "default:", "range", "meaning"]);
        for p in m.params() {
            table.row([p.name.to_owned(), p.default.to_string(), p.range_text(), p.doc.to_owned()]);
        }
        write!(out, "\n{table}")?;
    }
    Ok(())
}
