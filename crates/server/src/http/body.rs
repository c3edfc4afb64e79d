//! Bodies of answers.

use super::{Bytes, Phase, Reply, Shutdown, StatusCode, timed::Busy};
use hyper::{
    Response,
    body::{Frame, SizeHint},
    header,
};
use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{Instant, Sleep, sleep},
};

/// The type of a stream of events.
pub const EVENTS: &str = "text/event-stream";

/// What keeps a silent stream open; clients skip comments.
const PING: Bytes = Bytes::from_static(b": ping\n\n");
/// The last event of a stream that the end of the server cuts.
const LAST: Bytes = Bytes::from_static(
    b"data: {\"error\":{\"message\":\"the server is ending\",\"type\":\"server_error\",\"param\":null,\
      \"code\":\"shutdown\"}}\n\ndata: [DONE]\n\n",
);

/// The body of an answer: whole, or in pieces.
pub struct Body {
    kind: Kind,
    /// The connection is busy until its answer is written.
    _busy: Busy,
}

enum Kind {
    /// What is left of a whole one.
    Whole(Option<Bytes>),
    /// Pieces as they come.
    Pieces(Box<Pieces>),
    /// Nothing is left.
    Done,
}

struct Pieces {
    chunks: mpsc::Receiver<Bytes>,
    /// Only streams of events have comments and a last event.
    events: bool,
    every: Duration,
    silence: Pin<Box<Sleep>>,
    over: super::BoxFuture<'static, ()>,
}

/// What comes next in a stream.
enum Next {
    Piece(Bytes),
    End,
    /// The server ends before the stream does.
    Cut,
}

impl Pieces {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        if let Poll::Ready(piece) = self.chunks.poll_recv(cx) {
            self.silence.as_mut().reset(Instant::now() + self.every);
            return Poll::Ready(piece.map_or(Next::End, Next::Piece));
        }
        if self.over.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Next::Cut);
        }
        if self.events && self.silence.as_mut().poll(cx).is_ready() {
            self.silence.as_mut().reset(Instant::now() + self.every);
            return Poll::Ready(Next::Piece(PING));
        }
        Poll::Pending
    }
}

impl Body {
    /// The answer as hyper takes it. `ping`: silence after which a stream of events gets a comment.
    pub(super) fn response(reply: Reply, busy: Busy, ping: Duration, shutdown: &Shutdown) -> Response<Self> {
        let (status, content_type, fields, kind) = match reply {
            Reply::Full { status, content_type, headers, body } => {
                (status, content_type, headers, Kind::Whole(Some(body).filter(|b| !b.is_empty())))
            }
            Reply::Stream { content_type, chunks } => {
                let fields = vec![(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"))];
                let pieces = Pieces {
                    chunks,
                    events: content_type.starts_with(EVENTS),
                    every: ping,
                    silence: Box::pin(sleep(ping)),
                    over: Box::pin(shutdown.reached(Phase::Over)),
                };
                (StatusCode::OK, content_type, fields, Kind::Pieces(Box::new(pieces)))
            }
        };
        let mut response = Response::new(Self { kind, _busy: busy });
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
        fields.into_iter().for_each(|(name, value)| {
            response.headers_mut().insert(name, value);
        });
        response
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        let frame = match &mut this.kind {
            Kind::Whole(bytes) => bytes.take(),
            Kind::Pieces(pieces) => match pieces.poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Next::Piece(piece)) => Some(piece),
                Poll::Ready(end) => {
                    let last = (pieces.events && matches!(end, Next::Cut)).then_some(LAST);
                    this.kind = Kind::Done;
                    last
                }
            },
            Kind::Done => None,
        };
        Poll::Ready(frame.map(|b| Ok(Frame::data(b))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.kind, Kind::Whole(None) | Kind::Done)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Kind::Pieces(_) => SizeHint::default(),
            Kind::Done => SizeHint::with_exact(0),
        }
    }
}
