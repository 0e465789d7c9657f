//! What the kernel holds for us, read and changed.
//!
//! A pass is plain blocking code on the netlink thread; the async side only
//! waits for it. A pass that nobody waits for any more is still carried through.

use std::mem;
use std::net::IpAddr;

use flannel_core::claim::Claim;
use flannel_core::diff::Step;
use flannel_core::host::{Failure, HostError, Network};
use flannel_core::state::{HostState, Link, LinkKind, LinkName, ROUTE_PROTOCOL, Vxlan};
use flannel_core::underlay::Facts;
use nix::errno::Errno;
use rtnetlink::packet_route::AddressFamily;
use tracing::debug;

use crate::names::Names;
use crate::netlink::route::Filter;
use crate::netlink::socket::{BATCH, Kernel, KernelThread, NetlinkError, Refusal, Request};
use crate::netlink::{address, fdb, link, neighbour, route};
use crate::{interfaces, sysctl};

/// The links, addresses, neighbours, forwarding entries and routes of the
/// network namespace it was made in.
pub struct LinuxNetwork {
    thread: KernelThread,
}

impl LinuxNetwork {
    /// Opens the way to the kernel, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`HostError::Broken`] if there is no netlink socket or no thread to be had.
    pub fn new() -> Result<Self, HostError> {
        Ok(Self { thread: KernelThread::start()? })
    }
}

impl Network for LinuxNetwork {
    async fn facts(&mut self, can_reach: Option<IpAddr>) -> Result<Facts, HostError> {
        let job = move |kernel: &mut Kernel| interfaces::facts(kernel, can_reach);
        self.thread.run("cannot read the interfaces and routes", job).await
    }

    async fn observe(&mut self, claim: &Claim) -> Result<HostState, HostError> {
        let claim = claim.clone();
        let job = move |kernel: &mut Kernel| observe(kernel, &claim);
        self.thread.run("cannot read what the kernel holds", job).await
    }

    async fn apply(&mut self, steps: Vec<Step>) -> Result<Vec<Failure>, HostError> {
        let job = move |kernel: &mut Kernel| Pass::new(kernel).apply(steps);
        self.thread.run("cannot change what the kernel holds", job).await
    }
}

const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

fn observe(kernel: &mut Kernel, claim: &Claim) -> Result<HostState, NetlinkError> {
    let mut names = Names::default();
    let mut state = HostState::default();
    for name in &claim.links {
        match observe_link(kernel, &mut names, claim, *name, &mut state) {
            // It went while we looked, and all that stood on it.
            Err(NetlinkError::Refused(Refusal { errno: Errno::ENODEV, .. })) => state.drop_link(*name),
            outcome => outcome?,
        }
    }
    let marked = Filter { link: None, protocol: Some(ROUTE_PROTOCOL) };
    observe_routes(kernel, &mut names, claim, marked, &mut state)?;
    claim.filter(&mut state);
    Ok(state)
}

fn observe_link(
    kernel: &mut Kernel,
    names: &mut Names,
    claim: &Claim,
    name: LinkName,
    state: &mut HostState,
) -> Result<(), NetlinkError> {
    let Some(seen) = link::by_name(kernel, name)? else {
        return Ok(());
    };
    names.learn(&seen);
    let index = seen.index;
    let lower = match seen.lower() {
        Some(lower) => names.name(kernel, lower)?,
        None => None,
    };
    state.links.insert(name, seen.into_link(lower));

    for family in FAMILIES {
        let addresses = address::list(kernel, family, Some(index))?;
        state.addresses.extend(addresses.into_iter().map(|(_, own)| (name, own.network)));
    }
    let neighbours = neighbour::list(kernel, index)?;
    state.neighbours.extend(neighbours.into_iter().map(|(ip, mac)| ((name, ip), mac)));
    let entries = fdb::list(kernel, index)?;
    state.fdb.extend(entries.into_iter().map(|(mac, remote)| ((name, mac), remote)));
    observe_routes(kernel, names, claim, Filter { link: Some(index), protocol: None }, state)
}

fn observe_routes(
    kernel: &mut Kernel,
    names: &mut Names,
    claim: &Claim,
    filter: Filter,
    state: &mut HostState,
) -> Result<(), NetlinkError> {
    for family in FAMILIES {
        for seen in route::list(kernel, family, filter)? {
            let Some(link) = seen.link else {
                continue;
            };
            let Some(name) = names.name(kernel, link)? else {
                continue;
            };
            // Appended routes share a key. A foreign one must not hide ours from
            // the claim, and of ours the first is the one in force.
            let route = seen.on(name);
            if claim.owns_route(&seen.key, &route) {
                state.routes.entry(seen.key).or_insert(route);
            }
        }
    }
    Ok(())
}

