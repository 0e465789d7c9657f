//! What is written down while a scenario runs, and read back by the checks.
//!
//! One directory for each scenario, files of one JSON object a line, every line
//! with the time: seconds since 1970, the same clock in all of them.
//!
//! ```text
//!   history.jsonl     every event of etcd's keys, from the first revision on
//!   writes.jsonl      what the scenario itself wrote to etcd, sent and answered
//!   kernel-hN.jsonl   what the kernel of a host told of its changes
//!   agent-hN.jsonl    every half second: memory, descriptors, log, readiness, file
//!   packets.jsonl     the flow of each pair: what was lost, and when
//!   marks.jsonl       what the scenario did, and whom it excuses from what
//!   end.json          leases and kernels at the end
//!   agent-hN.log      the agent's own words
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Seconds since 1970.
pub(crate) type Time = f64;

pub(crate) fn now() -> Time {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Writes lines to one file; copies write to the same.
#[derive(Clone)]
pub(crate) struct Lines(Arc<Mutex<File>>);

impl Lines {
    pub(crate) fn create(path: &Path) -> Self {
        let file = File::options().create(true).append(true).open(path);
        Self(Arc::new(Mutex::new(file.unwrap_or_else(|error| panic!("{}: {error}", path.display())))))
    }

    pub(crate) fn write(&self, line: &impl Serialize) {
        let mut text = serde_json::to_string(line).expect("plain structs serialise");
        text.push('\n');
        let mut file = self.0.lock().expect("no writer panics");
        file.write_all(text.as_bytes()).expect("there is room for the records");
    }
}

/// The lines of a file; none if it was never written. A last line that was cut short is passed over.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Vec<T> {
    let Ok(file) = File::open(path) else { return vec![] };
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    lines.filter_map(|line| serde_json::from_str(&line).ok()).collect()
}

/// One event of etcd's history.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Event {
    pub(crate) t: Time,
    /// Which etcd: one that was wiped or restored is another one.
    pub(crate) world: u32,
    pub(crate) revision: i64,
    pub(crate) what: What,
    pub(crate) key: String,
    #[serde(default)]
    pub(crate) value: String,
    #[serde(default)]
    pub(crate) lease: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum What {
    Put,
    Delete,
    /// Another etcd from here on: nothing of the former one counts.
    World,
    /// Events are missing: they were compacted away before they were seen.
    Gap,
}

/// What the scenario wrote.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Written {
    pub(crate) sent: Time,
    pub(crate) acked: Time,
    /// `None` for a removal.
    pub(crate) peer: Option<PeerRecord>,
    pub(crate) subnet: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PeerRecord {
    pub(crate) mac: String,
    pub(crate) address: String,
}

/// A line of `ip monitor` or, with `fdb ` before it, of `bridge monitor`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) t: Time,
    pub(crate) line: String,
}

/// How an agent was doing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) t: Time,
    /// 0 if none runs.
    pub(crate) pid: u32,
    /// KiB.
    pub(crate) rss: u64,
    pub(crate) descriptors: usize,
    /// Bytes of its log.
    pub(crate) log: u64,
    /// Milliseconds of processor time.
    pub(crate) cpu: u64,
    /// The status code of /readyz, 0 without an answer.
    pub(crate) code: u16,
    /// The page, if it is another one than before.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) page: Option<String>,
    /// subnet.env, if it is another one than before.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) file: Option<String>,
}

/// Packets of a pair that did not arrive, one after the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Packets {
    Lost {
        from: usize,
        to: usize,
        since: Time,
        until: Time,
        count: u64,
    },
    /// At the end.
    Sum {
        from: usize,
        to: usize,
        sent: u64,
        lost: u64,
        gap: f64,
    },
}

/// What the scenario did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Mark {
    /// A fault was injected that concerns these hosts: each has to show it.
    Fault {
        t: Time,
        what: String,
        hosts: Vec<usize>,
    },
    /// The scenario itself changed the kernel of a host.
    Meddled {
        host: usize,
        since: Time,
        until: Time,
    },
    /// The agent of a host could not know better: it was stopped or cut off.
    Blind {
        host: usize,
        since: Time,
        until: Time,
    },
    /// Packets from and to a host may get lost.
    Excused {
        host: usize,
        since: Time,
        until: Time,
        why: String,
    },
    /// The host was meant to get another subnet.
    Moves {
        host: usize,
    },
    /// The host was meant to get no subnet.
    Unserved {
        host: usize,
    },
    /// A key that is no lease to anybody.
    Poison {
        key: String,
    },
    /// A key whose owner was changed by the scenario's own hand.
    Given {
        key: String,
        t: Time,
    },
    /// From here on no agent runs.
    Stopped {
        t: Time,
    },
    /// All is recorded.
    End {
        t: Time,
    },
    Said {
        t: Time,
        what: String,
    },
}

/// Leases and kernels at the end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct End {
    /// Values by key, of subnets alone.
    pub(crate) leases: BTreeMap<String, String>,
    pub(crate) hosts: BTreeMap<usize, HostEnd>,
    /// Foreign keys that are gone or say something else.
    pub(crate) lost_keys: Vec<String>,
}

/// A kernel at the end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct HostEnd {
    pub(crate) address: String,
    /// As they were found.
    pub(crate) held: Vec<String>,
    pub(crate) lost_objects: Vec<String>,
    pub(crate) file: String,
}

/// Where the records of a scenario are.
#[derive(Clone, Debug)]
pub(crate) struct Records(PathBuf);

impl Records {
    /// An empty directory.
    pub(crate) fn create(directory: PathBuf) -> Self {
        match fs::remove_dir_all(&directory) {
            Err(error) if directory.exists() => panic!("{}: {error}", directory.display()),
            _ => {}
        }
        fs::create_dir_all(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        Self(directory)
    }

    /// What is there already.
    pub(crate) fn open(directory: PathBuf) -> Self {
        Self(directory)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn kernel(&self, host: usize) -> PathBuf {
        self.path(&format!("kernel-h{host}.jsonl"))
    }

    pub(crate) fn agent(&self, host: usize) -> PathBuf {
        self.path(&format!("agent-h{host}.jsonl"))
    }

    pub(crate) fn log(&self, host: usize) -> PathBuf {
        self.path(&format!("agent-h{host}.log"))
    }

    pub(crate) fn marks(&self) -> PathBuf {
        self.path("marks.jsonl")
    }
}
