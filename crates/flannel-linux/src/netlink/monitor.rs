//! What the kernel tells by itself: that something of ours was touched.
//!
//! A socket of its own, member of the groups for links, addresses, neighbours
//! (forwarding entries among them), nexthop objects and routes. A filter in the
//! kernel keeps away what we wrote ourselves, where the kernel says who wrote,
//! and what is about other devices and tables, so that neither wakes anybody;
//! where it does not say, our writes are announced and their echo is passed over.
//! What comes through is told with what stands there now; where one word changes
//! more than one object (a device, an address, a nexthop object that goes, a lost
//! word), all is to be read anew.
//!
//! ```text
//!   kernel ──▶ filter ──▶ Monitor ── objects, or everything ──▶ Listener ──▶ agent
//! ```

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flannel_core::claim::{Claim, within};
use flannel_core::host::Changes;
use flannel_core::state::{Key, LinkName, MacAddr, Nexthop, Object, ROUTE_PROTOCOL, RouteKey};
use nix::libc::{self, AF_BRIDGE};
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::sys::{Socket, protocols::NETLINK_ROUTE};
use socket2::{SockFilter, SockRef};
use tokio::sync::Notify;
use tracing::debug;

use super::link::SeenLink;
use super::nexthop::{RTM_DELNEXTHOP, RTM_NEWNEXTHOP};
use super::socket::Frames;
use super::{address, fdb, link, neighbour, nexthop, route};

/// More than one word of the kernel never has.
const LONGEST: usize = 32 * 1024;

/// The groups that concern us (`linux/rtnetlink.h`): links, neighbours, IPv4
/// addresses and routes. IPv6 comes with the first backend that has it.
const GROUPS: [u32; 4] = [1, 3, 5, 7];

/// `RTNLGRP_NEXTHOP`, since Linux 5.3.
const GROUP_NEXTHOP: u32 = 32;

/// What has been heard and not been taken yet.
#[derive(Clone, Default)]
pub(crate) struct Listener(Arc<Heard>);

#[derive(Default)]
struct Heard {
    changes: Mutex<Option<Changes>>,
    news: Notify,
}

impl Listener {
    fn changes(&self) -> MutexGuard<'_, Option<Changes>> {
        // Nothing panics while it holds them, and if so they are as good as before.
        self.0.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, changes: Changes) {
        add(&mut self.changes(), changes);
        self.0.news.notify_one();
    }

    /// Forgets what was heard, because all is read now.
    pub(crate) fn clear(&self) {
        *self.changes() = None;
    }

    /// Forgets what was heard of a device's neighbours, because all of them went.
    fn forget_neighbours(&self, name: LinkName) {
        let mut heard = self.changes();
        if let Some(Changes::Objects(objects)) = &mut *heard {
            objects.retain(|key, _| !matches!(key, Key::Neighbour(link, _) if *link == name));
            if objects.is_empty() {
                *heard = None;
            }
        }
    }

    /// What has been heard since the last time. Safe to drop at any moment.
    pub(crate) async fn changed(&self) -> Changes {
        loop {
            if let Some(changes) = self.changes().take() {
                return changes;
            }
            self.0.news.notified().await;
        }
    }
}

fn add(heard: &mut Option<Changes>, changes: Changes) {
    match heard {
        Some(heard) => heard.merge(changes),
        nothing => *nothing = Some(changes),
    }
}

/// The socket, and what is known of whom it is about.
pub(crate) struct Monitor {
    socket: Socket,
    listener: Listener,
    buffer: Box<[u8]>,
    /// Our other socket, whose writes are passed over. The kernel's own port is 0.
    port: u32,
    claim: Claim,
    /// Devices whose routes are ours though they are not.
    used: HashSet<LinkName>,
    /// Our devices, the interface between the hosts and those, as last seen.
    watched: HashMap<u32, SeenLink>,
    /// What we have just done to a device.
    changing: Option<Changing>,
    /// Forwarding entries that we are writing: the kernel does not tell who writes those.
    writing: HashMap<(u32, MacAddr), Option<IpAddr>>,
    /// Neighbours that we are deleting: nor who deletes those.
    deleting: HashSet<(u32, IpAddr)>,
    /// Objects that were heard of just now.
    untold: Option<Changes>,
    /// Our devices that have lost neighbours just now.
    stripped: HashSet<LinkName>,
}

