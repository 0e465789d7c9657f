//! Leases, and plans made of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use flannel_core::backend::{self, Node};
use flannel_core::claim::Claim;
use flannel_core::diff;
use flannel_core::key::parse_subnet_key;
use flannel_core::lease::{BackendData, Lease, LeaseAttrs, Subnet};
use flannel_core::network::NetworkConfig;
use flannel_core::plan::{Plan, Planner, RouteMode};
use flannel_core::state::{HostState, MacAddr, Object, RouteKey};
use flannel_core::store::{LeaseEvent, Snapshot, Unreadable};
use flannel_core::view::{Applied, LeaseView};
use ipnetwork::IpNetwork;

use super::{contains, shown};
use crate::build::{self, peer};

const DIRECT: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
const ALLOC: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"alloc"}}"#;

/// The value of a lease, with the last part of its key in a line before it or
/// without. It is planned for beside three peers that are as they should be.
///
/// # Panics
/// A value that is written otherwise than it was read; a refusal that is not one
/// clean line; a plan that is not as [`sequence`] wants it, or that leaves out a
/// healthy peer with which nothing is disputed.
pub fn lease(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let keyed = text.split_once('\n').and_then(|(key, value)| Some((parse_subnet_key(key)?, value)));
    let (subnet, value) = keyed.unwrap_or((build::subnet(9), text));
    let attrs = match LeaseAttrs::from_json(value) {
        Ok(attrs) => attrs,
        Err(error) => return shown(&error.to_string(), 400),
    };
    reads_as_it_is_written(&attrs);
    let stranger = Lease { attrs, ..build::lease(subnet, "{}") };
    for (config, mode) in [
        (build::VXLAN, RouteMode::Plain),
        (DIRECT, RouteMode::Nexthop),
        (build::HOST_GW, RouteMode::Plain),
        (ALLOC, RouteMode::Plain),
    ] {
        let mut host = Host::new(config, mode);
        let healthy = [2, 3, 200].map(|number| host.healthy(number));
        let leases = healthy.iter().cloned().chain([build::peer(1, 1, 1)]).collect();
        host.hear(LeaseEvent::Snapshot(Snapshot { leases, unreadable: vec![] }));
        assert!(host.skipped.is_empty(), "{:?}", host.skipped);
        let before = host.desired.clone();

        host.hear(LeaseEvent::Put(stranger.clone()));

        let node = host.planner.node();
        for peer in healthy.iter().filter(|peer| peer.subnet != subnet && !can_lose(peer, &stranger, node)) {
            assert!(!host.skipped.contains_key(&peer.subnet), "{subnet} costs {peer:?}: {:?}", host.skipped);
        }
        if healthy.iter().all(|peer| peer.subnet != subnet) {
            host.hear(LeaseEvent::Removed(subnet));
            assert_eq!(host.desired, before, "something is left of {stranger:?}");
            assert!(host.skipped.is_empty(), "{:?}", host.skipped);
        }
    }
}

/// A history of the store, in four bytes per word: what happens, to which
/// subnet, and the last bytes of MAC and address. After each event, what was
/// planned for that event alone must be what a fresh planner plans for all.
///
/// # Panics
/// The two plans differ; a plan reaches beyond the network or into our own
/// subnet; a step between two plans sends packets to a third host.
pub fn sequence(data: &[u8]) {
    let [setting, words @ ..] = data else { return };
    let config = [build::VXLAN, DIRECT, build::HOST_GW, ALLOC][usize::from(setting % 4)];
    let mode = [RouteMode::Plain, RouteMode::Nexthop, RouteMode::Auto][usize::from(setting / 4 % 3)];
    let mut host = Host::new(config, mode);
    // Longer ones show nothing new, and take long.
    let mut words = words.chunks_exact(4).take(64).map(|word| [word[0], word[1], word[2], word[3]]);
    while let Some(word) = words.next() {
        let [kind, subnet, ..] = word;
        // What concerns several subnets at once takes the words that follow.
        let mut several = || -> Vec<[u8; 4]> { words.by_ref().take(usize::from(kind / 16)).collect() };
        match kind % 16 {
            0..=7 => host.hear(LeaseEvent::Put(some_lease(word))),
            8 | 9 => host.hear(LeaseEvent::Removed(some_subnet(subnet))),
            10 => host.hear(LeaseEvent::Unreadable(unreadable(word))),
            11 => host.hear(LeaseEvent::RemovedTogether(
                several().into_iter().map(|[_, subnet, ..]| some_subnet(subnet)).collect(),
            )),
            12 => {
                let leases = several().into_iter().map(some_lease).chain([build::peer(1, 1, 1)]).collect();
                host.hear(LeaseEvent::Snapshot(Snapshot { leases, unreadable: vec![unreadable(word)] }));
            }
            13 => host.hear(LeaseEvent::Resumed),
            14 => host.moves(Lease { subnet: build::subnet(subnet % 16), ..some_lease(word) }),
            _ => host.is_able(kind & 16 == 0),
        }
    }
}

