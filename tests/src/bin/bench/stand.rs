//! A host that has all its peers: looking after it, losing its device, starting
//! again, doing nothing.

use std::thread;
use std::time::{Duration, SystemTime};

use flannel_tests::lab::run;

use crate::Bench;
use crate::cluster::{Agent, Cluster};
use crate::kernel::{self, DEVICE, Dump};
use crate::monitor::{Monitor, Notice};
use crate::table::{Row, median, tell, thousands, time};
use crate::usage::{self, Usage};

pub(crate) fn audit(bench: &Bench) -> Vec<Row> {
    let size = bench.size();
    // An audit each second, so a third of a long phase holds enough of them.
    let phase = bench.phase / 3;
    let audits = u32::try_from(phase.as_secs()).expect("a short while").max(1);
    let (often, writes, seldom, outside) = Cluster::with(size, |cluster| {
        let (often, heard) = quiet(bench, cluster, phase, "1");
        let (seldom, _) = quiet(bench, cluster, phase, "3600");
        (often, heard, seldom, Dump::read(&cluster.host).cost)
    });
    let each = often.saturating_sub(seldom) / audits;
    let limit = Duration::from_millis(100);
    vec![
        Row::new(
            format!("audit of {} peers with nothing to do (mean of {audits})", thousands(size)),
            format!("{} CPU, {}", time(each), words(&writes)),
        )
        .bound("100 ms CPU, zero writes", each <= limit && writes.is_empty())
        .outside(format!("one look by ip and bridge: {} CPU", time(outside.cpu))),
    ]
}

/// The processor time of a phase without events, and what the kernel told of it.
fn quiet(bench: &Bench, cluster: &Cluster, phase: Duration, interval: &str) -> (Duration, Vec<Notice>) {
    let agent = cluster.in_sync(&bench.ours, &[&format!("--audit-interval={interval}")]);
    let monitor = Monitor::start(&cluster.host);
    let before = Usage::of(agent.process.pid());
    thread::sleep(phase);
    let used = Usage::of(agent.process.pid()).since(before);
    cluster.check();
    let heard = writes(cluster, monitor);
    cluster.kill(agent);
    (used, heard)
}

pub(crate) fn repair(bench: &Bench) -> Vec<Row> {
    let rows = bench.sizes(&[1000, 10_000]).into_iter().map(|size| {
        tell(&format!("repair of {} peers", thousands(size)));
        let (repairs, outside) = Cluster::with(size, |cluster| {
            let agent = cluster.in_sync(&bench.ours, &[]);
            let repairs: Vec<Duration> = (0..bench.runs).map(|_| repair_once(cluster, &agent)).collect();
            cluster.kill(agent);
            (repairs, kernel::outside(cluster).cost.time)
        });
        let repair = median(repairs);
        let row = Row::new(
            format!("repair of all objects after `ip link del {DEVICE}` at {} peers", thousands(size)),
            time(repair),
        );
        let limit = match size {
            1000 => Some(Duration::from_millis(300)),
            10_000 => Some(Duration::from_secs(1)),
            _ => None,
        };
        let row = match limit {
            Some(limit) => row.bound(time(limit), repair <= limit),
            None => row,
        };
        row.outside(format!("ip and bridge -batch: {} (once)", time(outside)))
    });
    rows.collect()
}

fn repair_once(cluster: &Cluster, agent: &Agent) -> Duration {
    let moment = SystemTime::now();
    run(&["ip", "-n", &cluster.host.namespace, "link", "del", DEVICE]);
    let mut after = Duration::ZERO;
    loop {
        // It may say so between two things that the kernel removes.
        after += agent.in_sync_after(moment + after) + Duration::from_micros(1);
        let held = Dump::read(&cluster.host).objects();
        match kernel::difference(&cluster.objects(), &held) {
            Some(difference) => tell(&format!("in sync before all was repaired: {difference}")),
            None => return after,
        }
    }
}

pub(crate) fn again(bench: &Bench) -> Vec<Row> {
    let size = bench.size();
    let (starts, writes, outside) = Cluster::with(size, |cluster| {
        let agent = cluster.in_sync(&bench.ours, &[]);
        cluster.check();
        cluster.kill(agent);
        let (mut starts, mut all) = (vec![], vec![]);
        for _ in 0..bench.runs {
            let monitor = Monitor::start(&cluster.host);
            let agent = cluster.start(&bench.ours, &[]);
            starts.push(agent.in_sync_after(agent.began));
            cluster.check();
            cluster.kill(agent);
            all.extend(writes(cluster, monitor));
        }
        (starts, all, Dump::read(&cluster.host).cost)
    });
    let start = median(starts);
    let limit = Duration::from_millis(300);
    vec![
        Row::new(
            format!("start again (kill -9, start) over {} peers that stand already", thousands(size)),
            format!("{}, {}", time(start), words(&writes)),
        )
        .bound(format!("{}, zero writes to what is right", time(limit)), start <= limit && writes.is_empty())
        .outside(format!("one look by ip and bridge: {}", time(outside.time))),
    ]
}

/// How long an agent is not idle yet.
const START: Duration = Duration::from_secs(10);

pub(crate) fn idle(bench: &Bench) -> Vec<Row> {
    let size = bench.size();
    let (used, children, forks) = Cluster::with(size, |cluster| {
        let agent = cluster.in_sync(&bench.ours, &[]);
        cluster.check();
        let pid = agent.process.pid();
        // After it has written its rules it looks once more whether they stand, five seconds later.
        thread::sleep(START);
        let (before, forks) = (Usage::of(pid), usage::forks());
        thread::sleep(bench.phase);
        let (after, more) = (Usage::of(pid), usage::forks());
        cluster.kill(agent);
        (after.since(before), after.had_children_since(before), more - forks)
    });
    let percent = used.as_secs_f64() / bench.phase.as_secs_f64() * 100.0;
    let children = if children { "it had children" } else { "none of its own" };
    vec![
        Row::new(
            format!("idle at {} peers over {} s (once)", thousands(size), bench.phase.as_secs()),
            format!("{forks} forks on the machine, {children}; {percent:.2} % CPU ({})", time(used)),
        )
        .bound("no forks, 0.1 % CPU", forks == 0 && percent <= 0.1),
    ]
}

/// What the kernel told about the device, and about routes.
fn writes(cluster: &Cluster, monitor: Monitor) -> Vec<Notice> {
    let index = kernel::index(&cluster.host);
    monitor.end().into_iter().filter(|notice| notice.concerns(index)).collect()
}

fn words(writes: &[Notice]) -> String {
    match writes.first() {
        Some(first) => format!("{} writes ({}, ...)", writes.len(), first.text),
        None => "zero writes".into(),
    }
}
