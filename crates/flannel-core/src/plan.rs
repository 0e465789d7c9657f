//! The plan for a whole cluster, and for the change of one peer.
//!
//! A backend plans one peer at a time. What remains to be decided between
//! peers is decided here: who has it where several claim one thing.
//!
//! ```text
//!   overlapping subnets    a packet goes to one host
//!   one VTEP MAC           it has one forwarding entry
//!   one public address     one host has it
//! ```
//!
//! One rule decides, and every host comes to the same answer with it, whichever
//! lease came first. A subnet that the network config could hand out (of
//! `SubnetLen`, from `SubnetMin` to `SubnetMax`) goes before one that it could
//! not, so that no lease of half the network takes the hosts in there away. Of
//! two alike a lease that somebody keeps alive goes before a reservation: a hand
//! may write anything, and what it writes stays. Then the lower goes first, and one
//! of IPv4 alone before one of both families. Whoever comes after another one that
//! claims the same is skipped.
//!
//! The answer depends on the two and on nobody else. One that is skipped claims
//! no less for it, or a third could turn all answers around. But one that the
//! backend cannot plan claims nothing at all; that is how everything of our own
//! is out of dispute, for a peer that claims it is not planned.
//!
//! Two leases with the same MAC *and* the same public address do not dispute
//! them: that is one host with two subnets. It has moved to another while the
//! lease that it left is still there, for up to a day; both lead to it, and it
//! knows best which one it lives on. Without a tunnel there is no MAC, and the
//! address alone says which host it is.
//!
//! And with many peers their routes lead through nexthop objects, see [`RouteMode`].
//!
//! ```text
//!   snapshot          plan(all leases)      → Plan{desired, skipped}
//!   one peer changed  replan(before, after) → Patch{before, after}
//! ```
//!
//! The second gives the same as the first would, at the cost of the peers that
//! the change touches: those that come after the changed one and claim the same.

use std::collections::BTreeSet;

use crate::backend::{Backend, Node};
use crate::lease::{BackendData, Lease, Subnet, Tenure};
use crate::state::{HostState, Nexthop, NexthopId, Object, RouteKey};
use crate::view::{Change, LeaseView};

use claims::{Claimed, Claims, Rank, Standing};

mod claims;

/// How the routes by our own device say where they lead.
///
/// The kernel shares what routes say of their next hop, and to find a like it
/// searches among all routes of the device (`fib_create_info`): a thousand peers,
/// each with a gateway of its own, cost 10 ms, ten thousand a second, and fifty
/// thousand half a minute. Through nexthop objects each costs a few microseconds
/// at any number. Routes by other devices are always plain: nexthop objects go
/// when their device loses its carrier, and ours is the only one that has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RouteMode {
    /// Plain in a cluster of usual size, through nexthop objects in a large one.
    #[default]
    Auto,
    /// Each for itself, as everybody expects to see them.
    Plain,
    /// Through nexthop objects.
    Nexthop,
}

/// From so many peers on, `Auto` means nexthop objects: plain routes would take
/// a tenth of a second by then.
pub const MANY_PEERS: usize = 3000;

/// Down to so many it stays with them: a cluster that breathes must not have its
/// routes rewritten with each breath.
pub const FEW_PEERS: usize = 2500;

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
    pub before: Vec<Object>,
    /// What they should have.
    pub after: Vec<Object>,
    /// The touched peers that are left out now.
    pub skipped: Vec<Skipped>,
    /// The touched peers that are not.
    pub planned: Vec<Subnet>,
}

/// Plans for one node with one backend.
pub struct Planner {
    backend: Box<dyn Backend>,
    node: Node,
    mode: RouteMode,
    /// Whether the kernel has nexthop objects.
    able: bool,
    /// Whether routes by our devices lead through nexthop objects now.
    through_nexthops: bool,
    /// Whether what of our subnet nobody has is dropped.
    blackhole: bool,
    /// Who claims what.
    claims: Claims,
}

/// A peer that the backend can plan.
struct Candidate {
    rank: Rank,
    claims: Vec<Claimed>,
    wanted: Vec<Object>,
}

impl Planner {
    /// A planner for `node`; it knows no peers yet.
    pub fn new(backend: Box<dyn Backend>, node: Node, mode: RouteMode) -> Self {
        let (through_nexthops, claims) = (false, Claims::default());
        Self { backend, node, mode, able: true, through_nexthops, blackhole: false, claims }
    }

