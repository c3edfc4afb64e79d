//! The loop that accepts connections, and one connection.

use super::{App, Body, Method, Reply, Request, Route, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::{Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, future::Future, io, sync::Arc, time::Duration};
use tokio::net::TcpListener;

/// Longest body of a request, in bytes.
pub const MAX_BODY: usize = 16 << 20;

/// Accepts connections until `shutdown` is ready.
///
/// # Errors
/// If the listener fails.
pub async fn serve(listener: TcpListener, app: Arc<dyn App>, shutdown: impl Future<Output = ()>) -> io::Result<()> {
    tokio::pin!(shutdown);
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted?.0,
            () = &mut shutdown => return Ok(()),
        };
        // An answer in pieces is written piece by piece; a socket that refuses the option still works.
        let _ = stream.set_nodelay(true);
        let app = app.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(app.clone(), request));
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(10));
            if let Err(e) = builder.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!("connection: {e}");
            }
        });
    }
}

async fn answer(app: Arc<dyn App>, request: hyper::Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let route = match find(app.routes(), &parts.method, &path) {
        Ok(route) => route,
        Err((status, message)) => return Ok(refusal(status, message).into()),
    };
    let body = match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return Ok(refusal(StatusCode::PAYLOAD_TOO_LARGE, "the body is too long or broke off").into()),
    };
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let request = Request { method: parts.method, path, query, headers: parts.headers, body };
    Ok(app.call(route, request).await.into())
}

/// The index of the route, or why there is none.
fn find(routes: &[Route], method: &Method, path: &str) -> Result<usize, (StatusCode, &'static str)> {
    match routes.iter().position(|r| r.method == *method && r.matches(path)) {
        Some(route) => Ok(route),
        None if routes.iter().any(|r| r.matches(path)) => {
            Err((StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method"))
        }
        None => Err((StatusCode::NOT_FOUND, "no such path")),
    }
}

/// An error in the form that clients know.
fn refusal(status: StatusCode, message: &str) -> Reply {
    let error = serde_json::json!({
        "error": { "message": message, "type": "invalid_request_error", "param": null, "code": status.as_u16() }
    });
    Reply::json(status, error.to_string())
}
