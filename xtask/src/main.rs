//! Developer tasks: `cargo xtask --help` (an alias of `cargo run --release -p xtask --`).
#![forbid(unsafe_code)]

mod synth;

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Developer tasks of Lacuna")]
enum Task {
    /// Write a GGUF model with seeded random weights, for speed work without downloads.
    Synth(synth::Args),
    /// Check the rules of the house; they are listed in ARCHITECTURE.md.
    Tidy,
    /// Write the pages that are generated from the registry.
    Docs,
}

fn main() -> ExitCode {
    match run(Task::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Synth(args) => synth::run(&args),
        Task::Tidy => tidy(),
        Task::Docs => xtask::docs::write(&xtask::root()).context("writing the generated pages"),
    }
}

fn tidy() -> Result<()> {
    let problems = xtask::tidy::check(&xtask::root()).context("reading the sources")?;
    for p in &problems {
        println!("{p}");
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("{} problems", problems.len())
}
