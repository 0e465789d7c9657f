//! What a host's kernel holds for us, as a value.
//!
//! One type serves for what should be and for what is: "in sync" means equal.
//! Everything is keyed the way the kernel keys it, by interface *name*; indexes
//! do not exist outside `flannel-linux`. Printed, it is one object per line, in
//! words that an `ip` user can read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;
use std::str::FromStr;

use ipnetwork::IpNetwork;
use thiserror::Error;

/// The protocol number of every route we make. Unassigned in iproute2's
/// `rt_protos`; `config/rt_protos.d` gives it the name `flannel`.
pub const ROUTE_PROTOCOL: u8 = 76;

/// `RTPROT_BOOT`: what Go flanneld marks its routes with, and what a route
/// added by hand carries (`linux/rtnetlink.h`).
pub const ROUTE_PROTOCOL_BOOT: u8 = 3;

/// The metric of the route that drops what nothing else takes: the last of all,
/// so that docker's own route to the same subnet goes before it.
pub const BLACKHOLE_METRIC: u32 = u32::MAX;

/// An interface name: 1 to 15 bytes (`IFNAMSIZ` less the final zero).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkName {
    bytes: [u8; 15],
    len: u8,
}

/// A text that cannot name an interface.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is no interface name: must be 1 to 15 bytes without '/' or white space")]
pub struct BadLinkName(String);

impl LinkName {
    /// The name.
    ///
    /// # Panics
    /// Never: it was made from text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).expect("a name is made from text")
    }
}

impl FromStr for LinkName {
    type Err = BadLinkName;

    fn from_str(text: &str) -> Result<Self, BadLinkName> {
        let allowed = |c: char| c != '/' && !c.is_whitespace() && !c.is_control();
        if text.is_empty() || text.len() > 15 || !text.chars().all(allowed) {
            return Err(BadLinkName(text.chars().take(40).collect()));
        }
        let mut bytes = [0; 15];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes, len: text.len() as u8 })
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Makes six random bytes a locally administered unicast address, as
    /// flannel does (`pkg/mac/mac.go`).
    pub fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = (bytes[0] & 0xfe) | 0x02;
        Self(bytes)
    }

    /// Whether one interface can have it: neither multicast nor all zeros.
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("not an Ethernet address of six bytes")]
pub struct BadMacAddr;

impl FromStr for MacAddr {
    type Err = BadMacAddr;

    /// Reads `0e:00:00:00:00:01`, the same with `-`, and `0e00.0000.0001`.
    fn from_str(text: &str) -> Result<Self, BadMacAddr> {
        let (separator, group) = if text.contains('.') {
            ('.', 4)
        } else if text.contains('-') {
            ('-', 2)
        } else {
            (':', 2)
        };
        let mut bytes = [0; 6];
        let mut count = 0;
        for part in text.split(separator) {
            if part.len() != group || !part.is_ascii() {
                return Err(BadMacAddr);
            }
            for start in (0..group).step_by(2) {
                let byte = bytes.get_mut(count).ok_or(BadMacAddr)?;
                let digits = &part[start..start + 2];
                if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                    return Err(BadMacAddr);
                }
                *byte = u8::from_str_radix(digits, 16).map_err(|_| BadMacAddr)?;
                count += 1;
            }
        }
        if count == 6 { Ok(Self(bytes)) } else { Err(BadMacAddr) }
    }
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// What it is.
    pub kind: LinkKind,
    /// Its own address.
    pub mac: MacAddr,
    /// In bytes, of the inner IP packet.
    pub mtu: u32,
    /// Whether it is switched on.
    pub up: bool,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A VXLAN device that we could have made.
    Vxlan(Vxlan),
    /// Anything else, in words: `bridge`, `vxlan with a multicast group`.
    Other(Box<str>),
}

