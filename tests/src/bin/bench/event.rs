//! One peer comes, changes or goes: from just before etcd is told to the
//! kernel's last notification of that peer's objects.

use std::thread;
use std::time::{Duration, Instant};

use crate::Bench;
use crate::cluster::{Cluster, Daemon, Sent};
use crate::monitor::{self, Monitor};
use crate::table::{Row, median, percentile, tell, thousands, time};
use crate::usage;

const EVENTS: u32 = 300;
const APART: Duration = Duration::from_millis(20);
/// An event that has not reached the kernel by then is lost.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nobody wants to wait for more of them.
const MOST_LOST: usize = 10;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Put,
    Changed,
    Removed,
}

const KINDS: [Kind; 3] = [Kind::Put, Kind::Changed, Kind::Removed];

/// Events of one kind.
#[derive(Debug)]
struct Events {
    kernel: Vec<Duration>,
    /// What etcd itself took to answer.
    etcd: Vec<Duration>,
    /// Of the daemon, for each event.
    cpu: Duration,
    lost: usize,
}

impl Events {
    fn p50(&self) -> Duration {
        // All of them may be lost.
        median(self.kernel.iter().copied().chain(self.kernel.is_empty().then_some(PATIENCE)))
    }

    fn p99(&self) -> Duration {
        percentile(99, self.kernel.iter().copied().chain(self.kernel.is_empty().then_some(PATIENCE)))
    }

    fn figure(&self) -> String {
        let lost = if self.lost > 0 { format!(", {} lost", self.lost) } else { String::new() };
        format!("{} / {}{lost}", time(self.p50()), time(self.p99()))
    }
}

pub(crate) fn rows(bench: &Bench) -> Vec<Row> {
    let sizes = bench.sizes(&[100, 10_000, 50_000]);
    let with_go = sizes.iter().copied().filter(|size| *size <= 10_000).max();
    let mut rows = vec![];
    let mut middles = vec![];
    for size in sizes {
        tell(&format!("events at {} peers", thousands(size)));
        let (ours, go) = Cluster::with(size, |cluster| {
            let ours = events(cluster, &bench.ours, size);
            cluster.bare();
            let go = bench.go.as_ref().filter(|_| with_go == Some(size));
            (ours, go.map(|go| events(cluster, go, size)))
        });
        middles.push((size, ours.each_ref().map(Events::p50)));
        rows.extend(rows_of(size, &ours, go.as_ref()));
    }
    if let [(few, at_few), .., (many, at_many)] = middles.as_slice() {
        let ratios: Vec<f64> =
            at_few.iter().zip(at_many).map(|(few, many)| many.as_secs_f64() / few.as_secs_f64()).collect();
        let figure = ratios.iter().map(|ratio| format!("{ratio:.1}")).collect::<Vec<_>>().join(" / ");
        let work = format!(
            "p50 at {} peers over that at {}, put / changed / removed",
            thousands(*many),
            thousands(*few)
        );
        rows.push(Row::new(work, figure).bound("2", ratios.iter().all(|ratio| *ratio <= 2.0)));
    }
    rows
}

fn rows_of(size: u32, ours: &[Events; 3], go: Option<&[Events; 3]>) -> Vec<Row> {
    let peers = thousands(size);
    let mut rows: Vec<Row> = vec![];
    for (number, (kind, events)) in KINDS.iter().zip(ours).enumerate() {
        let what = match kind {
            Kind::Put => "put",
            Kind::Changed => "changed",
            Kind::Removed => "removed",
        };
        let (limit, rare) = (Duration::from_millis(2), Duration::from_millis(5));
        let is_kept = events.p50() <= limit && events.p99() <= rare && events.lost == 0;
        let etcd = |percent| time(percentile(percent, events.etcd.iter().copied()));
        let row = Row::new(
            format!("one peer {what} at {peers} peers: etcd put → kernel, p50 / p99 of {EVENTS}"),
            events.figure(),
        );
        rows.push(
            row.bound("2 / 5 ms", is_kept)
                .outside(format!("etcd's own answer: {} / {}", etcd(50), etcd(99)))
                .go(go.map(|go| go[number].figure())),
        );
    }
    let mean = |all: &[Events; 3]| all.iter().map(|events| events.cpu).sum::<Duration>() / 3;
    let cpu = |all: &[Events; 3]| {
        let kinds = all.each_ref().map(|events| time(events.cpu)).join(", ");
        format!("{} ({kinds})", time(mean(all)))
    };
    let limit = Duration::from_micros(300);
    rows.push(
        Row::new(format!("CPU per event at {peers} peers (put, changed, removed)"), cpu(ours))
            .bound(time(limit), mean(ours) <= limit)
            .go(go.map(cpu)),
    );
    rows
}

/// Starts a daemon on a bare host and lets it see events of every kind.
fn events(cluster: &mut Cluster, daemon: &Daemon, size: u32) -> [Events; 3] {
    let early = (!daemon.ours).then(|| Monitor::start(&cluster.host));
    let agent = cluster.start(daemon, &[]);
    let monitor = match early {
        Some(monitor) => {
            monitor.all_joined(cluster.peers.values());
            monitor
        }
        None => {
            agent.in_sync_after(agent.began);
            Monitor::start(&cluster.host)
        }
    };
    let pid = agent.process.pid();
    let all = KINDS.map(|kind| events_of(cluster, &monitor, pid, kind, size));
    // A Go flanneld leaves the FDB entry of a MAC that has changed.
    if daemon.ours && all.iter().all(|events| events.lost == 0) {
        cluster.check();
    }
    cluster.kill(agent);
    all
}

fn events_of(cluster: &mut Cluster, monitor: &Monitor, pid: u32, kind: Kind, size: u32) -> Events {
    let mut events = Events { kernel: vec![], etcd: vec![], cpu: Duration::ZERO, lost: 0 };
    let before = usage::of_threads(pid);
    let start = Instant::now();
    let mut sent = 0;
    while sent < EVENTS && events.lost < MOST_LOST {
        thread::sleep((start + APART * sent).saturating_duration_since(Instant::now()));
        let (Sent { at, answered }, heard) = send(cluster, kind, size + sent);
        events.etcd.push(answered);
        match monitor.all(heard.into_iter().collect(), PATIENCE) {
            Some(last) => events.kernel.push(last.duration_since(at)),
            None => events.lost += 1,
        }
        sent += 1;
    }
    events.cpu = usage::of_threads(pid).saturating_sub(before) / sent;
    events
}

/// Tells etcd; what will be heard of it.
fn send(cluster: &mut Cluster, kind: Kind, subnet: u32) -> (Sent, Vec<String>) {
    match kind {
        Kind::Put => {
            let peer = cluster.peer(subnet);
            (cluster.put(peer), monitor::came(&peer).to_vec())
        }
        Kind::Changed => {
            let mut peer = cluster.peers[&subnet];
            cluster.give_mac(&mut peer);
            (cluster.put(peer), monitor::changed(&peer).to_vec())
        }
        Kind::Removed => {
            let peer = cluster.peers[&subnet];
            (cluster.remove(subnet), monitor::went(&peer).to_vec())
        }
    }
}
