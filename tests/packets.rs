//! Rung 6, packets: what arrives beside which Docker, and from which address.
//!
//! The rules of each kind of Docker are files in `firewall/`, because there is one
//! dockerd at most on a machine; each says where it is known from. What is expected
//! is written by hand in the grids below: there one reads what works with whom.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use flannel_core::firewall::docker::{NETWORK_MARK, advice};
use flannel_core::firewall::{Ruleset, Wanted, rules};
use flannel_core::host::{Ensured, Firewall};
use flannel_linux::IptablesFirewall;
use flannel_tests::need;
use flannel_tests::packets::Place::{Host, Outside, Pod, Published};
use flannel_tests::packets::{Cluster, Flow, HOST_PORT, PUBLISHED, Place, UNPUBLISHED, feed};

/// By which address the receiver knows the sender: with `--ip-masq`, and without.
///
/// `vtep` is the sender's flannel.1, `bridge` its docker0.
const SOURCES: &str = "
    pod → remote pod                | pod     pod
    pod → pod beside it             | pod     pod
    pod → outside                   | host    pod
    pod → remote host               | host    pod
    pod → remote published pod      | pod     pod
    pod → remote host's port        | host    pod
    host → its pod                  | bridge  bridge
    host → remote pod               | vtep    vtep
    host by its eth0 → remote pod   | vtep    host
    outside → pod                   | outside outside
    outside → host's port           | outside outside
";

/// What arrives with our rules, whatever the policy of FORWARD.
///
/// `old` is 20.10, 24 and 27. A `+` behind a version is for all the options that there
/// are for it, `29nft-` for `--allow-direct-routing` alone, and `28.2raw` for none, but
/// an accept of ours in front of Docker's raw rules, for what comes from the network.
/// In a cell, `m` is for: with `--ip-masq`.
const WITH_OURS: &str = "
                                    | old   28.0 28.0+  28.2 28.2+  28.2raw  29nft  29nft-  29nft+
    pod → remote pod                | +     +    +      -    +      +        -      -       +
    pod → pod beside it             | +     +    +      +    +      +        +      +       +
    pod → outside                   | +     +    +      m    +      m        m      +       +
    pod → remote host               | +     +    +      m    +      m        m      +       +
    pod → remote published pod      | +     -    +      -    +      +        -      +       +
    pod → remote host's port        | +     +    +      m    +      m        m      +       +
    host → its pod                  | +     +    +      +    +      +        +      +       +
    host → remote pod               | +     +    +      -    +      +        -      -       +
    host by its eth0 → remote pod   | +     +    +      -    +      m        -      -       m
    outside → pod                   | +     +    +      -    +      -        -      -       -
    outside → host's port           | +     +    +      +    +      +        +      +       +
";

/// What arrives without our rules where FORWARD accepts.
const ACCEPTING: &str = "
                                    | old   28.0 28.0+  28.2 28.2+  28.2raw  29nft  29nft-  29nft+
    pod → remote pod                | +     -    -      -    -      -        -      -       -
    pod → pod beside it             | +     +    +      +    +      +        +      +       +
    pod → outside                   | +     +    +      -    +      -        -      +       +
    pod → remote host               | +     +    +      -    +      -        -      +       +
    pod → remote published pod      | +     -    +      -    +      -        -      +       +
    pod → remote host's port        | +     +    +      -    +      -        -      +       +
    host → its pod                  | +     +    +      +    +      +        +      +       +
    host → remote pod               | +     -    -      -    -      -        -      -       -
    host by its eth0 → remote pod   | +     -    -      -    -      -        -      -       -
    outside → pod                   | +     -    -      -    -      -        -      -       -
    outside → host's port           | +     +    +      +    +      +        +      +       +
";

/// What arrives without our rules where FORWARD drops. Docker's nftables accept nothing
/// there; `b` is for: where there is no br_netfilter.
const DROPPING: &str = "
                                    | old   28.0 28.0+  28.2 28.2+  28.2raw  29nft  29nft-  29nft+
    pod → remote pod                | -     -    -      -    -      -        -      -       -
    pod → pod beside it             | +     +    +      +    +      +        b      b       b
    pod → outside                   | +     +    +      -    +      -        -      -       -
    pod → remote host               | +     +    +      -    +      -        -      -       -
    pod → remote published pod      | +     -    +      -    +      -        -      -       -
    pod → remote host's port        | +     +    +      -    +      -        -      -       -
    host → its pod                  | +     +    +      +    +      +        +      +       +
    host → remote pod               | -     -    -      -    -      -        -      -       -
    host by its eth0 → remote pod   | -     -    -      -    -      -        -      -       -
    outside → pod                   | -     -    -      -    -      -        -      -       -
    outside → host's port           | +     +    +      +    +      +        -      -       -
