//! Developer tasks: `cargo xtask --help` (an alias of `cargo run --release -p xtask --`).
#![forbid(unsafe_code)]

mod synth;

use clap::Parser;

#[derive(Parser)]
#[command(about = "Developer tasks of Lacuna")]
enum Task {
    /// Write a GGUF model with seeded random weights, for speed work without downloads.
    Synth(synth::Args),
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Synth(args) => synth::run(&args),
    }
}
