//! What must be so, judged from what has happened and not from what an agent believes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use flannel_core::backend::{self, Node};
use flannel_core::key::parse_subnet_key;
use flannel_core::lease::{Lease, LeaseAttrs, Subnet, Tenure};
use flannel_core::network::NetworkConfig;
use flannel_core::plan::{Planner, RouteMode};
use flannel_core::store::{LeaseEvent, Snapshot};
use flannel_core::underlay::{Selection, choose};
use flannel_core::view::LeaseView;
use flannel_etcd::kv::Entry;

use super::host::Host;
use super::{PREFIX, Past, Removal};
use crate::sim_etcd::{By, Record, SimEtcd, What};

/// Whether every host runs, is ready, and holds what the leases in etcd ask for; what is not so, otherwise.
pub(super) fn converged(
    etcd: &SimEtcd,
    config: &NetworkConfig,
    hosts: &[Host],
    fenced: bool,
) -> Result<(), String> {
    let leases: Vec<Lease> = etcd.keys(&format!("{PREFIX}/subnets/")).iter().filter_map(lease).collect();
    for (place, host) in hosts.iter().enumerate() {
        let wrong = |words: String| Err(format!("client {place}: {words}"));
        if !host.runs() {
            return wrong("it does not run".into());
        }
        if let Some(words) = host.pending().first() {
            return wrong(format!("not ready: {words}"));
        }
        let ours = |lease: &&Lease| {
            // Without records nobody can tell whether a second lease with our address is ours.
            let is_held = fenced || host.subnet() == Some(lease.subnet);
            is_held && lease.attrs.public_ip == Some(host.address())
        };
        let own: Vec<&Lease> = leases.iter().filter(ours).collect();
        let [own] = own.as_slice() else {
            return wrong(format!("{} leases name {}", own.len(), host.address()));
        };
        if host.subnet() != Some(own.subnet) {
            return wrong(format!("its file names {:?} and its lease {}", host.subnet(), own.subnet));
        }
        let should = should_hold(config, host, (*own).clone(), &leases);
        let is = host.network.printed();
        if is != should {
            return wrong(format!("its kernel holds\n{is}where it should hold\n{should}"));
        }
    }
    Ok(())
}

/// What a fresh process would have the kernel of that host hold.
fn should_hold(config: &NetworkConfig, host: &Host, own: Lease, leases: &[Lease]) -> String {
    let facts = host.network.kernel().facts.clone();
    let underlay = choose(&facts, &Selection::default()).expect("a host has an interface").underlay;
    let (backend, _) = backend::from_config(config).expect("a backend");
    let node = Node { pools: config.pools().copied().collect(), underlay, lease: own, mtu: None };
    let mut view = LeaseView::default();
    view.apply(LeaseEvent::Snapshot(Snapshot { leases: leases.to_vec(), unreadable: vec![] }));
    Planner::new(backend, node, RouteMode::Auto).plan(&view).desired.to_string()
}

/// Walks through all that has happened.
pub(super) fn history(
    record: &[Record],
    hosts: &[Host],
    removals: &[Removal],
    past: &Past,
) -> Result<(), String> {
    let mut walk = Walk::of(past);
    for event in record {
        walk.take(event, hosts).map_err(|words| format!("{words}\n  at {event}"))?;
    }
    for removal in removals {
        walk.check_removal(removal)?;
    }
    Ok(())
}

/// A key, as the record shows it.
#[derive(Clone, Debug)]
struct Holding {
    by: By,
    /// What it says; `None` for something that is no lease.
    attrs: Option<LeaseAttrs>,
}

impl Holding {
    fn address(&self) -> Option<Ipv4Addr> {
        self.attrs.as_ref()?.public_ip
    }

    /// Whether only one of the two can be had by a peer.
    fn rivals(&self, other: &Self) -> bool {
        let Some((one, other)) = self.attrs.as_ref().zip(other.attrs.as_ref()) else { return false };
        one.public_ip == other.public_ip
            || one.backend_data.is_some() && one.backend_data == other.backend_data
    }
}

/// How long after its troubles a host must be able to answer for its lease.
const RECOVERED: Duration = Duration::from_secs(20);

struct Walk<'a> {
    past: &'a Past,
    /// Who has what now.
    holdings: BTreeMap<Subnet, Holding>,
    /// When something was said of a subnet that may take its peer from a plan.
    blows: BTreeMap<Subnet, Vec<Duration>>,
    /// The addresses that leases on it have named.
    addresses: BTreeMap<Subnet, BTreeSet<Ipv4Addr>>,
    /// When a hand wrote something, which may set one peer against another.
    hands: Vec<Duration>,
    /// The subnet that a client has, and since when, until something happens to it that is not the
    /// client's doing.
    homes: BTreeMap<usize, (Subnet, Duration)>,
}

