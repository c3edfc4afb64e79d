//! Faults, limits and fairness, one row of a table of threats after the other.

mod common;

use common::{Answer, Server, Setup, greedy, text, tokenizer};
use lacuna::model::weights::Model;
use lacuna_core::weight::{Orientation, Weight};
use lacuna_server::{
    http::{self, App, Keys},
    schedule::Probe,
};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{JoinHandle, sleep, spawn},
    time::{Duration, Instant},
};

/// A word that is one token.
const POISON: &str = " castle";

/// Some tests measure times, so they take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn id(word: &str) -> u32 {
    *tokenizer().encode(word, false).expect("tokens").last().expect("a token")
}

/// The embedding of [`POISON`] is no number; the head, which often shares its bytes, stays as it is.
fn poisoned(model: &mut Model) {
    let embed = &model.embed;
    let row = embed.matrix().row_bytes();
    let mut bytes = embed.bytes().to_vec();
    // All ones are a NaN in every float format.
    bytes[id(POISON) as usize * row..][..row].fill(0xff);
    model.embed = Weight::new(embed.format(), Orientation::OutputMajor, embed.outputs(), embed.inputs(), bytes.into())
        .expect("the same length");
}

/// Sends completions at once, each from its own thread.
fn together(server: &Arc<Server>, bodies: Vec<Value>) -> Vec<JoinHandle<Value>> {
    let send = |body: Value| {
        let server = server.clone();
        spawn(move || server.ok("/v1/completions", &body))
    };
    bodies.into_iter().map(send).collect()
}

fn wait(what: &str, ready: impl Fn() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        sleep(Duration::from_millis(2));
    }
}

/// Row 9: one sequence of a batch of eight runs into numbers that are none, in its prompt or in a decode step.
#[test]
fn numbers_that_are_none_end_their_own_answer() {
    let _alone = alone();
    let server = Arc::new(Server::new(&Setup { change: Some(poisoned), prefixes: 0, ..Setup::default() }));
    let plain = Server::usual();
    let metrics = server.app.metrics();
    let long = |i: usize| {
        json!({
            "prompt": format!("Story {i}. The dog"), "max_tokens": 300, "temperature": 0, "ignore_eos": true,
            "logit_bias": { id(POISON).to_string(): -100 }
        })
    };
    let others = together(&server, (0..7).map(long).collect());
    wait("seven answers", || metrics.running.get() == 7);
    // The bias makes the first token the poisoned one; the step that decodes it is one of eight.
    let step = json!({ "prompt": "The king", "max_tokens": 9, "temperature": 0, "logit_bias": { id(POISON).to_string(): 100 } });
    let step = server.ok("/v1/completions", &step);
    assert_eq!((&step["choices"][0]["finish_reason"], text(&step)), (&json!("error"), POISON));
    let prompt = server.ok("/v1/completions", &greedy(&format!("The{POISON} was"), 9));
    assert_eq!((&prompt["choices"][0]["finish_reason"], text(&prompt)), (&json!("error"), ""));
    assert!(metrics.failed.get() == 2 && metrics.running.get() >= 7, "the others are still under way");
    for (i, other) in others.into_iter().enumerate() {
        let got = other.join().expect("an answer");
        assert_eq!(text(&got), text(&plain.ok("/v1/completions", &long(i))), "{i}");
    }
    server.wait_until_free(0);
}

/// The time from the last byte of a request to the first of its answer.
fn time_to_answer(server: &Server, body: &[u8]) -> (Duration, Answer) {
    let mut socket = server.open("POST", "/v1/completions", body);
    let start = Instant::now();
    socket.peek(&mut [0; 1]).expect("an answer");
    (start.elapsed(), Answer::read(&mut socket))
}