/// Plans for a node without peers in a network of that config.
///
/// # Panics
/// The node is not planned for within its network.
pub(super) fn plans_a_node(config: &NetworkConfig) {
    let Some(pool) = config.v4 else { return };
    let (backend, _) = backend::from_config(config).expect("it was made before");
    let IpNetwork::V4(subnet) = pool.subnet(0).expect("a pool is never empty") else { return };
    let mut lease = peer(1, 1, 1);
    lease.subnet = Subnet::V4(subnet);
    let mac = MacAddr([0x0e, 0, 0, 0, 0, 1]);
    let underlay = build::underlay();
    lease.attrs = backend.attributes(&underlay, &HostState::default(), mac);
    if let Err(words) = backend.check(&underlay) {
        shown(&words, 400);
    }
    let node = Node { pools: config.pools().copied().collect(), underlay, lease, mtu: None };
    assert!(backend.mtu(&node) <= node.underlay.mtu, "{config:?}");
    let state = backend.plan_node(&node);
    assert_eq!(state.links.keys().copied().collect::<Vec<_>>(), backend.links());
    for (link, address) in &state.addresses {
        assert!(backend.links().contains(link) && contains(subnet.into(), *address), "{address}");
    }
}

/// What is written is read. What others spelt in their own way is spelt as Go
/// spells it; that may make it longer than is kept; and then nothing is there.
/// From then on it stays.
fn reads_as_it_is_written(attrs: &LeaseAttrs) {
    let read =
        |attrs: &LeaseAttrs| LeaseAttrs::from_json(&attrs.to_json()).expect("what was written is read");
    let once = read(attrs);
    let settled = read(&read(&once));
    assert_eq!(read(&settled), settled);
    assert_eq!(read(&settled).to_json(), settled.to_json());
    let ours = |data: Option<&BackendData>| matches!(data, None | Some(BackendData::Vtep { .. }));
    if ours(attrs.backend_data.as_ref()) && ours(attrs.backend_v6_data.as_deref()) {
        assert_eq!(once, *attrs);
    }
}

/// Whether a peer that is as it should be can lose something to another: only to
/// one that the network config could hand out too and that goes before it, and
/// only the MAC or the address that both name. What else the rule looks at can
/// only make such cases fewer.
fn can_lose(peer: &Lease, other: &Lease, node: &Node) -> bool {
    let mac = |lease: &Lease| lease.attrs.backend_data.as_ref().and_then(BackendData::mac);
    let alike =
        mac(peer).is_some() && mac(peer) == mac(other) || peer.attrs.public_ip == other.attrs.public_ip;
    let handed_out = other.subnet.v4().is_some_and(|v4| {
        v4.prefix() == 24
            && v4.ip() == v4.network()
            && node.networks().any(|whole| contains(whole, v4.into()))
    });
    alike && handed_out && other.subnet < peer.subnet
}

/// A subnet that is well, or not, in one way or another.
fn some_subnet(number: u8) -> Subnet {
    const ODD: [&str; 16] = [
        "10.5.2.0-23",
        "10.5.2.0-25",
        "10.5.2.128-25",
        "10.5.4.0-22",
        "10.5.4.0-23",
        "10.5.5.7-24",
        "10.5.0.0-16",
        "10.5.0.0-23",
        "10.5.1.0-24",
        "10.5.1.0-25",
        "10.4.0.0-15",
        "10.6.2.0-24",
        "192.168.0.0-24",
        "0.0.0.0-0&fd05:0:0:2::-64",
        "10.5.2.0-24&fd05:0:0:2::-64",
        "10.5.6.0-24&fd05:0:0:6::-64",
    ];
    match number % 32 {
        well @ 0..16 => build::subnet(well),
        odd => parse_subnet_key(ODD[usize::from(odd - 16)]).expect("the name of a subnet"),
    }
}

