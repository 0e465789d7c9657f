//! Brings the kernel in step: observe, diff, apply, report.
//!
//! ```text
//!   start, snapshot   plan all, read all, diff     ┐
//!   audit, a device   read all, diff               │
//!   one peer          its part of the plan         ├─▶ steps ─▶ kernel
//!   one object        what the kernel told of it   │
//!   retry             what it has refused          ┘
//! ```
//!
//! What should be is kept whole. What is, is kept only where it differs: the
//! objects that the kernel has refused, and those that somebody else touched
//! until they are put right. So a change of one peer, of one object and of one
//! refusal each cost just that, at any size.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use flannel_core::backend::Node;
use flannel_core::claim::{Claim, within};
use flannel_core::diff::{Difference, Step};
use flannel_core::host::{Changes, HostError, Network, Observed, Report};
use flannel_core::lease::{Lease, LeaseAttrs, Subnet};
use flannel_core::plan::{Planner, Skipped};
use flannel_core::state::{HostState, Key, LinkName, MacAddr, Object, RouteKey};
use flannel_core::underlay::{self, Facts, Interface, RouteFact, Selection, Underlay};
use flannel_core::view::{Change, LeaseView};
use ipnetwork::IpNetwork;
use tokio::time::Instant;
use tracing::{error, info, warn};

use tug::Tug;

mod tug;

/// Steps that go to the kernel together.
const PORTION: usize = 4096;

/// How long an address without a network must have been the only one of the
/// interface: the address of a virtual router stays where the router goes.
const ALONE: Duration = Duration::from_secs(2);

/// What a pass came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What was done.
    pub report: Report,
    /// The first of the steps.
    pub first: Option<Step>,
    /// What was planned, if anything was.
    pub planned: Option<Planned>,
    /// What was read, if all was.
    pub seen: Option<Seen>,
    /// What the kernel had told before it.
    pub after: Option<String>,
}

/// What a plan says of the peers.
#[derive(Debug, Default)]
pub struct Planned {
    /// Peers that are left out.
    pub skipped: Vec<Skipped>,
    /// Peers that are not; `None` for every other one.
    pub planned: Option<Vec<Subnet>>,
}

/// What a look at the whole host has shown.
#[derive(Debug, Default)]
pub struct Seen {
    /// Routes into the network by way of some host that are neither ours nor
    /// to a lease. A Go flanneld in host-gw mode leaves such; so may anybody.
    pub strays: Vec<RouteFact>,
    /// The interfaces of the host and their addresses.
    pub interfaces: Vec<Interface>,
    /// Why the interface between the hosts cannot be followed just now.
    pub lost: Option<String>,
}

/// Keeps one host's kernel in step with a plan.
pub struct Reconciler<N> {
    network: N,
    planner: Planner,
    claim: Claim,
    selection: Selection,
    /// What the kernel should hold; `None` before the first plan and when the node has changed.
    desired: Option<HostState>,
    /// Whether the kernel holds just that, but for what is `off`.
    known: bool,
    /// Whether what the kernel holds of peers is not to be touched.
    trusting: bool,
    off: Off,
    tug: Tug,
    /// Since when only an address that stands alone is left.
    alone_since: Option<Instant>,
}

/// Objects that the kernel holds otherwise than it should, as far as we know.
#[derive(Default)]
struct Off {
    keys: BTreeSet<Key>,
    is: HostState,
}

impl Off {
    fn insert(&mut self, key: Key, is: Option<Object>) {
        self.keys.insert(key);
        self.is.set(&key, is);
    }

    fn remove(&mut self, key: &Key) {
        if self.keys.remove(key) {
            self.is.remove(key);
        }
    }
}

impl<N: Network> Reconciler<N> {
    /// A reconciler that knows nothing of the kernel yet.
    pub fn new(network: N, planner: Planner, claim: Claim, selection: Selection) -> Self {
        let claim = Claim { underlay: Some(planner.node().underlay.link), ..claim };
        Self {
            network,
            planner,
            claim,
            selection,
            desired: None,
            known: false,
            trusting: false,
            off: Off::default(),
            tug: Tug::default(),
            alone_since: None,
        }
    }

    /// In bytes, of a packet from container to container.
    pub fn mtu(&self) -> u32 {
        self.planner.backend().mtu(self.planner.node())
    }

    /// Where this host stands.
    pub fn underlay(&self) -> &Underlay {
        &self.planner.node().underlay
    }

