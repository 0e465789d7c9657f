//! What the choice of the underlay needs to know about this host.

use std::collections::HashMap;
use std::net::IpAddr;

use flannel_core::state::{LinkName, ROUTE_PROTOCOL};
use flannel_core::underlay::{Facts, Interface, InterfaceAddress, RouteFact};
use rtnetlink::packet_route::AddressFamily;

use crate::netlink::route::Filter;
use crate::netlink::socket::{Kernel, NetlinkError};
use crate::netlink::{address, link, route};

/// Interfaces, foreign routes, and the way to `can_reach` if that was asked.
pub(crate) fn facts(kernel: &mut Kernel, can_reach: Option<IpAddr>) -> Result<Facts, NetlinkError> {
    let links = link::all(kernel)?;
    let names: HashMap<u32, LinkName> = links.iter().map(|link| (link.index, link.name)).collect();

    let mut addresses: HashMap<u32, Vec<InterfaceAddress>> = HashMap::new();
    let mut routes = vec![];
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for (index, own) in address::list(kernel, family, None)? {
            addresses.entry(index).or_default().push(own);
        }
        for seen in route::list(kernel, family, Filter::default())? {
            let link = seen.link.and_then(|index| names.get(&index).copied());
            if seen.protocol == ROUTE_PROTOCOL || link.is_some_and(is_of_flannel) {
                continue;
            }
            routes.push(RouteFact { destination: seen.key.destination, gateway: seen.gateway, link });
        }
    }

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
    Ok(Facts { interfaces: interfaces.collect(), routes, can_reach })
}

/// Whether a flannel, this one or another, made the device; what it leads to
/// says nothing about the network between the hosts.
fn is_of_flannel(link: LinkName) -> bool {
    link.as_str().starts_with("flannel.") || link.as_str().starts_with("flannel-v6.")
}
