//! Rung 7: a daemon killed between any two steps that leave something outside it, and started again.
//!
//! ```text
//!   a scene ──▶ run to its end, followed: its points, and how a host should stand after it
//!        └────▶ for each point: the scene anew ─▶ killed there ─▶ started again ─▶ the same?
//! ```
//!
//! `POINT=…` tries only the points that have these words in their names, and lists them.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Command;
use std::sync::Mutex;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use flannel_core::key::subnet_key;
use flannel_core::lease::HeldLease;
use flannel_core::memory::Memory;
use flannel_core::store::LeaseStore;
use flannel_etcd::Settings;
use flannel_tests::etcd::Etcd;
use flannel_tests::lab::{self, Host, Lab, Process};
use flannel_tests::leases::{self, machine};
use flannel_tests::tracer::{Point, READY, Traced, Watch};
use flannel_tests::{need, say};
use nix::sys::signal::Signal;

const PREFIX: &str = "/coreos.com/network";
/// The peers that come have subnets above those that we may take.
const VXLAN: &str = r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.199.0","Backend":{"Type":"vxlan"}}"#;

/// After a kill a host is to be ready, and as it should be, so soon.
const LIMIT: Duration = Duration::from_secs(2);

/// So long after its start the agent writes down what it remembers; at a stop it does so at once.
const NOTES_AFTER: Duration = Duration::from_secs(1);

/// After so long there will be no more points.
const QUIET: Duration = Duration::from_millis(1500);

/// Labs side by side; they wait more than they work.
const LABS: usize = 4;

/// What a daemon is killed in.
#[derive(Clone, Copy, Debug)]
struct Scene {
    name: &'static str,
    /// The network config that a daemon has run by here before, if one has.
    before: Option<&'static str>,
    /// The config that it is now.
    config: &'static str,
    /// The peers that there are now; it had [`PEERS`] before.
    peers: &'static [(u8, u8)],
    /// What happens while the daemon runs, and not before it starts.
    deletes_our_key: bool,
}

/// The third byte of a peer's subnet, and the last one of its MAC.
const PEERS: &[(u8, u8)] = &[(201, 1), (202, 2), (203, 3)];

const SCENES: [Scene; 5] = [
    Scene { name: "a first start", before: None, config: VXLAN, peers: PEERS, deletes_our_key: false },
    Scene {
        name: "a start among other peers",
        before: Some(VXLAN),
        config: VXLAN,
        peers: &[(202, 2), (203, 33), (204, 4)],
        deletes_our_key: false,
    },
    Scene {
        name: "our key deleted",
        before: Some(VXLAN),
        config: VXLAN,
        peers: PEERS,
        deletes_our_key: true,
    },
    Scene {
        name: "another network",
        before: Some(VXLAN),
        config: r#"{"Network":"10.6.0.0/16","SubnetMax":"10.6.199.0","Backend":{"Type":"vxlan"}}"#,
        peers: PEERS,
        deletes_our_key: false,
    },
    Scene {
        name: "another device",
        before: Some(VXLAN),
        config: r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.199.0","Backend":{"Type":"vxlan","Port":4789}}"#,
        peers: PEERS,
        deletes_our_key: false,
    },
];

/// How a host stands, without what chance has chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stand {
    kernel: String,
    store: String,
    etcd_leases: usize,
    files: Vec<PathBuf>,
}

/// A lab with one host.
struct World {
    lab: Lab,
    host: Host,
}

impl World {
    fn new() -> Self {
        let lab = Lab::new(1);
        let host = lab.host(1);
        Self { lab, host }
    }

