//! The requests, each one thing said to etcd and its answer.
//!
//! Any of them may reach etcd twice (see `call`), so each is made to bear it:
//! an etcd lease is granted under an id of our choosing, and a transaction that
//! finds its own work already done counts as done.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use etcd_client::{Compare, CompareOp, GetOptions, LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions};
use etcd_client::{Error as EtcdError, ResponseHeader, Txn, TxnOp, TxnOpResponse};
use flannel_core::lease::Lease;
use flannel_core::network::NetworkConfig;
use flannel_core::store::{Snapshot, StoreError};

use crate::call::{Cluster, FAILED_PRECONDITION, Failure, NOT_FOUND, OUT_OF_RANGE};
use crate::codec::Layout;

/// The term of a lease in seconds, flannel's 24 hours.
pub(crate) const TERM: i64 = 86_400;

/// A larger page is no faster, a smaller one is slower: etcd counts the rest of
/// the range for every page.
pub(crate) const PAGE: i64 = 10_000;

/// How often a list is begun again because its revision was compacted before
/// the last page was read.
const LISTS: usize = 5;

/// What flannel keeps under one prefix of one etcd.
pub(crate) struct Registry {
    pub(crate) cluster: Cluster,
    pub(crate) layout: Layout,
    pub(crate) page: i64,
    /// What the first watch begins with.
    pub(crate) first: First,
}

/// The listing that a lease was taken by, for the first watch to go on from:
/// with many hosts starting at once, each list less counts.
#[derive(Default)]
pub(crate) struct First {
    watched: AtomicBool,
    listing: Mutex<Option<Listing>>,
}

impl First {
    /// Keeps a listing if there is no watch yet, with our own lease in it, which came later.
    pub(crate) fn keep(&self, mut listing: Listing, own: &Lease) {
        if !self.watched.load(Ordering::Acquire) {
            listing.snapshot.leases.retain(|lease| lease.subnet != own.subnet);
            listing.snapshot.unreadable.retain(|key| key.subnet != Some(own.subnet));
            listing.snapshot.leases.push(own.clone());
            *self.listing.lock().unwrap_or_else(PoisonError::into_inner) = Some(listing);
        }
    }

    /// The listing, for the first who asks.
    pub(crate) fn take(&self) -> Option<Listing> {
        self.watched.store(true, Ordering::Release);
        self.listing.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// All leases, and when that was.
pub(crate) struct Listing {
    pub(crate) snapshot: Snapshot,
    pub(crate) moment: Moment,
}

/// A point in the history of one etcd cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) cluster: u64,
    pub(crate) term: u64,
    pub(crate) revision: i64,
}

impl Moment {
    pub(crate) fn of(header: Option<&ResponseHeader>) -> Self {
        header.map_or_else(Self::default, |header| Self {
            cluster: header.cluster_id(),
            term: header.raft_term(),
            revision: header.revision(),
        })
    }
}

/// A key as it stands.
pub(crate) struct Found {
    pub(crate) value: Vec<u8>,
    /// The etcd lease it hangs on, 0 for none.
    pub(crate) handle: i64,
    /// When it was last written.
    pub(crate) revision: i64,
}

impl Registry {
    pub(crate) async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        let key = self.layout.config();
        let found = self.read(key).await?.ok_or_else(|| StoreError::NoConfig { key: key.into() })?;
        // Go reads bytes that are no UTF-8 as U+FFFD.
        NetworkConfig::parse(&String::from_utf8_lossy(&found.value))
            .map_err(|source| StoreError::BadConfig { key: key.into(), source })
    }

    /// All leases at one revision, however many pages that takes.
    pub(crate) async fn list(&self) -> Result<Listing, StoreError> {
        for _ in 0..LISTS {
            match self.list_once().await {
                Err(Failure::Refused(refusal)) if refusal.code == OUT_OF_RANGE => {}
                answer => {
                    return answer.map_err(|failure| failure.of(format!("listing {}", self.layout.leases())));
                }
            }
        }
        Err(StoreError::Unreachable {
            endpoints: self.cluster.endpoints(),
            source: "the history is compacted faster than the leases can be listed".into(),
        })
    }

    async fn list_once(&self) -> Result<Listing, Failure> {
        let mut snapshot = Snapshot::default();
        let mut moment: Option<Moment> = None;
        let mut from = self.layout.leases().as_bytes().to_vec();
        loop {
            let options = GetOptions::new()
                .with_range(self.layout.leases_end())
                .with_limit(self.page)
                .with_revision(moment.map_or(0, |moment| moment.revision));
            let page = self
                .cluster
                .call(|mut clients| {
                    let (from, options) = (from.clone(), options.clone());
                    async move { clients.kv.get(from, Some(options)).await }
                })
                .await?;
            let moment = *moment.get_or_insert_with(|| Moment::of(page.header()));
            for kv in page.kvs() {
                match self.layout.decode(kv) {
                    Ok(lease) => snapshot.leases.push(lease),
                    Err(unreadable) => snapshot.unreadable.push(unreadable),
                }
            }
            match page.kvs().last() {
                Some(last) if page.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => return Ok(Listing { snapshot, moment }),
            }
        }
    }

    pub(crate) async fn read(&self, key: &str) -> Result<Option<Found>, StoreError> {
        let answer = self
            .cluster
            .call(|mut clients| async move { clients.kv.get(key, None).await })
            .await
            .map_err(|failure| failure.of(format!("reading {key}")))?;
        Ok(answer.kvs().first().map(|kv| Found {
            value: kv.value().to_vec(),
            handle: kv.lease(),
            revision: kv.mod_revision(),
        }))
    }

