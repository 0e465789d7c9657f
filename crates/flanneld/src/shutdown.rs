//! SIGINT and SIGTERM as a future.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that the first SIGINT or SIGTERM cancels. A second one ends the
/// process where it stands, as it would without a handler.
///
/// # Errors
/// The handlers cannot be installed.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => SignalKind::interrupt(),
                _ = terminate.recv() => SignalKind::terminate(),
            }
        };
        let first = next().await;
        tracing::info!(signal = first.as_raw_value(), "stopping; kernel and lease stay as they are");
        token.cancel();
        let second = next().await;
        std::process::exit(128 + second.as_raw_value());
    });
    Ok(stop)
}