";

const FLOWS: [(&str, Flow); 11] = [
    ("pod → remote pod", flow(Pod(1), Pod(2), UNPUBLISHED)),
    ("pod → pod beside it", flow(Pod(1), Published(1), UNPUBLISHED)),
    ("pod → outside", flow(Pod(1), Outside, UNPUBLISHED)),
    ("pod → remote host", flow(Pod(1), Host(2), UNPUBLISHED)),
    ("pod → remote published pod", flow(Pod(1), Published(2), PUBLISHED)),
    ("pod → remote host's port", flow(Pod(1), Host(2), HOST_PORT)),
    ("host → its pod", flow(Host(1), Pod(1), UNPUBLISHED)),
    ("host → remote pod", flow(Host(1), Pod(2), UNPUBLISHED)),
    (
        "host by its eth0 → remote pod",
        Flow { bound: Some(Host(1).address()), ..flow(Host(1), Pod(2), UNPUBLISHED) },
    ),
    ("outside → pod", flow(Outside, Pod(1), UNPUBLISHED)),
    ("outside → host's port", flow(Outside, Host(1), HOST_PORT)),
];

const fn flow(from: Place, to: Place, port: u16) -> Flow {
    Flow { from, bound: None, to: std::net::SocketAddrV4::new(to.address(), port) }
}

/// One kind of Docker, with or without what `mk-docker-opts.sh` has for it.
#[derive(Clone, Copy, Debug)]
struct Docker {
    /// In `firewall/`.
    file: &'static str,
    /// In the grids.
    column: &'static str,
    options: &'static [&'static str],
}

/// One kind of traffic rules of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    IptablesNft,
    IptablesLegacy,
}

const ENGINES: [Engine; 2] = [Engine::IptablesNft, Engine::IptablesLegacy];

impl Engine {
    fn firewall(self) -> IptablesFirewall {
        let [program, restorer, _] = self.programs();
        IptablesFirewall::with_programs(program, restorer)
    }

    /// The iptables, its restore and its save that Docker and the operator use on such a host.
    fn programs(self) -> [&'static str; 3] {
        match self {
            Self::IptablesNft => ["iptables-nft", "iptables-nft-restore", "iptables-nft-save"],
            Self::IptablesLegacy => ["iptables-legacy", "iptables-legacy-restore", "iptables-legacy-save"],
        }
    }
}

/// The two hosts with one kind of rules from Docker, and somebody's policy.
struct Hosts<'a> {
    cluster: &'a Cluster,
    docker: Docker,
    engine: Engine,
}