/// The parameters of a VXLAN device (RFC 7348, `linux/if_link.h` `IFLA_VXLAN_*`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// The network identifier, 24 bits.
    pub vni: u32,
    /// The UDP port, the same at both ends.
    pub port: u16,
    /// The source address of the outer packet.
    pub local: Option<IpAddr>,
    /// The interface the outer packet leaves by.
    pub lower: Option<LinkName>,
    /// Whether the device learns addresses from what it receives.
    pub learning: bool,
    /// Whether the group based policy extension is on.
    pub gbp: bool,
}

impl Link {
    /// Whether this device can be made into `desired` while it stands.
    pub fn can_become(&self, desired: &Link) -> bool {
        match (&self.kind, &desired.kind) {
            (LinkKind::Vxlan(is), LinkKind::Vxlan(should)) => {
                let Vxlan { local, lower, learning, .. } = *should;
                // Where it sends from can be changed, but not taken away or moved to the other family.
                let source = match (is.local, local) {
                    (Some(is), Some(should)) => is.is_ipv4() == should.is_ipv4(),
                    (is, should) => is == should,
                };
                let device = is.lower == lower || lower.is_some();
                source && device && Vxlan { local, lower, learning, ..is.clone() } == *should
            }
            _ => self.kind == desired.kind,
        }
    }
}

impl Link {
    /// What is not as it should be, as a phrase: `mtu 1300, not 1450; down`.
    pub fn differences(&self, should: &Link) -> String {
        let mut differing = Vec::new();
        if self.mac != should.mac {
            differing.push(format!("address {}, not {}", self.mac, should.mac));
        }
        if self.mtu != should.mtu {
            differing.push(format!("mtu {}, not {}", self.mtu, should.mtu));
        }
        if self.up != should.up {
            differing.push(if self.up { "up" } else { "down" }.into());
        }
        if self.kind != should.kind {
            differing.push(format!("{}, not {}", self.kind, should.kind));
        }
        differing.join("; ")
    }
}

/// What the kernel tells routes in the main table apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// Where to.
    pub destination: IpNetwork,
    /// The priority; 0 for IPv4, 1024 for IPv6 unless said otherwise.
    pub metric: u32,
}

impl RouteKey {
    /// The key of the route that drops what nothing else takes.
    pub fn blackhole(destination: IpNetwork) -> Self {
        Self { destination, metric: BLACKHOLE_METRIC }
    }

    /// The key of a route that names no metric.
    pub fn to(destination: IpNetwork) -> Self {
        Self { destination, metric: if destination.is_ipv4() { 0 } else { 1024 } }
    }
}

/// A unicast route in the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The interface it leaves by.
    pub link: LinkName,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// Whether the next hop is taken to be on the link whatever the addresses say.
    pub onlink: bool,
    /// Who made it.
    pub protocol: u8,
    /// Whether it carries anything that we never set: a preferred source, metrics, a weight.
    pub decorated: bool,
    /// The nexthop object that says where it leads; device and next hop are then that object's.
    pub nexthop: Option<NexthopId>,
}

/// The number of a nexthop object, one of its network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NexthopId(pub NonZeroU32);

impl NexthopId {
    /// Our number for the object of a gateway: the IPv4 address itself. Our
    /// gateways lie in the cluster's network, which nobody else numbers by.
    ///
    /// `None` for IPv6, whose routes have no need of such objects: there the
    /// kernel does not look for a route's like among all others.
    pub fn of(gateway: IpAddr) -> Option<Self> {
        match gateway {
            IpAddr::V4(v4) => NonZeroU32::new(v4.to_bits()).map(Self),
            IpAddr::V6(_) => None,
        }
    }

    /// The gateway that the number stands for.
    pub fn gateway(self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_bits(self.0.get()))
    }
}

impl fmt::Display for NexthopId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A nexthop object with one device: what routes can share instead of each
/// saying it (`linux/nexthop.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nexthop {
    /// The interface.
    pub link: LinkName,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// Whether the next hop is taken to be on the link whatever the addresses say.
    pub onlink: bool,
    /// Who made it.
    pub protocol: u8,
}

