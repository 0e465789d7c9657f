//! Which interface the hosts reach each other by.
//!
//! The rules are flannel's (`pkg/ipmatch/match.go`): the flags in a fixed order
//! of precedence, a candidate that does not fit is passed over, and without any
//! flag the default route decides. The choice comes with its reason and a
//! refusal with what there was to choose from, both for the log.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use thiserror::Error;

use crate::claim::{Claim, overlap, within};
use crate::lease::LeaseAttrs;
use crate::state::LinkName;

/// What the kernel knows about interfaces and the way to other hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// In the order of their indexes.
    pub interfaces: Vec<Interface>,
    /// Unicast routes of the main table that no flannel made, in the kernel's order.
    pub routes: Vec<RouteFact>,
    /// Whether the kernel has nexthop objects (Linux 5.3).
    pub nexthop_objects: bool,
    /// The answer to `--iface-can-reach`, if it was asked: the interface and
    /// the source address the kernel would use, or why there is none.
    pub can_reach: Option<Result<(LinkName, IpAddr), String>>,
}

/// An interface and its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: LinkName,
    /// In bytes.
    pub mtu: u32,
    /// In the kernel's order.
    pub addresses: Vec<InterfaceAddress>,
}

impl Interface {
    /// The networks in which it has an address, in order. An address without a
    /// network of its own, as that of a virtual router that comes and goes, adds
    /// none to the one that it lies in.
    fn networks(&self) -> Vec<IpNetwork> {
        let mut networks: Vec<IpNetwork> =
            self.addresses.iter().filter_map(|own| masked(own.network)).collect();
        networks.sort_unstable();
        networks.dedup();
        let all = networks.clone();
        let is_host = |network: &IpNetwork| network.prefix() == if network.is_ipv4() { 32 } else { 128 };
        let lies_in_another =
            |network: &IpNetwork| all.iter().any(|other| other != network && within(*other, *network));
        networks.retain(|network| !is_host(network) || !lies_in_another(network));
        networks
    }
}

/// The prefix without its host bits.
fn masked(network: IpNetwork) -> Option<IpNetwork> {
    IpNetwork::new(network.network(), network.prefix()).ok()
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// With the prefix of its network.
    pub network: IpNetwork,
    /// Whether it stays until it is taken away (`IFA_F_PERMANENT`).
    pub permanent: bool,
    /// Whether it is a privacy address (`IFA_F_TEMPORARY`), or a second one of its IPv4 network.
    pub temporary: bool,
    /// Whether new connections should not use it (`IFA_F_DEPRECATED`).
    pub deprecated: bool,
}

/// A unicast route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteFact {
    /// Where to.
    pub destination: IpNetwork,
    /// The next hop; `None` if the destination is on the link itself.
    pub gateway: Option<IpAddr>,
    /// The interface; `None` for a route over several.
    pub link: Option<LinkName>,
}

/// A regular expression, compiled by somebody who has an engine for it.
#[derive(Clone)]
pub struct Pattern {
    /// As it was written.
    pub text: String,
    /// Whether it matches anywhere in a text.
    pub matches: Arc<dyn Fn(&str) -> bool + Send + Sync>,
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

/// What the operator asked for.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// `--iface`, in order: names or addresses.
    pub interfaces: Vec<String>,
    /// `--iface-regex`, in order.
    pub patterns: Vec<Pattern>,
    /// `--iface-can-reach`.
    pub can_reach: Option<IpAddr>,
    /// `--public-ip`.
    pub public_ip: Option<Ipv4Addr>,
}

/// The interface between the hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// Its name.
    pub link: LinkName,
    /// In bytes.
    pub mtu: u32,
    /// Its own address: the source of what we send.
    pub address: Ipv4Addr,
    /// What peers are told to send to; differs behind NAT.
    pub public_ip: Ipv4Addr,
    /// What peers with IPv6 are told to send to.
    pub public_ipv6: Option<Ipv6Addr>,
    /// The networks in which the interface has an address: no peer may take them away.
    pub networks: Vec<IpNetwork>,
    /// Which peers stand on a network that we share.
    pub routes: Vec<RouteFact>,
}

impl Underlay {
    /// The address that peers are told.
    pub fn public_address(&self) -> IpAddr {
        IpAddr::V4(self.public_ip)
    }

