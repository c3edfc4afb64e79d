//! The end of the server: no new work, a while for what is under way, then the end.

use tokio::sync::watch;

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Everything is answered.
    Open,
    /// Requests that came before are answered, new ones refused with 503.
    Draining,
    /// Streams get a last event and end.
    Over,
}

/// Tells all parts of the server how far its end has come; clones are one.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Sender<Phase>);

impl Default for Shutdown {
    fn default() -> Self {
        Self(watch::Sender::new(Phase::Open))
    }
}

impl Shutdown {
    /// Where it stands.
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Takes no new work.
    pub fn begin(&self) {
        self.reach(Phase::Draining);
    }

    /// Ends what is still under way.
    pub(super) fn cut(&self) {
        self.reach(Phase::Over);
    }

    fn reach(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let later = *now < phase;
            *now = phase.max(*now);
            later
        });
    }

    /// Ready once `phase` is reached.
    pub fn reached(&self, phase: Phase) -> impl Future<Output = ()> + Send + 'static {
        let mut receiver = self.0.subscribe();
        let keep = self.clone();
        async move {
            // An error means that no sender is left; `keep` is one.
            let _ = receiver.wait_for(|now| *now >= phase).await;
            drop(keep);
        }
    }

    /// Begins the end at the first SIGTERM, SIGINT or Ctrl-C; the second ends the program at once, with exit code 130.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub async fn on_signals(self) -> std::io::Result<()> {
        let mut signals = Signals::new()?;
        signals.next().await;
        tracing::info!("ending: answers under way are finished, a second signal stops at once");
        self.begin();
        signals.next().await;
        std::process::exit(130);
    }
}

#[cfg(unix)]
struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        // Without a handler there is nothing to wait for but the end of the program.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
