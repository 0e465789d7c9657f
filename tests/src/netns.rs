//! A network namespace for each test.
//!
//! A namespace belongs to a thread, and children inherit it: so a test runs on
//! a fresh thread, in a namespace of its own, and tests run side by side with
//! equal device names. It needs `CAP_SYS_ADMIN`; without root, run the tests
//! under `unshare -rn`.

use std::io::{BufRead, BufReader};
use std::panic::resume_unwind;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use crate::{need, pass_over};

/// Runs a test in a namespace of its own, on a runtime of one thread.
///
/// # Panics
/// If the test does, or if there is no namespace to be had.
pub fn in_netns<T: AsyncFnOnce(Netns) + Send + 'static>(test: T) {
    if !need("ip") {
        return;
    }
    let run = || {
        let Some(netns) = Netns::enter() else {
            return;
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be built").block_on(test(netns));
    };
    if let Err(panic) = thread::spawn(run).join() {
        resume_unwind(panic);
    }
}

/// The namespace of the calling thread.
pub struct Netns(());

impl Netns {
    fn enter() -> Option<Self> {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            pass_over(&format!("no network namespace ({error}); run this under unshare -rn"));
            return None;
        }
        let netns = Self(());
        netns.run("ip link set lo up");
        Some(netns)
    }

    /// Makes `eth0`, up and with a carrier, with an address; the other end is `peer0`.
    pub fn underlay(&self, address: &str) {
        self.run("ip link add eth0 type veth peer name peer0");
        self.run("ip link set peer0 up");
        self.run("ip link set eth0 up");
        self.run(&format!("ip address add {address} dev eth0"));
    }

    /// Runs a command of plain words; returns what it prints.
    ///
    /// # Panics
    /// If it fails.
    pub fn run(&self, command: &str) -> String {
        match self.attempt(command) {
            Ok(printed) => printed,
            Err(said) => panic!("{command}: {said}"),
        }
    }

    /// Runs a command of plain words; returns what it prints, or what it says as it fails.
    ///
    /// # Panics
    /// If it cannot be run at all.
    pub fn attempt(&self, command: &str) -> Result<String, String> {
        let mut words = command.split_whitespace();
        let output = Command::new(words.next().unwrap_or_default()).args(words).output();
        let output = output.unwrap_or_else(|error| panic!("{command}: {error}"));
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// The index of a device.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn index_of(&self, link: &str) -> u32 {
        let shown = self.run(&format!("ip -o link show dev {link}"));
        shown.split(':').next().and_then(|index| index.parse().ok()).expect("ip begins with the index")
    }

    /// Starts to listen for changes of links and of what IPv4 has on them; IPv6
    /// changes by itself for a while after a link is up.
    ///
    /// # Panics
    /// If `ip monitor` cannot be run.
    pub fn monitor(&self) -> Monitor {
        self.run("ip link add mark0 type bridge");
        let mut child = Command::new("ip")
            .args(["-4", "-o", "monitor", "link", "address", "route", "neigh"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("ip monitor starts");
        let printed = child.stdout.take().expect("it was asked for");
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(printed).lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        let mut monitor = Monitor { child, lines, mark: 1000 };
        monitor.changes(self, "");
        monitor
    }
}

/// Listens for changes.
pub struct Monitor {
    child: Child,
    lines: mpsc::Receiver<String>,
    mark: u32,
}

impl Monitor {
    /// What has changed about a device since the last time, one line each.
    ///
    /// # Panics
    /// If nothing is heard of a change made for the purpose.
    pub fn changes(&mut self, netns: &Netns, device: &str) -> Vec<String> {
        let mut changes = vec![];
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            // Until the listener is there nothing is heard of the mark.
            self.mark += 1;
            netns.run(&format!("ip link set mark0 mtu {}", self.mark));
            while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(100)) {
                if line.contains(&format!("mtu {} ", self.mark)) {
                    return changes;
                }
                if !line.contains("mark0") && line.contains(device) {
                    changes.push(line);
                }
            }
        }
        panic!("ip monitor is silent");
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
