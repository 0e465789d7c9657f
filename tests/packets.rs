//! Rung 6, packets: what arrives beside which Docker, and from which address.
//!
//! The rules of each kind of Docker are files in `firewall/`, because there is one
//! dockerd at most on a machine; each says where it is known from. What is expected
//! is written by hand in the grids below: there one reads what works with whom.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::panic::resume_unwind;
use std::path::Path;
use std::thread;

use flannel_core::firewall::Wanted;
use flannel_core::firewall::docker::{Listing, advice};
use flannel_core::host::Ensured;
use flannel_linux::firewall::LinuxFirewall;
use flannel_tests::packets::Place::{Host, Outside, Pod, Published};
use flannel_tests::packets::rules::{ENGINES, Engine, Hosts, NETWORK};
use flannel_tests::packets::{Cluster, Flow, HOST_PORT, PUBLISHED, Place, UNPUBLISHED};

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
/// are for it, `29nft-` for `--allow-direct-routing` alone.
/// In a cell, `m` is for: with `--ip-masq`.
const WITH_OURS: &str = "
                                    | old    28.0   28.0+  28.2   28.2+  29+    29nft  29nft-  29nft+
    pod → remote pod                | +      +      +      +      +      +      -      -      +
    pod → pod beside it             | +      +      +      +      +      +      +      +      +
    pod → outside                   | +      +      +      m      +      +      m      +      +
    pod → remote host               | +      +      +      m      +      +      m      +      +
    pod → remote published pod      | +      +      +      +      +      +      -      +      +
    pod → remote host's port        | +      +      +      m      +      +      m      +      +
    host → its pod                  | +      +      +      +      +      +      +      +      +
    host → remote pod               | +      +      +      +      +      +      -      -      +
    host by its eth0 → remote pod   | +      +      +      m      +      +      -      -      m
    outside → pod                   | +      +      +      -      +      +      -      -      -
    outside → host's port           | +      +      +      +      +      +      +      +      +
";

/// The same with our rules in nftables, where FORWARD accepts: an accept of ours undoes
/// nothing that others drop, and only our mark is left, for Docker from 29 on.
const WITH_NFTABLES_ACCEPTING: &str = "
                                    | old   28.0 28.0+  28.2 28.2+  29+  29nft  29nft-  29nft+
    pod → remote pod                | +     -    -      -    -      +    -      -       +
    pod → pod beside it             | +     +    +      +    +      +    +      +       +
    pod → outside                   | +     +    +      m    +      +    m      +       +
    pod → remote host               | +     +    +      m    +      +    m      +       +
    pod → remote published pod      | +     -    +      -    +      +    -      +       +
    pod → remote host's port        | +     +    +      m    +      +    m      +       +
    host → its pod                  | +     +    +      +    +      +    +      +       +
    host → remote pod               | +     -    -      -    -      +    -      -       +
    host by its eth0 → remote pod   | +     -    -      -    -      m    -      -       m
    outside → pod                   | +     -    -      -    -      -    -      -       -
    outside → host's port           | +     +    +      +    +      +    +      +       +
";

/// And where FORWARD drops, which is a drop of others too.
const WITH_NFTABLES_DROPPING: &str = "
                                    | old   28.0 28.0+  28.2 28.2+  29+  29nft  29nft-  29nft+
    pod → remote pod                | -     -    -      -    -      +    -      -       -
    pod → pod beside it             | +     +    +      +    +      +    b      b       b
    pod → outside                   | +     +    +      m    +      +    -      -       -
    pod → remote host               | +     +    +      m    +      +    -      -       -
    pod → remote published pod      | +     -    +      -    +      +    -      -       -
    pod → remote host's port        | +     +    +      m    +      +    -      -       -
    host → its pod                  | +     +    +      +    +      +    +      +       +
    host → remote pod               | -     -    -      -    -      +    -      -       -
    host by its eth0 → remote pod   | -     -    -      -    -      m    -      -       -
    outside → pod                   | -     -    -      -    -      -    -      -       -
    outside → host's port           | +     +    +      +    +      +    -      -       -
";