/// One pass over a list of steps.
///
/// Steps on objects are collected and go to the kernel many at a time; a step
/// on a device waits for those before it and goes alone, because what comes
/// after needs the device's new index.
struct Pass<'a> {
    kernel: &'a mut Kernel,
    names: Names,
    waiting: Vec<(usize, Step)>,
    requests: Vec<Request>,
    failures: Vec<(usize, Failure)>,
}

impl<'a> Pass<'a> {
    fn new(kernel: &'a mut Kernel) -> Self {
        Self { kernel, names: Names::default(), waiting: vec![], requests: vec![], failures: vec![] }
    }

    fn apply(mut self, steps: Vec<Step>) -> Result<Vec<Failure>, NetlinkError> {
        for (number, step) in steps.into_iter().enumerate() {
            let refused = match &step {
                Step::AddLink(name, link) => {
                    self.flush()?;
                    self.add_link(*name, link)?
                }
                Step::ChangeLink(name, link) => {
                    self.flush()?;
                    self.change_link(*name, link)?
                }
                Step::RemoveLink(name) => {
                    self.flush()?;
                    self.remove_link(*name)?
                }
                _ => match self.request(&step)? {
                    Ok(request) => {
                        self.requests.push(request);
                        self.waiting.push((number, step));
                        if self.requests.len() == BATCH {
                            self.flush()?;
                        }
                        continue;
                    }
                    Err(refused) => refused,
                },
            };
            self.note(number, step, refused);
        }
        self.flush()?;
        self.failures.sort_by_key(|(number, _)| *number);
        Ok(self.failures.into_iter().map(|(_, failure)| failure).collect())
    }

    /// The message for a step on an object, or why there can be none; nothing
    /// to remove from a device that is gone is no reason.
    fn request(&mut self, step: &Step) -> Result<Result<Request, Option<String>>, NetlinkError> {
        let link = match step {
            Step::RemoveRoute(_, route) | Step::PutRoute(_, route) => route.link,
            Step::RemoveNeighbour(link, _)
            | Step::RemoveFdb(link, _)
            | Step::RemoveAddress(link, _)
            | Step::AddAddress(link, _)
            | Step::PutFdb(link, ..)
            | Step::PutNeighbour(link, ..)
            | Step::AddLink(link, _)
            | Step::ChangeLink(link, _)
            | Step::RemoveLink(link) => *link,
        };
        let Some(index) = self.names.index(self.kernel, link)? else {
            return Ok(Err((!is_removal(step)).then(|| no_device(link))));
        };
        Ok(Ok(match step {
            Step::RemoveRoute(key, route) => route::remove(key, route, index),
            Step::PutRoute(key, route) => route::put(key, route, index),
            Step::RemoveNeighbour(_, ip) => neighbour::remove(index, *ip),
            Step::PutNeighbour(_, ip, mac) => neighbour::put(index, *ip, *mac),
            Step::RemoveFdb(_, mac) => fdb::remove(index, *mac),
            Step::PutFdb(_, mac, remote) => fdb::put(index, *mac, *remote),
            Step::RemoveAddress(_, network) => address::remove(index, *network),
            Step::AddAddress(_, network) => address::add(index, *network),
            // Steps on devices do not come here.
            Step::AddLink(..) | Step::ChangeLink(..) | Step::RemoveLink(_) => link::remove(index),
        }))
    }

    /// Sends what waits.
    fn flush(&mut self) -> Result<(), NetlinkError> {
        let outcomes = self.kernel.change(mem::take(&mut self.requests))?;
        for ((number, step), outcome) in mem::take(&mut self.waiting).into_iter().zip(outcomes) {
            let refused = match outcome {
                Err(refusal) if !is_as_wished(&step, refusal.errno) => {
                    Some(refusal.reason(hint(&step, refusal.errno)))
                }
                _ => None,
            };
            self.note(number, step, refused);
        }
        Ok(())
    }

    fn note(&mut self, number: usize, step: Step, refused: Option<String>) {
        match refused {
            Some(reason) => {
                debug!(%step, reason, "refused");
                self.failures.push((number, Failure { step, reason }));
            }
            None => debug!(%step, "applied"),
        }
    }

