//! Looks at what Docker's rules drop that ours cannot let pass, and says so once.
//!
//! Which option of dockerd is missing is read off in `flannel_core::firewall::docker`.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use flannel_core::firewall::docker::{Listing, advice};
use flannel_core::firewall::{Purpose, Ruleset};
use ipnetwork::IpNetwork;
use nix::ifaddrs::getifaddrs;
use tokio::time::Instant;
use tracing::{info, warn};

use super::generation::generation;
use super::iptables::Family;
use super::leftovers::{has_legacy_tables, is_installed, legacy_kind, nft_kind};
use super::program::blocking;

/// Between looks where nf_tables alone do not tell that there is something new.
const AGAIN: Duration = Duration::from_secs(60);

/// The exit status of an iptables that may not list, or not now: somebody holds its lock.
const NOT_NOW: i32 = 4;

/// What was seen and said of Docker's rules.
#[derive(Debug, Default)]
pub(super) struct Docker {
    /// Nothing has changed in nf_tables since then.
    seen_at: Option<u32>,
    /// When it is looked again all the same.
    again: Option<Instant>,
    said: Option<String>,
}

/// What a look has shown.
struct Look {
    /// What is to be said; `None` if not all could be seen.
    advice: Option<Option<String>>,
    /// Whether nf_tables tell when there is something new.
    told: bool,
}

impl Docker {
    /// Looks again if anything in nf_tables has changed, and now and then where there is no
    /// bridge yet or rules are in x_tables. With `iptables` our rules are there, and else in nftables.
    pub(super) async fn look(&mut self, rules: &Ruleset, iptables: Option<&'static str>) {
        let is_wanted = |purpose| rules.chains.iter().any(|c| c.purpose == purpose && !c.rules.is_empty());
        let now = generation().ok();
        let is_due = self.again.is_some_and(|again| again <= Instant::now());
        if !is_wanted(Purpose::Admit) || (now.is_some() && now == self.seen_at && !is_due) {
            return;
        }
        let network = rules.network;
        let found = blocking(move || {
            let Some(bridge) = bridge_in(network) else {
                return Ok(Look { advice: Some(None), told: false });
            };
            let told = !has_legacy_tables(Family::Ipv4);
            let look = || {
                let programs = iptables.map_or_else(beside_nftables, |iptables| vec![iptables]);
                let (table, chain) = (Purpose::Admit.table(), Purpose::Admit.parent());
                let raw = listed(&programs, &["--wait", "5", "-t", table, "-S", chain])?;
                let filter = match iptables {
                    Some(_) => None,
                    None => Some(listed(&programs, &["--wait", "5", "-S"])?),
                };
                let bridges = listed(&["nft"], &["list", "table", "ip", "docker-bridges"])?;
                let listing = Listing { raw: &raw, filter: filter.as_deref(), bridges: &bridges };
                Some(advice(&listing, network, &bridge))
            };
            Ok(Look { advice: look(), told })
        });
        let Ok(Look { advice, told }) = found.await else { return };
        self.seen_at = now;
        self.again = (!told || advice.is_none()).then(|| Instant::now() + AGAIN);
        let Some(advice) = advice else { return };
        match (&advice, &self.said) {
            (Some(advice), said) if Some(advice) != said.as_ref() => warn!("{advice}"),
            (None, Some(_)) => info!("docker no longer drops what other hosts send to its containers"),
            _ => {}
        }
        self.said = advice;
    }
}

/// The kinds of iptables that have rules here, by programs that make no tables when they are asked.
fn beside_nftables() -> Vec<&'static str> {
    let (legacy, nft) = (legacy_kind(Family::Ipv4).program, nft_kind(Family::Ipv4).program);
    let has_legacy = has_legacy_tables(Family::Ipv4);
    if !is_installed(legacy) && !is_installed(nft) {
        return vec!["iptables"];
    }
    [nft].into_iter().chain(has_legacy.then_some(legacy)).collect()
}

/// What programs say; what is not there has nothing to say. `None` if one of them could not look.
fn listed(programs: &[&str], words: &[&str]) -> Option<String> {
    let mut all = String::new();
    for program in programs {
        let Ok(output) = Command::new(program).args(words).output() else { continue };
        if output.status.code() == Some(NOT_NOW) {
            return None;
        }
        all += &String::from_utf8_lossy(&output.stdout);
    }
    Some(all)
}

/// The interface of this host with an address in the network that others have theirs
/// beside: ours has one for itself.
fn bridge_in(network: IpNetwork) -> Option<String> {
    let IpNetwork::V4(network) = network else { return None };
    let mut addresses = getifaddrs().ok()?;
    let found = addresses.find(|found| {
        let address = found.address.and_then(|address| Some(address.as_sockaddr_in()?.ip()));
        let mask = found.netmask.and_then(|mask| Some(mask.as_sockaddr_in()?.ip()));
        address.is_some_and(|address| network.contains(address))
            && mask.is_some_and(|mask| mask != Ipv4Addr::BROADCAST)
    });
    found.map(|found| found.interface_name)
}
