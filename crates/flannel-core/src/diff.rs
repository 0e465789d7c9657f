//! Turns "what should be" and "what is" into the steps between them.
//!
//! Order is the whole point of this module. Everything put in place replaces
//! what stands there, so a peer that changes is changed without a gap; and no
//! packet may go to a third host in between:
//!
//! ```text
//!     routes that go                    their subnets fall silent
//!     neighbours in the way             (below)
//!     links that go; links; addresses, and those that go
//!     fdb → neighbour → nexthop → route   each leads to what is there already
//!     nexthops, neighbours, fdb that go
//! ```
//!
//! What drops packets that nothing else takes comes and goes at the end, and
//! depends on nothing.
//!
//! A neighbour entry is in the way when it leads to a MAC whose forwarding
//! entry is about to move to another host, and it does not belong there any
//! more: the subnet's packets would follow the MAC. Without its entry they are
//! dropped by the device until the new one is in place, a step later.
//!
//! A nexthop object takes the routes that lead through it with it, and so does a
//! device with its nexthop objects, for each of which the kernel walks all routes:
//! with ten thousand that is a second, and with fifty thousand twenty. So routes
//! are taken from them before they go.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::state::{HostState, Key, Link, LinkName, MacAddr, Nexthop, NexthopId, Object, Route, RouteKey};

/// One change to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Delete the route with that key; it must still look as observed.
    RemoveRoute(RouteKey, Route),
    /// Delete a nexthop object.
    RemoveNexthop(NexthopId),
    /// Delete a neighbour entry.
    RemoveNeighbour(LinkName, IpAddr),
    /// Delete a forwarding entry with all its destinations.
    RemoveFdb(LinkName, MacAddr),
    /// Take an address from a device.
    RemoveAddress(LinkName, IpNetwork),
    /// Delete a device; what stands on it goes with it.
    RemoveLink(LinkName),
    /// Make a device, as it should be in the end.
    AddLink(LinkName, Box<Link>),
    /// Bring a standing device's MAC, MTU, source, learning and state to these.
    ChangeLink(LinkName, Box<Link>),
    /// Give a device an address.
    AddAddress(LinkName, IpNetwork),
    /// Make or replace a permanent forwarding entry: this MAC lives on that host.
    PutFdb(LinkName, MacAddr, IpAddr),
    /// Make or replace a permanent neighbour entry.
    PutNeighbour(LinkName, IpAddr, MacAddr),
    /// Make or replace a nexthop object.
    PutNexthop(NexthopId, Nexthop),
    /// Make or replace a route.
    PutRoute(RouteKey, Route),
    /// Make a route that drops packets.
    PutBlackhole(RouteKey),
    /// Delete a route that drops packets.
    RemoveBlackhole(RouteKey),
}

impl Step {
    /// Which object it is about.
    pub fn key(&self) -> Key {
        match *self {
            Self::AddLink(name, _) | Self::ChangeLink(name, _) | Self::RemoveLink(name) => Key::Link(name),
            Self::AddAddress(link, address) | Self::RemoveAddress(link, address) => {
                Key::Address(link, address)
            }
            Self::PutNeighbour(link, ip, _) | Self::RemoveNeighbour(link, ip) => Key::Neighbour(link, ip),
            Self::PutFdb(link, mac, _) | Self::RemoveFdb(link, mac) => Key::Fdb(link, mac),
            Self::PutNexthop(id, _) | Self::RemoveNexthop(id) => Key::Nexthop(id),
            Self::PutRoute(key, _) | Self::RemoveRoute(key, _) => Key::Route(key),
            Self::PutBlackhole(key) | Self::RemoveBlackhole(key) => Key::Blackhole(key),
        }
    }

