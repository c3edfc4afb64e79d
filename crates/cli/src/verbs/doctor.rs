//! `lacuna doctor`: what this machine offers, in numbers that speed depends on.

use crate::{Outcome, table::Table, text};
use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use lacuna::{
    cache,
    engine::{
        break_even::{self, BreakEven},
        layouts,
    },
};
use lacuna_kernels::{
    Format, Pool, bitmap,
    isa::{self, Isa},
    probe,
};
use serde_json::{Map, Value, json};
use std::{
    fs,
    io::{Write, stdout},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// Bytes of the streaming read: several times any last-level cache.
const STREAM_BYTES: usize = 512 << 20;

/// Arguments of `lacuna doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// Skip what takes seconds: bandwidth, multiply-adds and break-even shares.
    #[arg(long)]
    no_probe: bool,
    /// Measure the break-even shares again, even if they are stored.
    #[arg(long, conflicts_with = "no_probe")]
    remeasure: bool,
    /// Read every converted layout of the cache in full, and remove those that are damaged; nothing else is done.
    #[arg(long, conflicts_with_all = ["no_probe", "remeasure", "json"])]
    check_cache: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    if args.check_cache {
        return check_cache();
    }
    let mut facts = facts();
    facts["probes"] = json!([]);
    if !args.no_probe {
        facts["probes"] = probes();
        measure_break_even(args.remeasure)?;
    }
    facts["break_even"] = stored_break_even(&BY_CHANNELS, BreakEven::share);
    facts["bitmap_zeros"] = stored_break_even(&bitmap::FORMATS, BreakEven::zeros);
    let mut out = stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&facts)?)?;
        return Ok(Outcome::Good);
    }
    let mut table = Table::new(&["what", "value"]);
    let text = |key: &str| match &facts[key] {
        Value::String(s) => s.clone(),
        Value::Array(list) => list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
        Value::Null => "unknown".to_owned(),
        other => other.to_string(),
    };
    let size = |key: &str| facts[key].as_u64().map_or("unknown".to_owned(), text::bytes);
    table.row(["processor".to_owned(), text("cpu")]);
    table.row(["threads".to_owned(), text("threads")]);
    table.row(["instruction sets".to_owned(), text("isa_available")]);
    table.row(["in use (LACUNA_ISA forces another)".to_owned(), text("isa")]);
    table.row(["memory, total".to_owned(), size("memory_total")]);
    table.row(["memory, available".to_owned(), size("memory_available")]);
    table.row(["model cache".to_owned(), text("cache")]);
    table.row(["disk, free there".to_owned(), size("disk_free")]);
    write!(out, "{table}")?;
    let mut table = Table::new(&["threads:", "streaming read, GB/s:", "f32 multiply-add, GFLOP/s:"]);
    for p in facts["probes"].as_array().into_iter().flatten() {
        let number = |key: &str| format!("{:.1}", p[key].as_f64().unwrap_or_default());
        table.row([p["threads"].to_string(), number("stream_gb_per_s"), number("fma_gflop_per_s")]);
    }
    if !args.no_probe {
        write!(out, "\n{table}")?;
    }
    for (key, meaning) in [
        ("break_even", "dense is faster above a kept share of:"),
        ("bitmap_zeros", "bitmaps are faster from a share of zeros of:"),
    ] {
        let mut table = Table::new(&["weights", meaning]);
        for (format, share) in facts[key].as_object().into_iter().flatten() {
            table.row([format.clone(), share.as_f64().map_or("-".to_owned(), text::percent)]);
        }
        write!(out, "\n{table}")?;
    }
    Ok(Outcome::Good)
}

/// Negative if a layout was damaged.
fn check_cache() -> Result<Outcome> {
    let mut out = stdout().lock();
    let Some(root) = cache::root() else {
        writeln!(out, "there is no cache (LACUNA_CACHE is empty, or no home folder is known)")?;
        return Ok(Outcome::Good);
    };
    let (good, wrong) = layouts::check_all(&root)?;
    for e in &wrong {
        writeln!(out, "removed: {e}")?;
    }
    writeln!(out, "{}: {good} converted layouts are as they were written, {} were not", root.display(), wrong.len())?;
    Ok(if wrong.is_empty() { Outcome::Good } else { Outcome::Negative })
}

