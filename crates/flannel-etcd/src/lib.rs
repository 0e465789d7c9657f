//! Leases in etcd, as flannel keeps them.
//!
//! The only crate that knows etcd. What it writes is flannel's byte for byte;
//! how it writes is stricter: no key is ever written without a comparison, a
//! term is kept alive rather than written anew, and nothing is asked about the
//! leases of others beyond one list and one watch.
//!
//! ```text
//!   watch       everybody's leases, for ever
//!   trace       whether a history is the one that we know
//!   lease       taking, keeping and restoring a subnet
//!   hosts       whether it is this host that holds it
//!   registry    the requests
//!   codec       keys and values ⇄ leases
//!   kv          the seam: what is asked of an etcd
//!   cluster     the real one behind it; stream, its watches
//!   call        one request, several endpoints, deadlines
//!   gate        credentials that were refused
//!   connect     settings → clients of one endpoint
//! ```

mod call;
mod cluster;
mod codec;
mod connect;
mod gate;
mod hosts;
pub mod kv;
mod lease;
mod registry;
mod stream;
mod trace;
mod watch;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use flannel_core::lease::{Expiry, HeldLease, HostIdentity, LeaseAttrs, Subnet};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{LeaseStore, Snapshot, StoreError};
use tokio::sync::Notify;

pub use crate::cluster::Cluster;
pub use crate::connect::{Password, Settings, SettingsError, check_endpoint};
pub use crate::watch::EtcdWatch;

use crate::codec::Layout;
use crate::connect::Dial;
use crate::kv::Kv;
use crate::registry::{First, PAGE, Registry};

/// Leases in etcd.
pub struct EtcdStore<K: Kv = Cluster> {
    registry: Arc<Registry<K>>,
}

impl EtcdStore {
    /// Checks the settings. Nothing is sent before the first request, so etcd
    /// need not be there yet.
    ///
    /// # Errors
    /// A setting that cannot work, named by its flag.
    pub async fn connect(settings: &Settings) -> Result<Self, SettingsError> {
        Self::with_page_size(settings, PAGE).await
    }

    /// The same, listing so many leases at a time.
    ///
    /// # Errors
    /// As for [`connect`](Self::connect).
    #[doc(hidden)]
    pub async fn with_page_size(settings: &Settings, page: i64) -> Result<Self, SettingsError> {
        let cluster = Cluster::new(Dial::new(settings).await?);
        Ok(Self::over(cluster, &settings.prefix, page, settings.host.clone()))
    }
}

impl<K: Kv> EtcdStore<K> {
    /// The same on whatever is behind the seam.
    #[doc(hidden)]
    pub fn over(kv: K, prefix: &str, page: i64, host: Option<HostIdentity>) -> Self {
        let layout = Layout::new(prefix);
        Self {
            registry: Arc::new(Registry {
                kv,
                layout,
                page,
                host,
                unfenced: AtomicBool::new(false),
                said_unfenced: AtomicBool::new(false),
                fence_again: Notify::new(),
                first: First::default(),
                unanswered: Mutex::default(),
                asked: Mutex::default(),
                left: Mutex::default(),
            }),
        }
    }
}

impl<K: Kv> Clone for EtcdStore<K> {
    fn clone(&self) -> Self {
        Self { registry: self.registry.clone() }
    }
}

impl<K: Kv> LeaseStore for EtcdStore<K> {
    type Watch = EtcdWatch<K>;

    fn config_key(&self) -> String {
        self.registry.layout.config().into()
    }

    async fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        self.registry.network_config().await
    }

    async fn acquire(
        &self,
        config: &NetworkConfig,
        attrs: &LeaseAttrs,
        previous: Option<Subnet>,
    ) -> Result<HeldLease, StoreError> {
        self.registry.acquire(config, attrs, previous).await
    }

    async fn renew(&self, held: &HeldLease) -> Result<Expiry, StoreError> {
        self.registry.renew(held).await
    }

    async fn publish(&self, held: &HeldLease, attrs: &LeaseAttrs) -> Result<HeldLease, StoreError> {
        self.registry.publish(held, attrs).await
    }

    async fn list(&self) -> Result<Snapshot, StoreError> {
        self.registry.list().await.map(|listing| listing.snapshot)
    }

    fn hold(&self, held: &HeldLease) -> impl Future<Output = StoreError> + Send + use<K> {
        self.registry.clone().hold(held.lease.clone())
    }

    async fn give_back(&self, held: &HeldLease, stray: Subnet) -> Result<(), StoreError> {
        self.registry.give_back_stray(held, stray).await
    }

    fn host_moved(&self) {
        self.registry.kv.start_over();
    }

    fn watch(&self) -> EtcdWatch<K> {
        EtcdWatch::new(self.registry.clone())
    }
}
