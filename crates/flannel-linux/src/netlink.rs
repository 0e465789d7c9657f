//! Speaking netlink: one way to ask, and one file per kind of object.
//!
//! rtnetlink's vocabulary builds and reads the messages; the asking is ours,
//! because its own reports success for what was never sent and an empty list
//! for a refused one.

pub(crate) mod address;
pub(crate) mod fdb;
pub(crate) mod link;
pub(crate) mod monitor;
pub(crate) mod neighbour;
pub(crate) mod nexthop;
pub(crate) mod route;
pub(crate) mod socket;

use std::net::IpAddr;

use rtnetlink::packet_route::AddressFamily;

/// The family of an address.
pub(crate) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// An address that came as bare bytes.
pub(crate) fn address_from_bytes(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    }
}

/// A number in the machine's own order at some place of a message.
pub(crate) fn number_at(payload: &[u8], place: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*payload.get(place..)?.first_chunk()?))
}

/// Whether an entry stays until it is taken away (`NUD_PERMANENT`). A state is a set of bits;
/// `bridge fdb` adds one that says nothing more about a forwarding entry.
pub(crate) fn is_permanent(state: u16) -> bool {
    state & 0x80 != 0
}
