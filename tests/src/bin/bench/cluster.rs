//! A host and a cluster of peers that exist only as leases: in etcd, and once
//! more here, to say what the kernel has to hold.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use etcd_client::{Client, DeleteOptions, Txn, TxnOp};
use flannel_tests::lab::{ETCD, Host, Lab, Process};
use nix::sched::{CloneFlags, setns};
use tokio::runtime::Runtime;

use crate::kernel;

/// Longer than any start takes, that of a Go flanneld among many peers too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// As many /24 as there are from 10.16.0.0 on.
pub(crate) const MOST_PEERS: u32 = 240 * 256;

const PREFIX: &str = "/coreos.com/network";
/// Our own lease is in 10.1.0.0/16, where no peer is.
const CONFIG: &str =
    r#"{"Network":"10.0.0.0/8","SubnetMin":"10.1.0.0","SubnetMax":"10.1.255.0","Backend":{"Type":"vxlan"}}"#;
const OWN_LEASES: &str = "/coreos.com/network/subnets/10.1.";

/// A daemon to measure.
#[derive(Clone, Debug)]
pub(crate) struct Daemon {
    pub(crate) name: &'static str,
    pub(crate) path: PathBuf,
    /// Says in its log when the host is in sync.
    pub(crate) ours: bool,
}

/// Another host's lease.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    /// Which /24, counted from 10.16.0.0.
    pub(crate) subnet: u32,
    pub(crate) address: Ipv4Addr,
    pub(crate) mac: [u8; 6],
}

impl Peer {
    pub(crate) fn network(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 16, 0, 0)) + (self.subnet << 8))
    }

    pub(crate) fn mac(&self) -> String {
        mac(&self.mac)
    }

    /// What the kernel holds for it, in the words of [`kernel::Dump::objects`].
    pub(crate) fn objects(&self) -> [String; 3] {
        let (network, mac) = (self.network(), self.mac());
        [
            format!("neighbour {network} {mac}"),
            format!("entry {mac} {}", self.address),
            format!("route {network}/24 {network}"),
        ]
    }

    fn key(&self) -> String {
        format!("{PREFIX}/subnets/{}-24", self.network())
    }

    fn value(&self) -> String {
        format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
            self.address,
            self.mac()
        )
    }
}

/// A MAC as it is written.
pub(crate) fn mac(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// When a change was sent to etcd, and how long etcd took to answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent {
    pub(crate) at: Instant,
    pub(crate) answered: Duration,
}

/// A lab of one host, and its peers.
pub(crate) struct Cluster {
    pub(crate) lab: Lab,
    pub(crate) host: Host,
    pub(crate) peers: BTreeMap<u32, Peer>,
    /// How many MACs and addresses are given out; none is given twice.
    given: u32,
    runtime: Runtime,
    store: Client,
}

impl Cluster {
    /// Does `work` on a new cluster, on a thread in etcd's namespace.
    pub(crate) fn with<T: Send>(peers: u32, work: impl FnOnce(&mut Self) -> T + Send) -> T {
        let on_the_wire = || {
            let mut cluster = Self::new(peers);
            let outcome = work(&mut cluster);
            cluster.bare();
            outcome
        };
        let outcome = thread::scope(|scope| scope.spawn(on_the_wire).join());
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn new(peers: u32) -> Self {
        let lab = Lab::new(1);
        lab.put_config(PREFIX, CONFIG);
        enter(&lab.wire());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be built");
        let store = runtime.block_on(Client::connect([ETCD], None)).expect("etcd can be reached");
        let host = lab.host(1);
        let mut cluster = Self { lab, host, peers: BTreeMap::new(), given: 0, runtime, store };
        let all: Vec<Peer> = (0..peers).map(|subnet| cluster.peer(subnet)).collect();
        for some in all.chunks(100) {
            let puts: Vec<TxnOp> =
                some.iter().map(|peer| TxnOp::put(peer.key(), peer.value(), None)).collect();
            let txn = cluster.store.txn(Txn::new().and_then(puts));
            cluster.runtime.block_on(txn).expect("etcd takes leases");
        }
        cluster.peers.extend(all.into_iter().map(|peer| (peer.subnet, peer)));
        cluster
    }

    /// Somebody who is not in the cluster yet.
    pub(crate) fn peer(&mut self, subnet: u32) -> Peer {
        assert!(subnet < MOST_PEERS, "10.0.0.0/8 has no more room");
        let mut peer = Peer { subnet, address: Ipv4Addr::UNSPECIFIED, mac: [0; 6] };
        self.give_mac(&mut peer);
        self.give_address(&mut peer);
        peer
    }

    pub(crate) fn give_mac(&mut self, peer: &mut Peer) {
        self.given += 1;
        peer.mac = [0x0e, 0, 0, 0, 0, 0];
        peer.mac[2..].copy_from_slice(&self.given.to_be_bytes());
    }

    pub(crate) fn give_address(&mut self, peer: &mut Peer) {
        self.given += 1;
        peer.address = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + self.given);
    }

