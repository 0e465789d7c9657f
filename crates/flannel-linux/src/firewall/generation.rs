//! Which generation of its rules nf_tables is at, in the calling thread's
//! network namespace.
//!
//! Each transaction, whoever makes it and whichever table it changes, counts up.
//! So a number that stands still says that all rules do, for a few microseconds
//! instead of a few processes.
//!
//! ```text
//!   0        4      6       8          12     16       17        18         20
//!   length   type   flags   sequence   port   family   version   resource         asked
//!   length   type   flags   sequence   port   family   version   resource   …     answered
//!                                                                           └ attributes
//! ```
//!
//! The first 16 bytes are the header of `linux/netlink.h`, the next four are
//! `struct nfgenmsg` of `linux/netfilter/nfnetlink.h`; what is asked and what is
//! answered are in `linux/netfilter/nf_tables.h`.

use std::io;

use flannel_core::firewall::Ruleset;
use nix::sys::socket::MsgFlags;
use rtnetlink::packet_core::{NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer, NlasIterator};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// `NFNL_SUBSYS_NFTABLES`, the upper byte of a message's type.
pub(super) const NFTABLES: u16 = 10 << 8;

/// `NFT_MSG_GETGEN`.
const GET_GENERATION: u16 = NFTABLES | 16;

/// `NFT_MSG_NEWGEN`.
const NEW_GENERATION: u16 = NFTABLES | 15;

/// `NFTA_GEN_ID`, in network byte order.
const GENERATION_ID: u16 = 1;

/// The size of `struct nfgenmsg`.
pub(super) const NETFILTER_HEADER: usize = 4;

const REQUEST_LENGTH: usize = 16 + NETFILTER_HEADER;

/// An answer has 28 bytes, and about as many for who made the generation.
const ANSWER_BUFFER: usize = 256;

/// A socket is asked one question.
const SEQUENCE: u32 = 1;

/// The rules that were found right, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) rules: Ruleset,
    /// That of nf_tables before the look, or after the write.
    pub(super) generation: u32,
}

impl Found {
    /// Found right by a look that came after the question for the generation.
    pub(super) fn at(rules: Ruleset, before: Option<u32>) -> Option<Self> {
        before.map(|generation| Self { rules, generation })
    }

    /// Made right by so many transactions; `None` if there were others among them.
    pub(super) fn after(transactions: u32, rules: Ruleset, before: Option<u32>) -> Option<Self> {
        let after = generation().ok()?;
        (before?.wrapping_add(transactions) == after).then_some(Self { rules, generation: after })
    }
}

/// Asks the kernel. It needs `CAP_NET_ADMIN`, and a kernel with nf_tables.
pub(super) fn generation() -> io::Result<u32> {
    // A socket stays in the namespace of the thread that opens it. A new one is
    // where an iptables would be that this thread starts.
    let socket = Socket::new(NETLINK_NETFILTER)?;
    // Connected, it takes nothing from other processes.
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&request(), 0)?;
    let mut answer = [0; ANSWER_BUFFER];
    // The kernel answers while it takes the request: there is nothing to wait for.
    let length = socket.recv(&mut &mut answer[..], MsgFlags::MSG_DONTWAIT.bits())?;
    read(&answer[..length])
}

fn request() -> [u8; REQUEST_LENGTH] {
    // What is left at zero: the port, which is the kernel's; any family; version 0; no resource.
    let mut bytes = [0; REQUEST_LENGTH];
    let mut header = NetlinkBuffer::new(&mut bytes[..]);
    header.set_length(REQUEST_LENGTH as u32);
    header.set_message_type(GET_GENERATION);
    header.set_flags(NLM_F_REQUEST);
    header.set_sequence_number(SEQUENCE);
    bytes
}

fn read(answer: &[u8]) -> io::Result<u32> {
    let garbled = || io::Error::new(io::ErrorKind::InvalidData, "an answer that cannot be read");
    let frame = NetlinkBuffer::new_checked(answer).map_err(|_| garbled())?;
    let payload = frame.payload();
    if frame.sequence_number() != SEQUENCE {
        return Err(garbled());
    }
    match frame.message_type() {
        NEW_GENERATION => {
            let attributes = NlasIterator::new(payload.get(NETFILTER_HEADER..).ok_or_else(garbled)?);
            let id = attributes.flatten().find(|attribute| attribute.kind() == GENERATION_ID);
            let id = id.and_then(|id| id.value().try_into().ok()).ok_or_else(garbled)?;
            Ok(u32::from_be_bytes(id))
        }
        NLMSG_ERROR => {
            let code = payload.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
            let code = code.filter(|code| *code < 0).ok_or_else(garbled)?;
            Err(io::Error::from_raw_os_error(code.saturating_neg()))
        }
        _ => Err(garbled()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![];
        bytes.extend((16 + payload.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![];
        bytes.extend((4 + value.len() as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes
    }

    /// What a kernel says at generation 0x01020304, made by an `nft`.
    fn answer(sequence: u32) -> Vec<u8> {
        let id = attribute(1, &[1, 2, 3, 4]);
        let (process, name) = (attribute(2, &[0, 0, 0, 6]), attribute(3, b"nft\0"));
        message(0x0a0f, sequence, &[&[0, 0, 3, 4], &name[..], &process, &id].concat())
    }

    #[test]
    fn the_request_is_a_header_of_netlink_and_one_of_netfilter() {
        let mut expected = message(0x0a10, 1, &[0; 4]);
        expected[6..8].copy_from_slice(&1u16.to_ne_bytes());

        assert_eq!(request(), expected[..]);
    }

    #[test]
    fn the_generation_is_found_among_the_attributes() {
        assert_eq!(read(&answer(1)).unwrap(), 0x0102_0304);
    }

    #[test]
    fn a_refusal_is_an_error_with_its_reason() {
        let payload = [&(-1i32).to_ne_bytes()[..], &request()[..16]].concat();

        let error = read(&message(2, 1, &payload)).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        let acknowledged = message(2, 1, &[0; 20]);
        let without_id = message(0x0a0f, 1, &[0; 4]);
        let short_id = message(0x0a0f, 1, &[&[0; 4], &attribute(1, &[1, 2])[..]].concat());
        let cut_short = &answer(1)[..30];
        let to_another = answer(2);
        let of_another_kind = message(0x0a00, 1, &answer(1)[16..]);

        for bytes in
            [&[], &acknowledged[..], &without_id, &short_id, cut_short, &to_another, &of_another_kind]
        {
            assert_eq!(read(bytes).unwrap_err().kind(), io::ErrorKind::InvalidData, "{bytes:?}");
        }
    }
}
