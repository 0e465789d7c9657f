//! How the hosts reach each other's subnets: one planner per kind of tunnel.
//!
//! A backend turns facts into desired state and does nothing else. It works on
//! one peer at a time: the plan for a cluster is that function over all peers
//! (see [`crate::plan`]), and one peer that changes costs one peer's planning.
//! Planning cannot fail: a peer that cannot be reached is skipped, with the
//! reason.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::json::{BadValue, Object};
use crate::lease::{Lease, LeaseAttrs};
use crate::network::{ConfigError, NetworkConfig};
use crate::state::{self, HostState, LinkName, MacAddr};
use crate::underlay::Underlay;

mod alloc;
mod host_gw;
mod vxlan;

pub use alloc::Alloc;
pub use host_gw::HostGw;
pub use vxlan::{VXLAN_OVERHEAD, VxlanBackend};

/// This host: where it stands and what it holds. Our own VTEP MAC is read from
/// our own lease, like anybody's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The cluster's networks.
    pub networks: Vec<IpNetwork>,
    /// The interface between the hosts.
    pub underlay: Underlay,
    /// Our own lease.
    pub lease: Lease,
    /// An MTU of our device that somebody else insists on, in bytes; `None` for the one that follows from the underlay.
    pub mtu: Option<u32>,
}

/// A kind of connection between hosts.
pub trait Backend: Send + Sync + 'static {
    /// Its name in the config and in leases; compared without case in the
    /// config, exactly in leases.
    fn kind(&self) -> &'static str;

    /// The devices it makes; empty if it uses the underlay alone.
    fn links(&self) -> Vec<LinkName>;

    /// In bytes, of a packet from container to container: for `subnet.env`.
    fn mtu(&self, node: &Node) -> u32;

    /// Whether the config asks for more than the underlay carries, and is cut to it.
    fn mtu_cut(&self, _underlay: &Underlay) -> bool {
        false
    }

    /// Whether it plans by the routes of the underlay too.
    fn looks_at_routes(&self) -> bool {
        false
    }

    /// Why it cannot work on this underlay, as a sentence.
    ///
    /// # Errors
    /// The sentence.
    fn check(&self, underlay: &Underlay) -> Result<(), String>;

    /// What to publish. `observed` holds our devices as they stand; a device's
    /// MAC is kept, or else `random` is taken.
    fn attributes(&self, underlay: &Underlay, observed: &HostState, random: MacAddr) -> LeaseAttrs;

    /// What this host needs for itself: devices and their addresses.
    fn plan_node(&self, node: &Node) -> HostState;

    /// What this host needs to reach one peer: no devices, and no object under one key twice.
    ///
    /// # Errors
    /// Why the peer is skipped, as a phrase.
    fn plan_peer(&self, node: &Node, peer: &Lease) -> Result<Vec<state::Object>, String>;
}

/// Names that flanneld knows and we do not have yet.
const LATER: [&str; 6] = ["udp", "ipip", "wireguard", "ipsec", "extension", "tencent-vpc"];

/// The backend that the network config asks for, and the keys in it that
/// nobody knows.
///
/// # Errors
/// No type, an unknown type, a type that does not exist yet, or a setting that
/// may not be so.
pub fn from_config(config: &NetworkConfig) -> Result<(Box<dyn Backend>, Vec<String>), ConfigError> {
    const ALLOWED: &str = r#""vxlan", "host-gw" or "alloc""#;
    let unsupported = |found: String, what: &str| ConfigError::Unsupported {
        key: "Backend.Type".into(),
        found,
        what: what.into(),
        instead: format!("write {ALLOWED}"),
    };
    let Some(settings) = &config.backend else {
        return Err(unsupported("missing".into(), r#"the backend this means in flannel, "udp","#));
    };
    let Some(kind) = settings.text("Type")? else { return Err(settings.bad("Type", ALLOWED).into()) };
    Ok(match kind.to_ascii_lowercase().as_str() {
        "vxlan" => {
            let (backend, unknown) = VxlanBackend::from_settings(settings)?;
            (Box::new(backend), unknown)
        }
        "host-gw" => (Box::new(HostGw), settings.unknown(&["Type"])),
        "alloc" => (Box::new(Alloc), settings.unknown(&["Type"])),
        later if LATER.contains(&later) => {
            return Err(unsupported(format!("{later:?}"), "this backend"));
        }
        _ => return Err(settings.bad("Type", ALLOWED).into()),
    })
}

/// The families of a peer that this host has too, each with the peer's public
/// address there.
///
/// Looks at everything in a lease that is not the backend's own: nothing that
/// a peer publishes may take traffic that is not meant for it.
///
/// # Errors
/// Why the peer is skipped, as a phrase.
fn reachable_parts(node: &Node, peer: &Lease, kind: &str) -> Result<Vec<(IpNetwork, IpAddr)>, String> {
    if peer.attrs.backend_type != kind {
        return Err(match &*peer.attrs.backend_type {
            "" => "it names no backend".into(),
            other => format!("its backend is {other}"),
        });
    }
    let mut parts = Vec::new();
    for subnet in peer.subnet.networks() {
        let Some(network) = node.networks.iter().find(|network| network.is_ipv4() == subnet.is_ipv4()) else {
            continue;
        };
        if subnet.ip() != subnet.network() {
            return Err(format!("its subnet has host bits set: {subnet}"));
        }
        if !crate::claim::within(*network, subnet) {
            return Err(format!("its subnet is outside {network}"));
        }
        let ours = node.lease.subnet.networks();
        if let Some(own) = ours.into_iter().find(|own| own.contains(subnet.ip()) || subnet.contains(own.ip()))
        {
            return Err(format!("its subnet overlaps ours, {own}"));
        }
        let Some(address) = peer.attrs.public_address(&subnet) else {
            return Err("it has no public address".into());
        };
        if let Some(flaw) = flaw_of(node, address) {
            return Err(format!("its public address {address} {flaw}"));
        }
        parts.push((subnet, address));
    }
    if parts.is_empty() { Err("it has no subnet of a family that we have".into()) } else { Ok(parts) }
}

/// What makes an address no address of a peer.
fn flaw_of(node: &Node, address: IpAddr) -> Option<&'static str> {
    let underlay = &node.underlay;
    let ours = [underlay.address.into(), underlay.public_address()];
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast {
        Some("is not the address of one host")
    } else if ours.contains(&address) {
        Some("is our own")
    } else if node.networks.iter().any(|network| network.contains(address)) {
        Some("lies inside the network itself")
    } else {
        None
    }
}

/// A member of a backend's data, as text.
fn data_text(data: &Object, key: &str) -> Result<String, String> {
    let text = data.text(key).map_err(|error: BadValue| error.to_string())?;
    text.ok_or_else(|| format!("no {key} in its backend data"))
}
