//! Routes of the main table as messages.

use std::net::IpAddr;
use std::num::NonZeroU32;

use flannel_core::state::{LinkName, Nexthop, NexthopId, ROUTE_PROTOCOL, Route, RouteKey};
use ipnetwork::IpNetwork;
use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use super::socket::{Kernel, NetlinkError, Refusal, Request, attributes};
use super::{AddressFamily, address_from_bytes, family, number_at};

/// Bytes of `struct rtmsg` (`linux/rtnetlink.h`): family, lengths of destination
/// and source, type of service, table, protocol, scope, type, flags.
const RTMSG: usize = 12;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_MULTIPATH: u16 = 9;
const RTA_CACHEINFO: u16 = 12;
const RTA_TABLE: u16 = 15;
const RTA_PREF: u16 = 20;
const RTA_NH_ID: u16 = 30;

/// `RTNH_F_ONLINK`.
const ONLINK: u32 = 4;

/// `RTN_UNICAST`.
const UNICAST: u8 = 1;

/// `RTN_BLACKHOLE`.
const BLACKHOLE: u8 = 6;

/// A route as the kernel describes it; its device by index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeenRoute {
    pub(crate) key: RouteKey,
    /// Whether it leads anywhere: others drop or refuse packets.
    pub(crate) unicast: bool,
    /// Whether it drops packets without a word.
    pub(crate) blackhole: bool,
    /// The first one of a route over several; `None` for one of which only its nexthop object is told.
    pub(crate) link: Option<u32>,
    /// Whether it leads over several.
    pub(crate) several: bool,
    pub(crate) gateway: Option<IpAddr>,
    onlink: bool,
    pub(crate) protocol: u8,
    decorated: bool,
    nexthop: Option<NexthopId>,
}

impl SeenRoute {
    /// The route in core's words.
    pub(crate) fn on(self, link: LinkName) -> Route {
        let Self { gateway, onlink, protocol, decorated, nexthop, .. } = self;
        Route { link, gateway, onlink, protocol, decorated, nexthop }
    }

    /// The object it leads through, if that is all that is told: so it is where
    /// `net.ipv4.nexthop_compat_mode` is 0.
    pub(crate) fn only_nexthop(&self) -> Option<NexthopId> {
        self.nexthop.filter(|_| self.link.is_none() && !self.decorated)
    }

    /// The route in core's words, with what its nexthop object says.
    pub(crate) fn through(self, nexthop: &Nexthop) -> Route {
        let Nexthop { link, gateway, onlink, .. } = *nexthop;
        Route { gateway, onlink, ..self.on(link) }
    }
}

/// Routes of the main table without a type of service, in the kernel's order.
pub(crate) fn list(kernel: &mut Kernel, family: AddressFamily) -> Result<Vec<SeenRoute>, NetlinkError> {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    let family = u8::from(family);
    let routes = kernel.dump(RouteNetlinkMessage::GetRoute(message), |_, payload| {
        decode(payload).filter(|_| payload.first() == Some(&family))
    });
    match routes {
        // The main table comes into being with its first route.
        Err(NetlinkError::Refused(Refusal { errno: Errno::ENOENT, .. })) => Ok(vec![]),
        other => other,
    }
}

/// The device and the source address that the kernel would use towards `target`.
pub(crate) fn towards(
    kernel: &mut Kernel,
    target: IpAddr,
) -> Result<Result<(u32, IpAddr), String>, NetlinkError> {
    let mut message = RouteMessage::default();
    message.header.address_family = family(target);
    message.header.destination_prefix_length = if target.is_ipv4() { 32 } else { 128 };
    message.attributes = vec![RouteAttribute::Destination(target.into())];
    let answer = match kernel.get(RouteNetlinkMessage::GetRoute(message))? {
        Ok(RouteNetlinkMessage::NewRoute(answer)) => answer,
        Ok(_) => return Err(NetlinkError::Garbled("no route where one was asked for".into())),
        Err(refusal) => return Ok(Err(refusal.reason(None))),
    };
    let (mut link, mut source) = (None, None);
    for attribute in &answer.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::PrefSource(address) => source = address_of(address),
            _ => {}
        }
    }
    match (link, source) {
        (Some(link), Some(source)) => Ok(Ok((link, source))),
        (None, _) => Ok(Err(format!("the route to {target} names no interface"))),
        (_, None) => Ok(Err(format!("the route to {target} names no source address"))),
    }
}

