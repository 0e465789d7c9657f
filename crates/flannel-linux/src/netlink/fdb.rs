//! Forwarding entries of a VXLAN device as messages: which host a MAC lives on.

use std::net::{IpAddr, Ipv4Addr};

use flannel_core::state::MacAddr;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::neighbour::{NDA_DST, NDA_LLADDR, NDMSG, state};
use super::socket::{Kernel, NetlinkError, Request, attributes};
use super::{AddressFamily, address_from_bytes, is_permanent, number_at};

/// What an entry may say of its destination beside the address (`linux/neighbour.h`).
const NDA_PORT: u16 = 6;
const NDA_VNI: u16 = 7;
const NDA_IFINDEX: u16 = 8;
const NDA_SRC_VNI: u16 = 11;
const NDA_NH_ID: u16 = 13;

/// `NTF_SELF`: of the device itself, not of a bridge above it.
const NTF_SELF: u8 = 0x02;

/// An entry as the kernel tells of it.
pub(crate) struct SeenFdb {
    pub(crate) index: u32,
    pub(crate) mac: MacAddr,
    /// `None` for one that is not permanent.
    pub(crate) remote: Option<IpAddr>,
}

/// The permanent entries of a device itself.
///
/// An entry with something that we never set, like a port of its own, is given
/// as leading to 0.0.0.0: to no host that anybody wants, so that it is replaced.
pub(crate) fn list(kernel: &mut Kernel, index: u32) -> Result<Vec<(MacAddr, IpAddr)>, NetlinkError> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    kernel.dump(RouteNetlinkMessage::GetNeighbour(message), |_, payload| {
        decode(payload).filter(|seen| seen.index == index).and_then(|seen| Some((seen.mac, seen.remote?)))
    })
}

/// Makes or replaces a permanent entry.
pub(crate) fn put(index: u32, mac: MacAddr, remote: IpAddr) -> Request {
    let mut message = naming(index, mac);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(remote.into()));
    Request {
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        message: RouteNetlinkMessage::NewNeighbour(message).into(),
    }
}

/// Deletes an entry with all its destinations.
pub(crate) fn remove(index: u32, mac: MacAddr) -> Request {
    Request { flags: 0, message: RouteNetlinkMessage::DelNeighbour(naming(index, mac)).into() }
}

fn naming(index: u32, mac: MacAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
    message
}

/// Reads an entry; `None` for one that is not of the device itself.
pub(crate) fn decode(payload: &[u8]) -> Option<SeenFdb> {
    let index = number_at(payload, 4)?;
    if payload.get(10)? & NTF_SELF == 0 {
        return None;
    }
    let mut mac = None;
    let mut remote = None;
    let mut plain = true;
    for (kind, value) in attributes(payload, NDMSG) {
        match kind {
            NDA_LLADDR => mac = value.try_into().ok().map(MacAddr),
            // The bridge family says nothing about what kind of address this is; its length does.
            NDA_DST => remote = address_from_bytes(value),
            NDA_PORT | NDA_VNI | NDA_SRC_VNI | NDA_NH_ID => plain = false,
            NDA_IFINDEX if number_at(value, 0) != Some(index) => plain = false,
            _ => {}
        }
    }
    let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let remote = if plain { remote.unwrap_or(nowhere) } else { nowhere };
    Some(SeenFdb { index, mac: mac?, remote: is_permanent(state(payload)).then_some(remote) })
}
