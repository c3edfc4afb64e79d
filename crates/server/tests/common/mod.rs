//! A server in this process with the embedded model, and a client that is plain enough to be trusted.
#![allow(dead_code, reason = "each test file uses a part of it")]

use lacuna::{
    embedded,
    engine::{CompiledPlan, Engine, InputRule, LayerPlan, NeuronRule, Options as EngineOptions},
    model::{Checkpoint, LoadOptions, Model, weights::Mlp},
    tokenizer::Tokenizer,
};
use lacuna_core::{
    plan::Selector,
    site::Proj,
    weight::{Orientation, Weight},
};
use lacuna_server::{
    api::{Config, Lacuna},
    http::{self, Shutdown},
    schedule::{Options, Probe},
};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// A server that runs until it is dropped.
pub struct Server {
    pub at: SocketAddr,
    pub app: Arc<Lacuna>,
    shutdown: Shutdown,
    thread: Option<JoinHandle<()>>,
}

/// What a test changes of the usual server.
#[derive(Clone)]
pub struct Setup {
    pub parallel: usize,
    pub queue: usize,
    pub context: usize,
    pub prefixes: usize,
    pub chunk: usize,
    pub probe: Option<Probe>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { parallel: 8, queue: 256, context: 512, prefixes: 64 << 20, chunk: 512, probe: None }
    }
}

pub fn tokenizer() -> Tokenizer {
    embedded::tokenizer().expect("the embedded model")
}

pub fn engine(chunk: usize) -> Engine {
    let model = Checkpoint::embedded(&LoadOptions::default()).and_then(Checkpoint::bind).expect("the embedded model");
    Engine::new(Arc::new(model), EngineOptions { threads: 1, prefill_chunk: chunk, ..EngineOptions::default() })
        .expect("valid options")
}

/// Input-major copy of a float weight.
fn transposed(w: &Weight) -> Weight {
    let size = w.format().block_bytes();
    let mut bytes = Vec::with_capacity(w.bytes().len());
    for i in 0..w.inputs() {
        for o in 0..w.outputs() {
            bytes.extend_from_slice(&w.bytes()[(o * w.inputs() + i) * size..][..size]);
        }
    }
    Weight::new(w.format(), Orientation::InputMajor, w.outputs(), w.inputs(), bytes.into()).expect("the same length")
}

/// Neurons that are not zero, and inputs of q above a threshold: lossy, so that it answers differently.
pub fn plan(model: &Model) -> CompiledPlan {
    let layers = model.blocks.iter().map(|block| {
        let mut layer = LayerPlan::default();
        if let Some(linear) = block.linear(Proj::Q) {
            layer.inputs[Proj::Q as usize] = Some(InputRule::new(Selector::above(0.5), transposed(&linear.weight)));
        }
        if let Mlp::Gated(g) = &block.mlp {
            layer.neurons = Some(NeuronRule::new(Selector::non_zero(), transposed(&g.down.weight)));
        }
        layer
    });
    CompiledPlan { layers: layers.collect(), masked: false }
}

impl Server {
    pub fn new(setup: &Setup) -> Self {
        let engine = engine(setup.chunk);
        let plan = engine.with_plan(Some(Arc::new(plan(engine.model())))).expect("a fitting plan");
        let Setup { parallel, queue, context, prefixes, probe, .. } = setup.clone();
        let options = Options { parallel, queue, context, prefixes, probe };
        let config = Config {
            name: "tiny".into(),
            engine,
            plans: vec![("lossy".into(), plan)],
            tokenizer: tokenizer(),
            options,
            vllm_metrics: true,
            templates: None,
        };
        let app = Arc::new(Lacuna::new(config).expect("a thread"));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let at = listener.local_addr().expect("it is bound");
        listener.set_nonblocking(true).expect("a socket");
        let (shutdown, served) = (Shutdown::default(), app.clone());
        let end = shutdown.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("it does not block");
                http::serve(listener, served, http::Options::default(), end).await.expect("serves");
            });
        });
        Self { at, app, shutdown, thread: Some(thread) }
    }

    pub fn usual() -> Self {
        Self::new(&Setup::default())
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, body.to_string().as_bytes())
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, b"")
    }

    /// The JSON of an answer that must be a success.
    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.text());
        answer.json()
    }

    /// The events of a stream, `[DONE]` checked and left out.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let text = answer.text();
        let mut events: Vec<&str> = text.split("\n\n").filter(|e| !e.is_empty() && !e.starts_with(':')).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{text}");
        let event = |e: &str| serde_json::from_str(e.strip_prefix("data: ").expect("an event")).expect("JSON");
        events.into_iter().map(event).collect()
    }

    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        let mut socket = self.open(method, path, body);
        Answer::read(&mut socket)
    }

    /// Sends a request and leaves the answer unread.
    pub fn open(&self, method: &str, path: &str, body: &[u8]) -> TcpStream {
        let mut socket = TcpStream::connect(self.at).expect("it listens");
        socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        let mut request = head.into_bytes();
        request.extend_from_slice(body);
        // A server that refuses a long body may close before it has taken all of it.
        let _ = socket.write_all(&request);
        socket
    }

    /// Waits until no blocks of keys and values are in use beyond `left`.
    pub fn wait_until_free(&self, left: usize) {
        let start = Instant::now();
        while self.app.blocks_in_use() > left {
            assert!(start.elapsed() < Duration::from_secs(10), "{} blocks are still in use", self.app.blocks_in_use());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.begin();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An answer as it came.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn read(socket: &mut TcpStream) -> Self {
        let mut reader = BufReader::new(socket);
        let mut head = String::new();
        loop {
            let mut line = String::new();
            let n = reader.read_line(&mut line).expect("a line");
            if n == 0 || line == "\r\n" {
                break;
            }
            head.push_str(&line);
        }
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let mut body = Vec::new();
        if chunked {
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).expect("a size");
                let size = usize::from_str_radix(line.trim(), 16).expect("a size in hexadecimal");
                let mut part = vec![0; size + 2];
                reader.read_exact(&mut part).expect("a part");
                if size == 0 {
                    break;
                }
                body.extend_from_slice(&part[..size]);
            }
        } else {
            let _ = reader.read_to_end(&mut body);
        }
        Self { status, head, body }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }
}

/// A greedy completion.
pub fn greedy(prompt: &str, tokens: usize) -> Value {
    json!({ "prompt": prompt, "max_tokens": tokens, "temperature": 0 })
}

/// The text of the first choice.
pub fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().expect("a text")
}
