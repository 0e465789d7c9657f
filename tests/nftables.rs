//! The rules stand in tables of nftables, and whichever engine has them, the
//! others hold nothing of ours and changes are heard of at once.
//!
//! Each test has a network namespace of its own.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use flannel_core::firewall::{Purpose, Ruleset, Wanted, rules};
use flannel_core::host::{Ensured, Firewall, HostError};
use flannel_core::network::FirewallEngine;
use flannel_linux::{Family, IptablesFirewall, LinuxFirewall, NftablesFirewall};
use flannel_tests::need;
use flannel_tests::netns::{Netns, in_netns};
use ipnetwork::IpNetwork;
use tempfile::TempDir;
use tokio::time::{Instant, timeout};

const ALL: Wanted = Wanted { masquerade: true, random_fully: true, forward: true };
const NONE: Wanted = Wanted { masquerade: false, random_fully: true, forward: false };

/// The rules of a node with `subnet` in `network`.
fn ruleset(network: &str, subnet: &str, wanted: Wanted) -> Ruleset {
    let prefix = |text: &str| -> IpNetwork { text.parse().unwrap() };
    rules(prefix(network), prefix(subnet), wanted, vec![])
}

fn ours(wanted: Wanted) -> Ruleset {
    ruleset("10.5.0.0/16", "10.5.86.0/24", wanted)
}

fn with_nft(test: impl AsyncFnOnce(Netns) + Send + 'static) {
    if need("nft") {
        in_netns(test);
    }
}

fn with_all_tools(test: impl AsyncFnOnce(Netns) + Send + 'static) {
    if need("nft") && need("iptables-nft") && need("iptables-legacy") {
        in_netns(test);
    }
}

fn listed(netns: &Netns) -> String {
    netns.run("nft list ruleset")
}

/// Everything that any engine holds.
fn everything(netns: &Netns) -> String {
    let mut all = listed(netns);
    for program in ["iptables-nft", "iptables-legacy"] {
        for table in Purpose::ALL.map(Purpose::table) {
            all += &netns.run(&format!("{program} -t {table} -S"));
        }
    }
    all
}

/// Makes a script of the shell in the directory; returns its name as a program.
fn script(netns: &Netns, path: &Path, text: &str) -> &'static str {
    let draft = path.with_extension("draft");
    fs::write(&draft, format!("#!/bin/sh\n{text}\n")).unwrap();
    // What is open for writing cannot be run: so a child of ours writes it.
    netns.run(&format!("install -m 755 {} {}", draft.display(), path.display()));
    path.display().to_string().leak()
}

/// Writes a line for each run of a program.
struct Counted {
    directory: TempDir,
    program: &'static str,
}

impl Counted {
    fn of(netns: &Netns, program: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let text = format!("echo \"$@\" >>{}\nexec {program} \"$@\"", log.display());
        let program = script(netns, &directory.path().join(program), &text);
        Self { directory, program }
    }

    /// The runs since the last time.
    fn take(&self) -> Vec<String> {
        let log = self.directory.path().join("log");
        let lines = fs::read_to_string(&log).unwrap_or_default();
        fs::write(log, "").unwrap();
        lines.lines().map(str::to_owned).collect()
    }
}

const NO_RUN: [&str; 0] = [];

#[test]
fn the_rules_stand_in_flannel_s_table() {
    with_nft(async |netns| {
        let mut firewall = NftablesFirewall::default();

        assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Written);

        assert_eq!(
            listed(&netns),
            "table ip flannel-ipv4 {
	chain postrtg {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.5.86.0/24 ip daddr 10.5.0.0/16 return
		ip saddr 10.5.0.0/16 ip daddr 10.5.86.0/24 return
		ip saddr != 10.5.0.0/16 ip daddr 10.5.86.0/24 return
		ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 masquerade fully-random
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		ip saddr 10.5.0.0/16 accept
		ip daddr 10.5.0.0/16 accept
	}

	chain admit {
		type filter hook prerouting priority raw; policy accept;
		ip saddr 10.5.0.0/16 ip daddr 10.5.86.0/24 meta mark set meta mark | 0x00001000
		ip saddr 10.5.0.0/16 ip daddr 10.5.86.0/24 accept
	}
}
"
        );
    });
}