/// What arrives without our rules where FORWARD accepts.
const ACCEPTING: &str = "
                                    | old    28.0   28.0+  28.2   28.2+  29+    29nft  29nft-  29nft+
    pod → remote pod                | +      -      -      -      -      -      -      -      -
    pod → pod beside it             | +      +      +      +      +      +      +      +      +
    pod → outside                   | +      +      +      -      +      +      -      +      +
    pod → remote host               | +      +      +      -      +      +      -      +      +
    pod → remote published pod      | +      -      +      -      +      +      -      +      +
    pod → remote host's port        | +      +      +      -      +      +      -      +      +
    host → its pod                  | +      +      +      +      +      +      +      +      +
    host → remote pod               | +      -      -      -      -      -      -      -      -
    host by its eth0 → remote pod   | +      -      -      -      -      -      -      -      -
    outside → pod                   | +      -      -      -      -      -      -      -      -
    outside → host's port           | +      +      +      +      +      +      +      +      +
";

/// What arrives without our rules where FORWARD drops. Docker's nftables accept nothing
/// there; `b` is for: where there is no br_netfilter.
const DROPPING: &str = "
                                    | old    28.0   28.0+  28.2   28.2+  29+    29nft  29nft-  29nft+
    pod → remote pod                | -      -      -      -      -      -      -      -      -
    pod → pod beside it             | +      +      +      +      +      +      b      b      b
    pod → outside                   | +      +      +      -      +      +      -      -      -
    pod → remote host               | +      +      +      -      +      +      -      -      -
    pod → remote published pod      | +      -      +      -      +      +      -      -      -
    pod → remote host's port        | +      +      +      -      +      +      -      -      -
    host → its pod                  | +      +      +      +      +      +      +      +      +
    host → remote pod               | -      -      -      -      -      -      -      -      -
    host by its eth0 → remote pod   | -      -      -      -      -      -      -      -      -
    outside → pod                   | -      -      -      -      -      -      -      -      -
    outside → host's port           | +      +      +      +      +      +      -      -      -
";

const FLOWS: [(&str, Flow); 11] = [
    ("pod → remote pod", Flow::new(Pod(1), Pod(2), UNPUBLISHED)),
    ("pod → pod beside it", Flow::new(Pod(1), Published(1), UNPUBLISHED)),
    ("pod → outside", Flow::new(Pod(1), Outside, UNPUBLISHED)),
    ("pod → remote host", Flow::new(Pod(1), Host(2), UNPUBLISHED)),
    ("pod → remote published pod", Flow::new(Pod(1), Published(2), PUBLISHED)),
    ("pod → remote host's port", Flow::new(Pod(1), Host(2), HOST_PORT)),
    ("host → its pod", Flow::new(Host(1), Pod(1), UNPUBLISHED)),
    ("host → remote pod", Flow::new(Host(1), Pod(2), UNPUBLISHED)),
    (
        "host by its eth0 → remote pod",
        Flow { bound: Some(Host(1).address()), ..Flow::new(Host(1), Pod(2), UNPUBLISHED) },
    ),
    ("outside → pod", Flow::new(Outside, Pod(1), UNPUBLISHED)),
    ("outside → host's port", Flow::new(Outside, Host(1), HOST_PORT)),
];

/// One kind of Docker, with or without what `mk-docker-opts.sh` has for it.
#[derive(Clone, Copy, Debug)]
struct Docker {
    /// In `firewall/`.
    file: &'static str,
    /// In the grids.
    column: &'static str,
    options: &'static [&'static str],
}

const DOCKER_20_10: Docker = Docker { file: "docker-20.10.iptables", column: "old", options: &[] };

const DOCKER_28_2: Docker = Docker { file: "docker-28.2.iptables", column: "28.2", options: &[] };

const DOCKER_28_2_WITH_OPTIONS: Docker =
    Docker { column: "28.2+", options: &["--allow-direct-routing"], ..DOCKER_28_2 };

/// The two hosts beside one kind of Docker.
struct Beside<'a> {
    docker: Docker,
    hosts: Hosts<'a>,
}

