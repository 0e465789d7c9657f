//! What a process has used, in the words of `/proc`.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use flannel_tests::lab::Lab;

/// The unit of `/proc/PID/stat`, `USER_HZ`: 100 on all common machines.
const TICK: Duration = Duration::from_millis(10);

/// What a process has used so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// User and system time of the threads that live, to the nanosecond.
    threads: Duration,
    /// The same with the threads that have ended, in ticks.
    ticks: Duration,
    /// Of the children that it has waited for, in ticks.
    children: Duration,
    /// Page faults of the same: no process ever ran without one.
    child_faults: u64,
}

impl Usage {
    pub(crate) fn of(pid: u32) -> Self {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        // The name, in brackets, may hold blanks; utime is field 14 of proc(5).
        let fields: Vec<&str> = stat.rsplit(')').next().expect("a last part").split_whitespace().collect();
        let ticks = |field: usize| TICK * fields[field - 3].parse::<u32>().expect("a number of ticks");
        Self {
            threads: of_threads(pid),
            ticks: ticks(14) + ticks(15),
            children: ticks(16) + ticks(17),
            child_faults: fields[11 - 3].parse().expect("a number"),
        }
    }

    /// What was used since then, children included.
    pub(crate) fn since(self, then: Self) -> Duration {
        let threads = self.threads.saturating_sub(then.threads);
        // Each reading is short of the truth by less than two ticks. More than that is what
        // threads had used that have ended.
        let ticks = (self.ticks - then.ticks).saturating_sub(TICK * 2);
        threads.max(ticks) + (self.children - then.children)
    }

    /// Whether it has had children since then.
    pub(crate) fn had_children_since(self, then: Self) -> bool {
        self.child_faults > then.child_faults
    }
}

/// User and system time of the threads that live.
pub(crate) fn of_threads(pid: u32) -> Duration {
    // In nanoseconds on the processor, for each thread.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let on_processor = |path: PathBuf| -> u64 {
        let text = fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(threads.flatten().map(|thread| on_processor(thread.path())).sum())
}

/// The most memory it ever had, in KiB.
pub(crate) fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux tells the peak");
    peak.split_whitespace().next().and_then(|number| number.parse().ok()).expect("in KiB")
}

/// How many processes and threads the machine has ever started.
pub(crate) fn forks() -> u64 {
    let stat = fs::read_to_string("/proc/stat").expect("Linux has it");
    let line = stat.lines().find_map(|line| line.strip_prefix("processes ")).expect("it is counted");
    line.trim().parse().expect("a number")
}

/// The calls that etcd has counted so far; streams count once.
pub(crate) fn etcd_calls(lab: &Lab) -> u64 {
    let page = lab.run_on_wire(&[
        "bash",
        "-c",
        "exec 3<>/dev/tcp/192.168.77.254/2379; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3",
    ]);
    let counted = page.lines().filter(|line| line.starts_with("grpc_server_started_total"));
    counted.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).map(|count| count as u64).sum()
}
