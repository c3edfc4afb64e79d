//! Answers as server-sent events.

use super::{Running, State, answer::Answers};
use crate::http::{Bytes, EVENTS, Reply};
use serde_json::Value;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Pieces that wait for a slow client; then the stream waits.
const PIECES: usize = 16;
/// News that become one piece at most.
const TOGETHER: usize = 64;

/// The stream of a request. When the client leaves, `running` is dropped, which ends its work.
pub(super) fn reply<A: Answers>(state: Arc<State>, mut running: Running, mut answers: A) -> Reply {
    let (send, chunks) = mpsc::channel::<Bytes>(PIECES);
    tokio::spawn(async move {
        let mut text = written(answers.begin());
        loop {
            if !text.is_empty() && send.send(Bytes::from(std::mem::take(&mut text))).await.is_err() {
                return;
            }
            let news = tokio::select! {
                news = running.next() => news,
                () = send.closed() => return,
            };
            let Some((index, event)) = news else { break };
            answers.take(&state, index, event);
            text = written(answers.tell(index));
            for _ in 1..TOGETHER {
                let Some((index, event)) = running.ready() else { break };
                answers.take(&state, index, event);
                text.push_str(&written(answers.tell(index)));
            }
        }
        text = written(answers.common().usage::<A>());
        text.push_str("data: [DONE]\n\n");
        // A client that is gone misses nothing.
        let _ = send.send(Bytes::from(text)).await;
    });
    Reply::Stream { content_type: EVENTS, chunks }
}

fn written(values: impl IntoIterator<Item = Value>) -> String {
    values.into_iter().map(|v| format!("data: {v}\n\n")).collect()
}
