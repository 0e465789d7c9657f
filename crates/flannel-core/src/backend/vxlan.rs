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

use super::{Backend, Node, data_text, reachable_parts};
use crate::json::{BadValue, Object};
use crate::lease::{BackendData, Lease, LeaseAttrs, MOST_DATA};
use crate::shown::shown;
use crate::state::{
    HostState, Link, LinkKind, LinkName, MacAddr, Object as Wanted, ROUTE_PROTOCOL, Route, RouteKey, Vxlan,
};
use crate::underlay::Underlay;

/// Outer IPv4 (20) + UDP (8) + VXLAN (8) + inner Ethernet (14), RFC 7348 section 5.
pub const VXLAN_OVERHEAD: u32 = 50;

/// The Linux kernel's default port (`drivers/net/vxlan`, module parameter `udp_port`).
const DEFAULT_PORT: u16 = 8472;

/// The identifier has 24 bits (RFC 7348 section 5), but the device is named after it, and an interface's name of 15
/// bytes has room for seven digits behind `flannel.`.
const LARGEST_VNI: u32 = 9_999_999;

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
        format!("flannel.{}", self.vni).parse().expect("seven digits at most fit an interface name")
    }

    /// Above what the interface carries there is nothing to gain: the kernel would cut it.
    fn outer_mtu(&self, underlay: &Underlay) -> u32 {
        self.mtu.unwrap_or(underlay.mtu).min(underlay.mtu)
    }

    /// The VTEP MAC in a lease, with what else its data must be.
    fn peer_mac(&self, data: Option<&BackendData>) -> Result<MacAddr, String> {
        let (vni, mac) = match data.ok_or("it has no backend data")? {
            BackendData::Vtep { vni, mac } => (*vni, *mac),
            BackendData::Json(json) => read_vtep(json.as_str())?,
            BackendData::TooLong(length) => {
                return Err(format!("its backend data has {length} bytes: must have {MOST_DATA} or fewer"));
            }
        };
        if let Some(flaw) = flaw_of(mac) {
            return Err(format!("its VtepMAC {mac} is {flaw}"));
        }
        match vni {
            // Nodes before v0.24 publish only 16 bits of it.
            Some(vni) if vni != self.vni && vni != self.vni & 0xffff => {
                Err(format!("its VNI is {vni}, ours is {}", self.vni))
            }
            _ => Ok(mac),
        }
    }
}

/// VNI and VTEP MAC out of data that is not just these two, or what is wrong with them.
fn read_vtep(json: &str) -> Result<(Option<u32>, MacAddr), String> {
    let data = Object::parse("BackendData", json).map_err(|error| error.to_string())?;
    let text = data_text(&data, "VtepMAC")?;
    let mac = text.parse().map_err(|error| format!("its VtepMAC \"{}\" is {error}", shown(&text)))?;
    let vni = data.number("VNI", 0..=u32::MAX).map_err(|error| error.to_string())?;
    Ok((vni, mac))
}

/// What makes a MAC not the address of one device.
fn flaw_of(mac: MacAddr) -> Option<&'static str> {
    match mac {
        MacAddr([0, 0, 0, 0, 0, 0]) => Some("all zeros"),
        MacAddr([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => Some("the broadcast address"),
        mac if !mac.is_unicast() => Some("a multicast address"),
        _ => None,
    }
}

impl Backend for VxlanBackend {
    fn kind(&self) -> &'static str {
        "vxlan"
    }

    fn links(&self) -> Vec<LinkName> {
        vec![self.device()]
    }

    fn mtu(&self, node: &Node) -> u32 {
        node.mtu.unwrap_or_else(|| self.outer_mtu(&node.underlay).saturating_sub(VXLAN_OVERHEAD))
    }

    fn mtu_cut(&self, underlay: &Underlay) -> bool {
        self.mtu.is_some_and(|mtu| mtu > underlay.mtu)
    }

    fn looks_at_routes(&self) -> bool {
        self.direct_routing
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
        let data = BackendData::Vtep { vni: Some(self.vni), mac };
        LeaseAttrs { backend_data: Some(data), ..underlay.attributes("vxlan") }
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
            mtu: self.mtu(node),
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

    fn plan_peer(&self, node: &Node, peer: &Lease) -> Result<Vec<Wanted>, String> {
        let mut wanted = Vec::with_capacity(3);
        for (subnet, address) in reachable_parts(node, peer, self.kind())? {
            let route = |link, gateway, onlink| Route {
                link,
                gateway: Some(gateway),
                onlink,
                protocol: ROUTE_PROTOCOL,
                decorated: false,
                nexthop: None,
            };
            let direct = if self.direct_routing { node.underlay.attached(address) } else { None };
            if let Some(link) = direct {
                wanted.push(Wanted::Route(RouteKey::to(subnet), route(link, address, false)));
                continue;
            }
            let mac = self.peer_mac(peer.attrs.data(&subnet))?;
            if self.peer_mac(node.lease.attrs.backend_data.as_ref()) == Ok(mac) {
                return Err(format!("its VtepMAC {mac} is our own"));
            }
            let device = self.device();
            wanted.push(Wanted::Neighbour(device, subnet.ip(), mac));
            wanted.push(Wanted::Fdb(device, mac, address));
            wanted.push(Wanted::Route(RouteKey::to(subnet), route(device, subnet.ip(), true)));
        }
        Ok(wanted)
    }
}
