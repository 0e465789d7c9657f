//! The plan for a whole cluster, and for the change of one peer.
//!
//! A backend plans one peer at a time. What remains to be decided between
//! peers is decided here: two that publish one MAC cannot both have its
//! forwarding entry. The lower subnet has it and the other is skipped, on every
//! host alike and whichever came first.
//!
//! ```text
//!   snapshot, audit   plan(all leases)     → Plan{desired, skipped}
//!   one peer changed  replan(before, after) → Patch{before, after}
//! ```
//!
//! The second gives the same as the first would, at the cost of the peers that
//! the change touches.

use std::collections::{BTreeMap, BTreeSet};

use crate::backend::{Backend, Node};
use crate::lease::{Lease, Subnet};
use crate::state::{HostState, LinkName, MacAddr};
use crate::view::{Change, LeaseView};

/// A peer that is left out, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The peer.
    pub subnet: Subnet,
    /// Why, as a phrase.
    pub reason: String,
}

/// What this host should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Every object.
    pub desired: HostState,
    /// The peers that are left out, in the order of subnets.
    pub skipped: Vec<Skipped>,
}

/// What one change alters in the plan: replace `before` by `after`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patch {
    /// What the touched peers had.
    pub before: HostState,
    /// What they should have.
    pub after: HostState,
    /// The touched peers that are left out now.
    pub skipped: Vec<Skipped>,
    /// The touched peers that are not.
    pub planned: Vec<Subnet>,
}

/// Plans for one node with one backend.
pub struct Planner {
    backend: Box<dyn Backend>,
    node: Node,
    /// Which peers want the forwarding entry of a MAC. The lowest has it.
    claimants: BTreeMap<(LinkName, MacAddr), BTreeSet<Subnet>>,
}

impl Planner {
    /// A planner for `node`; it knows no peers yet.
    pub fn new(backend: Box<dyn Backend>, node: Node) -> Self {
        Self { backend, node, claimants: BTreeMap::new() }
    }

    /// The node it plans for.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its backend.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Plans for a node that has changed; the next call must be [`Planner::plan`].
    pub fn set_node(&mut self, node: Node) {
        self.node = node;
    }

    /// The plan for all peers in `view`.
    pub fn plan(&mut self, view: &LeaseView) -> Plan {
        self.claimants.clear();
        let mut plan = Plan { desired: self.backend.plan_node(&self.node), skipped: vec![] };
        // In the order of subnets, so that whoever comes first to a MAC is the one who has it.
        for peer in view.peers(self.node.lease.subnet) {
            let planned = self.backend.plan_peer(&self.node, &peer);
            if let Ok(state) = &planned {
                self.claim(peer.subnet, state);
            }
            match planned.and_then(|state| self.undisputed(peer.subnet, state)) {
                Ok(state) => plan.desired.merge(state),
                Err(reason) => plan.skipped.push(Skipped { subnet: peer.subnet, reason }),
            }
        }
        plan
    }

    /// What `change`, which `view` holds already, alters in the plan.
    pub fn replan(&mut self, change: &Change, view: &LeaseView) -> Patch {
        let mut patch = Patch::default();
        let Some(subnet) = change.subnet().filter(|subnet| *subnet != self.node.lease.subnet) else {
            return patch;
        };
        let plan =
            |lease: &Option<Lease>| lease.as_ref().map(|lease| self.backend.plan_peer(&self.node, lease));
        let (was, is) = (plan(&change.before), plan(&change.after));

        // The peer itself, and whoever disputes a MAC with what it was or is.
        let mut touched = BTreeSet::from([subnet]);
        for state in [&was, &is].into_iter().flatten().flatten() {
            for rivals in state.fdb.keys().filter_map(|key| self.claimants.get(key)) {
                touched.extend(rivals);
            }
        }
        let rivals: Vec<(Subnet, HostState)> = touched
            .iter()
            .filter(|rival| **rival != subnet)
            .filter_map(|rival| Some((*rival, self.backend.plan_peer(&self.node, &view.get(rival)?).ok()?)))
            .collect();

        let had = rivals.iter().cloned().chain(was.and_then(Result::ok).map(|state| (subnet, state)));
        let had: Vec<(Subnet, HostState)> = had.collect();
        for (peer, state) in &had {
            if let Ok(state) = self.undisputed(*peer, state.clone()) {
                patch.before.merge(state);
            }
        }
        if let Some((_, state)) = had.iter().find(|(peer, _)| *peer == subnet) {
            self.disclaim(subnet, state);
        }
        if let Some(Ok(state)) = &is {
            self.claim(subnet, state);
        }
        let wants =
            rivals.into_iter().map(|(peer, state)| (peer, Ok(state))).chain(is.map(|state| (subnet, state)));
        for (peer, state) in wants {
            match state.and_then(|state| self.undisputed(peer, state)) {
                Ok(state) => {
                    patch.after.merge(state);
                    patch.planned.push(peer);
                }
                Err(reason) => patch.skipped.push(Skipped { subnet: peer, reason }),
            }
        }
        patch
    }

    fn claim(&mut self, subnet: Subnet, state: &HostState) {
        for key in state.fdb.keys() {
            self.claimants.entry(*key).or_default().insert(subnet);
        }
    }

    fn disclaim(&mut self, subnet: Subnet, state: &HostState) {
        for key in state.fdb.keys() {
            if let Some(claimants) = self.claimants.get_mut(key) {
                claimants.remove(&subnet);
                if claimants.is_empty() {
                    self.claimants.remove(key);
                }
            }
        }
    }

    /// What a peer wants, if nobody before it wants one of its forwarding entries.
    fn undisputed(&self, subnet: Subnet, state: HostState) -> Result<HostState, String> {
        for key in state.fdb.keys() {
            let first = self.claimants.get(key).and_then(|claimants| claimants.first());
            if let Some(first) = first.filter(|first| **first != subnet) {
                return Err(format!("its VtepMAC {} is that of {first}", key.1));
            }
        }
        Ok(state)
    }
}