impl<'a> Walk<'a> {
    fn of(past: &'a Past) -> Self {
        Self {
            past,
            holdings: BTreeMap::new(),
            blows: BTreeMap::new(),
            addresses: BTreeMap::new(),
            hands: vec![],
            homes: BTreeMap::new(),
        }
    }

    fn take(&mut self, Record { at, by, what }: &Record, hosts: &[Host]) -> Result<(), String> {
        match what {
            What::Put(entry) => {
                if let Some(subnet) = recorded(&entry.key) {
                    return self.take_record(*at, *by, subnet, hosts);
                }
                let Some(subnet) = subnet(&entry.key) else { return Ok(()) };
                let holding = Holding { by: *by, attrs: attributes(entry) };
                self.may_put(*at, *by, subnet, hosts)?;
                if self.holdings.get(&subnet).is_none_or(|former| former.attrs != holding.attrs) {
                    self.blow(subnet, &holding, *at);
                }
                if *by == By::Hand {
                    self.hands.push(*at);
                }
                self.homes.retain(|number, (home, _)| *home != subnet || *by == By::Client(*number));
                if let By::Client(number) = by {
                    self.moves_in(*number, subnet, *at);
                }
                self.holdings.insert(subnet, holding);
            }
            What::Deleted(key, _) => {
                let Some(subnet) = subnet(key) else { return Ok(()) };
                self.may_delete(*by, subnet, hosts)?;
                self.homes.retain(|_, (home, _)| *home != subnet);
                if let Some(holding) = self.holdings.remove(&subnet) {
                    self.blow(subnet, &holding, *at);
                }
            }
            What::Replaced(_, keys) => {
                let now = keys.values().filter_map(|entry| {
                    let attrs = attributes(entry);
                    let by = owner(attrs.as_ref().and_then(|attrs| attrs.public_ip), hosts);
                    Some((subnet(&entry.key)?, Holding { by, attrs }))
                });
                let now: BTreeMap<Subnet, Holding> = now.collect();
                let before = std::mem::take(&mut self.holdings);
                before.iter().chain(&now).for_each(|(subnet, holding)| self.blow(*subnet, holding, *at));
                self.holdings = now;
                self.hands.push(*at);
                self.homes.clear();
            }
            What::Granted(_) | What::Ended(_) | What::Compacted(_) | What::Said(_) => {}
        }
        Ok(())
    }

    /// A lease goes from one host to another by its record alone, if it says the same of both.
    fn take_record(&mut self, at: Duration, by: By, subnet: Subnet, hosts: &[Host]) -> Result<(), String> {
        if self.holdings.get(&subnet).is_none_or(|holding| holding.by == by) || host(by, hosts).is_none() {
            return Ok(());
        }
        self.may_put(at, by, subnet, hosts)?;
        if let Some(holding) = self.holdings.get_mut(&subnet) {
            holding.by = by;
        }
        Ok(())
    }

    /// A client writes what was free or another's. It has what it had first, unless it took over the
    /// lease of another after its disk was lost: it could not tell which of the two was its own.
    fn moves_in(&mut self, number: usize, subnet: Subnet, at: Duration) {
        let is_taken_over = self.holdings.get(&subnet).is_some_and(|former| former.by != By::Client(number));
        let (home, since) = *self.homes.entry(number).or_insert((subnet, at));
        let has_lost = |(when, place): &(Duration, usize)| *place == number && (since..at).contains(when);
        if home != subnet && is_taken_over && self.past.losses.iter().any(has_lost) {
            self.homes.insert(number, (subnet, at));
        }
    }

    /// Something happened to this lease, and so to whoever says the same of himself.
    fn blow(&mut self, subnet: Subnet, holding: &Holding, at: Duration) {
        let rivals =
            self.holdings.iter().filter(|(_, other)| other.rivals(holding)).map(|(subnet, _)| *subnet);
        self.addresses.entry(subnet).or_default().extend(holding.address());
        for subnet in rivals.chain([subnet]).collect::<Vec<_>>() {
            self.blows.entry(subnet).or_default().push(at);
        }
    }

    /// Whether a host had nothing to suffer for a while before.
    fn was_well(&self, place: usize, at: Duration) -> bool {
        let since = at.saturating_sub(RECOVERED);
        let after = self.past.wells.partition_point(|(moment, _)| *moment <= since);
        let times = self.past.wells.get(after.saturating_sub(1)..).unwrap_or_default();
        times.iter().take_while(|(moment, _)| *moment <= at).all(|(_, wells)| wells.get(place) == Some(&true))
    }

