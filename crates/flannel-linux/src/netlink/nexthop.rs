//! Nexthop objects as messages. rtnetlink's vocabulary has no word for them, so
//! these are bytes, laid out as in `linux/nexthop.h`:
//!
//! ```text
//!   struct nhmsg    family u8, scope u8, protocol u8, padding u8, flags u32
//!   attributes      NHA_ID u32, NHA_OIF u32, NHA_GATEWAY 4 or 16 bytes …
//! ```

use std::net::IpAddr;
use std::num::NonZeroU32;

use flannel_core::state::{LinkName, Nexthop, NexthopId};
use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};

use super::socket::{Kernel, Message, NetlinkError, Refusal, Request, attributes};
use super::{address_from_bytes, family, number_at};

/// Message types (`linux/rtnetlink.h`).
pub(crate) const RTM_NEWNEXTHOP: u16 = 104;
pub(crate) const RTM_DELNEXTHOP: u16 = 105;
const RTM_GETNEXTHOP: u16 = 106;

/// Bytes of `struct nhmsg`.
const NHMSG: usize = 8;

const NHA_ID: u16 = 1;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;

/// `RTNH_F_ONLINK`.
const ONLINK: u32 = 4;

/// An object as the kernel tells of it; its device by index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeenNexthop {
    pub(crate) id: NexthopId,
    /// `None` for one that leads over several devices, or over none.
    pub(crate) link: Option<u32>,
    gateway: Option<IpAddr>,
    onlink: bool,
    protocol: u8,
}

impl SeenNexthop {
    /// The object in core's words.
    pub(crate) fn on(self, link: LinkName) -> Nexthop {
        let Self { gateway, onlink, protocol, .. } = self;
        Nexthop { link, gateway, onlink, protocol }
    }
}

/// The objects of a device; `None` if the kernel has no such thing (before Linux 5.3).
pub(crate) fn list(kernel: &mut Kernel, index: u32) -> Result<Option<Vec<SeenNexthop>>, NetlinkError> {
    let mut bytes = vec![0; NHMSG];
    push(&mut bytes, NHA_OIF, &index.to_ne_bytes());
    match kernel.dump(Message::Raw(RTM_GETNEXTHOP, bytes), |_, payload| decode(payload)) {
        Ok(seen) => Ok(Some(seen.into_iter().filter(|seen| seen.link == Some(index)).collect())),
        Err(NetlinkError::Refused(Refusal { errno: Errno::EOPNOTSUPP, .. })) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the kernel has such a thing.
pub(crate) fn exist(kernel: &mut Kernel) -> Result<bool, NetlinkError> {
    const LOOPBACK: u32 = 1;
    Ok(list(kernel, LOOPBACK)?.is_some())
}

/// Makes or replaces an object.
pub(crate) fn put(id: NexthopId, nexthop: &Nexthop, index: u32) -> Request {
    let mut bytes = vec![0; NHMSG];
    bytes[0] = nexthop.gateway.map_or(0, |gateway| family(gateway).into());
    bytes[2] = nexthop.protocol;
    bytes[4..NHMSG].copy_from_slice(&if nexthop.onlink { ONLINK } else { 0 }.to_ne_bytes());
    push(&mut bytes, NHA_ID, &id.0.get().to_ne_bytes());
    push(&mut bytes, NHA_OIF, &index.to_ne_bytes());
    match nexthop.gateway {
        Some(IpAddr::V4(v4)) => push(&mut bytes, NHA_GATEWAY, &v4.octets()),
        Some(IpAddr::V6(v6)) => push(&mut bytes, NHA_GATEWAY, &v6.octets()),
        None => {}
    }
    Request { flags: NLM_F_CREATE | NLM_F_REPLACE, message: Message::Raw(RTM_NEWNEXTHOP, bytes) }
}

/// Deletes an object, and the routes that lead through it.
pub(crate) fn remove(id: NexthopId) -> Request {
    let mut bytes = vec![0; NHMSG];
    push(&mut bytes, NHA_ID, &id.0.get().to_ne_bytes());
    Request { flags: 0, message: Message::Raw(RTM_DELNEXTHOP, bytes) }
}

/// Reads an object.
pub(crate) fn decode(payload: &[u8]) -> Option<SeenNexthop> {
    let (mut id, mut link, mut gateway) = (None, None, None);
    for (kind, value) in attributes(payload, NHMSG) {
        match kind {
            NHA_ID => id = NonZeroU32::new(number_at(value, 0)?),
            NHA_OIF => link = number_at(value, 0),
            NHA_GATEWAY => gateway = address_from_bytes(value),
            _ => {}
        }
    }
    let onlink = number_at(payload, 4)? & ONLINK != 0;
    Some(SeenNexthop { id: NexthopId(id?), link, gateway, onlink, protocol: *payload.get(2)? })
}

/// Adds an attribute whose value is as long as a multiple of four.
fn push(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("an address is short");
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
}
