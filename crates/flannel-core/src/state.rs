//! What a host's kernel holds for us, as a value.
//!
//! One type serves for what should be and for what is: "in sync" means equal.
//! Everything is keyed the way the kernel keys it, by interface *name*; indexes
//! do not exist outside `flannel-linux`. Printed, it is one object per line, in
//! words that an `ip` user can read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::IpNetwork;
use thiserror::Error;

/// The protocol number of every route we make. Unassigned in iproute2's
/// `rt_protos`; `config/rt_protos.d` gives it the name `flannel`.
pub const ROUTE_PROTOCOL: u8 = 76;

/// `RTPROT_BOOT`: what Go flanneld marks its routes with, and what a route
/// added by hand carries (`linux/rtnetlink.h`).
pub const ROUTE_PROTOCOL_BOOT: u8 = 3;

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
                Vxlan { learning: should.learning, ..is.clone() } == *should
            }
            _ => self.kind == desired.kind,
        }
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
    /// Routes of the main table.
    pub routes: BTreeMap<RouteKey, Route>,
}

impl HostState {
    /// Takes in everything of `other`; where both have a key, `other` wins.
    pub fn merge(&mut self, other: HostState) {
        self.links.extend(other.links);
        self.addresses.extend(other.addresses);
        self.neighbours.extend(other.neighbours);
        self.fdb.extend(other.fdb);
        self.routes.extend(other.routes);
    }

    /// The part of this state that has a key of `one` or of `other`.
    pub fn select(&self, one: &HostState, other: &HostState) -> HostState {
        let mut part = HostState::default();
        for keys in [one, other] {
            pick(&self.links, &keys.links, &mut part.links);
            pick(&self.neighbours, &keys.neighbours, &mut part.neighbours);
            pick(&self.fdb, &keys.fdb, &mut part.fdb);
            pick(&self.routes, &keys.routes, &mut part.routes);
            part.addresses.extend(keys.addresses.intersection(&self.addresses));
        }
        part
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
        self.routes.retain(|_, route| route.link != name);
    }
}

fn pick<K: Ord + Copy, V: Clone>(from: &BTreeMap<K, V>, keys: &BTreeMap<K, V>, into: &mut BTreeMap<K, V>) {
    for key in keys.keys() {
        if let Some(value) = from.get(key) {
            into.insert(*key, value.clone());
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            LinkKind::Vxlan(vxlan) => {
                write!(f, "vxlan id {}", vxlan.vni)?;
                if let Some(local) = vxlan.local {
                    write!(f, " local {local}")?;
                }
                if let Some(lower) = vxlan.lower {
                    write!(f, " dev {lower}")?;
                }
                write!(f, " dstport {}", vxlan.port)?;
                f.write_str(if vxlan.learning { " learning" } else { " nolearning" })?;
                if vxlan.gbp {
                    f.write_str(" gbp")?;
                }
            }
            LinkKind::Other(words) => f.write_str(words)?,
        }
        let state = if self.up { "up" } else { "down" };
        write!(f, " address {} mtu {} {state}", self.mac, self.mtu)
    }
}

impl fmt::Display for Route {
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
        if self.onlink {
            f.write_str(" onlink")?;
        }
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
        for (key, route) in &self.routes {
            writeln!(f, "route {key} {route}")?;
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
