//! The plan for a whole cluster, and for the change of one peer.
//!
//! A backend plans one peer at a time. What remains to be decided between
//! peers is decided here. Two that publish one MAC cannot both have its
//! forwarding entry, nor can two whose subnets begin at one address both have its
//! neighbour entry: the lower subnet has it and the other is skipped, on every
//! host alike and whichever came first. And with many peers their routes lead
//! through nexthop objects, see [`RouteMode`].
//!
//! ```text
//!   snapshot          plan(all leases)      → Plan{desired, skipped}
//!   one peer changed  replan(before, after) → Patch{before, after}
//! ```
//!
//! The second gives the same as the first would, at the cost of the peers that
//! the change touches.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::backend::{Backend, Node};
use crate::lease::{Lease, Subnet};
use crate::state::{HostState, MacAddr, Nexthop, NexthopId, Object};
use crate::view::{Change, LeaseView};

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
    /// Which peers want the entry of a MAC or of an address. The lowest has it.
    claimants: BTreeMap<Claimed, Claimants>,
}

/// What only one peer can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Claimed {
    /// A forwarding entry.
    Mac(MacAddr),
    /// A neighbour entry.
    Gateway(IpAddr),
}

/// Nearly always there is one.
enum Claimants {
    One(Subnet),
    Several(BTreeSet<Subnet>),
}