    /// What this host should publish: where it stands, and its device's MAC.
    pub fn attributes(&self) -> LeaseAttrs {
        let node = self.planner.node();
        let state = self.planner.backend().plan_node(node);
        if state.links.is_empty() && !self.planner.backend().links().is_empty() {
            return node.lease.attrs.clone();
        }
        // A device is planned with the MAC of the lease.
        self.planner.backend().attributes(&node.underlay, &state, MacAddr([0; 6]))
    }

    /// Whether a device is ours.
    pub fn owns(&self, link: LinkName) -> bool {
        self.claim.owns_link(link)
    }

    /// How many objects the kernel has refused and not taken since.
    pub fn refused(&self) -> usize {
        self.off.keys.len()
    }

    /// Whether so few are refused that the host does its work.
    pub fn refused_few(&self) -> bool {
        let routes = self.desired.as_ref().map_or(0, |desired| desired.routes.len());
        self.off.keys.len() * 4 < routes
    }

    /// From now on for another lease of ours; the next pass must be a full one.
    pub fn set_lease(&mut self, lease: Lease) {
        let node = Node { lease, ..self.planner.node().clone() };
        self.set_node(node);
    }

    /// From now on leaves what the kernel holds of peers as it is, and only adds to it;
    /// or no longer does. What a host remembers may be older than what its kernel holds.
    pub fn trust_kernel(&mut self, trusting: bool) {
        self.trusting = trusting;
    }

    fn set_node(&mut self, node: Node) {
        self.planner.set_node(node);
        self.desired = None;
        self.known = false;
    }

    /// Waits until somebody else has changed something. Safe to drop at any moment.
    pub async fn changed(&mut self) -> Changes {
        self.network.changed().await
    }

    /// Compares everything and repairs both ways; plans anew if `replan` or if the node has changed.
    ///
    /// # Errors
    /// The kernel could not be read, or broke off; the next pass must be a full one.
    pub async fn full(&mut self, view: &LeaseView, replan: bool) -> Result<Outcome, HostError> {
        self.known = false;
        let mut observed = self.observe(replan).await?;
        // Before anything is wanted otherwise: what differs now is somebody else's doing.
        self.tug_at(&observed.state);
        let mut lost = self.follow(&observed.facts);
        if self.claim.underlay != Some(self.underlay().link) {
            // Only now does the kernel tell of what happens to the other interface.
            self.claim.underlay = Some(self.underlay().link);
            observed = self.observe(replan).await?;
            lost = self.follow(&observed.facts);
        }
        let Observed { state, facts } = observed;

        let mut planned = None;
        let mut desired = match self.desired.take().filter(|_| !replan) {
            Some(desired) => desired,
            None => {
                let plan = self.planner.plan(view);
                planned = Some(Planned { skipped: plan.skipped, planned: None });
                plan.desired
            }
        };
        if self.trusting {
            let HostState { neighbours, fdb, nexthops, routes, .. } = state.clone();
            desired.neighbours.extend(neighbours);
            desired.fdb.extend(fdb);
            desired.nexthops.extend(nexthops);
            desired.routes.extend(routes);
        }
        let strays = strays(self.planner.node(), &facts.routes, &desired);
        self.off = Off::default();
        let brought = self.bring(&desired, &state).await;
        // What was planned and not told yet is planned anew if this breaks off.
        self.desired = Some(desired).filter(|_| brought.is_ok() || planned.is_none());
        let Outcome { report, first, .. } = brought?;
        self.known = true;
        if report.in_sync() {
            // What a former network left here is gone; from now on it may be somebody else's.
            self.claim.networks = self.planner.node().networks().collect();
        }
        let seen = Some(Seen { strays, interfaces: facts.interfaces, lost });
        Ok(Outcome { report, first, planned, seen, after: None })
    }

    /// Reads the kernel, for a pass that is to plan anew or not; if it cannot, that is left to the next one.
    async fn observe(&mut self, replan: bool) -> Result<Observed, HostError> {
        let can_reach: Option<IpAddr> = self.selection.can_reach;
        let observed = self.network.observe(&self.claim, can_reach).await;
        if replan && observed.is_err() {
            self.desired = None;
        }
        observed
    }

