//! Rung 6, hand-over: the traffic rules of a Go flanneld become ours, and ours its own again.
//!
//! Its rules are files in `firewall/`, and what it does with those that it finds is
//! done here as its source says; `interop.rs` has a real one where there is one.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::process::Command;

use flannel_core::firewall::Wanted;
use flannel_core::host::Ensured;
use flannel_tests::packets::Place::{Host, Outside, Pod, Published};
use flannel_tests::packets::rules::{ENGINES, Engine, Hosts, NETWORK, fixture};
use flannel_tests::packets::{Cluster, Flow, HOST_PORT, PUBLISHED, UNPUBLISHED};

const WANTED: Wanted = Wanted { masquerade: true, random_fully: true, forward: true };

/// What a Go flanneld may have left on a host, or may follow us with.
const FLANNELD: [&str; 4] =
    ["flanneld-0.10.iptables", "flanneld-0.20.2.iptables", "flanneld-0.28.9.iptables", "flanneld-0.28.9.nft"];

const FLOWS: [Flow; 9] = [
    Flow::new(Pod(1), Pod(2), UNPUBLISHED),
    Flow::new(Pod(1), Published(1), UNPUBLISHED),
    Flow::new(Pod(1), Outside, UNPUBLISHED),
    Flow::new(Pod(1), Host(2), UNPUBLISHED),
    Flow::new(Pod(1), Published(2), PUBLISHED),
    Flow::new(Host(1), Pod(2), UNPUBLISHED),
    Flow { bound: Some(Host(1).address()), ..Flow::new(Host(1), Pod(2), UNPUBLISHED) },
    Flow::new(Outside, Pod(1), UNPUBLISHED),
    Flow::new(Outside, Host(1), HOST_PORT),
];

/// Runs the test with each iptables on a host where Docker has been before anybody.
fn on_hosts(test: impl Fn(&Hosts<'_>)) {
    if !Hosts::possible() {
        return;
    }
    let cluster = Cluster::new();
    for engine in ENGINES {
        test(&Hosts { cluster: &cluster, engine });
    }
}

/// A host with Docker, whose FORWARD drops unless nothing but that flanneld is to accept:
/// an accept in nftables cannot undo it.
fn bare(hosts: &Hosts<'_>, file: &str) {
    hosts.clear(if file.ends_with(".nft") { "ACCEPT" } else { "DROP" });
    hosts.load("docker-20.10.iptables", &[]);
}

/// All that is on the first host: each chain with its rules in order.
fn all_rules(hosts: &Hosts<'_>) -> Vec<String> {
    let [_, _, save] = hosts.engine.programs();
    let saved = hosts.feed(1, save, &[], "");
    let lines = saved.lines().filter(|line| line.starts_with("-A ")).map(str::to_owned);
    let (ours, others): (Vec<_>, Vec<_>) = lines.partition(|line| line.starts_with("-A FLANNEL"));
    let mut rules: Vec<String> = others.into_iter().chain(ours).collect();
    let tables = hosts.feed(1, "nft", &["list", "tables"], "");
    for table in tables.lines().filter(|line| line.contains("flannel")) {
        let words: Vec<&str> = ["-s", "list"].into_iter().chain(table.split(' ')).collect();
        rules.push(hosts.feed(1, "nft", &words, ""));
    }
    rules
}

fn fresh(hosts: &Hosts<'_>) {
    let mut ours = [hosts.engine.ours(), hosts.engine.ours()];
    assert_eq!(hosts.ensure(&mut ours, WANTED), [Ensured::Written; 2]);
    assert_eq!(hosts.ensure(&mut ours, WANTED), [Ensured::Unchanged; 2]);
}

/// What is not taken away: it lets pass what we let pass, or is empty.
fn may_stay(file: &str, engine: Engine) -> &'static [&'static str] {
    match (file, engine) {
        // Without a comment they may be the operator's; an accept of ours in nftables cannot replace them.
        ("flanneld-0.10.iptables", Engine::Nftables) => {
            &["-A FORWARD -d 10.5.0.0/16 -j ACCEPT", "-A FORWARD -s 10.5.0.0/16 -j ACCEPT"]
        }
        // Made for a network that has no IPv6, too.
        ("flanneld-0.28.9.nft", _) => {
            &["table ip6 flannel-ipv6 {\n\tcomment \"rules for flannel-ipv6\"\n}\n"]
        }
        _ => &[],
    }
}

