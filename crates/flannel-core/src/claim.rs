//! Which objects of the kernel are ours.
//!
//! A fresh process, with no memory, must be able to tell. Each method answers
//! for one kind of object; what no method claims is foreign, neither read into
//! the observed state nor ever removed.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::state::{
    HostState, LinkName, Nexthop, NexthopId, Object, ROUTE_PROTOCOL, ROUTE_PROTOCOL_BOOT, Route, RouteKey,
};

/// How to recognise what is ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// Our devices, by name.
    pub links: Vec<LinkName>,
    /// The cluster's networks, and those of our previous run.
    pub networks: Vec<IpNetwork>,
    /// The interface between the hosts: not ours, but what happens to it concerns us.
    pub underlay: Option<LinkName>,
}

impl Claim {
    /// A device is ours by its name: flannel's contract gives `flannel.<VNI>` to us.
    pub fn owns_link(&self, link: LinkName) -> bool {
        self.links.contains(&link)
    }

    /// An address is ours if it is inside the network and on our device.
    pub fn owns_address(&self, link: LinkName, address: IpNetwork) -> bool {
        self.owns_link(link) && self.contains(address.ip())
    }

    /// Permanent entries on our device are ours, neighbours and FDB alike.
    pub fn owns_entry(&self, link: LinkName) -> bool {
        self.owns_link(link)
    }

    /// A nexthop object is ours if it is on our device and either carries our
    /// protocol or is numbered by an address of the network: nobody else numbers by those.
    pub fn owns_nexthop(&self, id: NexthopId, nexthop: &Nexthop) -> bool {
        let marked = nexthop.protocol == ROUTE_PROTOCOL;
        self.owns_link(nexthop.link) && (marked || self.contains(id.gateway()))
    }

    /// A route is ours if it carries our protocol and either leaves by our
    /// device or leads into the network; or if a Go flanneld left it: no mark
    /// (`boot`), by our device, into the network.
    ///
    /// The network matters because another agent with another network may run
    /// on this host, and because a route added by hand carries `boot` too.
    pub fn owns_route(&self, key: &RouteKey, route: &Route) -> bool {
        let ours = self.owns_link(route.link);
        let inside = self.networks.iter().any(|network| within(*network, key.destination));
        match route.protocol {
            ROUTE_PROTOCOL => ours || inside,
            ROUTE_PROTOCOL_BOOT => ours && inside,
            _ => false,
        }
    }

    /// A route that drops packets is ours if it carries our protocol and our metric and leads into the network.
    pub fn owns_blackhole(&self, key: &RouteKey, protocol: u8) -> bool {
        protocol == ROUTE_PROTOCOL
            && *key == RouteKey::blackhole(key.destination)
            && self.networks.iter().any(|network| within(*network, key.destination))
    }

    /// Whether an object is ours.
    pub fn owns(&self, object: &Object) -> bool {
        match object {
            Object::Link(name, _) => self.owns_link(*name),
            Object::Address(link, address) => self.owns_address(*link, *address),
            Object::Neighbour(link, ..) | Object::Fdb(link, ..) => self.owns_entry(*link),
            Object::Nexthop(id, nexthop) => self.owns_nexthop(*id, nexthop),
            Object::Route(key, route) => self.owns_route(key, route),
            // Others' are never made an object of.
            Object::Blackhole(key) => self.owns_blackhole(key, ROUTE_PROTOCOL),
        }
    }

    /// Leaves only what is ours in `state`.
    pub fn filter(&self, state: &mut HostState) {
        state.links.retain(|link, _| self.owns_link(*link));
        state.addresses.retain(|(link, address)| self.owns_address(*link, *address));
        state.neighbours.retain(|(link, _), _| self.owns_entry(*link));
        state.fdb.retain(|(link, _), _| self.owns_entry(*link));
        state.nexthops.retain(|id, nexthop| self.owns_nexthop(*id, nexthop));
        state.routes.retain(|key, route| self.owns_route(key, route));
        state.blackholes.retain(|key| self.owns_blackhole(key, ROUTE_PROTOCOL));
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(address))
    }
}

/// Whether `inner` lies within `outer`.
pub fn within(outer: IpNetwork, inner: IpNetwork) -> bool {
    inner.prefix() >= outer.prefix() && outer.contains(inner.ip())
}

/// Whether two prefixes have an address in common.
pub fn overlap(one: IpNetwork, other: IpNetwork) -> bool {
    one.contains(other.network()) || other.contains(one.network())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim() -> Claim {
        Claim {
            links: vec![name("flannel.1")],
            networks: vec!["10.5.0.0/16".parse().unwrap()],
            underlay: None,
        }
    }

    fn name(text: &str) -> LinkName {
        text.parse().unwrap()
    }

    fn owns(destination: &str, link: &str, protocol: u8) -> bool {
        let key = RouteKey::to(destination.parse().unwrap());
        let route = Route {
            link: name(link),
            gateway: None,
            onlink: true,
            protocol,
            decorated: false,
            nexthop: None,
        };
        claim().owns_route(&key, &route)
    }

    #[test]
    fn a_route_of_our_protocol_is_ours_on_our_device_and_into_our_network() {
        assert!(owns("10.5.3.0/24", "flannel.1", ROUTE_PROTOCOL));
        assert!(owns("10.5.3.0/24", "eth0", ROUTE_PROTOCOL));
        assert!(owns("10.9.3.0/24", "flannel.1", ROUTE_PROTOCOL));
    }

    #[test]
    fn a_route_of_another_agent_on_this_host_is_not_ours() {
        assert!(!owns("10.9.3.0/24", "eth0", ROUTE_PROTOCOL));
    }

    #[test]
    fn an_unmarked_route_is_ours_only_on_our_device_and_into_our_network() {
        assert!(owns("10.5.3.0/24", "flannel.1", ROUTE_PROTOCOL_BOOT));
        assert!(!owns("10.5.3.0/24", "eth0", ROUTE_PROTOCOL_BOOT));
        assert!(!owns("172.16.0.0/12", "flannel.1", ROUTE_PROTOCOL_BOOT));
        assert!(!owns("0.0.0.0/0", "flannel.1", ROUTE_PROTOCOL_BOOT));
    }

    #[test]
    fn a_route_of_any_other_protocol_is_not_ours() {
        assert!(!owns("10.5.3.0/24", "flannel.1", 4));
    }

    #[test]
    fn a_blackhole_is_ours_by_our_protocol_our_metric_and_the_network() {
        let key = |text: &str| RouteKey::blackhole(text.parse().unwrap());

        assert!(claim().owns_blackhole(&key("10.5.1.0/24"), ROUTE_PROTOCOL));
        assert!(!claim().owns_blackhole(&key("10.5.1.0/24"), ROUTE_PROTOCOL_BOOT));
        assert!(!claim().owns_blackhole(&RouteKey::to("10.5.1.0/24".parse().unwrap()), ROUTE_PROTOCOL));
        assert!(!claim().owns_blackhole(&key("10.9.1.0/24"), ROUTE_PROTOCOL));
    }

    #[test]
    fn an_address_outside_the_network_is_not_ours() {
        assert!(claim().owns_address(name("flannel.1"), "10.5.3.0/32".parse().unwrap()));
        assert!(!claim().owns_address(name("flannel.1"), "172.16.0.1/32".parse().unwrap()));
        assert!(!claim().owns_address(name("eth0"), "10.5.3.1/32".parse().unwrap()));
    }
}
