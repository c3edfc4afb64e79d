//! `lacuna compress` killed at random moments: the output's place holds what was there before or the whole new output, and a
//! further run ends with the bytes of one that was never disturbed. `LACUNA_KILLS` sets how many times (default 12).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const STORIES: &str = "Once upon a time there was a little fox who lived in the wood. She had a red ball, and every day she ran \
                       after it until the sun went down behind the hills and her mother called her home for soup. ";

fn command(dir: &Path, output: &Path, method: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("LACUNA_")) {
        command.env_remove(name);
    }
    command.arg("compress").arg(dir.join("model")).args(["--method", method, "--sparsity", "0.5", "-t", "1"]);
    command.arg("-f").arg(dir.join("text.txt")).arg("-o").arg(output);
    command.env("LACUNA_CACHE", dir.join("cache")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = fs::read_dir(dir).expect("a folder").map(|e| e.expect("an entry").path());
    files.map(|p| (p.file_name().unwrap_or_default().into(), fs::read(&p).expect("readable"))).collect()
}

#[test]
fn a_run_killed_anywhere_leaves_the_old_output_or_the_new_one() {
    let embedded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lacuna/assets/embedded");
    let dir = tempfile::tempdir().expect("a folder");
    fs::create_dir(dir.path().join("model")).expect("made");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(embedded.join(name), dir.path().join("model").join(name)).expect("copied");
    }
    fs::write(dir.path().join("text.txt"), STORIES.repeat(60)).expect("written");
    let done = |output: &Path, method: &str| {
        assert!(command(dir.path(), output, method).status().expect("it starts").success(), "{method}");
    };
    let (whole, old, out) = (dir.path().join("whole"), dir.path().join("old"), dir.path().join("out"));
    done(&old, "magnitude");
    let start = Instant::now();
    done(&whole, "sparsegpt");
    let time = start.elapsed();
    let (old, new) = (tree(&old), tree(&whole));
    assert_ne!(old, new);
    let kills: u32 = std::env::var("LACUNA_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let (mut seed, mut before) = (0x9e37_79b9_u64, 0);
    for kill in 0..kills {
        let _ = fs::remove_dir_all(&out);
        if kill % 2 == 0 {
            done(&out, "magnitude");
        }
        // Killed again and again, each time somewhere within the time of a whole run.
        loop {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mut run = command(dir.path(), &out, "sparsegpt").spawn().expect("it starts");
            std::thread::sleep(
                time.mul_f64((seed >> 33) as f64 / f64::from(1_u32 << 31)).max(Duration::from_millis(5)),
            );
            run.kill().expect("killed");
            run.wait().expect("ended");
            let now = out.is_dir().then(|| tree(&out));
            if now.as_ref() == Some(&new) {
                break;
            }
            assert_eq!(now, (kill % 2 == 0).then(|| old.clone()), "neither the old output nor the new one");
            before += 1;
            if before % 3 == 0 {
                break;
            }
        }
        done(&out, "sparsegpt");
        assert_eq!(tree(&out), new, "kill {kill}");
        let left = fs::read_dir(dir.path()).expect("a folder").map(|e| e.expect("an entry").file_name());
        let left: Vec<_> = left.filter(|n| n.to_string_lossy().starts_with('.')).collect();
        assert!(left.is_empty(), "{left:?} is left");
    }
    assert!(before > 0, "no kill came before the end");
}
