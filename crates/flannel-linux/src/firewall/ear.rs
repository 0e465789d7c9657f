//! What nf_tables tells by itself: that a chain which concerns us was touched.
//!
//! The kernel tells the members of a group of each table, chain and rule that
//! comes or goes, whoever did it: nft, iptables on nf_tables, a firewall daemon.
//! Other changes, like those of a set that somebody fills all day, wake nobody.
//! Which of the changes are our own the generation tells.
//!
//! ```text
//!   struct nlmsghdr     16 bytes; the type's upper byte is that of nf_tables
//!   struct nfgenmsg      4 bytes: family, version, resource
//!   attributes           1: the table; of a rule 2: its chain; of a chain 3: its name
//! ```

use std::io;

use flannel_core::firewall::{Purpose, Ruleset, nftables};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::packet_core::{NetlinkBuffer, NlasIterator};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, TokioSocket, protocols::NETLINK_NETFILTER};
use tracing::debug;

use super::generation::{NETFILTER_HEADER, NFTABLES};

/// `NFNLGRP_NFTABLES` (`linux/netfilter/nfnetlink.h`).
const GROUP: u32 = 7;

/// Room for what dockerd does to the rules while nobody listens.
const ROOM: usize = 1024 * 1024;

/// More than a word of the kernel has; of a longer one the head is enough.
const LONGEST: usize = 64 * 1024;

/// `NFT_MSG_*` of `linux/netfilter/nf_tables.h`.
const NEW_TABLE: u16 = NFTABLES;
const DEL_TABLE: u16 = NFTABLES | 2;
const NEW_CHAIN: u16 = NFTABLES | 3;
const DEL_CHAIN: u16 = NFTABLES | 5;
const NEW_RULE: u16 = NFTABLES | 6;
const DEL_RULE: u16 = NFTABLES | 8;

/// A socket that is told of changes.
pub(super) struct Ear {
    socket: TokioSocket,
    buffer: Vec<u8>,
    concern: Concern,
}

/// What is listened for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Concern {
    family: u8,
    /// Tables, and the chains in them; without any, all.
    tables: Vec<(&'static str, Vec<&'static str>)>,
}

impl Concern {
    /// Our chains of iptables, and those that jump to them.
    pub(super) fn iptables(rules: &Ruleset) -> Self {
        let table = |purpose: Purpose| (purpose.table(), vec![purpose.chain(), purpose.parent()]);
        Self { family: family(rules), tables: Purpose::ALL.map(table).into() }
    }

    /// Our table of nftables.
    pub(super) fn nftables(rules: &Ruleset) -> Self {
        Self { family: family(rules), tables: vec![(nftables::Table::of(rules.network).name, vec![])] }
    }

    /// Whether a message is about it.
    fn is_told(&self, kind: u16, payload: &[u8]) -> bool {
        let place = match kind {
            NEW_TABLE | DEL_TABLE => None,
            NEW_CHAIN | DEL_CHAIN => Some(3),
            NEW_RULE | DEL_RULE => Some(2),
            _ => return false,
        };
        if payload.first() != Some(&self.family) {
            return false;
        }
        let attributes = || NlasIterator::new(payload.get(NETFILTER_HEADER..).unwrap_or_default()).flatten();
        let text = |kind| {
            let attribute = attributes().find(|attribute| attribute.kind() == kind)?;
            let bytes = attribute.value().strip_suffix(&[0]).unwrap_or(attribute.value());
            Some(String::from_utf8_lossy(bytes).into_owned())
        };
        let table = text(1);
        let chains =
            self.tables.iter().find(|(name, _)| table.as_deref() == Some(name)).map(|(_, chains)| chains);
        match (chains, place) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(chains), Some(place)) => {
                let chain = text(place);
                chains.is_empty() || chain.is_none_or(|chain| chains.contains(&&*chain))
            }
        }
    }
}

fn family(rules: &Ruleset) -> u8 {
    let family = if rules.network.is_ipv4() { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 };
    family.try_into().expect("a family is a small number")
}

impl Ear {
    /// Opens the ear in the calling thread's network namespace.
    pub(super) fn open(concern: Concern) -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind_auto()?;
        if let Err(error) = setsockopt(socket.socket_ref(), sockopt::RcvBufForce, &ROOM) {
            debug!(%error, "the socket for the word of nf_tables keeps its receive buffer");
        }
        socket.socket_mut().add_membership(GROUP)?;
        Ok(Self { socket, buffer: Vec::with_capacity(LONGEST), concern })
    }

    pub(super) fn concern(&self) -> &Concern {
        &self.concern
    }

    /// Waits for a word that concerns us. Safe to drop at any moment: what was
    /// read by then concerned nobody.
    pub(super) async fn heard(&mut self) {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer).await {
                Ok(()) if self.is_told() => return,
                Ok(()) => {}
                Err(error) => match error.raw_os_error() {
                    // More was told than there was room for: anything may have happened.
                    Some(libc::ENOBUFS) => return,
                    Some(libc::EINTR) => {}
                    _ => {
                        debug!(%error, "nf_tables tells us nothing any more; its rules are looked at by the clock");
                        return std::future::pending().await;
                    }
                },
            }
        }
    }

    /// Forgets what was told so far: all is looked at now.
    pub(super) fn forget(&mut self) {
        loop {
            self.buffer.clear();
            let read = self.socket.socket_ref().recv(&mut self.buffer, libc::MSG_DONTWAIT);
            // An overrun is told once, and behind it is more to read.
            if read.is_err_and(|error| error.raw_os_error() != Some(libc::ENOBUFS)) {
                return;
            }
        }
    }

    /// Whether what was read concerns us.
    fn is_told(&self) -> bool {
        let mut rest = &self.buffer[..];
        while let Ok(frame) = NetlinkBuffer::new_checked(rest) {
            if self.concern.is_told(frame.message_type(), frame.payload()) {
                return true;
            }
            let length = usize::try_from(frame.length()).unwrap_or(rest.len()).next_multiple_of(4);
            rest = rest.get(length.max(16)..).unwrap_or_default();
        }
        false
    }
}