/// Row 13: long bodies are refused in less than 50 ms (35 to 44 ms where two others build; the bound here is for machines that
/// are busier still), those beyond the limit without being read.
#[test]
fn long_bodies_are_refused_fast() {
    let _alone = alone();
    let server = Server::usual();
    let words = json!({ "prompt": "word ".repeat(2_100_000) }).to_string();
    let ids = json!({ "prompt": vec![17; 3_500_000] }).to_string();
    let (long, many) = (("context_length_exceeded", "at least"), ("invalid_request", "3499999 values"));
    for (body, (code, given)) in [(words, long), (ids, many)] {
        assert!(body.len() > 9 << 20);
        let mut best = Duration::MAX;
        for _ in 0..10 {
            let (took, answer) = time_to_answer(&server, body.as_bytes());
            best = best.min(took);
            let error = &answer.json()["error"];
            assert_eq!((answer.status, &error["code"]), (400, &json!(code)));
            let message = error["message"].to_string();
            assert!(message.contains(given) && (code != long.0 || message.contains("512")), "{message}");
        }
        assert!(best < Duration::from_millis(250) || cfg!(debug_assertions), "{code}: {best:?}");
    }
    // Nothing of this body is ever sent.
    let mut socket = TcpStream::connect(server.at).expect("it listens");
    let start = Instant::now();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 104857600\r\n\r\n";
    socket.write_all(head.as_bytes()).expect("writes");
    let answer = Answer::read(&mut socket);
    assert_eq!((answer.status, answer.json()["error"]["code"].clone()), (413, json!("body_too_large")));
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
}

/// Row 14: work for a client that left stops within a step or a part of its prompt.
#[test]
fn work_stops_soon_after_its_client_left() {
    let _alone = alone();
    let server = Server::new(&Setup { prefixes: 0, ..Setup::default() });
    let metrics = server.app.metrics();
    let body = |words: usize, tokens: usize| {
        json!({
            "prompt": "word ".repeat(words), "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": true
        })
        .to_string()
    };
    for (words, tokens) in [(400, 100), (5, 500)] {
        let mut best = Duration::MAX;
        for round in 0..5 {
            let mut socket = server.open("POST", "/v1/completions", body(words, tokens).as_bytes());
            wait("it runs", || metrics.running.get() == 1);
            if tokens > words {
                socket.read_exact(&mut [0; 300]).expect("some of the answer");
            }
            socket.shutdown(Shutdown::Both).expect("a socket");
            let start = Instant::now();
            server.wait_until_free(0);
            wait("nothing runs", || metrics.running.get() == 0);
            best = best.min(start.elapsed());
            // The embedded model may have ended by itself, but not in all rounds.
            assert!(round < 4 || metrics.cancelled.get() > 0);
        }
        assert!(best < Duration::from_millis(250), "{best:?}");
    }
}

/// Row 16: while the queue is full a request is refused in less than 50 ms, whatever it would have cost to prepare, also where
/// many come at once. The best of some rounds counts: other programs share the machine, and the clients this process.
#[test]
fn refusals_take_no_time() {
    let _alone = alone();
    let server = Arc::new(Server::new(&Setup { parallel: 2, queue: 4, threads: 2, ..Setup::default() }));
    // Sixteen answers of one request: two are written, the others fill the queue for seconds.
    let long =
        json!({ "prompt": "Once", "max_tokens": 480, "ignore_eos": true, "temperature": 0, "n": 16 }).to_string();
    let schema = json!({ "type": "array", "items": { "type": "string", "pattern": "(a{1,30}){1,30}" } });
    let costly = json!({ "prompt": "word ".repeat(4000), "max_tokens": 1, "json_schema": schema }).to_string();
    let bodies = [costly, greedy("Once", 1).to_string()];
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let busy = server.open("POST", "/v1/completions", long.as_bytes());
        wait("the queue is full", || server.get("/metrics").text().contains("lacuna_requests_waiting 14"));
        let client = |i: usize| {
            let (server, body) = (server.clone(), bodies[i % 2].clone());
            let ask = move || {
                let (took, answer) = time_to_answer(&server, body.as_bytes());
                assert_eq!((answer.status, answer.json()["error"]["code"].clone()), (503, json!("busy")));
                assert!(answer.head.to_ascii_lowercase().contains("retry-after: 1"), "{}", answer.head);
                took
            };
            spawn(move || (0..10).map(|_| ask()).collect::<Vec<_>>())
        };
        let clients: Vec<_> = (0..10).map(client).collect();
        let mut times: Vec<_> = clients.into_iter().flat_map(|c| c.join().expect("refusals")).collect();
        drop(busy);
        wait("nothing runs", || server.app.metrics().running.get() == 0);
        times.sort();
        println!("refused: median {:?}, p99 {:?}, most {:?}", times[50], times[98], times[99]);
        best = best.min(times[98]);
    }
    assert!(best < Duration::from_millis(50) || cfg!(debug_assertions), "{best:?}");
}