/// What a Go flanneld does as it starts.
fn start_go(hosts: &Hosts<'_>, file: &str) {
    let [program, restore, _] = hosts.engine.programs();
    for host in [1, 2] {
        let rules = fixture(file, host, &[]);
        let attempt = |words: &str| {
            let mut shell = Command::new("sh");
            let done = hosts.cluster.inside(Host(host), || shell.args(["-c", words]).output().unwrap());
            done.status.success()
        };
        match file {
            // The clean-up of the other kind: it looks for both chains in nat, and cannot
            // delete the one that is jumped to.
            "flanneld-0.28.9.nft" => {
                for chain in ["FLANNEL-POSTRTG", "FLANNEL-FWD"] {
                    attempt(&format!("{program} -w -t nat -F {chain} && {program} -w -t nat -X {chain}"));
                }
                // And its own chains are emptied.
                let emptied = format!("table ip flannel-ipv4\nflush table ip flannel-ipv4\n{rules}");
                hosts.feed(host, "nft", &["-f", "-"], &emptied);
            }
            // One that is missing, and all are taken away, each for itself, and appended.
            "flanneld-0.10.iptables" => {
                hosts.feed(host, restore, &["--noflush"], &rules);
            }
            // The chains are emptied, and then what is there already is deleted before it is added.
            _ => {
                let mut text = String::new();
                for line in rules.lines() {
                    let table = if text.contains("*filter") { "filter" } else { "nat" };
                    let jump = line.split_once(" POSTROUTING ").or_else(|| line.split_once(" FORWARD "));
                    if let Some((_, words)) = jump {
                        let parent = if table == "nat" { "POSTROUTING" } else { "FORWARD" };
                        if attempt(&format!("{program} -w -t {table} -C {parent} {words}")) {
                            text += &format!("-D {parent} {words}\n");
                        }
                    }
                    text += &format!("{line}\n");
                }
                hosts.feed(host, restore, &["--noflush"], &text);
            }
        }
    }
}

/// What arrives, and from which address.
fn packets(hosts: &Hosts<'_>) -> BTreeMap<Flow, Option<Ipv4Addr>> {
    hosts.cluster.try_out(&FLOWS.map(|flow| (flow, true)).into())
}

#[test]
fn the_rules_of_a_go_flanneld_become_ours_without_a_rest() {
    on_hosts(|hosts| {
        bare(hosts, "");
        fresh(hosts);
        let expected = all_rules(hosts);

        for file in FLANNELD {
            bare(hosts, file);
            hosts.load(file, &[]);
            let mut ours = [hosts.engine.ours(), hosts.engine.ours()];

            hosts.ensure(&mut ours, WANTED);

            let mut found = all_rules(hosts);
            found.retain(|rule| !may_stay(file, hosts.engine).contains(&rule.as_str()));
            assert_eq!(found, expected, "{file}, {:?}", hosts.engine);
            assert_eq!(hosts.ensure(&mut ours, WANTED), [Ensured::Unchanged; 2], "{file}");
        }
    });
}

#[test]
fn what_the_operator_denies_is_denied_after_a_go_flanneld_that_came_first() {
    on_hosts(|hosts| {
        let denied = Flow::new(Pod(1), Outside, UNPUBLISHED);
        let arrives = |expected| hosts.cluster.try_out(&[(denied, expected)].into())[&denied].is_some();
        let [program, ..] = hosts.engine.programs();
        bare(hosts, "");
        hosts.load("flanneld-0.20.2.iptables", &[]);
        for host in [1, 2] {
            let words = ["-I", "DOCKER-USER", "-s", "10.5.1.2", "!", "-d", NETWORK, "-j", "DROP"];
            hosts.feed(host, program, &words, "");
        }
        assert!(arrives(true), "it is not the place of the jump");

        fresh(hosts);

        assert!(!arrives(false), "{:?}", hosts.engine);
    });
}

