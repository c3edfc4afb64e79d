//! `lacuna serve` as a process of its own: clients that leave, signals, and what it writes.
#![cfg(target_os = "linux")]

#[path = "../../server/tests/common/client.rs"]
#[allow(dead_code, reason = "the tests of the server use the rest")]
mod client;

use client::{Answer, Client, greedy};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpStream},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::{JoinHandle, sleep, spawn},
    time::{Duration, Instant},
};

/// The program at work.
struct Running {
    child: Child,
    client: Client,
    /// What it has written to stderr.
    said: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Running {
    /// Serves the embedded model at a free port.
    fn new(args: &[&str]) -> Self {
        Self::start(args, "warn")
    }

    /// The same with a level of the log.
    fn start(args: &[&str], log: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
        for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("LACUNA_")) {
            command.env_remove(name);
        }
        command
            .args(["serve", "--port", "0", "-t", "1"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .env("LACUNA_LOG", log);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
        let mut stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let (mut text, mut at) = (String::new(), None);
        while at.is_none() {
            let start = text.len();
            assert!(stderr.read_line(&mut text).expect("UTF-8") > 0, "it ended: {text}");
            at = text[start..].strip_prefix("listening at http://").and_then(|l| l.split('/').next()?.parse().ok());
        }
        let said = Arc::new(Mutex::new(text));
        let to = said.clone();
        let reader = spawn(move || {
            let mut line = String::new();
            while stderr.read_line(&mut line).is_ok_and(|n| n > 0) {
                to.lock().expect("no panic").push_str(&std::mem::take(&mut line));
            }
        });
        Self { child, client: Client { at: at.expect("it listens") }, said, reader: Some(reader) }
    }

    fn signal(&self) {
        let sent = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// The exit status, within `most`.
    fn ends(&mut self, most: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(start.elapsed() < most, "it has not ended: {}", self.said());
            sleep(Duration::from_millis(5));
        }
    }

    /// All that was written; waits for the rest where the program has ended.
    fn said(&self) -> String {
        self.said.lock().expect("no panic").clone()
    }

    /// Resident bytes, and open files.
    fn size(&self) -> (usize, usize) {
        let proc = format!("/proc/{}", self.child.id());
        let status = fs::read_to_string(format!("{proc}/status")).expect("it lives");
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("a size");
        let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
        (kib << 10, fs::read_dir(format!("{proc}/fd")).expect("it lives").count())
    }

    /// The value of a line of the metrics.
    fn metric(&self, name: &str) -> u64 {
        let text = self.client.get("/metrics").text();
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|v| v.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.reader.take().map(JoinHandle::join);
    }
}

/// A request that leaves at some moment.
fn leave(client: Client, i: u64) {
    let mut body = greedy(&"Once upon a time. ".repeat(1 + (i % 5) as usize * 12), 100 + i as usize % 50);
    body["stream"] = json!(i.is_multiple_of(2));
    body["ignore_eos"] = json!(true);
    body["n"] = json!(1 + i % 3);
    if i.is_multiple_of(7) {
        body["response_format"] = json!({ "type": "json_object" });
    }
    let mut socket = client.open("POST", "/v1/completions", body.to_string().as_bytes());
    sleep(Duration::from_millis(i * 7 % 23));
    if i.is_multiple_of(4) {
        let _ = socket.read(&mut [0; 200]);
    }
    let _ = socket.shutdown(Shutdown::Both);
}

/// Rows 14 and 35: thousands of clients leave at random times; nothing of theirs stays.
#[test]
fn thousands_of_clients_that_leave_cost_nothing() {
    let server = Running::new(&["--prefix-cache", "0", "-c", "512"]);
    let quiet = || {
        let start = Instant::now();
        while server.metric("lacuna_requests_running") + server.metric("lacuna_requests_waiting") > 0
            || server.metric("lacuna_kv_blocks_used") > 0
        {
            assert!(start.elapsed() < Duration::from_secs(20), "{}", server.client.get("/metrics").text());
            sleep(Duration::from_millis(5));
        }
        server.size()
    };
    let round = |from: u64, to: u64| {
        let client = server.client;
        let threads = (0..8).map(|t| spawn(move || (from + t..to).step_by(8).for_each(|i| leave(client, i))));
        threads.collect::<Vec<_>>().into_iter().for_each(|t| t.join().expect("no panic"));
        quiet()
    };
    // Buffers, free blocks and what the allocator keeps grow to what the busiest moment needs.
    let (memory, files) = round(0, 1000);
    let (later, still) = round(1000, 2500);
    assert!(server.metric("lacuna_requests_cancelled_total") > 100);
    assert_eq!(server.metric("lacuna_panics_total"), 0);
    assert!(later as f64 <= memory as f64 * 1.05 + (1 << 20) as f64, "{memory} bytes became {later}");
    assert!(still <= files + 2, "{files} open files became {still}");
    assert_eq!(server.client.ok("/v1/completions", &greedy("Once", 5))["usage"]["completion_tokens"], 5);
}

/// Twenty streams that last, and proof that each has begun.
fn streams(server: &Running) -> Vec<TcpStream> {
    let mut body = greedy("Once upon a time", 480);
    body["stream"] = json!(true);
    body["ignore_eos"] = json!(true);
    let open = |_| {
        let mut socket = server.client.open("POST", "/v1/completions", body.to_string().as_bytes());
        socket.read_exact(&mut [0; 12]).expect("a status line");
        socket
    };
    (0..20).map(open).collect()
}

/// The rest of a stream whose status line was read.
fn rest(mut socket: TcpStream) -> String {
    let mut text = String::new();
    socket.read_to_string(&mut text).expect("UTF-8, and an end");
    text
}

/// Row 22: during twenty streams. Each ends whole or with an error event; the exit code is 0.
#[test]
fn a_signal_lets_streams_end() {
    for (drain, whole) in [("30", 20), ("0.2", 0)] {
        let mut server = Running::new(&["--parallel", "20", "--drain", drain]);
        let open = streams(&server);
        server.signal();
        sleep(Duration::from_millis(50));
        let refused = server.client.get("/health");
        assert_eq!(refused.status, 503, "no new work: {}", refused.text());
        let texts: Vec<String> = open.into_iter().map(rest).collect();
        let good = texts.iter().filter(|t| t.contains("\"finish_reason\":\"length\"")).count();
        let cut = texts.iter().filter(|t| t.contains("\"code\":\"shutdown\"")).count();
        assert!(texts.iter().all(|t| t.contains("data: [DONE]")), "every stream ends as clients know it");
        assert!(good + cut == 20 && good >= whole, "drain {drain}: {good} whole, {cut} cut");
        assert!(drain == "30" || cut > 0, "a fifth of a second is too short for all");
        assert_eq!(server.ends(Duration::from_secs(10)).code(), Some(0), "{}", server.said());
    }
}

/// Row 22: the second signal does not wait.
#[test]
fn the_second_signal_ends_at_once() {
    let mut server = Running::new(&["--parallel", "20"]);
    let _open = streams(&server);
    server.signal();
    sleep(Duration::from_millis(100));
    assert!(server.child.try_wait().expect("a child").is_none(), "the first waits for the streams");
    server.signal();
    assert_eq!(server.ends(Duration::from_secs(1)).code(), Some(130));
}

/// Row 27: at every level nothing of a prompt, an answer or a key is written, and nothing of them is in the metrics.
#[test]
fn no_text_is_written() {
    const MARKER: &str = "zebramarker";
    let keys = tempfile::NamedTempFile::new().expect("a file");
    fs::write(keys.path(), format!("key-{MARKER}\n")).expect("written");
    let path = keys.path().to_str().expect("UTF-8");
    for level in ["error", "warn", "info", "debug", "trace"] {
        let mut server = Running::start(&["--api-key-file", path, "--plan", "relu"], level);
        let at = server.client.at;
        let asked = |method: &str, path: &str, body: &str| {
            let mut socket = TcpStream::connect(at).expect("it listens");
            let request = format!(
                "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-{MARKER}\r\nX-Own: {MARKER}\r\n\
                 Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            socket.write_all(request.as_bytes()).expect("writes");
            Answer::read(&mut socket)
        };
        let said = json!([{ "role": "user", "content": format!("tell me of {MARKER}") }]);
        let tool = json!([{ "type": "function", "function": { "name": MARKER, "description": MARKER } }]);
        let grammar = format!("root ::= \"{MARKER}\"");
        let requests: [(&str, Value, u16); 12] = [
            ("/v1/completions", json!({ "prompt": MARKER, "max_tokens": 3, "echo": true, "logprobs": 2 }), 200),
            ("/v1/completions", json!({ "prompt": [MARKER, MARKER], "stream": true, "stop": MARKER }), 200),
            // The answer is the marker.
            ("/v1/completions", json!({ "prompt": "a", "grammar": grammar, "max_tokens": 30 }), 200),
            ("/v1/completions", json!({ "prompt": "a", "grammar": format!("{MARKER} ::= (") }), 400),
            ("/v1/completions", json!({ "prompt": "a", "model": MARKER }), 404),
            ("/v1/completions", json!({ "prompt": MARKER, "max_tokens": MARKER }), 400),
            ("/v1/completions", json!({ "prompt": MARKER.repeat(100_000) }), 400),
            ("/v1/chat/completions", json!({ "messages": said, "max_tokens": 3, "tools": tool }), 200),
            ("/v1/embeddings", json!({ "input": MARKER }), 200),
            ("/tokenize", json!({ "prompt": MARKER }), 200),
            ("/apply-template", json!({ "messages": [{ "role": MARKER, "content": MARKER }] }), 200),
            ("/nothing", json!({ "prompt": MARKER }), 404),
        ];
        for (path, body, status) in &requests {
            assert_eq!(asked("POST", path, &body.to_string()).status, *status, "{path} {body:.100}");
        }
        assert_eq!(asked("POST", "/v1/completions", &format!("{{\"prompt\": \"{MARKER}")).status, 400);
        assert_eq!(server.client.send("GET", &format!("/{MARKER}"), MARKER.as_bytes()).status, 401);
        let metrics = asked("GET", "/metrics", "").text();
        assert!(metrics.contains("lacuna_requests_refused_total 5") && !metrics.contains(MARKER), "{metrics}");
        server.signal();
        assert_eq!(server.ends(Duration::from_secs(10)).code(), Some(0));
        server.reader.take().map(JoinHandle::join);
        let said = server.said();
        assert!(
            said.contains("1, wanted everywhere but at the public routes") && said.contains("public        /health\n")
        );
        let counted = said.contains("answered") && said.contains("refused");
        assert_eq!(counted, ["info", "debug", "trace"].contains(&level), "{level}: counts and times are written");
        assert!(!said.to_lowercase().contains(MARKER), "{level}: {said}");
    }
}

/// Row 11: a template of the model that loops, or builds or writes without end, costs its own requests an error. Others are
/// answered beside them, and no client can bring a template.
#[test]
fn hostile_templates_stop_nobody_else() {
    let hostile = [
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{{ 'word ' * 3000000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ];
    let files =
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"];
    let chat = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 2 });
    for template in hostile {
        let dir = tempfile::tempdir().expect("a directory");
        for name in files {
            if let Some(bytes) = lacuna::embedded::file(name) {
                fs::write(dir.path().join(name), &bytes[..]).expect("written");
            }
        }
        fs::write(dir.path().join("chat_template.jinja"), template).expect("written");
        let server = Running::new(&[dir.path().to_str().expect("UTF-8")]);
        let client = server.client;
        let body = chat.clone();
        let chats: Vec<_> = (0..4)
            .map(|_| {
                let body = body.clone();
                spawn(move || client.post("/v1/chat/completions", &body))
            })
            .collect();
        for _ in 0..5 {
            assert_eq!(client.ok("/v1/completions", &greedy("Once", 5))["usage"]["completion_tokens"], 5);
        }
        for answer in chats.into_iter().map(|c| c.join().expect("no panic")) {
            assert_eq!(answer.status, 400, "{template}: {}", answer.text());
            assert!(answer.text().len() < 10_000, "messages are short");
        }
        assert_eq!(server.metric("lacuna_panics_total"), 0);
    }
    let server = Running::new(&[]);
    let plain = server.client.ok("/apply-template", &chat);
    let mut brought = chat;
    brought["chat_template"] = json!("{{ 'mine' }}");
    assert_eq!(server.client.ok("/apply-template", &brought), plain);
}

/// `--memory` counts the keys and values of all answers, kept prefixes, and the weights that plans have copies of.
#[test]
fn the_memory_of_all_plans_counts() {
    let needs = |args: &[&str]| -> f64 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
        // Enough to load the model, not to serve it.
        command.args(["serve", "--memory", "60M", "--prefix-cache", "100M", "--port", "0"]).args(args);
        let out = command.env_remove("LACUNA_PLANS").stdin(Stdio::null()).output().expect("the program starts");
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{text}");
        let figure = text.split("needs ").nth(1).and_then(|t| t.split(" MiB").next()?.parse().ok());
        figure.unwrap_or_else(|| panic!("no figure in {text}"))
    };
    let (dense, one) = (needs(&[]), needs(&["--plan", "relu"]));
    let more = needs(&["--plan", "relu", "--parallel", "16"]);
    // Six layers with a down projection of 256 x 896 numbers of two bytes.
    assert!((one - dense - 2.625).abs() < 0.1, "{dense} MiB became {one} MiB");
    assert!(more > one + 1.0, "{one} MiB became {more} MiB");
}
