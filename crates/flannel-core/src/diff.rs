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
//!     fdb → neighbour → route           each leads to what is there already
//!     neighbours, fdb that go
//! ```
//!
//! A neighbour entry is in the way when it leads to a MAC whose forwarding
//! entry is about to move to another host, and it does not belong there any
//! more: the subnet's packets would follow the MAC. Without its entry they are
//! dropped by the device until the new one is in place, a step later.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::state::{HostState, Link, LinkName, MacAddr, Route, RouteKey};

/// One change to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Delete the route with that key; it must still look as observed.
    RemoveRoute(RouteKey, Route),
    /// Delete a neighbour entry.
    RemoveNeighbour(LinkName, IpAddr),
    /// Delete a forwarding entry with all its destinations.
    RemoveFdb(LinkName, MacAddr),
    /// Take an address from a device.
    RemoveAddress(LinkName, IpNetwork),
    /// Delete a device; what stands on it goes with it.
    RemoveLink(LinkName),
    /// Make a device, as it should be in the end.
    AddLink(LinkName, Link),
    /// Bring a standing device's MAC, MTU, learning and state to these.
    ChangeLink(LinkName, Link),
    /// Give a device an address.
    AddAddress(LinkName, IpNetwork),
    /// Make or replace a permanent forwarding entry: this MAC lives on that host.
    PutFdb(LinkName, MacAddr, IpAddr),
    /// Make or replace a permanent neighbour entry.
    PutNeighbour(LinkName, IpAddr, MacAddr),
    /// Make or replace a route.
    PutRoute(RouteKey, Route),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RemoveRoute(key, route) => write!(f, "remove route {key} {route}"),
            Self::RemoveNeighbour(link, ip) => write!(f, "remove neighbour {ip} dev {link}"),
            Self::RemoveFdb(link, mac) => write!(f, "remove fdb {mac} dev {link}"),
            Self::RemoveAddress(link, address) => write!(f, "remove address {address} dev {link}"),
            Self::RemoveLink(link) => write!(f, "remove link {link}"),
            Self::AddLink(name, link) => write!(f, "add link {name} {link}"),
            Self::ChangeLink(name, link) => write!(f, "change link {name} to {link}"),
            Self::AddAddress(link, address) => write!(f, "add address {address} dev {link}"),
            Self::PutFdb(link, mac, remote) => write!(f, "put fdb {mac} dst {remote} dev {link}"),
            Self::PutNeighbour(link, ip, mac) => write!(f, "put neighbour {ip} lladdr {mac} dev {link}"),
            Self::PutRoute(key, route) => write!(f, "put route {key} {route}"),
        }
    }
}

/// The steps that turn `observed` into `desired`, in the order to take them.
///
/// Empty exactly when the two are equal.
pub fn diff(desired: &HostState, observed: &HostState) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut changes = Vec::new();
    let standing = with_links_made(desired, observed, &mut changes);
    let observed = standing.as_ref().unwrap_or(observed);

    for (key, route) in &observed.routes {
        if !desired.routes.contains_key(key) {
            steps.push(Step::RemoveRoute(*key, *route));
        }
    }
    let in_the_way = neighbours_in_the_way(desired, observed);
    steps.extend(in_the_way.iter().map(|(link, ip)| Step::RemoveNeighbour(*link, *ip)));
    steps.append(&mut changes);

    for (link, address) in desired.addresses.difference(&observed.addresses) {
        steps.push(Step::AddAddress(*link, *address));
    }
    // Only now, or the device would lose its last address and with it every route; and before any route, as the kernel
    // refuses one by way of an address of its own: our former one may be a peer's by now.
    for (link, address) in observed.addresses.difference(&desired.addresses) {
        steps.push(Step::RemoveAddress(*link, *address));
    }
    for (key, remote) in &desired.fdb {
        if observed.fdb.get(key) != Some(remote) {
            steps.push(Step::PutFdb(key.0, key.1, *remote));
        }
    }
    for (key, mac) in &desired.neighbours {
        if observed.neighbours.get(key) != Some(mac) || in_the_way.contains(key) {
            steps.push(Step::PutNeighbour(key.0, key.1, *mac));
        }
    }
    for (key, route) in &desired.routes {
        if observed.routes.get(key) != Some(route) {
            steps.push(Step::PutRoute(*key, *route));
        }
    }

    for key in observed.neighbours.keys() {
        if !desired.neighbours.contains_key(key) && !in_the_way.contains(key) {
            steps.push(Step::RemoveNeighbour(key.0, key.1));
        }
    }
    for key in observed.fdb.keys() {
        if !desired.fdb.contains_key(key) {
            steps.push(Step::RemoveFdb(key.0, key.1));
        }
    }
    steps
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
                steps.push(Step::ChangeLink(*name, should.clone()));
                if is.mac != should.mac {
                    left.get_or_insert_with(|| observed.clone()).drop_neighbours(*name);
                }
            }
            other => {
                steps.push(Step::RemoveLink(*name));
                left.get_or_insert_with(|| observed.clone()).drop_link(*name);
                if let Some(should) = other {
                    steps.push(Step::AddLink(*name, should.clone()));
                }
            }
        }
    }
    for (name, should) in &desired.links {
        if !observed.links.contains_key(name) {
            steps.push(Step::AddLink(*name, should.clone()));
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
        Step::RemoveRoute(key, _) => drop(state.routes.remove(key)),
        Step::RemoveNeighbour(link, ip) => drop(state.neighbours.remove(&(*link, *ip))),
        Step::RemoveFdb(link, mac) => drop(state.fdb.remove(&(*link, *mac))),
        Step::RemoveAddress(link, address) => drop(state.addresses.remove(&(*link, *address))),
        Step::RemoveLink(link) => state.drop_link(*link),
        Step::AddLink(name, link) | Step::ChangeLink(name, link) => {
            let before = state.links.insert(*name, link.clone());
            if before.is_some_and(|before| before.mac != link.mac) {
                state.drop_neighbours(*name);
            }
        }
        Step::AddAddress(link, address) => drop(state.addresses.insert((*link, *address))),
        Step::PutFdb(link, mac, remote) => drop(state.fdb.insert((*link, *mac), *remote)),
        Step::PutNeighbour(link, ip, mac) => drop(state.neighbours.insert((*link, *ip), *mac)),
        Step::PutRoute(key, route) => drop(state.routes.insert(*key, *route)),
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
