//! Forwarding entries of a VXLAN device as messages: which host a MAC lives on.

use std::net::{IpAddr, Ipv4Addr};

use flannel_core::state::MacAddr;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::socket::{Kernel, NetlinkError, Request};
use super::{AddressFamily, address_from_bytes, is_permanent};

/// `NDA_NH_ID`: the entry leads to a nexthop object (`linux/neighbour.h`).
const NDA_NH_ID: u16 = 13;

/// The permanent entries of a device itself.
///
/// An entry with something that we never set, like a port of its own, is given
/// as leading to 0.0.0.0: to no host that anybody wants, so that it is replaced.
pub(crate) fn list(kernel: &mut Kernel, index: u32) -> Result<Vec<(MacAddr, IpAddr)>, NetlinkError> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    kernel.dump(RouteNetlinkMessage::GetNeighbour(message), |part| match part {
        RouteNetlinkMessage::NewNeighbour(message) if message.header.ifindex == index => decode(&message),
        _ => None,
    })
}

/// Makes or replaces a permanent entry.
pub(crate) fn put(index: u32, mac: MacAddr, remote: IpAddr) -> Request {
    let mut message = naming(index, mac);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(remote.into()));
    Request { flags: NLM_F_CREATE | NLM_F_REPLACE, message: RouteNetlinkMessage::NewNeighbour(message) }
}

/// Deletes an entry with all its destinations.
pub(crate) fn remove(index: u32, mac: MacAddr) -> Request {
    Request { flags: 0, message: RouteNetlinkMessage::DelNeighbour(naming(index, mac)) }
}

fn naming(index: u32, mac: MacAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
    message
}

fn decode(message: &NeighbourMessage) -> Option<(MacAddr, IpAddr)> {
    let header = &message.header;
    if !is_permanent(header.state) || !header.flags.contains(NeighbourFlags::Own) {
        return None;
    }
    let mut mac = None;
    let mut remote = None;
    let mut plain = true;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            // The bridge family says nothing about what kind of address this is; its length does.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                remote = address_from_bytes(bytes)
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                remote = Some(IpAddr::V4(*address));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                remote = Some(IpAddr::V6(*address));
            }
            NeighbourAttribute::Port(_) | NeighbourAttribute::Vni(_) | NeighbourAttribute::SourceVni(_) => {
                plain = false;
            }
            NeighbourAttribute::IfIndex(index) if *index != header.ifindex => plain = false,
            NeighbourAttribute::Other(other) if other_kind(other) == NDA_NH_ID => plain = false,
            _ => {}
        }
    }
    let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    Some((MacAddr(mac?), if plain { remote.unwrap_or(nowhere) } else { nowhere }))
}

fn other_kind(attribute: &rtnetlink::packet_core::DefaultNla) -> u16 {
    rtnetlink::packet_core::Nla::kind(attribute)
}
