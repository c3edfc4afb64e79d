//! The accept loop against clients that misbehave, over real sockets.

use super::*;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{sleep, timeout},
};

/// An app with one route of each kind.
struct Sample {
    routes: Vec<Route>,
    /// Requests that are being answered.
    open: Arc<AtomicUsize>,
}

/// Counts as long as it lives.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl App for Sample {
    fn routes(&self) -> &[Route] {
        &self.routes
    }

    fn call(&self, route: usize, request: Request) -> BoxFuture<'static, Reply> {
        let path = self.routes[route].path;
        let open = Open::new(&self.open);
        Box::pin(async move {
            let (send, chunks) = mpsc::channel(4);
            match path {
                "/panic" => panic!("as asked"),
                "/wait" => sleep(Duration::from_secs(600)).await,
                "/slow" => sleep(Duration::from_millis(300)).await,
                "/events" | "/flood" => {
                    tokio::spawn(async move {
                        let piece =
                            Bytes::from(if path == "/flood" { vec![b'x'; 1 << 20] } else { b"data: 1\n\n".to_vec() });
                        while send.send(piece.clone()).await.is_ok() {
                            let rest = if path == "/flood" { 0 } else { 40 };
                            sleep(Duration::from_millis(rest)).await;
                        }
                        drop(open);
                    });
                    return Reply::Stream { content_type: EVENTS, chunks };
                }
                "/silence" => {
                    tokio::spawn(async move {
                        send.closed().await;
                        drop(open);
                    });
                    return Reply::Stream { content_type: EVENTS, chunks };
                }
                _ => {}
            }
            drop(open);
            Reply::json(StatusCode::OK, format!("{} {}", request.body.len(), request.query))
        })
    }
}

struct Server {
    address: SocketAddr,
    shutdown: Shutdown,
    open: Arc<AtomicUsize>,
    task: JoinHandle<std::io::Result<()>>,
}

async fn start(options: Options) -> Server {
    let get = ["/health", "/slow", "/wait", "/panic", "/events", "/flood", "/silence"];
    let route = |method: Method, path| Route { method, path, public: path == "/health", about: "" };
    let mut routes: Vec<Route> = get.into_iter().map(|p| route(Method::GET, p)).collect();
    routes.push(route(Method::POST, "/echo"));
    let open = Arc::new(AtomicUsize::new(0));
    let app = Arc::new(Sample { routes, open: Arc::clone(&open) });
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let shutdown = Shutdown::default();
    let task = tokio::spawn(serve(listener, app, options, shutdown.clone()));
    Server { address, shutdown, open, task }
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connects")
    }

    /// Sends `head` (a request line and fields, without the empty line) and `body`, reads until the server closes.
    async fn raw(&self, head: &str, body: &[u8]) -> String {
        let mut socket = self.connect().await;
        let text = format!("{head}\r\nConnection: close\r\n\r\n");
        // The server may answer and close before it has read everything.
        let _ = socket.write_all(text.as_bytes()).await;
        let _ = socket.write_all(body).await;
        read_all(&mut socket).await
    }

    async fn get(&self, path: &str) -> String {
        self.raw(&format!("GET {path} HTTP/1.1\r\nHost: localhost"), b"").await
    }
}

async fn read_all(socket: &mut TcpStream) -> String {
    let mut out = Vec::new();
    let mut buf = [0; 4096];
    let read = async {
        while let Ok(n @ 1..) = socket.read(&mut buf).await {
            out.extend_from_slice(&buf[..n]);
        }
    };
    timeout(Duration::from_secs(20), read).await.expect("the server closes");
    String::from_utf8_lossy(&out).into_owned()
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0)
}

/// Checks the status and that the body has the error shape with that code.
#[track_caller]
fn refused(answer: &str, wanted: u16, code: &str) {
    assert_eq!(status(answer), wanted, "{answer}");
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, b)| b);
    let value: serde_json::Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{answer}: {e}"));
    assert_eq!(value["error"]["code"], code, "{answer}");
    assert!(value["error"]["message"].is_string() && value["error"]["type"].is_string(), "{answer}");
}

fn quick() -> Options {
    let ms = Duration::from_millis;
    Options { head_time: ms(300), body_time: ms(300), idle_time: ms(600), write_time: ms(400), ..Options::default() }
}

