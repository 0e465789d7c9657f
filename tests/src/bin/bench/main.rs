//! What the work costs, measured on real parts and printed as tables.
//!
//! Run by `scripts/bench` against a release build; its header names the
//! variables that choose. The first table is of starts among few leases, the
//! second of the work at scale: each figure stands beside its bound and beside
//! what others took for the same in the same run. With `GO_FLANNELD`, a Go
//! flanneld is measured too.
//!
//! ```text
//!   start, join, event, churn, stand, rules     a figure each
//!        │
//!        ├─▶ cluster   leases in etcd, and what the kernel has to hold
//!        ├─▶ kernel    what it holds, by ip and bridge, and what they take to make it
//!        ├─▶ monitor   what it told of changes, and when
//!        └─▶ usage     processor and memory of a process
//! ```

mod churn;
mod cluster;
mod event;
mod join;
mod kernel;
mod monitor;
mod rules;
mod stand;
mod start;
mod table;
mod usage;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use flannel_tests::lab::{flanneld, run};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::cluster::Daemon;
use crate::table::{Row, tell};

/// What is measured, and how often.
#[derive(Debug)]
struct Bench {
    ours: Daemon,
    go: Option<Daemon>,
    runs: usize,
    /// Of the phases that are defined by time.
    phase: Duration,
    only: Option<Vec<String>>,
    sizes: Option<Vec<u32>>,
}

impl Bench {
    fn of_environment() -> Self {
        let words = |name: &str| -> Option<Vec<String>> {
            let value = std::env::var(name).ok()?;
            Some(value.split(',').map(|word| word.trim().to_owned()).collect())
        };
        let number = |word: &String| word.parse().unwrap_or_else(|_| panic!("not a number: {word}"));
        let one = |name: &str, usual: u32| words(name).map_or(usual, |words| number(&words[0]));
        let go = std::env::var_os("GO_FLANNELD").map(PathBuf::from);
        Self {
            ours: Daemon { name: "flannel-rs", path: flanneld().to_owned(), ours: true },
            go: go.map(|path| Daemon { name: "Go flanneld", path, ours: false }),
            runs: one("BENCH_RUNS", 5) as usize,
            phase: Duration::from_secs(one("BENCH_SECONDS", 60).into()),
            only: words("BENCH_ONLY"),
            sizes: words("BENCH_SIZES").map(|words| words.iter().map(number).collect()),
        }
    }

    /// How many peers a work is measured with.
    fn sizes(&self, usual: &[u32]) -> Vec<u32> {
        self.sizes.clone().unwrap_or_else(|| usual.to_vec())
    }

    /// The same for a work that is measured with one number of peers.
    fn size(&self) -> u32 {
        *self.sizes(&[10_000]).last().expect("a size")
    }

    fn wants(&self, work: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.iter().any(|word| word == work))
    }
}

/// A work and what measures it.
type Work = (&'static str, fn(&Bench) -> Vec<Row>);

const WORK: [Work; 8] = [
    ("join", join::rows),
    ("event", event::rows),
    ("churn", churn::rows),
    ("audit", stand::audit),
    ("repair", stand::repair),
    ("again", stand::again),
    ("idle", stand::idle),
    ("rules", rules::rows),
];

fn main() {
    let bench = Bench::of_environment();
    if bench.wants("start") {
        start::table(&bench);
        binaries(&bench);
    }
    let mut rows = vec![];
    for (name, measure) in WORK {
        if bench.wants(name) {
            tell(name);
            rows.extend(measure(&bench));
        }
    }
    if !rows.is_empty() {
        table::print(&rows);
    }
    machine(&bench);
}

#[allow(clippy::print_stdout)]
fn binaries(bench: &Bench) {
    for daemon in [&bench.ours].into_iter().chain(&bench.go) {
        let bytes = fs::metadata(&daemon.path).expect("the daemon is there").len();
        println!("\n{}: {:.1} MB of binary", daemon.name, bytes as f64 / 1_000_000.0);
    }
}

#[allow(clippy::print_stdout)]
fn machine(bench: &Bench) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let etcd = run(&["etcd", "--version"]);
    let data = statfs(&std::env::temp_dir()).expect("its files are somewhere").filesystem_type();
    let data = if data == TMPFS_MAGIC { "in memory" } else { "on a disk" };
    println!(
        "\nMedians of {} runs where a figure does not say otherwise; {cores} cores, Linux {}, {} on the same machine with its data {data}.",
        bench.runs,
        release.trim(),
        etcd.lines().next().unwrap_or_default()
    );
}
