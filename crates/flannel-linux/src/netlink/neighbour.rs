//! Neighbour entries as messages: which MAC an address of the network has.

use std::net::IpAddr;

use flannel_core::state::MacAddr;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::RouteType;

use super::socket::{Kernel, NetlinkError, Request, attributes};
use super::{address_from_bytes, family, is_permanent, number_at};

/// Bytes of `struct ndmsg` (`linux/neighbour.h`): family, padding, device, state, flags, type.
pub(crate) const NDMSG: usize = 12;

/// `NDA_DST`.
pub(crate) const NDA_DST: u16 = 1;

/// `NDA_LLADDR`.
pub(crate) const NDA_LLADDR: u16 = 2;

/// An entry as the kernel tells of it.
pub(crate) struct SeenNeighbour {
    pub(crate) index: u32,
    pub(crate) ip: IpAddr,
    /// `None` for one that is not permanent.
    pub(crate) mac: Option<MacAddr>,
}

/// The permanent entries of a device, of both families.
pub(crate) fn list(kernel: &mut Kernel, index: u32) -> Result<Vec<(IpAddr, MacAddr)>, NetlinkError> {
    let mut message = NeighbourMessage::default();
    // Strict checking wants the device as an attribute, and refuses it in the header.
    message.attributes = vec![NeighbourAttribute::IfIndex(index)];
    kernel.dump(RouteNetlinkMessage::GetNeighbour(message), |_, payload| {
        decode(payload).filter(|seen| seen.index == index).and_then(|seen| Some((seen.ip, seen.mac?)))
    })
}

/// Makes or replaces a permanent entry.
pub(crate) fn put(index: u32, ip: IpAddr, mac: MacAddr) -> Request {
    let mut message = naming(index, ip);
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    Request {
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        message: RouteNetlinkMessage::NewNeighbour(message).into(),
    }
}

/// Deletes an entry.
pub(crate) fn remove(index: u32, ip: IpAddr) -> Request {
    Request { flags: 0, message: RouteNetlinkMessage::DelNeighbour(naming(index, ip)).into() }
}

fn naming(index: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.attributes = vec![NeighbourAttribute::Destination(ip.into())];
    message
}

/// Reads an entry; `None` for one that has no address.
pub(crate) fn decode(payload: &[u8]) -> Option<SeenNeighbour> {
    let (mut ip, mut mac) = (None, None);
    for (kind, value) in attributes(payload, NDMSG) {
        match kind {
            NDA_DST => ip = address_from_bytes(value),
            NDA_LLADDR => mac = value.try_into().ok().map(MacAddr),
            _ => {}
        }
    }
    let mac = mac.filter(|_| is_permanent(state(payload)));
    Some(SeenNeighbour { index: number_at(payload, 4)?, ip: ip?, mac })
}

/// `ndm_state`.
pub(crate) fn state(payload: &[u8]) -> u16 {
    payload.get(8..10).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_ne_bytes)
}
