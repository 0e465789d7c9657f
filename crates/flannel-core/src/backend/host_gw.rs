//! One plain route per peer, over the network that the hosts share
//! (`pkg/backend/hostgw`, `pkg/backend/route_network.go`).

use super::{Backend, Node, reachable_parts};
use crate::lease::{Lease, LeaseAttrs};
use crate::state::{HostState, LinkName, MacAddr, Object, ROUTE_PROTOCOL, Route, RouteKey};
use crate::underlay::Underlay;

/// Routes by way of the peers' own addresses.
#[derive(Clone, Copy, Debug)]
pub struct HostGw;

impl Backend for HostGw {
    fn kind(&self) -> &'static str {
        "host-gw"
    }

    fn links(&self) -> Vec<LinkName> {
        vec![]
    }

    fn mtu(&self, node: &Node) -> u32 {
        node.underlay.mtu
    }

    fn check(&self, underlay: &Underlay) -> Result<(), String> {
        if underlay.public_ip == underlay.address {
            return Ok(());
        }
        Err(format!(
            "host-gw needs the public address to be that of the interface: {} is not {} of {}; leave --public-ip out, \
             or use the vxlan backend",
            underlay.public_ip, underlay.address, underlay.link
        ))
    }

    fn attributes(&self, underlay: &Underlay, _observed: &HostState, _random: MacAddr) -> LeaseAttrs {
        underlay.attributes("host-gw")
    }

    fn plan_node(&self, _node: &Node) -> HostState {
        HostState::default()
    }

    fn plan_peer(&self, node: &Node, peer: &Lease) -> Result<Vec<Object>, String> {
        let to = |(subnet, address)| {
            // Whether the address is a neighbour is the kernel's to judge: it refuses a gateway that is not.
            let route = Route {
                link: node.underlay.link,
                gateway: Some(address),
                onlink: false,
                protocol: ROUTE_PROTOCOL,
                decorated: false,
                nexthop: None,
            };
            Object::Route(RouteKey::to(subnet), route)
        };
        Ok(reachable_parts(node, peer, self.kind())?.into_iter().map(to).collect())
    }
}