impl Beside<'_> {
    /// What is not as the grids say, with each policy of FORWARD.
    fn differences(&self) -> String {
        let mut wrong = String::new();
        for (policy, without) in [("ACCEPT", ACCEPTING), ("DROP", DROPPING)] {
            let with = with_ours(self.hosts.engine, policy);
            self.renew(policy);
            self.check(without, false, &format!("FORWARD {policy}, without ours"), &mut wrong);
            for masquerade in [true, false] {
                let wanted = Wanted { masquerade, random_fully: true, forward: true };
                let when = |what: &str| format!("FORWARD {policy}, masquerade {masquerade}, {what}");
                let fresh = || [self.hosts.engine.ours(), self.hosts.engine.ours()];
                let mut ours = fresh();
                self.renew(policy);

                assert_eq!(self.ensure(&mut ours, wanted), [Ensured::Written; 2]);
                self.check(with, masquerade, &when("new"), &mut wrong);
                // What our rules cannot let pass is pointed out, and nothing else.
                let (docker, advice) = (self.docker, self.advice());
                let in_the_way = cell(with, "pod → remote pod", docker.column) == "-";
                assert_eq!(advice.is_some(), in_the_way, "{docker:?}, {}: {advice:?}", when("new"));

                self.lose_ours();
                assert_eq!(self.ensure(&mut ours, wanted), [Ensured::Written; 2]);
                self.check(with, masquerade, &when("after a flush"), &mut wrong);

                assert_eq!(self.ensure(&mut fresh(), wanted), [Ensured::Unchanged; 2]);
            }
        }
        wrong
    }

    /// What is not as the grids say while masquerading is switched off and on again, by the
    /// same agents and without anything else being touched.
    fn differences_while_masquerading_changes(&self) -> String {
        let (mut wrong, engine) = (String::new(), self.hosts.engine);
        for policy in ["ACCEPT", "DROP"] {
            self.renew(policy);
            let mut ours = [engine.ours(), engine.ours()];
            for masquerade in [true, false, true] {
                let wanted = Wanted { masquerade, random_fully: true, forward: true };
                assert_eq!(self.ensure(&mut ours, wanted), [Ensured::Written; 2]);
                let when = format!("FORWARD {policy}, then masquerade {masquerade}");
                self.check(with_ours(engine, policy), masquerade, &when, &mut wrong);
                assert_eq!(self.ensure(&mut ours, wanted), [Ensured::Unchanged; 2]);
            }
        }
        wrong
    }

    /// The same while agents with one engine and with another follow each other.
    fn differences_while_the_engine_changes(&self) -> String {
        let (mut wrong, engine) = (String::new(), self.hosts.engine);
        let other = if engine == Engine::Nftables { Engine::IptablesNft } else { Engine::Nftables };
        let wanted = Wanted { masquerade: true, random_fully: true, forward: true };
        for policy in ["ACCEPT", "DROP"] {
            self.renew(policy);
            for engine in [engine, other, engine] {
                // As it starts.
                let mut ours = [engine.ours(), engine.ours()];
                assert_eq!(self.ensure(&mut ours, wanted), [Ensured::Written; 2]);
                let when = format!("FORWARD {policy}, then {engine:?}");
                self.check(with_ours(engine, policy), true, &when, &mut wrong);
                assert_eq!(self.ensure(&mut ours, wanted), [Ensured::Unchanged; 2]);
            }
        }
        wrong
    }

    /// Takes all rules away and loads Docker's.
    fn renew(&self, policy: &str) {
        self.hosts.clear(policy);
        self.hosts.load(self.docker.file, self.docker.options);
    }

    fn ensure(&self, ours: &mut [LinuxFirewall; 2], wanted: Wanted) -> [Ensured; 2] {
        self.hosts.ensure(ours, wanted)
    }

    /// Puts back what a snapshot without our rules has: what a tool that saves and restores does.
    fn lose_ours(&self) {
        for host in [1, 2] {
            let [_, restore, save] = self.hosts.engine.programs();
            let saved = self.hosts.feed(host, save, &[], "");
            let others: String = saved
                .lines()
                .filter(|line| !line.contains("FLANNEL-") && !line.contains(NETWORK))
                .flat_map(|line| [line, "\n"])
                .collect();
            self.hosts.feed(host, restore, &[], &others);
            if self.hosts.engine == Engine::Nftables {
                self.hosts.feed(host, "nft", &["delete", "table", "ip", "flannel-ipv4"], "");
            }
        }
    }

    /// What is said of Docker's rules as they are listed here.
    fn advice(&self) -> Option<String> {
        let [program, ..] = self.hosts.engine.programs();
        let raw = self.hosts.feed(1, program, &["-t", "raw", "-S", "PREROUTING"], "");
        let is_beside = self.hosts.engine == Engine::Nftables;
        let filter = is_beside.then(|| self.hosts.feed(1, program, &["-S"], ""));
        let bridges = match self.docker.file.ends_with(".nft") {
            true => self.hosts.feed(1, "nft", &["list", "table", "ip", "docker-bridges"], ""),
            false => String::new(),
        };
        let listing = Listing { raw: &raw, filter: filter.as_deref(), bridges: &bridges };
        advice(&listing, NETWORK.parse().unwrap(), "docker0")
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

        let seen = self
            .hosts
            .cluster
            .try_out(&expected.iter().map(|(flow, source)| (*flow, source.is_some())).collect());

        let before = wrong.len();
        for (name, flow) in FLOWS {
            let shown =
                |source: Option<Ipv4Addr>| source.map_or("dropped".into(), |source| format!("from {source}"));
            let (seen, expected) = (shown(seen[&flow]), shown(expected[&flow]));
            if seen != expected {
                let Self { docker, hosts: Hosts { engine, .. } } = self;
                writeln!(wrong, "{docker:?}, {engine:?}, {when}: {name}: {seen}, not {expected}").unwrap();
            }
        }
        if wrong.len() > before {
            wrong.push_str(&self.hosts.state());
        }
    }
}

