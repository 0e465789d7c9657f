//! The traffic rules as data, once; each engine renders the same ones.
//!
//! Their meaning is flannel's (`pkg/trafficmngr`): traffic inside the network
//! keeps its addresses, what leaves it is masqueraded, and what comes from or
//! goes to it may be forwarded whatever Docker's policy says. Since Docker 28
//! drops more than that, what comes from the network for a container here is let
//! in before it and carries a mark that Docker 29 can be told to accept.

use std::fmt;

use docker::NETWORK_MARK;
use ipnetwork::IpNetwork;

use crate::claim::{overlap, within};

pub mod docker;
pub mod iptables;
pub mod nftables;

/// Which rules the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// `--ip-masq`.
    pub masquerade: bool,
    /// Not `--ip-masq-fully-random-disable`.
    pub random_fully: bool,
    /// `--iptables-forward-rules`.
    pub forward: bool,
}

impl Wanted {
    /// Whether no rule at all is wanted.
    pub fn nothing(&self) -> bool {
        !self.masquerade && !self.forward
    }
}

/// The rules of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// The network of that family.
    pub network: IpNetwork,
    /// Networks of our previous run, whose rules go.
    pub former: Vec<IpNetwork>,
    /// Our chains; one without rules is to be gone.
    pub chains: Vec<Chain>,
}

/// A chain of ours and where the kernel jumps to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Which of them.
    pub purpose: Purpose,
    /// In order.
    pub rules: Vec<Rule>,
}

/// What a chain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Rewrites source addresses as packets leave.
    Masquerade,
    /// Lets packets through the host.
    Forward,
    /// Lets packets of the network in, before others drop what does not come by their bridge.
    Admit,
}

/// One rule: all matches must hold for the verdict to be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The packet mark, with its mask.
    pub mark: Option<(u32, u32)>,
    /// Where the packet comes from.
    pub source: Match,
    /// Where it goes.
    pub destination: Match,
    /// What happens to it.
    pub verdict: Verdict,
}

/// A match on an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// Any address.
    Any,
    /// Inside.
    In(IpNetwork),
    /// Outside.
    NotIn(IpNetwork),
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This chain has nothing to say about it.
    Return,
    /// It passes.
    Accept,
    /// It carries these bits of a mark from here on.
    Mark(u32),
    /// It leaves with the host's own address.
    Masquerade {
        /// From a port that cannot be guessed.
        random_fully: bool,
    },
}

/// kube-proxy's mark for packets that it masquerades itself.
const KUBE_PROXY_MARK: u32 = 0x4000;

/// The rules for one family of the cluster.
pub fn rules(network: IpNetwork, subnet: IpNetwork, wanted: Wanted, former: Vec<IpNetwork>) -> Ruleset {
    let multicast = multicast(network);
    let masquerade = Verdict::Masquerade { random_fully: wanted.random_fully };
    let rule = |source, destination, verdict| Rule { mark: None, source, destination, verdict };
    let (cluster, ours) = (Match::In(network), Match::In(subnet));

    let mut masquerading = Chain { purpose: Purpose::Masquerade, rules: vec![] };
    if wanted.masquerade {
        masquerading.rules = vec![
            left_to_kube_proxy(KUBE_PROXY_MARK),
            rule(ours, cluster, Verdict::Return),
            rule(cluster, ours, Verdict::Return),
            // What came from outside to a container here was let in by somebody; it keeps its source.
            rule(Match::NotIn(network), ours, Verdict::Return),
            rule(cluster, Match::NotIn(multicast), masquerade),
            rule(Match::NotIn(network), cluster, masquerade),
        ];
    }
    let mut forwarding = Chain { purpose: Purpose::Forward, rules: vec![] };
    if wanted.forward {
        forwarding.rules =
            vec![rule(cluster, Match::Any, Verdict::Accept), rule(Match::Any, cluster, Verdict::Accept)];
    }
    let mut admitting = Chain { purpose: Purpose::Admit, rules: vec![] };
    if wanted.forward {
        admitting.rules =
            vec![rule(cluster, ours, Verdict::Mark(NETWORK_MARK)), rule(cluster, ours, Verdict::Accept)];
    }
    Ruleset { network, former, chains: vec![masquerading, forwarding, admitting] }
}

/// What belongs to all agents of a host: it names nobody's network and stands once.
pub fn of_all(purpose: Purpose) -> impl Iterator<Item = Rule> {
    // A Go flanneld looks at the whole mark in nftables.
    let masks = [KUBE_PROXY_MARK, u32::MAX].into_iter();
    masks.filter(move |_| purpose == Purpose::Masquerade).map(left_to_kube_proxy)
}

