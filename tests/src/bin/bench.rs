//! What a start costs, measured on real parts and printed as a table.
//!
//! Run by `scripts/bench` against a release build. Times are from just before
//! the process is started to what the kernel says of the subnet file (its
//! change time), or to the agent's own word that every peer's objects have been
//! acknowledged; the objects are counted afterwards with `ip` and `bridge`.
//! With `GO_FLANNELD`, a Go flanneld is measured in the same run, in turn.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use flannel_tests::lab::{Host, Lab, Process, flanneld, until};

const PREFIX: &str = "/coreos.com/network";
const CONFIG: &str = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
const RUNS: usize = 5;

/// One start among that many other leases.
#[derive(Clone, Copy)]
struct Start {
    file: Duration,
    joined: Duration,
    cpu: Duration,
    /// In KiB.
    memory: u64,
    calls: u64,
}

#[allow(clippy::print_stdout)]
fn main() {
    let mut daemons = vec![("flannel-rs", flanneld().to_owned())];
    if let Some(go) = std::env::var_os("GO_FLANNELD") {
        daemons.push(("Go flanneld", PathBuf::from(go)));
    }
    println!("| | leases | start → subnet.env | start → all peers joined | CPU | peak memory | etcd calls |");
    println!("|---|---|---|---|---|---|---|");
    for leases in [1, 1000] {
        let lab = Lab::new(1);
        lab.put_config(PREFIX, CONFIG);
        put_leases(&lab, leases);
        let mut starts: Vec<Vec<Start>> = vec![vec![]; daemons.len()];
        // In turn, so that a slow moment of the machine falls on both.
        for _ in 0..RUNS {
            for (daemon, starts) in daemons.iter().zip(&mut starts) {
                starts.push(start(&lab, &daemon.1, leases));
            }
        }
        for ((name, _), starts) in daemons.iter().zip(&starts) {
            let file = median(starts.iter().map(|start| start.file));
            let joined = median(starts.iter().map(|start| start.joined));
            let cpu = median(starts.iter().map(|start| start.cpu));
            let memory = median(starts.iter().map(|start| start.memory));
            let calls = median(starts.iter().map(|start| start.calls));
            println!(
                "| {name} | {leases} | {} | {} | {} | {:.1} MB | {calls} |",
                ms(file),
                ms(joined),
                ms(cpu),
                memory as f64 / 1024.0
            );
        }
    }
    for (name, path) in &daemons {
        let bytes = fs::metadata(path).expect("the daemon is there").len();
        println!("\n{name}: {:.1} MB of binary", bytes as f64 / 1_000_000.0);
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let etcd = flannel_tests::lab::run(&["etcd", "--version"]);
    let etcd = etcd.lines().next().unwrap_or_default();
    println!(
        "\nMedians of {RUNS} runs; {cores} cores, Linux {}, {etcd} on the same machine.",
        release.trim()
    );
}

fn ms(duration: Duration) -> String {
    format!("{:.0} ms", duration.as_secs_f64() * 1000.0)
}

fn median<T: Ord>(values: impl Iterator<Item = T>) -> T {
    let mut values: Vec<T> = values.collect();
    values.sort_unstable();
    values.swap_remove(values.len() / 2)
}

/// Leases of other hosts, as flannel writes them.
fn put_leases(lab: &Lab, count: usize) {
    let numbers: Vec<usize> = (0..count).collect();
    for some in numbers.chunks(100) {
        let mut txn = String::from("\n");
        for number in some {
            let (high, low) = (number / 250, number % 250);
            let value = format!(
                r#"{{\"PublicIP\":\"172.16.{high}.{low}\",\"PublicIPv6\":null,\"BackendType\":\"vxlan\",\"BackendData\":{{\"VNI\":1,\"VtepMAC\":\"0e:00:00:00:{high:02x}:{low:02x}\"}}}}"#
            );
            writeln!(txn, "put {PREFIX}/subnets/10.{}.{low}.0-24 \"{value}\"", high + 10)
                .expect("a string takes all");
        }
        txn.push_str("\n\n");
        lab.etcdctl_fed(&["txn"], &txn);
    }
}

fn start(lab: &Lab, daemon: &Path, leases: usize) -> Start {
    let host = lab.host(1);
    let file = host.subnet_file();
    let before = calls(lab);
    let began = SystemTime::now();
    let mut process: Process = host.daemon(daemon, "bench", &file, &["--iface=eth0", "--v=0"]);
    let clock = Instant::now();
    until("every peer has joined", || entries(&host) == leases);
    // Counting takes time itself; our own daemon says when the last answer came.
    let joined = said_in_sync(&process, began).unwrap_or_else(|| clock.elapsed());
    until("the file is written", || file.exists());
    let changed = fs::metadata(&file).expect("the file is there");
    let seconds = u64::try_from(changed.ctime()).expect("after 1970");
    let nanoseconds = u32::try_from(changed.ctime_nsec()).expect("below a second");
    let written = UNIX_EPOCH + Duration::new(seconds, nanoseconds);

    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux tells the peak");
    let memory = peak.split_whitespace().next().and_then(|number| number.parse().ok()).expect("in KiB");
    let cpu = cpu(process.pid());
    let calls = calls(lab) - before;

    process.kill();
    // The next start finds a host as bare as this one did.
    host.run(&["ip", "link", "del", "flannel.1"]);
    for words in ["-F FORWARD", "-F FLANNEL-FWD", "-X FLANNEL-FWD"] {
        host.run(&[&["iptables"], words.split(' ').collect::<Vec<_>>().as_slice()].concat());
    }
    fs::remove_file(&file).expect("the file is there");
    fs::remove_file(process.log_path()).expect("the log is there");
    let own = lab
        .leases(PREFIX)
        .into_iter()
        .find(|(_, value)| value.contains("192.168.77.1"))
        .expect("a lease of ours");
    lab.etcdctl(&["del", &own.0]);
    Start { file: written.duration_since(began).unwrap_or_default(), joined, cpu, memory, calls }
}

/// When the agent said that its host was in sync, since `began`.
fn said_in_sync(process: &Process, began: SystemTime) -> Option<Duration> {
    let log = process.log();
    let line = log.lines().find(|line| line.contains("host in sync"))?;
    // 2026-01-31T12:34:56.789012Z: the time of day is enough.
    let time = line.split('T').nth(1)?.split('Z').next()?;
    let mut parts = time.split(':').map(|part| part.parse::<f64>().ok());
    let said = parts.next()?? * 3600.0 + parts.next()?? * 60.0 + parts.next()??;
    let began = began.duration_since(UNIX_EPOCH).ok()?.as_secs_f64() % 86_400.0;
    Some(Duration::from_secs_f64((said - began).rem_euclid(86_400.0)))
}

/// How many peers have all three objects, in the kernel's own tables.
fn entries(host: &Host) -> usize {
    let lines = |words: &[&str]| {
        let output = host.command(words[0]).args(&words[1..]).output().expect("it can be started");
        String::from_utf8_lossy(&output.stdout).lines().filter(|line| !line.is_empty()).count()
    };
    let routes =
        host.run(&["ip", "route", "show"]).lines().filter(|line| line.contains("dev flannel.1")).count();
    let neighbours = lines(&["ip", "neigh", "show", "dev", "flannel.1", "nud", "permanent"]);
    let entries = lines(&["bridge", "fdb", "show", "dev", "flannel.1"]);
    routes.min(neighbours).min(entries)
}

/// User and system time.
fn cpu(pid: u32) -> Duration {
    // In nanoseconds on the processor, for the main thread; the others are listed beside it.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let on_processor = |path: PathBuf| -> u64 {
        let text = fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(threads.flatten().map(|thread| on_processor(thread.path())).sum())
}

/// The calls that etcd has counted so far; streams count once.
fn calls(lab: &Lab) -> u64 {
    let page = lab.run_on_wire(&[
        "bash",
        "-c",
        "exec 3<>/dev/tcp/192.168.77.254/2379; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3",
    ]);
    let counted = page.lines().filter(|line| line.starts_with("grpc_server_started_total"));
    counted.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).map(|count| count as u64).sum()
}