    /// I1: nobody writes over what somebody else holds, nor across it. Of two hosts with one
    /// address one may take over what the other had, who cannot answer.
    fn may_put(&self, at: Duration, by: By, subnet: Subnet, hosts: &[Host]) -> Result<(), String> {
        let Some(host) = host(by, hosts) else { return Ok(()) };
        if let Some(holding) = self.holdings.get(&subnet) {
            let is_theirs = holding.address().is_none_or(|address| !host.has_had(address));
            let of_another =
                matches!(holding.by, By::Client(place) if holding.by != by && self.was_well(place, at));
            if is_theirs || of_another {
                return Err(format!("{subnet} was held by {holding:?} and was written over"));
            }
        }
        let across = self.holdings.iter().find(|(other, holding)| {
            **other != subnet && matches!(holding.by, By::Client(_)) && overlap(**other, subnet)
        });
        match across {
            Some((other, holding)) => Err(format!("{subnet} overlaps {other}, held by {holding:?}")),
            None => Ok(()),
        }
    }

    /// Nobody deletes what somebody else holds, nor (I5) the subnet that he has.
    fn may_delete(&self, by: By, subnet: Subnet, hosts: &[Host]) -> Result<(), String> {
        let (By::Client(number), Some(holding)) = (by, self.holdings.get(&subnet)) else { return Ok(()) };
        if self.homes.get(&number).is_some_and(|(home, _)| *home == subnet) {
            return Err(format!("{subnet} was given up though it was to be had"));
        }
        let is_ours =
            host(by, hosts).zip(holding.address()).is_some_and(|(host, address)| host.has_had(address));
        if is_ours { Ok(()) } else { Err(format!("{subnet} was held by {holding:?} and was deleted")) }
    }

    /// I4: a peer's route goes only after something was said of its lease, or another host
    /// was given its address.
    fn check_removal(&self, Removal { at, host, route }: &Removal) -> Result<(), String> {
        let said = |subnet: &Subnet| subnet.networks().any(|network| network == route.destination);
        let blows = self.blows.iter().filter(|(subnet, _)| said(subnet)).flat_map(|(_, blows)| blows);
        // The first blow is that by which it came.
        let reasons = blows.skip(1).chain(&self.hands).filter(|blow| *blow <= at).count();
        let of_lease = self.addresses.iter().filter(|(subnet, _)| said(subnet)).flat_map(|(_, all)| all);
        let addresses: BTreeSet<&Ipv4Addr> = of_lease.collect();
        let is_twin = |(when, address): &(Duration, Ipv4Addr)| when <= at && addresses.contains(address);
        if reasons == 0 && !self.past.twins.iter().any(is_twin) {
            return Err(format!(
                "client {host} took the route to {} away at {at:?} though nothing had happened to that peer",
                route.destination
            ));
        }
        Ok(())
    }
}

fn host(by: By, hosts: &[Host]) -> Option<&Host> {
    match by {
        By::Client(number) => hosts.get(number),
        By::Expiry | By::Hand => None,
    }
}

/// The host that has had this address, if it is the only one.
fn owner(address: Option<Ipv4Addr>, hosts: &[Host]) -> By {
    let had = |host: &Host| address.is_some_and(|address| host.has_had(address));
    let mut places = (0..hosts.len()).filter(|place| hosts.get(*place).is_some_and(had));
    match (places.next(), places.next()) {
        (Some(only), None) => By::Client(only),
        _ => By::Hand,
    }
}

fn overlap(one: Subnet, other: Subnet) -> bool {
    match (one.v4(), other.v4()) {
        (Some(one), Some(other)) => one.overlaps(other),
        _ => false,
    }
}

fn lease(entry: &Entry) -> Option<Lease> {
    let tenure = if entry.lease == 0 { Tenure::Reserved } else { Tenure::Leased };
    Some(Lease { subnet: subnet(&entry.key)?, attrs: attributes(entry)?, tenure })
}

pub(super) fn subnet(key: &[u8]) -> Option<Subnet> {
    parse_subnet_key(std::str::from_utf8(key).ok()?.strip_prefix(PREFIX)?.strip_prefix("/subnets/")?)
}

/// The subnet whose holder a key records.
fn recorded(key: &[u8]) -> Option<Subnet> {
    parse_subnet_key(std::str::from_utf8(key).ok()?.strip_prefix(PREFIX)?.strip_prefix("/hosts/")?)
}

pub(super) fn attributes(entry: &Entry) -> Option<LeaseAttrs> {
    LeaseAttrs::from_json(std::str::from_utf8(&entry.value).ok()?).ok()
}
