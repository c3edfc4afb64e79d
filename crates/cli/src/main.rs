//! The `lacuna` command. One file per verb in [`verbs`]; this file reads the command line, sets the log up and turns
//! results into exit codes: 0 good, 1 the result is negative, 2 an error (one chain of causes on stderr).
#![forbid(unsafe_code)]

mod args;
mod decoding;
mod open;
mod report;
mod sparse;
mod table;
mod text;
mod verbs;

use anyhow::{Context, Result, anyhow};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use lacuna::chat;
use std::{
    env,
    ffi::OsString,
    io::{self, IsTerminal},
    process::ExitCode,
    sync::Arc,
};
use tracing_subscriber::EnvFilter;

/// Run neural networks through their sparsity.
///
/// Without a verb: the demo, which tells a story with the embedded model dense and sparse and compares the two.
#[derive(Parser)]
#[command(name = "lacuna", version, max_term_width = 110)]
struct Cli {
    /// Say more on stderr; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Continue a prompt; the text goes to stdout, the timings to stderr.
    Run(verbs::run::Args),
    /// Talk with a model through its own chat template.
    Chat(verbs::chat::Args),
    /// Serve a model and its plans: an OpenAI-compatible API, and a page.
    Serve(verbs::serve::Args),
    /// Measure prompt processing (pp), generation (tg) and their depth, in llama-bench's form.
    Bench(verbs::bench::Args),
    /// Measure quality on a text: perplexity, or the divergence from a dense base.
    Eval(verbs::eval::Args),
    /// Compare plans on one model: quality against bytes and time, as a page with charts or a table.
    Compare(verbs::compare::Args),
    /// Observe a calibration text and store the plan of a sparse method.
    Calibrate(verbs::calibrate::Args),
    /// Prune and quantise a model into a smaller one, block by block.
    Compress(verbs::compress::Args),
    /// Show what is in a model file, and the memory it will take.
    Inspect(verbs::inspect::Args),
    /// Show what this machine offers: instruction sets, bandwidth, memory, disk.
    Doctor(verbs::doctor::Args),
    /// List the sparse methods, or describe one.
    Methods(verbs::methods::Args),
    /// Render chat templates for the program that starts this one.
    #[command(hide = true, name = TEMPLATES)]
    Templates,
    /// Fetch a model from the hub into the shared cache.
    #[cfg(feature = "pull")]
    Pull(verbs::pull::Args),
}

/// How a verb ended, beyond errors.
#[derive(Clone, Copy, PartialEq)]
pub enum Outcome {
    /// Exit code 0.
    Good,
    /// Exit code 1: it worked, and the answer is no.
    Negative,
}

fn main() -> ExitCode {
    let matches = Cli::command().get_matches_from(long_names(env::args_os()));
    let result = Cli::from_arg_matches(&matches).map_err(anyhow::Error::from).and_then(run);
    match result {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Negative) => ExitCode::from(1),
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", chain(&e));
            ExitCode::from(2)
        }
    }
}

fn run(cli: Cli) -> Result<Outcome> {
    log(cli.verbose)?;
    lacuna_kernels::isa::detect().map_err(|e| anyhow!(e))?;
    match cli.verb {
        None => verbs::demo::run(),
        Some(Verb::Run(a)) => verbs::run::run(a),
        Some(Verb::Chat(a)) => verbs::chat::run(a),
        Some(Verb::Serve(a)) => verbs::serve::run(a),
        Some(Verb::Bench(a)) => verbs::bench::run(a),
        Some(Verb::Eval(a)) => verbs::eval::run(a),
        Some(Verb::Compare(a)) => verbs::compare::run(a),
        Some(Verb::Calibrate(a)) => verbs::calibrate::run(a),
        Some(Verb::Compress(a)) => verbs::compress::run(a),
        Some(Verb::Inspect(a)) => verbs::inspect::run(a),
        Some(Verb::Doctor(a)) => verbs::doctor::run(a),
        Some(Verb::Methods(a)) => verbs::methods::run(a),
        Some(Verb::Templates) => {
            chat::work(io::stdin().lock(), io::stdout().lock())?;
            Ok(Outcome::Good)
        }
        #[cfg(feature = "pull")]
        Some(Verb::Pull(a)) => verbs::pull::run(a),
    }
}

/// The verb that makes this program a worker for chat templates.
const TEMPLATES: &str = "render-templates";

/// Where the verbs render chat templates: in a process of their own, because these are programs that came with the weights.
pub(crate) fn template_worker() -> Result<Arc<chat::Worker>> {
    let program = env::current_exe().context("finding this program, which renders chat templates")?;
    Ok(Arc::new(chat::Worker::new(program, [TEMPLATES])))
}

/// `LACUNA_LOG` (a filter such as `lacuna=debug`) wins over `-v`.
fn log(verbose: u8) -> Result<()> {
    let level = ["warn", "info", "trace"][usize::from(verbose.min(2))];
    let filter = match env::var("LACUNA_LOG") {
        Ok(text) if !text.is_empty() => EnvFilter::try_new(&text).map_err(|e| anyhow!("LACUNA_LOG={text:?}: {e}"))?,
        _ => EnvFilter::new(level),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).without_time();
    log.with_ansi(io::stderr().is_terminal()).with_target(false).init();
    Ok(())
}

/// llama.cpp's flags of several letters behind one dash, which clap would read as clusters of short ones.
fn long_names(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut literal = false;
    args.map(|arg| {
        literal |= arg == "--";
        match arg.to_str() {
            Some("-ctk") if !literal => "--cache-type-k".into(),
            Some("-ctv") if !literal => "--cache-type-v".into(),
            _ => arg,
        }
    })
    .collect()
}

/// The causes from the outermost to the innermost in one line; a cause that the one before already tells is left out.
fn chain(e: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in e.chain() {
        let text = cause.to_string();
        if !parts.last().is_some_and(|last| last.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().filter_map(|c| c.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_llama_cpp_with_several_letters() {
        let words = ["lacuna", "run", "-ctk", "f16", "--", "-ctv"].map(OsString::from);
        let got = long_names(words.into_iter());
        assert_eq!(got[2], "--cache-type-k");
        assert_eq!(got[5], "-ctv");
    }

    #[test]
    fn chains_do_not_repeat_themselves() {
        let inner = io::Error::other("no such thing");
        let e = anyhow::Error::new(inner).context("file.gguf: no such thing").context("loading");
        assert_eq!(chain(&e), "loading: file.gguf: no such thing");
    }
}
