//! What the kernel holds for us, read and changed.
//!
//! A pass is plain blocking code on the netlink thread; the async side only
//! waits for it. A pass that nobody waits for any more is still carried through.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::net::IpAddr;

use flannel_core::claim::{Claim, within};
use flannel_core::diff::Step;
use flannel_core::host::{Changes, Failure, HostError, Network, Observed};
use flannel_core::state::{
    HostState, Link, LinkKind, LinkName, Nexthop, NexthopId, Object, Route, RouteKey, Vxlan,
};
use flannel_core::underlay::Facts;
use nix::errno::Errno;
use rtnetlink::packet_route::AddressFamily;
use tracing::{debug, info};

use crate::names::Names;
use crate::netlink::link::SeenLink;
use crate::netlink::monitor::Changing;
use crate::netlink::route::SeenRoute;
use crate::netlink::socket::{BATCH, Kernel, KernelThread, NetlinkError, Refusal, Request};
use crate::netlink::{address, fdb, link, neighbour, nexthop, route};
use crate::{interfaces, sysctl};

/// Room for the kernel's word on some twenty thousand objects.
const ROOM: usize = 16 * 1024 * 1024;

/// The links, addresses, neighbours, forwarding entries, nexthop objects and
/// routes of the network namespace it was made in.
pub struct LinuxNetwork {
    thread: KernelThread,
}

impl LinuxNetwork {
    /// Opens the way to the kernel, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`HostError::Broken`] if there is no netlink socket or no thread to be had.
    pub fn new() -> Result<Self, HostError> {
        Self::with_room(ROOM)
    }

    /// The same, with so many bytes of room for what the kernel tells while nobody
    /// listens. One word of it takes about 800.
    ///
    /// # Errors
    /// As [`LinuxNetwork::new`].
    pub fn with_room(room: usize) -> Result<Self, HostError> {
        Ok(Self { thread: KernelThread::start(room)? })
    }
}

impl Network for LinuxNetwork {
    async fn observe(&mut self, claim: &Claim, can_reach: Option<IpAddr>) -> Result<Observed, HostError> {
        let claim = claim.clone();
        let job = move |kernel: &mut Kernel| observe(kernel, &claim, can_reach);
        self.thread.run("cannot read what the kernel holds", job).await
    }

    async fn apply(&mut self, steps: Vec<Step>) -> Result<Vec<Failure>, HostError> {
        let job = move |kernel: &mut Kernel| Pass::new(kernel).apply(steps);
        self.thread.run("cannot change what the kernel holds", job).await
    }

    async fn changed(&mut self) -> Changes {
        self.thread.listener.changed().await
    }
}

const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

fn observe(kernel: &mut Kernel, claim: &Claim, can_reach: Option<IpAddr>) -> Result<Observed, NetlinkError> {
    kernel.monitor.start_anew(claim);
    let links = link::all(kernel)?;
    kernel.monitor.know(links.iter().cloned());

    let mut objects = Vec::new();
    let mut nexthop_objects = match links.iter().any(|seen| claim.owns_link(seen.name)) {
        true => true,
        false => nexthop::exist(kernel)?,
    };
    for seen in links.iter().filter(|seen| claim.owns_link(seen.name)) {
        let from = objects.len();
        match observe_link(kernel, &links, seen, &mut objects) {
            Ok(able) => nexthop_objects &= able,
            // It went while we looked, and all that stood on it.
            Err(NetlinkError::Refused(Refusal { errno: Errno::ENODEV, .. })) => objects.truncate(from),
            Err(error) => return Err(error),
        }
    }
    let mut routes = Vec::new();
    for family in FAMILIES {
        routes.extend(route::list(kernel, family)?);
    }
    let facts = interfaces::facts(kernel, &links, &routes, can_reach)?;
    let mut state: HostState = objects.into_iter().filter(|object| claim.owns(object)).collect();
    state.routes = own_routes(&routes, &links, claim, &state).into_iter().collect();
    let blackholes =
        routes.iter().filter(|seen| seen.blackhole && claim.owns_blackhole(&seen.key, seen.protocol));
    state.blackholes = blackholes.map(|seen| seen.key).collect();
    // What happens to a device happens to the routes by it, of which the kernel does not always tell.
    kernel.monitor.use_only(state.routes.values().map(|route| route.link).collect());
    kernel.monitor.know(links);
    Ok(Observed { state, facts: Facts { nexthop_objects, ..facts } })
}

