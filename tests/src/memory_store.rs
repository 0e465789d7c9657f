//! A store in memory: the seam's contract without a server.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use flannel_core::lease::{Expiry, HeldLease, Lease, LeaseAttrs, Subnet, Tenure};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{LeaseEvent, LeaseStore, LeaseWatch, Snapshot, StoreError};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// How long a lease of this store lasts.
pub const TERM: Duration = Duration::from_secs(86_400);

/// What the store holds.
#[derive(Default)]
pub struct Leases {
    /// All leases.
    pub leases: BTreeMap<Subnet, Lease>,
    /// Other hosts that have taken a lease over, by its subnet.
    pub taken_over: BTreeMap<Subnet, String>,
    /// Whether it answers.
    pub away: bool,
    /// There is no network config.
    pub bare: bool,
    /// How often a lease was renewed.
    pub renewals: usize,
    /// How often it was asked for a list.
    pub lists: usize,
    /// How often its holder has written to a lease since it took it.
    pub writes: usize,
    /// Leases that are certainly the agent's, beside the one that it knows of.
    pub ours: Vec<Subnet>,
    /// How long answers to renewing and publishing are on their way.
    pub delay: Duration,
    watchers: Vec<mpsc::UnboundedSender<Result<LeaseEvent, StoreError>>>,
}

/// A handle on a store in memory.
#[derive(Clone, Default)]
pub struct MemoryStore {
    inner: Arc<Mutex<Leases>>,
    changes: Arc<watch::Sender<usize>>,
}

impl MemoryStore {
    /// A store with these leases.
    pub fn holding(leases: impl IntoIterator<Item = Lease>) -> Self {
        let store = Self::default();
        leases.into_iter().for_each(|lease| store.put(lease));
        store
    }

    /// What it holds, to look into.
    ///
    /// # Panics
    /// A test has panicked while it held the store.
    pub fn inner(&self) -> MutexGuard<'_, Leases> {
        self.inner.lock().expect("no test panics while it holds the store")
    }

    /// Somebody puts a lease.
    pub fn put(&self, lease: Lease) {
        self.inner().leases.insert(lease.subnet, lease.clone());
        self.tell(LeaseEvent::Put(lease));
    }

    /// Somebody deletes a lease.
    pub fn remove(&self, subnet: Subnet) {
        self.inner().leases.remove(&subnet);
        self.tell(LeaseEvent::Removed(subnet));
    }

    /// Another host takes a lease over.
    pub fn take_over(&self, subnet: Subnet, host: &str) {
        self.inner().taken_over.insert(subnet, host.into());
        self.changes.send_modify(|count| *count += 1);
    }

    /// Somebody deletes leases in one stroke.
    pub fn remove_together(&self, subnets: impl IntoIterator<Item = Subnet>) {
        let subnets: Vec<Subnet> = subnets.into_iter().collect();
        self.inner().leases.retain(|subnet, _| !subnets.contains(subnet));
        self.tell(LeaseEvent::RemovedTogether(subnets));
    }

    /// Somebody deletes all there is: `etcdctl del --prefix`.
    pub fn remove_all(&self) {
        let all: Vec<Subnet> = self.inner().leases.keys().copied().collect();
        self.remove_together(all);
    }

    /// History is compacted: all watchers get a snapshot.
    pub fn relist(&self) {
        let leases = self.inner().leases.values().cloned().collect();
        self.tell(LeaseEvent::Snapshot(Snapshot { leases, unreadable: vec![] }));
    }

    /// Tells all watchers.
    pub fn tell(&self, event: LeaseEvent) {
        self.inner().watchers.retain(|watcher| watcher.send(Ok(event.clone())).is_ok());
        self.changes.send_modify(|count| *count += 1);
    }

    /// From now on no watcher hears of anything: the watch is broken and nobody knows.
    pub fn fall_silent(&self) {
        self.inner().watchers.clear();
    }

    /// Tells all watchers that the store is away.
    pub fn fail_watches(&self) {
        self.inner().watchers.retain(|watcher| watcher.send(Err(unreachable())).is_ok());
    }

    /// Resolves once the store holds something that `is_so`.
    ///
    /// # Panics
    /// Never: the sender lives as long as this handle.
    pub async fn until(&self, mut is_so: impl FnMut(&Leases) -> bool) {
        let mut changes = self.changes.subscribe();
        changes.wait_for(|_| is_so(&self.inner())).await.expect("the sender is ours");
    }

    async fn wait(&self) {
        let delay = self.inner().delay;
        tokio::time::sleep(delay).await;
    }

    fn held(&self, lease: Lease) -> HeldLease {
        let expiry = match lease.tenure {
            Tenure::Leased => Expiry::At((Instant::now() + TERM).into_std()),
            Tenure::Reserved => Expiry::Never,
        };
        HeldLease { lease, expiry, handle: 7 }
    }
}

/// What a store that is away answers.
pub fn unreachable() -> StoreError {
    StoreError::Unreachable { endpoints: "memory".into(), source: "told to be away".into() }
}

impl LeaseStore for MemoryStore {
    type Watch = MemoryWatch;