    /// Puts one lease.
    pub(crate) fn put(&mut self, peer: Peer) -> Sent {
        let at = Instant::now();
        let put = self.store.put(peer.key(), peer.value(), None);
        self.runtime.block_on(put).expect("etcd takes a lease");
        let answered = at.elapsed();
        self.peers.insert(peer.subnet, peer);
        Sent { at, answered }
    }

    /// Removes one lease.
    pub(crate) fn remove(&mut self, subnet: u32) -> Sent {
        let peer = self.peers.remove(&subnet).expect("the peer is there");
        let at = Instant::now();
        let delete = self.store.delete(peer.key(), None);
        self.runtime.block_on(delete).expect("etcd removes a lease");
        Sent { at, answered: at.elapsed() }
    }

    /// What the kernel has to hold.
    pub(crate) fn objects(&self) -> HashSet<String> {
        self.peers.values().flat_map(Peer::objects).collect()
    }

    /// Compares the kernel with the leases, object by object.
    ///
    /// # Panics
    /// They differ.
    pub(crate) fn check(&self) {
        let held = kernel::Dump::read(&self.host).objects();
        if let Some(difference) = kernel::difference(&self.objects(), &held) {
            panic!("the kernel does not hold what the leases say: {difference}");
        }
    }

    /// Starts a daemon on the host.
    pub(crate) fn start(&self, daemon: &Daemon, flags: &[&str]) -> Agent {
        let flags = [&["--iface=eth0", "--v=0"], flags].concat();
        // From a thread that is there already: `ip netns exec` takes milliseconds of its own.
        let start = || {
            enter(&self.host.namespace);
            let (began, clock) = (SystemTime::now(), Instant::now());
            let command = Command::new(&daemon.path);
            let process = self.host.start(command, "bench", &self.host.subnet_file(), &flags);
            Agent { process, began, clock }
        };
        let agent = thread::scope(|scope| scope.spawn(start).join());
        agent.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Starts a daemon of ours and waits until the host is in sync.
    pub(crate) fn in_sync(&self, daemon: &Daemon, flags: &[&str]) -> Agent {
        let agent = self.start(daemon, flags);
        agent.in_sync_after(agent.began);
        agent
    }

    /// Kills a daemon; what it has made stays.
    pub(crate) fn kill(&self, mut agent: Agent) {
        agent.process.kill();
        fs::remove_file(agent.process.log_path()).expect("the log is there");
    }

    /// Takes from the host all that daemons have made, and our own lease from etcd.
    pub(crate) fn bare(&mut self) {
        kernel::remove_all(&self.host);
        // There may be no rules.
        drop(self.host.command("sh").args(["-c", "iptables -F; iptables -X"]).output());
        drop(fs::remove_file(self.host.subnet_file()));
        let own = self.store.delete(OWN_LEASES, Some(DeleteOptions::new().with_prefix()));
        self.runtime.block_on(own).expect("etcd removes a lease");
    }
}

/// A daemon that runs.
pub(crate) struct Agent {
    pub(crate) process: Process,
    /// Just before its start.
    pub(crate) began: SystemTime,
    pub(crate) clock: Instant,
}

impl Agent {
    /// Waits until it says that its host is in sync; how long after `moment` it did.
    pub(crate) fn in_sync_after(&self, moment: SystemTime) -> Duration {
        let start = Instant::now();
        loop {
            let log = self.process.log();
            // A line that is still being written counts when it is whole.
            let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            let mut in_sync = lines.filter(|line| line.contains("host in sync"));
            if let Some(after) = in_sync.find_map(|line| after(line, moment)) {
                return after;
            }
            assert!(start.elapsed() < PATIENCE, "it never said that the host is in sync:\n{log}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// How long after `moment` a line was written; `None` if before.
fn after(line: &str, moment: SystemTime) -> Option<Duration> {
    const DAY: f64 = 86_400.0;
    // 2026-01-31T12:34:56.789012Z: the time of day is enough.
    let time = line.split('T').nth(1)?.split('Z').next()?;
    let mut parts = time.split(':').map(|part| part.parse::<f64>().ok());
    let said = parts.next()?? * 3600.0 + parts.next()?? * 60.0 + parts.next()??;
    let moment = moment.duration_since(UNIX_EPOCH).ok()?.as_secs_f64() % DAY;
    let after = (said - moment).rem_euclid(DAY);
    (after < DAY / 2.0).then(|| Duration::from_secs_f64(after))
}

/// Puts the calling thread into a namespace.
pub(crate) fn enter(namespace: &str) {
    let namespace = File::open(Path::new("/run/netns").join(namespace)).expect("the namespace is there");
    setns(namespace, CloneFlags::CLONE_NEWNET).expect("root can enter it");
}
