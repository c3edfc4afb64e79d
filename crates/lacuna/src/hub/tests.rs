use super::*;

/// Names that must never reach the file system.
const HOSTILE: [&str; 56] = [
    "",
    ".",
    "..",
    "/",
    "//",
    "a/",
    "/a",
    "../a",
    "a/..",
    "a/.",
    "./a/b",
    "a/../b",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b/c",
    "a//b",
    "a\\b",
    "..\\..\\windows",
    "C:\\Windows\\win.ini",
    "C:/Windows",
    "\\\\host\\share",
    "con",
    "CON",
    "nul.txt",
    "org/aux",
    "org/com1",
    "LPT9.gguf",
    "org/prn.json",
    "a b",
    " a",
    "a ",
    "a\tb",
    "a\nb",
    "a\0b",
    "a\u{202e}b",
    "ünïcode/name",
    "名前/モデル",
    "a/b:",
    "a/b:../c",
    "a/b:/etc/passwd",
    "a/b:c/d",
    "a/b:c:d",
    ":q4_0",
    "-rf",
    "org/-rf",
    "org/name-",
    "org/name.",
    ".hidden/name",
    "a--b/c",
    "a/b..c",
    "$HOME/x",
    "~/model",
    "a/b;rm",
    "a/`id`",
    "%2e%2e/etc",
    "file:///etc/passwd",
];

#[test]
fn hostile_names_are_refused_before_any_path_is_made() {
    for name in HOSTILE {
        let e = Name::parse(name).expect_err(name);
        assert!(matches!(e, HubError::Name { .. }), "{name}: {e}");
        assert!(!e.to_string().contains(['\n', '\0']), "{e}");
    }
    assert!(Name::parse(&"a".repeat(97)).is_err());
    assert!(Name::parse(&format!("a/{}", "b".repeat(10_000_000))).unwrap_err().to_string().len() < 400);
}

#[test]
fn good_names_pass() {
    for (text, repo, part) in [
        ("gpt2", "gpt2", None),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", None),
        ("a/b:Q4_K_M", "a/b", Some("Q4_K_M")),
        ("a/b_c.d:b-q4_0.gguf", "a/b_c.d", Some("b-q4_0.gguf")),
        ("config/common", "config/common", None),
    ] {
        let name = Name::parse(text).unwrap();
        assert_eq!((name.repo.as_str(), name.part.as_deref()), (repo, part));
    }
    assert_eq!(Name::parse("a/b").unwrap().folder(), "models--a--b");
}

fn cache_with(files: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("models--org--name");
    let snapshot = model.join("snapshots/0123abcd");
    fs::create_dir_all(model.join("refs")).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(model.join("refs/main"), "0123abcd\n").unwrap();
    for f in files {
        fs::write(snapshot.join(f), "x").unwrap();
    }
    dir
}

fn find(dir: &tempfile::TempDir, name: &str) -> Result<PathBuf, HubError> {
    locate_in(dir.path(), &Name::parse(name).unwrap())
}

#[test]
fn a_snapshot_with_config_is_a_directory() {
    let dir = cache_with(&["config.json", "model.safetensors"]);
    assert!(find(&dir, "org/name").unwrap().ends_with("snapshots/0123abcd"));
}

#[test]
fn quantisations_pick_one_file() {
    let dir = cache_with(&["m-Q4_K_M.gguf", "m-Q4_0.gguf", "m-q8_0.gguf"]);
    assert!(find(&dir, "org/name:q4_0").unwrap().ends_with("m-Q4_0.gguf"));
    assert!(find(&dir, "org/name:Q8_0").unwrap().ends_with("m-q8_0.gguf"));
    assert!(find(&dir, "org/name:m-Q4_K_M.gguf").unwrap().ends_with("m-Q4_K_M.gguf"));
    let e = find(&dir, "org/name").unwrap_err().to_string();
    assert!(e.contains("several GGUF files") && e.contains("m-Q4_0.gguf"), "{e}");
    let e = find(&dir, "org/name:Q2_K").unwrap_err().to_string();
    assert!(e.contains("no file for `Q2_K`") && e.contains("m-q8_0.gguf"), "{e}");
}

#[test]
fn what_is_absent_says_where_and_how() {
    let dir = cache_with(&[]);
    let e = find(&dir, "org/other").unwrap_err().to_string();
    assert!(e.contains("models--org--other") && e.contains("lacuna pull org/other"), "{e}");
    let e = find(&dir, "org/name").unwrap_err().to_string();
    assert!(e.contains("neither config.json nor a .gguf file"), "{e}");
    let e = locate("./no/such/model").unwrap_err().to_string();
    assert!(e.contains("./no/such/model"), "{e}");
}

#[test]
fn a_damaged_reference_is_refused() {
    let dir = cache_with(&["config.json"]);
    for bad in ["", "../../..", "zz", &"a".repeat(65)] {
        fs::write(dir.path().join("models--org--name/refs/main"), bad).unwrap();
        assert!(matches!(find(&dir, "org/name"), Err(HubError::Contents { .. })), "{bad}");
    }
}

#[cfg(unix)]
#[test]
fn links_may_not_leave_the_cache() {
    let dir = cache_with(&["config.json"]);
    let snapshot = dir.path().join("models--org--name/snapshots/0123abcd");
    let outside = tempfile::NamedTempFile::new().unwrap();
    std::os::unix::fs::symlink(outside.path(), snapshot.join("model.safetensors")).unwrap();
    assert!(matches!(find(&dir, "org/name"), Err(HubError::Outside { .. })));
    let blob = dir.path().join("models--org--name/blob");
    fs::write(&blob, "x").unwrap();
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    std::os::unix::fs::symlink(&blob, snapshot.join("model.safetensors")).unwrap();
    assert!(find(&dir, "org/name").is_ok());
}
