//! Leases in etcd, as flannel keeps them.
//!
//! The only crate that knows etcd. What it writes is flannel's byte for byte;
//! how it writes is stricter: no key is ever written without a comparison, a
//! term is kept alive rather than written anew, and nothing is asked about the
//! leases of others beyond one list and one watch.
//!
//! ```text
//!   connect     settings → clients of one endpoint
//!   call        one request, several endpoints, deadlines
//!   codec       keys and values ⇄ leases
//!   registry    the requests
//!   lease       taking, keeping and restoring a subnet
//!   watch       everybody's leases, for ever
//! ```

mod call;
mod codec;
mod connect;
mod lease;
mod registry;
mod watch;

use std::sync::Arc;

use flannel_core::lease::{Expiry, HeldLease, LeaseAttrs, Subnet};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{LeaseStore, StoreError};

pub use crate::connect::{Password, Settings, SettingsError, check_endpoint};
pub use crate::watch::EtcdWatch;

use crate::call::Cluster;
use crate::codec::Layout;
use crate::connect::Dial;
use crate::registry::{First, PAGE, Registry};

/// Leases in etcd.
#[derive(Clone)]
pub struct EtcdStore {
    registry: Arc<Registry>,
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
        let layout = Layout::new(&settings.prefix);
        Ok(Self { registry: Arc::new(Registry { cluster, layout, page, first: First::default() }) })
    }
}

impl LeaseStore for EtcdStore {
    type Watch = EtcdWatch;

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

    fn host_moved(&self) {
        self.registry.cluster.start_over();
    }

    fn watch(&self) -> EtcdWatch {
        EtcdWatch::new(self.registry.clone())
    }
}