    /// The world as it is before a scene.
    fn set(&self, scene: &Scene) {
        self.lab.etcdctl(&["del", "", "--from-key"]);
        for lease in self.etcd_leases() {
            self.lab.etcdctl(&["lease", "revoke", &lease]);
        }
        self.lab.renew(&self.host);
        fs::create_dir_all(&self.host.directory).unwrap();
        // Somebody else's. 10.5.0.0/24 is inside the network and never leased, whatever the dice say.
        self.host.run(&[
            "sh",
            "-ec",
            "ip route add 172.16.0.0/12 via 192.168.77.9
             ip route add 10.5.0.0/24 via 192.168.77.9 proto static
             ip neigh add 192.168.77.9 lladdr 0e:00:00:00:00:99 dev eth0
             iptables -N THEIRS
             iptables -A FORWARD -s 10.5.0.0/16 -j THEIRS
             iptables -t nat -A POSTROUTING -s 10.99.0.0/16 -j MASQUERADE",
        ]);
        if let Some(before) = scene.before {
            self.tell(before, PEERS);
            stop(self.start().0);
        }
        self.tell(scene.config, scene.peers);
    }

    /// Has the store hold that config and those peers, and none of the former ones.
    fn tell(&self, config: &str, peers: &[(u8, u8)]) {
        let network = network_of(config);
        let quoted = |text: &str| format!("{text:?}");
        let mut requests = format!("put {PREFIX}/config {}\n", quoted(config));
        for (gone, _) in PEERS.iter().filter(|(number, _)| peers.iter().all(|(other, _)| other != number)) {
            requests += &format!("del {PREFIX}/subnets/10.5.{gone}.0-24\n");
        }
        for (number, mac) in peers {
            let value = format!(
                r#"{{"PublicIP":"192.168.77.{number}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:00:{mac:02x}"}}}}"#
            );
            requests += &format!("put {PREFIX}/subnets/{network}.{number}.0-24 {}\n", quoted(&value));
        }
        // No comparisons, these requests, and no others should a comparison fail.
        self.lab.etcdctl_fed(&["txn"], &format!("\n{requests}\n\n"));
    }

    fn subnet_file(&self) -> PathBuf {
        self.host.directory.join("run/flannel/subnet.env")
    }

    fn state_file(&self) -> PathBuf {
        self.host.state_dir().join("coreos.com-network.state")
    }

    fn command(&self) -> Command {
        let command = self.host.command(lab::flanneld());
        let mut command = self.host.complete(command, &self.subnet_file(), &["--ip-masq"]);
        command.env("NOTIFY_SOCKET", self.host.directory.join("notify"));
        command
    }

