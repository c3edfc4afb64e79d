//! The loop that accepts connections, and what every request passes before its route answers.

use super::{
    App, BoxFuture, HeaderName, HeaderValue, Method, Options, Phase, Reply, Request, Route, Shutdown, StatusCode,
    body::Body,
    header,
    timed::{Busy, Entry, Registry, Timed},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{
    Response,
    body::{Body as _, Bytes, Incoming},
    http::request::Parts,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    future::Future,
    io,
    net::IpAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

/// What is sent where no place is left, without looking at the request.
const FULL: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
/// How long cut answers may take to leave.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How often the end looks whether all answers are out.
const TICK: Duration = Duration::from_millis(10);

/// What connections share.
struct Server {
    app: Arc<dyn App>,
    options: Options,
    shutdown: Shutdown,
    registry: Arc<Registry>,
}

/// Answers connections until `shutdown` begins, then finishes what is under way: new requests get 503; after
/// `options.drain_time` streams get a last event and requests without an answer 503.
///
/// # Errors
/// None now; a listener that fails is tried again.
pub async fn serve(listener: TcpListener, app: Arc<dyn App>, options: Options, shutdown: Shutdown) -> io::Result<()> {
    let server = Arc::new(Server { app, options, shutdown, registry: Arc::default() });
    let end = drain(&server);
    tokio::pin!(end);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut end => return Ok(()),
        };
        match accepted {
            Ok((stream, _)) => match server.registry.enter(server.options.connections) {
                Some(entry) => drop(tokio::spawn(connection(Arc::clone(&server), stream, entry))),
                // Everybody is busy. The socket's buffer is empty, so this needs no waiting.
                None => drop(stream.try_write(FULL)),
            },
            // Mostly: no file descriptor is left. A connection that waits gives its own.
            Err(e) => {
                tracing::warn!("accepting a connection: {e}");
                server.registry.make_room();
                sleep(TICK).await;
            }
        }
    }
}

/// Ready when the server may end.
async fn drain(server: &Server) {
    server.shutdown.reached(Phase::Draining).await;
    server.registry.close_waiting();
    let quiet = async {
        while server.registry.busy() > 0 {
            sleep(TICK).await;
        }
    };
    tokio::pin!(quiet);
    if timeout(server.options.drain_time, &mut quiet).await.is_err() {
        tracing::warn!(answers = server.registry.busy(), "the time to finish is over: cutting");
        server.shutdown.cut();
        // Clients that do not even take their last event are left.
        let _ = timeout(LAST_WORDS, &mut quiet).await;
    }
    // Streams that were open when the end began have not said that they are the last of their connection.
    server.registry.close_waiting();
}

async fn connection(server: Arc<Server>, stream: TcpStream, entry: Entry) {
    // An answer in pieces is written piece by piece; a socket that refuses the option still works.
    let _ = stream.set_nodelay(true);
    let local = stream.local_addr().ok().map(|a| a.ip());
    let conn = Arc::clone(&entry.conn);
    let io = TokioIo::new(Timed::new(stream, Arc::clone(&conn), &server.options));
    let service = service_fn(|request| {
        let (server, busy) = (Arc::clone(&server), conn.busy());
        async move { Ok::<_, Infallible>(answer(&server, local, request, busy).await) }
    });
    let mut builder = http1::Builder::new();
    // The deadlines are the socket's own: they tell an idle connection from a slow head.
    builder.timer(TokioTimer::new()).header_read_timeout(None);
    builder.max_buf_size(server.options.head_bytes.max(8 << 10) * 2).max_headers(256);
    let http = builder.serve_connection(io, service);
    tokio::pin!(http);
    let result = tokio::select! {
        result = http.as_mut() => result,
        () = entry.conn.closed() => {
            if !entry.conn.is_busy() {
                return;
            }
            http.as_mut().graceful_shutdown();
            http.await
        }
    };
    if let Err(e) = result {
        tracing::debug!("connection: {e}");
    }
}

