//! Our own lease: kept, published, put right, and taken anew.
//!
//! ```text
//!   Confirming ──the store says so──▶ Held
//!
//!   Held ──renewal due───────▶ Renewing ────┐
//!     │ ◀──────────────────────────────────┘ │ lost
//!     ├──not what it should say─▶ Publishing ◀┘
//!     │ ◀──────────────────────────┘ │ somebody else has it
//!     │ ◀──────────── Moving ◀───────┘
//! ```

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use flannel_core::chain::chain;
use flannel_core::host::{Firewall, Network};
use flannel_core::keeper::LeaseKeeper;
use flannel_core::lease::{Expiry, HeldLease, Lease, Subnet, Tenure};
use flannel_core::store::{LeaseEvent, LeaseStore, StoreError};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::{Agent, ECHOES, Input, LONGEST_WAIT, Need, REWRITES, Tenancy, now, ruleset};
use crate::health::Aspect;
use crate::lease::{Pace, Reconfigured, acquire, network_config};

/// How long whoever kept writing to our lease must have been quiet before it is put right again;
/// twice as long each time, up to the next renewal.
const QUIET: Duration = Duration::from_secs(60);

/// Leases of which the store has told.
#[derive(Debug, Default)]
pub(super) struct Heard {
    all: bool,
    some: BTreeSet<Subnet>,
}

impl Heard {
    /// More are all: whoever waits for long must not keep them all.
    const MOST: usize = 1000;

    pub(super) fn take(&mut self, event: &LeaseEvent) {
        match event {
            LeaseEvent::Snapshot(_) => self.all = true,
            LeaseEvent::Put(Lease { subnet, .. }) | LeaseEvent::Removed(subnet) => {
                self.some.insert(*subnet);
            }
            LeaseEvent::RemovedTogether(subnets) => self.some.extend(subnets),
            LeaseEvent::Unreadable(key) => self.some.extend(key.subnet),
            LeaseEvent::Resumed => {}
        }
        if self.some.len() > Self::MOST {
            *self = Self { all: true, some: BTreeSet::new() };
        }
    }

    fn of(&self, subnet: Subnet) -> bool {
        self.all || self.some.contains(&subnet)
    }
}

impl<S: LeaseStore, N: Network, F: Firewall> Agent<S, N, F> {
    /// Compares what the store says of our own lease with what we hold, as
    /// one compares the kernel with the plan: whatever event or snapshot
    /// brought it, and also when it came while we were busy with the lease.
    pub(super) fn check_own(&mut self) {
        if !self.listed || self.tenancy != Tenancy::Held {
            return;
        }
        let ours = &self.parts.held.lease;
        if *self.wanted.borrow() != ours.attrs {
            info!(subnet = %ours.subnet, attrs = self.wanted.borrow().to_json(), "publishing where this host is now");
            return self.publish("this host is not where its lease says");
        }
        let Some(published) = self.view.get(&ours.subnet) else {
            return self.restore("our lease vanished from the store");
        };
        self.former_attrs.retain(|(_, until)| Instant::now() < *until);
        if self.former_attrs.iter().any(|(former, _)| published.attrs == *former) {
            // The store has not come to our last write yet.
            return;
        }
        if published == *ours {
            if std::mem::take(&mut self.disputed) {
                self.parts.status.send_modify(|status| status.lease = Aspect::Good);
            }
            if let Some(stray) = self.strays.pop_first() {
                self.give_back(stray);
            }
        } else if published.attrs == ours.attrs {
            info!(subnet = %ours.subnet, tenure = ?published.tenure, "the tenure of our lease was changed in the store");
            match published.tenure {
                // Renewing gives the etcd lease back that nothing hangs on any more, and learns that there is no end.
                Tenure::Reserved => {
                    self.parts.held.lease.tenure = Tenure::Reserved;
                    self.renew();
                }
                // Putting back takes over what stands there, with its end.
                Tenure::Leased => self.restore("our lease is no reservation any more"),
            }
        } else if self.rewrites_left > 0 {
            self.rewrites_left -= 1;
            // Whose it is then, the store knows.
            self.restore(match published.attrs.same_host(&ours.attrs) {
                true => "our lease says what we did not write",
                false => "our lease was overwritten in the store",
            });
        } else {
            // Whichever way it was learnt, a truce begins.
            self.overwritten.get_or_insert_with(Instant::now);
            if !std::mem::replace(&mut self.disputed, true) {
                let (published, ours) = (published.attrs.to_json(), ours.attrs.to_json());
                error!(
                    %published,
                    %ours,
                    "somebody keeps writing to our lease: another agent with our public address? It is put right once they \
                     have been quiet for a while"
                );
                let pending = "somebody keeps writing other values to our lease; it is put right once they have been quiet \
                               for a while"
                    .into();
                self.parts.status.send_modify(|status| status.lease = Aspect::Pending(pending));
            }
        }
    }

