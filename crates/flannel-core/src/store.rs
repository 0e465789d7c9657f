//! The seam to wherever leases are kept, in this crate's words.
//!
//! The traits are coarse on purpose: Kubernetes "acquires" by annotating a
//! node, etcd by a transaction. Nothing here awaits; the futures are declared
//! for others to await.

use std::error::Error;
use std::future::Future;

use thiserror::Error;

use crate::chain::chain;
use crate::lease::{Expiry, HeldLease, Lease, LeaseAttrs, Subnet};
use crate::network::{ConfigError, NetworkConfig};

/// What the store says about leases.
///
/// A snapshot *replaces* everything known; the others change one subnet.
/// Being different types, one can never be taken for the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseEvent {
    /// All leases at one moment.
    Snapshot(Snapshot),
    /// A lease appeared or changed.
    Put(Lease),
    /// A key changed to something that is no lease.
    Unreadable(Unreadable),
    /// A lease is gone.
    Removed(Subnet),
    /// These went in one stroke: somebody deleted a whole range, most likely.
    RemovedTogether(Vec<Subnet>),
    /// After an error that was told: the watch goes on, and nothing was missed.
    Resumed,
}

/// All leases at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Those that can be read, in no particular order.
    pub leases: Vec<Lease>,
    /// Those that cannot.
    pub unreadable: Vec<Unreadable>,
}

/// A key among the leases that is no lease, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// The whole key in the store.
    pub key: String,
    /// The subnet, if at least the key names one. It counts as taken.
    pub subnet: Option<Subnet>,
    /// What is wrong with it, as a phrase.
    pub reason: String,
}

/// Why the store did not do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The store did not answer. Trying again later may help.
    #[error("no answer from {endpoints}")]
    Unreachable {
        /// Every endpoint that was tried.
        endpoints: String,
        /// What the last attempt met.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The store answered with a refusal. Trying again helps only once somebody has changed something there.
    #[error("{operation} refused")]
    Refused {
        /// What was asked, with the key.
        operation: String,
        /// The store's own words.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The network config is not there. It helps to write it.
    #[error(
        r#"no network config at {key}; write one, as in: etcdctl put {key} '{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan"}}}}'"#
    )]
    NoConfig {
        /// The key that should hold it.
        key: String,
    },
    /// The network config cannot be used. It helps to correct it.
    #[error("network config at {key}")]
    BadConfig {
        /// The key that holds it.
        key: String,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
    /// Every subnet of the range is taken. Trying again helps once one is freed.
    #[error(
        "no free /{subnet_len} left in {network} ({leased} leased); a larger Network, a larger SubnetLen or a wider \
         SubnetMin..SubnetMax in {key} makes room"
    )]
    Exhausted {
        /// The config key to change.
        key: String,
        /// The network.
        network: String,
        /// The length of a host's subnet.
        subnet_len: u8,
        /// How many leases there are.
        leased: usize,
    },
    /// The lease is no longer ours to renew.
    #[error("the lease on {subnet} {}", .holder.as_ref().map_or_else(|| "is gone".to_owned(), |holder| format!("belongs to {holder} now")))]
    Lost {
        /// The subnet.
        subnet: Subnet,
        /// Who holds it now, in words; `None` if nobody does.
        holder: Option<String>,
    },
    /// Another host, which is alive, holds a lease with our public address. It helps to give one of them another.
    #[error(
        "{them} holds {subnet} with the public address of {us}, and answers: give one of the two another address \
         (--public-ip, --iface); if one is a copy of the other's disk, remove host-id from its --state-dir"
    )]
    Twin {
        /// What it holds.
        subnet: Subnet,
        /// This host, in words.
        us: String,
        /// The other one, in words.
        them: String,
    },
}

impl StoreError {
    /// Tells errors apart for the log, which hears of each once: a store that
    /// is away is one trouble, whatever each attempt met.
    pub fn trouble(&self) -> String {
        match self {
            Self::Unreachable { endpoints, .. } => format!("no answer from {endpoints}"),
            other => chain(other),
        }
    }
}

/// Where leases are kept.
pub trait LeaseStore: Send + Sync + 'static {
    /// How the lease events of this store arrive.
    type Watch: LeaseWatch;

    /// Where the network config is kept, for what is said about it.
    fn config_key(&self) -> String;

    /// The network config, read and checked.
    fn network_config(&self) -> impl Future<Output = Result<NetworkConfig, StoreError>> + Send;

    /// Takes one subnet of `config` for this host: the one it holds already,
    /// else `previous`, else a free one; publishes `attrs` there. Losing a race
    /// is not an error; a full range is.
    fn acquire(
        &self,
        config: &NetworkConfig,
        attrs: &LeaseAttrs,
        previous: Option<Subnet>,
    ) -> impl Future<Output = Result<HeldLease, StoreError>> + Send;

    /// Keeps the lease for another term; says when that term ends.
    fn renew(&self, held: &HeldLease) -> impl Future<Output = Result<Expiry, StoreError>> + Send;

    /// Makes a lease of ours say `attrs`, under the same subnet: puts it back if
    /// it vanished, writes it once if it says something else. What somebody else
    /// holds by now is left alone.
    fn publish(
        &self,
        held: &HeldLease,
        attrs: &LeaseAttrs,
    ) -> impl Future<Output = Result<HeldLease, StoreError>> + Send;

    /// All leases at this moment, as whoever writes sees them.
    fn list(&self) -> impl Future<Output = Result<Snapshot, StoreError>> + Send;

    /// Stands by a lease of ours: answers whoever asks whether its holder is
    /// alive, and resolves once it belongs to another host.
    fn hold(&self, held: &HeldLease) -> impl Future<Output = StoreError> + Send + use<Self>;

    /// Gives back a lease beside `held` that peers take for ours: a write that came too
    /// late leaves one, a store that was restored, and a host that is no more and had
    /// our address. What is not certainly ours, or has somebody, stays.
    fn give_back(
        &self,
        held: &HeldLease,
        stray: Subnet,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// This host has another address: connections from the former one lead
    /// nowhere, though nobody has closed them.
    fn host_moved(&self);

    /// Everybody's leases, from now on. The first event is a snapshot.
    fn watch(&self) -> Self::Watch;
}

/// A stream of lease events that heals itself.
pub trait LeaseWatch: Send + 'static {
    /// The next event; after an error call again, it goes on where it stopped
    /// or with a new snapshot. Waits between attempts by itself.
    ///
    /// Must not be dropped half-way: an event could be lost.
    fn next(&mut self) -> impl Future<Output = Result<LeaseEvent, StoreError>> + Send;
}