    fn config_key(&self) -> String {
        "memory".into()
    }

    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        let Leases { away, bare, .. } = *self.inner();
        match (away, bare) {
            (true, _) => Err(unreachable()),
            (false, true) => Err(StoreError::NoConfig { key: self.config_key() }),
            (false, false) => Ok(crate::build::config(crate::build::VXLAN)),
        }
    }

    async fn acquire(
        &self,
        config: &NetworkConfig,
        attrs: &LeaseAttrs,
        previous: Option<Subnet>,
    ) -> Result<HeldLease, StoreError> {
        if self.inner().away {
            return Err(unreachable());
        }
        let ours =
            self.inner().leases.values().find(|lease| lease.attrs.public_ip == attrs.public_ip).cloned();
        if let Some(ours) = ours {
            let held = self.held(Lease { attrs: attrs.clone(), ..ours });
            return self.publish(&held, attrs).await;
        }
        let pool = config.v4.expect("an IPv4 network");
        let free = (0..pool.capacity()).filter_map(|index| match pool.subnet(index) {
            Some(ipnetwork::IpNetwork::V4(v4)) => Some(Subnet::V4(v4)),
            _ => None,
        });
        let mut free =
            previous.into_iter().chain(free).filter(|subnet| !self.inner().leases.contains_key(subnet));
        let Some(subnet) = free.next() else {
            return Err(StoreError::Exhausted {
                key: "config".into(),
                network: pool.network.to_string(),
                subnet_len: pool.subnet_len,
                leased: self.inner().leases.len(),
            });
        };
        let lease = Lease { subnet, attrs: attrs.clone(), tenure: Tenure::Leased };
        self.put(lease.clone());
        Ok(self.held(lease))
    }

    async fn renew(&self, held: &HeldLease) -> Result<Expiry, StoreError> {
        if self.inner().away {
            return Err(unreachable());
        }
        self.inner().renewals += 1;
        self.changes.send_modify(|count| *count += 1);
        let answer = match self.inner().leases.get(&held.lease.subnet) {
            Some(lease) => Ok(self.held(lease.clone()).expiry),
            None => Err(StoreError::Lost { subnet: held.lease.subnet, holder: None }),
        };
        self.wait().await;
        answer
    }

    async fn publish(&self, held: &HeldLease, attrs: &LeaseAttrs) -> Result<HeldLease, StoreError> {
        if self.inner().away {
            return Err(unreachable());
        }
        let standing = self.inner().leases.get(&held.lease.subnet).cloned();
        let ours = [held.lease.attrs.public_ip, attrs.public_ip];
        let tenure = match &standing {
            Some(other)
                if !ours.contains(&other.attrs.public_ip)
                    && !self.inner().ours.contains(&held.lease.subnet) =>
            {
                let holder = other.attrs.public_ip.map(|holder| holder.to_string());
                return Err(StoreError::Lost { subnet: held.lease.subnet, holder });
            }
            Some(ours) => ours.tenure,
            None => Tenure::Leased,
        };
        let lease = Lease { subnet: held.lease.subnet, attrs: attrs.clone(), tenure };
        if standing.as_ref() != Some(&lease) {
            self.inner().writes += 1;
            self.put(lease.clone());
        }
        let answer = Ok(self.held(lease));
        self.wait().await;
        answer
    }

    async fn list(&self) -> Result<Snapshot, StoreError> {
        let mut inner = self.inner();
        inner.lists += 1;
        match inner.away {
            true => Err(unreachable()),
            false => Ok(Snapshot { leases: inner.leases.values().cloned().collect(), unreadable: vec![] }),
        }
    }

    fn hold(&self, held: &HeldLease) -> impl Future<Output = StoreError> + Send + use<> {
        let (store, subnet) = (self.clone(), held.lease.subnet);
        async move {
            store.until(|leases| leases.taken_over.contains_key(&subnet)).await;
            let holder = store.inner().taken_over.get(&subnet).cloned();
            StoreError::Lost { subnet, holder }
        }
    }

    async fn give_back(&self, _held: &HeldLease, stray: Subnet) -> Result<(), StoreError> {
        if self.inner().away {
            return Err(unreachable());
        }
        if self.inner().ours.contains(&stray) {
            self.remove(stray);
        }
        Ok(())
    }

    fn host_moved(&self) {}

    fn watch(&self) -> MemoryWatch {
        let (sender, events) = mpsc::unbounded_channel();
        let mut inner = self.inner();
        let leases = inner.leases.values().cloned().collect();
        let first = if inner.away {
            Err(unreachable())
        } else {
            Ok(LeaseEvent::Snapshot(Snapshot { leases, unreadable: vec![] }))
        };
        // The receiver is right here, so this cannot fail.
        drop(sender.send(first));
        inner.watchers.push(sender);
        MemoryWatch { events }
    }
}

/// The events of a [`MemoryStore`].
pub struct MemoryWatch {
    events: mpsc::UnboundedReceiver<Result<LeaseEvent, StoreError>>,
}

impl LeaseWatch for MemoryWatch {
    async fn next(&mut self) -> Result<LeaseEvent, StoreError> {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}
