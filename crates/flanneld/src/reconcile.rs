//! Brings the kernel in step: observe, diff, apply, report.
//!
//! The whole is compared at the start, after a snapshot and at each audit. In
//! between, one peer's change takes the short way: its part of the plan against
//! what we know of the kernel, which each full pass reads anew.

use flannel_core::backend::Node;
use flannel_core::claim::{Claim, within};
use flannel_core::diff::{self, Step};
use flannel_core::host::{HostError, Network, Report};
use flannel_core::lease::{Lease, Subnet};
use flannel_core::plan::{Planner, Skipped};
use flannel_core::state::{HostState, LinkName, RouteKey};
use flannel_core::underlay::{Interface, RouteFact, Underlay};
use flannel_core::view::{Change, LeaseView};
use tracing::{debug, warn};

/// What a pass came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What was done.
    pub report: Report,
    /// The first of the steps that the kernel took in a full pass.
    pub first: Option<Step>,
    /// Peers that are left out.
    pub skipped: Vec<Skipped>,
    /// Peers that are not; `None` for every other one.
    pub planned: Option<Vec<Subnet>>,
    /// Routes into the network by way of some host that are neither ours nor
    /// to a lease. A Go flanneld in host-gw mode leaves such; so may anybody.
    pub strays: Vec<RouteFact>,
    /// The interfaces of the host and their addresses.
    pub interfaces: Vec<Interface>,
}

/// Keeps one host's kernel in step with a plan.
pub struct Reconciler<N> {
    network: N,
    planner: Planner,
    claim: Claim,
    /// The kernel as we last saw and changed it; `None` if we cannot know.
    known: Option<HostState>,
}

impl<N: Network> Reconciler<N> {
    /// A reconciler that knows nothing of the kernel yet.
    pub fn new(network: N, planner: Planner, claim: Claim) -> Self {
        Self { network, planner, claim, known: None }
    }

    /// In bytes, of a packet from container to container.
    pub fn mtu(&self) -> u32 {
        self.planner.backend().mtu(&self.planner.node().underlay)
    }

    /// Whether a device is ours.
    pub fn owns(&self, link: LinkName) -> bool {
        self.claim.owns_link(link)
    }

    /// From now on for another lease of ours; the next pass must be a full one.
    pub fn set_lease(&mut self, lease: Lease) {
        let node = Node { lease, ..self.planner.node().clone() };
        self.planner.set_node(node);
        self.known = None;
    }

    /// Compares everything and repairs both ways.
    ///
    /// # Errors
    /// The kernel could not be read, or broke off; the next pass must be a full one.
    pub async fn full(&mut self, view: &LeaseView) -> Result<Outcome, HostError> {
        self.known = None;
        let facts = self.network.facts(None).await?;
        let node = self.planner.node();
        if node.underlay.routes != facts.routes {
            let underlay = Underlay { routes: facts.routes, ..node.underlay.clone() };
            self.planner.set_node(Node { underlay, ..node.clone() });
        }
        let observed = self.network.observe(&self.claim).await?;
        let plan = self.planner.plan(view);
        let steps = diff::diff(&plan.desired, &observed);
        tell_replaced(&steps, &observed);
        let networks = &self.planner.node().networks;
        let is_stray = |route: &&RouteFact| {
            route.gateway.is_some()
                && networks.iter().any(|network| within(*network, route.destination))
                && !plan.desired.routes.contains_key(&RouteKey::to(route.destination))
        };
        let strays = self.planner.node().underlay.routes.iter().filter(is_stray).copied().collect();
        let first = steps.first().cloned();
        let report = self.apply(observed, steps).await?;
        if report.in_sync() {
            // What a former network left here is gone; from now on it may be somebody else's.
            self.claim.networks.clone_from(&self.planner.node().networks);
        }
        let interfaces = facts.interfaces;
        Ok(Outcome { report, first, skipped: plan.skipped, planned: None, strays, interfaces })
    }

    /// Brings one change into the kernel; `None` if only a full pass can tell what to do.
    ///
    /// # Errors
    /// The kernel broke off; the next pass must be a full one.
    pub async fn patch(&mut self, change: &Change, view: &LeaseView) -> Result<Option<Outcome>, HostError> {
        let patch = self.planner.replan(change, view);
        let Some(known) = self.known.take() else { return Ok(None) };
        let part = known.select(&patch.before, &patch.after);
        let steps = diff::diff(&patch.after, &part);
        let report = self.apply(known, steps).await?;
        let planned = Some(patch.planned);
        Ok(Some(Outcome { report, skipped: patch.skipped, planned, ..Outcome::default() }))
    }

    /// Takes the steps; afterwards `known` is `before` and what the kernel took of them.
    async fn apply(&mut self, before: HostState, steps: Vec<Step>) -> Result<Report, HostError> {
        for step in &steps {
            debug!(%step, "applying");
        }
        let failures = if steps.is_empty() { vec![] } else { self.network.apply(steps.clone()).await? };
        let mut known = before;
        let mut refused = failures.iter().map(|failure| &failure.step).peekable();
        let mut applied = 0;
        for step in &steps {
            // Failures come in the order of the steps.
            if refused.next_if(|refused| *refused == step).is_none() {
                diff::take(&mut known, step);
                applied += 1;
            }
        }
        self.known = Some(known);
        Ok(Report { applied, failures })
    }
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