#[test]
fn rules_that_stand_are_not_written_again_whoever_wrote_them() {
    with_nft(async |netns| {
        for rules in [
            ours(ALL),
            ours(Wanted { random_fully: false, ..ALL }),
            ours(Wanted { forward: false, ..ALL }),
            ours(Wanted { masquerade: false, ..ALL }),
            ruleset("fd05::/48", "fd05:0:0:1::/64", ALL),
            ours(NONE),
        ] {
            NftablesFirewall::default().ensure(&rules).await.unwrap();
            let handles = netns.run("nft -a list ruleset");

            // A fresh process, that remembers nothing.
            assert_eq!(NftablesFirewall::default().ensure(&rules).await.unwrap(), Ensured::Unchanged);

            assert_eq!(netns.run("nft -a list ruleset"), handles);
        }
    });
}

#[test]
fn whatever_somebody_does_to_the_table_is_put_right() {
    with_nft(async |netns| {
        let mut firewall = NftablesFirewall::default();
        firewall.ensure(&ours(ALL)).await.unwrap();
        let before = listed(&netns);

        for words in [
            "flush ruleset",
            "delete table ip flannel-ipv4",
            "flush chain ip flannel-ipv4 forward",
            "insert rule ip flannel-ipv4 forward drop",
            "insert rule ip flannel-ipv4 postrtg ip saddr 10.5.0.0/16 accept",
            "insert rule ip flannel-ipv4 postrtg ip saddr 10.5.1.0/24 return",
            "insert rule ip flannel-ipv4 forward accept",
            "add chain ip flannel-ipv4 forward { policy drop; }",
            "add chain ip flannel-ipv4 another",
            "add table ip flannel-ipv4 { flags dormant; }",
        ] {
            netns.run(&format!("nft {words}"));

            assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Written, "{words}");
            assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Unchanged, "{words}");
            assert_eq!(listed(&netns), before, "{words}");
        }
    });
}

#[test]
fn rules_that_stand_start_no_process() {
    with_nft(async |netns| {
        let nft = Counted::of(&netns, "nft");
        let mut firewall = NftablesFirewall::with_program(nft.program);
        assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Written);
        // It lists and writes.
        assert_eq!(nft.take().len(), 2);

        for _ in 0..3 {
            assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Unchanged);
        }

        assert_eq!(nft.take(), NO_RUN);
    });
}

#[test]
fn a_kernel_that_knows_no_random_ports_gets_rules_without() {
    with_nft(async |netns| {
        let directory = tempfile::tempdir().unwrap();
        let text = "case \"$*\" in *-f*) cat >$0.in; grep -q fully-random $0.in && exit 1; exec nft \"$@\" <$0.in;; esac
                    exec nft \"$@\"";
        let program = script(&netns, &directory.path().join("nft"), text);

        for ensured in [Ensured::Written, Ensured::Unchanged] {
            let mut firewall = NftablesFirewall::with_program(program);
            assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), ensured);
            assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Unchanged);
        }

        let shown = listed(&netns);
        assert!(shown.contains("masquerade") && !shown.contains("fully-random"), "{shown}");
    });
}

#[test]
fn two_agents_with_two_networks_share_the_table_in_peace() {
    with_nft(async |netns| {
        let other = ruleset("10.9.0.0/16", "10.9.1.0/24", ALL);
        let (mut one, mut two) = (NftablesFirewall::default(), NftablesFirewall::default());
        one.ensure(&ours(ALL)).await.unwrap();
        two.ensure(&other).await.unwrap();
        one.ensure(&ours(ALL)).await.unwrap();

        assert_eq!(two.ensure(&other).await.unwrap(), Ensured::Unchanged);
        assert_eq!(one.ensure(&ours(ALL)).await.unwrap(), Ensured::Unchanged);
        one.ensure(&ours(NONE)).await.unwrap();
        assert_eq!(two.ensure(&other).await.unwrap(), Ensured::Unchanged);

        let shown = listed(&netns);
        assert!(!shown.contains("10.5.") && shown.contains("10.9."), "{shown}");
    });
}

