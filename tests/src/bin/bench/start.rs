//! What a start on a bare host costs.
//!
//! Times are from just before the process is started to what the kernel says of
//! the subnet file (its change time), and to the agent's own word that every
//! peer's objects have been acknowledged; a Go flanneld gives no such word, so
//! the kernel's last notification counts. The objects are then compared with
//! the leases one by one.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, UNIX_EPOCH};

use flannel_tests::lab::until;

use crate::Bench;
use crate::cluster::{Cluster, Daemon};
use crate::monitor::Monitor;
use crate::table::{median, megabytes, tell, time};
use crate::usage;

/// One start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    pub(crate) file: Duration,
    pub(crate) joined: Duration,
    pub(crate) cpu: Duration,
    /// In KiB.
    pub(crate) memory: u64,
    pub(crate) calls: u64,
}

/// Starts a daemon on a bare host and kills it; what it has made stays.
pub(crate) fn start(cluster: &Cluster, daemon: &Daemon) -> Start {
    let monitor = (!daemon.ours).then(|| Monitor::start(&cluster.host));
    let before = usage::etcd_calls(&cluster.lab);
    let agent = cluster.start(daemon, &[]);
    let joined = match &monitor {
        Some(monitor) => monitor.all_joined(cluster.peers.values()).duration_since(agent.clock),
        None => agent.in_sync_after(agent.began),
    };
    let pid = agent.process.pid();
    let (cpu, memory) = (usage::of_threads(pid), usage::peak_memory(pid));
    drop(monitor);

    let file = cluster.host.subnet_file();
    until("the file is written", || file.exists());
    let changed = fs::metadata(&file).expect("the file is there");
    let seconds = u64::try_from(changed.ctime()).expect("after 1970");
    let nanoseconds = u32::try_from(changed.ctime_nsec()).expect("below a second");
    let written = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
    let file = written.duration_since(agent.began).unwrap_or_default();

    cluster.check();
    let calls = usage::etcd_calls(&cluster.lab) - before;
    cluster.kill(agent);
    Start { file, joined, cpu, memory, calls }
}

/// Prints the table of starts.
#[allow(clippy::print_stdout)]
pub(crate) fn table(bench: &Bench) {
    println!("| | leases | start → subnet.env | start → all peers joined | CPU | peak memory | etcd calls |");
    println!("|---|---|---|---|---|---|---|");
    let daemons: Vec<&Daemon> = [&bench.ours].into_iter().chain(&bench.go).collect();
    for leases in [1, 1000] {
        tell(&format!("starts among {leases} leases"));
        let mut starts: Vec<Vec<Start>> = vec![vec![]; daemons.len()];
        Cluster::with(leases, |cluster| {
            // In turn, so that a slow moment of the machine falls on both.
            for _ in 0..bench.runs {
                for (daemon, starts) in daemons.iter().zip(&mut starts) {
                    starts.push(start(cluster, daemon));
                    cluster.bare();
                }
            }
        });
        for (daemon, starts) in daemons.iter().zip(&starts) {
            println!(
                "| {} | {leases} | {} | {} | {} | {} | {} |",
                daemon.name,
                time(median(starts.iter().map(|start| start.file))),
                time(median(starts.iter().map(|start| start.joined))),
                time(median(starts.iter().map(|start| start.cpu))),
                megabytes(median(starts.iter().map(|start| start.memory))),
                median(starts.iter().map(|start| start.calls)),
            );
        }
    }
}
