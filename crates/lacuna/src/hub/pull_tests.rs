use super::*;
use std::{
    collections::HashMap,
    io::{BufRead, BufReader},
    net::TcpListener,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub on the loopback interface: two small files and one large one behind a redirection, which breaks off once.
struct FakeHub {
    source: Source,
    requests: Arc<Mutex<Vec<String>>>,
}

fn sha(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect()
}

impl FakeHub {
    fn start(break_after: usize, files: &'static [&'static str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        let breaks = Arc::new(AtomicUsize::new(break_after));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, breaks) = (seen.clone(), breaks.clone());
                thread::spawn(move || serve(stream, files, &seen, &breaks));
            }
        });
        Self { source: Source { endpoint, token: Some("secret".into()), offline: false }, requests }
    }

    fn seen(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(mut stream: std::net::TcpStream, files: &[&str], seen: &Mutex<Vec<String>>, breaks: &AtomicUsize) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let headers: HashMap<String, String> = lines
        .map_while(|l| l.ok().filter(|l| !l.is_empty()))
        .filter_map(|l| l.split_once(": ").map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())))
        .collect();
    let range = headers.get("range").cloned().unwrap_or_default();
    seen.lock().unwrap().push(format!("{first} {range}").trim().to_owned());
    let path = first.split(' ').nth(1).unwrap();
    let body = weights();
    let (head, data): (String, Vec<u8>) = match path.rsplit('/').next().unwrap() {
        "main" => {
            let siblings: Vec<_> = files.iter().map(|f| serde_json::json!({"rfilename": f})).collect();
            ("200 OK\r\n".into(), serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string().into())
        }
        "model.safetensors" => {
            let location = "Location: /cdn/bytes".to_owned();
            (
                format!(
                    "302 Found\r\n{location}\r\nX-Linked-Etag: \"{}\"\r\nX-Linked-Size: {}\r\n",
                    sha(&body),
                    body.len()
                ),
                vec![],
            )
        }
        "bytes" => match range.strip_prefix("bytes=").and_then(|r| r.trim_end_matches('-').parse::<usize>().ok()) {
            Some(from) => ("206 Partial Content\r\n".into(), body[from..].to_vec()),
            None => ("200 OK\r\n".into(), body),
        },
        "config.json" | "tokenizer.json" => ("200 OK\r\nETag: \"89abcdef0123\"\r\n".into(), b"{}".to_vec()),
        _ => ("404 Not Found\r\n".into(), vec![]),
    };
    let text = format!("HTTP/1.1 {head}Content-Length: {}\r\nConnection: close\r\n\r\n", data.len());
    stream.write_all(text.as_bytes()).unwrap();
    if !first.starts_with("HEAD") {
        let cut = if path.ends_with("/bytes") { breaks.swap(usize::MAX, Ordering::SeqCst) } else { usize::MAX };
        stream.write_all(&data[..data.len().min(cut)]).ok();
    }
}

#[derive(Default)]
struct Count {
    started: Vec<(String, u64)>,
}

impl Progress for Count {
    fn start(&mut self, file: &str, _size: u64, have: u64) {
        self.started.push((file.to_owned(), have));
    }
    fn advance(&mut self, _bytes: u64) {}
    fn finish(&mut self) {}
}

const FILES: &[&str] =
    &["config.json", "model.safetensors", "tokenizer.json", "README.md", "../evil.json", "a/b.json", ".gitattributes"];

#[test]
fn a_broken_download_is_continued_and_verified() {
    let hub = FakeHub::start(100_000, FILES);
    let cache = tempfile::tempdir().unwrap();
    let name = Name::parse("org/name").unwrap();
    let e = pull(&hub.source, cache.path(), &name, &mut Count::default()).unwrap_err().to_string();
    assert!(e.contains("100000") && e.contains("continue"), "{e}");
    assert!(super::super::locate_in(cache.path(), &name).is_err(), "nothing may look complete yet");

    let mut count = Count::default();
    let found = pull(&hub.source, cache.path(), &name, &mut count).unwrap();
    assert!(count.started.contains(&("model.safetensors".to_owned(), 100_000)), "{:?}", count.started);
    assert_eq!(fs::read(found.join("model.safetensors")).unwrap(), weights());
    let mut names: Vec<_> = fs::read_dir(&found).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert!(hub.seen().iter().any(|r| r.contains("/cdn/bytes") && r.ends_with("bytes=100000-")), "{:?}", hub.seen());
}

#[test]
fn damaged_bytes_are_refused() {
    let hub = FakeHub::start(usize::MAX, FILES);
    let cache = tempfile::tempdir().unwrap();
    let name = Name::parse("org/name").unwrap();
    let blobs = cache.path().join("models--org--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.incomplete", sha(&weights()))), vec![0xee; 50_000]).unwrap();
    let e = pull(&hub.source, cache.path(), &name, &mut Count::default()).unwrap_err().to_string();
    assert!(e.contains("SHA-256"), "{e}");
    assert!(pull(&hub.source, cache.path(), &name, &mut Count::default()).is_ok(), "the next try starts afresh");
}

#[test]
fn offline_opens_no_socket() {
    let hub = FakeHub::start(usize::MAX, FILES);
    let cache = tempfile::tempdir().unwrap();
    let source = Source { offline: true, ..hub.source.clone() };
    let e = pull(&source, cache.path(), &Name::parse("org/name").unwrap(), &mut Count::default()).unwrap_err();
    assert!(matches!(e, HubError::Offline { .. }), "{e}");
    assert!(hub.seen().is_empty());
}

#[test]
fn several_gguf_files_must_be_told_apart() {
    let listed: Vec<String> = ["m-Q4_0.gguf", "m-Q8_0.gguf", "README.md"].map(String::from).to_vec();
    let e = wanted(&Name::parse("org/name").unwrap(), &listed).unwrap_err().to_string();
    assert!(e.contains("m-Q4_0.gguf") && e.contains("org/name:FILE"), "{e}");
    assert_eq!(wanted(&Name::parse("org/name:q8_0").unwrap(), &listed).unwrap(), ["m-Q8_0.gguf"]);
}
