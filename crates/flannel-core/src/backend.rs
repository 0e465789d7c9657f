//! How the hosts reach each other's subnets: one planner per kind of tunnel.
//!
//! A backend turns facts into desired state and does nothing else. It works on
//! one peer at a time: the plan for a cluster is that function over all peers
//! (see [`crate::plan`]), and one peer that changes costs one peer's planning.
//! Planning cannot fail: a peer that cannot be reached is skipped, with the
//! reason.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::claim::{overlap, within};
use crate::json::{BadValue, Object};
use crate::lease::{Lease, LeaseAttrs, Subnet};
use crate::network::{ConfigError, NetworkConfig, Pool};
use crate::shown::shown;
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
    /// The cluster's networks, and which subnets of them are handed out.
    pub pools: Vec<Pool>,
    /// The interface between the hosts.
    pub underlay: Underlay,
    /// Our own lease.
    pub lease: Lease,
    /// An MTU of our device that somebody else insists on, in bytes; `None` for the one that follows from the underlay.
    pub mtu: Option<u32>,
}

impl Node {
    /// The cluster's networks.
    pub fn networks(&self) -> impl Iterator<Item = IpNetwork> {
        self.pools.iter().map(|pool| pool.network)
    }

    /// Whether the network config could hand a subnet out; a part of a family
    /// that this host does not have is not looked at.
    pub fn hands_out(&self, subnet: Subnet) -> bool {
        subnet.networks().all(|part| {
            self.pools.iter().all(|pool| pool.is_ipv4() != part.is_ipv4() || pool.leases_out(part))
        })
    }
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
            other => format!("its backend is {}", shown(other)),
        });
    }
    let mut parts = Vec::new();
    for part in peer.subnet.networks() {
        let Some(pool) = node.pools.iter().find(|pool| pool.is_ipv4() == part.is_ipv4()) else {
            continue;
        };
        if let Some(flaw) = flaw_of_subnet(node, pool, part) {
            return Err(format!("its subnet {flaw}"));
        }
        let Some(address) = peer.attrs.public_address(&part) else {
            return Err("it has no public address".into());
        };
        if let Some(flaw) = flaw_of_address(node, address) {
            return Err(format!("its public address {address} {flaw}"));
        }
        parts.push((part, address));
    }
    if parts.is_empty() { Err("it has no subnet of a family that we have".into()) } else { Ok(parts) }
}

/// What makes a prefix no subnet of a peer.
fn flaw_of_subnet(node: &Node, pool: &Pool, part: IpNetwork) -> Option<String> {
    let network = pool.network;
    if part.ip() != part.network() {
        return Some(format!("has host bits set: {part}"));
    }
    if part.prefix() == 0 {
        return Some("is the default route".into());
    }
    if part == network {
        return Some(format!("is all of {network}"));
    }
    if within(part, network) {
        return Some(format!("contains all of {network}"));
    }
    if !within(network, part) {
        return Some(format!("is outside {network}"));
    }
    if let Some(own) = node.lease.subnet.networks().find(|own| overlap(*own, part)) {
        return Some(format!("overlaps ours, {own}"));
    }
    // A route to it would take the way to the other hosts away.
    let near = node.underlay.networks.iter().find(|near| overlap(**near, part))?;
    Some(format!("overlaps {near}, where {} has an address", node.underlay.link))
}

/// What makes an address no address of a peer.
fn flaw_of_address(node: &Node, address: IpAddr) -> Option<String> {
    let underlay = &node.underlay;
    if let Some(flaw) = no_host(address) {
        return Some(flaw.into());
    }
    if [underlay.address.into(), underlay.public_address()].contains(&address) {
        return Some("is our own".into());
    }
    if let Some(network) = node.networks().find(|network| network.contains(address)) {
        return Some(format!("lies in {network} itself"));
    }
    // The last two addresses of a network of two are hosts (RFC 3021), and IPv6 has no broadcast.
    let mut near = underlay.networks.iter().filter(|near| near.is_ipv4() && near.prefix() < 31);
    near.find_map(|near| match address {
        address if address == near.broadcast() => Some(format!("is the broadcast address of {near}")),
        address if address == near.network() => Some(format!("is the network address of {near}")),
        _ => None,
    })
}

/// What makes an address nobody's, on any host (RFC 6890, and RFC 1112 for the last 240/4).
pub(crate) fn no_host(address: IpAddr) -> Option<&'static str> {
    match address {
        address if address.is_unspecified() => Some("is unspecified"),
        address if address.is_loopback() => Some("is a loopback address"),
        address if address.is_multicast() => Some("is a multicast address"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("is the broadcast address"),
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some("lies in 0.0.0.0/8, which is nobody's"),
        IpAddr::V4(v4) if v4.octets()[0] >= 240 => Some("lies in 240.0.0.0/4, which is reserved"),
        _ => None,
    }
}

/// A member of a backend's data, as text.
fn data_text(data: &Object, key: &str) -> Result<String, String> {
    let text = data.text(key).map_err(|error: BadValue| error.to_string())?;
    text.ok_or_else(|| format!("no {key} in its backend data"))
}
