//! One tunnel device for all peers (`pkg/backend/vxlan`).
//!
//! The device never asks the network anything: each peer is written down as a
//! triple that leads from its subnet to its host.
//!
//! ```text
//!   route      10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink
//!   neighbour  10.5.2.0 lladdr 0e:…:02 dev flannel.1
//!   fdb        0e:…:02 dst 192.168.0.2 dev flannel.1
//! ```
//!
//! With `DirectRouting`, a peer on a network that we share gets a plain route.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Serialize;

use super::{Backend, Node, data_text, reachable_parts, unicast};
use crate::json::{BadValue, Object};
use crate::lease::{Lease, LeaseAttrs, RawJson};
use crate::state::{HostState, Link, LinkKind, LinkName, MacAddr, ROUTE_PROTOCOL, Route, RouteKey, Vxlan};
use crate::underlay::Underlay;

/// Outer IPv4 (20) + UDP (8) + VXLAN (8) + inner Ethernet (14), RFC 7348 section 5.
pub const VXLAN_OVERHEAD: u32 = 50;

/// The Linux kernel's default port (`drivers/net/vxlan`, module parameter `udp_port`).
const DEFAULT_PORT: u16 = 8472;

/// RFC 7348 section 5: the identifier has 24 bits.
const LARGEST_VNI: u32 = 0xff_ffff;

/// The smallest MTU of IPv4, RFC 791, in a tunnel.
const SMALLEST_MTU: u32 = 68 + VXLAN_OVERHEAD;

/// What `Backend` says in the network config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanBackend {
    vni: u32,
    port: u16,
    /// Of the outer packet.
    mtu: Option<u32>,
    gbp: bool,
    learning: bool,
    direct_routing: bool,
}

/// The backend data of a lease, in flannel's order.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct BackendData {
    #[serde(rename = "VNI")]
    vni: u32,
    #[serde(rename = "VtepMAC")]
    vtep_mac: String,
}

impl VxlanBackend {
    /// Reads the settings; also gives the keys that nobody knows.
    ///
    /// # Errors
    /// A value of the wrong kind or out of range.
    pub fn from_settings(settings: &Object) -> Result<(Self, Vec<String>), BadValue> {
        let backend = Self {
            vni: settings.number("VNI", 0..=LARGEST_VNI)?.unwrap_or(1),
            port: match settings.number("Port", 0..=65535)? {
                None | Some(0) => DEFAULT_PORT,
                Some(port) => u16::try_from(port).expect("the range was checked"),
            },
            mtu: settings.number("MTU", SMALLEST_MTU..=65535)?,
            gbp: settings.switch("GBP")?.unwrap_or(false),
            learning: settings.switch("Learning")?.unwrap_or(false),
            direct_routing: settings.switch("DirectRouting")?.unwrap_or(false),
        };
        // The last two are for Windows; flannel passes them over on Linux, and so do we.
        let known = ["Type", "VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting", "MacPrefix", "Name"];
        Ok((backend, settings.unknown(&known)))
    }

    fn device(&self) -> LinkName {
        format!("flannel.{}", self.vni).parse().expect("eight digits at most fit an interface name")
    }

    /// Above what the interface carries there is nothing to gain: the kernel would cut it.
    fn outer_mtu(&self, underlay: &Underlay) -> u32 {
        self.mtu.unwrap_or(underlay.mtu).min(underlay.mtu)
    }

    /// The VTEP MAC in a lease, with what else its data must be.
    fn peer_mac(&self, data: Option<&RawJson>) -> Result<MacAddr, String> {
        let data = data.ok_or("it has no backend data")?;
        let data = Object::parse("BackendData", data.as_str()).map_err(|error| error.to_string())?;
        let mac = unicast(&data_text(&data, "VtepMAC")?, "VtepMAC")?;
        // Nodes before v0.14 publish no VNI, those before v0.24 only 16 bits of it.
        let vni = data.number("VNI", 0..=u32::MAX).map_err(|error| error.to_string())?;
        match vni {
            Some(vni) if vni != self.vni && vni != self.vni & 0xffff => {
                Err(format!("its VNI is {vni}, ours is {}", self.vni))
            }
            _ => Ok(mac),
        }
    }
}

