//! A start among many peers, until all of them have all their objects; beside
//! what `ip -batch` and `bridge -batch` take to make the same objects.

use std::time::Duration;

use crate::Bench;
use crate::cluster::{Cluster, Daemon};
use crate::kernel::{self, Cost, Outside};
use crate::start::{Start, start};
use crate::table::{Row, median, megabytes, tell, thousands, time};

/// What takes longer than that is measured once.
const LONG: Duration = Duration::from_secs(10);

struct Join {
    ours: Vec<Start>,
    outside: Vec<Outside>,
    /// Where the daemon's routes go by nexthop objects: what plain ones cost.
    plain: Option<Cost>,
    go: Vec<Start>,
}

pub(crate) fn rows(bench: &Bench) -> Vec<Row> {
    bench.sizes(&[1000, 10_000, 50_000]).into_iter().flat_map(|size| rows_of(bench, size)).collect()
}

fn rows_of(bench: &Bench, size: u32) -> [Row; 3] {
    tell(&format!("join of {} peers", thousands(size)));
    let join = Cluster::with(size, |cluster| measure(bench, cluster, size));
    let joined = median(join.ours.iter().map(|start| start.joined));
    let cpu = median(join.ours.iter().map(|start| start.cpu));
    let memory = median(join.ours.iter().map(|start| start.memory));
    let reference = median(join.outside.iter().map(|outside| outside.cost.time));
    let reference_cpu = median(join.outside.iter().map(|outside| outside.cost.cpu));
    let go = |figure: fn(&[Start]) -> String| {
        let times = if join.go.len() == 1 { "once".to_owned() } else { format!("{} runs", join.go.len()) };
        (!join.go.is_empty()).then(|| format!("{} ({times})", figure(&join.go)))
    };
    let peers = thousands(size);

    let limits = match size {
        1000 => (Some(100), None, None),
        10_000 => (Some(250), Some(250), Some(20)),
        50_000 => (Some(1200), None, Some(60)),
        _ => (None, None, None),
    };
    let (limit, cpu_limit, memory_limit) = limits;
    let limit = limit.map(Duration::from_millis);
    let is_kept = limit.is_none_or(|limit| joined <= limit) && joined < reference;
    let faster = "faster than the outside reference";
    let bound = limit.map_or_else(|| faster.to_owned(), |limit| format!("{}, and {faster}", time(limit)));
    let all = Row::new(format!("join {peers} peers: process start → all objects"), time(joined))
        .bound(bound, is_kept)
        .outside(join.outside_time(reference))
        .go(go(|starts| time(median(starts.iter().map(|start| start.joined)))));

    let mut processor = Row::new(format!("CPU of it at {peers}"), time(cpu))
        .outside(format!("ip and bridge: {}", time(reference_cpu)))
        .go(go(|starts| time(median(starts.iter().map(|start| start.cpu)))));
    if let Some(limit) = cpu_limit.map(Duration::from_millis) {
        processor = processor.bound(time(limit), cpu <= limit);
    }
    let mut peak = Row::new(format!("peak memory (VmHWM) at {peers}"), megabytes(memory))
        .go(go(|starts| megabytes(median(starts.iter().map(|start| start.memory)))));
    if let Some(limit) = memory_limit {
        peak = peak.bound(format!("{limit} MB"), memory <= limit * 1024);
    }
    [all, processor, peak]
}

impl Join {
    fn outside_time(&self, reference: Duration) -> String {
        let nexthops = self.outside[0].nexthops;
        let form = if nexthops { ", nexthop objects too" } else { "" };
        let once = if reference > LONG { " (once)" } else { "" };
        let plain = self.plain.map(|plain| format!("; with plain routes {} (once)", time(plain.time)));
        format!("ip and bridge -batch{form}: {}{once}{}", time(reference), plain.unwrap_or_default())
    }
}

fn measure(bench: &Bench, cluster: &mut Cluster, size: u32) -> Join {
    let mut join = Join { ours: vec![], outside: vec![], plain: None, go: vec![] };
    for _ in 0..bench.runs {
        join.ours.push(start(cluster, &bench.ours));
        let is_long = join.outside.last().is_some_and(|outside| outside.cost.time > LONG);
        if !is_long {
            join.outside.push(kernel::outside(cluster));
        }
        if join.plain.is_none() && join.outside[0].nexthops {
            join.plain = Some(kernel::outside_plain(cluster));
        }
        cluster.bare();
    }
    if let Some(go) = &bench.go {
        for _ in 0..runs_of_go(bench, size) {
            join.go.push(start_go(cluster, go));
        }
    }
    join
}

fn runs_of_go(bench: &Bench, size: u32) -> usize {
    match size {
        ..=1000 => bench.runs.min(3),
        1001..=10_000 => 1,
        _ => 0,
    }
}

fn start_go(cluster: &mut Cluster, go: &Daemon) -> Start {
    tell("a Go flanneld joins");
    let start = start(cluster, go);
    cluster.bare();
    start
}
