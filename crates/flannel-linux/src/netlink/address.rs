//! Addresses of devices as messages.

use std::net::IpAddr;

use flannel_core::underlay::InterfaceAddress;
use ipnetwork::IpNetwork;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};

use super::socket::{Kernel, NetlinkError, Request, decode_part};
use super::{AddressFamily, family};

/// The addresses of one device, or of all, in the kernel's order; with the index of their device.
pub(crate) fn list(
    kernel: &mut Kernel,
    family: AddressFamily,
    index: Option<u32>,
) -> Result<Vec<(u32, InterfaceAddress)>, NetlinkError> {
    let mut message = AddressMessage::default();
    message.header.family = family;
    message.header.index = index.unwrap_or(0);
    kernel.dump(RouteNetlinkMessage::GetAddress(message), |kind, payload| match decode_part(kind, payload)? {
        RouteNetlinkMessage::NewAddress(message) if message.header.family == family => decode(&message),
        _ => None,
    })
}

/// Reads an address that the kernel tells of.
pub(crate) fn read(kind: u16, payload: &[u8]) -> Option<(u32, InterfaceAddress)> {
    match decode_part(kind, payload)? {
        RouteNetlinkMessage::NewAddress(message) | RouteNetlinkMessage::DelAddress(message) => {
            decode(&message)
        }
        _ => None,
    }
}

/// Gives a device an address: global, without label or broadcast.
pub(crate) fn add(index: u32, address: IpNetwork) -> Request {
    let mut message = naming(index, address);
    message.header.scope = AddressScope::Universe;
    if address.is_ipv6() {
        // Nobody else can have it: it is inside our own lease. So no second of doubt.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    Request { flags: NLM_F_CREATE | NLM_F_EXCL, message: RouteNetlinkMessage::NewAddress(message).into() }
}

/// Takes an address from a device.
pub(crate) fn remove(index: u32, address: IpNetwork) -> Request {
    Request { flags: 0, message: RouteNetlinkMessage::DelAddress(naming(index, address)).into() }
}

fn naming(index: u32, address: IpNetwork) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip());
    message.header.prefix_len = address.prefix();
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(address.ip()), AddressAttribute::Address(address.ip())];
    message
}

fn decode(message: &AddressMessage) -> Option<(u32, InterfaceAddress)> {
    // On a point-to-point device `Address` is the other end; IPv6 has no `Local` otherwise.
    let (mut local, mut address) = (None::<IpAddr>, None::<IpAddr>);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let network = IpNetwork::new(local.or(address)?, message.header.prefix_len).ok()?;
    let own = InterfaceAddress {
        network,
        permanent: flags.contains(AddressFlags::Permanent),
        // One bit with two names: a second address in IPv4, a temporary one in IPv6.
        temporary: flags.contains(AddressFlags::Secondary),
        deprecated: flags.contains(AddressFlags::Deprecated),
    };
    Some((message.header.index, own))
}
