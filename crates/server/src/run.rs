//! The whole server on one thread for sockets, beside the engine's.

use crate::{
    api::Lacuna,
    http::{self, Phase, Shutdown},
};
use std::{io, net::SocketAddr, sync::Arc};
use tokio::net::TcpListener;

/// Threads for parsing, cutting into tokens, templates and grammars.
const ASIDE: usize = 8;

/// Serves `app` at `address` (`host:port`) until a signal ends it; `ready` is told the address that was taken.
///
/// # Errors
/// The address cannot be taken, or the system gives no threads.
pub fn run(app: Arc<Lacuna>, address: &str, options: http::Options, ready: impl FnOnce(SocketAddr)) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(ASIDE).build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await?;
        ready(listener.local_addr()?);
        let shutdown = Shutdown::default();
        let signals = shutdown.clone().on_signals();
        tokio::spawn(async move {
            if let Err(e) = signals.await {
                tracing::error!("signals are not handled: {e}");
            }
        });
        let (begins, closing) = (shutdown.reached(Phase::Draining), app.clone());
        tokio::spawn(async move {
            begins.await;
            closing.close();
        });
        http::serve(listener, app, options, shutdown).await
    })
}