/// A device of ours and what stands on it; whether there are nexthop objects at all.
fn observe_link(
    kernel: &mut Kernel,
    links: &[SeenLink],
    seen: &SeenLink,
    objects: &mut Vec<Object>,
) -> Result<bool, NetlinkError> {
    let (name, index) = (seen.name, seen.index);
    let lower = seen.lower().and_then(|lower| links.iter().find(|link| link.index == lower));
    let link = seen.clone().into_link(lower.map(|link| link.name));
    objects.push(Object::Link(name, Box::new(link)));

    for family in FAMILIES {
        let addresses = address::list(kernel, family, Some(index))?;
        objects.extend(addresses.into_iter().map(|(_, own)| Object::Address(name, own.network)));
    }
    let neighbours = neighbour::list(kernel, index)?;
    objects.extend(neighbours.into_iter().map(|(ip, mac)| Object::Neighbour(name, ip, mac)));
    let entries = fdb::list(kernel, index)?;
    objects.extend(entries.into_iter().map(|(mac, remote)| Object::Fdb(name, mac, remote)));
    let nexthops = nexthop::list(kernel, index)?;
    let able = nexthops.is_some();
    let nexthops = nexthops.into_iter().flatten();
    objects.extend(nexthops.map(|seen| Object::Nexthop(seen.id, seen.on(name))));
    Ok(able)
}

/// The routes that are ours, of which `state` holds the nexthop objects. Several
/// can have one key, and the first is in force: ours behind another counts as
/// one with something to it that we never set.
fn own_routes(
    routes: &[SeenRoute],
    links: &[SeenLink],
    claim: &Claim,
    state: &HostState,
) -> Vec<(RouteKey, Route)> {
    let names: HashMap<u32, LinkName> = links.iter().map(|link| (link.index, link.name)).collect();
    let mut own: Vec<(RouteKey, Route)> = Vec::new();
    let mut foreign = HashSet::new();
    for seen in routes {
        let key = seen.key;
        let through = seen.only_nexthop().and_then(|id: NexthopId| state.nexthops.get(&id));
        let name = seen.link.and_then(|index| names.get(&index));
        let route = match (name, through) {
            (Some(name), _) => Some(seen.on(*name)),
            (None, Some(nexthop)) => Some(seen.through(nexthop)),
            (None, None) => None,
        };
        match route.filter(|route| seen.unicast && claim.owns_route(&key, route)) {
            Some(route) => {
                let decorated = route.decorated || foreign.contains(&key);
                // What shares a key stands together.
                match own.last_mut().filter(|(last, _)| *last == key) {
                    Some((_, first)) => first.decorated = true,
                    None => own.push((key, Route { decorated, ..route })),
                }
            }
            None if claim.networks.iter().any(|network| within(*network, key.destination)) => {
                foreign.insert(key);
            }
            None => {}
        }
    }
    own
}

/// One pass over a list of steps.
///
/// Steps on objects are collected and go to the kernel many at a time; a step
/// on a device waits for those before it and goes alone, because what comes
/// after needs the device's new index.
struct Pass<'a> {
    kernel: &'a mut Kernel,
    names: Names,
    /// Devices that routes were put on.
    used: HashSet<LinkName>,
    waiting: Vec<(usize, Step)>,
    requests: Vec<Request>,
    failures: Vec<(usize, Failure)>,
}

impl<'a> Pass<'a> {
    fn new(kernel: &'a mut Kernel) -> Self {
        Self {
            kernel,
            names: Names::default(),
            used: HashSet::new(),
            waiting: vec![],
            requests: vec![],
            failures: vec![],
        }
    }