    /// What stands under its key once it is taken.
    pub fn leaves(&self) -> Option<Object> {
        Some(match self {
            Self::AddLink(name, link) | Self::ChangeLink(name, link) => Object::Link(*name, link.clone()),
            Self::AddAddress(link, address) => Object::Address(*link, *address),
            Self::PutNeighbour(link, ip, mac) => Object::Neighbour(*link, *ip, *mac),
            Self::PutFdb(link, mac, remote) => Object::Fdb(*link, *mac, *remote),
            Self::PutNexthop(id, nexthop) => Object::Nexthop(*id, *nexthop),
            Self::PutRoute(key, route) => Object::Route(*key, *route),
            Self::PutBlackhole(key) => Object::Blackhole(*key),
            Self::RemoveLink(_)
            | Self::RemoveAddress(..)
            | Self::RemoveNeighbour(..)
            | Self::RemoveFdb(..)
            | Self::RemoveNexthop(_)
            | Self::RemoveRoute(..)
            | Self::RemoveBlackhole(_) => return None,
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RemoveRoute(key, route) => write!(f, "remove route {key} {route}"),
            Self::RemoveNexthop(id) => write!(f, "remove nexthop {id}"),
            Self::RemoveNeighbour(link, ip) => write!(f, "remove neighbour {ip} dev {link}"),
            Self::RemoveFdb(link, mac) => write!(f, "remove fdb {mac} dev {link}"),
            Self::RemoveAddress(link, address) => write!(f, "remove address {address} dev {link}"),
            Self::RemoveLink(link) => write!(f, "remove link {link}"),
            Self::AddLink(name, link) => write!(f, "add link {name} {link}"),
            Self::ChangeLink(name, link) => write!(f, "change link {name} to {link}"),
            Self::AddAddress(link, address) => write!(f, "add address {address} dev {link}"),
            Self::PutFdb(link, mac, remote) => write!(f, "put fdb {mac} dst {remote} dev {link}"),
            Self::PutNeighbour(link, ip, mac) => write!(f, "put neighbour {ip} lladdr {mac} dev {link}"),
            Self::PutNexthop(id, nexthop) => write!(f, "put nexthop {id} {nexthop}"),
            Self::PutRoute(key, route) => write!(f, "put route {key} {route}"),
            Self::PutBlackhole(key) => write!(f, "put blackhole {key}"),
            Self::RemoveBlackhole(key) => write!(f, "remove blackhole {key}"),
        }
    }
}

/// The steps that turn `observed` into `desired`, in the order to take them.
///
/// Empty exactly when the two are equal.
pub fn diff(desired: &HostState, observed: &HostState) -> Vec<Step> {
    Difference::new(desired, observed).steps().collect()
}

/// What stands between two states, whose steps are made as they are asked for:
/// all at once they would take more room than the states.
pub struct Difference<'a> {
    desired: &'a HostState,
    /// What is left of the observed state once the devices are as they should be.
    observed: Cow<'a, HostState>,
    links: Vec<Step>,
    in_the_way: BTreeSet<(LinkName, IpAddr)>,
}

impl<'a> Difference<'a> {
    /// Compares the devices, on which all else depends.
    pub fn new(desired: &'a HostState, observed: &'a HostState) -> Self {
        let mut links = Vec::new();
        let observed = match with_links_made(desired, observed, &mut links) {
            Some(left) => Cow::Owned(left),
            None => Cow::Borrowed(observed),
        };
        let in_the_way = neighbours_in_the_way(desired, &observed);
        Self { desired, observed, links, in_the_way }
    }

    /// What stands under a key by the time that something is to be put there.
    pub fn left(&self, key: &Key) -> Option<Object> {
        match key {
            Key::Neighbour(link, ip) if self.in_the_way.contains(&(*link, *ip)) => None,
            key => self.observed.get(key),
        }
    }

    /// The steps, in the order to take them.
    pub fn steps(&self) -> impl Iterator<Item = Step> {
        let Self { desired, observed, links, in_the_way } = self;
        let routes_gone = observed.routes.iter().filter(|(key, _)| !desired.routes.contains_key(key));
        let addresses = desired.addresses.difference(&observed.addresses);
        // Only then, or the device would lose its last address and with it every route; and before any route, as the
        // kernel refuses one by way of an address of its own: our former one may be a peer's by now.
        let addresses_gone = observed.addresses.difference(&desired.addresses);
        let fdb = desired.fdb.iter().filter(|(key, remote)| observed.fdb.get(key) != Some(*remote));
        let neighbours = desired
            .neighbours
            .iter()
            .filter(|(key, mac)| observed.neighbours.get(key) != Some(*mac) || in_the_way.contains(key));
        let nexthops =
            desired.nexthops.iter().filter(|(id, nexthop)| observed.nexthops.get(id) != Some(*nexthop));
        let routes = desired.routes.iter().filter(|(key, route)| observed.routes.get(key) != Some(*route));
        let nexthops_gone = observed.nexthops.keys().filter(|id| !desired.nexthops.contains_key(id));
        let neighbours_gone = observed
            .neighbours
            .keys()
            .filter(|key| !desired.neighbours.contains_key(key) && !in_the_way.contains(key));
        let fdb_gone = observed.fdb.keys().filter(|key| !desired.fdb.contains_key(key));

        let unmade = routes_gone.map(|(key, route)| Step::RemoveRoute(*key, *route));
        let cleared = in_the_way.iter().map(|(link, ip)| Step::RemoveNeighbour(*link, *ip));
        unmade
            .chain(cleared)
            .chain(links.iter().cloned())
            .chain(addresses.map(|(link, address)| Step::AddAddress(*link, *address)))
            .chain(addresses_gone.map(|(link, address)| Step::RemoveAddress(*link, *address)))
            .chain(fdb.map(|((link, mac), remote)| Step::PutFdb(*link, *mac, *remote)))
            .chain(neighbours.map(|((link, ip), mac)| Step::PutNeighbour(*link, *ip, *mac)))
            .chain(nexthops.map(|(id, nexthop)| Step::PutNexthop(*id, *nexthop)))
            .chain(routes.map(|(key, route)| Step::PutRoute(*key, *route)))
            .chain(nexthops_gone.map(|id| Step::RemoveNexthop(*id)))
            .chain(neighbours_gone.map(|(link, ip)| Step::RemoveNeighbour(*link, *ip)))
            .chain(fdb_gone.map(|(link, mac)| Step::RemoveFdb(*link, *mac)))
            .chain(desired.blackholes.difference(&observed.blackholes).map(|key| Step::PutBlackhole(*key)))
            .chain(observed.blackholes.difference(&desired.blackholes).map(|key| Step::RemoveBlackhole(*key)))
    }
}

