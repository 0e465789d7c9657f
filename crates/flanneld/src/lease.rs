//! What the store has to give before anything else can be done, however long that
//! takes: a network config that can be used, and a lease.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use flannel_core::allocation::fits;
use flannel_core::backend::{self, Backend};
use flannel_core::chain::chain;
use flannel_core::lease::{HeldLease, Lease, LeaseAttrs, Subnet};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{LeaseEvent, LeaseStore, LeaseWatch, StoreError};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::health::{Aspect, Status};

/// Delays between attempts: 100 ms at first, 5 s at most, for ever. The jitter adds up to as much again.
pub(crate) fn delays() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(2500))
        .with_jitter()
        .without_max_times()
        .build()
}

/// Delays between attempts, after what went wrong.
pub(crate) struct Pace {
    delays: Box<dyn Iterator<Item = Duration> + Send>,
    question: Duration,
}

impl Pace {
    /// The longest wait before another host is asked again whether it lives at our address.
    const LONGEST: Duration = Duration::from_secs(60);

    pub(crate) fn new() -> Self {
        Self { delays: Box::new(delays()), question: LOOK_AGAIN }
    }

    pub(crate) fn after(&mut self, error: &StoreError) -> Duration {
        match error {
            // Each attempt asks the other host, and the two may stay at one address for days.
            StoreError::Twin { .. } => {
                let next = (self.question * 2).min(Self::LONGEST);
                std::mem::replace(&mut self.question, next)
            }
            _ => self.delays.next().unwrap_or(LOOK_AGAIN),
        }
    }
}

/// How often the network config is asked for while it is not there or not good, as in flannel.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// How often we look whether somebody has made room for us, or has changed the network config.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// The network config was changed while we waited for room in the range.
#[derive(Clone, Copy, Debug)]
pub struct Reconfigured;

/// Waits for a network config that can be used; says once what is wrong with it.
pub(crate) async fn network_config<S: LeaseStore>(
    store: &S,
    status: &watch::Sender<Status>,
) -> (NetworkConfig, Box<dyn Backend>) {
    let mut said = None;
    loop {
        let read = store.network_config().await;
        match read.and_then(|config| usable(config, &store.config_key())) {
            Ok(Usable { config, backend, unknown }) => {
                let network =
                    config.networks().map(|network| network.to_string()).collect::<Vec<_>>().join(" and ");
                info!(network, backend = backend.kind(), "network config read");
                for key in unknown {
                    warn!(key, "the network config has a key that nobody knows");
                }
                return (config, backend);
            }
            Err(error) => wait_for(status, "a network config", &error, &mut said),
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// A network config that can be run.
pub(crate) struct Usable {
    pub(crate) config: NetworkConfig,
    /// The one it asks for.
    pub(crate) backend: Box<dyn Backend>,
    /// Keys that nobody knows.
    unknown: Vec<String>,
}

/// Reads the backend out of a config.
///
/// # Errors
/// Something in it may not be so, or is not there yet.
pub(crate) fn usable(config: NetworkConfig, key: &str) -> Result<Usable, StoreError> {
    let bad = |source| StoreError::BadConfig { key: key.into(), source };
    let config = config.supported().map_err(bad)?;
    let (backend, unknown) = backend::from_config(&config).map_err(bad)?;
    let unknown = config.unknown.iter().cloned().chain(unknown).collect();
    Ok(Usable { config, backend, unknown })
}

/// Tells what is waited for and why: the log once, the health page as it is.
fn wait_for(status: &watch::Sender<Status>, what: &str, error: &StoreError, said: &mut Option<String>) {
    if said.replace(error.trouble()) != Some(error.trouble()) {
        warn!(error = %chain(error), "waiting for {what}");
        let pending = format!("waiting for {what}: {}", chain(error));
        status.send_modify(|status| status.lease = Aspect::Pending(pending));
    }
}

/// Takes a subnet for this host, waiting for as long as the store is away or
/// the range is full. Says once what it waits for. The lease says what is
/// `wanted` by the time it can be had: this host may move meanwhile.
///
/// # Errors
/// The range was full and is another one now.
pub async fn acquire<S: LeaseStore>(
    store: &S,
    config: &NetworkConfig,
    mut wanted: watch::Receiver<LeaseAttrs>,
    previous: Option<Subnet>,
    status: &watch::Sender<Status>,
) -> Result<HeldLease, Reconfigured> {
    let (mut said, mut pace) = (None, Pace::new());
    loop {
        let attrs = wanted.borrow_and_update().clone();
        let error = match store.acquire(config, &attrs, previous).await {
            Ok(held) => return Ok(held),
            Err(error) => error,
        };
        wait_for(status, "a lease", &error, &mut said);
        let full = match &error {
            StoreError::Exhausted { leased, .. } => Some(*leased),
            _ => None,
        };
        let pause = pace.after(&error);
        // The watch is made for this wait alone, so it may be dropped with it.
        tokio::select! {
            biased;
            Ok(()) = wanted.changed() => {}
            news = freed(store, config, &attrs, full.unwrap_or_default()), if full.is_some() => info!("{news}"),
            () = reconfigured(store, config), if full.is_some() => {
                info!("the network config was changed");
                return Err(Reconfigured);
            }
            () = tokio::time::sleep(pause), if full.is_none() => {}
        }
    }
}

/// Resolves when a subnet has become free since `leased` of them were taken, or
/// one is ours: a store that is restored may have our lease of before. Says which.
async fn freed<S: LeaseStore>(
    store: &S,
    config: &NetworkConfig,
    attrs: &LeaseAttrs,
    leased: usize,
) -> &'static str {
    const FREED: &str = "a subnet was freed";
    const OURS: &str = "a lease of ours is there";
    let is_ours = |lease: &Lease| lease.attrs.same_host(attrs) && fits(config, lease.subnet);
    let mut watch = store.watch();
    loop {
        match watch.next().await {
            Ok(LeaseEvent::Removed(_) | LeaseEvent::RemovedTogether(_)) => return FREED,
            Ok(LeaseEvent::Snapshot(snapshot)) if snapshot.leases.iter().any(is_ours) => return OURS,
            // One may have gone between the attempt and this watch.
            Ok(LeaseEvent::Snapshot(snapshot)) if snapshot.leases.len() < leased => return FREED,
            Ok(LeaseEvent::Put(lease)) if is_ours(&lease) => return OURS,
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
