//! Bodies of answers.

use super::{Bytes, Reply, StatusCode};
use hyper::{
    Response,
    body::{Frame, SizeHint},
    header,
};
use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::sync::mpsc;

/// The body of an answer: whole, or in pieces.
#[derive(Debug)]
pub enum Body {
    /// What is left of a whole one.
    Whole(Option<Bytes>),
    /// Pieces as they come.
    Pieces(mpsc::Receiver<Bytes>),
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Pieces(pieces) => pieces.poll_recv(cx).map(|piece| piece.map(|b| Ok(Frame::data(b)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Pieces(_) => SizeHint::default(),
        }
    }
}

impl From<Reply> for Response<Body> {
    fn from(reply: Reply) -> Self {
        let (status, content_type, fields, body) = match reply {
            Reply::Full { status, content_type, headers, body } => {
                (status, content_type, headers, Body::Whole(Some(body).filter(|b| !b.is_empty())))
            }
            Reply::Stream { content_type, chunks } => {
                let fields = vec![(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"))];
                (StatusCode::OK, content_type, fields, Body::Pieces(chunks))
            }
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
        fields.into_iter().for_each(|(name, value)| {
            response.headers_mut().insert(name, value);
        });
        response
    }
}
