//! The traffic rules of the two hosts: Docker's, out of `tests/firewall`, and ours.

use std::fs;
use std::path::Path;
use std::process::Command;

use flannel_core::firewall::docker::NETWORK_MARK;
use flannel_core::firewall::{Wanted, rules};
use flannel_core::host::{Ensured, Firewall};
use flannel_linux::firewall::LinuxFirewall;
use flannel_linux::firewall::iptables::{Family, IptablesFirewall};
use flannel_linux::firewall::nftables::NftablesFirewall;

use super::Place::{Host, Pod, Published};
use super::{Cluster, feed};
use crate::need;

/// The network of the cluster.
pub const NETWORK: &str = "10.5.0.0/16";

/// One kind of traffic rules of ours, and the iptables that the others on the host use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// iptables, with its rules in nf_tables.
    IptablesNft,
    /// iptables, with tables of its own.
    IptablesLegacy,
    /// nft, beside others who use iptables.
    Nftables,
}

/// All of them.
pub const ENGINES: [Engine; 3] = [Engine::IptablesNft, Engine::IptablesLegacy, Engine::Nftables];

impl Engine {
    /// As a fresh agent has them.
    pub fn ours(self) -> LinuxFirewall {
        let [program, restorer, _] = self.programs();
        match self {
            Self::Nftables => LinuxFirewall::through_nft(NftablesFirewall::default(), Family::Ipv4),
            _ => {
                let iptables = IptablesFirewall::with_programs(program, restorer);
                LinuxFirewall::through_iptables(iptables, Family::Ipv4)
            }
        }
    }

    /// The iptables, its restore and its save that Docker and the operator use on such a host.
    pub fn programs(self) -> [&'static str; 3] {
        match self {
            Self::IptablesNft | Self::Nftables => {
                ["iptables-nft", "iptables-nft-restore", "iptables-nft-save"]
            }
            Self::IptablesLegacy => ["iptables-legacy", "iptables-legacy-restore", "iptables-legacy-save"],
        }
    }
}

/// The two hosts of a cluster and what their rules are made with.
#[derive(Clone, Copy, Debug)]
pub struct Hosts<'a> {
    /// Which cluster.
    pub cluster: &'a Cluster,
    /// Which rules.
    pub engine: Engine,
}

impl Hosts<'_> {
    /// Whether this machine has what they need.
    pub fn possible() -> bool {
        ["ip", "bridge", "nft", "iptables-nft", "iptables-legacy"].into_iter().all(need)
    }

    /// Takes all rules away; gives FORWARD that policy.
    pub fn clear(&self, policy: &str) {
        for host in [1, 2] {
            self.feed(host, "nft", &["-f", "-"], "flush ruleset");
            for engine in [Engine::IptablesNft, Engine::IptablesLegacy] {
                let policy = if engine.programs() == self.engine.programs() { policy } else { "ACCEPT" };
                self.feed(host, engine.programs()[1], &[], &BARE.replace("{policy}", policy));
            }
        }
    }

    /// Loads a file of `tests/firewall` on both hosts, in addition to what is there; see [`fixture`].
    pub fn load(&self, file: &str, options: &[&str]) {
        for host in [1, 2] {
            let text = fixture(file, host, options);
            if file.ends_with(".nft") {
                self.feed(host, "nft", &["-f", "-"], &text);
            } else {
                self.feed(host, self.engine.programs()[1], &["--noflush"], &text);
            }
        }
    }

    /// Has our rules made to stand on both hosts, as two agents would.
    pub fn ensure(&self, ours: &mut [LinuxFirewall; 2], wanted: Wanted) -> [Ensured; 2] {
        let mut host = 0;
        ours.each_mut().map(|ours| {
            host += 1;
            let subnet = format!("10.5.{host}.0/24").parse().expect("it is a subnet");
            let rules = rules(NETWORK.parse().expect("it is a network"), subnet, wanted, vec![]);
            self.cluster.inside(Host(host), || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let ensured = runtime.expect("a runtime can be built").block_on(ours.ensure(&rules));
                ensured.unwrap_or_else(|error| panic!("{error:?}"))
            })
        })
    }

    /// All rules of the hosts, and the connections that they know, for whoever wonders.
    pub fn state(&self) -> String {
        let mut state = String::new();
        for host in [1, 2] {
            let legacy = self.feed(host, "iptables-legacy-save", &[], "");
            let tables = self.feed(host, "nft", &["list", "ruleset"], "");
            let known = self.cluster.inside(Host(host), || fs::read_to_string("/proc/net/nf_conntrack"));
            let known = known.unwrap_or_else(|error| error.to_string());
            state += &format!("host {host}:\n{legacy}{tables}{known}");
        }
        state
    }

    /// Runs a program on a host, with that on its stdin; what it prints.
    ///
    /// # Panics
    /// It fails.
    pub fn feed(&self, host: u8, program: &str, words: &[&str], text: &str) -> String {
        let fed = || feed(Command::new(program).args(words), text);
        self.cluster
            .inside(Host(host), fed)
            .unwrap_or_else(|said| panic!("{program} {words:?}: {said}\n{text}"))
    }
}

/// A file of `tests/firewall`, for that host. A line that ends in `# with OPTION` or
/// `# without OPTION` counts only with that option, or without it.
///
/// # Panics
/// There is no such file.
pub fn fixture(file: &str, host: u8, options: &[&str]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("firewall").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let text = text
        .replace("{bridge}", "docker0")
        .replace("{network}", NETWORK)
        .replace("{subnet}", &format!("10.5.{host}.0/24"))
        .replace("{container}", &Pod(host).address().to_string())
        .replace("{published}", &Published(host).address().to_string())
        .replace("{mark}", &format!("{NETWORK_MARK:#x}"));
    let applies = |line| match conditional(line) {
        (line, None) => Some(line),
        (line, Some((option, with))) => (options.contains(&option) == with).then_some(line),
    };
    text.lines().filter_map(applies).flat_map(|line| [line, "\n"]).collect()
}

/// The line, and the option that it depends on and how.
fn conditional(line: &str) -> (&str, Option<(&str, bool)>) {
    for (words, with) in [(" # without ", false), (" # with ", true)] {
        if let Some((line, option)) = line.split_once(words) {
            return (line, Some((option, with)));
        }
    }
    (line, None)
}

/// No rules at all, in every table that anybody uses here.
const BARE: &str = "
*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD {policy} [0:0]
:OUTPUT ACCEPT [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
COMMIT
";
