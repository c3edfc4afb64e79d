//! A socket that gives up on clients that are too slow, and the list of all sockets.

use super::Options;
use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::Notify,
    time::{Instant, Sleep, sleep_until},
};

/// What a connection is doing, for the two that must know: its socket and the list.
#[derive(Debug)]
pub(super) struct Conn {
    state: Mutex<State>,
    close: Notify,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No byte of a request has come since then.
    Idle(Instant),
    /// A request began then, its head is not complete.
    Head(Instant),
    /// A request is read or answered.
    Busy,
}

/// Nothing that holds these locks can panic, so a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Conn {
    fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::Idle(Instant::now())), close: Notify::new() })
    }

    /// The head of a request is complete. The guard marks the end of its answer.
    pub(super) fn busy(self: &Arc<Self>) -> Busy {
        *lock(&self.state) = State::Busy;
        Busy(Arc::clone(self))
    }

    /// Whether a request is read or answered now.
    pub(super) fn is_busy(&self) -> bool {
        *lock(&self.state) == State::Busy
    }

    /// Ready when the connection has to go.
    pub(super) async fn closed(&self) {
        self.close.notified().await;
    }

    fn waiting_since(&self) -> Option<Instant> {
        match *lock(&self.state) {
            State::Idle(t) | State::Head(t) => Some(t),
            State::Busy => None,
        }
    }
}

/// As long as it lives, its connection is busy.
#[derive(Debug)]
pub(super) struct Busy(Arc<Conn>);

impl Drop for Busy {
    fn drop(&mut self) {
        *lock(&self.0.state) = State::Idle(Instant::now());
    }
}

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Registry {
    all: Mutex<HashMap<u64, Arc<Conn>>>,
    next: AtomicU64,
}

/// A place in the list, given back when dropped.
#[derive(Debug)]
pub(super) struct Entry {
    registry: Arc<Registry>,
    id: u64,
    pub(super) conn: Arc<Conn>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.registry.all).remove(&self.id);
    }
}

impl Registry {
    /// A place for a new connection. Where all `most` are taken, the connection that has waited longest without a request
    /// makes room; where all are busy, there is none.
    pub(super) fn enter(self: &Arc<Self>, most: usize) -> Option<Entry> {
        let mut all = lock(&self.all);
        if all.len() >= most && !Self::evict(&mut all) {
            return None;
        }
        let conn = Conn::new();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        all.insert(id, Arc::clone(&conn));
        Some(Entry { registry: Arc::clone(self), id, conn })
    }

    /// Closes the connection that has waited longest; false where none waits.
    pub(super) fn make_room(&self) -> bool {
        Self::evict(&mut lock(&self.all))
    }

    fn evict(all: &mut HashMap<u64, Arc<Conn>>) -> bool {
        let oldest = all.iter().filter_map(|(id, c)| Some((c.waiting_since()?, *id))).min();
        let Some(conn) = oldest.and_then(|(_, id)| all.remove(&id)) else { return false };
        conn.close.notify_one();
        true
    }

    /// Connections whose request is read or answered.
    pub(super) fn busy(&self) -> usize {
        lock(&self.all).values().filter(|c| c.is_busy()).count()
    }

    /// Closes all connections that wait for a request.
    pub(super) fn close_waiting(&self) {
        lock(&self.all).values().filter(|c| !c.is_busy()).for_each(|c| c.close.notify_one());
    }
}

/// A socket with deadlines: for the first byte of a request, for its head, and for taking an answer.
pub(super) struct Timed {
    stream: TcpStream,
    conn: Arc<Conn>,
    limits: (Duration, Duration, Duration),
    read: Pin<Box<Sleep>>,
    write: Option<Pin<Box<Sleep>>>,
}

impl Timed {
    pub(super) fn new(stream: TcpStream, conn: Arc<Conn>, options: &Options) -> Self {
        let limits = (options.idle_time, options.head_time, options.write_time);
        Self { stream, conn, limits, read: Box::pin(sleep_until(Instant::now() + limits.0)), write: None }
    }

    /// When the client must have sent something, if it must.
    fn deadline(&self) -> Option<Instant> {
        match *lock(&self.conn.state) {
            State::Idle(since) => Some(since + self.limits.0),
            State::Head(since) => Some(since + self.limits.1),
            State::Busy => None,
        }
    }

    /// An error if the client has taken nothing for too long.
    fn written<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.write = None;
            return result;
        }
        let until = Instant::now() + self.limits.2;
        let sleep = self.write.get_or_insert_with(|| Box::pin(sleep_until(until)));
        match sleep.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(late("takes nothing of its answer"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

fn late(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("the client {what}"))
}

impl AsyncRead for Timed {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let result = Pin::new(&mut this.stream).poll_read(cx, buf);
        if result.is_ready() {
            let mut state = lock(&this.conn.state);
            if buf.filled().len() > before && matches!(*state, State::Idle(_)) {
                *state = State::Head(Instant::now());
            }
        }
        // A trickle of bytes does not move the deadline of a head, so it is looked at after every read.
        let Some(deadline) = this.deadline() else { return result };
        if this.read.deadline() != deadline {
            this.read.as_mut().reset(deadline);
        }
        match this.read.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(late("sends no request"))),
            Poll::Pending => result,
        }
    }
}

impl AsyncWrite for Timed {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.written(cx, result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
