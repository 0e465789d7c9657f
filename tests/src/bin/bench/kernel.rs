//! What `ip` and `bridge` say of the host, and what they take to make it.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flannel_tests::lab::{Host, output, run};

use crate::cluster::Cluster;
use crate::usage;

/// The device of the backend.
pub(crate) const DEVICE: &str = "flannel.1";

/// What a program took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) time: Duration,
    pub(crate) cpu: Duration,
}

impl Cost {
    fn and(self, other: Self) -> Self {
        Self { time: self.time + other.time, cpu: self.cpu + other.cpu }
    }
}

/// The tables of the device as they are printed.
pub(crate) struct Dump {
    neighbours: String,
    entries: String,
    routes: String,
    /// Of all three together.
    pub(crate) cost: Cost,
}

impl Dump {
    pub(crate) fn read(host: &Host) -> Self {
        let (neighbours, first) =
            timed(host, "ip", &["-o", "neigh", "show", "dev", DEVICE, "nud", "permanent"]);
        let (entries, second) = timed(host, "bridge", &["fdb", "show", "dev", DEVICE]);
        let (routes, third) = timed(host, "ip", &["-o", "route", "show", "dev", DEVICE]);
        Self { neighbours, entries, routes, cost: first.and(second).and(third) }
    }

    /// One line for each object of a peer.
    pub(crate) fn objects(&self) -> HashSet<String> {
        let neighbours = self
            .neighbours
            .lines()
            .filter_map(|line| Some(format!("neighbour {} {}", first(line), after(line, "lladdr")?)));
        // The device has multicast entries too, without an address.
        let entries = self
            .entries
            .lines()
            .filter_map(|line| Some(format!("entry {} {}", first(line), after(line, "dst")?)));
        // A route by a nexthop object has its gateway printed as well.
        let routes = self
            .routes
            .lines()
            .filter_map(|line| Some(format!("route {} {}", first(line), after(line, "via")?)));
        neighbours.chain(entries).chain(routes).collect()
    }

    /// Whether its routes go by nexthop objects.
    fn has_nexthops(&self) -> bool {
        self.routes.lines().any(|line| after(line, "nhid").is_some())
    }
}

/// What is missing and what is too much; `None` if nothing is.
pub(crate) fn difference(wanted: &HashSet<String>, held: &HashSet<String>) -> Option<String> {
    let (mut missing, mut extra): (Vec<_>, Vec<_>) =
        (wanted.difference(held).collect(), held.difference(wanted).collect());
    if missing.is_empty() && extra.is_empty() {
        return None;
    }
    let counts = format!("{} missing, {} too many", missing.len(), extra.len());
    missing.truncate(3);
    extra.truncate(3);
    Some(format!("{counts}; missing {missing:?}, too many {extra:?}"))
}

/// Which routes `ip` is to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Routes {
    /// As the daemon has made them.
    Same,
    /// Without nexthop objects.
    Plain,
}

/// What `ip -batch` and `bridge -batch` take for the same objects.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outside {
    pub(crate) cost: Cost,
    /// The daemon's routes go by nexthop objects, and so did theirs.
    pub(crate) nexthops: bool,
}

/// Takes away what a daemon has made, which must not run any more, and lets
/// `ip` and `bridge` make it again.
pub(crate) fn outside(cluster: &Cluster) -> Outside {
    let nexthops = Dump::read(&cluster.host).has_nexthops();
    Outside { cost: make_again(cluster, Routes::Same), nexthops }
}

/// The same with plain routes.
pub(crate) fn outside_plain(cluster: &Cluster) -> Cost {
    make_again(cluster, Routes::Plain)
}

fn make_again(cluster: &Cluster, routes: Routes) -> Cost {
    let host = &cluster.host;
    let dump = Dump::read(host);
    let [ip, bridge] = [("ip", ip_batch(host, &dump, routes)), ("bridge", bridge_batch(&dump))].map(
        |(program, commands)| {
            let file = cluster.lab.path(program);
            fs::write(&file, commands).expect("a file can be written");
            file.display().to_string()
        },
    );
    let link = run(&["ip", "-n", &host.namespace, "-o", "link", "show", "dev", DEVICE]);
    let address = run(&["ip", "-n", &host.namespace, "-o", "-4", "address", "show", "dev", DEVICE]);
    remove_all(host);
    make_device(
        host,
        after(&link, "link/ether").expect("a device has a MAC"),
        after(&address, "inet").expect("and an address"),
    );

    let (_, first) = timed(host, "bridge", &["-batch", &bridge]);
    let (_, second) = timed(host, "ip", &["-batch", &ip]);

    let made = Dump::read(host).objects();
    if let Some(difference) = difference(&dump.objects(), &made) {
        panic!("ip and bridge have not made the same: {difference}");
    }
    first.and(second)
}

