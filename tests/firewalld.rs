//! Rung 6, firewalld: its word is heard where the kernel says nothing, and whatever it
//! makes its rules with, ours stand right after a reload.
//!
//! Each test has a network namespace and a bus of its own.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flannel_core::firewall::{Purpose, Ruleset, Wanted, rules};
use flannel_core::host::{Ensured, Firewall};
use flannel_linux::LinuxFirewall;
use flannel_tests::firewalld::{Backend, Bus, Firewalld, Talker};
use flannel_tests::log::Log;
use flannel_tests::netns::{Netns, in_netns};
use flannel_tests::packets::Place::{Host, Outside, Pod};
use flannel_tests::packets::rules::{ENGINES, Engine, Hosts};
use flannel_tests::packets::{Cluster, Flow, UNPUBLISHED};
use flannel_tests::{need, say};
use tokio::time::{Instant, sleep, timeout};

const ALL: Wanted = Wanted { masquerade: true, random_fully: true, forward: true };

/// Within that long our rules are to stand again; no clock makes them.
const SOON: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(300);

/// Longer than the pauses between the first attempts to reach a bus.
const A_WHILE: Duration = Duration::from_secs(20);

fn ours() -> Ruleset {
    rules("10.5.0.0/16".parse().unwrap(), "10.5.1.0/24".parse().unwrap(), ALL, vec![])
}

fn with_firewalld(test: impl AsyncFnOnce(Netns) + Send + 'static) {
    if Bus::possible() && need("iptables-nft") && need("iptables-legacy") && need("nft") {
        in_netns(test);
    }
}

/// Rules in iptables-legacy that stand, and hear firewalld by that bus.
async fn legacy(bus: &Bus) -> LinuxFirewall {
    let mut firewall = Engine::IptablesLegacy.ours().on_bus(&bus.address());
    assert_eq!(firewall.ensure(&ours()).await.unwrap(), Ensured::Written);
    firewall
}

/// Waits for a word, and has the rules looked at.
async fn looks(firewall: &mut LinuxFirewall, within: Duration, why: &str) -> Ensured {
    timeout(within, firewall.changed()).await.unwrap_or_else(|_| panic!("nothing was heard: {why}"));
    firewall.ensure(&ours()).await.unwrap()
}

async fn is_quiet(firewall: &mut LinuxFirewall) -> bool {
    timeout(QUIET, firewall.changed()).await.is_err()
}

fn flush(netns: &Netns) {
    netns.run("iptables-legacy -F");
    netns.run("iptables-legacy -t nat -F");
}

#[test]
fn a_reload_is_heard_of_at_once_where_the_kernel_tells_nothing() {
    with_firewalld(async |netns| {
        let bus = Bus::started();
        let mut talker = Talker::standing(&bus);
        let mut firewall = legacy(&bus).await;
        assert_eq!(looks(&mut firewall, A_WHILE, "it is there").await, Ensured::Unchanged);

        for _ in 0..5 {
            flush(&netns);
            assert!(is_quiet(&mut firewall).await, "who has told?");
            talker.reload();

            let began = Instant::now();
            assert_eq!(looks(&mut firewall, SOON, "Reloaded").await, Ensured::Written);
            say(&format!("iptables-legacy: put right {:?} after the signal", began.elapsed()));
            assert!(began.elapsed() < SOON);
        }
    });
}

#[test]
fn nobody_but_firewalld_is_believed() {
    with_firewalld(async |_| {
        let bus = Bus::started();
        let mut talker = Talker::standing(&bus);
        let mut firewall = legacy(&bus).await;
        looks(&mut firewall, A_WHILE, "it is there").await;

        bus.lie();

        assert!(is_quiet(&mut firewall).await);
        talker.reload();
        looks(&mut firewall, SOON, "Reloaded").await;
    });
}

#[test]
fn rules_are_looked_at_when_those_of_a_new_firewalld_stand_and_when_it_ends() {
    with_firewalld(async |netns| {
        let bus = Bus::started();
        let talker = Talker::standing(&bus);
        let mut firewall = legacy(&bus).await;
        looks(&mut firewall, A_WHILE, "it is there").await;
        drop(talker);
        looks(&mut firewall, SOON, "it has ended").await;

        let mut talker = Talker::begin(&bus);
        assert_eq!(looks(&mut firewall, SOON, "it begins").await, Ensured::Unchanged);
        flush(&netns);
        assert!(is_quiet(&mut firewall).await);
        talker.stand();
        assert_eq!(looks(&mut firewall, SOON, "its rules stand").await, Ensured::Written);
        flush(&netns);
        drop(talker);
        assert_eq!(looks(&mut firewall, SOON, "it has ended").await, Ensured::Written);
    });
}