impl Planner {
    /// A planner for `node`; it knows no peers yet.
    pub fn new(backend: Box<dyn Backend>, node: Node, mode: RouteMode) -> Self {
        Self { backend, node, mode, able: true, through_nexthops: false, claimants: BTreeMap::new() }
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
        self.claimants.clear();
        self.through_nexthops = self.wants_nexthops(view);
        let mut skipped = Vec::new();
        // In the order of subnets, so that whoever comes first to something is the one who has it.
        let objects = view.peers(self.node.lease.subnet).flat_map(|peer| {
            let planned = self.plan_peer(&peer);
            if let Ok(wanted) = &planned {
                self.claim(peer.subnet, wanted);
            }
            planned.and_then(|wanted| self.undisputed(peer.subnet, wanted)).unwrap_or_else(|reason| {
                skipped.push(Skipped { subnet: peer.subnet, reason });
                vec![]
            })
        });
        let mut desired: HostState = objects.collect();
        let HostState { links, addresses, .. } = self.backend.plan_node(&self.node);
        desired.links.extend(links);
        desired.addresses.extend(addresses);
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
        let plan = |lease: &Option<Lease>| lease.as_ref().map(|lease| self.plan_peer(lease));
        let (was, is) = (plan(&change.before), plan(&change.after));

        // The peer itself, and whoever disputes something with what it was or is.
        let mut touched = BTreeSet::new();
        for wanted in [&was, &is].into_iter().flatten().flatten() {
            for claimants in claimed(wanted).filter_map(|key| self.claimants.get(&key)) {
                touched.extend(claimants.iter());
            }
        }
        touched.remove(&subnet);
        let rivals: Vec<(Subnet, Vec<Object>)> = touched
            .into_iter()
            .filter_map(|rival| Some((rival, self.plan_peer(&view.get(&rival)?).ok()?)))
            .collect();

        let had = rivals.iter().cloned().chain(was.and_then(Result::ok).map(|wanted| (subnet, wanted)));
        let had: Vec<(Subnet, Vec<Object>)> = had.collect();
        for (peer, wanted) in &had {
            patch.before.extend(self.undisputed(*peer, wanted.clone()).unwrap_or_default());
        }
        if let Some((_, wanted)) = had.iter().find(|(peer, _)| *peer == subnet) {
            self.disclaim(subnet, wanted);
        }
        if let Some(Ok(wanted)) = &is {
            self.claim(subnet, wanted);
        }
        let now = rivals.into_iter().map(|(peer, wanted)| (peer, Ok(wanted)));
        for (peer, wanted) in now.chain(is.map(|wanted| (subnet, wanted))) {
            match wanted.and_then(|wanted| self.undisputed(peer, wanted)) {
                Ok(wanted) => {
                    patch.after.extend(wanted);
                    patch.planned.push(peer);
                }
                Err(reason) => patch.skipped.push(Skipped { subnet: peer, reason }),
            }
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

    fn claim(&mut self, subnet: Subnet, wanted: &[Object]) {
        for key in claimed(wanted) {
            match self.claimants.entry(key) {
                Entry::Vacant(vacant) => drop(vacant.insert(Claimants::One(subnet))),
                Entry::Occupied(mut occupied) => occupied.get_mut().insert(subnet),
            }
        }
    }

    fn disclaim(&mut self, subnet: Subnet, wanted: &[Object]) {
        for key in claimed(wanted) {
            if let Some(claimants) = self.claimants.get_mut(&key)
                && claimants.remove(subnet)
            {
                self.claimants.remove(&key);
            }
        }
    }

    /// What a peer wants, if nobody before it wants one of its entries.
    fn undisputed(&self, subnet: Subnet, wanted: Vec<Object>) -> Result<Vec<Object>, String> {
        for key in claimed(&wanted) {
            let first = self.claimants.get(&key).and_then(|claimants| claimants.iter().next());
            if let Some(first) = first.filter(|first| *first != subnet) {
                return Err(match key {
                    Claimed::Mac(mac) => format!("its VtepMAC {mac} is that of {first}"),
                    Claimed::Gateway(_) => format!("its subnet begins where {first} does"),
                });
            }
        }
        Ok(wanted)
    }
}

impl Claimants {
    /// In the order of subnets.
    fn iter(&self) -> impl Iterator<Item = Subnet> {
        let (one, several) = match self {
            Self::One(subnet) => (Some(*subnet), None),
            Self::Several(subnets) => (None, Some(subnets)),
        };
        one.into_iter().chain(several.into_iter().flatten().copied())
    }

    fn insert(&mut self, subnet: Subnet) {
        let all: BTreeSet<Subnet> = self.iter().chain([subnet]).collect();
        *self = if all.len() == 1 { Self::One(subnet) } else { Self::Several(all) };
    }

    /// Whether nobody is left.
    fn remove(&mut self, subnet: Subnet) -> bool {
        match self {
            Self::One(one) => *one == subnet,
            Self::Several(several) => {
                several.remove(&subnet);
                several.is_empty()
            }
        }
    }
}

/// What among some objects only one peer can have.
fn claimed(wanted: &[Object]) -> impl Iterator<Item = Claimed> {
    wanted.iter().filter_map(|object| match object {
        Object::Fdb(_, mac, _) => Some(Claimed::Mac(*mac)),
        Object::Neighbour(_, ip, _) => Some(Claimed::Gateway(*ip)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::VxlanBackend;
    use crate::json::Object as Settings;
    use crate::lease::{BackendData, LeaseAttrs, Tenure};
    use crate::store::{LeaseEvent, Snapshot};
    use crate::underlay::Underlay;
    use crate::view::Applied;

    /// The lease on 10.16.0.0/24 and on; the lowest is our own.
    fn lease(number: u32) -> Lease {
        let [_, a, b, c] = number.to_be_bytes();
        let first = std::net::Ipv4Addr::from_bits(u32::from_be_bytes([10, 16, 0, 0]) + (number << 8));
        let attrs = LeaseAttrs {
            public_ip: Some([172, 16, b, c].into()),
            public_ipv6: None,
            backend_type: "vxlan".into(),
            backend_data: Some(BackendData::Vtep { vni: Some(1), mac: MacAddr([0x0e, 0, 0, a, b, c]) }),
            backend_v6_data: None,
        };
        let subnet = Subnet::V4(format!("{first}/24").parse().unwrap());
        Lease { subnet, attrs, tenure: Tenure::Leased }
    }

    fn planner(mode: RouteMode) -> Planner {
        let (backend, _) = VxlanBackend::from_settings(&Settings::default()).unwrap();
        let underlay = Underlay {
            link: "eth0".parse().unwrap(),
            mtu: 1500,
            address: [192, 168, 0, 1].into(),
            public_ip: [192, 168, 0, 1].into(),
            public_ipv6: None,
            routes: vec![],
        };
        let networks = vec!["10.0.0.0/8".parse().unwrap()];
        let node = Node { networks, underlay, lease: lease(0), mtu: None };
        Planner::new(Box::new(backend), node, mode)
    }

    fn view(peers: usize) -> LeaseView {
        let mut view = LeaseView::default();
        let leases = (0..=u32::try_from(peers).unwrap()).map(lease).collect();
        view.apply(LeaseEvent::Snapshot(Snapshot { leases, unreadable: vec![] }));
        view
    }

    fn nexthops(planner: &mut Planner, peers: usize) -> usize {
        let desired = planner.plan(&view(peers)).desired;
        assert_eq!(desired.routes.len(), peers);
        assert!(desired.routes.values().all(|route| route.nexthop.is_some() != desired.nexthops.is_empty()));
        desired.nexthops.len()
    }

    #[test]
    fn many_peers_have_nexthop_objects_and_few_have_not() {
        let mut planner = planner(RouteMode::Auto);

        assert_eq!(nexthops(&mut planner, MANY_PEERS), 0);
        assert_eq!(nexthops(&mut planner, MANY_PEERS + 1), MANY_PEERS + 1);
        assert_eq!(nexthops(&mut planner, FEW_PEERS + 1), FEW_PEERS + 1, "a cluster that breathes");
        assert_eq!(nexthops(&mut planner, FEW_PEERS), 0);
        assert_eq!(nexthops(&mut planner, FEW_PEERS + 1), 0);
    }

    #[test]
    fn what_is_asked_for_holds_at_any_number() {
        assert_eq!(nexthops(&mut planner(RouteMode::Nexthop), 2), 2);
        assert_eq!(nexthops(&mut planner(RouteMode::Plain), MANY_PEERS + 1), 0);
    }

    #[test]
    fn a_kernel_without_nexthop_objects_gets_none() {
        let mut planner = planner(RouteMode::Nexthop);

        assert!(planner.set_able(false), "that is news");

        assert_eq!(nexthops(&mut planner, 2), 0);
        assert!(!planner.set_able(false));
    }

    #[test]
    fn the_peer_that_makes_them_many_changes_the_plan_for_everybody() {
        let mut planner = planner(RouteMode::Auto);
        let mut view = view(MANY_PEERS);
        planner.plan(&view);
        let more = |number| LeaseEvent::Put(lease(u32::try_from(number).unwrap()));

        let Applied::One(change) = view.apply(more(MANY_PEERS + 1)) else { panic!("no change") };
        assert_eq!(planner.replan(&change, &view), None);

        planner.plan(&view);
        let Applied::One(change) = view.apply(more(MANY_PEERS + 2)) else { panic!("no change") };
        assert_eq!(planner.replan(&change, &view).unwrap().after.len(), 4);
    }
}