    /// What any backend publishes about this host, without data of its own.
    pub fn attributes(&self, backend_type: &'static str) -> LeaseAttrs {
        LeaseAttrs {
            public_ip: Some(self.public_ip),
            public_ipv6: self.public_ipv6,
            backend_type: Cow::Borrowed(backend_type),
            backend_data: None,
            backend_v6_data: None,
        }
    }

    /// The interface on whose own network `address` lies: the most specific
    /// route to it has no next hop.
    pub fn attached(&self, address: IpAddr) -> Option<LinkName> {
        let to = self.routes.iter().filter(|route| route.destination.contains(address));
        // Of equally specific routes the kernel takes the first.
        let best = to.rev().max_by_key(|route| route.destination.prefix())?;
        best.link.filter(|_| best.gateway.is_none())
    }
}

/// Why an underlay was chosen, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The choice.
    pub underlay: Underlay,
    /// Why this one, as a phrase.
    pub reason: String,
    /// What was passed over on the way, one sentence each.
    pub passed_over: Vec<String>,
}

/// No interface fits what was asked. It helps to change the flags or the host.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("no interface fits: {}; the host has {candidates}", .tried.join("; "))]
pub struct NoUnderlay {
    /// What was asked for and why it failed, one phrase each.
    pub tried: Vec<String>,
    /// The interfaces and their addresses.
    pub candidates: String,
}

/// Chooses by the flags, or by the default route where there are none.
///
/// # Errors
/// Nothing fits; the error lists what was tried and what there is.
pub fn choose(facts: &Facts, selection: &Selection) -> Result<Chosen, NoUnderlay> {
    let mut tried = Vec::new();
    for rule in rules(selection) {
        match rule.find(facts).and_then(|found| found.finish(facts, selection)) {
            Ok(underlay) => {
                return Ok(Chosen { underlay, reason: rule.to_string(), passed_over: tried });
            }
            Err(reason) => tried.push(format!("{rule}: {reason}")),
        }
    }
    Err(NoUnderlay { tried, candidates: candidates(facts) })
}

/// Where a host stands now that stood at `current`: where it would choose to
/// stand, but by the address that it has for as long as the interface has that.
///
/// # Errors
/// Nothing fits just now, or nothing but a link-local address, as a DHCP client
/// gives when nobody answers it.
pub fn follow(facts: &Facts, selection: &Selection, current: &Underlay) -> Result<Underlay, NoUnderlay> {
    let chosen = choose(facts, selection)?.underlay;
    let interface = facts.interfaces.iter().find(|interface| interface.name == chosen.link);
    let better = |address: &Ipv4Addr| *address == current.address && !address.is_link_local();
    if chosen.link == current.link
        && interface.is_some_and(|interface| usable(interface).any(|own| better(&own)))
    {
        // A second address, of a virtual router say, is no reason to move.
        let public_ip = selection.public_ip.unwrap_or(current.address);
        return Ok(Underlay { address: current.address, public_ip, ..chosen });
    }
    if chosen.address.is_link_local() && !current.address.is_link_local() {
        let tried = vec![format!("{} has nothing but {} left", chosen.link, chosen.address)];
        return Err(NoUnderlay { tried, candidates: candidates(facts) });
    }
    Ok(chosen)
}

/// Whether an address stands alone, without a network, as that of a virtual
/// router does while it is on this host.
pub fn is_alone(facts: &Facts, address: Ipv4Addr) -> bool {
    let all = facts.interfaces.iter().flat_map(|interface| &interface.addresses);
    all.filter(|own| own.network.ip() == IpAddr::V4(address)).all(|own| own.network.prefix() == 32)
}

