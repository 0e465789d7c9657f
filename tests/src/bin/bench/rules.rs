//! The traffic rules: put in place, put right after a flush, left alone.

use std::sync::mpsc;
use std::time::Duration;

use flannel_core::firewall::{Ruleset, Wanted, rules};
use flannel_core::host::{Ensured, Firewall};
use flannel_core::network::FirewallEngine;
use flannel_linux::{Family, IptablesFirewall, LinuxFirewall};
use flannel_tests::netns::{Netns, in_netns};
use tokio::time::{Instant, sleep};

use crate::Bench;
use crate::table::{Row, median, tell, time};
use crate::usage::Usage;

/// An engine, and how its rules are flushed and shown.
#[derive(Clone, Copy)]
struct Engine {
    name: &'static str,
    firewall: fn() -> LinuxFirewall,
    flush: &'static [&'static str],
    show: &'static [&'static str],
    /// Whether the kernel tells of changes there.
    told: bool,
}

const ENGINES: [Engine; 3] = [
    Engine {
        name: "nftables",
        firewall: || LinuxFirewall::new(FirewallEngine::Nftables, Family::Ipv4),
        flush: &["nft flush ruleset"],
        show: &["nft list ruleset"],
        told: true,
    },
    Engine {
        name: "iptables-nft",
        firewall: || through("iptables-nft", "iptables-nft-restore"),
        flush: &["iptables-nft -F", "iptables-nft -t nat -F"],
        show: &["iptables-nft -S", "iptables-nft -t nat -S"],
        told: true,
    },
    Engine {
        name: "iptables-legacy",
        firewall: || through("iptables-legacy", "iptables-legacy-restore"),
        flush: &["iptables-legacy -F", "iptables-legacy -t nat -F"],
        show: &["iptables-legacy -S", "iptables-legacy -t nat -S"],
        told: false,
    },
];

fn through(program: &'static str, restorer: &'static str) -> LinuxFirewall {
    LinuxFirewall::through_iptables(IptablesFirewall::with_programs(program, restorer), Family::Ipv4)
}

/// As with `--iptables-resync` left alone.
const RESYNC: Duration = Duration::from_secs(5);

const FLUSHES: usize = 1000;

pub(crate) fn rows(bench: &Bench) -> Vec<Row> {
    ENGINES.into_iter().flat_map(|engine| of(bench, engine)).collect()
}

fn of(bench: &Bench, engine: Engine) -> Vec<Row> {
    tell(&format!("rules in {}", engine.name));
    let name = engine.name;
    let runs = bench.runs;
    let start = median((0..runs).map(|_| apart(async move |netns| in_place(&netns, engine).await)));
    let (as_before, repair) = apart(async move |netns| flushes(&netns, engine).await);
    let phase = bench.phase;
    let children = apart(async move |netns| idle(&netns, engine, phase).await);

    let limit = Duration::from_millis(30);
    let mut rows = vec![
        Row::new(format!("{name}: rules in place at a first start"), time(start))
            .bound(time(limit), start <= limit),
        Row::new(
            format!("{name}: rules after {FLUSHES} flushes"),
            if as_before { "as many as before" } else { "others than before" },
        )
        .bound("as many as before", as_before),
    ];
    if engine.told {
        let limit = Duration::from_secs(1);
        rows.push(
            Row::new(format!("{name}: rules put right after a flush (median of {FLUSHES})"), time(repair))
                .bound(time(limit), repair <= limit),
        );
    }
    let idle = Row::new(
        format!("{name}: idle over {} s (once)", phase.as_secs()),
        if children { "processes were started" } else { "no process was started" },
    );
    rows.push(if engine.told { idle.bound("no process", !children) } else { idle });
    rows
}

/// Does `work` in a namespace of its own.
fn apart<T: Send + 'static>(work: impl AsyncFnOnce(Netns) -> T + Send + 'static) -> T {
    let (send, receive) = mpsc::channel();
    in_netns(async move |netns| send.send(work(netns).await).expect("somebody waits"));
    receive.recv().expect("there are namespaces")
}

fn wanted() -> Ruleset {
    let wanted = Wanted { masquerade: true, random_fully: true, forward: true };
    let (network, subnet) = ("10.5.0.0/16", "10.5.86.0/24");
    rules(network.parse().expect("a prefix"), subnet.parse().expect("a prefix"), wanted, vec![])
}

async fn in_place(_netns: &Netns, engine: Engine) -> Duration {
    let mut firewall = (engine.firewall)();
    let began = Instant::now();
    assert_eq!(firewall.ensure(&wanted()).await.expect("the rules can be written"), Ensured::Written);
    began.elapsed()
}

/// Whether the same rules stand after many flushes, and how long after each.
async fn flushes(netns: &Netns, engine: Engine) -> (bool, Duration) {
    let shown = || engine.show.iter().map(|words| netns.run(words)).collect::<String>();
    let mut firewall = (engine.firewall)();
    firewall.ensure(&wanted()).await.expect("the rules can be written");
    let before = shown();
    let mut times = Vec::new();
    for _ in 0..FLUSHES {
        engine.flush.iter().for_each(|words| drop(netns.run(words)));
        let began = Instant::now();
        if engine.told {
            firewall.changed().await;
        }
        firewall.ensure(&wanted()).await.expect("the rules can be written");
        times.push(began.elapsed());
    }
    (shown() == before, median(times))
}

/// Whether processes are started while nothing changes.
async fn idle(_netns: &Netns, engine: Engine, phase: Duration) -> bool {
    let mut firewall = (engine.firewall)();
    for _ in 0..2 {
        firewall.ensure(&wanted()).await.expect("the rules can be written");
    }
    let (before, end) = (Usage::of(std::process::id()), Instant::now() + phase);
    while Instant::now() < end {
        tokio::select! {
            () = sleep(RESYNC) => {}
            () = firewall.changed() => {}
        }
        firewall.ensure(&wanted()).await.expect("the rules can be read");
    }
    Usage::of(std::process::id()).had_children_since(before)
}
