//! Short ways to make the values that tests talk about.

use std::net::Ipv4Addr;

use flannel_core::backend::{self, Node};
use flannel_core::claim::Claim;
use flannel_core::lease::{Lease, LeaseAttrs, Subnet, Tenure};
use flannel_core::network::NetworkConfig;
use flannel_core::plan::{Planner, RouteMode};
use flannel_core::state::LinkName;
use flannel_core::underlay::{Facts, Interface, InterfaceAddress, RouteFact, Underlay};
use ipnetwork::IpNetwork;

/// The usual cluster.
pub const VXLAN: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// The same over plain routes.
pub const HOST_GW: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// `10.5.<number>.0/24`.
pub fn subnet(number: u8) -> Subnet {
    Subnet::V4(format!("10.5.{number}.0/24").parse().expect("a prefix"))
}

/// The VXLAN lease of a host: its subnet, the last byte of its MAC and of its address.
pub fn peer(number: u8, mac: u8, host: u8) -> Lease {
    let value = format!(
        r#"{{"PublicIP":"192.168.0.{host}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:00:{mac:02x}"}}}}"#
    );
    lease(subnet(number), &value)
}

/// A lease with that value.
pub fn lease(subnet: Subnet, value: &str) -> Lease {
    Lease { subnet, attrs: LeaseAttrs::from_json(value).expect("a lease value"), tenure: Tenure::Leased }
}

/// A network config.
pub fn config(text: &str) -> NetworkConfig {
    NetworkConfig::parse(text).expect("a network config")
}

/// `name` as an interface name.
pub fn link(name: &str) -> LinkName {
    name.parse().expect("an interface name")
}

/// Host 192.168.0.1 on eth0, a /24 of its own, a default route.
pub fn facts() -> Facts {
    let on = |destination: &str, gateway: Option<&str>| RouteFact {
        destination: destination.parse().expect("a prefix"),
        gateway: gateway.map(|gateway| gateway.parse().expect("an address")),
        link: Some(link("eth0")),
    };
    let address = InterfaceAddress {
        network: "192.168.0.1/24".parse().expect("a prefix"),
        permanent: true,
        temporary: false,
        deprecated: false,
    };
    Facts {
        interfaces: vec![Interface { name: link("eth0"), mtu: 1500, addresses: vec![address] }],
        routes: vec![on("0.0.0.0/0", Some("192.168.0.254")), on("192.168.0.0/24", None)],
        nexthop_objects: true,
        can_reach: None,
    }
}

/// The underlay of that host.
pub fn underlay() -> Underlay {
    Underlay {
        link: link("eth0"),
        mtu: 1500,
        address: Ipv4Addr::new(192, 168, 0, 1),
        public_ip: Ipv4Addr::new(192, 168, 0, 1),
        public_ipv6: None,
        networks: vec!["192.168.0.0/24".parse().expect("a prefix")],
        routes: facts().routes,
    }
}

/// That host with the subnet 10.5.1.0/24, in a cluster of that config.
pub fn planner(config: &NetworkConfig) -> (Planner, Claim) {
    planner_in(config, RouteMode::Auto)
}

/// The same with routes in that form.
pub fn planner_in(config: &NetworkConfig, mode: RouteMode) -> (Planner, Claim) {
    let (backend, _) = backend::from_config(config).expect("a backend");
    let networks: Vec<IpNetwork> = config.networks().collect();
    let underlay = underlay();
    let claim = Claim { links: backend.links(), networks, underlay: Some(underlay.link) };
    let node = Node { pools: config.pools().copied().collect(), underlay, lease: peer(1, 1, 1), mtu: None };
    (Planner::new(backend, node, mode), claim)
}