#[test]
fn a_hundred_flushes_leave_as_many_rules_as_before() {
    with_nft(async |netns| {
        let mut firewall = NftablesFirewall::default();
        firewall.ensure(&ours(ALL)).await.unwrap();
        let before = listed(&netns);

        for _ in 0..100 {
            netns.run("nft flush ruleset");
            assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Written);
        }

        assert_eq!(listed(&netns), before);
    });
}

/// Rules that a Go flanneld of each age may have left, of network and subnet of ours.
fn old_rules(netns: &Netns, program: &str) {
    for words in [
        "-t nat -A POSTROUTING -s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN",
        "-t nat -A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
        "-t nat -A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.86.0/24 -j RETURN",
        "-t nat -A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.0.0/16 -j MASQUERADE --random-fully",
        "-A FORWARD -s 10.5.0.0/16 -m comment --comment flanneld_forward -j ACCEPT",
        "-A FORWARD -s 10.5.0.0/16 -j ACCEPT",
        "-A FORWARD -d 10.5.0.0/16 -j ACCEPT",
    ] {
        netns.run(&format!("{program} {words}"));
    }
}

#[test]
fn rules_that_an_older_flannel_left_in_the_built_in_chains_go() {
    with_all_tools(async |netns| {
        for program in ["iptables-nft", "iptables-legacy"] {
            old_rules(&netns, program);
            let restorer =
                if program == "iptables-nft" { "iptables-nft-restore" } else { "iptables-legacy-restore" };
            let mut firewall = IptablesFirewall::with_programs(program, restorer);

            assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Written);
            assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Unchanged);

            let chain = |words: &str| netns.run(&format!("{program} {words}")).lines().count();
            assert_eq!(chain("-t nat -S POSTROUTING"), 2, "{}", netns.run(&format!("{program} -t nat -S")));
            // The policy, a rule that nobody knows, and the jump.
            assert_eq!(chain("-S FORWARD"), 3, "{}", netns.run(&format!("{program} -S FORWARD")));
        }
    });
}

/// What an agent with this engine does first.
async fn start(engine: FirewallEngine, rules: &Ruleset) -> LinuxFirewall {
    let mut firewall = LinuxFirewall::new(engine, Family::Ipv4);
    firewall.ensure(rules).await.unwrap();
    firewall
}

fn legacy() -> LinuxFirewall {
    let iptables = IptablesFirewall::with_programs("iptables-legacy", "iptables-legacy-restore");
    LinuxFirewall::through_iptables(iptables, Family::Ipv4)
}

fn on_nft() -> LinuxFirewall {
    let iptables = IptablesFirewall::with_programs("iptables-nft", "iptables-nft-restore");
    LinuxFirewall::through_iptables(iptables, Family::Ipv4)
}

#[test]
fn the_engine_that_is_left_holds_nothing_of_ours_any_more() {
    with_all_tools(async |netns| {
        let engines = [legacy, on_nft, || LinuxFirewall::new(FirewallEngine::Nftables, Family::Ipv4)];
        let other = ruleset("10.9.0.0/16", "10.9.1.0/24", ALL);
        let of_ours = |shown: &str| shown.lines().filter(|line| line.contains("10.5.")).count();

        // Each after each other one.
        for number in [0, 1, 2, 0, 2, 1, 0] {
            let mut firewall = engines[number]();
            firewall.ensure(&ours(ALL)).await.unwrap();
            assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Unchanged);

            let all = everything(&netns);
            // Nine rules name our network; iptables' are shown once by nft, too, if they are there.
            let held = if number == 1 { 2 * 9 } else { 9 };
            assert_eq!(of_ours(&all), held, "{all}");
        }
        legacy().ensure(&other).await.unwrap();
        start(FirewallEngine::Nftables, &ours(ALL)).await;
        let shown = netns.run("iptables-legacy -t nat -S");
        assert!(shown.contains("10.9.0.0/16") && !shown.contains("10.5."), "{shown}");
    });
}

