//! What we, or a Go flanneld, have left in an engine that we do not use now.
//!
//! What does not go is trouble though our rules stand, and so are rules in both kinds
//! of iptables, since a packet has to pass both.
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
use flannel_core::host::{Ensured, Firewall, HostError};
use flannel_core::network::FirewallEngine;
use ipnetwork::IpNetwork;
use tokio::time::Instant;
use tracing::info;

use super::generation::generation;
use super::iptables::{Family, IptablesFirewall};
use super::nftables::NftablesFirewall;
use super::program::blocking;

/// Between looks at what is not as it should be.
const AGAIN: Duration = Duration::from_secs(60);

/// Both kinds of iptables on this host, and whether they have been asked.
#[derive(Debug)]
pub(super) struct Leftovers {
    engine: FirewallEngine,
    family: Family,
    /// The networks whose rules were cleared away.
    swept: Option<Vec<IpNetwork>>,
    /// When it is looked again whether something is wrong.
    again: Option<Instant>,
    /// What was wrong when it was last looked.
    wrong: Option<Wrong>,
    /// Whether nf_tables held anything before we wrote to them; `None` before the first look.
    had_nf_tables: Option<bool>,
}

/// What is not as it should be beside our rules.
#[derive(Clone, Debug)]
struct Wrong {
    what: String,
    why: String,
}

impl Wrong {
    fn error(&self) -> HostError {
        HostError::Broken { operation: self.what.clone(), source: self.why.clone().into() }
    }
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
        Self { engine, family, swept: None, again: None, wrong: None, had_nf_tables: None }
    }

    /// Takes in what there is to be cleared away, before our rules are written.
    pub(super) fn look_before(&mut self) {
        self.had_nf_tables.get_or_insert_with(has_nf_tables);
    }

    /// Clears away what the other engines hold of these networks, once; `on_nft`
    /// tells of which kind the iptables in use is. Trouble is looked at again after a while.
    pub(super) async fn sweep(&mut self, rules: &Ruleset, on_nft: Option<bool>) {
        let networks: Vec<IpNetwork> =
            [rules.network].into_iter().chain(rules.former.iter().copied()).collect();
        let is_swept = |swept: &Vec<IpNetwork>| networks.iter().all(|network| swept.contains(network));
        let is_swept = self.swept.as_ref().is_some_and(is_swept);
        let is_at_rest = is_swept && self.wrong.is_none();
        if is_at_rest || self.again.is_some_and(|again| Instant::now() < again) {
            return;
        }
        let cleared = if is_swept { Ok(()) } else { self.clear(&rules.without_rules(), on_nft).await };
        if cleared.is_ok() {
            self.swept = Some(networks);
        }
        self.wrong = match cleared {
            Ok(()) => self.both().await,
            Err(wrong) => Some(wrong),
        };
        self.again = self.wrong.is_some().then(|| Instant::now() + AGAIN);
    }

    /// Something of ours does not go, or there are rules in both kinds of iptables.
    pub(super) fn trouble(&self) -> Option<HostError> {
        self.wrong.as_ref().map(Wrong::error)
    }

    /// Has the other engines hold nothing of ours; the first of what does not go.
    async fn clear(&self, nothing: &Ruleset, on_nft: Option<bool>) -> Result<(), Wrong> {
        let mut all = Ok(());
        let iptables = self.engine == FirewallEngine::Iptables;
        let (legacy, nft) = (legacy_kind(self.family), nft_kind(self.family));
        if !(iptables && on_nft == Some(false))
            && has_legacy_tables(self.family)
            && is_installed(legacy.program)
        {
            let mut firewall = IptablesFirewall::with_programs(legacy.program, legacy.restorer);
            all = all.and(clear(&mut firewall, nothing, legacy.program).await);
        }
        // Where they have no names of their own, there is one kind.
        let plain = IptablesFirewall::new(self.family);
        if !iptables
            && !is_installed(legacy.program)
            && !is_installed(nft.program)
            && is_installed(plain.program())
        {
            all = all.and(clear(&mut plain.clone(), nothing, plain.program()).await);
        }
        // Where they were empty when we came, no former run has left anything.
        if self.had_nf_tables.unwrap_or(true) {
            if !(iptables && on_nft == Some(true)) && is_installed(nft.program) {
                let mut firewall = IptablesFirewall::with_programs(nft.program, nft.restorer);
                all = all.and(clear(&mut firewall, nothing, nft.program).await);
            }
            if iptables && is_installed("nft") {
                all = all.and(clear(&mut NftablesFirewall::default(), nothing, "nft").await);
            }
        }
        all
    }

    /// A packet has to pass the rules of both kinds, whichever of them somebody looks at.
    async fn both(&self) -> Option<Wrong> {
        let family = self.family;
        let counted = blocking(move || {
            let (legacy, nft) = (legacy_kind(family), nft_kind(family));
            let has_legacy = has_legacy_tables(family) && has_nf_tables();
            if !has_legacy || !is_installed(legacy.saver) || !is_installed(nft.saver) {
                return Ok((0, 0));
            }
            Ok((count(legacy.saver), count(nft.saver)))
        });
        let (legacy, nft) = counted.await.ok()?;
        (legacy > 0 && nft > 0).then(|| Wrong {
            what: format!(
                "this host has rules in iptables-legacy ({legacy}) and in iptables-nft ({nft}), and a packet has to pass both"
            ),
            why: "keep to one kind (update-alternatives --config iptables) and clear away the other's \
                  (`iptables-legacy-save`, `iptables-nft-save` show them)"
                .into(),
        })
    }
}

/// Has an engine hold nothing of ours.
async fn clear(firewall: &mut impl Firewall, nothing: &Ruleset, program: &str) -> Result<(), Wrong> {
    match firewall.ensure(nothing).await {
        Ok(Ensured::Written) => {
            info!(program, network = %nothing.network, "rules that we no longer use were cleared away");
            Ok(())
        }
        // What is not there holds nothing.
        Ok(Ensured::Unchanged) | Err(HostError::Missing { .. }) => Ok(()),
        Err(error) => Err(Wrong {
            what: format!("rules that we no longer use may still stand in {program}"),
            why: chain(&error),
        }),
    }
}

/// Whether x_tables hold any table in this network namespace.
pub(super) fn has_legacy_tables(family: Family) -> bool {
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

pub(super) fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory: PathBuf| directory.join(program).is_file())
}

/// How many rules a program like `iptables-save` shows.
fn count(saver: &str) -> usize {
    let Ok(output) = Command::new(saver).output() else { return 0 };
    String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.starts_with("-A ")).count()
}