async fn answer(
    server: &Server,
    local: Option<IpAddr>,
    request: hyper::Request<Incoming>,
    busy: Busy,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let shutdown = &server.shutdown;
    let reply = if shutdown.phase() == Phase::Open {
        match admit(server, local, &parts) {
            Ok(route) => respond(server, route, parts, body).await,
            Err(refusal) => refusal,
        }
    } else {
        ending()
    };
    let mut response = Body::response(reply, busy, server.options.ping_time, shutdown);
    if shutdown.phase() != Phase::Open {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The checks that all requests pass, and the index of the route.
fn admit(server: &Server, local: Option<IpAddr>, parts: &Parts) -> Result<usize, Reply> {
    let options = &server.options;
    let size: usize = parts.headers.iter().map(|(n, v)| n.as_str().len() + v.len() + 4).sum();
    if size + parts.uri.path_and_query().map_or(0, |p| p.as_str().len()) > options.head_bytes {
        let most = options.head_bytes;
        let message = format!("the head of the request is longer than {most} bytes");
        return Err(error(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large", &message));
    }
    addressed(options, local, parts)?;
    let routes = server.app.routes();
    let path = parts.uri.path();
    let method = if parts.method == Method::HEAD { &Method::GET } else { &parts.method };
    let route = routes.iter().position(|r| r.method == *method && r.matches(path));
    let public = route.is_some_and(|r| routes[r].public);
    // Without a key nobody learns which paths there are.
    if !public && !options.keys.admit(&parts.headers) {
        let message = "an API key is needed: `Authorization: Bearer KEY`; a browser asks its user for it as a password";
        let refusal = error(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
        // Only what a user navigates to wants HTML: scripts get no dialog of the browser.
        let wanted = parts.headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("");
        let scheme = if wanted.contains("text/html") { "Basic realm=\"API key as password\"" } else { "Bearer" };
        return Err(with(refusal, header::WWW_AUTHENTICATE, scheme));
    }
    route.ok_or_else(|| missing(routes, path))
}

/// Whether the request calls this server by one of its names, from no page of another one.
fn addressed(options: &Options, local: Option<IpAddr>, parts: &Parts) -> Result<(), Reply> {
    let text = |name: HeaderName| parts.headers.get(name).map(|v| v.to_str().unwrap_or(""));
    let named = parts.uri.authority().map(|a| a.as_str()).or_else(|| text(header::HOST));
    let refuse = |what: String| Err(error(StatusCode::FORBIDDEN, "host_not_allowed", &what));
    match named {
        Some(host) if options.knows_host(host, local) => {}
        Some(host) => {
            let host: String = host.chars().take(100).collect();
            return refuse(format!("this server does not answer to the name {host:?}; `--allowed-hosts` adds names"));
        }
        None if parts.version == hyper::Version::HTTP_10 => {}
        None => return Err(error(StatusCode::BAD_REQUEST, "no_host", "the request has no field Host")),
    }
    // Browsers say which page asks. There is no CORS, so a strange page could not read the answer; it may not ask either.
    if let Some(origin) = text(header::ORIGIN) {
        let host = origin.split_once("://").map_or("", |(_, host)| host);
        if !options.knows_host(host, local) {
            let origin: String = origin.chars().take(100).collect();
            return refuse(format!("pages of {origin:?} may not use this server; `--allowed-hosts` adds names"));
        }
    }
    Ok(())
}

/// 404, or 405 with the methods of the path.
fn missing(routes: &[Route], path: &str) -> Reply {
    let mut methods: Vec<&str> = routes.iter().filter(|r| r.matches(path)).map(|r| r.method.as_str()).collect();
    if methods.is_empty() {
        return error(StatusCode::NOT_FOUND, "not_found", "no such path");
    }
    if methods.contains(&"GET") {
        methods.push("HEAD");
    }
    let refusal = error(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path does not take this method");
    match HeaderValue::from_str(&methods.join(", ")) {
        Ok(value) => add(refusal, header::ALLOW, value),
        Err(_) => refusal,
    }
}

async fn respond(server: &Server, route: usize, parts: Parts, body: Incoming) -> Reply {
    let body = match collect(&server.options, body).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    let request = Request {
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        method: parts.method,
        headers: parts.headers,
        body,
    };
    let answer = match catch_unwind(AssertUnwindSafe(|| server.app.call(route, request))) {
        Ok(future) => Caught(future),
        Err(_) => return panicked(),
    };
    tokio::select! {
        biased;
        reply = answer => reply.unwrap_or_else(|_| panicked()),
        () = server.shutdown.reached(Phase::Over) => ending(),
    }
}

/// The whole body, if it is neither too long nor too slow.
async fn collect(options: &Options, body: Incoming) -> Result<Bytes, Reply> {
    let most = options.body_bytes;
    let long = || {
        let message = format!("the body is longer than {most} bytes");
        error(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", &message)
    };
    if body.size_hint().lower() > most as u64 {
        return Err(long());
    }
    match timeout(options.body_time, Limited::new(body, most).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(long()),
        Ok(Err(_)) => Err(error(StatusCode::BAD_REQUEST, "body_broken", "the body broke off")),
        Err(_) => {
            let message = format!("the body took more than {:?}", options.body_time);
            Err(error(StatusCode::REQUEST_TIMEOUT, "body_timeout", &message))
        }
    }
}

/// A future whose panic is an error: one request fails, the others go on.
struct Caught(BoxFuture<'static, Reply>);

impl Future for Caught {
    type Output = Result<Reply, ()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(_) => Poll::Ready(Err(())),
        }
    }
}

/// An error as OpenAI's clients know it.
pub fn error(status: StatusCode, code: &str, message: &str) -> Reply {
    let kind = match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    let body = serde_json::json!({ "error": { "message": message, "type": kind, "param": null, "code": code } });
    Reply::json(status, body.to_string())
}

fn panicked() -> Reply {
    error(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal_error",
        "the server failed on this request; others are not affected",
    )
}

fn ending() -> Reply {
    let reply = error(StatusCode::SERVICE_UNAVAILABLE, "shutdown", "the server is ending");
    with(reply, header::RETRY_AFTER, "5")
}

fn with(reply: Reply, name: HeaderName, value: &'static str) -> Reply {
    add(reply, name, HeaderValue::from_static(value))
}

fn add(mut reply: Reply, name: HeaderName, value: HeaderValue) -> Reply {
    if let Reply::Full { headers, .. } = &mut reply {
        headers.push((name, value));
    }
    reply
}
