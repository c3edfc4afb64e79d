//! Rules that look at one file at a time.

use super::File;

/// Lines of a file, tests included.
const FILE_LINES: usize = 800;
/// Lines of a method's file without its tests.
const METHOD_LINES: usize = 250;
/// Lines of a function.
const FUNCTION_LINES: usize = 80;
/// Lines of a function in the kernels, whose inner bodies are unrolled by hand.
const KERNEL_FUNCTION_LINES: usize = 150;
/// Parameters; more become a struct.
const PARAMS: usize = 7;
/// In the kernels the inner form of a function takes the instruction set beside the parameters of the public one.
const KERNEL_PARAMS: usize = 8;

/// Files that may be longer than [`FILE_LINES`], and why.
const LONG_FILES: &[(&str, &str)] = &[];

/// `path:function` that may be longer or take more parameters, and why.
const LONG_FUNCTIONS: &[(&str, &str)] = &[];

/// Files outside the kernels that may contain `unsafe`.
const UNSAFE_FILES: &[(&str, &str)] = &[("crates/core/src/map.rs", "the one wrapper of a memory map")];

/// Appends what `file` breaks.
pub fn check(file: &File, problems: &mut Vec<String>) {
    sizes(file, problems);
    functions(file, problems);
    unsafety(file, problems);
    unwraps(file, problems);
    marks(file, problems);
}

/// Exceptions whose file or function is gone must go too.
pub fn stale_exceptions(files: &[File], problems: &mut Vec<String>) {
    let has = |path: &str| files.iter().any(|f| f.path == path);
    for (path, _) in LONG_FILES {
        if !has(path) {
            problems.push(format!("tidy: LONG_FILES lists {path}, which does not exist"));
        }
    }
    for (entry, _) in LONG_FUNCTIONS {
        let (path, name) = entry.split_once(':').unwrap_or((entry, ""));
        let known = files.iter().any(|f| f.path == path && f.source.functions().iter().any(|g| g.name == name));
        if !known {
            problems.push(format!("tidy: LONG_FUNCTIONS lists {entry}, which does not exist"));
        }
    }
}

fn listed(list: &[(&str, &str)], key: &str) -> bool {
    list.iter().any(|(k, _)| *k == key)
}

fn is_test_file(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    path.contains("/tests/") || path.contains("/benches/") || name.ends_with("tests.rs") || name == "testing.rs"
}

fn sizes(file: &File, problems: &mut Vec<String>) {
    let lines = file.source.text.lines().count();
    if lines > FILE_LINES && !listed(LONG_FILES, &file.path) {
        problems.push(format!("{}: {lines} lines, at most {FILE_LINES}; split it by subject", file.path));
    }
    let is_method = file.path.starts_with("crates/methods/src/") && file.path.matches('/').count() == 4;
    if is_method {
        let own = lines - file.source.test_lines().iter().filter(|t| **t).count();
        if own > METHOD_LINES {
            problems.push(format!("{}: {own} lines without tests, a method has at most {METHOD_LINES}", file.path));
        }
    }
}

fn functions(file: &File, problems: &mut Vec<String>) {
    let kernels = file.path.starts_with("crates/kernels/");
    let (limit, most) = if kernels { (KERNEL_FUNCTION_LINES, KERNEL_PARAMS) } else { (FUNCTION_LINES, PARAMS) };
    for f in file.source.functions() {
        let at = format!("{}:{}", file.path, f.line);
        if listed(LONG_FUNCTIONS, &format!("{}:{}", file.path, f.name)) {
            continue;
        }
        if f.lines > limit {
            problems.push(format!("{at}: fn {} has {} lines, at most {limit}", f.name, f.lines));
        }
        if f.params > most && !file.path.contains("/benches/") {
            problems.push(format!("{at}: fn {} has {} parameters, at most {most}; make a struct", f.name, f.params));
        }
    }
}

fn unsafety(file: &File, problems: &mut Vec<String>) {
    let kernels = file.path.starts_with("crates/kernels/");
    for (i, line) in file.source.code.lines().enumerate() {
        let at = format!("{}:{}", file.path, i + 1);
        if !has_word(line, "unsafe") {
            continue;
        }
        if !kernels && !listed(UNSAFE_FILES, &file.path) {
            problems.push(format!("{at}: `unsafe` lives in crates/kernels and crates/core/src/map.rs alone"));
        } else if is_unsafe_block(line) && !explained(&file.source.text, i) {
            problems.push(format!("{at}: an unsafe block needs a `// SAFETY:` comment directly above it"));
        }
    }
}

fn is_unsafe_block(line: &str) -> bool {
    line.contains("unsafe {") || line.contains("unsafe impl")
}

