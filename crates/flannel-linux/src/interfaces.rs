//! What the choice of the underlay needs to know about this host.

use std::collections::HashMap;
use std::net::IpAddr;

use flannel_core::state::{LinkName, ROUTE_PROTOCOL};
use flannel_core::underlay::{Facts, Interface, InterfaceAddress, RouteFact};
use rtnetlink::packet_route::AddressFamily;

use crate::netlink::address;
use crate::netlink::link::SeenLink;
use crate::netlink::route::{self, SeenRoute};
use crate::netlink::socket::{Kernel, NetlinkError};

/// Interfaces, foreign routes, and the way to `can_reach` if that was asked; the
/// rest of the facts is for others to add.
pub(crate) fn facts(
    kernel: &mut Kernel,
    links: &[SeenLink],
    routes: &[SeenRoute],
    can_reach: Option<IpAddr>,
) -> Result<Facts, NetlinkError> {
    let names: HashMap<u32, LinkName> = links.iter().map(|link| (link.index, link.name)).collect();

    let mut addresses: HashMap<u32, Vec<InterfaceAddress>> = HashMap::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for (index, own) in address::list(kernel, family, None)? {
            addresses.entry(index).or_default().push(own);
        }
    }
    let routes = routes.iter().filter(|seen| seen.unicast && seen.protocol != ROUTE_PROTOCOL);
    let routes = routes.filter_map(|seen| {
        let link = seen.link.filter(|_| !seen.several).and_then(|index| names.get(&index).copied());
        let fact = RouteFact { destination: seen.key.destination, gateway: seen.gateway, link };
        (!link.is_some_and(is_of_flannel)).then_some(fact)
    });
    let routes = routes.collect();

    let can_reach = match can_reach {
        None => None,
        Some(target) => Some(match route::towards(kernel, target)? {
            Ok((index, source)) => match names.get(&index) {
                Some(name) => Ok((*name, source)),
                None => Err(format!("the interface towards {target} is gone")),
            },
            Err(reason) => Err(reason),
        }),
    };
    let interfaces = links.iter().map(|link| Interface {
        name: link.name,
        mtu: link.mtu,
        addresses: addresses.remove(&link.index).unwrap_or_default(),
    });
    Ok(Facts { interfaces: interfaces.collect(), routes, can_reach, nexthop_objects: false })
}

/// Whether a flannel, this one or another, made the device; what it leads to
/// says nothing about the network between the hosts.
fn is_of_flannel(link: LinkName) -> bool {
    link.as_str().starts_with("flannel.") || link.as_str().starts_with("flannel-v6.")
}
