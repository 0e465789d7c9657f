//! Hears what the kernel says of changes on the host, with the time of each.
//!
//! One socket, so that what concerns neighbours, FDB entries and routes is heard
//! in the order it happened. The messages are taken apart here and not by the
//! crates that the daemon stands on, which would not notice their own mistakes.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use flannel_tests::lab::Host;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use rtnetlink::sys::{Socket, protocols::NETLINK_ROUTE};

use crate::cluster::{PATIENCE, Peer, mac};

/// Room for what a Go flanneld causes while it joins ten thousand peers.
const BUFFER: usize = 128 << 20;

// linux/rtnetlink.h
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_NEIGH: u32 = 3;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_NEXTHOP: u32 = 32;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const RTM_NEWNEXTHOP: u16 = 104;

/// One change that the kernel has told.
#[derive(Clone, Debug)]
pub(crate) struct Notice {
    pub(crate) at: Instant,
    /// By index; `None` for routes and nexthop objects.
    link: Option<u32>,
    /// What has happened, in the words of [`came`] and [`went`].
    pub(crate) text: String,
}

impl Notice {
    /// Whether it concerns that device, or any route.
    pub(crate) fn concerns(&self, index: u32) -> bool {
        self.link.is_none_or(|link| link == index)
    }
}

/// What is heard when a peer comes.
pub(crate) fn came(peer: &Peer) -> [String; 3] {
    let [neighbour, entry, route] = texts(peer);
    [format!("new {neighbour} {}", peer.mac()), format!("new {entry}"), format!("new {route}")]
}

/// What is heard when a peer changes its MAC, to that one.
pub(crate) fn changed(peer: &Peer) -> [String; 2] {
    let [neighbour, entry, _] = came(peer);
    [neighbour, entry]
}

/// What is heard when a peer goes.
pub(crate) fn went(peer: &Peer) -> [String; 3] {
    texts(peer).map(|text| format!("del {text}"))
}

fn texts(peer: &Peer) -> [String; 3] {
    let (network, mac) = (peer.network(), peer.mac());
    [format!("neighbour {network}"), format!("entry {mac}"), format!("route {network}/24")]
}

/// Hears until it is dropped.
pub(crate) struct Monitor {
    notices: mpsc::Receiver<Notice>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Hears all from now on.
    pub(crate) fn start(host: &Host) -> Self {
        let (send, notices) = mpsc::channel();
        let (hears, heard) = mpsc::channel();
        let ended = Arc::new(AtomicBool::new(false));
        let (end, namespace) = (ended.clone(), host.namespace.clone());
        let thread = thread::spawn(move || {
            crate::cluster::enter(&namespace);
            let socket = socket();
            hears.send(()).expect("somebody waits for it");
            hear(&socket, &end, &send);
        });
        heard.recv().expect("the monitor starts");
        Self { notices, ended, thread: Some(thread) }
    }

    /// Waits until all of that has been heard; when the last was, or `None` if it is not in time.
    pub(crate) fn all(&self, mut texts: HashSet<String>, patience: Duration) -> Option<Instant> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let notice = self.notices.recv_timeout(left).ok()?;
            if texts.remove(&notice.text) && texts.is_empty() {
                return Some(notice.at);
            }
        }
    }

    /// The same for a whole cluster.
    pub(crate) fn all_joined<'a>(&self, peers: impl Iterator<Item = &'a Peer>) -> Instant {
        self.all(peers.flat_map(came).collect(), PATIENCE).expect("every peer joins")
    }

    /// Ends it; what was heard and not asked for yet.
    pub(crate) fn end(mut self) -> Vec<Notice> {
        self.stop();
        self.notices.try_iter().collect()
    }

    fn stop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the monitor hears all");
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.stop();
        }
    }
}

fn socket() -> Socket {
    let mut socket = Socket::new(NETLINK_ROUTE).expect("a netlink socket");
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).expect("root may have a large buffer");
    let often = TimeVal::milliseconds(50);
    setsockopt(&socket, sockopt::ReceiveTimeout, &often).expect("any socket has a timeout");
    socket.bind_auto().expect("an address");
    for group in [RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_NEIGH, RTNLGRP_IPV4_ROUTE, RTNLGRP_NEXTHOP] {
        socket.add_membership(group).expect("a group to hear");
    }
    socket
}

/// The kernel puts a change into the buffer before it answers whoever asked for it: what was
/// done before `end` is there to be read.
fn hear(socket: &Socket, end: &AtomicBool, send: &mpsc::Sender<Notice>) {
    let mut buffer = Vec::with_capacity(1 << 16);
    loop {
        let last = end.load(Ordering::SeqCst);
        buffer.clear();
        match socket.recv(&mut buffer, 0) {
            Ok(_) => {
                let at = Instant::now();
                // Nobody may be asking any more.
                each_message(&buffer, |kind, body| {
                    drop(read(kind, body, at).map(|notice| send.send(notice)))
                });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if last {
                    return;
                }
            }
            Err(error) => panic!("the monitor missed something: {error}"),
        }
    }
}

/// Calls `each` with the type and the body of each message.
fn each_message(mut bytes: &[u8], mut each: impl FnMut(u16, &[u8])) {
    while bytes.len() >= 16 {
        let length = number(&bytes[..4]) as usize;
        let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
        each(kind, &bytes[16..length]);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

fn read(kind: u16, body: &[u8], at: Instant) -> Option<Notice> {
    // The odd one of each pair takes away.
    let verb = if kind.is_multiple_of(2) { "new" } else { "del" };
    let family = i32::from(body[0]);
    let (link, text) = match kind & !1 {
        RTM_NEWLINK => (Some(number(&body[4..8])), "link".to_owned()),
        RTM_NEWADDR => (Some(number(&body[4..8])), "address".to_owned()),
        RTM_NEWNEXTHOP => (None, "nexthop".to_owned()),
        RTM_NEWROUTE => {
            let address = attribute(&body[12..], 1).and_then(ipv4).unwrap_or(Ipv4Addr::UNSPECIFIED);
            (None, format!("route {address}/{}", body[1]))
        }
        RTM_NEWNEIGH => {
            let link = Some(number(&body[4..8]));
            let address = attribute(&body[12..], 1).and_then(ipv4);
            let mac = attribute(&body[12..], 2).map(mac);
            match (family, verb) {
                (nix::libc::AF_BRIDGE, _) => (link, format!("entry {}", mac?)),
                // One that goes may have lost its MAC already.
                (nix::libc::AF_INET, "del") => (link, format!("neighbour {}", address?)),
                (nix::libc::AF_INET, _) => {
                    (link, format!("neighbour {} {}", address?, mac.unwrap_or_default()))
                }
                _ => return None,
            }
        }
        _ => return None,
    };
    Some(Notice { at, link, text: format!("{verb} {text}") })
}

fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        if u16::from_ne_bytes([bytes[2], bytes[3]]) == wanted {
            return bytes.get(4..length);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
    None
}

fn ipv4(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_ne_bytes(bytes.try_into().expect("four bytes"))
}