/// Row 25: without the key no route of the real table answers, but `/health`; a browser is asked for a password.
#[test]
fn every_route_wants_the_key() {
    let _alone = alone();
    let keys = Keys::parse("secret-key");
    let server = Server::new(&Setup { http: http::Options { keys, ..http::Options::default() }, ..Setup::default() });
    let routes = App::routes(&*server.app).to_vec();
    assert!(routes.len() > 15 && routes.iter().any(|r| r.path == "/app.js"), "{routes:?}");
    let ask = |method: &str, path: &str, fields: &str| {
        let mut socket = TcpStream::connect(server.at).expect("it listens");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n{fields}\r\n"
        );
        socket.write_all(head.as_bytes()).expect("writes");
        Answer::read(&mut socket)
    };
    for route in &routes {
        let path = route.path.replace('*', "tiny");
        for fields in ["", "Authorization: Bearer wrong\r\n", "Authorization: Basic OndxxQ==\r\n"] {
            let answer = ask(route.method.as_str(), &path, fields);
            assert_eq!(answer.status == 401, route.path != "/health", "{path}: {}", answer.head);
            assert!(!answer.text().contains("tiny") && !answer.text().contains("secret"), "{path}");
        }
        // Behind the key there is an answer, if only that a body is missing.
        let answer = ask(route.method.as_str(), &path, "Authorization: Bearer secret-key\r\n");
        assert!(answer.status == 200 || route.method == http::Method::POST && answer.status == 400, "{path}");
    }
    let head = ask("GET", "/", "Accept: text/html,*/*\r\n").head.to_lowercase();
    assert!(head.contains("www-authenticate: basic realm="), "{head}");
    assert!(ask("GET", "/v1/models", "Accept: */*\r\n").head.to_lowercase().contains("www-authenticate: bearer"));
    let typed = ask("GET", "/", "Authorization: Basic YW55Ym9keTpzZWNyZXQta2V5\r\n");
    assert!(typed.status == 200 && typed.text().contains("<html"), "{}", typed.head);
}

/// Row 32: twenty prompts alone and eight at a time, with one thread and with two.
#[test]
fn company_and_threads_change_no_byte() {
    let _alone = alone();
    let body = |i: usize| {
        let model = ["tiny", "tiny:lossy"][i % 2];
        let prompt = format!("{} The {} bear", "Once upon a time. ".repeat(i % 4), ["old", "red", "sad"][i % 3]);
        json!({
            "model": model, "prompt": prompt, "max_tokens": 12 + i, "seed": i, "temperature": (i % 3) as f64 / 2.0
        })
    };
    let mut wanted: Vec<String> = Vec::new();
    for threads in [1, 2] {
        let server = Arc::new(Server::new(&Setup { threads, parallel: 8, ..Setup::default() }));
        let alone: Vec<String> = (0..20).map(|i| text(&server.ok("/v1/completions", &body(i))).to_owned()).collect();
        let beside = together(&server, (0..20).map(body).collect());
        for (i, (alone, beside)) in alone.iter().zip(beside).enumerate() {
            assert_eq!(text(&beside.join().expect("an answer")), alone, "{i}, {threads} threads");
        }
        if threads == 1 {
            wanted = alone;
        } else {
            assert_eq!(alone, wanted);
        }
    }
}

/// Row 34: of equal answers each ends after at most twice the steps of those before it and those beside it.
#[test]
fn nobody_starves() {
    let _alone = alone();
    const TOKENS: usize = 20;
    type Ends = Arc<Mutex<(usize, HashMap<Vec<u32>, usize>)>>;
    let ends = Ends::default();
    let seen = ends.clone();
    let probe: Probe = Arc::new(move |prompt, _| {
        let mut all = seen.lock().expect("no panic");
        all.0 += 1;
        let now = all.0;
        all.1.insert(prompt.to_vec(), now);
    });
    let server = Server::new(&Setup { parallel: 4, probe: Some(probe), ..Setup::default() });
    let prompts: Vec<Vec<u32>> = (0..40).map(|i| (20..30 + i % 7 * 20).chain([100 + i]).collect()).collect();
    server.ok(
        "/v1/completions",
        &json!({ "prompt": prompts, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true }),
    );
    let ends = ends.lock().expect("no panic");
    assert_eq!(ends.0, 40 * TOKENS);
    for (i, prompt) in prompts.iter().enumerate() {
        let fair = (i + 4) * TOKENS;
        assert!(ends.1[prompt] <= 2 * fair, "{i}: ended with step {}, fair is {fair}", ends.1[prompt]);
    }
}
