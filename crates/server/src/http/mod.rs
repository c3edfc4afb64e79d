//! HTTP without a framework: an [`App`] has a table of routes and answers requests; this module owns the sockets.
//!
//! Every request passes the same checks in the same order before its route is looked at: the head's size, the name under
//! which the server is called, the page that it comes from, the key. See [`Options`] for the limits, [`Shutdown`] for
//! the end.

mod body;
mod connection;
mod options;
mod shutdown;
mod timed;

pub use body::EVENTS;
pub use connection::{error, serve};
pub use hyper::{
    Method, StatusCode,
    body::Bytes,
    header::{self, HeaderMap, HeaderName, HeaderValue},
};
pub use options::{Keys, Options};
pub use shutdown::{Phase, Shutdown};

use std::{future::Future, pin::Pin};
use tokio::sync::mpsc;

/// A boxed future that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A request with its whole body.
#[derive(Debug)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The path, as sent.
    pub path: String,
    /// What stands behind `?`, or nothing.
    pub query: String,
    /// The header fields.
    pub headers: HeaderMap,
    /// The body, at most as long as the limits allow.
    pub body: Bytes,
}

/// An answer.
#[derive(Debug)]
pub enum Reply {
    /// A body that is known.
    Full {
        /// The status.
        status: StatusCode,
        /// The type of the body.
        content_type: &'static str,
        /// Further header fields.
        headers: Vec<(HeaderName, HeaderValue)>,
        /// The body.
        body: Bytes,
    },
    /// A body that comes in pieces; status 200. The receiver is dropped when the client leaves.
    Stream {
        /// The type of the body.
        content_type: &'static str,
        /// Its pieces; the end of the channel is the end of the body.
        chunks: mpsc::Receiver<Bytes>,
    },
}

impl Reply {
    /// A JSON text.
    pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self::Full { status, content_type: "application/json", headers: Vec::new(), body: body.into() }
    }

    /// The status that the client will see.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Full { status, .. } => *status,
            Self::Stream { .. } => StatusCode::OK,
        }
    }
}

/// A line of the table of routes.
#[derive(Clone, Debug)]
pub struct Route {
    /// The method.
    pub method: Method,
    /// The whole path; one that ends in `/*` stands for all paths below it.
    pub path: &'static str,
    /// Whether it is answered without an API key.
    pub public: bool,
    /// What it does, for the list that is printed and documented.
    pub about: &'static str,
}

impl Route {
    /// Whether `path` is this route's.
    pub fn matches(&self, path: &str) -> bool {
        match self.path.strip_suffix('*') {
            Some(prefix) => path.starts_with(prefix),
            None => path == self.path,
        }
    }
}

/// What answers requests.
pub trait App: Send + Sync + 'static {
    /// The table of routes.
    fn routes(&self) -> &[Route];

    /// Answers a request to the route of that index. Dropping the future, or the receiver of a stream, ends the work.
    fn call(&self, route: usize, request: Request) -> BoxFuture<'static, Reply>;
}

#[cfg(test)]
mod tests;