    fn add_link(&mut self, name: LinkName, link: &Link) -> Result<Option<String>, NetlinkError> {
        let vxlan = match &link.kind {
            LinkKind::Vxlan(vxlan) => vxlan,
            LinkKind::Other(words) => return Ok(Some(format!("no way to make a {words}"))),
        };
        let lower = match vxlan.lower {
            Some(lower) => match self.names.index(self.kernel, lower)? {
                Some(index) => Some(index),
                None => return Ok(Some(no_device(lower))),
            },
            None => None,
        };
        self.names.forget(name);
        if let Err(refusal) = self.kernel.change_one(link::add(name, link, vxlan, lower))? {
            let hint = match refusal.errno {
                Errno::EEXIST => self.who_is_there(name, vxlan)?,
                _ => None,
            };
            return Ok(Some(refusal.reason(hint)));
        }
        if let Err(error) = sysctl::refuse_router_advertisements(name) {
            debug!(link = %name, %error, "cannot set accept_ra");
        }
        if !link.up {
            return Ok(None);
        }
        let Some(index) = self.names.index(self.kernel, name)? else {
            return Ok(Some(no_device(name)));
        };
        Ok(words_of(self.kernel.change_one(link::set_up(index, true))?))
    }

    /// What stands in the way of a new device.
    fn who_is_there(&mut self, name: LinkName, vxlan: &Vxlan) -> Result<Option<String>, NetlinkError> {
        if self.names.index(self.kernel, name)?.is_some() {
            return Ok(Some(format!("there is a device {name} already")));
        }
        let Vxlan { vni, port, .. } = vxlan;
        let twin = link::twin(self.kernel, vxlan)?;
        Ok(twin.map(|twin| {
            format!("{twin} holds VNI {vni} on port {port} already; remove it or choose another VNI")
        }))
    }

    fn change_link(&mut self, name: LinkName, should: &Link) -> Result<Option<String>, NetlinkError> {
        let Some(is) = link::by_name(self.kernel, name)? else {
            return Ok(Some(no_device(name)));
        };
        let outcomes = self.kernel.change(link::change(&is, should))?;
        Ok(outcomes.into_iter().find_map(words_of))
    }

    fn remove_link(&mut self, name: LinkName) -> Result<Option<String>, NetlinkError> {
        let Some(index) = self.names.index(self.kernel, name)? else {
            return Ok(None);
        };
        self.names.forget(name);
        match self.kernel.change_one(link::remove(index))? {
            Err(Refusal { errno: Errno::ENODEV, .. }) => Ok(None),
            outcome => Ok(words_of(outcome)),
        }
    }
}

fn words_of(outcome: Result<(), Refusal>) -> Option<String> {
    outcome.err().map(|refusal| refusal.reason(None))
}

fn no_device(link: LinkName) -> String {
    format!("{} ({link} is not there)", Errno::ENODEV.desc())
}

fn is_removal(step: &Step) -> bool {
    matches!(
        step,
        Step::RemoveRoute(..)
            | Step::RemoveNeighbour(..)
            | Step::RemoveFdb(..)
            | Step::RemoveAddress(..)
            | Step::RemoveLink(_)
    )
}

/// Whether a refusal says that the kernel is as the step would have it.
fn is_as_wished(step: &Step, errno: Errno) -> bool {
    match step {
        Step::AddAddress(..) => errno == Errno::EEXIST,
        _ if is_removal(step) => {
            matches!(errno, Errno::ESRCH | Errno::ENOENT | Errno::ENODEV | Errno::EADDRNOTAVAIL)
        }
        _ => false,
    }
}

/// What a refusal may mean, where the kernel's own words are less plain.
fn hint(step: &Step, errno: Errno) -> Option<String> {
    match (step, errno) {
        (Step::PutRoute(_, route), Errno::ENETUNREACH | Errno::EHOSTUNREACH) => {
            route.gateway.map(|gateway| format!("{gateway} is not on a network of {}", route.link))
        }
        (Step::PutRoute(_, route), Errno::ENETDOWN) => Some(format!("{} is down", route.link)),
        (Step::PutNeighbour(..), Errno::ENOBUFS) => {
            Some("the neighbour table is full; net.ipv4.neigh.default.gc_thresh3 limits it".into())
        }
        (Step::PutFdb(link, _, remote), Errno::EAFNOSUPPORT) => {
            Some(format!("{link} does not send to addresses like {remote}"))
        }
        (
            Step::PutNeighbour(link, ..) | Step::PutFdb(link, ..) | Step::AddAddress(link, _),
            Errno::ENODEV,
        ) => Some(format!("{link} is not there any more")),
        _ => None,
    }
}