#[tokio::test]
async fn answers_and_refusals_have_one_shape() {
    let s = start(Options::default()).await;
    let echo = "POST /echo?a=1 HTTP/1.1\r\nHost: localhost";
    assert!(s.raw(&format!("{echo}\r\nContent-Length: 3"), b"abc").await.ends_with("3 a=1"));
    refused(&s.get("/nothing").await, 404, "not_found");
    let wrong = s.raw("DELETE /health HTTP/1.1\r\nHost: localhost", b"").await;
    refused(&wrong, 405, "method_not_allowed");
    assert!(wrong.to_lowercase().contains("allow: get, head"), "{wrong}");
    let head = s.raw("HEAD /health HTTP/1.1\r\nHost: localhost", b"").await;
    assert!(status(&head) == 200 && head.ends_with("\r\n\r\n"), "{head}");
    refused(&s.raw(&format!("{echo}\r\nContent-Length: 99999999999"), b"").await, 413, "body_too_large");
    let chunked = format!("{echo}\r\nTransfer-Encoding: chunked");
    let long = format!("{:x}\r\n{}\r\n0\r\n\r\n", 17 << 20, "a".repeat(17 << 20));
    refused(&s.raw(&chunked, long.as_bytes()).await, 413, "body_too_large");
    refused(&s.raw(&format!("{echo}\r\nX-Long: {}", "a".repeat(40_000)), b"").await, 431, "head_too_large");
    assert_eq!(status(&s.raw(&format!("{echo}\r\nX-Long: {}", "a".repeat(400_000)), b"").await), 431);
    refused(&s.raw("POST /echo HTTP/1.1", b"").await, 400, "no_host");
    assert_eq!(status(&s.raw("GET /health HTTP/1.0", b"").await), 200);
    refused(&s.get("/panic").await, 500, "internal_error");
    assert_eq!(status(&s.get("/health").await), 200, "lives on");
}

#[tokio::test]
async fn names_of_strangers_and_their_pages_are_refused() {
    let s = start(Options { hosts: vec!["models.example".into()], ..Options::default() }).await;
    for host in ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "0.0.0.0", "192.168.0.1"] {
        let answer = s.raw(&format!("GET /health HTTP/1.1\r\nHost: {host}"), b"").await;
        refused(&answer, 403, "host_not_allowed");
    }
    for host in ["localhost", "127.0.0.1:99", "[::1]", "models.example"] {
        assert_eq!(status(&s.raw(&format!("GET /health HTTP/1.1\r\nHost: {host}"), b"").await), 200, "{host}");
    }
    refused(&s.raw("GET http://evil.example/health HTTP/1.1\r\nHost: localhost", b"").await, 403, "host_not_allowed");
    // No method, no origin and no asked-for field ever gets a CORS field, and no strange page gets an answer.
    for method in ["OPTIONS", "GET", "POST"] {
        for path in ["/echo", "/health", "*"] {
            for origin in ["https://evil.example", "null", "http://localhost:3000"] {
                let head = format!(
                    "{method} {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\n\
                     Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization"
                );
                let answer = s.raw(&head, b"").await;
                assert!(!answer.to_lowercase().contains("access-control"), "{head}: {answer}");
                let own = origin.contains("localhost");
                assert!(own || status(&answer) >= 400, "{head}: {answer}");
                assert!(method != "OPTIONS" || status(&answer) >= 400, "{head}: {answer}");
            }
        }
    }
}

#[tokio::test]
async fn every_route_but_the_public_ones_wants_the_key() {
    let s = start(Options { keys: Keys::parse("secret"), ..Options::default() }).await;
    let paths =
        ["/slow", "/wait", "/panic", "/events", "/flood", "/silence", "/nothing", "/health/../slow", "//health"];
    for path in paths {
        for key in ["", "\r\nAuthorization: Bearer wrong", "\r\nAuthorization: secret"] {
            let answer = s.raw(&format!("GET {path} HTTP/1.1\r\nHost: localhost{key}"), b"").await;
            refused(&answer, 401, "invalid_api_key");
        }
    }
    refused(&s.raw("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9", b"").await, 401, "invalid_api_key");
    refused(&s.raw("POST /health HTTP/1.1\r\nHost: localhost", b"").await, 401, "invalid_api_key");
    assert_eq!(status(&s.get("/health").await), 200);
    let good = "GET /slow HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret";
    assert_eq!(status(&s.raw(good, b"").await), 200);
}