impl Hosts<'_> {
    /// Takes all rules away and loads Docker's.
    fn renew(&self, policy: &str) {
        for host in [1, 2] {
            for engine in ENGINES {
                self.restore(host, engine, BARE.replace("{policy}", "ACCEPT"));
            }
            self.restore(host, self.engine, BARE.replace("{policy}", policy));
            self.feed(host, "nft", &["-f", "-"], "table ip docker-bridges; delete table ip docker-bridges");
            let text = self.docker.rules(host, policy);
            if self.docker.file.ends_with(".nft") {
                self.feed(host, "nft", &["-f", "-"], &text);
            } else {
                self.restore(host, self.engine, text);
            }
        }
    }

    fn restore(&self, host: u8, engine: Engine, text: String) {
        self.feed(host, engine.programs()[1], &[], &text);
    }

    fn feed(&self, host: u8, program: &str, words: &[&str], text: &str) -> String {
        let fed = || feed(Command::new(program).args(words), text);
        self.cluster.inside(Host(host), fed).unwrap_or_else(|said| panic!("{program}: {said}{text}"))
    }

    /// Has the rules made to stand on both hosts, as two agents would.
    fn ensure(&self, firewalls: &mut [IptablesFirewall; 2], wanted: Wanted) -> [Ensured; 2] {
        let mut host = 0;
        firewalls.each_mut().map(|firewall| {
            host += 1;
            let rules = ruleset(host, wanted);
            let ensured = self.cluster.inside(Host(host), || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(firewall.ensure(&rules)).unwrap()
            });
            self.stand_in(host);
            ensured
        })
    }

    /// What the rules are still to do by themselves: come before Docker's chains, and mark.
    fn stand_in(&self, host: u8) {
        if self.docker.column == "old" {
            return;
        }
        let [program, ..] = self.engine.programs();
        let mark = format!("{NETWORK_MARK:#x}/{NETWORK_MARK:#x}");
        let mut rules = vec![
            "-w -I FORWARD -j FLANNEL-FWD".to_owned(),
            format!("-w -t mangle -I PREROUTING -s 10.5.0.0/16 -j MARK --set-xmark {mark}"),
        ];
        if self.docker.column == "28.2raw" {
            rules.push(format!("-w -t raw -I PREROUTING -s 10.5.0.0/16 -d 10.5.{host}.0/24 -j ACCEPT"));
        }
        for words in rules {
            self.feed(host, program, &words.split(' ').collect::<Vec<_>>(), "");
        }
    }

    /// Puts back what a snapshot without our rules has: what a tool that saves and restores does.
    fn lose_ours(&self) {
        for host in [1, 2] {
            let [_, _, save] = self.engine.programs();
            let saved = self.feed(host, save, &[], "");
            let others: String = saved
                .lines()
                .filter(|line| !line.contains("FLANNEL-") && !line.contains("10.5.0.0/16"))
                .flat_map(|line| [line, "\n"])
                .collect();
            self.restore(host, self.engine, others);
        }
    }

    /// What is said of Docker's rules as they are listed here.
    fn advice(&self) -> Option<String> {
        let [program, ..] = self.engine.programs();
        let mut listing = self.feed(1, program, &["-t", "raw", "-S", "PREROUTING"], "");
        if self.docker.file.ends_with(".nft") {
            listing += &self.feed(1, "nft", &["list", "table", "ip", "docker-bridges"], "");
        }
        advice(&listing, "docker0")
    }

    /// Compares what arrives with a grid.
    fn check(&self, grid: &str, masquerade: bool, when: &str, wrong: &mut String) {
        let expected: BTreeMap<Flow, Option<Ipv4Addr>> = FLOWS
            .iter()
            .map(|&(name, flow)| {
                let arrives = match cell(grid, name, self.docker.column) {
                    "+" => true,
                    "-" => false,
                    "m" => masquerade,
                    "b" => !Path::new("/proc/sys/net/bridge").exists(),
                    other => panic!("{other:?} in the grid"),
                };
                (flow, arrives.then(|| source(name, masquerade, flow.from)))
            })
            .collect();

        let seen =
            self.cluster.try_out(&expected.iter().map(|(flow, source)| (*flow, source.is_some())).collect());

        for (name, flow) in FLOWS {
            let shown =
                |source: Option<Ipv4Addr>| source.map_or("dropped".into(), |source| format!("from {source}"));
            let (seen, expected) = (shown(seen[&flow]), shown(expected[&flow]));
            if seen != expected {
                let Self { docker, engine, .. } = self;
                writeln!(wrong, "{docker:?}, {engine:?}, {when}: {name}: {seen}, not {expected}").unwrap();
            }
        }
    }
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

impl Docker {
    /// Its rules on that host.
    fn rules(&self, host: u8, policy: &str) -> String {
        let path = fixtures().join(self.file);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let text = text
            .replace("{bridge}", "docker0")
            .replace("{policy}", policy)
            .replace("{container}", &Pod(host).address().to_string())
            .replace("{published}", &Published(host).address().to_string())
            .replace("{mark}", &format!("{NETWORK_MARK:#x}"));
        text.lines().filter_map(|line| self.applies(line)).flat_map(|line| [line, "\n"]).collect()
    }

    /// The line without its condition, if that is met.
    fn applies<'a>(&self, line: &'a str) -> Option<&'a str> {
        if let Some((line, option)) = line.split_once(" # without ") {
            return (!self.options.contains(&option)).then_some(line);
        }
        if let Some((line, option)) = line.split_once(" # with ") {
            return self.options.contains(&option).then_some(line);
        }
        Some(line)
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("firewall")
}

fn ruleset(host: u8, wanted: Wanted) -> Ruleset {
    rules("10.5.0.0/16".parse().unwrap(), format!("10.5.{host}.0/24").parse().unwrap(), wanted, vec![])
}

/// The words behind `|` in the row of that name.
fn row<'a>(grid: &'a str, name: &str) -> Vec<&'a str> {
    let cells = grid.lines().filter_map(|line| line.split_once('|')).find(|(row, _)| row.trim() == name);
    cells.unwrap_or_else(|| panic!("no row {name:?}")).1.split_whitespace().collect()
}