/// What we have done to a device, and what the kernel tells of it that is no news.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Changing {
    /// Which.
    pub(crate) name: LinkName,
    /// Whether it went down with that, and all that stood on it.
    pub(crate) down: bool,
    /// Whether its neighbours went with that.
    pub(crate) neighbours: bool,
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Monitor {
    /// Opens the socket in the caller's network namespace, with so many bytes of
    /// room for what comes while we are busy.
    pub(crate) fn open(listener: Listener, room: usize) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        if let Err(error) = setsockopt(&socket, sockopt::RcvBufForce, &room) {
            debug!(%error, "the listening netlink socket keeps its receive buffer");
        }
        let monitor = Self {
            socket,
            listener,
            buffer: vec![0; LONGEST].into_boxed_slice(),
            port: u32::MAX,
            claim: Claim::default(),
            watched: HashMap::new(),
            used: HashSet::new(),
            changing: None,
            writing: HashMap::new(),
            deleting: HashSet::new(),
            untold: None,
            stripped: HashSet::new(),
        };
        // The filter first, so that nothing comes in unfiltered.
        monitor.filter()?;
        for group in GROUPS {
            monitor.socket.add_membership(group)?;
        }
        if let Err(error) = monitor.socket.add_membership(GROUP_NEXTHOP) {
            debug!(%error, "this kernel tells nothing of nexthop objects");
        }
        Ok(monitor)
    }

    /// From now on the socket with that port number is ours.
    pub(crate) fn pass_over_writes_of(&mut self, port: u32) {
        self.port = port;
        self.filter_or_tell();
    }

    /// Drops what has come in so far: all is about to be read.
    pub(crate) fn start_anew(&mut self, claim: &Claim) {
        self.claim.clone_from(claim);
        self.writing.clear();
        self.deleting.clear();
        self.hear();
        self.listener.clear();
    }

    /// Whether the device of that name concerns us.
    fn concerns(&self, name: LinkName) -> bool {
        self.claim.owns_link(name) || self.claim.underlay == Some(name) || self.used.contains(&name)
    }

    /// The index of a device that is watched, as far as the kernel's word has been heard.
    pub(crate) fn index_of(&self, name: LinkName) -> Option<u32> {
        self.watched.values().find(|link| link.name == name).map(|link| link.index)
    }

    /// Takes in which devices have routes of ours.
    pub(crate) fn use_only(&mut self, links: HashSet<LinkName>) {
        self.used = links;
    }

    /// Takes in that a device has routes of ours; whether it was not watched so far.
    pub(crate) fn start_to_use(&mut self, name: LinkName) -> bool {
        let concerned = self.concerns(name);
        self.used.insert(name);
        !concerned
    }

    /// Takes in how the devices that concern us stand.
    pub(crate) fn know(&mut self, links: impl IntoIterator<Item = SeenLink>) {
        let links = links.into_iter().filter(|link| self.concerns(link.name));
        let watched = links.map(|link| (link.index, link)).collect();
        let changed = self.watched != watched;
        self.watched = watched;
        if changed {
            self.filter_or_tell();
        }
    }

    /// Passes over what has been told of a device so far, because we have changed
    /// it ourselves; how it stands now is for [`Monitor::know_one`] to say. What
    /// had been told before is to be heard before.
    pub(crate) fn pass_over(&mut self, changing: Changing) {
        self.changing = Some(changing);
        self.hear();
        self.changing = None;
        if changing.neighbours {
            self.listener.forget_neighbours(changing.name);
        }
    }

    /// Takes in how a device stands after we have changed it; `None` if it is gone.
    pub(crate) fn know_one(&mut self, name: LinkName, link: Option<SeenLink>) {
        let others = self.watched.values().filter(|other| other.name != name).cloned();
        let links: Vec<SeenLink> = others.chain(link).collect();
        self.know(links);
    }

    /// Announces a write of a forwarding entry, until the next [`Monitor::wrote`].
    pub(crate) fn will_write(&mut self, index: u32, mac: MacAddr, remote: Option<IpAddr>) {
        self.writing.insert((index, mac), remote);
    }

    /// Announces that a neighbour is deleted, until the next [`Monitor::wrote`].
    pub(crate) fn will_delete(&mut self, index: u32, ip: IpAddr) {
        self.deleting.insert((index, ip));
    }

    /// What was announced is written: what is told of it is heard and passed over.
    pub(crate) fn wrote(&mut self) {
        if !self.writing.is_empty() || !self.deleting.is_empty() {
            self.hear();
            self.writing.clear();
            self.deleting.clear();
        }
    }

    /// Takes in all that has come, and tells it.
    pub(crate) fn hear(&mut self) {
        self.take_in();
        self.tell();
    }

    /// Takes in all that has come; our devices that have lost neighbours with it. A device
    /// that is given another MAC drops all of them before anything is said of itself.
    pub(crate) fn take_in(&mut self) -> HashSet<LinkName> {
        self.take_words();
        std::mem::take(&mut self.stripped)
    }

    /// Tells what was taken in.
    pub(crate) fn tell(&mut self) {
        if let Some(untold) = self.untold.take() {
            self.listener.tell(untold);
        }
    }

    /// Takes in how a device of ours stands, of which nothing was said yet; `None` if it is gone.
    pub(crate) fn look_at(&mut self, name: LinkName, link: Option<SeenLink>) {
        if self.watched.values().find(|watched| watched.name == name) != link.as_ref() {
            self.everything(&format!("{name} was changed"));
            self.know_one(name, link);
        }
    }

    fn take_words(&mut self) {
        loop {
            let length = match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOBUFS) => {
                        self.everything("the kernel told more than there was room for");
                        continue;
                    }
                    Some(libc::EINTR) => continue,
                    Some(libc::EAGAIN) => return,
                    _ => {
                        self.everything(&format!("the kernel's word of changes was lost: {error}"));
                        return;
                    }
                },
            };
            let buffer = std::mem::take(&mut self.buffer);
            for frame in Frames(&buffer[..length]) {
                match frame {
                    Ok(frame) => self.take(frame.message_type(), frame.payload()),
                    Err(_) => self.everything("the kernel told something that cannot be read"),
                }
            }
            self.buffer = buffer;
        }
    }

    fn take(&mut self, kind: u16, payload: &[u8]) {
        match kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => self.take_link(kind, payload),
            libc::RTM_NEWADDR | libc::RTM_DELADDR => self.take_address(kind, payload),
            libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => self.take_entry(kind == libc::RTM_NEWNEIGH, payload),
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => self.take_route(kind == libc::RTM_NEWROUTE, payload),
            RTM_NEWNEXTHOP | RTM_DELNEXTHOP => self.take_nexthop(kind == RTM_NEWNEXTHOP, payload),
            _ => {}
        }
    }

    fn take_link(&mut self, kind: u16, payload: &[u8]) {
        // A bridge tells of its ports in words of its own.
        if payload.first() != Some(&0) {
            return;
        }
        let Some(seen) = link::read(kind, payload) else { return };
        let before = self.watched.get(&seen.index);
        let gone = kind == libc::RTM_DELLINK;
        let concerns = before.is_some() || self.concerns(seen.name);
        if let Some(changing) = self.changing.filter(|changing| concerns && changing.name == seen.name) {
            // Somebody else set it down in the same moment, and with that its routes are gone, of which nobody tells.
            if !changing.down && !seen.up && before.is_some_and(|before| before.up) {
                self.everything(&format!("{} was set down", seen.name));
            }
            return;
        }
        // The kernel also tells of what we do not look at: its carrier, its queues, its bridge.
        if !concerns || before.is_some_and(|before| !gone && *before == seen) {
            return;
        }
        self.everything(&match before {
            Some(before) if gone => format!("{} is gone", before.name),
            Some(before) => format!("{} was changed", before.name),
            None => format!("{} has come", seen.name),
        });
        let index = seen.index;
        let others = self.watched.values().filter(|other| other.index != index).cloned();
        let links: Vec<SeenLink> = others.chain((!gone).then_some(seen)).collect();
        self.know(links);
    }

    fn take_address(&mut self, kind: u16, payload: &[u8]) {
        let Some((index, own)) = address::read(kind, payload) else { return };
        let Some(name) = self.watched.get(&index).map(|link| link.name) else { return };
        if self.claim.underlay == Some(name) || self.claim.owns_address(name, own.network) {
            // With the last address of a device its routes go, and nothing is said of them.
            self.everything(&format!("the addresses of {name} were changed"));
        }
    }

    fn take_entry(&mut self, stands: bool, payload: &[u8]) {
        if payload.first().copied().map(i32::from) == Some(AF_BRIDGE) {
            let Some(seen) = fdb::decode(payload) else { return };
            let remote = seen.remote.filter(|_| stands);
            if self.writing.get(&(seen.index, seen.mac)) == Some(&remote) {
                return;
            }
            if let Some(name) = self.our_device(seen.index) {
                let object = remote.map(|remote| Object::Fdb(name, seen.mac, remote));
                self.object(Key::Fdb(name, seen.mac), object);
            }
        } else {
            let Some(seen) = neighbour::decode(payload) else { return };
            if !stands && self.deleting.contains(&(seen.index, seen.ip)) {
                return;
            }
            if let Some(name) = self.our_device(seen.index) {
                let going =
                    self.changing.is_some_and(|changing| changing.neighbours && changing.name == name);
                if !stands && going {
                    return;
                }
                if !stands {
                    self.stripped.insert(name);
                }
                let mac = seen.mac.filter(|_| stands);
                let object = mac.map(|mac| Object::Neighbour(name, seen.ip, mac));
                self.object(Key::Neighbour(name, seen.ip), object);
            }
        }
    }

    fn take_route(&mut self, stands: bool, payload: &[u8]) {
        let Some(seen) = route::decode(payload) else { return };
        let RouteKey { destination, .. } = seen.key;
        if seen.blackhole && self.claim.owns_blackhole(&seen.key, seen.protocol) {
            return self.object(Key::Blackhole(seen.key), stands.then_some(Object::Blackhole(seen.key)));
        }
        let name = seen.link.and_then(|index| self.watched.get(&index)).map(|link| link.name);
        if self.claim.networks.iter().any(|network| within(*network, destination))
            || name.is_some_and(|name| self.claim.owns_link(name))
        {
            let our_number = seen.only_nexthop().filter(|id| self.is_inside(id.gateway()));
            let route = match (name, our_number.zip(self.claim.links.first())) {
                (Some(name), _) => Some(seen.on(name)),
                // Our own numbers say all about our own objects.
                (None, Some((id, device))) => Some(seen.through(&Nexthop {
                    link: *device,
                    gateway: Some(id.gateway()),
                    onlink: true,
                    protocol: ROUTE_PROTOCOL,
                })),
                (None, None) => None,
            };
            let object = route
                .filter(|route| stands && seen.unicast && self.claim.owns_route(&seen.key, route))
                .map(|route| Object::Route(seen.key, route));
            self.object(Key::Route(seen.key), object);
        } else if seen.protocol != ROUTE_PROTOCOL
            && (destination.prefix() == 0 || name.is_some() && seen.gateway.is_none())
        {
            // The way to the other hosts, or a network that we share with some.
            self.everything(&format!("the route to {destination} was changed"));
        }
    }

    fn take_nexthop(&mut self, stands: bool, payload: &[u8]) {
        let Some(seen) = nexthop::decode(payload) else { return };
        if !self.is_inside(seen.id.gateway()) {
            return;
        }
        if !stands {
            // The routes through it are gone too, of which nobody tells.
            return self.everything(&format!("nexthop object {} was deleted", seen.id));
        }
        let name = seen.link.and_then(|index| self.our_device(index));
        let object = name.map(|name| Object::Nexthop(seen.id, seen.on(name)));
        self.object(Key::Nexthop(seen.id), object);
    }

    fn is_inside(&self, address: IpAddr) -> bool {
        self.claim.networks.iter().any(|network| network.contains(address))
    }

    fn our_device(&self, index: u32) -> Option<LinkName> {
        self.watched.get(&index).map(|link| link.name).filter(|name| self.claim.owns_link(*name))
    }

    fn object(&mut self, key: Key, object: Option<Object>) {
        add(&mut self.untold, Changes::Objects([(key, object)].into()));
    }

    /// Tells that all is to be read anew.
    pub(crate) fn everything(&self, why: &str) {
        self.listener.tell(Changes::Everything(why.into()));
    }

    fn filter_or_tell(&mut self) {
        if let Err(error) = self.filter() {
            debug!(%error, "the listening socket hears more than it should");
        }
    }

    /// Has the kernel keep away what does not concern us.
    fn filter(&self) -> io::Result<()> {
        let devices = self.watched.values().filter(|link| self.claim.owns_link(link.name));
        let program = program(self.port, devices.map(|link| link.index));
        SockRef::from(&self.socket).attach_filter(&program)
    }
}