/// Plans the devices; returns what will stand after those changes if it is less
/// than `observed`: a device that goes takes all that stands on it with it, and
/// one that gets another MAC its neighbours.
fn with_links_made(desired: &HostState, observed: &HostState, steps: &mut Vec<Step>) -> Option<HostState> {
    let mut left: Option<HostState> = None;
    for (name, is) in &observed.links {
        match desired.links.get(name) {
            Some(should) if is == should => {}
            Some(should) if is.can_become(should) => {
                steps.push(Step::ChangeLink(*name, Box::new(should.clone())));
                if is.mac != should.mac {
                    left.get_or_insert_with(|| observed.clone()).drop_neighbours(*name);
                }
            }
            other => {
                let leads_there = |nexthop: &Nexthop| nexthop.link == *name;
                if observed.nexthops.values().any(leads_there) {
                    let routes = observed.routes.iter().filter(|(_, route)| route.link == *name);
                    steps.extend(routes.map(|(key, route)| Step::RemoveRoute(*key, *route)));
                    let nexthops = observed.nexthops.iter().filter(|(_, nexthop)| leads_there(nexthop));
                    steps.extend(nexthops.map(|(id, _)| Step::RemoveNexthop(*id)));
                }
                steps.push(Step::RemoveLink(*name));
                left.get_or_insert_with(|| observed.clone()).drop_link(*name);
                if let Some(should) = other {
                    steps.push(Step::AddLink(*name, Box::new(should.clone())));
                }
            }
        }
    }
    for (name, should) in &desired.links {
        if !observed.links.contains_key(name) {
            steps.push(Step::AddLink(*name, Box::new(should.clone())));
        }
    }
    left
}

/// The observed neighbour entries that would lead to a third host while the
/// forwarding entries are being moved.
fn neighbours_in_the_way(desired: &HostState, observed: &HostState) -> BTreeSet<(LinkName, IpAddr)> {
    let moving: BTreeSet<(LinkName, MacAddr)> = desired
        .fdb
        .iter()
        .filter(|(key, remote)| observed.fdb.get(key).is_some_and(|is| is != *remote))
        .map(|(key, _)| *key)
        .collect();
    if moving.is_empty() {
        return BTreeSet::new();
    }
    let leads_astray = |(link, ip): &(LinkName, IpAddr), mac: &MacAddr| {
        moving.contains(&(*link, *mac)) && desired.neighbours.get(&(*link, *ip)) != Some(mac)
    };
    observed.neighbours.iter().filter(|(key, mac)| leads_astray(key, mac)).map(|(key, _)| *key).collect()
}