    /// Writes a key that nobody holds; `false` if somebody does.
    pub(crate) async fn create(&self, key: &str, value: &str, handle: i64) -> Result<bool, StoreError> {
        self.write(key, value, handle, Compare::create_revision(key, CompareOp::Equal, 0)).await
    }

    /// Writes a key that nobody has written since `revision`; `false` if somebody has.
    pub(crate) async fn replace(
        &self,
        key: &str,
        value: &str,
        handle: i64,
        revision: i64,
    ) -> Result<bool, StoreError> {
        self.write(key, value, handle, Compare::mod_revision(key, CompareOp::Equal, revision)).await
    }

    async fn write(&self, key: &str, value: &str, handle: i64, when: Compare) -> Result<bool, StoreError> {
        let put = TxnOp::put(key, value, Some(PutOptions::new().with_lease(handle)));
        let transaction = Txn::new().when([when]).and_then([put]).or_else([TxnOp::get(key, None)]);
        let answer = self
            .cluster
            .call(|mut clients| {
                let transaction = transaction.clone();
                async move { clients.kv.txn(transaction).await }
            })
            .await;
        let answer = match answer {
            // The etcd lease ran out meanwhile: as much a lost race as any other.
            Err(Failure::Refused(refusal)) if refusal.code == NOT_FOUND => return Ok(false),
            answer => answer.map_err(|failure| failure.of(format!("writing {key}")))?,
        };
        if answer.succeeded() {
            return Ok(true);
        }
        // An earlier attempt may have been carried out though its answer was lost.
        let is_ours = |answer: &TxnOpResponse| match answer {
            TxnOpResponse::Get(get) => {
                get.kvs().first().is_some_and(|kv| kv.value() == value.as_bytes() && kv.lease() == handle)
            }
            _ => false,
        };
        Ok(answer.op_responses().iter().any(is_ours))
    }

    /// Deletes a key that is still as it was found; whether it is gone.
    pub(crate) async fn delete(&self, key: &str, found: &Found) -> Result<bool, StoreError> {
        let transaction = Txn::new()
            .when([Compare::mod_revision(key, CompareOp::Equal, found.revision)])
            .and_then([TxnOp::delete(key, None)]);
        let answer = self
            .cluster
            .call(|mut clients| {
                let transaction = transaction.clone();
                async move { clients.kv.txn(transaction).await }
            })
            .await
            .map_err(|failure| failure.of(format!("deleting {key}")))?;
        Ok(answer.succeeded())
    }

    /// A new etcd lease of one term.
    pub(crate) async fn grant(&self) -> Result<i64, StoreError> {
        let id = rand::random_range(1..=i64::MAX);
        let granted = self
            .cluster
            .call(|mut clients| async move {
                clients.lease.grant(TERM, Some(LeaseGrantOptions::new().with_id(id))).await
            })
            .await;
        match granted {
            Ok(_) => Ok(id),
            // Nobody else draws the same 63 bits: this is an earlier attempt of ours.
            Err(Failure::Refused(refusal)) if refusal.code == FAILED_PRECONDITION => Ok(id),
            Err(failure) => Err(failure.of("granting an etcd lease")),
        }
    }

    /// Begins a new term of an etcd lease; `false` if it is gone.
    pub(crate) async fn keep_alive(&self, id: i64) -> Result<bool, StoreError> {
        self.cluster
            .call(|mut clients| async move {
                match clients.lease.keep_alive(id).await {
                    Ok(_) => Ok(true),
                    Err(EtcdError::LeaseKeepAliveError(words)) if words == "lease not found" => Ok(false),
                    Err(error) => Err(error),
                }
            })
            .await
            .or_else(|failure| match failure {
                Failure::Refused(refusal) if refusal.code == NOT_FOUND => Ok(false),
                failure => Err(failure.of(format!("keeping etcd lease {id:x} alive"))),
            })
    }

    /// The term an etcd lease was granted for; `None` if it is gone.
    pub(crate) async fn granted_term(&self, id: i64) -> Result<Option<i64>, StoreError> {
        let answer =
            self.cluster.call(|mut clients| async move { clients.lease.time_to_live(id, None).await }).await;
        match answer {
            Ok(answer) => Ok(Some(answer.granted_ttl()).filter(|_| answer.ttl() > 0)),
            Err(Failure::Refused(refusal)) if refusal.code == NOT_FOUND => Ok(None),
            Err(failure) => Err(failure.of(format!("asking for the term of etcd lease {id:x}"))),
        }
    }

    /// Ends an etcd lease if no key hangs on it, since they would go with it.
    /// A lease that stays costs etcd a little until it runs out, so whatever
    /// goes wrong here is not worth a word to the caller.
    pub(crate) async fn revoke_if_bare(&self, id: i64) {
        let keys = LeaseTimeToLiveOptions::new().with_keys();
        let answer = self
            .cluster
            .call(|mut clients| {
                let keys = keys.clone();
                async move { clients.lease.time_to_live(id, Some(keys)).await }
            })
            .await;
        if answer.is_ok_and(|answer| answer.ttl() > 0 && answer.keys().is_empty()) {
            self.revoke(id).await;
        }
    }

    async fn revoke(&self, id: i64) {
        let revoked = self.cluster.call(|mut clients| async move { clients.lease.revoke(id).await }).await;
        tracing::debug!(id = format!("{id:x}"), done = revoked.is_ok(), "revoked an etcd lease");
    }
}
