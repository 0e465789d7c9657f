//! What the agent knows of the cluster, written down for a start while the store
//! is away.
//!
//! What changes is written a while later, together with what else has changed
//! by then: a large cluster changes all the time. A stop writes at once.

use std::time::Duration;

use flannel_core::host::{Firewall, Network};
use flannel_core::lease::{Expiry, Lease};
use flannel_core::memory::Memory;
use flannel_core::store::{LeaseEvent, LeaseStore, Snapshot};
use tokio::time::Instant;

use super::{Agent, Input, Need, now};
use crate::state_dir::{StateDir, StateError};

/// After the first change in a while: what comes with it is written together.
const SOON: Duration = Duration::from_secs(1);

/// Between two writes, at least.
const PAUSE: Duration = Duration::from_secs(30);

/// And for each lease so much more, so that writing takes no more than a
/// thousandth of the time.
const PAUSE_PER_LEASE: Duration = Duration::from_millis(2);

/// When to write.
#[derive(Debug, Default)]
pub(super) struct Note {
    due: Option<Instant>,
    /// Not before that.
    earliest: Option<Instant>,
    /// Whether a write is under way.
    writing: bool,
}

impl Note {
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.filter(|_| !self.writing)
    }
}

impl<S: LeaseStore, N: Network, F: Firewall> Agent<S, N, F> {
    /// Begins with what this host remembers, if the store is away.
    pub(super) async fn recall(&mut self) {
        let Some(peers) = self.parts.recalled.take() else { return };
        let leases = peers.into_iter().chain([self.parts.held.lease.clone()]).collect();
        self.view.apply(LeaseEvent::Snapshot(Snapshot { leases, unreadable: vec![] }));
        self.listed = true;
        // Of a restart the kernel has seen more than the last note.
        self.parts.reconciler.trust_kernel(true);
        self.confirm();
        self.needs(Need::Plan);
        self.settle().await;
    }

    /// Something has changed that is worth remembering.
    pub(super) fn news(&mut self) {
        if self.parts.state.is_some() && self.note.due.is_none() {
            let soon = Instant::now() + SOON;
            self.note.due = Some(self.note.earliest.map_or(soon, |earliest| earliest.max(soon)));
        }
    }

    /// Starts writing.
    pub(super) fn remember(&mut self) {
        let Some(state) = self.parts.state.clone() else { return };
        self.note.due = None;
        self.note.writing = true;
        let memory = self.memory(&state);
        let leases = u32::try_from(memory.peers.len()).unwrap_or(u32::MAX);
        self.note.earliest = Some(Instant::now() + PAUSE + PAUSE_PER_LEASE * leases);
        self.spawn(async move { Input::Remembered(state.remember_beside(memory).await) });
    }

    pub(super) fn take_remembered(&mut self, result: Result<(), StateError>) {
        self.note.writing = false;
        self.said.note(&result);
        if result.is_err() {
            // A disk that has room again should not have to wait for long.
            self.note.earliest = self.note.earliest.and_then(|earliest| earliest.checked_sub(PAUSE));
            self.news();
        }
    }

    /// Writes what is not written yet, if anything.
    pub(super) fn remember_at_last(&mut self) {
        // A write that is under way has nearly all of it, and two must not meet.
        if self.note.due().is_none() {
            return;
        }
        if let Some(state) = &self.parts.state {
            let result = state.remember(&self.memory(state));
            self.said.note(&result);
        }
    }

    fn memory(&self, state: &StateDir) -> Memory {
        let own: Lease = self.parts.held.lease.clone();
        let written = state.now();
        let expires = match self.keeper.expiry() {
            Expiry::Never => None,
            Expiry::At(end) => Some(written + end.saturating_duration_since(now()).as_secs()),
        };
        Memory {
            prefix: state.prefix().to_owned(),
            config: self.parts.config.text.to_string(),
            handle: self.parts.held.handle,
            peers: self.view.peers(own.subnet).collect(),
            own,
            written,
            expires,
        }
    }
}
