//! Two hosts with pods, a tunnel between them and somebody outside, to send packets through.
//!
//! ```text
//!   pod .2  published .3          pod .2  published .3
//!      └──┬──┘                       └──┬──┘
//!   docker0 10.5.1.1              docker0 10.5.2.1
//!   flannel.1 10.5.1.0 ─────────── flannel.1 10.5.2.0
//!   eth0 192.168.77.1             eth0 192.168.77.2          eth0 192.168.77.9
//!         └──────────────── wire ───────┴──────────────────────────┘ outside
//! ```
//!
//! The addresses are set once, by hand and for good; what changes is the traffic rules
//! of the two hosts. Outside knows the way to every pod, as a neighbour on the wire may.
//! Needs root; every name is the cluster's own and goes with it.

pub mod rules;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::lab::{PATIENCE, output, run, until};

/// A port that nobody publishes; everybody listens there.
pub const UNPUBLISHED: u16 = 7000;

/// The port of `published` that its host publishes as [`HOST_PORT`].
pub const PUBLISHED: u16 = 80;

/// The port of a host that leads to its `published`.
pub const HOST_PORT: u16 = 8080;

/// How long silence is listened to once all that is to arrive has arrived.
const SILENCE: Duration = Duration::from_millis(100);

/// Where a packet may come from or go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A host, 1 or 2.
    Host(u8),
    /// The container without a published port on that host.
    Pod(u8),
    /// The one that has one.
    Published(u8),
    /// A machine beside the hosts.
    Outside,
}

impl Place {
    const ALL: [Self; 7] = [
        Self::Host(1),
        Self::Host(2),
        Self::Pod(1),
        Self::Pod(2),
        Self::Published(1),
        Self::Published(2),
        Self::Outside,
    ];

    /// Its own address.
    pub const fn address(self) -> Ipv4Addr {
        match self {
            Self::Host(host) => Ipv4Addr::new(192, 168, 77, host),
            Self::Pod(host) => Ipv4Addr::new(10, 5, host, 2),
            Self::Published(host) => Ipv4Addr::new(10, 5, host, 3),
            Self::Outside => Ipv4Addr::new(192, 168, 77, 9),
        }
    }

    fn listens_on(self) -> &'static [u16] {
        match self {
            Self::Published(_) => &[UNPUBLISHED, PUBLISHED],
            _ => &[UNPUBLISHED],
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(host) => write!(f, "h{host}"),
            Self::Pod(host) => write!(f, "p{host}"),
            Self::Published(host) => write!(f, "q{host}"),
            Self::Outside => f.write_str("out"),
        }
    }
}

/// A connection that somebody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// Who connects.
    pub from: Place,
    /// From an address of its choice; else the kernel chooses.
    pub bound: Option<Ipv4Addr>,
    /// To what address and port.
    pub to: SocketAddrV4,
}

impl Flow {
    /// From one place to a port of another, by the address that the kernel chooses.
    pub const fn new(from: Place, to: Place, port: u16) -> Self {
        Self { from, bound: None, to: SocketAddrV4::new(to.address(), port) }
    }
}

/// The cluster.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    listeners: Vec<std::net::TcpListener>,
}

impl Cluster {
    /// Builds it; there are no traffic rules yet.
    ///
    /// # Panics
    /// Not root, or a tool is missing.
    pub fn new() -> Self {
        static CLUSTERS: AtomicUsize = AtomicUsize::new(0);
        let name = format!("flp{}-{}", std::process::id(), CLUSTERS.fetch_add(1, Ordering::SeqCst));
        let mut cluster = Self { name, listeners: vec![] };
        cluster.build();
        cluster
    }

