//! Answers as server-sent events.

use super::{Running, State};
use crate::{
    http::{Bytes, EVENTS, Reply},
    schedule::Event,
};
use serde_json::Value;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Pieces that wait for a slow client; then the stream waits.
const PIECES: usize = 16;
/// News that become one piece at most.
const TOGETHER: usize = 64;

/// Turns news into events.
pub(super) trait Events: Send + 'static {
    /// What is sent at once.
    fn begin(&mut self) -> Vec<Value>;

    /// What news of an answer become.
    fn news(&mut self, state: &State, index: usize, event: Event) -> Vec<Value>;

    /// What is sent at the end.
    fn end(&mut self) -> Vec<Value>;
}

/// The stream of a request. When the client leaves, `running` is dropped, which ends its work.
pub(super) fn reply(state: Arc<State>, mut running: Running, mut events: impl Events) -> Reply {
    let (send, chunks) = mpsc::channel::<Bytes>(PIECES);
    tokio::spawn(async move {
        let mut text = written(events.begin());
        loop {
            if !text.is_empty() && send.send(Bytes::from(std::mem::take(&mut text))).await.is_err() {
                return;
            }
            let news = tokio::select! {
                news = running.next() => news,
                () = send.closed() => return,
            };
            let Some((index, event)) = news else { break };
            text = written(events.news(&state, index, event));
            for _ in 1..TOGETHER {
                let Some((index, event)) = running.ready() else { break };
                text.push_str(&written(events.news(&state, index, event)));
            }
        }
        text = written(events.end());
        text.push_str("data: [DONE]\n\n");
        // A client that is gone misses nothing.
        let _ = send.send(Bytes::from(text)).await;
    });
    Reply::Stream { content_type: EVENTS, chunks }
}

fn written(values: Vec<Value>) -> String {
    values.into_iter().map(|v| format!("data: {v}\n\n")).collect()
}