    /// When a lease that somebody kept writing to is put right after all, if it is one.
    pub(super) fn truce_over(&self) -> Option<Instant> {
        self.overwritten
            .filter(|_| self.disputed && self.tenancy == Tenancy::Held)
            .map(|last| last + QUIET * (1 << self.truces.min(6)))
    }

    /// They have been quiet for long enough.
    pub(super) fn end_truce(&mut self) {
        (self.overwritten, self.rewrites_left) = (None, 1);
        self.truces += 1;
    }

    /// Takes note of leases that look like ours and are on another subnet.
    pub(super) fn look_for_strays(&mut self, event: &LeaseEvent) {
        let is_stray = |lease: &&Lease| self.looks_like_ours(lease);
        match event {
            LeaseEvent::Snapshot(snapshot) => {
                self.strays = snapshot.leases.iter().filter(is_stray).map(|lease| lease.subnet).collect();
            }
            LeaseEvent::Put(lease) if is_stray(&lease) => drop(self.strays.insert(lease.subnet)),
            _ => {}
        }
    }

    fn look_for_all_strays(&mut self) {
        let strays = self.view.peers(self.own()).filter(|lease| self.looks_like_ours(lease));
        self.strays = strays.map(|lease| lease.subnet).collect();
    }

    fn looks_like_ours(&self, lease: &Lease) -> bool {
        let Lease { subnet: own, attrs: ours, .. } = &self.parts.held.lease;
        let same_mac = ours.backend_data.is_some() && lease.attrs.backend_data == ours.backend_data;
        lease.subnet != *own && (same_mac || lease.attrs.same_host(ours))
    }

    fn give_back(&mut self, stray: Subnet) {
        self.tenancy = Tenancy::GivingBack;
        let (store, held) = (self.parts.store.clone(), self.parts.held.clone());
        self.spawn(async move {
            let Err(error) = store.give_back(&held, stray).await else { return Input::GaveBack(None) };
            debug!(error = %chain(&error), %stray, "a lease beside ours cannot be given back yet");
            // Once, and then again: a renewal that is due must not wait for it.
            tokio::time::sleep(LONGEST_WAIT).await;
            Input::GaveBack(Some(stray))
        });
    }

    /// Has the store say whether the lease that we remember is ours.
    pub(super) fn confirm(&mut self) {
        self.tenancy = Tenancy::Confirming;
        self.heard = Heard::default();
        let subnet = self.own();
        let pending =
            format!("going by what this host remembers, with {subnet}, until etcd gives a network config");
        self.parts.status.send_modify(|status| status.memory = Aspect::Pending(pending));
        let (store, remembered) = (self.parts.store.clone(), self.parts.config.text.clone());
        let (wanted, status) = (self.wanted.subscribe(), self.parts.status.clone());
        let inputs = self.inputs.0.clone();
        self.spawn(async move {
            let (config, _) = network_config(&*store, &status).await;
            if config.text != remembered {
                return Input::Reconfigured;
            }
            if inputs.send(Input::ConfigStands).await.is_err() {
                return Input::Reconfigured;
            }
            match acquire(&*store, &config, wanted, Some(subnet), &status).await {
                Ok(held) => Input::Acquired(held),
                Err(Reconfigured) => Input::Reconfigured,
            }
        });
    }