/// Takes a step in a value, as the kernel would.
pub fn take(state: &mut HostState, step: &Step) {
    match step {
        Step::RemoveLink(link) => state.drop_link(*link),
        Step::RemoveNexthop(id) => state.drop_nexthop(*id),
        Step::AddLink(name, link) | Step::ChangeLink(name, link) => {
            let before = state.links.insert(*name, Link::clone(link));
            if before.is_some_and(|before| before.mac != link.mac) {
                state.drop_neighbours(*name);
            }
        }
        step => state.set(&step.key(), step.leaves()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{LinkKind, ROUTE_PROTOCOL, ROUTE_PROTOCOL_BOOT, Vxlan};

    fn device() -> LinkName {
        "flannel.1".parse().unwrap()
    }

    fn link(vni: u32) -> Link {
        Link {
            kind: LinkKind::Vxlan(Vxlan {
                vni,
                port: 8472,
                local: Some("192.168.0.1".parse().unwrap()),
                lower: Some("eth0".parse().unwrap()),
                learning: false,
                gbp: false,
            }),
            mac: MacAddr([0x0e, 0, 0, 0, 0, 1]),
            mtu: 1450,
            up: true,
        }
    }

    fn mac(last: u8) -> MacAddr {
        MacAddr([0x0e, 0, 0, 0, 0, last])
    }

    fn host(number: u8) -> IpAddr {
        IpAddr::from([192, 168, 0, number])
    }

    fn gateway(subnet: u8) -> IpAddr {
        IpAddr::from([10, 5, subnet, 0])
    }

    fn with_peer(mut state: HostState, subnet: u8, last: u8, number: u8) -> HostState {
        let key = RouteKey::to(IpNetwork::new(gateway(subnet), 24).unwrap());
        let route = Route {
            link: device(),
            gateway: Some(gateway(subnet)),
            onlink: true,
            protocol: ROUTE_PROTOCOL,
            decorated: false,
            nexthop: None,
        };
        state.neighbours.insert((device(), gateway(subnet)), mac(last));
        state.fdb.insert((device(), mac(last)), host(number));
        state.routes.insert(key, route);
        state
    }

    fn base() -> HostState {
        let mut state = HostState::default();
        state.links.insert(device(), link(1));
        state.addresses.insert((device(), "10.5.1.0/32".parse().unwrap()));
        state
    }

    fn printed(desired: &HostState, observed: &HostState) -> Vec<String> {
        diff(desired, observed).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn equal_states_need_no_step() {
        let state = with_peer(base(), 2, 2, 2);

        assert_eq!(diff(&state, &state), []);
    }

    #[test]
    fn a_new_host_is_built_from_the_device_up_to_the_route() {
        let steps = printed(&with_peer(base(), 2, 2, 2), &HostState::default());

        assert_eq!(
            steps,
            [
                "add link flannel.1 vxlan id 1 local 192.168.0.1 dev eth0 dstport 8472 nolearning address 0e:00:00:00:00:01 mtu 1450 up",
                "add address 10.5.1.0/32 dev flannel.1",
                "put fdb 0e:00:00:00:00:02 dst 192.168.0.2 dev flannel.1",
                "put neighbour 10.5.2.0 lladdr 0e:00:00:00:00:02 dev flannel.1",
                "put route 10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto flannel onlink",
            ]
        );
    }

    #[test]
    fn a_peer_that_goes_is_taken_down_from_the_route() {
        let steps = printed(&base(), &with_peer(base(), 2, 2, 2));

        assert_eq!(
            steps,
            [
                "remove route 10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto flannel onlink",
                "remove neighbour 10.5.2.0 dev flannel.1",
                "remove fdb 0e:00:00:00:00:02 dev flannel.1",
            ]
        );
    }

    #[test]
    fn a_peer_with_a_new_mac_is_never_without_an_entry() {
        let steps = printed(&with_peer(base(), 2, 7, 2), &with_peer(base(), 2, 2, 2));

        assert_eq!(
            steps,
            [
                "put fdb 0e:00:00:00:00:07 dst 192.168.0.2 dev flannel.1",
                "put neighbour 10.5.2.0 lladdr 0e:00:00:00:00:07 dev flannel.1",
                "remove fdb 0e:00:00:00:00:02 dev flannel.1",
            ]
        );
    }

    #[test]
    fn a_peer_with_a_new_address_is_one_replacement() {
        let steps = printed(&with_peer(base(), 2, 2, 9), &with_peer(base(), 2, 2, 2));

        assert_eq!(steps, ["put fdb 0e:00:00:00:00:02 dst 192.168.0.9 dev flannel.1"]);
    }

    #[test]
    fn peers_that_swap_macs_never_receive_each_other_s_packets() {
        let observed = with_peer(with_peer(base(), 2, 2, 2), 3, 3, 3);
        let desired = with_peer(with_peer(base(), 2, 3, 2), 3, 2, 3);

        let mut state = observed.clone();
        for step in diff(&desired, &observed) {
            take(&mut state, &step);
            for (subnet, number) in [(2, 2), (3, 3)] {
                let reached = state
                    .neighbours
                    .get(&(device(), gateway(subnet)))
                    .and_then(|mac| state.fdb.get(&(device(), *mac)));
                assert!(
                    reached.is_none_or(|ip| *ip == host(number)),
                    "10.5.{subnet}.0 went to {reached:?} after {step}"
                );
            }
        }
        assert_eq!(state, desired);
    }

    #[test]
    fn an_incompatible_device_is_made_anew_with_all_that_stood_on_it() {
        let observed = with_peer(base(), 2, 2, 2);
        let mut desired = observed.clone();
        desired.links.insert(device(), link(9));

        let steps = printed(&desired, &observed);

        assert_eq!(steps[0], "remove link flannel.1");
        assert!(steps[1].starts_with("add link flannel.1 vxlan id 9"), "{}", steps[1]);
        assert_eq!(steps.len(), 6);
    }

    #[test]
    fn a_device_with_another_mtu_is_changed_where_it_stands() {
        let observed = with_peer(base(), 2, 2, 2);
        let mut desired = observed.clone();
        desired.links.get_mut(&device()).unwrap().mtu = 1400;

        let steps = printed(&desired, &observed);

        assert_eq!(steps.len(), 1);
        assert!(steps[0].starts_with("change link flannel.1 to"), "{}", steps[0]);
    }

    #[test]
    fn a_device_with_another_mac_is_given_its_neighbours_again() {
        let observed = with_peer(base(), 2, 2, 2);
        let mut desired = observed.clone();
        desired.links.get_mut(&device()).unwrap().mac = mac(9);

        let steps = printed(&desired, &observed);

        assert_eq!(steps.len(), 2);
        assert!(steps[0].starts_with("change link flannel.1 to"), "{}", steps[0]);
        assert_eq!(steps[1], "put neighbour 10.5.2.0 lladdr 0e:00:00:00:00:02 dev flannel.1");
    }

    /// The same peer, its route through a nexthop object.
    fn with_nexthop(mut state: HostState, subnet: u8) -> HostState {
        let id = NexthopId::of(gateway(subnet)).unwrap();
        let key = RouteKey::to(IpNetwork::new(gateway(subnet), 24).unwrap());
        let route = state.routes.get_mut(&key).unwrap();
        route.nexthop = Some(id);
        let Route { link, gateway, onlink, protocol, .. } = *route;
        state.nexthops.insert(id, Nexthop { link, gateway, onlink, protocol });
        state
    }

    #[test]
    fn a_route_is_led_through_its_nexthop_object_once_that_is_there_and_away_before_it_goes() {
        let plain = with_peer(base(), 2, 2, 2);
        let through = with_nexthop(plain.clone(), 2);

        assert_eq!(
            printed(&through, &plain),
            [
                "put nexthop 168100352 via 10.5.2.0 dev flannel.1 proto flannel onlink",
                "put route 10.5.2.0/24 nhid 168100352 via 10.5.2.0 dev flannel.1 proto flannel onlink",
            ]
        );
        assert_eq!(
            printed(&plain, &through),
            [
                "put route 10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto flannel onlink",
                "remove nexthop 168100352",
            ]
        );
    }

    #[test]
    fn a_device_that_goes_loses_its_routes_and_nexthop_objects_first() {
        let observed = with_nexthop(with_peer(base(), 2, 2, 2), 2);
        let mut desired = observed.clone();
        desired.links.insert(device(), link(9));

        let steps = printed(&desired, &observed);

        assert!(steps[0].starts_with("remove route 10.5.2.0/24"), "{}", steps[0]);
        assert_eq!(steps[1..3], ["remove nexthop 168100352", "remove link flannel.1"]);
    }

    #[test]
    fn a_device_that_is_to_send_from_elsewhere_keeps_all_that_stands_on_it() {
        let observed = with_peer(base(), 2, 2, 2);
        let mut desired = observed.clone();
        let link = desired.links.get_mut(&device()).unwrap();
        let LinkKind::Vxlan(vxlan) = &mut link.kind else { panic!("no VXLAN device") };
        vxlan.local = Some("192.168.9.1".parse().unwrap());
        vxlan.lower = Some("eth1".parse().unwrap());

        let steps = printed(&desired, &observed);

        assert_eq!(steps.len(), 1);
        assert!(
            steps[0].starts_with("change link flannel.1 to vxlan id 1 local 192.168.9.1 dev eth1"),
            "{}",
            steps[0]
        );
    }

    #[test]
    fn a_route_of_a_go_flanneld_is_replaced_in_place() {
        let desired = with_peer(base(), 2, 2, 2);
        let mut observed = desired.clone();
        for route in observed.routes.values_mut() {
            route.protocol = ROUTE_PROTOCOL_BOOT;
        }

        assert_eq!(
            printed(&desired, &observed),
            ["put route 10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto flannel onlink"]
        );
    }
}