/// Rates with one thread and with all.
fn probes() -> Value {
    let all = all_threads();
    let mut counts = vec![1, all];
    counts.dedup();
    let one = |threads: usize| {
        let pool = Pool::new(threads);
        json!({
            "threads": threads,
            "stream_gb_per_s": probe::stream_read(&pool, STREAM_BYTES, 3) / 1e9,
            "fma_gflop_per_s": probe::peak_fma(&pool, Duration::from_millis(300)) / 1e9,
        })
    };
    counts.into_iter().map(one).collect()
}

/// Threads that the system gives this program.
pub fn all_threads() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get())
}

/// Formats that weights are read by channels in.
const BY_CHANNELS: [Format; 6] = [Format::F32, Format::F16, Format::Bf16, Format::Q8_0, Format::Q4_0, Format::Q4K];

/// Measures the break-even share of each format with one thread and with all, and stores it for the engine; what is
/// stored already stays unless `again`.
fn measure_break_even(again: bool) -> Result<()> {
    // That of small models, whose short columns are the worst case.
    const WIDTH: usize = 2048;
    let Some(root) = cache::root() else { return Ok(()) };
    let mut counts = vec![1, all_threads()];
    counts.dedup();
    let known = |n| bitmap::FORMATS.iter().all(|f| BreakEven::load(Some(&root), n).knows_zeros(*f));
    counts.retain(|&n| again || !known(n));
    let bar = ProgressBar::new((counts.len() * (BY_CHANNELS.len() + bitmap::FORMATS.len())) as u64);
    bar.set_style(ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}")?);
    bar.set_message("measuring sparse against dense products");
    for threads in counts {
        let pool = Pool::new(threads);
        let mut found = BreakEven::default();
        for format in BY_CHANNELS {
            found.set(format, break_even::measure(&pool, format, WIDTH, WIDTH));
            bar.inc(1);
        }
        for format in bitmap::FORMATS {
            found.set_zeros(format, break_even::measure_zeros(&pool, format, WIDTH, WIDTH));
            bar.inc(1);
        }
        found.save(&root, threads)?;
    }
    bar.finish_and_clear();
    Ok(())
}

/// The share per format at which the engine falls back to dense on this machine.
fn stored_break_even(formats: &[Format], share: fn(&BreakEven, Format) -> f32) -> Value {
    let found = BreakEven::load(cache::root().as_deref(), all_threads());
    formats.iter().map(|f| (f.name().to_owned(), json!(share(&found, *f)))).collect::<Map<_, _>>().into()
}

fn facts() -> Value {
    let cache = lacuna::hub::cache_dir().ok();
    let memory = |key| fs::read_to_string("/proc/meminfo").ok().and_then(|t| memory_field(&t, key));
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cpu": cpu_name(),
        "threads": all_threads(),
        "isa": isa::get().name(),
        "isa_available": isa::available().iter().map(|i: &Isa| i.name()).collect::<Vec<_>>(),
        "memory_total": memory("MemTotal"),
        "memory_available": memory("MemAvailable"),
        "disk_free": cache.as_deref().and_then(disk_free),
        "cache": cache.map(|c| c.display().to_string()),
    })
}

/// Name of the processor, where the system tells it.
pub fn cpu_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Bytes of a field of `/proc/meminfo`, which counts in KiB.
pub fn memory_field(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Free bytes on the disk of `path`, or of its nearest ancestor that exists.
#[cfg(unix)]
fn disk_free(path: &Path) -> Option<u64> {
    let existing: PathBuf = path.ancestors().find(|p| p.exists())?.to_owned();
    let stat = rustix::fs::statvfs(&existing).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

#[cfg(not(unix))]
fn disk_free(_path: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_meminfo() {
        let text = "MemTotal:       16 kB\nMemAvailable:    8 kB\n";
        assert_eq!(memory_field(text, "MemTotal"), Some(16 * 1024));
        assert_eq!(memory_field(text, "MemAvailable"), Some(8 * 1024));
        assert_eq!(memory_field(text, "Mem"), None);
    }

    #[cfg(unix)]
    #[test]
    fn free_space_is_found_below_a_missing_folder() {
        assert!(disk_free(Path::new("/no/such/folder")).is_some_and(|n| n > 0));
    }
}
