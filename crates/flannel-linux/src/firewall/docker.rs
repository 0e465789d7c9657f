//! Looks at what Docker's rules drop that ours cannot let pass, and says so once.
//!
//! Which option of dockerd is missing is read off in `flannel_core::firewall::docker`.

use std::net::Ipv4Addr;
use std::process::Command;

use flannel_core::firewall::docker::{Listing, advice};
use flannel_core::firewall::{Purpose, Ruleset};
use ipnetwork::IpNetwork;
use nix::ifaddrs::getifaddrs;
use tracing::{info, warn};

use super::generation::generation;
use super::program::blocking;

/// What was seen and said of Docker's rules.
#[derive(Debug, Default)]
pub(super) struct Docker {
    /// Nothing has changed in nf_tables since then.
    seen_at: Option<u32>,
    said: Option<String>,
}

impl Docker {
    /// Looks again if anything in nf_tables has changed. With `iptables` our rules are
    /// there, and else in nftables.
    pub(super) async fn look(&mut self, rules: &Ruleset, iptables: Option<&'static str>) {
        let is_wanted = |purpose| rules.chains.iter().any(|c| c.purpose == purpose && !c.rules.is_empty());
        let now = generation().ok();
        if !is_wanted(Purpose::Admit) || (now.is_some() && now == self.seen_at) {
            return;
        }
        let network = rules.network;
        let found = blocking(move || {
            // What is not there has nothing to say.
            let listed = |program: &str, words: &[&str]| {
                let output = Command::new(program).args(words).output().ok();
                output.map_or_else(String::new, |output| String::from_utf8_lossy(&output.stdout).into_owned())
            };
            let Some(bridge) = bridge_in(network) else { return Ok(None) };
            let program = iptables.unwrap_or("iptables");
            let (table, chain) = (Purpose::Admit.table(), Purpose::Admit.parent());
            let raw = listed(program, &["--wait", "5", "-t", table, "-S", chain]);
            let filter = iptables.is_none().then(|| listed(program, &["--wait", "5", "-S"]));
            let bridges = listed("nft", &["list", "table", "ip", "docker-bridges"]);
            let listing = Listing { raw: &raw, filter: filter.as_deref(), bridges: &bridges };
            Ok(advice(&listing, network, &bridge))
        });
        let Ok(advice) = found.await else { return };
        self.seen_at = now;
        match (&advice, &self.said) {
            (Some(advice), said) if Some(advice) != said.as_ref() => warn!("{advice}"),
            (None, Some(_)) => info!("docker no longer drops what other hosts send to its containers"),
            _ => {}
        }
        self.said = advice;
    }
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