    pub(super) fn renew(&mut self) {
        self.tenancy = Tenancy::Renewing;
        let (store, held) = (self.parts.store.clone(), self.parts.held.clone());
        self.spawn(async move { Input::Renewed(store.renew(&held).await) });
    }

    pub(super) fn take_renewal(&mut self, result: Result<Expiry, StoreError>) {
        self.tenancy = Tenancy::Held;
        match result {
            Ok(expiry) => {
                self.said.renewed(self.own(), expiry);
                (self.rewrites_left, self.disputed, self.truces) = (REWRITES, false, 0);
                self.keeper.renewed(expiry, now());
                self.news();
                // Whoever answered for one an hour ago may be gone.
                self.look_for_all_strays();
                if self.standing_by.is_none() {
                    self.stand_by();
                }
                self.parts.status.send_modify(|status| status.lease = Aspect::Good);
            }
            Err(StoreError::Lost { .. }) => self.restore("our lease ran out in the store"),
            Err(error) => {
                self.said.renewal(self.own(), self.keeper.expiry(), &error);
                self.keeper.failed(now());
                if matches!(self.keeper.expiry(), Expiry::At(end) if end <= now()) {
                    let pending = "our lease has run out and cannot be renewed".into();
                    self.parts.status.send_modify(|status| status.lease = Aspect::Pending(pending));
                }
            }
        }
    }

    /// Answers for our lease whoever asks whether its holder is alive.
    pub(super) fn stand_by(&mut self) {
        if let Some(former) = self.standing_by.take() {
            former.abort();
        }
        let lost = self.parts.store.hold(&self.parts.held);
        let inputs = self.inputs.0.clone();
        self.standing_by = Some(self.tasks.spawn(async move {
            // A closed channel means that the agent has stopped.
            drop(inputs.send(Input::Lost(lost.await)).await);
        }));
    }

    pub(super) fn take_loss(&mut self, error: StoreError) {
        self.standing_by = None;
        let is_own = matches!(&error, StoreError::Lost { subnet, .. } if *subnet == self.own());
        // Whoever writes to our lease at the moment finds out by himself.
        if is_own && matches!(self.tenancy, Tenancy::Held | Tenancy::GivingBack) {
            self.take_published(Err(error));
        }
    }

    fn restore(&mut self, why: &str) {
        warn!(subnet = %self.own(), "{why}; putting it right");
        self.publish(why);
    }

    /// Has our lease say what it should, whatever that is by the time it can be written.
    fn publish(&mut self, why: &str) {
        self.tenancy = Tenancy::Publishing;
        self.heard = Heard::default();
        let pending = format!("{why}; it is being put right");
        self.parts.status.send_modify(|status| status.lease = Aspect::Pending(pending));
        let (store, held) = (self.parts.store.clone(), self.parts.held.clone());
        let (mut wanted, status, why) = (self.wanted.subscribe(), self.parts.status.clone(), why.to_owned());
        self.spawn(async move {
            let (mut said, mut pace) = (None, Pace::new());
            loop {
                let attrs = wanted.borrow_and_update().clone();
                match store.publish(&held, &attrs).await {
                    Ok(held) => return Input::Published(Ok(held)),
                    Err(error @ StoreError::Lost { .. }) => return Input::Published(Err(error)),
                    Err(error) => {
                        if said.replace(error.trouble()) != Some(error.trouble()) {
                            warn!(error = %chain(&error), "the lease cannot be put right yet; trying again");
                            let pending = format!("{why}, and it cannot be put right yet: {}", chain(&error));
                            status.send_modify(|status| status.lease = Aspect::Pending(pending));
                        }
                        tokio::select! {
                            biased;
                            Ok(()) = wanted.changed() => {}
                            () = tokio::time::sleep(pace.after(&error)) => {}
                        }
                    }
                }
            }
        });
    }

