//! The rules of the house that the compiler cannot hold: sizes, walls between crates, no `unwrap` on data, generated
//! pages up to date. `cargo xtask tidy` and the test `tidy` of this crate run all of them. The reasons stand in
//! ARCHITECTURE.md; exceptions stand in [`rules`], each with its own reason.

pub mod rules;
pub mod source;
pub mod walls;

use source::Source;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// One source file with its path relative to the root, `/` between components.
pub struct File {
    /// Relative path.
    pub path: String,
    /// Contents.
    pub source: Source,
}

/// Everything that breaks a rule, one line each; empty if the tree is tidy.
///
/// # Errors
/// If a file cannot be read.
pub fn check(root: &Path) -> io::Result<Vec<String>> {
    let files = rust_files(root)?;
    let mut problems = Vec::new();
    for file in &files {
        rules::check(file, &mut problems);
    }
    rules::stale_exceptions(&files, &mut problems);
    walls::check(root, &files, &mut problems)?;
    Ok(problems)
}

/// All Rust sources of the workspace, sorted.
fn rust_files(root: &Path) -> io::Result<Vec<File>> {
    let mut paths = Vec::new();
    for top in ["crates", "xtask", "fuzz", "examples"] {
        collect(&root.join(top), &mut paths)?;
    }
    paths.sort();
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path)?;
        let relative = path.strip_prefix(root).unwrap_or(&path);
        let path = relative.to_string_lossy().replace('\\', "/");
        Ok(File { path, source: Source::new(&text) })
    };
    paths.into_iter().map(read).collect()
}

fn collect(dir: &Path, paths: &mut Vec<PathBuf>) -> io::Result<()> {
    if !dir.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() && path.file_name().is_none_or(|n| n != "target") {
            collect(&path, paths)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            paths.push(path);
        }
    }
    Ok(())
}
