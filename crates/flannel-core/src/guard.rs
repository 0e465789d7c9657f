//! What is believed of an event: one bad answer cannot empty a host.
//!
//! A store that was wiped, restored or misread says just what a cluster says
//! that everybody has left. So many peers that vanish at once are held: their
//! leases stay in the view until the store has been asked again, after a grace.
//!
//! ```text
//!   store ──event──▶ Guard ──what is believed──▶ LeaseView ──▶ plan
//!                      │ ▲
//!         held, grace  ▼ │ a list: still gone, or not
//!                    the store
//! ```
//!
//! Whoever speaks for a single lease is believed at once. A put ends its hold,
//! and so does a put by which its host has another subnet now: what is held must
//! not stand in the way of what lives. A single removal ends it too: etcd can
//! report it only of a key that somebody has put back and then deleted by itself.
//!
//! Those that vanish while others are held have a grace of their own. The store
//! is asked about all of them together, once in a grace: so nobody is given up
//! sooner than after one, and nobody is held for longer than two once it answers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::lease::{BackendData, Lease, LeaseAttrs, Subnet};
use crate::state::MacAddr;
use crate::store::{LeaseEvent, Snapshot};
use crate::view::LeaseView;

/// So many peers may vanish at once and are believed gone: a small cluster, or a rack.
const FEW: usize = 3;

/// And so may one part in so many of all peers.
const PART: usize = 4;

/// What an event comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admitted {
    /// What is believed of it, for the view, in that order.
    pub events: Vec<LeaseEvent>,
    /// How many peers are held from now on because of it.
    pub held: usize,
}

/// Stands between the store and the view.
#[derive(Debug)]
pub struct Guard {
    grace: Duration,
    /// The view has all of these.
    held: BTreeMap<Subnet, Held>,
    /// Which of them a host has.
    hosts: BTreeMap<Mark, BTreeSet<Subnet>>,
    due: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    lease: Lease,
    /// When it vanished.
    since: Instant,
}

/// What tells one host from another, whatever subnet it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    Address(IpAddr),
    Mac(MacAddr),
}

impl Guard {
    /// A guard that holds what vanishes for at least `grace`; zero believes all at once.
    pub fn new(grace: Duration) -> Self {
        Self { grace, held: BTreeMap::new(), hosts: BTreeMap::new(), due: None }
    }

    /// Judges an event by what it would take away from `view`. Our `own` lease
    /// is never held: that it is gone has to be seen at once.
    pub fn admit(&mut self, event: LeaseEvent, view: &LeaseView, own: Subnet, now: Instant) -> Admitted {
        let spoken_for = match &event {
            LeaseEvent::Snapshot(_) | LeaseEvent::RemovedTogether(_) | LeaseEvent::Resumed => None,
            LeaseEvent::Put(lease) => Some(lease.subnet),
            LeaseEvent::Removed(subnet) => Some(*subnet),
            LeaseEvent::Unreadable(key) => key.subnet,
        };
        spoken_for.into_iter().for_each(|subnet| self.release(subnet));
        match event {
            LeaseEvent::Snapshot(snapshot) => self.admit_snapshot(snapshot, view, own, now),
            LeaseEvent::RemovedTogether(subnets) => self.admit_removal(subnets, view, own, now),
            LeaseEvent::Put(lease) => {
                let moved: BTreeSet<Subnet> =
                    marks(&lease.attrs).filter_map(|mark| self.hosts.get(&mark)).flatten().copied().collect();
                moved.iter().for_each(|subnet| self.release(*subnet));
                let events = moved.into_iter().map(LeaseEvent::Removed).chain([LeaseEvent::Put(lease)]);
                Admitted { events: events.collect(), held: 0 }
            }
            single => Admitted { events: vec![single], held: 0 },
        }
    }

    /// Takes in all leases as the store, `asked` then, has them. What is not
    /// among them and was held for a grace by then is gone, all in one event.
    pub fn confirm(&mut self, list: &Snapshot, asked: Instant) -> Option<LeaseEvent> {
        let there: BTreeSet<Subnet> = list.leases.iter().map(|lease| lease.subnet).collect();
        let ripe = self.held.iter().filter(|(_, held)| held.since + self.grace <= asked);
        // The event by which the others are back is under way.
        let gone: Vec<Subnet> =
            ripe.map(|(subnet, _)| *subnet).filter(|subnet| !there.contains(subnet)).collect();
        gone.iter().for_each(|subnet| self.release(*subnet));
        self.due = self.due.map(|_| asked + self.grace);
        Some(gone).filter(|gone| !gone.is_empty()).map(LeaseEvent::RemovedTogether)
    }

