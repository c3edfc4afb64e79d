//! The estimate of memory against what the system counts at the peak, and the refusal before anything is loaded.
#![cfg(target_os = "linux")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// A model and how it is run.
struct Case {
    name: &'static str,
    /// `None`: the embedded model.
    model: Option<PathBuf>,
    context: usize,
    flags: &'static [&'static str],
}

/// Runs until the context is full; the prompt fills most of it, so that prefill uses its largest step.
fn run(case: &Case, cache: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("LACUNA_")) {
        command.env_remove(name);
    }
    let prompt = "Once upon a time there was a little fox who lived in the wood. ".repeat(case.context / 20);
    command.args(["run", "-v", "-t", "1", "-n", "-1", "--ignore-eos", "-s", "1", "-p", &prompt]);
    command.arg("-c").arg(case.context.to_string()).args(case.flags).args(more);
    if let Some(model) = &case.model {
        command.arg("-m").arg(model);
    }
    command.env("LACUNA_CACHE", cache).stdin(Stdio::null()).output().expect("the program starts")
}

/// Peak, the median of three runs, and estimate, in bytes.
fn measured(case: &Case, cache: &Path) -> (u64, u64) {
    let mut runs = [(); 3].map(|()| once(case, cache));
    runs.sort_unstable();
    runs[1]
}

fn once(case: &Case, cache: &Path) -> (u64, u64) {
    let out = run(case, cache, &[]);
    let log = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{}: {log}", case.name);
    let field = |name: &str| -> u64 {
        let rest = log.split(name).nth(1).unwrap_or_else(|| panic!("no `{name}` in: {log}"));
        rest.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number")
    };
    (field("memory peak="), field(" estimate="))
}

fn cases() -> Vec<Case> {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/models");
    let stories = Some(shared.join("lacuna-stories"));
    vec![
        Case { name: "embedded", model: None, context: 512, flags: &[] },
        Case { name: "embedded, small steps", model: None, context: 512, flags: &["-b", "32"] },
        Case { name: "embedded, f32 keys", model: None, context: 256, flags: &["--kv", "f32"] },
        Case { name: "embedded, sparse", model: None, context: 512, flags: &["--sparse", "relu"] },
        Case { name: "safetensors, mapped", model: stories.clone(), context: 512, flags: &[] },
        Case { name: "safetensors, read", model: stories, context: 512, flags: &["--load-mode", "read", "-b", "64"] },
    ]
}

#[test]
fn the_estimate_is_within_five_per_cent_of_the_peak() {
    let cache = tempfile::tempdir().expect("a folder");
    for case in cases() {
        if let Some(path) = case.model.as_deref().filter(|p| !p.exists()) {
            println!("skipped: not present: {}", path.display());
            continue;
        }
        if case.flags.contains(&"relu") {
            // The first run makes the copies; the second is what users have.
            run(&case, cache.path(), &[]);
        }
        let (peak, estimate) = measured(&case, cache.path());
        println!("{}: peak {peak}, estimate {estimate}", case.name);
        let ratio = estimate as f64 / peak as f64;
        // On small models the program is the largest part, and it varies by a million bytes with the page cache.
        assert!((0.95..1.05).contains(&ratio), "{}: peak {peak}, estimate {estimate}: {ratio:.3}", case.name);
    }
}

#[test]
fn too_little_memory_is_refused_before_loading() {
    let cache = tempfile::tempdir().expect("a folder");
    for case in cases().into_iter().filter(|c| c.model.as_deref().is_none_or(Path::exists)) {
        let out = run(&case, cache.path(), &["--memory", "20M"]);
        let log = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{}: {log}", case.name);
        assert!(log.contains("--memory: needs") && log.contains("allowed are 20.00 MiB"), "{}: {log}", case.name);
        assert!(!log.contains("ready in") && out.stdout.is_empty(), "{}: {log}", case.name);
        assert!(run(&case, cache.path(), &["--memory", "1G"]).status.success(), "{}", case.name);
    }
}