/// Where the cluster's `networks` and this host's own stand on the same ground,
/// one phrase each: such addresses mean one thing here and another in the cluster.
///
/// What is ours is no collision: the devices of `claim`, and what lies in
/// `subnets`, ours now or in an earlier run, where docker's bridge has its
/// address. Nor is a route into the networks by way of some host, which an
/// earlier flanneld may have left.
pub fn collisions(
    facts: &Facts,
    underlay: &Underlay,
    networks: &[IpNetwork],
    claim: &Claim,
    subnets: &[IpNetwork],
) -> Vec<String> {
    const MOST: usize = 10;
    let is_own = |network: IpNetwork| subnets.iter().any(|subnet| within(*subnet, network));
    let mut phrases = Vec::new();
    let mut told = BTreeSet::new();
    for interface in facts.interfaces.iter().filter(|interface| !claim.owns_link(interface.name)) {
        for own in interface.addresses.iter().filter_map(|own| masked(own.network)) {
            let Some(network) = networks.iter().find(|network| overlap(**network, own)) else { continue };
            if is_own(own) || !told.insert((interface.name, own)) {
                continue;
            }
            let what = format!("{own}, where {} has an address, {}", interface.name, lies(own, *network));
            phrases.push(if interface.name == underlay.link {
                format!("{what}: peers with a public address there, or a subnet, are left out")
            } else {
                what
            });
        }
    }
    for route in &facts.routes {
        let Some(link) = route.link.filter(|link| !claim.owns_link(*link)) else { continue };
        let destination = route.destination;
        let Some(network) = networks.iter().find(|network| overlap(**network, destination)) else { continue };
        let by_some_host = route.gateway.is_some() && within(*network, destination);
        let is_default = destination.prefix() == 0;
        if is_default || by_some_host || is_own(destination) || !told.insert((link, destination)) {
            continue;
        }
        phrases.push(format!(
            "{destination}, to which a route leads by {link}, {}",
            lies(destination, *network)
        ));
    }
    let more = phrases.len().saturating_sub(MOST);
    if more > 0 {
        phrases.truncate(MOST);
        phrases.push(format!("{more} more interfaces or routes overlap the network"));
    }
    phrases
}

/// How a prefix of this host stands to a network that it overlaps.
fn lies(own: IpNetwork, network: IpNetwork) -> String {
    if within(network, own) { format!("lies in {network}") } else { format!("contains {network}") }
}

/// One way to look an interface up.
enum Rule<'a> {
    Address(IpAddr, &'static str),
    Name(&'a str),
    Pattern(&'a Pattern),
    CanReach(IpAddr),
    DefaultRoute,
}

impl fmt::Display for Rule<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address, flag) => write!(f, "{flag} {address}"),
            Self::Name(name) => write!(f, "--iface {name}"),
            Self::Pattern(pattern) => write!(f, "--iface-regex {}", pattern.text),
            Self::CanReach(address) => write!(f, "--iface-can-reach {address}"),
            Self::DefaultRoute => f.write_str("the default route"),
        }
    }
}

fn rules(selection: &Selection) -> Vec<Rule<'_>> {
    let interfaces = selection.interfaces.iter().map(|interface| match interface.parse() {
        Ok(address) => Rule::Address(address, "--iface"),
        Err(_) => Rule::Name(interface),
    });
    let mut rules: Vec<Rule<'_>> = interfaces.collect();
    rules.extend(selection.patterns.iter().map(Rule::Pattern));
    rules.extend(selection.can_reach.map(Rule::CanReach));
    if rules.is_empty() {
        let by_public_ip = |ip: Ipv4Addr| Rule::Address(ip.into(), "--public-ip");
        rules.push(selection.public_ip.map_or(Rule::DefaultRoute, by_public_ip));
    }
    rules
}

/// An interface, and its address where the lookup has decided that too.
struct Found<'a> {
    interface: &'a Interface,
    address: Option<Ipv4Addr>,
}

