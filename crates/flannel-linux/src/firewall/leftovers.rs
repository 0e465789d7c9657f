//! What we, or a Go flanneld, have left in an engine that we do not use now.
//!
//! An engine is only asked if its tools are on this host and the kernel has
//! tables of its kind: asking iptables-legacy would make some. What is not
//! there has nothing to clear away, so a missing tool is no error.
//!
//! ```text
//!   we use            cleared of ours
//!   iptables on nft   iptables-legacy, nftables
//!   iptables-legacy   iptables-nft, nftables
//!   nftables          iptables-nft, iptables-legacy
//! ```

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use flannel_core::chain::chain;
use flannel_core::firewall::Ruleset;
use flannel_core::host::{Ensured, Firewall};
use flannel_core::network::FirewallEngine;
use ipnetwork::IpNetwork;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::generation::generation;
use super::iptables::{Family, IptablesFirewall};
use super::nftables::NftablesFirewall;
use super::program::blocking;

/// Between attempts to clear away what does not go.
const AGAIN: Duration = Duration::from_secs(60);

/// Both kinds of iptables on this host, and whether they have been asked.
#[derive(Debug)]
pub(super) struct Leftovers {
    engine: FirewallEngine,
    family: Family,
    /// The networks whose rules were cleared away.
    swept: Option<Vec<IpNetwork>>,
    /// When what could not be cleared away is tried again.
    again: Option<Instant>,
    /// Whether rules in both kinds of iptables were looked for.
    compared: bool,
}

/// One kind of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) program: &'static str,
    pub(super) restorer: &'static str,
    saver: &'static str,
}

pub(super) fn nft_kind(family: Family) -> Kind {
    match family {
        Family::Ipv4 => {
            Kind { program: "iptables-nft", restorer: "iptables-nft-restore", saver: "iptables-nft-save" }
        }
        Family::Ipv6 => {
            Kind { program: "ip6tables-nft", restorer: "ip6tables-nft-restore", saver: "ip6tables-nft-save" }
        }
    }
}

pub(super) fn legacy_kind(family: Family) -> Kind {
    match family {
        Family::Ipv4 => Kind {
            program: "iptables-legacy",
            restorer: "iptables-legacy-restore",
            saver: "iptables-legacy-save",
        },
        Family::Ipv6 => Kind {
            program: "ip6tables-legacy",
            restorer: "ip6tables-legacy-restore",
            saver: "ip6tables-legacy-save",
        },
    }
}

impl Leftovers {
    pub(super) fn new(engine: FirewallEngine, family: Family) -> Self {
        Self { engine, family, swept: None, again: None, compared: false }
    }

    /// Clears away what the other engines hold of these networks, once; `on_nft`
    /// tells of which kind the iptables in use is.
    pub(super) async fn sweep(&mut self, rules: &Ruleset, on_nft: Option<bool>) {
        let networks: Vec<IpNetwork> =
            [rules.network].into_iter().chain(rules.former.iter().copied()).collect();
        let is_swept = |swept: &Vec<IpNetwork>| networks.iter().all(|network| swept.contains(network));
        if self.swept.as_ref().is_some_and(is_swept) || self.again.is_some_and(|again| Instant::now() < again)
        {
            return;
        }
        let nothing = rules.without_rules();
        let mut all = true;
        let iptables = self.engine == FirewallEngine::Iptables;
        let (legacy, nft) = (legacy_kind(self.family), nft_kind(self.family));
        if !(iptables && on_nft == Some(false))
            && has_legacy_tables(self.family)
            && is_installed(legacy.program)
        {
            let mut firewall = IptablesFirewall::with_programs(legacy.program, legacy.restorer);
            all &= clear(&mut firewall, &nothing, legacy.program).await;
        }
        // Where they have no names of their own, there is one kind.
        let plain = IptablesFirewall::new(self.family);
        if !iptables
            && !is_installed(legacy.program)
            && !is_installed(nft.program)
            && is_installed(plain.program())
        {
            all &= clear(&mut plain.clone(), &nothing, plain.program()).await;
        }
        if has_nf_tables() {
            if !(iptables && on_nft == Some(true)) && is_installed(nft.program) {
                let mut firewall = IptablesFirewall::with_programs(nft.program, nft.restorer);
                all &= clear(&mut firewall, &nothing, nft.program).await;
            }
            if iptables && is_installed("nft") {
                all &= clear(&mut NftablesFirewall::default(), &nothing, "nft").await;
            }
        }
        if !std::mem::replace(&mut self.compared, true) {
            self.warn_of_both().await;
        }
        if all {
            (self.swept, self.again) = (Some(networks), None);
        } else {
            self.again = Some(Instant::now() + AGAIN);
        }
    }

    /// A packet has to pass the rules of both kinds, whichever of them somebody looks at.
    async fn warn_of_both(&self) {
        let family = self.family;
        let counted = blocking(move || {
            let (legacy, nft) = (legacy_kind(family), nft_kind(family));
            let has_legacy = has_legacy_tables(family) && has_nf_tables();
            if !has_legacy || !is_installed(legacy.saver) || !is_installed(nft.saver) {
                return Ok((0, 0));
            }
            Ok((count(legacy.saver), count(nft.saver)))
        });
        let Ok((legacy, nft)) = counted.await else { return };
        if legacy > 0 && nft > 0 {
            warn!(
                iptables_legacy = legacy,
                iptables_nft = nft,
                "this host has rules in iptables-legacy and in iptables-nft, and a packet has to pass both; keep to one \
                 kind (update-alternatives --config iptables) and clear away the other's (`iptables-legacy-save`, \
                 `iptables-nft-save` show them)"
            );
        }
    }
}

/// Has an engine hold nothing of ours; whether it does.
async fn clear(firewall: &mut impl Firewall, nothing: &Ruleset, program: &str) -> bool {
    match firewall.ensure(nothing).await {
        Ok(Ensured::Written) => {
            info!(program, network = %nothing.network, "rules that we no longer use were cleared away");
            true
        }
        Ok(Ensured::Unchanged) => true,
        Err(error) => {
            debug!(program, error = %chain(&error), "cannot clear away rules that we no longer use");
            false
        }
    }
}

/// Whether x_tables hold any table in this network namespace.
fn has_legacy_tables(family: Family) -> bool {
    let file = match family {
        Family::Ipv4 => "/proc/thread-self/net/ip_tables_names",
        Family::Ipv6 => "/proc/thread-self/net/ip6_tables_names",
    };
    fs::read_to_string(file).is_ok_and(|names| !names.trim().is_empty())
}

/// Whether nf_tables has ever held anything in this network namespace.
fn has_nf_tables() -> bool {
    generation().is_ok_and(|generation| generation > 1)
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory: PathBuf| directory.join(program).is_file())
}

/// How many rules a program like `iptables-save` shows.
fn count(saver: &str) -> usize {
    let Ok(output) = Command::new(saver).output() else { return 0 };
    String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.starts_with("-A ")).count()
}