    /// The same with a route that drops what is for our subnet and for no container in it, or without.
    pub fn with_blackhole(self, blackhole: bool) -> Self {
        Self { blackhole, ..self }
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

    /// Takes in whether the kernel has nexthop objects; whether that is news,
    /// after which the next call must be [`Planner::plan`].
    pub fn set_able(&mut self, able: bool) -> bool {
        std::mem::replace(&mut self.able, able) != able
    }

    /// Whether routes by our own devices lead through nexthop objects.
    pub fn through_nexthops(&self) -> bool {
        self.through_nexthops
    }

    /// The plan for all peers in `view`.
    pub fn plan(&mut self, view: &LeaseView) -> Plan {
        self.through_nexthops = self.wants_nexthops(view);
        let own = self.node.lease.subnet;
        // Who claims what comes first. To plan everybody twice costs less than to keep what everybody wants until then.
        let mut claims = Vec::with_capacity(3 * view.count_peers(own));
        for peer in view.peers(own) {
            if let Ok(wanted) = self.plan_peer(&peer) {
                let rank = self.rank(&peer);
                claims.extend(claims_of(&peer, &wanted).map(|claimed| (claimed, rank)));
            }
        }
        self.claims = claims.into();
        // Few claim what others claim too, and only of those it is to be asked who has it.
        let contenders = self.claims.contenders();

        let mut skipped = Vec::new();
        let objects = view.peers(own).flat_map(|peer| {
            let wanted = match contenders.contains(&peer.subnet) {
                true => self.candidate(&peer).and_then(|contender| self.granted(contender)),
                false => self.plan_peer(&peer),
            };
            wanted.unwrap_or_else(|reason| {
                skipped.push(Skipped { subnet: peer.subnet, reason });
                vec![]
            })
        });
        let mut desired: HostState = objects.collect();
        let HostState { links, addresses, .. } = self.backend.plan_node(&self.node);
        desired.links.extend(links);
        desired.addresses.extend(addresses);
        if self.blackhole {
            desired.blackholes.extend(own.networks().map(RouteKey::blackhole));
        }
        Plan { desired, skipped }
    }

    /// What `change`, which `view` holds already, alters in the plan; `None` if
    /// it alters the plan for everybody.
    pub fn replan(&mut self, change: &Change, view: &LeaseView) -> Option<Patch> {
        if self.wants_nexthops(view) != self.through_nexthops {
            return None;
        }
        let mut patch = Patch::default();
        let Some(subnet) = change.subnet().filter(|subnet| *subnet != self.node.lease.subnet) else {
            return Some(patch);
        };
        let candidate = |lease: &Option<Lease>| lease.as_ref().map(|lease| self.candidate(lease));
        let (was, is) = (candidate(&change.before), candidate(&change.after));

        // Beside the peer itself: whoever may gain or lose something by what it was or is, and whoever has an object in
        // common with any of these.
        let itself = || [&was, &is].into_iter().flatten().flatten();
        let find = |peers: BTreeSet<Subnet>| -> Vec<Candidate> {
            let others = peers.iter().filter(|peer| **peer != subnet);
            others.filter_map(|peer| self.candidate(&view.get(peer)?).ok()).collect()
        };
        let mut touched = find(itself().flat_map(|candidate| self.behind(candidate)).collect());
        let mut common: BTreeSet<Subnet> =
            itself().chain(&touched).flat_map(|candidate| self.in_common(candidate)).collect();
        for candidate in &touched {
            common.remove(&candidate.rank.subnet);
        }
        touched.extend(find(common));

        let was = was.and_then(Result::ok);
        for had in touched.iter().chain(&was).filter(|had| self.dispute(had).is_none()) {
            patch.before.extend(had.wanted.iter().cloned());
        }
        if let Some(Candidate { rank, claims, .. }) = &was {
            claims.iter().for_each(|claimed| self.claims.remove(*claimed, *rank));
        }
        if let Some(Ok(Candidate { rank, claims, .. })) = &is {
            claims.iter().for_each(|claimed| self.claims.insert(*claimed, *rank));
        }
        let touched = touched.into_iter().map(|candidate| (candidate.rank.subnet, Ok(candidate)));
        for (peer, candidate) in touched.chain(is.map(|candidate| (subnet, candidate))) {
            match candidate.and_then(|candidate| self.granted(candidate)) {
                Ok(wanted) => {
                    patch.after.extend(wanted);
                    patch.planned.push(peer);
                }
                Err(reason) => patch.skipped.push(Skipped { subnet: peer, reason }),
            }
        }
        if change.after.is_none() {
            // Whoever is gone is not left out.
            patch.planned.push(subnet);
        }
        Some(patch)
    }

    fn wants_nexthops(&self, view: &LeaseView) -> bool {
        let peers = view.count_peers(self.node.lease.subnet);
        let wanted = match self.mode {
            RouteMode::Plain => false,
            RouteMode::Nexthop => true,
            RouteMode::Auto => peers > if self.through_nexthops { FEW_PEERS } else { MANY_PEERS },
        };
        wanted && self.able
    }

    /// What this host needs to reach one peer, with the routes in the form that is in force.
    fn plan_peer(&self, peer: &Lease) -> Result<Vec<Object>, String> {
        let mut wanted = self.backend.plan_peer(&self.node, peer)?;
        if self.through_nexthops {
            let devices = self.backend.links();
            for place in 0..wanted.len() {
                if let Object::Route(_, route) = &mut wanted[place]
                    && devices.contains(&route.link)
                    && let Some(id) = route.gateway.and_then(NexthopId::of)
                {
                    route.nexthop = Some(id);
                    let (link, gateway, onlink) = (route.link, route.gateway, route.onlink);
                    let nexthop = Nexthop { link, gateway, onlink, protocol: route.protocol };
                    wanted.push(Object::Nexthop(id, nexthop));
                }
            }
        }
        Ok(wanted)
    }

    fn rank(&self, peer: &Lease) -> Rank {
        let standing = if self.node.hands_out(peer.subnet) { Standing::Regular } else { Standing::Odd };
        Rank { standing, is_reserved: peer.tenure == Tenure::Reserved, subnet: peer.subnet }
    }

    /// What a peer wants and claims.
    fn candidate(&self, peer: &Lease) -> Result<Candidate, String> {
        let wanted = self.plan_peer(peer)?;
        Ok(Candidate { rank: self.rank(peer), claims: claims_of(peer, &wanted).collect(), wanted })
    }

    /// What a peer wants, if it has what it claims.
    fn granted(&self, candidate: Candidate) -> Result<Vec<Object>, String> {
        let Some((claimed, first)) = self.dispute(&candidate) else { return Ok(candidate.wanted) };
        Err(match claimed {
            Claimed::Subnet(..) => format!("its subnet overlaps {first}, which goes before it"),
            Claimed::Mac(mac, _) => format!("its VtepMAC {mac} is that of {first}"),
            Claimed::Address(address, _) => format!("its public address {address} is that of {first}"),
        })
    }

    /// What a peer claims and has not, and somebody who goes before it.
    fn dispute(&self, candidate: &Candidate) -> Option<(Claimed, Subnet)> {
        candidate.claims.iter().find_map(|claimed| {
            let first = self.claims.disputing(*claimed).find(|other| *other < candidate.rank)?;
            Some((*claimed, first.subnet))
        })
    }

    /// The peers for which it may make a difference whether this one is there.
    fn behind(&self, candidate: &Candidate) -> impl Iterator<Item = Subnet> {
        let disputing = candidate.claims.iter().flat_map(|claimed| self.claims.disputing(*claimed));
        disputing.filter(|other| *other > candidate.rank).map(|other| other.subnet)
    }

    /// The peers that need the forwarding entry of this one: the same host under other subnets.
    fn in_common(&self, candidate: &Candidate) -> impl Iterator<Item = Subnet> {
        let macs = candidate.claims.iter().filter(|claimed| matches!(claimed, Claimed::Mac(..)));
        macs.flat_map(|claimed| self.claims.of(*claimed)).map(|other| other.subnet)
    }
}

/// What among the objects of a peer, and of what it publishes, only one host can
/// have. Of several reasons to skip a peer the first is told.
fn claims_of(peer: &Lease, wanted: &[Object]) -> impl Iterator<Item = Claimed> {
    let parts = wanted.iter().filter_map(|object| match object {
        Object::Route(key, _) => Some(key.destination),
        _ => None,
    });
    let macs = wanted.iter().filter_map(|object| match object {
        Object::Fdb(_, mac, remote) => Some(Claimed::Mac(*mac, *remote)),
        _ => None,
    });
    let addresses = parts.clone().filter_map(|part| {
        let mac = peer.attrs.data(&part).and_then(BackendData::mac);
        Some(Claimed::Address(peer.attrs.public_address(&part)?, mac))
    });
    parts.map(|part| Claimed::Subnet(part.network(), part.prefix())).chain(macs).chain(addresses)
}

#[cfg(test)]
mod tests;