#[test]
fn what_a_go_flanneld_leaves_as_it_changes_to_nftables_goes() {
    with_all_tools(async |netns| {
        on_nft().ensure(&ours(ALL)).await.unwrap();
        // It empties one chain and cannot delete it, and looks for the other in the wrong table.
        netns.run("iptables-nft -t nat -F FLANNEL-POSTRTG");

        start(FirewallEngine::Nftables, &ours(ALL)).await;

        let shown = netns.run("iptables-nft -t nat -S") + &netns.run("iptables-nft -S");
        assert!(!shown.contains("FLANNEL"), "{shown}");
    });
}

#[test]
fn asking_for_leftovers_and_for_docker_s_rules_makes_no_tables() {
    with_all_tools(async |netns| {
        netns.run("ip link add docker0 type bridge");
        netns.run("ip addr add 10.5.1.1/24 dev docker0");
        start(FirewallEngine::Nftables, &ours(ALL)).await;

        assert_eq!(fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default(), "");
        assert_eq!(listed(&netns).matches("table ").count(), 1);
    });
}

#[test]
fn no_iptables_is_needed_for_nftables() {
    with_nft(async |netns| {
        // The programs are looked for as for anybody, so only the words of one tell.
        let nft = Counted::of(&netns, "nft");
        let mut firewall =
            LinuxFirewall::through_nft(NftablesFirewall::with_program(nft.program), Family::Ipv4);

        assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Written);

        assert_eq!(nft.take().len(), 2);
    });
}

#[test]
fn a_missing_nft_is_told_with_a_remedy() {
    with_nft(async |_netns| {
        let nft = NftablesFirewall::with_program("no-such-nft");
        let mut firewall = LinuxFirewall::through_nft(nft, Family::Ipv4);

        let error = firewall.ensure(&ours(ALL)).await.unwrap_err();

        assert!(matches!(&error, HostError::Missing { missing, .. } if missing == "no-such-nft"), "{error}");
    });
}

const AT_ONCE: Duration = Duration::from_millis(500);
const QUIET: Duration = Duration::from_millis(300);

/// Ensures that what somebody does is heard of at once, and put right.
async fn heals(netns: &Netns, firewall: &mut LinuxFirewall, words: &str) {
    let before = sorted(everything(netns));
    netns.run(words);

    let began = Instant::now();
    timeout(AT_ONCE, firewall.changed()).await.unwrap_or_else(|_| panic!("nothing was heard of {words}"));
    assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Written, "{words}");

    flannel_tests::say(&format!("{words}: put right after {:?}", began.elapsed()));
    assert_eq!(sorted(everything(netns)), before, "{words}");
}

/// Tables in no order: it is that in which they were made.
fn sorted(listing: String) -> Vec<String> {
    let mut tables: Vec<String> = listing.split("\n}\n").map(str::to_owned).collect();
    tables.sort();
    tables
}

/// A firewall whose rules stand and which has nothing left to hear.
async fn at_rest(mut firewall: LinuxFirewall) -> LinuxFirewall {
    firewall.ensure(&ours(ALL)).await.unwrap();
    // What was cleared away in other engines is looked at once.
    firewall.ensure(&ours(ALL)).await.unwrap();
    assert!(timeout(QUIET, firewall.changed()).await.is_err(), "our own writes woke us");
    firewall
}

#[test]
fn a_flush_is_heard_of_at_once() {
    with_all_tools(async |netns| {
        everything(&netns);
        let mut firewall = at_rest(LinuxFirewall::new(FirewallEngine::Nftables, Family::Ipv4)).await;
        for words in ["nft flush ruleset", "nft flush chain ip flannel-ipv4 forward"] {
            heals(&netns, &mut firewall, words).await;
        }
        start(FirewallEngine::Nftables, &ours(NONE)).await;

        let mut firewall = at_rest(on_nft()).await;
        for words in [
            "nft flush ruleset",
            "iptables-nft -F",
            "iptables-nft -t nat -F POSTROUTING",
            "iptables-nft -t nat -F FLANNEL-POSTRTG",
            "iptables-nft -I FLANNEL-FWD -j DROP",
        ] {
            heals(&netns, &mut firewall, words).await;
        }
    });
}

