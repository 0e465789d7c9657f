//! What outlives a reboot: which host this is, and what it remembers of the cluster.
//!
//! ```text
//!   host-id                     32 hex digits, chosen once
//!   coreos.com-network.state    the memory of one cluster, named after its prefix
//!   *.bad                       what could not be believed, for somebody to look at
//! ```
//!
//! Nothing here is needed to work: without it a host cannot start while the store
//! is away, and looks like another one after a reboot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use flannel_core::chain::chain;
use flannel_core::lease::HostIdentity;
use flannel_core::memory::Memory;
use thiserror::Error;
use tracing::{info, warn};

use crate::whole_file;

/// A hundred thousand leases, and then some; in bytes.
const MOST: u64 = 64 << 20;

/// Only root has any business here: a network config may hold a key.
const FILE_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

/// A file could not be read or written. Trying again may help.
#[derive(Debug, Error)]
#[error("state file {path}")]
pub struct StateError {
    path: String,
    #[source]
    source: io::Error,
}

/// The directory, for one cluster.
#[derive(Clone)]
pub struct StateDir {
    directory: PathBuf,
    /// Of all keys of the cluster.
    prefix: String,
    /// The time of a simulation.
    clock: Option<Clock>,
}

type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

impl StateDir {
    /// The state in `directory` of the cluster under `prefix`; nothing need be there.
    pub fn new(directory: PathBuf, prefix: &str) -> Self {
        let parts: Vec<&str> = prefix.split('/').filter(|part| !part.is_empty()).collect();
        Self { directory, prefix: parts.join("/"), clock: None }
    }

    /// The same in a simulation, whose time `clock` tells, in seconds since 1970.
    /// What is written there is written on the spot: a thread beside would not
    /// keep to that time.
    pub fn simulated(self, clock: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self { clock: Some(Arc::new(clock)), ..self }
    }

    /// Now, by the wall clock, in seconds since 1970.
    pub fn now(&self) -> u64 {
        match &self.clock {
            Some(clock) => clock(),
            None => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        }
    }

    /// The prefix, as it stands in the memory.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Where the memory is.
    pub fn memory_path(&self) -> PathBuf {
        self.directory.join(format!("{}.state", escaped(&self.prefix)))
    }

    /// What an earlier run remembered; nothing if it cannot be believed, which is told and set aside.
    pub fn recall(&self) -> Option<Memory> {
        let path = self.memory_path();
        let text = match whole_file::read(&path, MOST) {
            Ok(text) => text?,
            Err(source) => {
                set_aside(&path, &source.to_string());
                return None;
            }
        };
        match text.parse::<Memory>() {
            Ok(memory) if memory.prefix == self.prefix => Some(memory),
            Ok(memory) => {
                set_aside(&path, &format!("it is of another cluster, {}", memory.prefix));
                None
            }
            Err(error) => {
                set_aside(&path, &error.to_string());
                None
            }
        }
    }

    /// Replaces the memory.
    ///
    /// # Errors
    /// It cannot be written; the former one is then as it was.
    pub fn remember(&self, memory: &Memory) -> Result<(), StateError> {
        let path = self.memory_path();
        let written = self.make().and_then(|()| whole_file::replace(&path, &memory.to_string(), FILE_MODE));
        written.map_err(|source| StateError { path: path.display().to_string(), source })
    }

    /// The same, without keeping others waiting for the disk.
    pub(crate) async fn remember_beside(self, memory: Memory) -> Result<(), StateError> {
        if self.clock.is_some() {
            return self.remember(&memory);
        }
        let written = tokio::task::spawn_blocking(move || self.remember(&memory)).await;
        written.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    fn make(&self) -> io::Result<()> {
        whole_file::make_directory(&self.directory, DIRECTORY_MODE)
    }

    /// The id of this host, chosen now if it has none.
    fn host_id(&self) -> Result<String, StateError> {
        let path = self.directory.join("host-id");
        let failed = |source| StateError { path: path.display().to_string(), source };
        self.make().map_err(failed)?;
        // A second agent on this host may be choosing at the same time: the file decides.
        let mut met = io::Error::other("what is there cannot be replaced");
        for _ in 0..3 {
            let is_good = |id: &str| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
            match whole_file::read(&path, 1 << 10) {
                Ok(Some(text)) if is_good(text.trim()) => {
                    // A crash just after the choice leaves two names; there will be no other write.
                    drop(whole_file::tidy(&path));
                    return Ok(text.trim().into());
                }
                Ok(None) => {}
                Ok(Some(_)) => set_aside(&path, "it is not 32 hex digits"),
                Err(error) => set_aside(&path, &error.to_string()),
            }
            let id = format!("{:032x}\n", fastrand::u128(..));
            if let Err(error) = whole_file::create(&path, &id, FILE_MODE) {
                met = error;
            }
        }
        Err(failed(met))
    }
}

/// Which host this is.
pub fn identity(state: Option<&StateDir>) -> HostIdentity {
    let kernel = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
        Some(text.trim().to_owned()).filter(|text| !text.is_empty()).unwrap_or_else(|| "unknown".into())
    };
    let (boot, name) = (kernel("random/boot_id"), kernel("hostname"));
    let id = state.and_then(|state| {
        let id = state.host_id();
        id.inspect_err(|error| {
            warn!(error = %chain(error), "this host has no lasting id: after a reboot it looks like another one");
        })
        .ok()
    });
    HostIdentity { id: id.unwrap_or_else(|| format!("boot-{boot}")), boot, name }
}

