//! Leases: those of the hosts, and those of peers that exist only as leases.

use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use serde_json::Value;

pub(crate) const PREFIX: &str = "/coreos.com/network";

/// Every address of the network begins so.
pub(crate) const NETWORK_START: &str = "10.5.";

/// Hosts are in 10.5.1.0 to 10.5.63.0, peers above.
pub(crate) const CONFIG: &str =
    r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.63.0","Backend":{"Type":"vxlan"}}"#;

/// The range of all leases.
pub(crate) fn leases() -> String {
    format!("{PREFIX}/subnets/")
}

/// The key of a subnet like `10.5.7.0/24`.
pub(crate) fn key_of(subnet: &str) -> String {
    format!("{PREFIX}/subnets/{}", subnet.replace('/', "-"))
}

/// What a lease says, as far as a vxlan host goes by it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Lease {
    /// `10.5.7.0/24`.
    pub(crate) subnet: String,
    pub(crate) address: String,
    pub(crate) mac: String,
}

impl Lease {
    /// Reads a lease of a host or a peer of ours; `None` for anything else.
    pub(crate) fn read(key: &str, value: &str) -> Option<Self> {
        let subnet = key.strip_prefix(&leases())?.replace('-', "/");
        subnet.parse::<Ipv4Network>().ok()?;
        let value: Value = serde_json::from_str(value).ok()?;
        let address = value["PublicIP"].as_str()?.to_owned();
        let mac = value["BackendData"]["VtepMAC"].as_str().unwrap_or_default().to_owned();
        Some(Self { subnet, address, mac })
    }

    pub(crate) fn objects(&self) -> [String; 3] {
        let Self { subnet, address, mac } = self;
        let network = subnet.split('/').next().unwrap_or_default();
        [
            format!("route {subnet} {network} {}", crate::kernel::DEVICE),
            format!("neighbour {network} {mac}"),
            format!("entry {mac} {address}"),
        ]
    }

    pub(crate) fn key(&self) -> String {
        key_of(&self.subnet)
    }

    pub(crate) fn value(&self) -> String {
        let Self { address, mac, .. } = self;
        format!(
            r#"{{"PublicIP":"{address}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    }
}

/// Gives out peers; no MAC and no address twice.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    given: u32,
}

impl Peers {
    /// A peer with the subnet `10.5.N.0/24`, with N from 100 on.
    pub(crate) fn peer(&mut self, number: u8) -> Lease {
        self.given += 1;
        let [.., high, low] = self.given.to_be_bytes();
        Lease {
            subnet: format!("10.5.{number}.0/24"),
            address: Ipv4Addr::new(172, 16, high, low).to_string(),
            mac: format!("0e:aa:00:00:{high:02x}:{low:02x}"),
        }
    }
}