/// One object of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A device.
    Link(LinkName, Box<Link>),
    /// An address of a device.
    Address(LinkName, IpNetwork),
    /// A permanent neighbour entry.
    Neighbour(LinkName, IpAddr, MacAddr),
    /// A permanent forwarding entry.
    Fdb(LinkName, MacAddr, IpAddr),
    /// A nexthop object.
    Nexthop(NexthopId, Nexthop),
    /// A route of the main table.
    Route(RouteKey, Route),
    /// A route of ours in the main table that drops packets.
    Blackhole(RouteKey),
}

/// What the kernel tells objects apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A device.
    Link(LinkName),
    /// An address of a device.
    Address(LinkName, IpNetwork),
    /// A permanent neighbour entry.
    Neighbour(LinkName, IpAddr),
    /// A permanent forwarding entry.
    Fdb(LinkName, MacAddr),
    /// A nexthop object.
    Nexthop(NexthopId),
    /// A route of the main table.
    Route(RouteKey),
    /// A route of the main table that drops packets.
    Blackhole(RouteKey),
}

impl Object {
    /// What the kernel tells it apart by.
    pub fn key(&self) -> Key {
        match self {
            Self::Link(name, _) => Key::Link(*name),
            Self::Address(link, address) => Key::Address(*link, *address),
            Self::Neighbour(link, ip, _) => Key::Neighbour(*link, *ip),
            Self::Fdb(link, mac, _) => Key::Fdb(*link, *mac),
            Self::Nexthop(id, _) => Key::Nexthop(*id),
            Self::Route(key, _) => Key::Route(*key),
            Self::Blackhole(key) => Key::Blackhole(*key),
        }
    }
}

/// The objects of a host, by the keys the kernel knows them by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// Devices.
    pub links: BTreeMap<LinkName, Link>,
    /// Addresses of devices.
    pub addresses: BTreeSet<(LinkName, IpNetwork)>,
    /// Permanent neighbour entries.
    pub neighbours: BTreeMap<(LinkName, IpAddr), MacAddr>,
    /// Permanent forwarding entries: which host a MAC lives on.
    pub fdb: BTreeMap<(LinkName, MacAddr), IpAddr>,
    /// Nexthop objects.
    pub nexthops: BTreeMap<NexthopId, Nexthop>,
    /// Routes of the main table.
    pub routes: BTreeMap<RouteKey, Route>,
    /// Routes of the main table that drop packets.
    pub blackholes: BTreeSet<RouteKey>,
}

impl HostState {
    /// Takes an object in, in the place of one with the same key.
    pub fn put(&mut self, object: Object) {
        match object {
            Object::Link(name, link) => drop(self.links.insert(name, *link)),
            Object::Address(link, address) => drop(self.addresses.insert((link, address))),
            Object::Neighbour(link, ip, mac) => drop(self.neighbours.insert((link, ip), mac)),
            Object::Fdb(link, mac, remote) => drop(self.fdb.insert((link, mac), remote)),
            Object::Nexthop(id, nexthop) => drop(self.nexthops.insert(id, nexthop)),
            Object::Route(key, route) => drop(self.routes.insert(key, route)),
            Object::Blackhole(key) => drop(self.blackholes.insert(key)),
        }
    }

    /// The object with that key.
    pub fn get(&self, key: &Key) -> Option<Object> {
        Some(match *key {
            Key::Link(name) => Object::Link(name, Box::new(self.links.get(&name)?.clone())),
            Key::Address(link, address) => {
                self.addresses.get(&(link, address)).map(|_| Object::Address(link, address))?
            }
            Key::Neighbour(link, ip) => Object::Neighbour(link, ip, *self.neighbours.get(&(link, ip))?),
            Key::Fdb(link, mac) => Object::Fdb(link, mac, *self.fdb.get(&(link, mac))?),
            Key::Nexthop(id) => Object::Nexthop(id, *self.nexthops.get(&id)?),
            Key::Route(key) => Object::Route(key, *self.routes.get(&key)?),
            Key::Blackhole(key) => self.blackholes.get(&key).map(|key| Object::Blackhole(*key))?,
        })
    }

