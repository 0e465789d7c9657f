//! Neighbour entries as messages: which MAC an address of the network has.

use std::net::IpAddr;

use flannel_core::state::MacAddr;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::RouteType;

use super::socket::{Kernel, NetlinkError, Request};
use super::{family, is_permanent};

/// The permanent entries of a device, of both families.
pub(crate) fn list(kernel: &mut Kernel, index: u32) -> Result<Vec<(IpAddr, MacAddr)>, NetlinkError> {
    let mut message = NeighbourMessage::default();
    // Strict checking wants the device as an attribute, and refuses it in the header.
    message.attributes = vec![NeighbourAttribute::IfIndex(index)];
    kernel.dump(RouteNetlinkMessage::GetNeighbour(message), |part| match part {
        RouteNetlinkMessage::NewNeighbour(message) if message.header.ifindex == index => decode(&message),
        _ => None,
    })
}

/// Makes or replaces a permanent entry.
pub(crate) fn put(index: u32, ip: IpAddr, mac: MacAddr) -> Request {
    let mut message = naming(index, ip);
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    Request { flags: NLM_F_CREATE | NLM_F_REPLACE, message: RouteNetlinkMessage::NewNeighbour(message) }
}

/// Deletes an entry.
pub(crate) fn remove(index: u32, ip: IpAddr) -> Request {
    Request { flags: 0, message: RouteNetlinkMessage::DelNeighbour(naming(index, ip)) }
}

fn naming(index: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.attributes = vec![NeighbourAttribute::Destination(ip.into())];
    message
}

fn decode(message: &NeighbourMessage) -> Option<(IpAddr, MacAddr)> {
    if !is_permanent(message.header.state) {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                ip = Some(IpAddr::V4(*address))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                ip = Some(IpAddr::V6(*address));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some((ip?, MacAddr(mac?)))
}
