//! Word to systemd that the host's path to the cluster stands.

use sd_notify::NotifyState;
use tracing::warn;

/// Sends `READY=1` if systemd asked for it.
pub fn ready() {
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        warn!(%error, "systemd was not told that the host is ready");
    }
}