impl Rule<'_> {
    fn find<'a>(&self, facts: &'a Facts) -> Result<Found<'a>, String> {
        let named = |name: LinkName| facts.interfaces.iter().find(|interface| interface.name == name);
        match self {
            Self::Address(IpAddr::V6(_), _) => {
                Err("an IPv6 address cannot choose for an IPv4 network".into())
            }
            Self::Address(IpAddr::V4(address), _) => {
                let has = |interface: &&Interface| {
                    interface.addresses.iter().any(|own| own.network.ip() == IpAddr::V4(*address))
                };
                let interface = facts.interfaces.iter().find(has).ok_or(
                    "no interface has this address (behind NAT, say with --iface which one to send from)",
                )?;
                Ok(Found { interface, address: Some(*address) })
            }
            Self::Name(name) => {
                let interface = name.parse().ok().and_then(named).ok_or("there is no such interface")?;
                Ok(Found { interface, address: None })
            }
            Self::Pattern(pattern) => {
                for interface in &facts.interfaces {
                    let matching = usable(interface).find(|address| (pattern.matches)(&address.to_string()));
                    if let Some(address) = matching {
                        return Ok(Found { interface, address: Some(address) });
                    }
                }
                let by_name = |interface: &&Interface| (pattern.matches)(interface.name.as_str());
                let interface =
                    facts.interfaces.iter().find(by_name).ok_or("it matches no address and no name")?;
                Ok(Found { interface, address: None })
            }
            Self::CanReach(_) => {
                let (name, source) = match &facts.can_reach {
                    Some(Ok(answer)) => *answer,
                    Some(Err(reason)) => return Err(reason.clone()),
                    None => return Err("the kernel was not asked".into()),
                };
                let interface = named(name).ok_or_else(|| format!("{name} is gone"))?;
                let IpAddr::V4(address) = source else {
                    return Err(format!("the way there has the IPv6 source {source}"));
                };
                Ok(Found { interface, address: Some(address) })
            }
            Self::DefaultRoute => {
                let is_default =
                    |route: &&RouteFact| route.destination.prefix() == 0 && route.destination.is_ipv4();
                let route = facts.routes.iter().find(is_default).ok_or(
                    "there is no IPv4 default route; say which interface with --iface, --iface-regex or --public-ip",
                )?;
                let interface =
                    route.link.and_then(named).ok_or("the default route leads over no single interface")?;
                Ok(Found { interface, address: None })
            }
        }
    }
}

impl Found<'_> {
    fn finish(self, facts: &Facts, selection: &Selection) -> Result<Underlay, String> {
        let Self { interface, address } = self;
        let address = match address.or_else(|| usable(interface).next()) {
            Some(address) => address,
            None => return Err(format!("{} has no usable IPv4 address", interface.name)),
        };
        if interface.mtu == 0 {
            return Err(format!("the MTU of {} is 0", interface.name));
        }
        Ok(Underlay {
            link: interface.name,
            mtu: interface.mtu,
            address,
            public_ip: selection.public_ip.unwrap_or(address),
            public_ipv6: None,
            networks: interface.networks(),
            routes: facts.routes.clone(),
        })
    }
}

/// The addresses of an interface that may be published, best first: global
/// before link-local, permanent before others, lasting before temporary.
fn usable(interface: &Interface) -> impl Iterator<Item = Ipv4Addr> {
    let mut all: Vec<(Ipv4Addr, &InterfaceAddress)> = interface
        .addresses
        .iter()
        .filter_map(|own| match own.network.ip() {
            IpAddr::V4(v4) => Some((v4, own)),
            IpAddr::V6(_) => None,
        })
        .filter(|(address, own)| {
            let one_host = !address.is_loopback()
                && !address.is_multicast()
                && !address.is_unspecified()
                && !address.is_broadcast();
            one_host && !own.deprecated
        })
        .collect();
    all.sort_by_key(|(address, own)| (address.is_link_local(), !own.permanent, own.temporary));
    all.into_iter().map(|(address, _)| address)
}

