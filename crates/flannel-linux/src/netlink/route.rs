//! Routes of the main table as messages.

use std::net::IpAddr;

use flannel_core::state::{LinkName, Route, RouteKey};
use ipnetwork::IpNetwork;
use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RoutePreference, RouteProtocol,
    RouteScope, RouteType, RouteVia,
};

use super::socket::{Kernel, NetlinkError, Refusal, Request};
use super::{AddressFamily, family};

/// A route as the kernel describes it; its device by index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeenRoute {
    pub(crate) key: RouteKey,
    /// `None` for a route over several.
    pub(crate) link: Option<u32>,
    pub(crate) gateway: Option<IpAddr>,
    onlink: bool,
    pub(crate) protocol: u8,
    decorated: bool,
}

impl SeenRoute {
    /// The route in core's words.
    pub(crate) fn on(self, link: LinkName) -> Route {
        let Self { gateway, onlink, protocol, decorated, .. } = self;
        Route { link, gateway, onlink, protocol, decorated }
    }
}

/// Which routes to list; the kernel does the choosing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Filter {
    /// Those that leave by this device.
    pub(crate) link: Option<u32>,
    /// Those that carry this protocol number.
    pub(crate) protocol: Option<u8>,
}

/// Unicast routes of the main table without a type of service, in the kernel's order.
pub(crate) fn list(
    kernel: &mut Kernel,
    family: AddressFamily,
    filter: Filter,
) -> Result<Vec<SeenRoute>, NetlinkError> {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unicast;
    message.header.protocol = RouteProtocol::from(filter.protocol.unwrap_or(0));
    message.attributes.extend(filter.link.map(RouteAttribute::Oif));
    let routes = kernel.dump(RouteNetlinkMessage::GetRoute(message), |part| match part {
        RouteNetlinkMessage::NewRoute(message) if message.header.address_family == family => {
            decode(&message, filter.link)
        }
        _ => None,
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
    if route.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    Request { flags: NLM_F_CREATE | NLM_F_REPLACE, message: RouteNetlinkMessage::NewRoute(message) }
}

/// Deletes a route that looks exactly so; its protocol is named, so that one
/// of somebody else's in its place is not hit.
pub(crate) fn remove(key: &RouteKey, route: &Route, index: u32) -> Request {
    let mut message = naming(key, route, index);
    // The kernel takes this one for any scope.
    message.header.scope = RouteScope::NoWhere;
    Request { flags: 0, message: RouteNetlinkMessage::DelRoute(message) }
}

fn naming(key: &RouteKey, route: &Route, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(key.destination.ip());
    message.header.destination_prefix_length = key.destination.prefix();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.kind = RouteType::Unicast;
    message.attributes =
        vec![RouteAttribute::Destination(key.destination.network().into()), RouteAttribute::Oif(index)];
    message.attributes.extend(route.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
    if *key != RouteKey::to(key.destination) {
        message.attributes.push(RouteAttribute::Priority(key.metric));
    }
    message
}

/// `through` is the device that was asked for: a route over several counts as through it.
fn decode(message: &RouteMessage, through: Option<u32>) -> Option<SeenRoute> {
    let header = &message.header;
    if header.tos != 0 || header.kind != RouteType::Unicast {
        return None;
    }
    let mut destination = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let mut metric = 0;
    let (mut link, mut gateway) = (None, None);
    let mut decorated = header.source_prefix_length != 0;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = address_of(address)?,
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Gateway(address) => gateway = address_of(address),
            RouteAttribute::Via(via) => {
                decorated = true;
                gateway = match via {
                    RouteVia::Inet(address) => Some(IpAddr::V4(*address)),
                    RouteVia::Inet6(address) => Some(IpAddr::V6(*address)),
                    _ => None,
                };
            }
            RouteAttribute::Table(table) if *table != u32::from(RouteHeader::RT_TABLE_MAIN) => return None,
            RouteAttribute::Table(_) => {}
            RouteAttribute::Priority(priority) => metric = *priority,
            // IPv6 always tells these two.
            RouteAttribute::CacheInfo(cache) => decorated |= cache.expires != 0,
            RouteAttribute::Preference(preference) => decorated |= *preference != RoutePreference::Medium,
            RouteAttribute::MultiPath(_) => {
                decorated = true;
                link = link.or(through);
            }
            _ => decorated = true,
        }
    }
    let destination = IpNetwork::new(destination, header.destination_prefix_length).ok()?;
    Some(SeenRoute {
        key: RouteKey { destination, metric },
        link,
        gateway,
        onlink: header.flags.contains(RouteFlags::Onlink),
        protocol: header.protocol.into(),
        decorated,
    })
}

fn address_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}