#[tokio::test]
async fn slow_clients_are_cut() {
    let s = start(quick()).await;
    // A head that trickles: each byte is in time, the whole is not.
    let mut socket = s.connect().await;
    let start = Instant::now();
    for b in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa".chunks(1)
    {
        if socket.write_all(b).await.is_err() {
            break;
        }
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(read_all(&mut socket).await, "");
    assert!(start.elapsed() < Duration::from_secs(5));
    // A body that stops.
    let answer = s.raw("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10", b"abc").await;
    refused(&answer, 408, "body_timeout");
    // A connection that says nothing, and one that says nothing more.
    let mut silent = s.connect().await;
    let mut once = s.connect().await;
    once.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("writes");
    let start = Instant::now();
    assert_eq!(read_all(&mut silent).await, "");
    assert!(start.elapsed() > Duration::from_millis(400), "an idle connection may wait longer than a head");
    assert_eq!(status(&read_all(&mut once).await), 200);
    // One that asks for much and takes nothing.
    let mut greedy = s.connect().await;
    greedy.write_all(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("writes");
    wait_for(&s.open, 1).await;
    wait_for(&s.open, 0).await;
}

/// Waits until so many requests are open.
#[track_caller]
fn wait_for(open: &Arc<AtomicUsize>, wanted: usize) -> impl Future<Output = ()> {
    let open = Arc::clone(open);
    async move {
        let reached = async {
            while open.load(Ordering::SeqCst) != wanted {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(10), reached).await.unwrap_or_else(|_| panic!("never {wanted} open requests"));
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_work() {
    let s = start(Options::default()).await;
    for path in ["/wait", "/events", "/silence"] {
        let mut socket = s.connect().await;
        socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await.expect("writes");
        wait_for(&s.open, 1).await;
        drop(socket);
        wait_for(&s.open, 0).await;
    }
}

#[tokio::test]
async fn silence_in_a_stream_is_filled_with_comments() {
    let s = start(Options { ping_time: Duration::from_millis(50), ..Options::default() }).await;
    let mut socket = s.connect().await;
    socket.write_all(b"GET /silence HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("writes");
    let mut text = String::new();
    let mut buf = [0; 512];
    while text.matches(": ping\n\n").count() < 3 {
        let n = timeout(Duration::from_secs(5), socket.read(&mut buf)).await.expect("in time").expect("reads");
        text.push_str(&String::from_utf8_lossy(&buf[..n]));
    }
    assert!(text.contains("text/event-stream") && text.to_lowercase().contains("cache-control: no-store"), "{text}");
}

#[tokio::test]
async fn idle_sockets_do_not_stop_a_request() {
    let s = start(Options::default()).await;
    let mut idle = Vec::new();
    for i in 0..2000 {
        let mut socket = s.connect().await;
        if i % 2 == 0 {
            socket.write_all(b"GET /health HTTP/1.1\r\nHo").await.expect("writes");
        }
        idle.push(socket);
    }
    let start = Instant::now();
    for _ in 0..20 {
        assert_eq!(status(&s.get("/health").await), 200);
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test]
async fn at_the_cap_the_longest_waiting_makes_room_and_work_goes_on() {
    let s = start(Options { connections: 8, ..Options::default() }).await;
    let mut working = s.connect().await;
    working.write_all(b"GET /slow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.expect("writes");
    wait_for(&s.open, 1).await;
    let mut idle = Vec::new();
    for _ in 0..50 {
        idle.push(s.connect().await);
    }
    assert_eq!(status(&s.get("/health").await), 200);
    assert_eq!(status(&read_all(&mut working).await), 200, "a busy connection is never closed for others");
    assert_eq!(read_all(&mut idle[0]).await, "");
    // Nobody waits: there is no room.
    let mut busy = Vec::new();
    for _ in 0..8 {
        let mut socket = s.connect().await;
        socket.write_all(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("writes");
        busy.push(socket);
    }
    wait_for(&s.open, 8).await;
    let mut late = s.connect().await;
    assert_eq!(status(&read_all(&mut late).await), 503);
}

#[tokio::test]
async fn the_end_lets_answers_finish_and_cuts_what_lasts() {
    let s = start(Options { drain_time: Duration::from_millis(700), ..Options::default() }).await;
    let send = async |path: &str| {
        let mut socket = s.connect().await;
        socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await.expect("writes");
        socket
    };
    let mut slow = send("/slow").await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(send("/events").await);
    }
    let mut wait = send("/wait").await;
    let mut idle = s.connect().await;
    wait_for(&s.open, 22).await;
    s.shutdown.begin();
    let start = Instant::now();
    assert_eq!(read_all(&mut idle).await, "", "a connection without a request is closed at once");
    assert!(start.elapsed() < Duration::from_millis(500));
    refused(&s.get("/health").await, 503, "shutdown");
    let answer = async |socket: &mut TcpStream| read_all(socket).await;
    let slow = answer(&mut slow).await;
    assert!(slow.contains("200 OK"), "{slow}");
    for stream in &mut streams {
        let text = answer(stream).await;
        assert!(text.contains("data: 1") && text.contains("\"code\":\"shutdown\""), "{text}");
        assert!(text.contains("data: [DONE]") && text.ends_with("0\r\n\r\n"), "{text}");
    }
    assert_eq!(status(&answer(&mut wait).await), 503);
    timeout(Duration::from_secs(5), s.task).await.expect("ends").expect("no panic").expect("no error");
    // The sample's streams look for their client every 40 ms.
    wait_for(&s.open, 0).await;
}

#[tokio::test]
async fn without_work_the_end_is_at_once() {
    let s = start(Options::default()).await;
    let _idle = s.connect().await;
    s.shutdown.begin();
    timeout(Duration::from_secs(1), s.task).await.expect("ends").expect("no panic").expect("no error");
}