fn candidates(facts: &Facts) -> String {
    let shown = facts.interfaces.iter().map(|interface| {
        let addresses: Vec<String> =
            interface.addresses.iter().map(|address| address.network.to_string()).collect();
        let addresses = if addresses.is_empty() { "no address".into() } else { addresses.join(", ") };
        format!("{} ({addresses})", interface.name)
    });
    let shown: Vec<String> = shown.collect();
    if shown.is_empty() { "no interfaces".into() } else { shown.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> LinkName {
        text.parse().unwrap()
    }

    fn address(text: &str) -> InterfaceAddress {
        InterfaceAddress {
            network: text.parse().unwrap(),
            permanent: true,
            temporary: false,
            deprecated: false,
        }
    }

    fn interface(named: &str, addresses: &[&str]) -> Interface {
        Interface {
            name: name(named),
            mtu: 1500,
            addresses: addresses.iter().map(|text| address(text)).collect(),
        }
    }

    fn route(destination: &str, gateway: Option<&str>, link: &str) -> RouteFact {
        RouteFact {
            destination: destination.parse().unwrap(),
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            link: Some(name(link)),
        }
    }

    fn facts() -> Facts {
        Facts {
            interfaces: vec![
                interface("lo", &["127.0.0.1/8"]),
                interface("eth0", &["10.0.2.15/24", "fd00::15/64"]),
                interface("eth1", &["192.168.56.11/24", "192.168.56.12/24"]),
                interface("eth2", &[]),
            ],
            routes: vec![
                route("0.0.0.0/0", Some("10.0.2.2"), "eth0"),
                route("10.0.2.0/24", None, "eth0"),
                route("192.168.56.0/24", None, "eth1"),
            ],
            nexthop_objects: true,
            can_reach: None,
        }
    }

    fn pattern(text: &'static str) -> Pattern {
        Pattern { text: text.into(), matches: Arc::new(move |candidate| candidate.contains(text)) }
    }

    fn choice(selection: &Selection) -> (String, String, String) {
        let chosen = choose(&facts(), selection).unwrap();
        (chosen.underlay.link.to_string(), chosen.underlay.address.to_string(), chosen.reason)
    }

    fn refusal(facts: &Facts, selection: &Selection) -> String {
        choose(facts, selection).unwrap_err().to_string()
    }

    fn by_interface(interface: &str) -> Selection {
        Selection { interfaces: vec![interface.into()], ..Selection::default() }
    }

    #[test]
    fn without_flags_the_default_route_decides() {
        let expected = ("eth0".into(), "10.0.2.15".into(), "the default route".into());

        assert_eq!(choice(&Selection::default()), expected);
    }

    #[test]
    fn a_public_ip_alone_chooses_the_interface_that_has_it() {
        let selection =
            Selection { public_ip: Some(Ipv4Addr::new(192, 168, 56, 12)), ..Selection::default() };

        assert_eq!(
            choice(&selection),
            ("eth1".into(), "192.168.56.12".into(), "--public-ip 192.168.56.12".into())
        );
    }

    #[test]
    fn a_public_ip_beside_another_flag_is_only_published() {
        let selection = Selection { public_ip: Some(Ipv4Addr::new(203, 0, 113, 7)), ..by_interface("eth1") };

        let underlay = choose(&facts(), &selection).unwrap().underlay;

        assert_eq!(underlay.address, Ipv4Addr::new(192, 168, 56, 11));
        assert_eq!(underlay.public_ip, Ipv4Addr::new(203, 0, 113, 7));
    }

    #[test]
    fn an_interface_is_chosen_by_name_or_by_any_of_its_addresses() {
        assert_eq!(choice(&by_interface("eth1")).1, "192.168.56.11");
        assert_eq!(choice(&by_interface("192.168.56.12")).1, "192.168.56.12");
        assert_eq!(choice(&by_interface("127.0.0.1")).0, "lo");
    }

    #[test]
    fn a_candidate_that_does_not_fit_is_passed_over_and_told() {
        let selection = Selection {
            interfaces: vec!["eth9".into(), "eth2".into(), "eth1".into()],
            ..Selection::default()
        };

        let chosen = choose(&facts(), &selection).unwrap();

        assert_eq!(chosen.reason, "--iface eth1");
        assert_eq!(
            chosen.passed_over,
            ["--iface eth9: there is no such interface", "--iface eth2: eth2 has no usable IPv4 address"]
        );
    }

    #[test]
    fn a_pattern_is_tried_on_all_addresses_before_any_name() {
        let by = |text| Selection { patterns: vec![pattern(text)], ..Selection::default() };

        assert_eq!(choice(&by("56.12")).1, "192.168.56.12");
        assert_eq!(choice(&by("eth1")).1, "192.168.56.11");
        assert_eq!(choice(&by("10.")).0, "eth0");
    }

    #[test]
    fn interfaces_come_before_patterns_and_patterns_before_reach() {
        let selection = Selection {
            interfaces: vec!["eth9".into()],
            patterns: vec![pattern("eth8"), pattern("eth1")],
            can_reach: Some("10.0.2.2".parse().unwrap()),
            public_ip: None,
        };

        assert_eq!(choice(&selection).2, "--iface-regex eth1");
    }

    #[test]
    fn reach_takes_the_kernel_s_interface_and_source() {
        let selection =
            Selection { can_reach: Some("192.168.56.99".parse().unwrap()), ..Selection::default() };
        let mut facts = facts();
        facts.can_reach = Some(Ok((name("eth1"), "192.168.56.12".parse().unwrap())));

        assert_eq!(choose(&facts, &selection).unwrap().underlay.address, Ipv4Addr::new(192, 168, 56, 12));

        facts.can_reach = Some(Err("Network is unreachable".into()));
        let refusal = refusal(&facts, &selection);
        assert!(refusal.contains("--iface-can-reach 192.168.56.99: Network is unreachable"), "{refusal}");
    }

    #[test]
    fn the_better_address_of_an_interface_is_taken() {
        let mut facts = facts();
        facts.interfaces[1].addresses = vec![
            address("169.254.3.4/16"),
            InterfaceAddress { deprecated: true, ..address("10.0.2.1/24") },
            InterfaceAddress { temporary: true, ..address("10.0.2.2/24") },
            InterfaceAddress { permanent: false, ..address("10.0.2.3/24") },
            address("10.0.2.4/24"),
        ];

        let underlay = choose(&facts, &Selection::default()).unwrap().underlay;

        assert_eq!(underlay.address, Ipv4Addr::new(10, 0, 2, 4));
    }

    fn followed(facts: &Facts, selection: &Selection) -> (String, String) {
        let current = choose(&super::tests::facts(), selection).unwrap().underlay;
        let now = follow(facts, selection, &current).unwrap();
        (now.link.to_string(), now.public_ip.to_string())
    }

    #[test]
    fn a_host_keeps_its_address_beside_a_better_one() {
        let mut facts = facts();
        facts.interfaces[1].addresses[0].permanent = false;
        facts.interfaces[1].addresses.insert(0, address("10.0.2.99/24"));

        assert_eq!(followed(&facts, &Selection::default()), ("eth0".into(), "10.0.2.15".into()));
    }

    #[test]
    fn a_host_does_not_move_to_an_address_without_a_router_and_leaves_one_at_once() {
        let mut facts = facts();
        let current = choose(&facts, &Selection::default()).unwrap().underlay;
        facts.interfaces[1].addresses = vec![address("169.254.3.4/16")];
        let lost = follow(&facts, &Selection::default(), &current).unwrap_err().to_string();
        assert!(lost.contains("eth0 has nothing but 169.254.3.4 left"), "{lost}");

        let stranded = Underlay { address: [169, 254, 3, 4].into(), ..current };
        facts.interfaces[1].addresses.push(address("10.0.2.15/24"));
        let now = follow(&facts, &Selection::default(), &stranded).unwrap();
        assert_eq!(now.address, Ipv4Addr::new(10, 0, 2, 15));
    }

    #[test]
    fn a_host_follows_its_interface_to_another_address() {
        let mut facts = facts();
        facts.interfaces[1].addresses = vec![address("10.0.2.99/24")];

        assert_eq!(followed(&facts, &Selection::default()), ("eth0".into(), "10.0.2.99".into()));
    }

    #[test]
    fn a_host_follows_the_default_route_to_another_interface() {
        let mut facts = facts();
        facts.routes[0] = route("0.0.0.0/0", Some("192.168.56.1"), "eth1");

        assert_eq!(followed(&facts, &Selection::default()), ("eth1".into(), "192.168.56.11".into()));
    }

    #[test]
    fn a_public_ip_stays_whatever_the_address() {
        let public_ip = Some(Ipv4Addr::new(203, 0, 113, 7));
        let selection = Selection { public_ip, ..by_interface("eth0") };
        let mut facts = facts();
        facts.interfaces[1].addresses = vec![address("10.0.2.99/24")];

        assert_eq!(followed(&facts, &selection), ("eth0".into(), "203.0.113.7".into()));
    }

    #[test]
    fn a_refusal_lists_what_was_tried_and_what_there_is() {
        let mut facts = facts();
        facts.routes.clear();

        assert_eq!(
            refusal(&facts, &Selection::default()),
            "no interface fits: the default route: there is no IPv4 default route; say which interface with --iface, \
             --iface-regex or --public-ip; the host has lo (127.0.0.1/8), eth0 (10.0.2.15/24, fd00::15/64), \
             eth1 (192.168.56.11/24, 192.168.56.12/24), eth2 (no address)"
        );
    }

    #[test]
    fn the_networks_of_an_interface_are_those_it_has_an_address_in() {
        let networks = |addresses: &[&str]| {
            let shown = |network: IpNetwork| network.to_string();
            interface("eth0", addresses).networks().into_iter().map(shown).collect::<Vec<_>>()
        };

        assert_eq!(networks(&["10.1.0.7/24", "fd00::7/64", "10.1.0.8/24"]), ["10.1.0.0/24", "fd00::/64"]);
        assert_eq!(networks(&["10.1.0.7/24", "10.1.0.99/32", "10.9.0.1/32"]), ["10.1.0.0/24", "10.9.0.1/32"]);
        assert_eq!(networks(&["10.1.0.7/16", "10.1.0.8/24"]), ["10.1.0.0/16", "10.1.0.0/24"]);
        let underlay = choose(&facts(), &by_interface("eth1")).unwrap().underlay;
        assert_eq!(underlay.networks, ["192.168.56.0/24".parse().unwrap()]);
    }

    #[test]
    fn an_address_that_comes_beside_the_first_is_known_and_no_reason_to_move() {
        let current = choose(&facts(), &Selection::default()).unwrap().underlay;
        let mut facts = facts();
        facts.interfaces[1].addresses.push(address("10.9.0.5/16"));

        let now = follow(&facts, &Selection::default(), &current).unwrap();

        assert_eq!(now.address, current.address);
        assert!(now.networks.contains(&"10.9.0.0/16".parse().unwrap()), "{:?}", now.networks);
    }

    fn colliding(facts: &Facts, network: &str, subnet: &str) -> Vec<String> {
        let underlay = choose(facts, &Selection::default()).unwrap().underlay;
        let claim = Claim { links: vec![name("flannel.1")], ..Claim::default() };
        collisions(facts, &underlay, &[network.parse().unwrap()], &claim, &[subnet.parse().unwrap()])
    }

    #[test]
    fn a_network_on_the_host_s_own_ground_is_told_with_interface_and_prefix() {
        let mut facts = facts();
        facts.routes.push(route("10.0.0.0/8", Some("10.0.2.2"), "eth0"));
        facts.routes.push(route("10.8.0.0/16", None, "tun0"));

        assert_eq!(
            colliding(&facts, "10.0.0.0/12", "10.5.1.0/24"),
            [
                "10.0.2.0/24, where eth0 has an address, lies in 10.0.0.0/12: peers with a public address there, or a \
                 subnet, are left out",
                "10.0.0.0/8, to which a route leads by eth0, contains 10.0.0.0/12",
                "10.8.0.0/16, to which a route leads by tun0, lies in 10.0.0.0/12",
            ]
        );
        assert_eq!(
            colliding(&facts, "192.168.56.128/25", "192.168.56.160/27"),
            ["192.168.56.0/24, where eth1 has an address, contains 192.168.56.128/25"]
        );
    }

    #[test]
    fn what_is_ours_or_was_left_by_an_earlier_run_is_no_collision() {
        let mut facts = facts();
        facts.interfaces.push(interface("docker0", &["10.5.1.1/24"]));
        facts.interfaces.push(interface("flannel.1", &["10.5.1.0/32"]));
        facts.routes.push(route("10.5.1.0/24", None, "docker0"));
        facts.routes.push(route("10.5.2.0/24", Some("10.0.2.16"), "eth0"));

        assert_eq!(colliding(&facts, "10.5.0.0/16", "10.5.1.0/24"), [""; 0]);
    }

    #[test]
    fn of_many_collisions_the_first_are_told() {
        let mut facts = facts();
        facts.routes.extend((0..200).map(|third| route(&format!("10.5.{third}.0/24"), None, "tun0")));

        let told = colliding(&facts, "10.5.0.0/16", "10.5.250.0/24");

        assert_eq!((told.len(), &*told[10]), (11, "190 more interfaces or routes overlap the network"));
    }

    #[test]
    fn a_peer_is_attached_when_its_best_route_has_no_next_hop() {
        let mut facts = facts();
        facts.routes.push(route("192.168.56.128/25", Some("192.168.56.1"), "eth1"));
        let underlay = choose(&facts, &Selection::default()).unwrap().underlay;

        assert_eq!(underlay.attached("192.168.56.13".parse().unwrap()), Some(name("eth1")));
        assert_eq!(underlay.attached("192.168.56.200".parse().unwrap()), None);
        assert_eq!(underlay.attached("203.0.113.9".parse().unwrap()), None);
    }
}