    fn apply(mut self, steps: Vec<Step>) -> Result<Vec<Failure>, NetlinkError> {
        // So that what it knows of devices is true.
        self.kernel.monitor.hear();
        for (number, step) in steps.into_iter().enumerate() {
            let refused = match &step {
                Step::AddLink(name, _) | Step::ChangeLink(name, _) | Step::RemoveLink(name) => {
                    self.flush()?;
                    self.change_device(*name, &step)?
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
        for name in mem::take(&mut self.used) {
            if self.kernel.monitor.start_to_use(name) {
                let seen = link::by_name(self.kernel, name)?;
                self.kernel.monitor.know_one(name, seen);
            }
        }
        self.failures.sort_by_key(|(number, _)| *number);
        Ok(self.failures.into_iter().map(|(_, failure)| failure).collect())
    }

    /// Takes a step on a device, with an ear for what others do to it meanwhile.
    fn change_device(&mut self, name: LinkName, step: &Step) -> Result<Option<String>, NetlinkError> {
        let before = link::by_name(self.kernel, name)?;
        self.kernel.monitor.hear();
        let refused = self.link(step)?;
        let mac = match step {
            Step::AddLink(_, link) | Step::ChangeLink(_, link) => Some(link.mac),
            _ => None,
        };
        self.kernel.monitor.pass_over(Changing {
            name,
            down: mac.is_none(),
            neighbours: mac.is_none() || before.is_some_and(|before| Some(before.mac) != mac),
        });
        let stands = link::by_name(self.kernel, name)?;
        // Somebody else may have been at it in the same moment.
        if refused.is_none()
            && let Step::AddLink(_, link) | Step::ChangeLink(_, link) = step
            && !stands.as_ref().is_some_and(|seen| is_so(seen, link))
        {
            self.kernel.monitor.everything(&format!("{name} was changed"));
        }
        self.kernel.monitor.know_one(name, stands);
        Ok(refused)
    }

    /// Takes a step on a device.
    fn link(&mut self, step: &Step) -> Result<Option<String>, NetlinkError> {
        match step {
            Step::AddLink(name, link) => self.add_link(*name, link),
            Step::ChangeLink(name, link) => self.change_link(*name, link),
            Step::RemoveLink(name) => self.remove_link(*name),
            _ => Ok(None),
        }
    }

    /// The message for a step on an object, or why there can be none; nothing
    /// to remove from a device that is gone is no reason.
    fn request(&mut self, step: &Step) -> Result<Result<Request, Option<String>>, NetlinkError> {
        let link = match step {
            Step::RemoveNexthop(id) => return Ok(Ok(nexthop::remove(*id))),
            Step::PutBlackhole(key) => return Ok(Ok(route::put_blackhole(key))),
            Step::RemoveBlackhole(key) => return Ok(Ok(route::remove_blackhole(key))),
            Step::RemoveRoute(_, route) | Step::PutRoute(_, route) => route.link,
            Step::PutNexthop(_, nexthop) => nexthop.link,
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
            Step::PutRoute(key, route) => {
                self.used.insert(route.link);
                route::put(key, route, index)
            }
            Step::PutNexthop(id, nexthop) => nexthop::put(*id, nexthop, index),
            Step::RemoveNexthop(id) => nexthop::remove(*id),
            Step::PutBlackhole(key) => route::put_blackhole(key),
            Step::RemoveBlackhole(key) => route::remove_blackhole(key),
            Step::RemoveNeighbour(_, ip) => {
                self.kernel.monitor.will_delete(index, *ip);
                neighbour::remove(index, *ip)
            }
            Step::PutNeighbour(_, ip, mac) => neighbour::put(index, *ip, *mac),
            Step::RemoveFdb(_, mac) => {
                self.kernel.monitor.will_write(index, *mac, None);
                fdb::remove(index, *mac)
            }
            Step::PutFdb(_, mac, remote) => {
                self.kernel.monitor.will_write(index, *mac, Some(*remote));
                fdb::put(index, *mac, *remote)
            }
            Step::RemoveAddress(_, network) => address::remove(index, *network),
            Step::AddAddress(_, network) => address::add(index, *network),
            // Steps on devices do not come here.
            Step::AddLink(..) | Step::ChangeLink(..) | Step::RemoveLink(_) => link::remove(index),
        }))
    }

    /// Sends what waits.
    fn flush(&mut self) -> Result<(), NetlinkError> {
        let outcomes = self.kernel.change(mem::take(&mut self.requests))?;
        self.kernel.monitor.wrote();
        for ((number, step), outcome) in mem::take(&mut self.waiting).into_iter().zip(outcomes) {
            let outcome = match (&step, outcome) {
                (Step::PutRoute(key, route), Err(Refusal { errno: Errno::EEXIST, .. })) => {
                    self.put_route_in_front(key, route)?
                }
                (Step::PutNexthop(id, nexthop), Err(Refusal { errno: Errno::EINVAL, .. })) => {
                    self.put_nexthop_anew(*id, nexthop)?
                }
                (_, outcome) => outcome,
            };
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

    /// Our very route stands already, behind another one with its key: it goes,
    /// and then takes the place of the other.
    fn put_route_in_front(
        &mut self,
        key: &RouteKey,
        route: &Route,
    ) -> Result<Result<(), Refusal>, NetlinkError> {
        let Some(index) = self.names.index(self.kernel, route.link)? else {
            return Ok(Err(Refusal { errno: Errno::ENODEV, words: None }));
        };
        let steps = vec![route::remove(key, route, index), route::put(key, route, index)];
        Ok(self.kernel.change(steps)?.pop().unwrap_or(Ok(())))
    }

    /// A group of objects has our number, and the kernel does not make an object of it.
    fn put_nexthop_anew(
        &mut self,
        id: NexthopId,
        nexthop: &Nexthop,
    ) -> Result<Result<(), Refusal>, NetlinkError> {
        let Some(index) = self.names.index(self.kernel, nexthop.link)? else {
            return Ok(Err(Refusal { errno: Errno::ENODEV, words: None }));
        };
        let steps = vec![nexthop::remove(id), nexthop::put(id, nexthop, index)];
        // The routes through it went with it, those of this pass too.
        self.kernel.monitor.everything(&format!("nexthop object {id} was a group"));
        Ok(self.kernel.change(steps)?.pop().unwrap_or(Ok(())))
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
            let twin = match refusal.errno {
                Errno::EEXIST if self.names.index(self.kernel, name)?.is_none() => {
                    link::twin(self.kernel, vxlan)?
                }
                _ => None,
            };
            return match twin {
                Some(twin) if twin.mac == link.mac => self.take_back(&twin, name, link),
                twin => Ok(Some(refusal.reason(twin.map(|twin| in_the_way(&twin, vxlan))))),
            };
        }
        refuse_router_advertisements(name);
        if !link.up {
            return Ok(None);
        }
        let Some(index) = self.names.index(self.kernel, name)? else {
            return Ok(Some(no_device(name)));
        };
        Ok(words_of(self.kernel.change_one(link::set_up(index, true))?))
    }

    /// Our device under another name: somebody has renamed it.
    fn take_back(
        &mut self,
        twin: &SeenLink,
        name: LinkName,
        link: &Link,
    ) -> Result<Option<String>, NetlinkError> {
        info!(device = %name, renamed = %twin.name, "our device has another name; giving it its own back");
        if self.kernel.change_one(link::rename(twin.index, name))?.is_err() {
            // Before Linux 6.2 a device must be down for it.
            let steps = vec![link::set_up(twin.index, false), link::rename(twin.index, name)];
            let outcomes = self.kernel.change(steps)?;
            if let Some(refused) = outcomes.into_iter().find_map(words_of) {
                return Ok(Some(refused));
            }
        }
        self.names.forget(name);
        self.change_link(name, link)
    }

    fn change_link(&mut self, name: LinkName, should: &Link) -> Result<Option<String>, NetlinkError> {
        let Some(is) = link::by_name(self.kernel, name)? else {
            return Ok(Some(no_device(name)));
        };
        let lower = match &should.kind {
            LinkKind::Vxlan(Vxlan { lower: Some(lower), .. }) => {
                match self.names.index(self.kernel, *lower)? {
                    Some(index) => Some(index),
                    None => return Ok(Some(no_device(*lower))),
                }
            }
            _ => None,
        };
        if should.up && !is.up {
            // Whoever made it may have come no further.
            refuse_router_advertisements(name);
        }
        let outcomes = self.kernel.change(link::change(&is, should, lower))?;
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

/// To be done before a device of ours goes up.
fn refuse_router_advertisements(name: LinkName) {
    if let Err(error) = sysctl::refuse_router_advertisements(name) {
        debug!(link = %name, %error, "cannot set accept_ra");
    }
}

/// Whether a device is as it should be, as far as one can tell without the name of its lower one.
fn is_so(seen: &SeenLink, should: &Link) -> bool {
    let lower = match &should.kind {
        LinkKind::Vxlan(vxlan) => vxlan.lower,
        LinkKind::Other(_) => None,
    };
    seen.clone().into_link(lower) == *should
}

fn words_of(outcome: Result<(), Refusal>) -> Option<String> {
    outcome.err().map(|refusal| refusal.reason(None))
}

/// What stands in the way of a new device.
fn in_the_way(twin: &SeenLink, vxlan: &Vxlan) -> String {
    let (twin, Vxlan { vni, port, .. }) = (twin.name, vxlan);
    format!("{twin} holds VNI {vni} on port {port} already; remove it or choose another VNI")
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
            | Step::RemoveNexthop(_)
            | Step::RemoveBlackhole(_)
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
        (Step::PutRoute(_, Route { link, .. }), Errno::ENETDOWN)
        | (Step::PutNexthop(_, Nexthop { link, .. }), Errno::ENETDOWN) => Some(format!("{link} is down")),
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
