//! Words for tests about leases in etcd: hosts, subnets and keys by their number.

use std::net::Ipv4Addr;
use std::time::Duration;

use flannel_core::chain::chain;
use flannel_core::key::subnet_key;
use flannel_core::lease::{HeldLease, HostIdentity, LeaseAttrs, Subnet};
use flannel_core::network::NetworkConfig;
use flannel_core::store::{LeaseEvent, LeaseWatch, Snapshot};
use flannel_etcd::{EtcdStore, Settings};
use tokio::time::timeout;

use crate::etcd::{Etcd, PREFIX, Raw};

/// The term of a lease in seconds.
pub const DAY: i64 = 86_400;

/// How soon the store must have left an endpoint that does not answer.
pub const MOVED: Duration = Duration::from_secs(15);

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(60);

/// An etcd of one's own, or the end of the test if there is none to run.
#[macro_export]
macro_rules! etcd_or_pass {
    () => {
        $crate::etcd_or_pass!($crate::etcd::Kind::plain())
    };
    ($kind:expr) => {
        match $crate::etcd::Etcd::start_as($kind).await {
            Some(etcd) => etcd,
            None => return,
        }
    };
}

/// A CA and its certificates in a directory, or the end of the test if there is no openssl.
#[macro_export]
macro_rules! certificates_or_pass {
    ($directory:expr) => {
        match $crate::etcd::Certificates::make($directory.path()) {
            Some(certificates) => certificates,
            None => return,
        }
    };
}

/// A store with these settings.
///
/// # Panics
/// They cannot work.
pub async fn store(settings: &Settings) -> EtcdStore {
    EtcdStore::connect(settings).await.unwrap_or_else(|error| panic!("{error}"))
}

/// A store on this etcd.
///
/// # Panics
/// Never, with an etcd without TLS.
pub async fn plain_store(etcd: &Etcd) -> EtcdStore {
    store(&etcd.settings()).await
}

/// Settings with these endpoints.
pub fn at(endpoints: &[&str]) -> Settings {
    let endpoints = endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect();
    Settings { endpoints, prefix: PREFIX.into(), ..Settings::default() }
}

/// A subnet that no test leases.
///
/// # Panics
/// Never.
pub fn nowhere() -> Subnet {
    Subnet::V4("192.0.2.0/24".parse().expect("a network"))
}

/// The usual config.
///
/// # Panics
/// Never.
pub fn config() -> NetworkConfig {
    NetworkConfig::parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#).expect("a config")
}

/// So many subnets, from 10.5.1.0/24 on.
///
/// # Panics
/// With none at all.
pub fn config_of(subnets: u8) -> NetworkConfig {
    let text =
        format!(r#"{{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.{subnets}.0"}}"#);
    NetworkConfig::parse(&text).expect("a config")
}

/// What the host at 192.168.0.`number` publishes.
pub fn host(number: u8) -> LeaseAttrs {
    host_with_mac(number, "36:8a:ca:4c:79:ec")
}

/// The same with another MAC.
///
/// # Panics
/// If that is none.
pub fn host_with_mac(number: u8, mac: &str) -> LeaseAttrs {
    let text = format!(
        r#"{{"PublicIP":"192.168.0.{number}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    );
    LeaseAttrs::from_json(&text).expect("a lease value")
}

/// 192.168.0.`number`.
pub fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 0, number)
}

/// 10.5.`third`.0/24.
///
/// # Panics
/// Never.
pub fn subnet(third: u8) -> Subnet {
    Subnet::V4(format!("10.5.{third}.0/24").parse().expect("a network"))
}

/// The key of its lease.
pub fn key(third: u8) -> String {
    format!("{PREFIX}/subnets/10.5.{third}.0-24")
}

/// The key of the record beside it.
pub fn record_key(third: u8) -> String {
    format!("{PREFIX}/hosts/10.5.{third}.0-24")
}

/// The key of a question to its holder.
pub fn asks_key(third: u8) -> String {
    format!("{}/asks", record_key(third))
}

/// A machine, by what its disk and its kernel say.
pub fn machine(id: &str, boot: &str) -> HostIdentity {
    HostIdentity { id: id.into(), boot: boot.into(), name: format!("host-{id}") }
}

/// A store for that machine.
pub async fn store_of(etcd: &Etcd, id: &str, boot: &str) -> EtcdStore {
    store(&Settings { host: Some(machine(id, boot)), ..etcd.settings() }).await
}

/// The key of a lease.
pub fn key_of(held: &HeldLease) -> String {
    format!("{PREFIX}/subnets/{}", subnet_key(&held.lease.subnet))
}

/// The next event.
///
/// # Panics
/// An error comes, or nothing.
pub async fn next(watch: &mut impl LeaseWatch) -> LeaseEvent {
    let event = timeout(PATIENCE, watch.next()).await.expect("the watch has something to say");
    event.unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// The next event, whatever errors come before it.
///
/// # Panics
/// Nothing comes.
pub async fn next_after_errors(watch: &mut impl LeaseWatch) -> LeaseEvent {
    let event = async {
        loop {
            match watch.next().await {
                Err(_) | Ok(LeaseEvent::Resumed) => {}
                Ok(event) => return event,
            }
        }
    };
    timeout(PATIENCE, event).await.expect("the watch has something to say")
}

/// The snapshot that comes next.
///
/// # Panics
/// Something else comes.
pub async fn snapshot(watch: &mut impl LeaseWatch) -> Snapshot {
    match next(watch).await {
        LeaseEvent::Snapshot(snapshot) => snapshot,
        other => panic!("{other:?} is no snapshot"),
    }
}

/// The subnet of the lease that is put next, whatever errors come before it.
///
/// # Panics
/// Something else comes.
pub async fn put_subnet(watch: &mut impl LeaseWatch) -> Subnet {
    match next_after_errors(watch).await {
        LeaseEvent::Put(lease) => lease.subnet,
        other => panic!("{other:?} is no put"),
    }
}

/// Somebody takes a subnet, on a new etcd lease.
pub async fn put_lease(raw: &Raw, third: u8, attrs: &LeaseAttrs, ttl: i64) -> i64 {
    let lease = raw.grant(ttl).await;
    raw.put(&key(third), &attrs.to_json(), lease).await;
    lease
}