/// Whether a SAFETY comment stands on line `i`, or among the comments and open statements up to eight lines above, or one
/// for several blocks (`SAFETY (all four): ...`) up to fifteen lines above.
fn explained(text: &str, i: usize) -> bool {
    let lines: Vec<_> = text.lines().collect();
    let own_block_above = |l: &&&str| !l.trim_end().ends_with(';') || l.contains("SAFETY");
    lines[i].contains("SAFETY:")
        || lines[i.saturating_sub(15)..i].iter().any(|l| l.contains("SAFETY (all"))
        || lines[i.saturating_sub(8)..i].iter().rev().take_while(own_block_above).any(|l| l.contains("SAFETY:"))
}

fn unwraps(file: &File, problems: &mut Vec<String>) {
    if is_test_file(&file.path) {
        return;
    }
    let tests = file.source.test_lines();
    let lines = file.source.code.lines().zip(file.source.no_comments.lines()).enumerate();
    for (i, (code, with_text)) in lines.filter(|(i, _)| !tests[*i]) {
        let at = format!("{}:{}", file.path, i + 1);
        if code.contains(".unwrap()") || code.contains(".unwrap_err()") {
            problems.push(format!("{at}: unwrap outside tests; return an error, or `expect` with a proof"));
        }
        for macro_name in ["todo!", "unimplemented!", "dbg!"] {
            if code.contains(macro_name) {
                problems.push(format!("{at}: {macro_name} outside tests"));
            }
        }
        if let Some((_, rest)) = with_text.split_once(".expect(\"") {
            let message = rest.split('"').next().unwrap_or_default();
            if message.split_whitespace().count() < 3 {
                problems.push(format!("{at}: `expect` must say why it cannot fail, in a sentence"));
            }
        }
    }
}

/// Words that mark unfinished work, and paths of one machine. Spelt in halves, so that this file passes.
fn marks(file: &File, problems: &mut Vec<String>) {
    let unfinished = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let paths = [concat!("/wo", "rk/"), concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/")];
    for (i, line) in file.source.text.lines().enumerate() {
        let at = format!("{}:{}", file.path, i + 1);
        if unfinished.iter().any(|w| has_word(line, w)) {
            problems.push(format!("{at}: unfinished work belongs in an issue"));
        }
        if paths.iter().any(|p| line.contains(p)) {
            problems.push(format!("{at}: a path of one machine"));
        }
    }
}

/// Whether `word` occurs in `line` with no letter, digit or `_` beside it.
pub fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(i, _)| {
        !line[..i].chars().next_back().is_some_and(part) && !line[i + word.len()..].chars().next().is_some_and(part)
    })
}

#[cfg(test)]
mod tests {
    use super::{super::source::Source, *};

    fn problems(path: &str, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        check(&File { path: path.to_owned(), source: Source::new(text) }, &mut out);
        out
    }

    #[test]
    fn each_rule_finds_its_offence() {
        let long = format!("fn f() {{\n{}}}\n", "    g();\n".repeat(81));
        let many = "fn f(a: u8, b: u8, c: u8, d: u8, e: u8, f: u8, g: u8, h: u8) {}\n";
        for (path, text, part) in [
            ("crates/core/src/a.rs", "fn f() { unsafe { g() } }\n", "lives in crates/kernels"),
            ("crates/kernels/src/a.rs", "fn f() { unsafe { g() } }\n", "SAFETY"),
            ("crates/core/src/a.rs", "fn f() { g().unwrap(); }\n", "unwrap"),
            ("crates/core/src/a.rs", "fn f() { g().expect(\"no\"); }\n", "must say why"),
            ("crates/core/src/a.rs", concat!("// TO", "DO later\n"), "unfinished"),
            ("crates/core/src/a.rs", concat!("const A: &str = \"/ho", "me/me\";\n"), "one machine"),
            ("crates/core/src/a.rs", &long, "83 lines"),
            ("crates/core/src/a.rs", many, "8 parameters"),
            ("crates/core/src/a.rs", &"\n".repeat(801), "801 lines"),
            ("crates/methods/src/kv/a.rs", &"\n".repeat(251), "a method has at most"),
        ] {
            let found = problems(path, text);
            assert!(found.len() == 1 && found[0].contains(part), "{part}: {found:?}");
        }
    }

    #[test]
    fn good_code_passes() {
        let good = "// SAFETY: the caller checked the length.\nlet x = unsafe { g() };\n\
                    let y = z.expect(\"checked when it was made\");\n#[cfg(test)]\nmod tests {\nfn f() { x.unwrap(); }\n}\n";
        assert_eq!(problems("crates/kernels/src/a.rs", good), Vec::<String>::new());
    }
}