    /// Takes the object with that key out.
    pub fn remove(&mut self, key: &Key) {
        match *key {
            Key::Link(name) => drop(self.links.remove(&name)),
            Key::Address(link, address) => drop(self.addresses.remove(&(link, address))),
            Key::Neighbour(link, ip) => drop(self.neighbours.remove(&(link, ip))),
            Key::Fdb(link, mac) => drop(self.fdb.remove(&(link, mac))),
            Key::Nexthop(id) => drop(self.nexthops.remove(&id)),
            Key::Route(key) => drop(self.routes.remove(&key)),
            Key::Blackhole(key) => drop(self.blackholes.remove(&key)),
        }
    }

    /// Puts the object in, or takes out what has the key if there is none.
    pub fn set(&mut self, key: &Key, object: Option<Object>) {
        match object {
            Some(object) => self.put(object),
            None => self.remove(key),
        }
    }

    /// Forgets the neighbours of a device, as the kernel does when its MAC changes.
    pub fn drop_neighbours(&mut self, name: LinkName) {
        self.neighbours.retain(|(link, _), _| *link != name);
    }

    /// Forgets a device and all that the kernel drops with it.
    pub fn drop_link(&mut self, name: LinkName) {
        self.links.remove(&name);
        self.addresses.retain(|(link, _)| *link != name);
        self.drop_neighbours(name);
        self.fdb.retain(|(link, _), _| *link != name);
        self.nexthops.retain(|_, nexthop| nexthop.link != name);
        self.routes.retain(|_, route| route.link != name);
    }

    /// Forgets a nexthop object and the routes that lead through it, as the kernel does.
    pub fn drop_nexthop(&mut self, id: NexthopId) {
        if self.nexthops.remove(&id).is_some() {
            self.routes.retain(|_, route| route.nexthop != Some(id));
        }
    }
}

/// Many objects at once; of two with one key the last counts.
impl FromIterator<Object> for HostState {
    fn from_iter<I: IntoIterator<Item = Object>>(objects: I) -> Self {
        // A map built from a list is half the size of one that grew key by key.
        let mut links = Vec::new();
        let mut addresses = Vec::new();
        let mut neighbours = Vec::new();
        let mut fdb = Vec::new();
        let mut nexthops = Vec::new();
        let mut routes = Vec::new();
        let mut blackholes = BTreeSet::new();
        for object in objects {
            match object {
                Object::Link(name, link) => links.push((name, *link)),
                Object::Address(link, address) => addresses.push((link, address)),
                Object::Neighbour(link, ip, mac) => neighbours.push(((link, ip), mac)),
                Object::Fdb(link, mac, remote) => fdb.push(((link, mac), remote)),
                Object::Nexthop(id, nexthop) => nexthops.push((id, nexthop)),
                Object::Route(key, route) => routes.push((key, route)),
                Object::Blackhole(key) => drop(blackholes.insert(key)),
            }
        }
        Self {
            links: links.into_iter().collect(),
            addresses: addresses.into_iter().collect(),
            neighbours: neighbours.into_iter().collect(),
            fdb: fdb.into_iter().collect(),
            nexthops: nexthops.into_iter().collect(),
            routes: routes.into_iter().collect(),
            blackholes,
        }
    }
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vxlan = match self {
            LinkKind::Vxlan(vxlan) => vxlan,
            LinkKind::Other(words) => return f.write_str(words),
        };
        write!(f, "vxlan id {}", vxlan.vni)?;
        if let Some(local) = vxlan.local {
            write!(f, " local {local}")?;
        }
        if let Some(lower) = vxlan.lower {
            write!(f, " dev {lower}")?;
        }
        write!(f, " dstport {}", vxlan.port)?;
        f.write_str(if vxlan.learning { " learning" } else { " nolearning" })?;
        if vxlan.gbp { f.write_str(" gbp") } else { Ok(()) }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.up { "up" } else { "down" };
        write!(f, "{} address {} mtu {} {state}", self.kind, self.mac, self.mtu)
    }
}