    /// Ends the hold on `subnet`, if there is one.
    pub fn release(&mut self, subnet: Subnet) {
        let Some(held) = self.held.remove(&subnet) else { return };
        for mark in marks(&held.lease.attrs) {
            if let Some(subnets) = self.hosts.get_mut(&mark) {
                subnets.remove(&subnet);
                if subnets.is_empty() {
                    self.hosts.remove(&mark);
                }
            }
        }
        if self.held.is_empty() {
            self.due = None;
        }
    }

    /// When the store is to be asked for a list, if anything is held.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// How many peers are held.
    pub fn count(&self) -> usize {
        self.held.len()
    }

    /// Whether the lease on `subnet` is.
    pub fn holds(&self, subnet: &Subnet) -> bool {
        self.held.contains_key(subnet)
    }

    fn admit_snapshot(
        &mut self,
        mut snapshot: Snapshot,
        view: &LeaseView,
        own: Subnet,
        now: Instant,
    ) -> Admitted {
        if view.count_peers(own) == 0 {
            return Admitted { events: vec![LeaseEvent::Snapshot(snapshot)], held: 0 };
        }
        let there: BTreeSet<Subnet> = snapshot.leases.iter().map(|lease| lease.subnet).collect();
        let mut vanished: Vec<Subnet> =
            view.peer_subnets(own).filter(|subnet| !there.contains(subnet)).collect();
        if !vanished.is_empty() {
            // Whose host has another subnet now has not vanished: the host itself says where it is.
            let seen: BTreeSet<Mark> = snapshot.leases.iter().flat_map(|lease| marks(&lease.attrs)).collect();
            vanished.retain(|subnet| {
                view.get(subnet).is_some_and(|lease| !marks(&lease.attrs).any(|mark| seen.contains(&mark)))
            });
        }
        let still: BTreeSet<Subnet> = vanished.iter().copied().collect();
        let ended: Vec<Subnet> = self.held.keys().filter(|subnet| !still.contains(subnet)).copied().collect();
        ended.into_iter().for_each(|subnet| self.release(subnet));

        let held = self.hold(&vanished, view, own, now);
        snapshot.leases.extend(self.held.values().map(|held| held.lease.clone()));
        Admitted { events: vec![LeaseEvent::Snapshot(snapshot)], held }
    }

    fn admit_removal(
        &mut self,
        mut subnets: Vec<Subnet>,
        view: &LeaseView,
        own: Subnet,
        now: Instant,
    ) -> Admitted {
        let vanished: Vec<Subnet> =
            subnets.iter().copied().filter(|subnet| *subnet != own && view.get(subnet).is_some()).collect();
        let held = self.hold(&vanished, view, own, now);
        subnets.retain(|subnet| !self.holds(subnet));
        let events = Some(subnets).filter(|subnets| !subnets.is_empty()).map(LeaseEvent::RemovedTogether);
        Admitted { events: events.into_iter().collect(), held }
    }

    /// Holds those of `vanished` that are not held yet, if too many would be
    /// missing with them; how many that are.
    fn hold(&mut self, vanished: &[Subnet], view: &LeaseView, own: Subnet, now: Instant) -> usize {
        let new: Vec<Subnet> = vanished.iter().copied().filter(|subnet| !self.holds(subnet)).collect();
        let missing = self.held.len() + new.len();
        let many = missing > FEW && missing * PART > view.count_peers(own);
        if self.grace.is_zero() || !many || new.is_empty() {
            return 0;
        }
        for lease in new.iter().filter_map(|subnet| view.get(subnet)) {
            for mark in marks(&lease.attrs) {
                self.hosts.entry(mark).or_default().insert(lease.subnet);
            }
            self.held.insert(lease.subnet, Held { lease, since: now });
        }
        self.due.get_or_insert(now + self.grace);
        new.len()
    }
}

fn marks(attrs: &LeaseAttrs) -> impl Iterator<Item = Mark> + use<> {
    let mac = match &attrs.backend_data {
        Some(BackendData::Vtep { mac, .. }) => Some(Mark::Mac(*mac)),
        Some(BackendData::Json(_) | BackendData::TooLong(_)) | None => None,
    };
    let v4 = attrs.public_ip.map(IpAddr::V4);
    let v6 = attrs.public_ipv6.map(IpAddr::V6);
    v4.into_iter().chain(v6).map(Mark::Address).chain(mac)
}

#[cfg(test)]
mod tests;