/// Renames what cannot be believed, so that it is neither read again nor lost.
fn set_aside(path: &Path, reason: &str) {
    let mut aside = path.to_owned().into_os_string();
    aside.push(".bad");
    // What was set aside before may be a file where this is a directory, or the other way round.
    let renamed = fs::rename(path, &aside).or_else(|error| {
        fs::remove_file(&aside).or_else(|_| fs::remove_dir(&aside)).map_err(|_| error)?;
        fs::rename(path, &aside)
    });
    match renamed {
        Ok(()) => warn!(
            path = %path.display(), reason, set_aside = %aside.display(),
            "a state file cannot be used; going on without it"
        ),
        Err(error) => info!(
            path = %path.display(), reason, %error, "a state file can be neither used nor set aside; going on without it"
        ),
    }
}

/// A path as part of a name, as `systemd-escape --path` writes it.
fn escaped(path: &str) -> String {
    let mut name = String::new();
    for (place, byte) in path.bytes().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if place == 0 => name.push_str("\\x2e"),
            b':' | b'_' | b'.' => name.push(byte.into()),
            byte if byte.is_ascii_alphanumeric() => name.push(byte.into()),
            byte => name.push_str(&format!("\\x{byte:02x}")),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use flannel_core::lease::{Lease, LeaseAttrs, Subnet, Tenure};

    use super::*;

    fn state(directory: &Path) -> StateDir {
        StateDir::new(directory.join("state"), "/coreos.com/network")
    }

    fn memory() -> Memory {
        Memory {
            prefix: "coreos.com/network".into(),
            config: "{}".into(),
            own: Lease {
                subnet: Subnet::V4("10.5.1.0/24".parse().unwrap()),
                attrs: LeaseAttrs::from_json(r#"{"PublicIP":"192.168.0.1"}"#).unwrap(),
                tenure: Tenure::Leased,
            },
            handle: 7,
            written: 1,
            expires: Some(2),
            peers: vec![],
        }
    }

    fn names(directory: &Path) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = fs::read_dir(directory.join("state")).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_remembered_is_recalled_by_whoever_writes_the_prefix_another_way() {
        let directory = tempfile::tempdir().unwrap();

        state(directory.path()).remember(&memory()).unwrap();

        let other = StateDir::new(directory.path().join("state"), "//coreos.com/network/");
        assert_eq!(other.recall(), Some(memory()));
        assert_eq!(names(directory.path()), ["coreos.com-network.state"]);
    }

    #[test]
    fn each_cluster_has_a_memory_of_its_own() {
        for (prefix, name) in [("/a/b", "a-b.state"), ("/a-b", "a\\x2db.state"), ("/../a", "\\x2e.-a.state")]
        {
            assert!(StateDir::new("/x".into(), prefix).memory_path().ends_with(name), "{prefix}");
        }
    }

    #[test]
    fn what_cannot_be_believed_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let state = state(directory.path());
        let whole = memory().to_string();
        let of_another = Memory { prefix: "other".into(), ..memory() }.to_string();

        for bad in [&whole[..whole.len() / 2], "", "\0\0\0", of_another.as_str()] {
            state.make().unwrap();
            fs::write(state.memory_path(), bad).unwrap();

            assert_eq!(state.recall(), None, "{bad:?}");
            assert_eq!(names(directory.path()), ["coreos.com-network.state.bad"]);
        }
        assert_eq!(state.recall(), None, "nothing is there");
    }

    #[test]
    fn a_host_keeps_its_id_and_two_hosts_have_two() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = |directory: &Path| identity(Some(&state(directory))).id;

        assert_eq!(id(one.path()), id(one.path()));
        assert_ne!(id(one.path()), id(other.path()));
        assert_eq!(names(one.path()), ["host-id"]);
    }

    #[test]
    fn what_a_crash_has_left_of_the_choice_of_an_id_goes_with_the_next_start() {
        let directory = tempfile::tempdir().unwrap();
        let state = state(directory.path());
        let id = identity(Some(&state)).id;
        fs::write(directory.path().join("state/.host-id.new"), &id).unwrap();

        assert_eq!(identity(Some(&state)).id, id);
        assert_eq!(names(directory.path()), ["host-id"]);
    }

    #[test]
    fn a_host_id_that_is_none_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let state = state(directory.path());
        state.make().unwrap();
        fs::write(directory.path().join("state/host-id"), "0123").unwrap();

        assert_eq!(identity(Some(&state)).id.len(), 32);
        assert_eq!(names(directory.path()), ["host-id", "host-id.bad"]);
    }

    #[test]
    fn without_a_place_for_it_the_id_is_that_of_the_boot() {
        let host = identity(Some(&StateDir::new("/proc/nowhere".into(), "/a")));

        assert_eq!(host.id, format!("boot-{}", host.boot));
    }
}