    /// Where the daemon says that it is ready.
    fn notifications(&self) -> UnixDatagram {
        let path = self.host.directory.join("notify");
        drop(fs::remove_file(&path));
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(lab::PATIENCE)).unwrap();
        socket
    }

    fn log(&self) -> PathBuf {
        self.host.directory.join("agent.log")
    }

    /// Starts a daemon; it, and how long it took to be ready.
    fn start(&self) -> (Process, Duration) {
        let socket = self.notifications();
        let begun = Instant::now();
        let agent = Process::start(self.command(), self.log());
        let mut message = [0; 64];
        let heard = socket.recv(&mut message);
        assert!(heard.is_ok(), "never ready:\n{}", agent.log());
        (agent, begun.elapsed())
    }

    /// Plays a scene with a daemon that is followed, to the end or to a point; all points that were met.
    fn play(&self, scene: &Scene, kill_at: Option<&Point>) -> Vec<Point> {
        let socket = self.notifications();
        let watch = Watch {
            program: lab::flanneld().to_owned(),
            directory: self.host.directory.clone(),
            kill_at: kill_at.cloned(),
            armed: !scene.deletes_our_key,
        };
        let traced = Traced::start(&self.command(), &self.log(), watch);
        if scene.deletes_our_key {
            socket.recv(&mut [0; 64]).unwrap();
            traced.arm();
            self.lab.etcdctl(&["del", &self.own_key().unwrap()]);
        }
        let mut points = vec![];
        // Until it is ready only the kill ends it.
        let mut ready = scene.deletes_our_key;
        while let Some(point) = traced.next(if ready { QUIET } else { lab::PATIENCE }) {
            ready |= point.what == READY;
            points.push(point);
            if kill_at == points.last() {
                break;
            }
        }
        traced.end();
        points
    }

    fn etcd_leases(&self) -> Vec<String> {
        let text = self.lab.etcdctl(&["lease", "list"]);
        text.lines().filter(|line| !line.starts_with("found")).map(String::from).collect()
    }

    /// The keys of the leases that bear our address.
    fn own_keys(&self) -> Vec<(String, String)> {
        let mut leases = self.lab.leases(PREFIX);
        leases.retain(|(_, value)| value.contains(r#""PublicIP":"192.168.77.1""#));
        leases
    }

    fn own_key(&self) -> Option<String> {
        self.own_keys().into_iter().next().map(|(key, _)| key)
    }

    /// How the host stands, with what chance has chosen replaced by words.
    fn stand(&self) -> Result<Stand, String> {
        let own = self.own_keys();
        let [(key, value)] = own.as_slice() else {
            return Err(format!("{} keys are ours: {own:?}", own.len()));
        };
        let subnet = key.rsplit('/').next().unwrap().trim_end_matches(".0-24").to_owned();
        let mac =
            value.split(r#""VtepMAC":""#).nth(1).unwrap_or_default().split('"').next().unwrap().to_owned();
        let host_id = fs::read_to_string(self.host.state_dir().join("host-id")).unwrap_or_default();
        let plain = |text: String, subnet: &str| {
            let text = text.replace(subnet, "SUBNET").replace(&mac, "MAC");
            if host_id.trim().is_empty() { text } else { text.replace(host_id.trim(), "HOST-ID") }
        };
        let keys = self.lab.etcdctl(&["get", "", "--from-key"]);
        Ok(Stand {
            kernel: plain(self.kernel(), &format!("{subnet}.0")),
            // As part of a key: the config may name it too.
            store: sorted(&plain(keys, &format!("/{subnet}.0-24"))),
            etcd_leases: self.etcd_leases().len(),
            files: ["run", "state"].iter().flat_map(|name| files(&self.host.directory, name)).collect(),
        })
    }

    /// All that the kernel of the host holds and that we could have touched, ours and others'.
    fn kernel(&self) -> String {
        self.host.run(&[
            "sh",
            "-c",
            "ip -d link show type vxlan | sed 's/^[0-9]*: //'
             ip -4 -o addr show | sed 's/^[0-9]*: //'
             ip -4 route show table all | sort
             ip nexthop
             ip neigh show nud permanent | sort
             bridge fdb show | grep flannel | sort
             iptables -S
             iptables -t nat -S
             grep -H . /proc/sys/net/ipv6/conf/flannel.1/accept_ra /proc/sys/net/ipv4/ip_forward",
        ])
    }

    /// Plays a scene up to a point, starts again, and tells what is not as it should be.
    fn try_point(&self, scene: &Scene, point: &Point, should: &Stand) -> Result<Duration, Vec<String>> {
        self.set(scene);
        let file = || fs::read_to_string(self.subnet_file()).ok();
        let former = file();
        if self.play(scene, Some(point)).last() != Some(point) {
            return Err(vec!["it was not met again".into()]);
        }

        let mut wrong = vec![];
        let left = file();
        if let Ok(text) = fs::read_to_string(self.state_file())
            && let Err(error) = text.parse::<Memory>()
        {
            wrong.push(format!("the state file is neither the old nor the new one: {error}"));
        }
        let held = self.own_key().or_else(|| left.as_deref().and_then(key_in));

        let (clock, begun) = (SystemTime::now(), Instant::now());
        let (agent, took) = self.start();
        if took > LIMIT {
            wrong.push(format!("ready only after {took:?}"));
        }
        let deadline = begun + LIMIT;
        let mut stands = self.stand();
        while stands.as_ref().is_ok_and(|stands| stands.kernel != should.kernel) && Instant::now() < deadline
        {
            stands = self.stand();
        }
        if begun.elapsed() > NOTES_AFTER - Duration::from_millis(200) {
            // It is about to, and a stop would not wait for it.
            let written = || fs::metadata(self.state_file()).and_then(|file| file.modified());
            lab::until("it has written down what it knows", || {
                written().is_ok_and(|written| written > clock)
            });
        }
        let log = stop(agent);
        match self.stand() {
            Ok(stands) => wrong.extend(differences(should, &stands)),
            Err(error) => wrong.push(error),
        }
        let now = self.own_key();
        if let Some(held) = held.filter(|key| key.contains(&format!("/{}.", network_of(scene.config))))
            && now.as_ref() != Some(&held)
        {
            wrong.push(format!("it held {held} and has {now:?} now"));
        }
        if left.is_some() && left != former && left != file() {
            wrong.push(format!("the subnet file is neither the old nor the new one: {left:?}"));
        }
        if !wrong.is_empty() {
            wrong.push(log);
            return Err(wrong);
        }
        Ok(took)
    }
}

/// Stops a daemon, which writes down what it remembers; what it has logged.
fn stop(mut agent: Process) -> String {
    agent.signal(Signal::SIGTERM);
    agent.ended();
    agent.log()
}

/// The files below a directory of the host's, by their names; those set aside too.
fn files(host: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut directories = vec![host.join(name)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                found.push(path.strip_prefix(host).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Keys with their values, in the order of what is left of their names.
fn sorted(pairs: &str) -> String {
    let lines: Vec<&str> = pairs.lines().collect();
    let mut pairs: Vec<String> = lines.chunks(2).map(|pair| pair.join(" = ")).collect();
    pairs.sort();
    pairs.join("\n")
}

/// The first two bytes of the network in a config.
fn network_of(config: &str) -> &str {
    if config.contains("10.6.") { "10.6" } else { "10.5" }
}

/// The key that a subnet file stands for.
fn key_in(file: &str) -> Option<String> {
    let subnet = file.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))?;
    Some(format!("{PREFIX}/subnets/{}", subnet.replace(".1/", ".0-")))
}

fn differences(should: &Stand, is: &Stand) -> Vec<String> {
    let mut told = vec![];
    let mut compare = |what: &str, should: String, is: String| {
        for line in should.lines().filter(|line| !is.lines().any(|other| other == *line)) {
            told.push(format!("{what} lacks: {line}"));
        }
        for line in is.lines().filter(|line| !should.lines().any(|other| other == *line)) {
            told.push(format!("{what} has: {line}"));
        }
        if told.is_empty() && should != is {
            told.push(format!("{what} has it in another order: {is}"));
        }
    };
    compare("the kernel", should.kernel.clone(), is.kernel.clone());
    compare("etcd", should.store.clone(), is.store.clone());
    compare("etcd's list of leases", should.etcd_leases.to_string(), is.etcd_leases.to_string());
    compare("the directories", format!("{:#?}", should.files), format!("{:#?}", is.files));
    told
}

/// Does all the jobs, each in one of several worlds; the results in the order of the jobs.
fn in_worlds<J: Send, R: Send>(jobs: Vec<J>, work: impl Fn(&World, J) -> R + Sync) -> Vec<R> {
    let count = jobs.len();
    let jobs: Mutex<VecDeque<(usize, J)>> = Mutex::new(jobs.into_iter().enumerate().collect());
    let results = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..LABS.min(count) {
            scope.spawn(|| {
                let world = World::new();
                loop {
                    let Some((number, job)) = jobs.lock().unwrap().pop_front() else { return };
                    let result = work(&world, job);
                    results.lock().unwrap().insert(number, result);
                }
            });
        }
    });
    results.into_inner().unwrap().into_values().collect()
}

#[test]
fn a_kill_between_any_two_steps_is_made_good_by_the_next_start() {
    if !need("etcd") || !need("iptables") {
        return;
    }
    let begun = Instant::now();

    let played = in_worlds(SCENES.to_vec(), |world, scene| {
        world.set(&scene);
        let points = world.play(&scene, None);
        // How it stands after a start that nobody kills.
        stop(world.start().0);
        (scene, points, world.stand().unwrap())
    });
    let only = std::env::var("POINT").ok();
    let is_asked_for = |point: &&Point| point.to_string().contains(only.as_deref().unwrap_or_default());
    let mut jobs = vec![];
    for (scene, points, should) in &played {
        let points: Vec<&Point> = points.iter().filter(is_asked_for).collect();
        say(&format!("{}: {} points", scene.name, points.len()));
        points.iter().filter(|_| only.is_some()).for_each(|point| say(&format!("    {point}")));
        jobs.extend(points.into_iter().map(|point| (scene, point, should)));
    }
    let tried = in_worlds(jobs, |world, (scene, point, should)| {
        (scene.name, point, world.try_point(scene, point, should))
    });

    let failed: Vec<String> = tried
        .iter()
        .filter_map(|(scene, point, result)| {
            let wrong = result.as_ref().err()?.join("\n  ");
            Some(format!("{scene}, killed before: {point}\n  {wrong}"))
        })
        .collect();
    let slowest = tried.iter().filter_map(|(_, _, result)| result.as_ref().ok()).max();
    say(&format!(
        "killed at {} points, {} made good, the slowest start ready after {:?}; {:?} in all",
        tried.len(),
        tried.len() - failed.len(),
        slowest.unwrap_or(&Duration::ZERO),
        begun.elapsed()
    ));
    assert!(failed.is_empty(), "{} points:\n{}", failed.len(), failed.join("\n"));
    assert!(tried.len() >= 60 || only.is_some(), "only {} points", tried.len());
}

/// A process that takes a subnet and is killed after so many turns of its work; what it held, if it came so far.
fn live_for(turns: usize, settings: &Settings) -> Option<HeldLease> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (config, attrs) = (leases::config(), leases::host(1));
    let held = runtime.block_on(async {
        let store = leases::store(settings).await;
        let mut work = pin!(store.acquire(&config, &attrs, None));
        let mut left = turns;
        std::future::poll_fn(|context| {
            let Some(fewer) = left.checked_sub(1) else { return Poll::Ready(None) };
            left = fewer;
            work.as_mut().poll(context).map(Some)
        })
        .await
    });
    // All that it has open goes with the runtime, as with a process.
    runtime.shutdown_background();
    held.map(|held| held.unwrap())
}

