//! Many changes for a while: nothing may be missed.

use std::thread;
use std::time::{Duration, Instant};

use crate::Bench;
use crate::cluster::{Cluster, Peer};
use crate::kernel::{self, Dump};
use crate::table::{Row, thousands, time};
use crate::usage::Usage;

/// Between two changes: 200 a second.
const APART: Duration = Duration::from_millis(5);
/// What has not come by then is missed.
const PATIENCE: Duration = Duration::from_secs(20);

struct Churn {
    changes: u32,
    took: Duration,
    cpu: Duration,
    /// After the last change; what is wrong if it never came to that.
    converged: Result<Duration, String>,
    dump: Duration,
}

pub(crate) fn rows(bench: &Bench) -> Vec<Row> {
    let size = bench.size();
    let churn = Cluster::with(size, |cluster| measure(bench, cluster, size));
    let figure = match &churn.converged {
        Ok(after) => format!("nothing missed; converged within {}", time(*after)),
        Err(difference) => format!("never converged: {difference}"),
    };
    let is_kept = churn.converged.is_ok_and(|after| after <= Duration::from_secs(1));
    let second = churn.took.as_secs_f64();
    let work = format!(
        "churn of {:.0} changes a second for {second:.0} s at {} peers (once; CPU {:.1} %)",
        f64::from(churn.changes) / second,
        thousands(size),
        churn.cpu.as_secs_f64() / second * 100.0
    );
    vec![
        Row::new(work, figure)
            .bound("nothing missed, converged 1 s after the last", is_kept)
            .outside(format!("one look by ip and bridge: {}", time(churn.dump))),
    ]
}

fn measure(bench: &Bench, cluster: &mut Cluster, size: u32) -> Churn {
    let agent = cluster.in_sync(&bench.ours, &[]);
    let pid = agent.process.pid();
    let before = Usage::of(pid);
    let start = Instant::now();
    let changes = u32::try_from(bench.phase.as_millis() / APART.as_millis()).expect("a short while");
    for number in 0..changes {
        thread::sleep((start + APART * number).saturating_duration_since(Instant::now()));
        change(cluster, size);
    }
    let last = Instant::now();
    let wanted = cluster.objects();
    let (mut wrong, mut dump) = (String::new(), Duration::ZERO);
    let mut converged = None;
    while converged.is_none() && last.elapsed() < PATIENCE {
        let held = Dump::read(&cluster.host);
        // What was read counts from when it had all been read.
        let read = last.elapsed();
        dump = held.cost.time;
        match kernel::difference(&wanted, &held.objects()) {
            Some(difference) => wrong = difference,
            None => converged = Some(read),
        }
    }
    let cpu = Usage::of(pid).since(before);
    cluster.kill(agent);
    Churn { changes, took: last - start, cpu, converged: converged.ok_or(wrong), dump }
}

/// A new peer, one that leaves, one with another MAC or one with another address: in equal
/// parts, so that their number stays what it is.
fn change(cluster: &mut Cluster, size: u32) {
    let kind = rand::random_range(0..4);
    // About half of these subnets are free, and one that has become free is taken again.
    let subnet = loop {
        let subnet = rand::random_range(0..size * 2);
        if cluster.peers.contains_key(&subnet) != (kind == 0) {
            break subnet;
        }
    };
    match (kind, cluster.peers.get(&subnet).copied()) {
        (1, _) => {
            cluster.remove(subnet);
        }
        (2, Some(peer)) => change_of(cluster, peer, Cluster::give_mac),
        (_, Some(peer)) => change_of(cluster, peer, Cluster::give_address),
        (_, None) => {
            let peer = cluster.peer(subnet);
            cluster.put(peer);
        }
    }
}

fn change_of(cluster: &mut Cluster, mut peer: Peer, give: fn(&mut Cluster, &mut Peer)) {
    give(cluster, &mut peer);
    cluster.put(peer);
}