/// Makes a route, or replaces the one that has its key.
pub(crate) fn put(key: &RouteKey, route: &Route, index: u32) -> Request {
    let mut message = naming(key, route, index);
    message.header.scope = if route.gateway.is_some() || key.destination.is_ipv6() {
        RouteScope::Universe
    } else {
        RouteScope::Link
    };
    if route.onlink && route.nexthop.is_none() {
        message.header.flags = RouteFlags::Onlink;
    }
    Request { flags: NLM_F_CREATE | NLM_F_REPLACE, message: RouteNetlinkMessage::NewRoute(message).into() }
}

/// Deletes a route that looks exactly so; its protocol is named, so that one
/// of somebody else's in its place is not hit.
pub(crate) fn remove(key: &RouteKey, route: &Route, index: u32) -> Request {
    let mut message = naming(key, route, index);
    // The kernel takes this one for any scope.
    message.header.scope = RouteScope::NoWhere;
    Request { flags: 0, message: RouteNetlinkMessage::DelRoute(message).into() }
}

/// Makes a route that drops packets.
pub(crate) fn put_blackhole(key: &RouteKey) -> Request {
    let message = blackhole(key);
    Request { flags: NLM_F_CREATE | NLM_F_REPLACE, message: RouteNetlinkMessage::NewRoute(message).into() }
}

/// Deletes a route of ours that drops packets.
pub(crate) fn remove_blackhole(key: &RouteKey) -> Request {
    let mut message = blackhole(key);
    message.header.scope = RouteScope::NoWhere;
    Request { flags: 0, message: RouteNetlinkMessage::DelRoute(message).into() }
}

fn blackhole(key: &RouteKey) -> RouteMessage {
    let mut message = to(key, ROUTE_PROTOCOL, RouteType::BlackHole);
    message.attributes.push(RouteAttribute::Priority(key.metric));
    message
}

fn to(key: &RouteKey, protocol: u8, kind: RouteType) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(key.destination.ip());
    message.header.destination_prefix_length = key.destination.prefix();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(protocol);
    message.header.kind = kind;
    message.attributes = vec![RouteAttribute::Destination(key.destination.network().into())];
    message
}

fn naming(key: &RouteKey, route: &Route, index: u32) -> RouteMessage {
    let mut message = to(key, route.protocol, RouteType::Unicast);
    match route.nexthop {
        Some(id) => message.attributes.push(RouteAttribute::NhId(id.0.get())),
        None => {
            message.attributes.push(RouteAttribute::Oif(index));
            message.attributes.extend(route.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
        }
    }
    if *key != RouteKey::to(key.destination) {
        message.attributes.push(RouteAttribute::Priority(key.metric));
    }
    message
}

/// Reads a route; `None` for one of another table or with a type of service.
pub(crate) fn decode(payload: &[u8]) -> Option<SeenRoute> {
    let &[family, length, source, tos, table, protocol, _, kind, ..] = payload.first_chunk::<RTMSG>()?;
    if tos != 0 {
        return None;
    }
    let mut table = u32::from(table);
    let mut destination = match AddressFamily::from(family) {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let mut metric = 0;
    let (mut link, mut gateway, mut nexthop) = (None, None, None);
    let mut several = false;
    let mut decorated = source != 0;
    for (kind, value) in attributes(payload, RTMSG) {
        match kind {
            RTA_DST => destination = address_from_bytes(value)?,
            RTA_OIF => link = number_at(value, 0),
            RTA_GATEWAY => gateway = address_from_bytes(value),
            RTA_TABLE => table = number_at(value, 0)?,
            RTA_PRIORITY => metric = number_at(value, 0)?,
            RTA_NH_ID => nexthop = NonZeroU32::new(number_at(value, 0)?).map(NexthopId),
            // IPv6 always tells these two: the third number is when the route expires, and 0 the usual preference.
            RTA_CACHEINFO => decorated |= number_at(value, 8) != Some(0),
            RTA_PREF => decorated |= value != [0],
            RTA_MULTIPATH => {
                (several, decorated) = (true, true);
                link = link.or(number_at(value, 4));
            }
            // A next hop of the other family, metrics, a preferred source.
            _ => decorated = true,
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    let onlink = number_at(payload, 8)? & ONLINK != 0;
    let key = RouteKey { destination: IpNetwork::new(destination, length).ok()?, metric };
    let (unicast, blackhole) = (kind == UNICAST, kind == BLACKHOLE);
    Some(SeenRoute { key, unicast, blackhole, link, several, gateway, onlink, protocol, decorated, nexthop })
}

fn address_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