fn make_device(host: &Host, mac: &str, address: &str) {
    let underlay = host.address.to_string();
    for words in [
        format!(
            "link add {DEVICE} address {mac} mtu 1450 type vxlan id 1 local {underlay} dev eth0 dstport 8472 nolearning"
        ),
        format!("address add {address} dev {DEVICE}"),
        format!("link set {DEVICE} up"),
    ] {
        run(&[&["ip", "-n", &host.namespace], words.split(' ').collect::<Vec<_>>().as_slice()].concat());
    }
}

fn bridge_batch(dump: &Dump) -> String {
    let mut batch = String::new();
    for line in dump.entries.lines() {
        if let Some(address) = after(line, "dst") {
            writeln!(batch, "fdb replace {} dev {DEVICE} dst {address} self permanent", first(line))
                .expect("a string takes all");
        }
    }
    batch
}

fn ip_batch(host: &Host, dump: &Dump, routes: Routes) -> String {
    let mut batch = String::new();
    let mut command = |words: String| writeln!(batch, "{words}").expect("a string takes all");
    for line in dump.neighbours.lines() {
        if let Some(mac) = after(line, "lladdr") {
            command(format!("neigh replace {} lladdr {mac} dev {DEVICE} nud permanent", first(line)));
        }
    }
    if routes == Routes::Same && dump.has_nexthops() {
        for line in run(&["ip", "-n", &host.namespace, "nexthop", "show", "dev", DEVICE]).lines() {
            let word = |name| after(line, name).unwrap_or_else(|| panic!("a nexthop without {name}: {line}"));
            let (id, gateway, protocol) = (word("id"), word("via"), word("proto"));
            command(format!("nexthop replace id {id} via {gateway} dev {DEVICE} onlink proto {protocol}"));
        }
    }
    for line in dump.routes.lines() {
        let (Some(gateway), Some(protocol)) = (after(line, "via"), after(line, "proto")) else {
            continue;
        };
        let hop = match after(line, "nhid") {
            Some(id) if routes == Routes::Same => format!("nhid {id}"),
            _ => format!("via {gateway} dev {DEVICE} onlink"),
        };
        command(format!("route replace {} {hop} proto {protocol}", first(line)));
    }
    batch
}

/// Removes the device and all that is on it; there may be nothing.
pub(crate) fn remove_all(host: &Host) {
    // Removing a device under its nexthop objects, or those under their routes, takes the
    // square of their number; and `ip route flush` cannot remove routes that go by them.
    for (show, remove) in [("-o route show dev", "route del"), ("nexthop show dev", "nexthop del id")] {
        let shown = ip(host, show);
        let names = shown.lines().map(|line| after(line, "id").unwrap_or_else(|| first(line)));
        let batch: String = names.map(|name| format!("{remove} {name}\n")).collect();
        let mut command = Command::new("ip");
        command.args(["-n", &host.namespace, "-batch", "-"]).stdin(Stdio::piped());
        let mut child = command.spawn().expect("ip can be started");
        let mut pipe = child.stdin.take().expect("it was asked for");
        pipe.write_all(batch.as_bytes()).expect("ip reads all");
        drop(pipe);
        assert!(child.wait().is_ok_and(|status| status.success()), "ip cannot remove all");
    }
    ip(host, "link del");
}

/// What `ip` prints with these words and the device, if it is there.
fn ip(host: &Host, words: &str) -> String {
    let words: Vec<&str> = words.split(' ').chain([DEVICE]).collect();
    let output = output(&[&["ip", "-n", &host.namespace], words.as_slice()].concat());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The index of the device.
pub(crate) fn index(host: &Host) -> u32 {
    let shown = run(&["ip", "-n", &host.namespace, "-o", "link", "show", "dev", DEVICE]);
    shown.split(':').next().and_then(|index| index.parse().ok()).expect("ip begins with the index")
}

/// Runs `ip` or `bridge` on the host. It may fail, as when there is no device at the moment: the
/// objects are compared afterwards in any case.
fn timed(host: &Host, program: &str, words: &[&str]) -> (String, Cost) {
    let clock = Instant::now();
    let mut command = Command::new(program);
    command.args(["-n", &host.namespace]).args(words).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{program}: {error}"));
    let mut printed = String::new();
    let pipe = child.stdout.as_mut().expect("it was asked for");
    pipe.read_to_string(&mut printed).expect("it prints text");
    // It has ended, and until it is waited for the kernel still knows its time.
    let cpu = usage::of_threads(child.id());
    child.wait().expect("it can be waited for");
    (printed, Cost { time: clock.elapsed(), cpu })
}

fn first(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or_default()
}

fn after<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let mut words = line.split_whitespace();
    words.find(|word| *word == name)?;
    words.next()
}