/// What arrives with our rules in that engine, where FORWARD has that policy.
fn with_ours(engine: Engine, policy: &str) -> &'static str {
    match (engine, policy) {
        (Engine::Nftables, "ACCEPT") => WITH_NFTABLES_ACCEPTING,
        (Engine::Nftables, _) => WITH_NFTABLES_DROPPING,
        _ => WITH_OURS,
    }
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

/// Goes through the grids with these kinds of Docker, with each engine of ours by its side.
fn beside(dockers: &[Docker]) {
    beside_each(dockers, |beside| beside.differences());
}

fn beside_each(dockers: &[Docker], differences: impl Fn(&Beside<'_>) -> String + Sync) {
    if !Hosts::possible() {
        return;
    }
    let wrong: String = thread::scope(|scope| {
        let with_each = ENGINES.map(|engine| {
            let differences = &differences;
            scope.spawn(move || {
                let cluster = Cluster::new();
                let hosts = Hosts { cluster: &cluster, engine };
                dockers.iter().map(|&docker| differences(&Beside { docker, hosts })).collect::<String>()
            })
        });
        with_each.into_iter().map(|work| work.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn beside_docker_20_10() {
    beside(&[DOCKER_20_10]);
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
    beside(&[DOCKER_28_2, DOCKER_28_2_WITH_OPTIONS]);
}

#[test]
fn beside_docker_29() {
    let bare = Docker { file: "docker-29.iptables", column: "28.2", options: &[] };
    let options = &["--allow-direct-routing", "--bridge-accept-fwmark"];

    beside(&[bare, Docker { column: "29+", options, ..bare }]);
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

#[test]
fn the_grid_holds_while_masquerading_is_switched_off_and_on() {
    beside_each(&[DOCKER_20_10, DOCKER_28_2_WITH_OPTIONS], |beside| {
        beside.differences_while_masquerading_changes()
    });
}

#[test]
fn the_grid_holds_while_agents_with_other_engines_follow_each_other() {
    beside_each(&[DOCKER_20_10, DOCKER_28_2_WITH_OPTIONS], |beside| {
        beside.differences_while_the_engine_changes()
    });
}