/// A lease of some subnet, that is well, or not, in one way or another.
fn some_lease([kind, subnet, mac, host]: [u8; 4]) -> Lease {
    let address = match host % 32 {
        well @ 0..20 => format!("192.168.0.{well}"),
        20 => "0.0.0.0".into(),
        21 => "127.0.0.1".into(),
        22 => "224.0.0.1".into(),
        23 => "255.255.255.255".into(),
        24 => "10.5.9.9".into(),
        other => format!("172.16.0.{other}"),
    };
    let mac = match mac % 16 {
        14 => "01:00:5e:00:00:01".into(),
        15 => "ff:ff:ff:ff:ff:ff".into(),
        well => format!("0e:00:00:00:00:{well:02x}"),
    };
    let value = match kind / 16 {
        0..=7 => format!(
            r#"{{"PublicIP":"{address}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        ),
        8..=10 => format!(r#"{{"PublicIP":"{address}","BackendType":"host-gw"}}"#),
        11 => {
            format!(r#"{{"PublicIP":"{address}","BackendType":"vxlan","BackendData":{{"VtepMAC":"{mac}"}}}}"#)
        }
        12 => format!(
            r#"{{"PublicIP":"{address}","BackendType":"vxlan","BackendData":{{"VNI":2,"VtepMAC":"{mac}"}}}}"#
        ),
        13 => format!(r#"{{"PublicIP":"{address}","BackendType":"vxlan"}}"#),
        14 => format!(
            r#"{{"PublicIP":"{address}","PublicIPv6":"fd00::2","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        ),
        _ => format!(
            r#"{{"PublicIP":"{address}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}","New":[1]}}}}"#
        ),
    };
    build::lease(some_subnet(subnet), &value)
}

fn unreadable([_, subnet, named, _]: [u8; 4]) -> Unreadable {
    let subnet = Some(some_subnet(subnet)).filter(|_| named.is_multiple_of(2));
    Unreadable { key: "/coreos.com/network/subnets/some".into(), subnet, reason: "not JSON".into() }
}

/// A host that plans event by event, and never all anew unless it must.
struct Host {
    config: NetworkConfig,
    mode: RouteMode,
    planner: Planner,
    claim: Claim,
    able: bool,
    view: LeaseView,
    desired: HostState,
    skipped: BTreeMap<Subnet, String>,
}

impl Host {
    fn new(config: &str, mode: RouteMode) -> Self {
        let config = build::config(config);
        let (planner, claim) = build::planner_in(&config, mode);
        let mut host = Self {
            config,
            mode,
            planner,
            claim,
            able: true,
            view: LeaseView::default(),
            desired: HostState::default(),
            skipped: BTreeMap::new(),
        };
        host.plan();
        host
    }

    /// A lease that nothing is wrong with.
    fn healthy(&self, number: u8) -> Lease {
        match self.planner.backend().kind() {
            "host-gw" => {
                let value = format!(r#"{{"PublicIP":"192.168.0.{number}","BackendType":"host-gw"}}"#);
                build::lease(build::subnet(number), &value)
            }
            _ => peer(number, number, number),
        }
    }

    fn plan(&mut self) {
        let Plan { desired, skipped } = self.planner.plan(&self.view);
        self.desired = desired;
        self.skipped = skipped.into_iter().map(|peer| (peer.subnet, peer.reason)).collect();
    }

    fn hear(&mut self, event: LeaseEvent) {
        let before = self.desired.clone();
        match self.view.apply(event.clone()) {
            Applied::Nothing => {}
            Applied::Everything => self.plan(),
            Applied::One(change) => match self.planner.replan(&change, &self.view) {
                None => self.plan(),
                Some(patch) => {
                    for object in &patch.before {
                        self.desired.remove(&object.key());
                    }
                    for object in patch.after {
                        self.desired.put(object);
                    }
                    for subnet in patch.planned.iter().chain(change.subnet().as_ref()) {
                        self.skipped.remove(subnet);
                    }
                    self.skipped.extend(patch.skipped.into_iter().map(|peer| (peer.subnet, peer.reason)));
                }
            },
        }
        self.check(&before, &event);
    }

    /// Our own lease says something else, or is another one.
    fn moves(&mut self, lease: Lease) {
        let before = self.desired.clone();
        let node = self.planner.node().clone();
        self.planner.set_node(Node { lease, ..node });
        self.plan();
        self.check(&before, &"our own lease changed");
    }

    /// The kernel turns out to have nexthop objects, or not.
    fn is_able(&mut self, able: bool) {
        let before = self.desired.clone();
        self.able = able;
        if self.planner.set_able(able) {
            self.plan();
        }
        self.check(&before, &"the kernel has nexthop objects, or has none");
    }

    fn check(&self, before: &HostState, event: &dyn fmt::Debug) {
        let (backend, _) = backend::from_config(&self.config).expect("it was made before");
        let mut fresh = Planner::new(backend, self.planner.node().clone(), self.mode);
        fresh.set_able(self.able);
        let plan = fresh.plan(&self.view);
        assert!(
            self.desired == plan.desired,
            "the plan after {event:?} is\n{}and should be\n{}",
            self.desired,
            plan.desired
        );
        let skipped: BTreeMap<_, _> =
            plan.skipped.into_iter().map(|peer| (peer.subnet, peer.reason)).collect();
        assert_eq!(self.skipped, skipped, "after {event:?}");
        self.stays_within(event);
        self.reaches_whom_it_should(event);
        self.misleads_no_packet(before, event);
    }

    /// Nothing in the plan takes traffic that is not the network's, or our own.
    fn stays_within(&self, event: &dyn fmt::Debug) {
        let node = self.planner.node();
        let own: Vec<IpNetwork> = node.lease.subnet.networks().collect();
        let inside = |network: IpNetwork| node.networks().any(|whole| contains(whole, network));
        for key in self.desired.routes.keys() {
            let to = key.destination;
            assert!(inside(to), "a route to {to} after {event:?}");
            let near = node.underlay.networks.iter().chain(&own).any(|near| meet(*near, to));
            assert!(!near, "a route to {to} after {event:?}");
        }
        let ours = [IpAddr::from(node.underlay.address), node.underlay.public_address()];
        for ((_, mac), remote) in &self.desired.fdb {
            let odd = remote.is_loopback() || remote.is_unspecified() || remote.is_multicast();
            assert!(!odd && !ours.contains(remote) && mac.is_unicast(), "{mac} dst {remote} after {event:?}");
        }
        for (_, address) in self.desired.neighbours.keys() {
            assert!(inside((*address).into()), "a neighbour {address} after {event:?}");
        }
        for object in objects(&self.desired) {
            assert!(self.claim.owns(&object), "{object:?} would not be known as ours, after {event:?}");
        }
    }

    /// Every peer is skipped for a reason, or its packets go where it says.
    fn reaches_whom_it_should(&self, event: &dyn fmt::Debug) {
        let node = self.planner.node();
        for peer in self.view.peers(node.lease.subnet) {
            if let Some(reason) = self.skipped.get(&peer.subnet) {
                shown(reason, 400);
                continue;
            }
            let part =
                peer.subnet.v4().map(IpNetwork::V4).filter(|_| self.planner.backend().kind() != "alloc");
            let Some(subnet) = part else { continue };
            let reached = reached(&self.desired, RouteKey::to(subnet));
            assert_eq!(reached, peer.attrs.public_address(&subnet), "{subnet} after {event:?}");
        }
        let known: BTreeSet<Subnet> = self.view.peers(node.lease.subnet).map(|peer| peer.subnet).collect();
        assert!(
            self.skipped.keys().all(|subnet| known.contains(subnet)),
            "{:?} after {event:?}",
            self.skipped
        );
    }

    /// On the way from one plan to the next, no packet goes to a third host.
    fn misleads_no_packet(&self, before: &HostState, event: &dyn fmt::Debug) {
        let mut state = before.clone();
        let keys: BTreeSet<RouteKey> =
            before.routes.keys().chain(self.desired.routes.keys()).copied().collect();
        let ends = keys.into_iter().map(|key| (key, reached(before, key), reached(&self.desired, key)));
        let ends: Vec<_> = ends.collect();
        for step in diff::diff(&self.desired, before) {
            diff::take(&mut state, &step);
            for (key, was, shall) in &ends {
                let is = reached(&state, *key);
                assert!(
                    is.is_none() || is == *was || is == *shall,
                    "{key} to {is:?} by {step} after {event:?}"
                );
            }
        }
        assert_eq!(state, self.desired, "the steps lead elsewhere after {event:?}");
    }
}

fn meet(one: IpNetwork, other: IpNetwork) -> bool {
    one.is_ipv4() == other.is_ipv4() && (contains(one, other) || contains(other, one))
}

/// The host that packets by that route are sent to.
fn reached(state: &HostState, key: RouteKey) -> Option<IpAddr> {
    let route = state.routes.get(&key)?;
    let gateway = route.gateway?;
    if let Some(id) = route.nexthop
        && state.nexthops.get(&id)?.gateway != Some(gateway)
    {
        return None;
    }
    if !route.onlink {
        return Some(gateway);
    }
    let mac = state.neighbours.get(&(route.link, gateway))?;
    state.fdb.get(&(route.link, *mac)).copied()
}

fn objects(state: &HostState) -> impl Iterator<Item = Object> {
    let links = state.links.iter().map(|(name, link)| Object::Link(*name, Box::new(link.clone())));
    let addresses = state.addresses.iter().map(|(link, address)| Object::Address(*link, *address));
    let neighbours = state.neighbours.iter().map(|((link, ip), mac)| Object::Neighbour(*link, *ip, *mac));
    let fdb = state.fdb.iter().map(|((link, mac), remote)| Object::Fdb(*link, *mac, *remote));
    let nexthops = state.nexthops.iter().map(|(id, nexthop)| Object::Nexthop(*id, *nexthop));
    let routes = state.routes.iter().map(|(key, route)| Object::Route(*key, *route));
    links.chain(addresses).chain(neighbours).chain(fdb).chain(nexthops).chain(routes)
}
