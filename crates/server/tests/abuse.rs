//! Bad requests, many clients, clients that leave, and faults inside.

mod common;

use common::{Answer, Server, Setup, greedy, text};
use lacuna_server::fields::{Endpoint, FIELDS, Kind};
use serde_json::{Map, Value, json};
use std::{
    io::Read,
    net::Shutdown,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// The least that an endpoint answers.
fn least(endpoint: Endpoint) -> Map<String, Value> {
    let body = match endpoint {
        Endpoint::Completions => json!({ "prompt": "a", "max_tokens": 1 }),
        Endpoint::Chat => json!({ "messages": [{ "role": "user", "content": "a" }], "max_tokens": 1 }),
        Endpoint::Embeddings => json!({ "input": "a" }),
        Endpoint::Tokenize => json!({ "prompt": "a" }),
        Endpoint::Detokenize => json!({ "tokens": [1] }),
        Endpoint::Template => json!({ "messages": [{ "role": "user", "content": "a" }] }),
    };
    body.as_object().expect("an object").clone()
}

/// Values of all kinds, and those around the ends of the field's range.
fn values(kind: Kind) -> Vec<String> {
    let mut all: Vec<String> = [
        "null",
        "true",
        "0",
        "1",
        "-1",
        "0.5",
        "1e308",
        "-1e308",
        "9223372036854775807",
        "18446744073709551615",
        "1e400",
        "NaN",
        "\"\"",
        "\"a\"",
        "\"\\ud800\"",
        "[]",
        "[[]]",
        "[null]",
        "[1]",
        "[-1]",
        "[1e9]",
        "[\"\"]",
        "[\"a\"]",
        "[{}]",
        "{}",
        "{\"a\": 1}",
        "{\"type\": \"x\"}",
        "{\"1\": 1e9}",
        "{\"1\": null}",
        "{\"x\": 1}",
        "{\"type\": \"json_schema\", \"json_schema\": {\"schema\": {\"type\": 5}}}",
        "[[[[[[[[]]]]]]]]",
        "{\"include_usage\": 3}",
        "[{\"role\": 3}]",
        "[{\"role\": \"user\", \"content\": {}}]",
        "[{\"role\": \"nobody\", \"content\": \"x\"}]",
        "[{\"type\": \"function\"}]",
        "(",
        "",
    ]
    .map(String::from)
    .to_vec();
    match kind {
        Kind::Int { min, .. } if min > i64::MIN => all.extend([min - 1, min, 20, 21, 512, 513].map(|n| n.to_string())),
        Kind::Float { min, max } => all.extend([min - 1e-3, min, max, max + 1e-3].map(|x| x.to_string())),
        Kind::Texts { items, bytes } => {
            all.push(format!("{:?}", "x".repeat(bytes)));
            all.push(format!("{:?}", "x".repeat(bytes + 1)));
            all.push(json!(vec!["x"; items + 1]).to_string());
        }
        Kind::Inputs { items } => {
            all.push(json!(vec!["x"; items + 1]).to_string());
            all.push(json!(vec![vec![1]; items + 1]).to_string());
            all.push(json!(vec![1; 512]).to_string());
            all.push(json!(vec![1; 513]).to_string());
            all.push(json!([4095, 4096]).to_string());
        }
        Kind::Messages { items } => {
            all.push(json!(vec![json!({ "role": "user", "content": "a" }); items + 1]).to_string())
        }
        Kind::Objects { items, .. } => all.push(json!(vec![json!({ "type": "function" }); items + 1]).to_string()),
        Kind::Bias { items, .. } => {
            let map: Map<String, Value> = (0..=items).map(|i| (i.to_string(), json!(1))).collect();
            all.push(Value::Object(map).to_string());
            all.push("{\"4096\": 1}".into());
            all.push("{\"5\": 100.5}".into());
        }
        Kind::Object(bytes) | Kind::TextOrObject(bytes) | Kind::Text(bytes) if bytes < 1 << 20 => {
            all.push(json!({ "x": "y".repeat(bytes) }).to_string());
            all.push(format!("{:?}", "y".repeat(bytes + 1)));
        }
        _ => {}
    }
    all
}

#[test]
fn any_value_of_any_field_is_answered_or_refused() {
    let server = Server::usual();
    let mut count = 0;
    for endpoint in Endpoint::ALL {
        for field in FIELDS.iter().filter(|f| f.on.contains(&endpoint)) {
            for value in values(field.kind) {
                let mut rest = least(endpoint);
                rest.remove(field.name);
                let rest = Value::Object(rest).to_string();
                let comma = if rest == "{}" { "" } else { "," };
                let body = format!("{{{:?}: {value}{comma}{}", field.name, &rest[1..]);
                let answer = server.send("POST", endpoint.path(), body.as_bytes());
                let shown: String = body.chars().take(200).collect();
                assert!(
                    answer.status == 200 || (400..500).contains(&answer.status),
                    "{} {shown}: {} {}",
                    endpoint.path(),
                    answer.status,
                    answer.text()
                );
                if answer.status != 200 {
                    let error = &answer.json()["error"];
                    assert!(
                        error["message"].is_string() && error["type"] == "invalid_request_error",
                        "{shown}: {error}"
                    );
                }
                count += 1;
            }
        }
        for body in ["", "null", "[]", "3", "{", "{\"a\"", "\u{0}", "{\"prompt\": \"a\"} x", &"[".repeat(100_000)] {
            let status = server.send("POST", endpoint.path(), body.as_bytes()).status;
            assert_eq!(status, 400, "{} {:.20}", endpoint.path(), body);
        }
    }
    assert!(count > 1500, "{count}");
    server.wait_until_free(usize::MAX);
    assert_eq!(server.app.metrics().panics.get(), 0);
}

#[test]
fn prompts_at_the_limit_and_beyond() {
    let server = Server::new(&Setup { context: 100, ..Setup::default() });
    for (n, status) in [(99, 200), (100, 200), (101, 400)] {
        let body = json!({ "prompt": vec![5; n], "max_tokens": 1 });
        let answer = server.post("/v1/completions", &body);
        assert_eq!(answer.status, status, "{n}");
        if status == 400 {
            let message = answer.json()["error"]["message"].to_string();
            assert!(message.contains("101") && message.contains("100"), "{message}");
        }
    }
    // A text that cannot fit is not even cut into tokens.
    let body = json!({ "prompt": "word ".repeat(2_000_000) });
    let start = Instant::now();
    let answer = server.post("/v1/completions", &body);
    assert_eq!((answer.status, answer.json()["error"]["code"].clone()), (400, json!("context_length_exceeded")));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn two_hundred_clients_get_what_one_gets() {
    let server = Arc::new(Server::usual());
    let prompts: Vec<String> = (0..200)
        .map(|i| format!("Story {i}. The {} cat number {} said", ["red", "big", "old"][i % 3], i * 7))
        .collect();
    let wanted = |i: usize, prompt: &str| {
        let temperature = [1.0, 0.0, 0.0, 0.0][i % 4];
        let model = ["tiny:lossy", "tiny", "tiny", "tiny", "tiny"][i % 5];
        json!({ "model": model, "prompt": prompt, "max_tokens": 8 + i % 5, "temperature": temperature, "seed": i })
    };
    let alone: Vec<String> = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| text(&server.ok("/v1/completions", &wanted(i, p))).to_owned())
        .collect();
    let threads: Vec<_> = prompts
        .into_iter()
        .enumerate()
        .map(|(i, prompt)| {
            let server = server.clone();
            let body = wanted(i, &prompt);
            std::thread::spawn(move || text(&server.ok("/v1/completions", &body)).to_owned())
        })
        .collect();
    for (i, thread) in threads.into_iter().enumerate() {
        assert_eq!(thread.join().expect("an answer"), alone[i], "client {i}");
    }
    assert_eq!(server.app.metrics().busy.get(), 0);
}

#[test]
fn texts_depend_neither_on_company_nor_on_chunks_nor_on_prefixes() {
    let long = "Once upon a time there was a little dog. ".repeat(12);
    let body = |seed: u64| json!({ "prompt": format!("{long}The dog"), "max_tokens": 20, "seed": seed });
    let mut texts = Vec::new();
    for (chunk, parallel, prefixes) in [(512, 1, 0), (16, 8, 0), (100, 8, 64 << 20)] {
        let server = Arc::new(Server::new(&Setup { chunk, parallel, prefixes, ..Setup::default() }));
        let threads: Vec<_> = (0..8)
            .map(|seed| {
                let (server, body) = (server.clone(), body(seed));
                std::thread::spawn(move || text(&server.ok("/v1/completions", &body)).to_owned())
            })
            .collect();
        let mut got: Vec<String> = threads.into_iter().map(|t| t.join().expect("an answer")).collect();
        let again = server.ok("/v1/completions", &body(0));
        let cached = again["timings"]["cache_n"].as_u64().expect("a count");
        assert_eq!(cached > 0, prefixes > 0, "{again}");
        got.push(text(&again).to_owned());
        texts.push(got);
    }
    assert_eq!(texts[0], texts[1]);
    assert_eq!(texts[0], texts[2]);
    assert_eq!(texts[0][0], texts[0][8]);
    assert_ne!(texts[0][0], texts[0][1], "seeds matter");
}

#[test]
fn short_ends_of_prompts_change_no_text() {
    let setup = Setup { context: 700, ..Setup::default() };
    let plain = Server::new(&Setup { prefixes: 0, ..setup.clone() });
    let kept = Server::new(&Setup { chunk: 100, ..setup });
    for len in [1, 3, 4, 5, 65, 513, 516, 517, 577] {
        let prompt: Vec<u32> = (0..len).map(|i| 10 + (i * 7 + len) % 900).collect();
        let mut body = json!({ "prompt": prompt, "max_tokens": 12, "seed": len, "ignore_eos": true });
        let wanted = plain.ok("/v1/completions", &body);
        let (first, again) = (kept.ok("/v1/completions", &body), kept.ok("/v1/completions", &body));
        assert_eq!(again["timings"]["cache_n"], (len - 1) / 64 * 64, "{len}");
        assert_eq!((text(&first), text(&again)), (text(&wanted), text(&wanted)), "{len}");
        body["echo"] = json!(true);
        body["logprobs"] = json!(1);
        let scored = plain.ok("/v1/completions", &body);
        assert!(text(&scored).ends_with(text(&wanted)), "{len}: {} and {}", text(&scored), text(&wanted));
    }
}

#[test]
fn clients_that_leave_give_back_their_memory() {
    let server = Server::new(&Setup { prefixes: 0, ..Setup::default() });
    let long =
        json!({ "prompt": "Once upon a time. ".repeat(60), "max_tokens": 200, "temperature": 0, "ignore_eos": true });
    for i in 0..60u64 {
        let mut body = long.clone();
        body["stream"] = json!(i % 2 == 0);
        let mut socket = server.open("POST", "/v1/completions", body.to_string().as_bytes());
        std::thread::sleep(Duration::from_millis(i * 7 % 50));
        if i % 3 == 0 {
            let _ = socket.read(&mut [0; 100]);
        }
        socket.shutdown(Shutdown::Both).expect("a socket");
    }
    let start = Instant::now();
    server.wait_until_free(0);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(server.app.metrics().cancelled.get() > 0);
    let answer = server.ok("/v1/completions", &greedy("Once", 5));
    assert_eq!(answer["usage"]["completion_tokens"], 5);
}

#[test]
fn a_full_queue_refuses_at_once() {
    let server = Arc::new(Server::new(&Setup { parallel: 1, queue: 4, ..Setup::default() }));
    let body = json!({ "prompt": "Once", "max_tokens": 400, "ignore_eos": true, "temperature": 0 }).to_string();
    let sockets: Vec<_> = (0..40).map(|_| server.open("POST", "/v1/completions", body.as_bytes())).collect();
    let answers: Vec<_> = sockets.into_iter().map(|mut s| Answer::read(&mut s)).collect();
    let busy: Vec<_> = answers.iter().filter(|a| a.status == 503).collect();
    let good = answers.iter().filter(|a| a.status == 200).count();
    assert_eq!(busy.len() + good, 40, "nobody is lost");
    // Four wait; the fifth depends on when the engine's thread takes the first.
    assert!(good >= 4 && !busy.is_empty(), "{good}");
    assert!(busy.iter().all(|a| a.head.to_ascii_lowercase().contains("retry-after: 1")));
    let texts: Vec<String> = answers.iter().filter(|a| a.status == 200).map(|a| text(&a.json()).to_owned()).collect();
    assert!(texts.windows(2).all(|w| w[0] == w[1]));
}

#[test]
fn a_fault_ends_one_request_and_no_other() {
    let tokenizer = common::tokenizer();
    let id = |word: &str| *tokenizer.encode(word, false).expect("tokens").last().expect("a token");
    let (panics, numbers) = (id(" dragon"), id(" castle"));
    let steps = Arc::new(AtomicUsize::new(0));
    let count = steps.clone();
    let probe: lacuna_server::schedule::Probe = Arc::new(move |prompt, logits| {
        count.fetch_add(1, Ordering::Relaxed);
        if prompt.last() == Some(&panics) {
            panic!("as the test asked");
        }
        if prompt.last() == Some(&numbers) {
            logits[3] = f32::NAN;
        }
    });
    let plain = Server::usual();
    let server = Arc::new(Server::new(&Setup { probe: Some(probe), prefixes: 0, ..Setup::default() }));
    let prompts = ["Once upon", " dragon", "The sun", " castle", "A little boy", " dragon", "My mom", " castle"];
    let threads: Vec<_> = prompts
        .map(|prompt| {
            let server = server.clone();
            std::thread::spawn(move || server.post("/v1/completions", &greedy(prompt, 20)))
        })
        .into_iter()
        .collect();
    for (prompt, thread) in prompts.iter().zip(threads) {
        let answer = thread.join().expect("an answer");
        match *prompt {
            " dragon" => {
                assert_eq!((answer.status, answer.json()["error"]["type"].clone()), (500, json!("server_error")))
            }
            " castle" => assert_eq!(answer.json()["choices"][0]["finish_reason"], "error"),
            _ => assert_eq!(text(&answer.json()), text(&plain.ok("/v1/completions", &greedy(prompt, 20))), "{prompt}"),
        }
    }
    assert_eq!((server.app.metrics().panics.get(), server.app.metrics().failed.get()), (2, 4));
    server.wait_until_free(0);
    assert!(steps.load(Ordering::Relaxed) > 80);
}

#[test]
fn short_requests_do_not_wait_for_a_long_one() {
    let server = Arc::new(Server::new(&Setup { parallel: 4, ..Setup::default() }));
    let long = json!({ "prompt": "Once", "max_tokens": 450, "ignore_eos": true, "temperature": 0, "n": 3 }).to_string();
    let start = Instant::now();
    let mut socket = server.open("POST", "/v1/completions", long.as_bytes());
    let short = server.ok("/v1/completions", &greedy("The", 3));
    let short_time = start.elapsed();
    assert_eq!(short["usage"]["completion_tokens"], 3);
    Answer::read(&mut socket);
    assert!(short_time * 2 < start.elapsed(), "{short_time:?} of {:?}", start.elapsed());
}

#[test]
fn metrics_hold_no_texts() {
    let server = Server::usual();
    server.ok("/v1/completions", &greedy("a very secret cat", 3));
    let metrics = server.get("/metrics");
    let text = metrics.text();
    assert!(!text.contains("secret"));
    for name in [
        "lacuna_prompt_tokens_total",
        "lacuna_requests_finished_total{reason=\"length\"} 1",
        "vllm:generation_tokens_total",
    ] {
        assert!(text.contains(name), "{name}: {text}");
    }
    server.app.close();
    assert_eq!(server.get("/health").status, 503);
    assert_eq!(server.post("/v1/completions", &greedy("a", 1)).status, 503);
}