    pub(super) fn take_published(&mut self, result: Result<HeldLease, StoreError>) {
        let error = match result {
            Ok(held) => {
                let subnet = held.lease.subnet;
                match held.lease.attrs == self.parts.held.lease.attrs {
                    true => info!(%subnet, "the lease is as it should be again"),
                    false => info!(%subnet, "published where this host is now"),
                }
                return self.hold(held);
            }
            Err(error) => error,
        };
        let (subnet, us) = (self.own(), self.parts.held.lease.attrs.public_ip);
        error!(%subnet, us = %us.unwrap_or(Ipv4Addr::UNSPECIFIED), error = %chain(&error), "this subnet is not ours any more; taking another one");
        let pending = format!("the lease on {subnet} is lost, another one is being taken");
        self.parts.status.send_modify(|status| status.lease = Aspect::Pending(pending));
        self.tenancy = Tenancy::Moving;
        self.heard = Heard::default();
        let (store, config) = (self.parts.store.clone(), self.parts.config.clone());
        let (wanted, status) = (self.wanted.subscribe(), self.parts.status.clone());
        self.spawn(async move {
            loop {
                // A config that is another one now needs a restart; until then we go by the one we have.
                if let Ok(held) = acquire(&*store, &config, wanted.clone(), None, &status).await {
                    return Input::Acquired(held);
                }
            }
        });
    }

    pub(super) fn hold(&mut self, held: HeldLease) {
        let former = self.own();
        self.tenancy = Tenancy::Held;
        self.news();
        self.parts.status.send_modify(|status| status.memory = Aspect::Good);
        self.keeper = LeaseKeeper::new(self.parts.options.renew_margin, held.expiry, now());
        // Whoever had it before and is held has lost it.
        self.guard.release(held.lease.subnet);
        self.tell_held(0);
        // The store's own word of it may still be under way; if it has come, it may be of something later.
        if !self.heard.of(held.lease.subnet) {
            self.view.apply(LeaseEvent::Put(held.lease.clone()));
        }
        let moved = self.parts.held.lease.attrs != held.lease.attrs;
        let former_attrs = std::mem::replace(&mut self.parts.held, held).lease.attrs;
        if moved {
            self.former_attrs.retain(|(attrs, _)| *attrs != self.parts.held.lease.attrs);
            self.former_attrs.push_back((former_attrs, Instant::now() + ECHOES));
            self.parts.reconciler.set_lease(self.parts.held.lease.clone());
            self.needs(Need::Plan);
            self.look_for_all_strays();
        }
        self.parts.status.send_modify(|status| status.lease = Aspect::Good);
        self.stand_by();
        if former != self.own() {
            self.move_from(former);
        }
    }

    /// Our subnet is another one now, and everything that follows from it.
    pub(super) fn move_from(&mut self, former: Subnet) {
        warn!(
            subnet = %self.own(), %former,
            "this host has another subnet now: containers on the former one cannot be reached; \
             `systemctl restart flanneld docker` moves docker's bridge"
        );
        self.parts.status.send_modify(|status| {
            status.file = Aspect::Pending("the subnet file still names our former subnet".into());
            status.rules = Aspect::Pending("the traffic rules are still for our former subnet".into());
        });
        self.parts.reconciler.set_lease(self.parts.held.lease.clone());
        self.node_stands = false;
        self.rules_seen = false;
        self.file_due = Some(Instant::now());
        self.former = Some(former);
        self.said.other_rules();
        self.rules.send_replace(ruleset(&self.parts));
        self.needs(Need::Plan);
    }
}