impl Backend for VxlanBackend {
    fn kind(&self) -> &'static str {
        "vxlan"
    }

    fn links(&self) -> Vec<LinkName> {
        vec![self.device()]
    }

    fn mtu(&self, underlay: &Underlay) -> u32 {
        self.outer_mtu(underlay).saturating_sub(VXLAN_OVERHEAD)
    }

    fn mtu_cut(&self, underlay: &Underlay) -> bool {
        self.mtu.is_some_and(|mtu| mtu > underlay.mtu)
    }

    fn check(&self, underlay: &Underlay) -> Result<(), String> {
        if underlay.mtu >= SMALLEST_MTU {
            return Ok(());
        }
        Err(format!(
            "the MTU of {} is {}: must be {SMALLEST_MTU} or more for vxlan",
            underlay.link, underlay.mtu
        ))
    }

    fn attributes(&self, underlay: &Underlay, observed: &HostState, random: MacAddr) -> LeaseAttrs {
        // A new MAC would make every peer rewrite its entries for us, and until then they send to a MAC that is gone.
        let standing =
            observed.links.get(&self.device()).filter(|link| matches!(link.kind, LinkKind::Vxlan(_)));
        let mac = standing.map(|link| link.mac).filter(MacAddr::is_unicast).unwrap_or(random);
        let data = BackendData { vni: self.vni, vtep_mac: mac.to_string() };
        LeaseAttrs { backend_data: Some(RawJson::of(&data)), ..underlay.attributes("vxlan") }
    }

    fn plan_node(&self, node: &Node) -> HostState {
        let mut state = HostState::default();
        // Without a MAC of our own in our own lease there is nothing to build; `attributes` always gives one.
        let Ok(mac) = self.peer_mac(node.lease.attrs.backend_data.as_ref()) else { return state };
        let device = self.device();
        let link = Link {
            kind: LinkKind::Vxlan(Vxlan {
                vni: self.vni,
                port: self.port,
                local: Some(IpAddr::V4(node.underlay.address)),
                lower: Some(node.underlay.link),
                learning: self.learning,
                gbp: self.gbp,
            }),
            mac,
            mtu: self.mtu(&node.underlay),
            up: true,
        };
        state.links.insert(device, link);
        for subnet in node.lease.subnet.networks() {
            let bits = if subnet.is_ipv4() { 32 } else { 128 };
            let address = IpNetwork::new(subnet.network(), bits).expect("a full prefix is one");
            state.addresses.insert((device, address));
        }
        state
    }

    fn plan_peer(&self, node: &Node, peer: &Lease) -> Result<HostState, String> {
        let mut state = HostState::default();
        for (subnet, address) in reachable_parts(node, peer, self.kind())? {
            let route = |link, gateway, onlink| Route {
                link,
                gateway: Some(gateway),
                onlink,
                protocol: ROUTE_PROTOCOL,
                decorated: false,
            };
            if let Some(link) = node.underlay.attached(address).filter(|_| self.direct_routing) {
                state.routes.insert(RouteKey::to(subnet), route(link, address, false));
                continue;
            }
            let data = if subnet.is_ipv4() { &peer.attrs.backend_data } else { &peer.attrs.backend_v6_data };
            let mac = self.peer_mac(data.as_ref())?;
            if self.peer_mac(node.lease.attrs.backend_data.as_ref()) == Ok(mac) {
                return Err(format!("its VtepMAC {mac} is our own"));
            }
            let device = self.device();
            state.neighbours.insert((device, subnet.ip()), mac);
            state.fdb.insert((device, mac), address);
            state.routes.insert(RouteKey::to(subnet), route(device, subnet.ip(), true));
        }
        Ok(state)
    }
}
