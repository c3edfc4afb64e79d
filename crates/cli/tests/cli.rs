//! The program as users meet it: output, messages, exit codes.

use lacuna::chat::{ChatTemplate, Message, Worker};
use serde_json::Value;
use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::Arc,
};

/// Runs `lacuna` with an empty cache and none of the user's variables.
fn lacuna(args: &[&str]) -> Output {
    command(args).output().expect("the program starts")
}

fn command(args: &[&str]) -> Command {
    let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("LACUNA_")) {
        command.env_remove(name);
    }
    command.args(args).env("HF_HUB_CACHE", cache.join("hub")).env("LACUNA_CACHE", cache.join("lacuna"));
    command.stdin(Stdio::null());
    command
}

fn stdout(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Asserts exit code 2 and one line on stderr that contains `parts`, without a backtrace.
fn assert_error(out: &Output, parts: &[&str]) {
    let text = stderr(out);
    assert_eq!(out.status.code(), Some(2), "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    assert!(!text.contains("panicked") && !text.contains("backtrace"), "{text}");
}

fn shared(path: &str) -> Option<String> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    if path.exists() {
        return Some(path.display().to_string());
    }
    println!("skipped: not present: {}", path.display());
    None
}

#[test]
fn methods_come_from_the_registry() {
    let all = lacuna(&["methods", "--json"]);
    let list: Value = serde_json::from_slice(&all.stdout).expect("JSON");
    let names: Vec<_> = list.as_array().expect("a list").iter().map(|m| m["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"relu") && names.contains(&"teal"), "{names:?}");
    let listing = stdout(&lacuna(&["methods"]));
    for method in list.as_array().expect("a list") {
        let name = method["name"].as_str().unwrap();
        let sheet = lacuna(&["methods", name]);
        assert!(stdout(&sheet).starts_with(name) && sheet.status.success());
        let flag = match method["site"].as_str() {
            Some("decoding") => "--draft",
            Some("weights") => "compress --method",
            _ => "--sparse",
        };
        assert!(listing.contains(&format!("{flag} {name}")), "{listing}");
    }
    assert_error(&lacuna(&["methods", "teel"]), &["teel", "did you mean `teal`"]);
}

#[test]
fn bad_flags_are_errors() {
    for args in [
        &["run", "--temp", "hot"][..],
        &["run", "--no-such-flag"],
        &["no-such-verb"],
        &["run", "--memory", "many"],
        &["run", "--load-mode", "maybe"],
        &["run", "-p", "a", "-f", "b"],
        &["run", "--sparse", "relu", "--plan", "p.json"],
        &["bench", "-o", "xml"],
        &["eval", "ppl"],
        &["inspect"],
    ] {
        let out = lacuna(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {}", stderr(&out));
        assert!(!stderr(&out).is_empty() && stdout(&out).is_empty());
    }
    assert_error(&lacuna(&["run", "-m", "x", "--top-p", "1.5"]), &["top_p", "1.5"]);
    assert_error(&lacuna(&["bench", "-p", "0", "-n", "0"]), &["nothing to measure"]);
}

#[test]
fn hostile_names_never_reach_the_file_system() {
    for name in ["a/../b", "..\\x", "org/name:../../etc/passwd", "con", "a/b/c/d", "$(id)", "a\u{202e}b", "-", "a b"] {
        for verb in [&["run", "-m", name][..], &["inspect", "--", name], &["bench", "-m", name]] {
            assert_error(&lacuna(verb), &["is not a model name"]);
        }
    }
}

#[test]
fn what_is_missing_is_named_with_a_remedy() {
    assert_error(&lacuna(&["run", "./no-such.gguf"]), &["no-such.gguf"]);
    assert_error(&lacuna(&["run", "org/absent"]), &["models--org--absent", "lacuna pull org/absent"]);
    assert_error(&lacuna(&["eval", "ppl", "-m", "org/absent", "-f", "x"]), &["org/absent"]);
}

#[test]
fn files_of_noise_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let noise: Vec<u8> = (0..10_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let gguf = dir.path().join("noise.gguf");
    fs::write(&gguf, &noise).expect("written");
    let name = gguf.to_str().expect("UTF-8");
    for args in [&["run", name, "-p", "x"][..], &["inspect", name], &["bench", "-m", name], &["chat", name]] {
        assert_error(&lacuna(args), &["noise.gguf"]);
    }
    fs::write(dir.path().join("config.json"), &noise).expect("written");
    fs::write(dir.path().join("model.safetensors"), &noise).expect("written");
    assert_error(&lacuna(&["run", dir.path().to_str().expect("UTF-8"), "-p", "x"]), &["config.json"]);
}

#[test]
fn an_unknown_instruction_set_is_refused_with_the_choices() {
    let out = command(&["methods"]).env("LACUNA_ISA", "sse9").output().expect("the program starts");
    assert_error(&out, &["sse9", "scalar"]);
}

#[test]
fn doctor_speaks_json() {
    let out = lacuna(&["doctor", "--json", "--no-probe"]);
    let facts: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert!(facts["threads"].as_u64().expect("a number") >= 1);
    assert!(facts["isa_available"].as_array().expect("a list").contains(&facts["isa"]));
}

#[test]
fn greedy_text_of_the_260k_model() {
    let golden = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, \
                  she saw a big, red ball.";
    for path in ["models/stories260K/hf-f32", "models/stories260K/gguf/stories260K-f32.gguf"] {
        let Some(model) = shared(path) else { return };
        for threads in ["1", "2"] {
            let out = lacuna(&[
                "run",
                &model,
                "-p",
                "Once upon a time",
                "-n",
                "80",
                "--temp",
                "0",
                "-t",
                threads,
                "--kv",
                "f32",
            ]);
            assert!(out.status.success(), "{}", stderr(&out));
            assert!(stdout(&out).starts_with(golden), "{path}: {}", stdout(&out));
            assert!(stderr(&out).contains("t/s"), "{}", stderr(&out));
        }
    }
}

#[test]
fn flags_win_over_the_environment_and_stops_end_the_text() {
    let Some(model) = shared("models/stories260K/hf-f32") else { return };
    let run = |args: &[&str]| {
        let mut all = vec!["run", model.as_str(), "-p", "Once upon a time"];
        all.extend(args);
        let out =
            command(&all).env("LACUNA_PREDICT", "3").env("LACUNA_TEMP", "0").output().expect("the program starts");
        assert!(out.status.success(), "{}", stderr(&out));
        stdout(&out)
    };
    assert_eq!(run(&[]).trim_end(), "Once upon a time, there was");
    assert!(run(&["-n", "40"]).contains("named Lily"));
    assert_eq!(run(&["-n", "40", "--stop", "Lily"]).trim_end(), "Once upon a time, there was a little girl named");
}

#[test]
fn limits_refuse_before_work() {
    let Some(model) = shared("models/stories260K/hf-f32") else { return };
    assert_error(&lacuna(&["run", &model, "-p", "x", "--memory", "100K"]), &["--memory", "weights", "allowed"]);
    assert_error(&lacuna(&["run", &model, "-p", &"many words ".repeat(2000)]), &["context", "512"]);
    let long = lacuna(&["run", &model, "-p", "Once", "-n", "1", "-c", "9999"]);
    assert!(long.status.success() && stderr(&long).contains("9999"), "{}", stderr(&long));
}

#[test]
fn bench_rows_parse() {
    let Some(model) = shared("models/stories260K/gguf/stories260K-q8_0.gguf") else { return };
    let args = ["bench", "-m", &model, "-p", "8", "-n", "4", "-d", "0,16", "-r", "2", "-t", "1", "--no-probe"];
    let with = |form: &str| {
        let out = lacuna(&[&args[..], &["-o", form]].concat());
        assert!(out.status.success(), "{}", stderr(&out));
        stdout(&out)
    };
    let rows: Value = serde_json::from_str(&with("json")).expect("JSON");
    let tests: Vec<_> = rows.as_array().expect("rows").iter().map(|r| r["test"].as_str().expect("a name")).collect();
    assert_eq!(tests, ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"]);
    assert_eq!(rows[0]["samples_ts"].as_array().expect("samples").len(), 2);
    assert!(rows[1]["bytes_per_token"].as_f64().expect("bytes") > 100_000.0);
    assert_eq!(rows[0]["model_n_params"], 260_032);
    let rows: Vec<Value> = with("jsonl").lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(rows.len(), 4);
    assert_eq!(with("csv").lines().count(), 5);
    assert_eq!(with("md").lines().count(), 6);
}

#[test]
fn inspect_counts_tensors_and_memory() {
    let Some(model) = shared("models/stories260K/gguf/stories260K-q4_0.gguf") else { return };
    let out = lacuna(&["inspect", &model, "--json"]);
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(report["architecture"], "llama");
    assert_eq!(report["parameters"], 260_032);
    assert_eq!(report["problem"], Value::Null);
    assert!(report["bytes_per_type"]["Q4_0"].as_u64().expect("bytes") > 0);
    assert!(report["memory"][0]["total"].as_u64() > report["memory"][0]["weights"].as_u64());
    assert!(stdout(&lacuna(&["inspect", &model])).contains("token_embd.weight"));
}

#[test]
fn skipping_closed_neurons_changes_nothing_and_reads_less() {
    let Some(model) = shared("models/lacuna-stories-relu") else { return };
    let run = |sparse: &[&str]| {
        let mut args = vec!["run", model.as_str(), "-p", "Once upon a time", "-n", "40", "--temp", "0"];
        args.extend(sparse);
        let out = lacuna(&args);
        assert!(out.status.success(), "{}", stderr(&out));
        (stdout(&out), stderr(&out))
    };
    let (dense, sparse) = (run(&[]), run(&["--sparse", "relu"]));
    assert_eq!(dense.0, sparse.0);
    assert!(sparse.1.contains("kept mlp neurons"), "{}", sparse.1);
    assert!(!dense.1.contains("kept"), "{}", dense.1);
}

#[test]
fn thresholds_need_a_calibration_that_is_found_again() {
    let (Some(model), Some(text)) = (shared("models/lacuna-stories"), shared("data/tinystories-sample/stories.txt"))
    else {
        return;
    };
    let dir = tempfile::tempdir().expect("a folder");
    let cache = |args: &[&str]| {
        command(args).env("LACUNA_CACHE", dir.path().join("cache")).output().expect("the program starts")
    };
    let plan = dir.path().join("plan.json");
    let plan = plan.to_str().expect("UTF-8");
    assert_error(
        &cache(&["run", &model, "-p", "x", "--sparse", "teal=0.4"]),
        &["needs a calibration", "lacuna calibrate"],
    );
    let out = cache(&["calibrate", &model, "--sparse", "teal=0.4", "-f", &text, "-n", "2048", "-o", plan]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert!(stdout(&out).contains("mlp.down"), "{}", stdout(&out));
    let short = dir.path().join("short.txt");
    let all = fs::read_to_string(&text).expect("text");
    fs::write(&short, all.chars().take(6000).collect::<String>()).expect("written");
    let short = short.to_str().expect("UTF-8");
    let out =
        cache(&["eval", "kld", "-m", &model, "-f", short, "--plan", plan, "-c", "128", "--chunks", "2", "--json"]);
    assert!(out.status.success(), "{}", stderr(&out));
    let result: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert!(result["kld_mean"].as_f64().expect("KL") > 0.0);
    assert!(result["same_top"].as_f64().expect("share") > 0.5);
    assert_error(
        &cache(&["run", &shared("models/lacuna-stories-relu").expect("beside it"), "-p", "x", "--plan", plan]),
        &["another model"],
    );
}

/// A comparison of three plans on the embedded model over three short stories, with `more` flags.
fn compare(dir: &std::path::Path, more: &[&str]) -> Output {
    let text = dir.join("text.txt");
    if !text.exists() {
        fs::write(&text, include_str!("../src/verbs/demo.txt")).expect("written");
    }
    let text = text.to_str().expect("UTF-8");
    let base =
        ["compare", "-f", text, "--documents", "---", "--tokens", "60", "--task-items", "9", "-t", "1", "--no-probe"];
    let plans = ["--sparse", "relu", "--sweep", "teal=0.3..0.6:2", "-n", "4", "-r", "2"];
    command(&[&base[..], &plans, more].concat()).output().expect("the program starts")
}

#[test]
fn plans_are_compared_in_every_form_and_known_points_are_kept() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let [html, json, csv, md] = ["r.html", "r.json", "r.csv", "r.md"].map(path);
    let out = compare(dir.path(), &["-o", &html, "-o", &json, "-o", &csv, "-o", &md]);
    assert!(out.status.success(), "{}", stderr(&out));
    assert!(stdout(&out).contains("| teal=0.6"), "{}", stdout(&out));
    let read = |name: &str| fs::read_to_string(name).expect("a report");
    let report: Value = serde_json::from_str(&read(&json)).expect("JSON");
    let points = report["points"].as_array().expect("points");
    let number = |p: &Value, path: &str| p.pointer(path).and_then(Value::as_f64).expect("a number");
    let labels: Vec<_> = points.iter().map(|p| p["family"].as_str().expect("a name")).collect();
    assert_eq!(labels, ["relu", "teal", "teal"]);
    assert!(number(&points[0], "/quality/kld/value") < 1e-6, "relu leaves nothing out that counts");
    assert!(report["task"].is_null() && report["notes"].to_string().contains("No task"), "{}", report["notes"]);
    assert!(number(&points[2], "/quality/kld/value") > number(&points[1], "/quality/kld/value"));
    let bytes = |p: &Value| number(p, "/cost/bytes_per_token");
    assert!(bytes(&points[2]) < bytes(&points[1]) && bytes(&points[0]) < bytes(&report["dense"]));
    assert_eq!(points[1].pointer("/speed/samples").and_then(Value::as_array).map(Vec::len), Some(2));
    assert!(number(&points[1], "/cost/copies_bytes") > 0.0);
    assert!(read(&html).starts_with("<!doctype html>") && read(&html).ends_with("</html>\n"));
    assert_eq!((read(&csv).lines().count(), read(&md).contains("## Notes")), (5, true));
    assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 5, "no partial file stays");

    let marked = read(&json).replacen("\"kld_p99\": 0.0", "\"kld_p99\": 123.5", 1);
    fs::write(&json, marked).expect("written");
    assert!(compare(dir.path(), &["-o", &json]).status.success());
    assert!(read(&json).contains("123.5"), "what a report holds is not measured again");
    assert!(compare(dir.path(), &["-o", &json, "--fresh"]).status.success());
    assert!(!read(&json).contains("123.5"));
    let again = lacuna(&["compare", "--from", &json, "-o", &html]);
    assert!(again.status.success() && stdout(&again).contains("teal=0.3"), "{}", stderr(&again));
}

#[test]
fn comparisons_refuse_what_they_cannot_do() {
    let dir = tempfile::tempdir().expect("a folder");
    assert_error(&compare(dir.path(), &["-o", "report.pdf"]), &["report.pdf", ".html, .svg, .json, .csv or .md"]);
    assert_error(&compare(dir.path(), &["--sweep", "teel=0.1..0.5"]), &["teel", "did you mean `teal`"]);
    assert_error(&compare(dir.path(), &["--sweep", "teal=0.5..0.1"]), &["downwards"]);
    assert_error(&compare(dir.path(), &["--plans", "no-such-plan.json"]), &["no-such-plan.json"]);
    assert_error(&compare(dir.path(), &["--task", "no-such-task.jsonl"]), &["no-such-task.jsonl"]);
    assert_error(&lacuna(&["compare", "-f", "x.txt"]), &["nothing to compare", "--sweep"]);
    let damaged = dir.path().join("d.json");
    fs::write(&damaged, "{\"version\": 1").expect("written");
    assert_error(&lacuna(&["compare", "--from", damaged.to_str().expect("UTF-8")]), &["d.json", "not a report"]);
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child =
        command(&["methods", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    drop(child.stdout.take());
    let out = child.wait_with_output().expect("ends");
    assert_eq!(stderr(&out), "");
    assert!(out.status.success());
}

/// A conversation through a pipe: commands, another answer to the same question, a full context.
#[test]
fn chat_follows_its_commands() {
    let lines = "/regen\n/nothing\nHello\n/regen\n/system Be brief.\none\\\ntwo\n/clear\n/help\n/quit\n";
    let mut child = command(&["chat", "-c", "200", "-n", "5", "-s", "1", "-t", "1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    child.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("written");
    let out = child.wait_with_output().expect("it ends");
    let text = stderr(&out);
    assert!(out.status.success(), "{text}");
    for part in ["there is no question yet", "no command `/nothing`", "(-n reached)", "/regen          answer"] {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    assert_eq!(text.matches("(-n reached)").count(), 3, "Hello twice and one question of two lines: {text}");
}

/// Templates that double strings, while they are compiled or while they run, end their worker; the next request has a new one.
#[test]
fn hostile_templates_end_their_worker_and_nothing_else() {
    let worker = Arc::new(Worker::new(env!("CARGO_BIN_EXE_lacuna"), ["render-templates"]));
    let render = |text: &str| {
        let template = ChatTemplate::new(text, "<s>".into(), "</s>".into(), "x.json", Some(worker.clone()))?;
        template.render(&[Message::new("user", "Hi")], true)
    };
    let doubled =
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    let constants = "{{ 'a' * 90000000 }}".repeat(100);
    let endless = "{% set s = 'a' * 90000000 %}{% for i in range(90000) %}{% if s ~ i == s %}x{% endif %}{% endfor %}";
    for text in [doubled, &constants, endless] {
        if cfg!(target_os = "linux") {
            let message = render(text).expect_err("no memory for it").to_string();
            assert!(message.starts_with("x.json") && message.contains("512 MiB"), "{message}");
        }
        assert_eq!(render("{{ bos_token }}{{ messages[0].content }}").expect("it renders"), "<s>Hi");
    }
}