#[test]
fn a_thousand_restarts_leave_one_etcd_lease() {
    const RESTARTS: usize = 1000;
    const FOR_EVER: usize = usize::MAX;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let Some(etcd) = runtime.block_on(Etcd::start()) else { return };
    let raw = runtime.block_on(etcd.raw());
    let begun = Instant::now();
    let settings = Settings { host: Some(machine("one", "one")), ..etcd.settings() };
    let subnets = format!("{PREFIX}/subnets/");
    let key = |held: &HeldLease| format!("{subnets}{}", subnet_key(&held.lease.subnet));
    let (mut held, mut whole, mut bare) = (None, 0, 0);

    for number in 0..RESTARTS {
        // Where there is nothing to take over it has to begin with a grant.
        if let Some(lost) = held.take().filter(|_| number % 2 == 0) {
            runtime.block_on(raw.delete(&key(&lost)));
        }
        held = live_for(number % 40, &settings);
        whole += usize::from(held.is_some());
        let (leases, keys) = runtime.block_on(async { (raw.leases().await, raw.keys(&subnets).await) });
        bare += usize::from(!leases.is_empty() && keys.is_empty());
    }
    let last = live_for(FOR_EVER, &settings).unwrap();

    let leases = runtime.block_on(raw.leases());
    say(&format!(
        "{RESTARTS} restarts in {:?}: {whole} came to a lease, {bare} were killed between grant and key; etcd leases left: {}",
        begun.elapsed(),
        leases.len()
    ));
    assert!(bare > 10 && whole > 10, "{bare} {whole}");
    assert_eq!((leases.len(), leases.first()), (1, Some(&last.handle)));
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
}