    /// Stands where the interface between the hosts now is; why not, if that cannot be.
    fn follow(&mut self, facts: &Facts) -> Option<String> {
        if self.planner.set_able(facts.nexthop_objects) {
            self.desired = None;
        }
        let node = node_of(&self.planner);
        let chosen = underlay::follow(facts, &self.selection, &node.underlay);
        let chosen = chosen.map_err(|error| error.to_string());
        let chosen = chosen.and_then(|chosen| self.unhurried(facts, &node.underlay, chosen));
        let (underlay, lost) = match chosen {
            Ok(underlay) => match self.planner.backend().check(&underlay) {
                Ok(()) => (underlay, None),
                Err(why) => (node.underlay.clone(), Some(why)),
            },
            // The kernel stays as it is: the interface may come back as it was.
            Err(why) => (node.underlay.clone(), Some(why)),
        };
        let looks = self.planner.backend().looks_at_routes();
        let routes = if looks { facts.routes.clone() } else { node.underlay.routes.clone() };
        let underlay = Underlay { routes, ..underlay };
        if underlay != node.underlay {
            // A new carrier is a new bargain over what its tunnel carries.
            let mtu = node.mtu.filter(|_| underlay.mtu == node.underlay.mtu);
            self.set_node(Node { underlay, mtu, ..node });
        }
        lost
    }

    /// Moves to an address that stands alone only once it has been the only one for a while.
    fn unhurried(&mut self, facts: &Facts, stood: &Underlay, chosen: Underlay) -> Result<Underlay, String> {
        if chosen.address == stood.address || !underlay::is_alone(facts, chosen.address) {
            self.alone_since = None;
            return Ok(chosen);
        }
        let since = *self.alone_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= ALONE {
            return Ok(chosen);
        }
        Err(format!("{} has lost {}; {} is left", chosen.link, stood.address, chosen.address))
    }

    /// Tells what somebody has done to our device, and gives in where they keep
    /// setting its MAC or its MTU to another one.
    fn tug_at(&mut self, state: &HostState) {
        let Some(wanted) = self.desired.as_ref().map(|desired| desired.links.clone()) else { return };
        for (name, should) in wanted {
            let Some(is) = state.links.get(&name).filter(|is| is.can_become(&should)) else { continue };
            let node = node_of(&self.planner);
            if self.tug.lost_mac(is.mac, should.mac, Instant::now()) {
                error!(
                    device = %name, theirs = %is.mac, ours = %should.mac,
                    "somebody keeps changing the MAC of our device; publishing theirs instead (look for a udev or \
                     systemd-networkd rule, like MACAddressPolicy=persistent)"
                );
                let attrs = self.planner.backend().attributes(&node.underlay, state, is.mac);
                self.set_node(Node { lease: Lease { attrs, ..node.lease.clone() }, ..node });
            } else if self.tug.lost_mtu(is.mtu, should.mtu, Instant::now()) {
                error!(
                    device = %name, theirs = is.mtu, ours = should.mtu,
                    "somebody keeps changing the MTU of our device; publishing theirs in the subnet file instead (look \
                     for a script, or a setting of NetworkManager or systemd-networkd; `Backend.MTU` sets it for all)"
                );
                self.set_node(Node { mtu: Some(is.mtu), ..node });
            } else if is != &should {
                info!(device = %name, found = is.differences(&should), "our device was changed; setting it right");
            }
        }
    }

    /// Brings one change into the kernel; `None` if only a full pass can tell what to do.
    ///
    /// # Errors
    /// The kernel broke off; the next pass must be a full one.
    pub async fn patch(&mut self, change: &Change, view: &LeaseView) -> Result<Option<Outcome>, HostError> {
        let Some(patch) = self.planner.replan(change, view) else {
            self.desired = None;
            return Ok(None);
        };
        let Some(desired) = self.desired.as_mut() else { return Ok(None) };
        let mut is = HostState::default();
        for key in patch.before.iter().chain(&patch.after).map(Object::key) {
            let source = if self.off.keys.contains(&key) { &self.off.is } else { &*desired };
            is.set(&key, source.get(&key));
        }
        patch.before.iter().for_each(|object| desired.remove(&object.key()));
        patch.after.iter().for_each(|object| desired.put(object.clone()));
        if !self.known {
            return Ok(None);
        }
        let keys: Vec<Key> = patch.before.iter().chain(&patch.after).map(Object::key).collect();
        let should: HostState = patch.after.into_iter().collect();
        // What was refused may be no longer wanted.
        for key in keys.iter().filter(|key| should.get(key) == is.get(key)) {
            self.off.remove(key);
        }
        let planned = Some(Planned { skipped: patch.skipped, planned: Some(patch.planned) });
        Ok(Some(Outcome { planned, ..self.bring(&should, &is).await? }))
    }