#[test]
fn a_change_of_engine_leaves_nothing_of_the_one_before() {
    on_hosts(|hosts| {
        bare(hosts, "");
        fresh(hosts);
        let expected = all_rules(hosts);

        for before in ENGINES.into_iter().filter(|engine| *engine != hosts.engine) {
            bare(hosts, "");
            let connection = Flow::new(Pod(1), Outside, UNPUBLISHED);
            fresh(&Hosts { engine: before, ..*hosts });
            let mut connection = hosts.cluster.converse(connection);
            assert_eq!(connection.seen.ip(), Host(1).address(), "{before:?}");

            fresh(hosts);

            assert_eq!(all_rules(hosts), expected, "{before:?}, {:?}", hosts.engine);
            let [_, _, save] = before.programs();
            let holds_ours = hosts.feed(1, save, &[], "").contains("FLANNEL-");
            assert_eq!(
                holds_ours,
                hosts.engine != Engine::Nftables && before.programs() == hosts.engine.programs()
            );
            connection.goes_on();
        }
    });
}

#[test]
fn connections_go_on_while_the_rules_become_ours() {
    on_hosts(|hosts| {
        for file in FLANNELD {
            bare(hosts, file);
            hosts.load(file, &[]);
            let mut connections = [
                Flow::new(Pod(1), Outside, UNPUBLISHED),
                Flow::new(Pod(1), Pod(2), UNPUBLISHED),
                Flow::new(Outside, Pod(2), UNPUBLISHED),
            ]
            .map(|flow| hosts.cluster.converse(flow));
            let seen = |number: usize| connections[number].seen.ip();
            assert_eq!([seen(0), seen(1)], [Host(1).address(), Pod(1).address()], "{file}");

            let mut ours = [hosts.engine.ours(), hosts.engine.ours()];
            hosts.ensure(&mut ours, WANTED);

            // The far end knows the near one by the address of before, or it would not hear it.
            for connection in &mut connections {
                connection.goes_on();
            }
        }
    });
}

#[test]
fn nothing_leaves_with_its_own_address_while_the_rules_change() {
    let only_the_host_s = |sources: BTreeMap<Ipv4Addr, usize>, what: &str| {
        let (host, number) = (Host(1).address(), sources.values().sum::<usize>());
        assert!(number > 0 && sources.keys().eq([&host]), "{what}: {sources:?}");
    };
    on_hosts(|hosts| {
        let during = |work: &dyn Fn()| hosts.cluster.sources_during(Pod(1), Outside, work);
        let engine = hosts.engine;
        for other in ENGINES {
            bare(hosts, "");
            fresh(&Hosts { engine: other, ..*hosts });
            let seen = during(&|| {
                hosts.ensure(&mut [engine.ours(), engine.ours()], WANTED);
            });
            only_the_host_s(seen, &format!("from {other:?} to {engine:?}"));
        }
        for random_fully in [false, true] {
            let seen = during(&|| {
                let wanted = Wanted { random_fully, ..WANTED };
                assert_eq!(hosts.ensure(&mut [engine.ours(), engine.ours()], wanted), [Ensured::Written; 2]);
            });
            only_the_host_s(seen, &format!("{engine:?}, random ports {random_fully}"));
        }
        for file in FLANNELD {
            bare(hosts, file);
            hosts.load(file, &[]);
            let seen = during(&|| {
                hosts.ensure(&mut [engine.ours(), engine.ours()], WANTED);
            });
            only_the_host_s(seen, &format!("from {file} to {engine:?}"));
        }
        // It would be seen.
        let seen = during(&|| {
            bare(hosts, "");
            fresh(hosts);
        });
        assert!(seen.contains_key(&Pod(1).address()), "{seen:?}");
    });
}

#[test]
fn what_we_leave_to_a_go_flanneld_harms_nothing() {
    on_hosts(|hosts| {
        for file in FLANNELD {
            let followed = || {
                start_go(hosts, file);
                (packets(hosts), all_rules(hosts))
            };
            bare(hosts, file);
            let (expected, rules) = followed();
            bare(hosts, file);
            fresh(hosts);

            let (seen, rest) = followed();

            let takes_ours = hosts.engine != Engine::Nftables
                && ["flanneld-0.20.2.iptables", "flanneld-0.28.9.iptables"].contains(&file);
            if takes_ours {
                // Of our chain in a table that it does not know, it takes no notice.
                let known: Vec<_> = rest.iter().filter(|line| !line.contains("FLANNEL-ADMIT")).collect();
                assert_eq!(known, rules.iter().collect::<Vec<_>>(), "{file}, {:?}", hosts.engine);
            }
            // Where our chains stay beside its rules, all that arrived still does, from the same address.
            for (flow, source) in expected {
                assert!(source.is_none() || seen[&flow] == source, "{file}: {flow:?}: {:?}", seen[&flow]);
            }
        }
    });
}