impl fmt::Display for Nexthop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(gateway) = self.gateway {
            write!(f, "via {gateway} ")?;
        }
        write!(f, "dev {}", self.link)?;
        match self.protocol {
            ROUTE_PROTOCOL => f.write_str(" proto flannel")?,
            ROUTE_PROTOCOL_BOOT => f.write_str(" proto boot")?,
            other => write!(f, " proto {other}")?,
        }
        if self.onlink { f.write_str(" onlink") } else { Ok(()) }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(id) = self.nexthop {
            write!(f, "nhid {id} ")?;
        }
        let Self { link, gateway, onlink, protocol, .. } = *self;
        write!(f, "{}", Nexthop { link, gateway, onlink, protocol })?;
        if self.decorated {
            f.write_str(" (and more)")?;
        }
        Ok(())
    }
}

impl fmt::Display for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.destination)?;
        if *self == Self::to(self.destination) { Ok(()) } else { write!(f, " metric {}", self.metric) }
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, link) in &self.links {
            writeln!(f, "link {name} {link}")?;
        }
        for (link, address) in &self.addresses {
            writeln!(f, "address {address} dev {link}")?;
        }
        for ((link, ip), mac) in &self.neighbours {
            writeln!(f, "neighbour {ip} lladdr {mac} dev {link}")?;
        }
        for ((link, mac), remote) in &self.fdb {
            writeln!(f, "fdb {mac} dst {remote} dev {link}")?;
        }
        for (id, nexthop) in &self.nexthops {
            writeln!(f, "nexthop {id} {nexthop}")?;
        }
        for (key, route) in &self.routes {
            writeln!(f, "route {key} {route}")?;
        }
        for key in &self.blackholes {
            writeln!(f, "blackhole {key}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_reads_in_the_forms_go_reads() {
        let mac = MacAddr([0x0e, 0, 0, 0, 0xab, 1]);

        for text in ["0e:00:00:00:ab:01", "0E-00-00-00-AB-01", "0e00.0000.ab01"] {
            assert_eq!(text.parse(), Ok(mac), "{text}");
        }
        assert_eq!(mac.to_string(), "0e:00:00:00:ab:01");
    }

    #[test]
    fn what_is_no_mac_of_six_bytes_is_refused() {
        for text in [
            "",
            "0e",
            "0e:00:00:00:00",
            "0e:00:00:00:00:00:00:01",
            "0e:00:00:00:00:0g",
            "e:0:0:0:0:1",
            "+e:00:00:00:00:01",
        ] {
            assert_eq!(text.parse::<MacAddr>(), Err(BadMacAddr), "{text}");
        }
    }

    #[test]
    fn what_differs_of_a_device_is_told_and_nothing_else() {
        let should =
            Link { kind: LinkKind::Other("bridge".into()), mac: MacAddr([2; 6]), mtu: 1450, up: true };

        let is = Link { mtu: 1300, up: false, ..should.clone() };

        assert_eq!(is.differences(&should), "mtu 1300, not 1450; down");
        assert_eq!(should.differences(&should), "");
    }

    #[test]
    fn a_random_mac_is_local_and_unicast() {
        assert_eq!(MacAddr::local([0xff; 6]).0[0], 0xfe);
        assert!(MacAddr::local([0; 6]).is_unicast());
    }

    #[test]
    fn an_interface_name_has_at_most_fifteen_bytes() {
        assert_eq!("flannel.1".parse::<LinkName>().unwrap().to_string(), "flannel.1");
        assert!("flannel.16777215".parse::<LinkName>().is_err());
        assert!("a/b".parse::<LinkName>().is_err());
        assert!("".parse::<LinkName>().is_err());
    }
}