    /// Puts right what somebody else has changed; `None` if only a full pass can tell what to do.
    ///
    /// # Errors
    /// The kernel broke off; the next pass must be a full one.
    pub async fn repair(
        &mut self,
        objects: impl IntoIterator<Item = (Key, Option<Object>)>,
    ) -> Result<Option<Outcome>, HostError> {
        let Some(desired) = self.desired.as_ref().filter(|_| self.known) else { return Ok(None) };
        let mut touched = BTreeSet::new();
        for (key, is) in objects {
            if let (Key::Nexthop(id), None) = (key, &is) {
                // Routes that led through it lead elsewhere now, or are gone, and of those nobody tells.
                let gateway = id.gateway();
                let bits = |bits| IpNetwork::new(gateway, bits).map(RouteKey::to);
                if let (Ok(from), Ok(to)) = (bits(0), bits(32)) {
                    for (key, _) in
                        desired.routes.range(from..=to).filter(|(_, route)| route.nexthop == Some(id))
                    {
                        self.off.insert(Key::Route(*key), None);
                        touched.insert(Key::Route(*key));
                    }
                }
            }
            if desired.get(&key) == is {
                self.off.remove(&key);
            } else {
                self.off.insert(key, is);
                touched.insert(key);
            }
        }
        self.settle(touched).await.map(Some)
    }

    /// Tries once more what the kernel has refused.
    ///
    /// # Errors
    /// The kernel broke off; the next pass must be a full one.
    pub async fn retry(&mut self) -> Result<Outcome, HostError> {
        self.settle(self.off.keys.clone()).await
    }

    /// Brings the objects that are off and have these keys to what they should be.
    async fn settle(&mut self, keys: BTreeSet<Key>) -> Result<Outcome, HostError> {
        let Some(desired) = &self.desired else { return Ok(Outcome::default()) };
        let (mut should, mut is) = (HostState::default(), HostState::default());
        for key in &keys {
            should.set(key, desired.get(key));
            is.set(key, self.off.is.get(key));
            if should.get(key) == is.get(key) {
                self.off.remove(key);
            }
        }
        self.bring(&should, &is).await
    }

    /// Takes the steps between two states or parts of them. Afterwards what was
    /// refused is off as it was before, and the rest is not.
    async fn bring(&mut self, should: &HostState, is: &HostState) -> Result<Outcome, HostError> {
        let mut outcome = Outcome::default();
        let difference = Difference::new(should, is);
        let mut steps = difference.steps();
        loop {
            let portion: Vec<Step> = steps.by_ref().take(PORTION).collect();
            if portion.is_empty() {
                return Ok(outcome);
            }
            tell_replaced(&portion, is);
            let failures = self.network.apply(portion.clone()).await;
            let failures = failures.inspect_err(|_| self.known = false)?;
            let mut refused = failures.iter().map(|failure| &failure.step).peekable();
            for step in &portion {
                let key = step.key();
                // Failures come in the order of the steps.
                if refused.next_if(|refused| *refused == step).is_some() {
                    self.off.insert(key, difference.left(&key));
                } else {
                    self.off.remove(&key);
                    outcome.report.applied += 1;
                }
            }
            outcome.first = outcome.first.or_else(|| portion.into_iter().next());
            outcome.report.failures.extend(failures);
        }
    }
}

fn node_of(planner: &Planner) -> Node {
    planner.node().clone()
}

fn strays(node: &Node, routes: &[RouteFact], desired: &HostState) -> Vec<RouteFact> {
    let is_stray = |route: &&RouteFact| {
        route.gateway.is_some()
            && node.networks().any(|network| within(network, route.destination))
            && !desired.routes.contains_key(&RouteKey::to(route.destination))
    };
    routes.iter().filter(is_stray).copied().collect()
}

/// A device that bears our name and has to go is worth a word: somebody made it.
fn tell_replaced(steps: &[Step], observed: &HostState) {
    for step in steps {
        if let Step::RemoveLink(name) = step
            && let Some(was) = observed.links.get(name)
        {
            warn!(device = %name, %was, "this device has our name but is not as it should be; making it anew");
        }
    }
}