#[test]
fn rules_in_nf_tables_wait_until_firewalld_is_done_with_its_own() {
    with_firewalld(async |netns| {
        let bus = Bus::started();
        for engine in [Engine::IptablesNft, Engine::Nftables] {
            let mut firewall = engine.ours().on_bus(&bus.address());
            assert_eq!(firewall.ensure(&ours()).await.unwrap(), Ensured::Written, "there is no firewalld");
            let before = listed(&netns);
            let mut talker = Talker::begin(&bus);
            netns.run("nft flush ruleset");

            let rules = ours();
            let mut ensured = std::pin::pin!(firewall.ensure(&rules));
            assert!(timeout(QUIET, &mut ensured).await.is_err(), "{engine:?} did not wait");
            assert_ne!(listed(&netns), before);
            talker.stand();

            assert_eq!(ensured.await.unwrap(), Ensured::Written);
            assert_eq!(listed(&netns), before);
        }
    });
}

#[test]
fn rules_in_nf_tables_do_not_wait_for_ever_for_firewalld() {
    with_firewalld(async |netns| {
        let log = Log::default();
        let _heard = tracing::subscriber::set_default(log.clone());
        let said = Arc::new(Mutex::new(vec![]));
        let lines = said.clone();
        log.read_by(move |line| lines.lock().unwrap().push(line));
        let bus = Bus::started();
        let mut talker = Talker::begin(&bus);
        let mut firewall = Engine::Nftables.ours().on_bus(&bus.address());

        for _ in 0..2 {
            netns.run("nft flush ruleset");
            let ensured = timeout(A_WHILE, firewall.ensure(&ours())).await.expect("it gives up").unwrap();
            assert_eq!(ensured, Ensured::Written);
            assert!(!listed(&netns).is_empty());
        }
        talker.stand();
        netns.run("nft flush ruleset");
        firewall.ensure(&ours()).await.unwrap();

        assert_eq!(
            *said.lock().unwrap(),
            [
                "INFO firewalld has been busy or stuck for 5 s; not waiting for it any longer",
                "INFO firewalld is no longer busy or stuck",
            ]
        );
    });
}

#[test]
fn a_bus_may_come_later_go_and_come_back() {
    with_firewalld(async |netns| {
        let mut bus = Bus::new();
        let mut firewall = legacy(&bus).await;
        assert!(is_quiet(&mut firewall).await);

        for _ in 0..2 {
            bus.start();
            flush(&netns);
            let talker = Talker::standing(&bus);
            assert_eq!(looks(&mut firewall, A_WHILE, "there is a bus").await, Ensured::Written);
            drop(talker);
            assert_eq!(looks(&mut firewall, SOON, "it has ended").await, Ensured::Unchanged);
            bus.stop();
            assert!(is_quiet(&mut firewall).await);
        }
    });
}

/// All that we have in any engine, in its order, and what stands above it and does not accept.
fn listed(netns: &Netns) -> Vec<String> {
    let is_ours = |line: &&str| line.contains("FLANNEL-") || line.contains("10.5.");
    let mut all = netns.attempt("nft list table ip flannel-ipv4").unwrap_or_default();
    for program in ["iptables-nft", "iptables-legacy"] {
        for purpose in Purpose::ALL {
            let list = |chain| format!("{program} -t {} -S {chain}", purpose.table());
            all += &netns.attempt(&list(purpose.chain())).unwrap_or_default();
            let parent = netns.run(&list(purpose.parent()));
            // The policy comes first in a list, and then the rules.
            let rules: Vec<&str> = parent.lines().skip(1).collect();
            let last = rules.iter().rposition(is_ours).map_or(0, |last| last + 1);
            all.extend(
                rules[..last]
                    .iter()
                    .filter(|rule| !rule.ends_with("-j ACCEPT"))
                    .flat_map(|rule| [rule, "\n"]),
            );
        }
    }
    all.lines().map(str::to_owned).collect()
}

