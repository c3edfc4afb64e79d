//! `lacuna pull`: a model from the hub into the cache that all tools share.

use crate::Outcome;
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use lacuna::hub::{
    Name, cache_dir,
    pull::{Progress, Source, pull},
};
use std::io::{IsTerminal, Write, stderr, stdout};

/// Arguments of `lacuna pull`.
#[derive(clap::Args)]
pub struct Args {
    /// `org/name`, or `org/name:Q4_0` and `org/name:file.gguf` for one GGUF file.
    name: String,
}

/// Runs the verb; prints the place of the model on stdout.
pub fn run(args: Args) -> Result<Outcome> {
    let name = Name::parse(&args.name)?;
    let root = cache_dir()?;
    let found = pull(&Source::from_env(), &root, &name, &mut Bars { bar: None })?;
    writeln!(stdout(), "{}", found.display())?;
    Ok(Outcome::Good)
}

/// One bar per file on a terminal, one line per file elsewhere.
struct Bars {
    bar: Option<ProgressBar>,
}

impl Progress for Bars {
    fn start(&mut self, file: &str, size: u64, have: u64) {
        if !stderr().is_terminal() {
            tracing::info!(file, size, have, "fetching");
            return;
        }
        let form = "{msg:32!} {bar:30} {bytes:>10} / {total_bytes:10} {bytes_per_sec:>12} {eta:>5}";
        let bar = ProgressBar::new(size).with_message(file.to_owned());
        if let Ok(style) = ProgressStyle::with_template(form) {
            bar.set_style(style);
        }
        bar.set_position(have);
        bar.reset_eta();
        self.bar = Some(bar);
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}
