//! `lacuna doctor`: what this machine offers, in numbers that speed depends on.

use crate::{Outcome, table::Table, text};
use anyhow::Result;
use lacuna_kernels::isa::{self, Isa};
use serde_json::{Value, json};
use std::{
    fs,
    io::{Write, stdout},
    path::{Path, PathBuf},
    thread,
};

/// Arguments of `lacuna doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<Outcome> {
    let facts = facts();
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
    Ok(Outcome::Good)
}

fn facts() -> Value {
    let cache = lacuna::hub::cache_dir().ok();
    let memory = |key| fs::read_to_string("/proc/meminfo").ok().and_then(|t| memory_field(&t, key));
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cpu": cpu_name(),
        "threads": thread::available_parallelism().map_or(1, |n| n.get()),
        "isa": isa::get().name(),
        "isa_available": isa::available().iter().map(|i: &Isa| i.name()).collect::<Vec<_>>(),
        "memory_total": memory("MemTotal"),
        "memory_available": memory("MemAvailable"),
        "disk_free": cache.as_deref().and_then(disk_free),
        "cache": cache.map(|c| c.display().to_string()),
    })
}

fn cpu_name() -> Option<String> {
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
    let stat = nix::sys::statvfs::statvfs(&existing).ok()?;
    (stat.blocks_available() as u64).checked_mul(stat.fragment_size() as u64)
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