    fn build(&mut self) {
        run(&["ip", "netns", "add", &self.namespace("wire")]);
        for place in Place::ALL {
            run(&["ip", "netns", "add", &self.namespace(place)]);
        }
        self.batch("wire", "link add br0 type bridge\nlink set br0 up\n");
        for place in [Place::Host(1), Place::Host(2), Place::Outside] {
            self.plug(&self.namespace(place), place.address(), "wire", "br0");
        }
        for host in [1, 2] {
            let (here, other) = (Place::Host(host), 3 - host);
            let bridge = format!(
                "link add docker0 type bridge\naddr add 10.5.{host}.1/24 dev docker0\nlink set docker0 up\n"
            );
            self.batch(here, &bridge);
            for pod in [Place::Pod(host), Place::Published(host)] {
                self.plug(&self.namespace(pod), pod.address(), here, "docker0");
                self.batch(pod, &format!("route add default via 10.5.{host}.1\n"));
            }
            let tunnel = format!(
                "link add flannel.1 address 0e:00:00:00:00:0{host} type vxlan id 1 dev eth0 dstport 8472 nolearning\n\
                 addr add 10.5.{host}.0/32 dev flannel.1\n\
                 link set flannel.1 up mtu 1450\n\
                 neigh add 10.5.{other}.0 lladdr 0e:00:00:00:00:0{other} dev flannel.1 nud permanent\n\
                 route add 10.5.{other}.0/24 via 10.5.{other}.0 dev flannel.1 onlink\n\
                 route add default via {}\n",
                Place::Outside.address()
            );
            self.batch(here, &tunnel);
            self.batch(Place::Outside, &format!("route add 10.5.{host}.0/24 via {}\n", here.address()));
            self.inside(here, || {
                let to = Place::Host(other).address().to_string();
                let mac = format!("0e:00:00:00:00:0{other}");
                run(&["bridge", "fdb", "add", &mac, "dev", "flannel.1", "dst", &to, "self", "permanent"]);
                fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("the hosts forward");
                // Where there is br_netfilter, what crosses a bridge passes FORWARD too, as Docker has it.
                drop(fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "1"));
            });
        }
        for place in Place::ALL {
            for &port in place.listens_on() {
                self.listeners.push(self.listener(place, port));
            }
        }
    }

    fn listener(&self, place: Place, port: u16) -> std::net::TcpListener {
        let listen = || {
            let listener = std::net::TcpListener::bind((place.address(), port))?;
            listener.set_nonblocking(true).map(|()| listener)
        };
        self.inside(place, listen).expect("a port of one's own is free")
    }

    /// Gives a namespace an `eth0` on a bridge of another.
    fn plug(&self, namespace: &str, address: Ipv4Addr, other: impl fmt::Display, bridge: &str) {
        let last = address.octets()[3];
        let lines = format!(
            "link add v{last} type veth peer name eth0 netns {namespace}\nlink set v{last} master {bridge} up\n"
        );
        self.batch(other, &lines);
        let file = format!("link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\n");
        feed(Command::new("ip").args(["-n", namespace, "-batch", "-"]), &file).expect("ip takes its batch");
    }

    fn batch(&self, place: impl fmt::Display, lines: &str) {
        let mut ip = Command::new("ip");
        ip.args(["-n", &self.namespace(place), "-batch", "-"]);
        feed(&mut ip, lines).unwrap_or_else(|error| panic!("{lines}{error}"));
    }

    fn namespace(&self, place: impl fmt::Display) -> String {
        format!("{}-{place}", self.name)
    }

    /// Works on a thread that is in the place; what it starts is there too.
    ///
    /// # Panics
    /// If the work does.
    pub fn inside<T: Send>(&self, place: Place, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.namespace(place));
        let enter_and_work = || {
            let namespace = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("root may enter a namespace");
            work()
        };
        thread::scope(|scope| scope.spawn(enter_and_work).join()).unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Tries all the flows at once. For each, the address that the receiver saw, or none
    /// if nothing has arrived when all those `expected` have, and a while later.
    ///
    /// # Panics
    /// If there is no socket to be had.
    pub fn try_out(&self, expected: &BTreeMap<Flow, bool>) -> BTreeMap<Flow, Option<Ipv4Addr>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime can be built").block_on(async {
            let mut receivers = JoinSet::new();
            for listener in &self.listeners {
                let listener = listener.try_clone().expect("a handle can be copied");
                receivers.spawn(tell_all(TcpListener::from_std(listener).expect("it does not block")));
            }
            let mut senders = JoinSet::new();
            for &flow in expected.keys() {
                let socket = self.socket(flow.from, flow.bound);
                senders.spawn(async move { (flow, ask(socket, flow.to).await) });
            }
            let mut seen: BTreeMap<_, _> = expected.keys().map(|&flow| (flow, None)).collect();
            let all_expected = async {
                while expected.iter().any(|(flow, arrives)| *arrives && seen[flow].is_none()) {
                    let Some(answered) = senders.join_next().await else { break };
                    let (flow, source) = answered.expect("asking does not panic");
                    seen.insert(flow, source.ok());
                }
            };
            // Those who wait in vain are shown by the comparison that follows.
            drop(timeout(PATIENCE / 10, all_expected).await);
            if expected.values().any(|arrives| !arrives) {
                sleep(SILENCE).await;
            }
            while let Some(answered) = senders.try_join_next() {
                let (flow, source) = answered.expect("asking does not panic");
                seen.insert(flow, source.ok());
            }
            seen
        })
    }

    /// Opens a connection to somebody who listens.
    ///
    /// # Panics
    /// It does not come about.
    pub fn converse(&self, flow: Flow) -> Conversation {
        let near = self.inside(flow.from, || std::net::TcpStream::connect_timeout(&flow.to.into(), PATIENCE));
        let near = near.unwrap_or_else(|error| panic!("{flow:?}: {error}"));
        let accept = || self.listeners.iter().find_map(|listener| listener.accept().ok());
        let mut far = None;
        until("the connection is accepted", || {
            far = accept();
            far.is_some()
        });
        let (far, seen) = far.expect("it was waited for");
        for end in [&near, &far] {
            end.set_nonblocking(false)
                .and_then(|()| end.set_read_timeout(Some(PATIENCE)))
                .expect("it is a socket");
        }
        Conversation { near, far, seen }
    }

    /// Sends one datagram after the other, each from a port of its own, for as long as the
    /// work takes; how many came from which address, as their receiver sees it.
    ///
    /// # Panics
    /// If the work does, or there is no socket to be had.
    pub fn sources_during(&self, from: Place, to: Place, work: impl FnOnce()) -> BTreeMap<Ipv4Addr, usize> {
        let is_over = AtomicBool::new(false);
        let receiver = self.inside(to, || UdpSocket::bind((to.address(), 0))).expect("a port is free");
        receiver.set_read_timeout(Some(SILENCE)).expect("it is a socket");
        let address = receiver.local_addr().expect("it is bound");
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                self.inside(from, || {
                    while !is_over.load(Ordering::Relaxed) {
                        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a port is free");
                        // What the rules drop or the kernel refuses does not arrive.
                        drop(socket.send_to(b"x", address));
                        thread::sleep(Duration::from_micros(100));
                    }
                });
            });
            let receiving = scope.spawn(|| {
                let (mut sources, mut byte) = (BTreeMap::new(), [0]);
                loop {
                    match receiver.recv_from(&mut byte) {
                        Ok((_, SocketAddr::V4(source))) => *sources.entry(*source.ip()).or_default() += 1,
                        _ if is_over.load(Ordering::Relaxed) => return sources,
                        _ => {}
                    }
                }
            });
            let outcome = catch_unwind(AssertUnwindSafe(work));
            is_over.store(true, Ordering::Relaxed);
            sender.join().unwrap_or_else(|panic| resume_unwind(panic));
            let sources = receiving.join().unwrap_or_else(|panic| resume_unwind(panic));
            outcome.unwrap_or_else(|panic| resume_unwind(panic));
            sources
        })
    }

    /// A socket that connects from that place, whoever uses it.
    ///
    /// # Panics
    /// If there is no socket to be had.
    pub fn socket(&self, from: Place, bound: Option<Ipv4Addr>) -> TcpSocket {
        self.inside(from, || {
            let socket = TcpSocket::new_v4()?;
            bound.map_or(Ok(()), |address| socket.bind(SocketAddr::new(address.into(), 0)))?;
            Ok::<_, io::Error>(socket)
        })
        .expect("a socket can be had")
    }
}