/// Reloads a real firewalld twenty times beside rules of ours.
fn survives(backend: Backend, engine: Engine) {
    with_firewalld(async move |netns| {
        let firewalld = Firewalld::start(backend);
        let mut firewall = engine.ours().on_bus(&firewalld.bus().address());
        firewall.ensure(&ours()).await.unwrap();
        if engine == Engine::IptablesLegacy {
            looks(&mut firewall, A_WHILE, "it is there").await;
        }
        let before = listed(&netns);
        // As an agent does, but it never looks by the clock.
        let agent = tokio::spawn(async move {
            loop {
                firewall.changed().await;
                firewall.ensure(&ours()).await.unwrap();
            }
        });

        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let mut reload = firewalld.command(&["--reload"]);
            let status = tokio::task::spawn_blocking(move || reload.status()).await.unwrap().unwrap();
            assert!(status.success(), "{status}\n{}", firewalld.log());
            let reloaded = Instant::now();
            while listed(&netns) != before {
                assert!(reloaded.elapsed() < SOON, "{:#?}\n{before:#?}", listed(&netns));
                sleep(Duration::from_millis(5)).await;
            }
            longest = longest.max(reloaded.elapsed());
        }

        say(&format!("{engine:?} beside firewalld on {backend:?}: right at most {longest:?} after a reload"));
        agent.abort();
    });
}

#[test]
fn rules_survive_reloads_of_firewalld_on_nftables() {
    ENGINES.into_iter().for_each(|engine| survives(Backend::Nftables, engine));
}

#[test]
fn rules_survive_reloads_of_firewalld_on_iptables() {
    survives(Backend::IptablesNft, Engine::IptablesNft);
    survives(Backend::IptablesNft, Engine::Nftables);
}

#[test]
fn rules_survive_reloads_of_firewalld_on_iptables_legacy() {
    survives(Backend::IptablesLegacy, Engine::IptablesLegacy);
}

#[test]
fn our_rules_come_before_those_of_firewalld_on_iptables() {
    if !Bus::possible() || !Hosts::possible() {
        return;
    }
    for (backend, engine) in
        [(Backend::IptablesNft, Engine::IptablesNft), (Backend::IptablesLegacy, Engine::IptablesLegacy)]
    {
        let cluster = Cluster::new();
        let hosts = Hosts { cluster: &cluster, engine };
        hosts.clear("ACCEPT");
        let firewallds = [1, 2].map(|host| cluster.inside(Host(host), || Firewalld::start(backend)));
        for firewalld in &firewallds {
            // For the tunnel itself; it knows nothing of our network.
            firewalld.run(&["--permanent", "--add-port=8472/udp"]);
        }
        let flows = [Flow::new(Pod(1), Pod(2), UNPUBLISHED), Flow::new(Pod(1), Outside, UNPUBLISHED)];
        let sources = |arrive: bool| {
            let seen = cluster.try_out(&flows.map(|flow| (flow, arrive)).into());
            flows.map(|flow| seen[&flow])
        };
        for _ in 0..2 {
            firewallds.iter().for_each(|firewalld| firewalld.run(&["--reload"]));
            // Where nobody hears of it.
            let others = sources(false);
            assert_eq!(others, [None, None], "{backend:?}");

            hosts.ensure(&mut [engine.ours(), engine.ours()], ALL);

            assert_eq!(sources(true), [Some(Pod(1).address()), Some(Host(1).address())], "{backend:?}");
        }
    }
}

/// What has to be said to firewalld on each host.
const WORDS: [&[&str]; 3] = [
    &["--permanent", "--add-port=8472/udp"],
    &["--permanent", "--zone=trusted", "--add-source=10.5.0.0/16"],
    &["--reload"],
];

#[test]
fn pods_reach_each_other_through_firewalld_that_trusts_the_network() {
    if !Bus::possible() || !Hosts::possible() {
        return;
    }
    for backend in [Backend::Nftables, Backend::IptablesNft] {
        for engine in [Engine::IptablesNft, Engine::Nftables] {
            let cluster = Cluster::new();
            let hosts = Hosts { cluster: &cluster, engine };
            hosts.clear("ACCEPT");
            let firewallds = [1, 2].map(|host| cluster.inside(Host(host), || Firewalld::start(backend)));
            let mut agents = [engine.ours(), engine.ours()];
            hosts.ensure(&mut agents, ALL);
            let flows = [
                Flow::new(Pod(1), Pod(2), UNPUBLISHED),
                Flow::new(Host(1), Pod(2), UNPUBLISHED),
                Flow::new(Pod(1), Host(2), UNPUBLISHED),
            ];
            let arrive = |expected: [bool; 3]| {
                let seen = cluster.try_out(&flows.into_iter().zip(expected).collect::<BTreeMap<_, _>>());
                let seen = flows.map(|flow| seen[&flow].is_some());
                assert_eq!(seen, expected, "{backend:?} {engine:?}");
            };
            arrive([false, false, false]);

            for firewalld in &firewallds {
                WORDS.into_iter().for_each(|words| firewalld.run(words));
            }
            hosts.ensure(&mut agents, ALL);

            arrive([true, true, false]);
        }
    }
}