fn left_to_kube_proxy(mask: u32) -> Rule {
    let mark = Some((KUBE_PROXY_MARK, mask));
    Rule { mark, source: Match::Any, destination: Match::Any, verdict: Verdict::Return }
}

/// What is for many, in the family of a network.
fn multicast(network: IpNetwork) -> IpNetwork {
    if network.is_ipv4() { "224.0.0.0/4" } else { "ff00::/8" }.parse().expect("both are prefixes")
}

impl Purpose {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Masquerade, Self::Forward, Self::Admit];
}

impl Rule {
    /// The prefixes that it names.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNetwork> {
        [self.source, self.destination].into_iter().filter_map(|side| match side {
            Match::Any => None,
            Match::In(network) | Match::NotIn(network) => Some(network),
        })
    }

    /// Whether it belongs to all agents of a host and stands once.
    pub fn is_of_all(&self, purpose: Purpose) -> bool {
        of_all(purpose).any(|rule| rule == *self)
    }
}

impl Ruleset {
    /// The same with every rule taken away: what a host is to have where another engine has the rules.
    pub fn without_rules(&self) -> Self {
        let chains = self.chains.iter().map(|chain| Chain { purpose: chain.purpose, rules: vec![] });
        Self { network: self.network, former: self.former.clone(), chains: chains.collect() }
    }

    /// Whether there is no rule in it.
    pub fn is_empty(&self) -> bool {
        self.chains.iter().all(|chain| chain.rules.is_empty())
    }

    /// The same for an engine that cannot pick ports at random.
    pub fn without_random_fully(&self) -> Self {
        let mut plain = self.clone();
        for rule in plain.chains.iter_mut().flat_map(|chain| &mut chain.rules) {
            if let Verdict::Masquerade { random_fully } = &mut rule.verdict {
                *random_fully = false;
            }
        }
        plain
    }

    /// What another agent may have in a chain of ours, if these are the prefixes that its rule names.
    ///
    /// It has one network, apart from ours, and a subnet of that. A rule of any other
    /// shape somebody has put there, and it may stand in the way of ours.
    pub fn of_another(&self, purpose: Purpose, prefixes: &[IpNetwork]) -> impl Iterator<Item = Rule> {
        let is_theirs = |network| !overlap(network, self.network) && !self.former.contains(&network);
        let networks = prefixes.iter().copied().filter(move |network| is_theirs(*network));
        let pairs = networks.flat_map(|network| prefixes.iter().map(move |subnet| (network, *subnet)));
        pairs
            .filter(|(network, subnet)| within(*network, *subnet))
            .flat_map(move |(network, subnet)| of_any_flannel(purpose, network, subnet))
    }
}

/// What a flannel with that network and subnet may have in a chain, whatever its options.
fn of_any_flannel(purpose: Purpose, network: IpNetwork, subnet: IpNetwork) -> impl Iterator<Item = Rule> {
    let chains = [true, false].into_iter().flat_map(move |random_fully| {
        rules(network, subnet, Wanted { masquerade: true, random_fully, forward: true }, vec![]).chains
    });
    // As a Go flanneld of 0.28 has it in nftables: what comes from other hosts' pods as well.
    let (source, destination) = (Match::NotIn(subnet), Match::In(network));
    let of_go = Rule { mark: None, source, destination, verdict: Verdict::Return };
    let of_go = (purpose == Purpose::Masquerade).then_some(of_go);
    let of_ours = chains.filter(move |chain| chain.purpose == purpose).flat_map(|chain| chain.rules);
    of_ours.filter(move |rule| !rule.is_of_all(purpose)).chain(of_go)
}

impl fmt::Display for Ruleset {
    /// The rules for a person to read, one a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chain in &self.chains {
            for rule in &chain.rules {
                let name = match chain.purpose {
                    Purpose::Masquerade => "masquerade",
                    Purpose::Forward => "forward",
                    Purpose::Admit => "admit",
                };
                write!(f, "{name}: ")?;
                match rule.mark {
                    Some((mark, mask)) => write!(f, "marked {mark:#x}/{mask:#x}")?,
                    None => write!(f, "from {} to {}", rule.source, rule.destination)?,
                }
                let verdict = match rule.verdict {
                    Verdict::Return => "leave alone",
                    Verdict::Accept => "accept",
                    Verdict::Mark(mark) => &format!("mark {mark:#x}"),
                    Verdict::Masquerade { random_fully: true } => "masquerade from a random port",
                    Verdict::Masquerade { random_fully: false } => "masquerade",
                };
                writeln!(f, ": {verdict}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("anywhere"),
            Self::In(network) => write!(f, "{network}"),
            Self::NotIn(network) => write!(f, "outside {network}"),
        }
    }
}