/// The filter, in the words of `linux/bpf_common.h`. It loads numbers as if they
/// were in network order, while netlink has them in the machine's.
fn program(port: u32, devices: impl Iterator<Item = u32>) -> Vec<SockFilter> {
    const LOAD_WORD: u16 = 0x20;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const WHOLE: u32 = u32::MAX;
    // In `struct nlmsghdr`, and behind it in `struct ndmsg` and `struct rtmsg`.
    const TYPE: u32 = 4;
    const PORT: u32 = 12;
    const DEVICE: u32 = 16 + 4;
    const TABLE: u32 = 16 + 4;

    let word = |number: u32| u32::from_be_bytes(number.to_ne_bytes());
    let half = |number: u16| u32::from(u16::from_be_bytes(number.to_ne_bytes()));
    let load = |how, place| SockFilter::new(how, 0, 0, place);
    let leap = |number, over| SockFilter::new(IF_EQUAL, over, 0, number);
    let end = |bytes| SockFilter::new(RETURN, 0, 0, bytes);
    let main = u32::from(libc::RT_TABLE_MAIN);
    // More devices than a leap can pass are never ours.
    let devices: Vec<u32> = devices.take(100).collect();
    let count = u8::try_from(devices.len()).expect("a hundred fit");

    let mut program = vec![
        load(LOAD_WORD, PORT),
        leap(word(port), 8), // to 10
        load(LOAD_HALF, TYPE),
        leap(half(libc::RTM_NEWROUTE), 4), // to 8
        leap(half(libc::RTM_DELROUTE), 3), // to 8
        leap(half(libc::RTM_NEWNEIGH), 6), // to 12
        leap(half(libc::RTM_DELNEIGH), 5), // to 12
        end(WHOLE),
        load(LOAD_BYTE, TABLE),  // 8
        leap(main, 1),           // to 11
        end(0),                  // 10
        end(WHOLE),              // 11
        load(LOAD_WORD, DEVICE), // 12
    ];
    for (place, device) in (0..).zip(&devices) {
        program.push(leap(word(*device), count - place));
    }
    program.extend([end(0), end(WHOLE)]);
    program
}
