//! Taking a lease, however long it takes.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use flannel_core::chain::chain;
use flannel_core::lease::{HeldLease, LeaseAttrs, Subnet};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{LeaseEvent, LeaseStore, LeaseWatch, StoreError};
use tracing::{info, warn};

/// Delays between attempts: 100 ms at first, 5 s at most, for ever. The jitter adds up to as much again.
pub(crate) fn delays() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(2500))
        .with_jitter()
        .without_max_times()
        .build()
}

/// How often a full range makes us look whether the network config has been changed.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// The network config was changed while we waited for room in the range.
#[derive(Clone, Copy, Debug)]
pub struct Reconfigured;

/// Takes a subnet for this host, waiting for as long as the store is away or
/// the range is full. Says once what it waits for.
///
/// # Errors
/// The range was full and is another one now.
pub async fn acquire<S: LeaseStore>(
    store: &S,
    config: &NetworkConfig,
    attrs: &LeaseAttrs,
    previous: Option<Subnet>,
) -> Result<HeldLease, Reconfigured> {
    let (mut said, mut waits) = (None, delays());
    loop {
        let error = match store.acquire(config, attrs, previous).await {
            Ok(held) => return Ok(held),
            Err(error) => error,
        };
        if said.replace(error.trouble()) != Some(error.trouble()) {
            warn!(error = %chain(&error), "waiting for a lease");
        }
        if let StoreError::Exhausted { leased, .. } = error {
            // The watch is made for this wait alone, so it may be dropped with it.
            tokio::select! {
                () = freed(store, leased) => info!("a subnet was freed"),
                () = reconfigured(store, config) => {
                    info!("the network config was changed");
                    return Err(Reconfigured);
                }
            }
        } else {
            tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await;
        }
    }
}

/// Resolves when a subnet has become free since `leased` of them were taken.
async fn freed<S: LeaseStore>(store: &S, leased: usize) {
    let mut watch = store.watch();
    loop {
        match watch.next().await {
            Ok(LeaseEvent::Removed(_)) => return,
            // One may have gone between the attempt and this watch.
            Ok(LeaseEvent::Snapshot(snapshot)) if snapshot.leases.len() < leased => return,
            Ok(_) => {}
            Err(error) => warn!(error = %chain(&error), "the store is away while we wait for a subnet"),
        }
    }
}

/// Resolves when the store holds another good config than `config`.
async fn reconfigured<S: LeaseStore>(store: &S, config: &NetworkConfig) {
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        if let Ok(now) = store.network_config().await
            && !now.pools().eq(config.pools())
        {
            return;
        }
    }
}