impl Default for Cluster {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.listeners.clear();
        for place in Place::ALL {
            output(&["ip", "netns", "del", &self.namespace(place)]);
        }
        output(&["ip", "netns", "del", &self.namespace("wire")]);
    }
}

/// A connection between two places.
#[derive(Debug)]
pub struct Conversation {
    near: std::net::TcpStream,
    far: std::net::TcpStream,
    /// Who began it, as the receiver sees it.
    pub seen: SocketAddr,
}

impl Conversation {
    /// Says a word there and one back.
    ///
    /// # Panics
    /// One of them does not arrive.
    pub fn goes_on(&mut self) {
        let mut word = [0; 4];
        let Self { near, far, .. } = self;
        near.write_all(b"ping").and_then(|()| far.read_exact(&mut word)).expect("it arrives");
        far.write_all(b"pong").and_then(|()| near.read_exact(&mut word)).expect("it comes back");
    }
}

/// Tells everybody who connects by which address they are seen.
async fn tell_all(listener: TcpListener) {
    while let Ok((mut stream, peer)) = listener.accept().await {
        let SocketAddr::V4(peer) = peer else { continue };
        // Whoever has given up meanwhile does not want to know.
        drop(stream.write_all(&peer.ip().octets()).await);
    }
}

async fn ask(socket: TcpSocket, to: SocketAddrV4) -> io::Result<Ipv4Addr> {
    let mut stream: TcpStream = socket.connect(to.into()).await?;
    let mut address = [0; 4];
    stream.read_exact(&mut address).await?;
    Ok(address.into())
}

/// Runs a program with that on its stdin; what it prints, or what it says as it fails.
///
/// # Errors
/// It fails.
///
/// # Panics
/// It cannot be run at all.
pub fn feed(command: &mut Command, input: &str) -> Result<String, String> {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    // A program that ends early has a reason, and says it.
    drop(child.stdin.take().expect("it was asked for").write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("a child can be waited for");
    let (said, shown) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    if output.status.success() { Ok(shown.into_owned()) } else { Err(format!("{said}{shown}")) }
}