#[test]
fn a_place_that_somebody_took_again_and_again_is_taken_back_in_a_while() {
    with_all_tools(async |netns| {
        for (firewall, program) in
            [(on_nft as fn() -> LinuxFirewall, "iptables-nft"), (legacy, "iptables-legacy")]
        {
            let mut firewall = firewall();
            firewall.ensure(&ours(ALL)).await.unwrap();
            netns.run(&format!("{program} -A FORWARD -j DROP"));
            while {
                netns.run(&format!("{program} -D FORWARD -j DROP"));
                netns.run(&format!("{program} -I FORWARD -j DROP"));
                firewall.ensure(&ours(ALL)).await.unwrap() == Ensured::Written
            } {}

            timeout(Duration::from_secs(5), async {
                while firewall.ensure(&ours(ALL)).await.unwrap() == Ensured::Unchanged {
                    firewall.changed().await;
                }
            })
            .await
            .expect("it is taken back");

            let shown = netns.run(&format!("{program} -S FORWARD"));
            assert!(shown.lines().nth(1).unwrap().ends_with("FLANNEL-FWD"), "{shown}");
            netns.run(&format!("{program} -D FORWARD -j DROP"));
        }
    });
}

#[test]
fn an_old_dump_that_is_restored_is_heard_of_at_once() {
    with_all_tools(async |netns| {
        let directory = tempfile::tempdir().unwrap();
        let dump = directory.path().join("dump");
        fs::write(&dump, netns.run("iptables-nft-save") + "*nat\nCOMMIT\n*filter\nCOMMIT\n").unwrap();
        let mut firewall = at_rest(on_nft()).await;

        heals(&netns, &mut firewall, &format!("iptables-nft-restore {}", dump.display())).await;
    });
}

#[test]
fn our_own_writes_and_what_others_do_elsewhere_wake_nobody() {
    with_all_tools(async |netns| {
        netns.run("nft add table ip other");
        netns.run("nft add set ip other busy { type ipv4_addr; }");
        for firewall in [on_nft, || LinuxFirewall::new(FirewallEngine::Nftables, Family::Ipv4)] {
            let mut firewall = at_rest(firewall()).await;

            netns.run("nft add element ip other busy { 192.0.2.1 }");
            netns.run("nft flush set ip other busy");
            netns.run("iptables-nft -t mangle -N SOMEBODY");
            netns.run("iptables-nft -t mangle -X SOMEBODY");
            netns.run("iptables-nft -t nat -N DOCKER");
            netns.run("iptables-nft -t nat -A DOCKER -j RETURN");
            netns.run("iptables-nft -t nat -F DOCKER");
            netns.run("iptables-nft -t nat -X DOCKER");

            assert!(timeout(QUIET, firewall.changed()).await.is_err());
        }
    });
}

#[test]
fn more_than_there_is_room_to_hear_is_heard_as_a_change() {
    with_all_tools(async |netns| {
        let directory = tempfile::tempdir().unwrap();
        let many = directory.path().join("many");
        let rules = (0..60_000).map(|_| "add rule ip other loud counter\n");
        let flood = "add table ip other\nadd chain ip other loud\n".to_owned() + &rules.collect::<String>();
        fs::write(&many, flood + "flush chain ip flannel-ipv4 forward\n").unwrap();
        let mut firewall = at_rest(LinuxFirewall::new(FirewallEngine::Nftables, Family::Ipv4)).await;

        netns.run(&format!("nft -f {}", many.display()));

        // The last word but one of a line is how much was dropped; 12 is netfilter, 7 the group's bit.
        let sockets = fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
        let dropped = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        assert!(dropped.into_iter().any(|words| words[1] == "12" && words[8] != "0"), "{sockets}");
        timeout(AT_ONCE, firewall.changed()).await.expect("it is heard of");
        assert_eq!(firewall.ensure(&ours(ALL)).await.unwrap(), Ensured::Written);
    });
}