fn cell<'a>(grid: &'a str, name: &str, column: &str) -> &'a str {
    let place = row(grid, "").iter().position(|head| *head == column);
    row(grid, name)[place.unwrap_or_else(|| panic!("no column {column:?}"))]
}

fn source(name: &str, masquerade: bool, from: Place) -> Ipv4Addr {
    match row(SOURCES, name)[usize::from(!masquerade)] {
        "pod" | "outside" => from.address(),
        "host" => Host(1).address(),
        "vtep" => Ipv4Addr::new(10, 5, 1, 0),
        "bridge" => Ipv4Addr::new(10, 5, 1, 1),
        other => panic!("{other:?} among the sources"),
    }
}

/// Goes through the grids with one kind of Docker: each policy, each engine of ours.
fn beside(dockers: &[Docker]) {
    if !["ip", "bridge", "nft", "iptables-nft", "iptables-legacy"].into_iter().all(need) {
        return;
    }
    let cluster = Cluster::new();
    let mut wrong = String::new();
    for &docker in dockers {
        for engine in ENGINES {
            let hosts = Hosts { cluster: &cluster, docker, engine };
            for (policy, without) in [("ACCEPT", ACCEPTING), ("DROP", DROPPING)] {
                hosts.renew(policy);
                // What our rules cannot let pass is pointed out, and nothing else.
                let in_the_way = cell(WITH_OURS, "pod → remote published pod", docker.column) == "-"
                    || ["28.2raw", "29nft-"].contains(&docker.column);
                assert_eq!(hosts.advice().is_some(), in_the_way, "{docker:?}: {:?}", hosts.advice());
                hosts.check(without, false, &format!("FORWARD {policy}, without ours"), &mut wrong);
                for masquerade in [true, false] {
                    let wanted = Wanted { masquerade, random_fully: true, forward: true };
                    let when = |what: &str| format!("FORWARD {policy}, masquerade {masquerade}, {what}");
                    let mut firewalls = [engine.firewall(), engine.firewall()];
                    hosts.renew(policy);

                    assert_eq!(hosts.ensure(&mut firewalls, wanted), [Ensured::Written; 2]);
                    hosts.check(WITH_OURS, masquerade, &when("new"), &mut wrong);

                    hosts.lose_ours();
                    assert_eq!(hosts.ensure(&mut firewalls, wanted), [Ensured::Written; 2]);
                    hosts.check(WITH_OURS, masquerade, &when("after a flush"), &mut wrong);

                    let mut restarted = [engine.firewall(), engine.firewall()];
                    assert_eq!(hosts.ensure(&mut restarted, wanted), [Ensured::Unchanged; 2]);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn beside_docker_20_10() {
    beside(&[Docker { file: "docker-20.10.iptables", column: "old", options: &[] }]);
}

#[test]
fn beside_docker_24() {
    beside(&[Docker { file: "docker-24.iptables", column: "old", options: &[] }]);
}

#[test]
fn beside_docker_27() {
    beside(&[Docker { file: "docker-27.iptables", column: "old", options: &[] }]);
}

#[test]
fn beside_docker_28_0() {
    let bare = Docker { file: "docker-28.0.iptables", column: "28.0", options: &[] };
    let options = &["DOCKER_INSECURE_NO_IPTABLES_RAW"];

    beside(&[bare, Docker { column: "28.0+", options, ..bare }]);
}

#[test]
fn beside_docker_28_2() {
    let bare = Docker { file: "docker-28.2.iptables", column: "28.2", options: &[] };
    let options = &["--allow-direct-routing"];

    beside(&[bare, Docker { column: "28.2+", options, ..bare }, Docker { column: "28.2raw", ..bare }]);
}

#[test]
fn beside_docker_29() {
    let bare = Docker { file: "docker-29.iptables", column: "28.2", options: &[] };
    let options = &["--allow-direct-routing", "--bridge-accept-fwmark"];

    beside(&[bare, Docker { column: "28.2+", options, ..bare }]);
}

#[test]
fn beside_docker_29_with_nftables() {
    let bare = Docker { file: "docker-29.nft", column: "29nft", options: &[] };
    let options = &["--allow-direct-routing", "--bridge-accept-fwmark"];

    beside(&[
        bare,
        Docker { column: "29nft-", options: &options[..1], ..bare },
        Docker { column: "29nft+", options, ..bare },
    ]);
}
