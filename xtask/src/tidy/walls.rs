//! Rules that look across files: who may know whom, the registry, generated pages, dependencies.

use super::{File, rules::has_word};
use crate::docs;
use lacuna_methods::registry::METHODS;
use std::{collections::BTreeSet, fs, io, path::Path, process::Command};

/// Which crates of this workspace a crate may depend on.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("kernels", &[]),
    ("core", &["lacuna-kernels"]),
    ("methods", &["lacuna-core", "lacuna-kernels"]),
    ("lacuna", &["lacuna-kernels", "lacuna-core", "lacuna-methods"]),
    ("server", &["lacuna-kernels", "lacuna-core", "lacuna-methods", "lacuna"]),
];

/// Names of architectures, as they appear in configurations; a method must not contain one outside its comments.
const ARCHITECTURES: &[&str] =
    &["llama", "mistral", "mixtral", "qwen", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"];

/// Methods whose name is also an everyday word of models, and that word.
const SHARED_NAMES: &[(&str, &str)] = &[
    ("relu", "the activation function"),
    ("predictor", "the part of a plan that any method can fill"),
    ("magnitude", "the size of a number, which selectors compare"),
    ("random", "what seeds and tests are"),
];

/// Packages at most that the program is built from on this machine, with every feature; each one is code that a user runs.
/// The lock file has more: it also pins what only other systems, tests and fuzzing need.
const PACKAGES: usize = 250;

/// Files every reader may expect at the root.
const ROOT_FILES: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE-MIT",
    "LICENSE-APACHE",
    "Cargo.lock",
    ".ci/run",
];

/// Appends what the tree breaks.
///
/// # Errors
/// If a file that must exist cannot be read.
pub fn check(root: &Path, files: &[File], problems: &mut Vec<String>) -> io::Result<()> {
    crates(root, problems)?;
    names(files, problems);
    registry(files, problems);
    lock_file(root, problems)?;
    pages(root, problems);
    Ok(())
}

fn crates(root: &Path, problems: &mut Vec<String>) -> io::Result<()> {
    for (name, known) in MAY_KNOW {
        let manifest = root.join("crates").join(name).join("Cargo.toml");
        for line in fs::read_to_string(&manifest)?.lines() {
            let dependency = line.split(['.', '=', ' ']).next().unwrap_or_default();
            if dependency.starts_with("lacuna") && line.contains("workspace") && !known.contains(&dependency) {
                problems.push(format!("crates/{name}/Cargo.toml: may not depend on {dependency}"));
            }
        }
    }
    Ok(())
}

/// N methods and M models, never N x M: neither side names the other.
fn names(files: &[File], problems: &mut Vec<String>) {
    for file in files {
        let forbidden: Vec<&str> = if file.path.starts_with("crates/methods/src/") {
            ARCHITECTURES.to_vec()
        } else if file.path.starts_with("crates/lacuna/src/model/")
            || file.path.starts_with("crates/lacuna/src/engine/")
        {
            let shared = |n: &str| SHARED_NAMES.iter().any(|(s, _)| *s == n);
            METHODS.iter().map(|m| m.name()).filter(|n| !shared(n)).collect()
        } else {
            continue;
        };
        let tests = file.source.test_lines();
        for (i, line) in file.source.no_comments.lines().enumerate().filter(|(i, _)| !tests[*i]) {
            let lower = line.to_ascii_lowercase();
            for name in forbidden.iter().filter(|n| has_word(&lower, n)) {
                problems.push(format!(
                    "{}:{}: names `{name}`; methods and models do not know each other",
                    file.path,
                    i + 1
                ));
            }
        }
    }
}

/// Each file in a site's folder is a method in the registry and the other way round.
fn registry(files: &[File], problems: &mut Vec<String>) {
    let slug = |path: &str| path.strip_prefix("crates/methods/src/").map(|p| p.trim_end_matches(".rs").to_owned());
    let on_disk: Vec<String> = files
        .iter()
        .filter_map(|f| slug(&f.path))
        .filter(|p| p.matches('/').count() == 1 && !p.ends_with("/mod"))
        .collect();
    let listed: Vec<String> = METHODS
        .iter()
        .map(|m| format!("{}/{}", format!("{:?}", m.site()).to_lowercase(), m.name().replace('-', "_")))
        .collect();
    for path in on_disk.iter().filter(|p| !listed.contains(p)) {
        problems.push(format!("crates/methods/src/{path}.rs: not in the registry (METHODS)"));
    }
    for path in listed.iter().filter(|p| !on_disk.contains(p)) {
        problems.push(format!("registry: lists a method whose file crates/methods/src/{path}.rs does not exist"));
    }
}

fn lock_file(root: &Path, problems: &mut Vec<String>) -> io::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let tree = ["tree", "--locked", "-p", "lacuna-cli", "--all-features", "-e", "normal,build", "--prefix", "none"];
    let output = Command::new(cargo).args(tree).current_dir(root).output()?;
    if !output.status.success() {
        problems.push(format!("cargo tree: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    let lines = String::from_utf8_lossy(&output.stdout);
    let packages: BTreeSet<&str> = lines.lines().map(|l| l.trim_end_matches(" (*)")).collect();
    if packages.len() > PACKAGES {
        problems.push(format!("lacuna-cli: built from {} packages, at most {PACKAGES}", packages.len()));
    }
    let lock = fs::read_to_string(root.join("Cargo.lock"))?;
    for line in
        lock.lines().filter(|l| l.starts_with("source = ") && !l.contains("github.com/rust-lang/crates.io-index"))
    {
        problems.push(format!("Cargo.lock: {line}: only crates.io is a source"));
    }
    Ok(())
}

fn pages(root: &Path, problems: &mut Vec<String>) {
    for name in ROOT_FILES {
        if !root.join(name).is_file() {
            problems.push(format!("{name}: missing"));
        }
    }
    for (path, text) in docs::pages() {
        let stored = fs::read_to_string(root.join(path)).unwrap_or_default();
        if stored.replace("\r\n", "\n") != text {
            problems.push(format!("{path}: not up to date; run `cargo xtask docs`"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::source::Source, *};

    fn found(path: &str, text: &str, rule: fn(&[File], &mut Vec<String>)) -> Vec<String> {
        let mut out = Vec::new();
        rule(&[File { path: path.to_owned(), source: Source::new(text) }], &mut out);
        out
    }

    #[test]
    fn methods_and_models_stay_apart() {
        let shared = |n: &str| SHARED_NAMES.iter().any(|(s, _)| *s == n);
        let method = METHODS.iter().map(|m| m.name()).find(|n| !shared(n)).expect("there is a method of its own name");
        let model = "crates/lacuna/src/model/any.rs";
        assert_eq!(found(model, &format!("let x = \"{method}\";\n"), names).len(), 1);
        assert_eq!(found(model, &format!("// as {method} does\nlet x = Act::Relu;\n"), names).len(), 0);
        assert_eq!(found("crates/methods/src/kv/any.rs", "if arch == \"llama\" {}\n", names).len(), 1);
    }

    #[test]
    fn a_method_outside_the_registry_is_found() {
        let out = found("crates/methods/src/kv/forgotten.rs", "", registry);
        assert!(out.iter().any(|p| p.contains("kv/forgotten.rs: not in the registry")), "{out:?}");
        assert_eq!(out.len(), 1 + METHODS.len());
    }
}
