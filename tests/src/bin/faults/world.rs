//! A cluster to be hurt: hosts with agents, an etcd of three members, recorders.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use flannel_tests::lab::{Host, Lab, Process, flanneld, output, run};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

use rand::RngExt;

use crate::flow::{End as FlowEnd, Flow};
use crate::history::History;
use crate::kernel::{self, DEVICE};
use crate::members::{Data, Members, NUMBERS};
use crate::peers::{CONFIG, Lease, PREFIX, Peers, leases};
use crate::record::{End, HostEnd, Lines, Mark, Records, Time, now};
use crate::store::Store;
use crate::watch_host::{AgentMonitor, HEALTH_PORT, KernelMonitor};

/// Searched for in everything that is written down.
pub(crate) const CANARY: &str = "canary-9b1fe7c4";

/// The agents' user at etcd.
pub(crate) const USER: &str = "flannel";

/// Longer than anything takes when all is well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Keys that are nobody's business.
const FOREIGN_KEYS: [(&str, &str); 3] = [
    ("/coreos.com/network/other", "not ours"),
    ("/coreos.com/networks/subnets/10.5.77.0-24", "another prefix"),
    ("/unrelated", "of somebody else"),
];

/// Whether a scenario is to be quick or thorough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Short,
    Long,
}

impl Form {
    pub(crate) fn of<T>(self, short: T, long: T) -> T {
        match self {
            Self::Short => short,
            Self::Long => long,
        }
    }
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) hosts: usize,
    pub(crate) peers: u8,
    pub(crate) config: &'static str,
    /// Of every agent.
    pub(crate) flags: Vec<String>,
    /// Of every member.
    pub(crate) member_flags: Vec<String>,
    /// Seconds that a mass removal is held, of agents that can.
    pub(crate) grace: u32,
    /// Packets a second for each direction of each pair; 0 for none.
    pub(crate) rate: u32,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            hosts: 3,
            peers: 10,
            config: CONFIG,
            flags: vec![],
            member_flags: vec![],
            grace: 60,
            rate: 200,
        }
    }
}

/// An agent and its host.
pub(crate) struct Agent {
    pub(crate) host: Host,
    pub(crate) process: Option<Process>,
    /// Of this one alone.
    pub(crate) flags: Vec<String>,
    /// What the host's bridge has, `10.5.7`, once the agent has said so.
    pub(crate) subnet: String,
    monitor: AgentMonitor,
    #[expect(dead_code, reason = "it records until it is dropped")]
    kernel: KernelMonitor,
}

pub(crate) struct World {
    pub(crate) shape: Shape,
    pub(crate) records: Records,
    pub(crate) agents: Vec<Agent>,
    pub(crate) store: Store,
    pub(crate) members: Members,
    pub(crate) history: Option<History>,
    pub(crate) peers: Peers,
    /// The peers that are there, by the last part of their subnet.
    pub(crate) there: BTreeMap<u8, Lease>,
    /// Keys that a scenario put there to do harm.
    pub(crate) poison: BTreeSet<String>,
    marks: Lines,
    flow: Option<Flow>,
    /// What was not as it should be.
    pub(crate) broken: Vec<String>,
    // Last, so that everything in its namespaces is gone before they are.
    pub(crate) lab: Lab,
}

/// Puts the calling thread into a namespace.
pub(crate) fn enter(namespace: &str) {
    let namespace = File::open(Path::new("/run/netns").join(namespace)).expect("the namespace is there");
    setns(namespace, CloneFlags::CLONE_NEWNET).expect("root can enter it");
}

/// Whether the agent has that flag.
pub(crate) fn agent_knows(flag: &str) -> bool {
    static HELP: OnceLock<String> = OnceLock::new();
    let help = HELP.get_or_init(|| run(&[&flanneld().display().to_string(), "--help"]));
    help.contains(flag)
}

impl World {
    /// A cluster without etcd and agents. The calling thread moves to the wire for good.
    pub(crate) fn new(records: Records, shape: Shape) -> Self {
        let lab = Lab::of_hosts((1..=shape.hosts).chain(NUMBERS));
        enter(&lab.wire());
        let mut members = Members::new(&lab, records.path(""));
        members.flags.clone_from(&shape.member_flags);
        let store = Store::new(members.endpoints(), Lines::create(&records.path("writes.jsonl")));
        let agents = (1..=shape.hosts).map(|number| agent(lab.host(number), &records)).collect();
        let marks = Lines::create(&records.marks());
        Self {
            shape,
            records,
            agents,
            store,
            members,
            history: None,
            peers: Peers::default(),
            there: BTreeMap::new(),
            poison: BTreeSet::new(),
            marks,
            flow: None,
            broken: vec![],
            lab,
        }
    }

    /// A cluster in which all is well: etcd, config, peers, agents in step, packets on their way.
    pub(crate) fn healthy(records: Records, shape: Shape) -> Self {
        let mut world = Self::new(records, shape);
        world.start_store();
        world.start_agents();
        world
    }

    /// Starts etcd, with the config and the peers.
    pub(crate) fn start_store(&mut self) {
        self.members.start_all();
        self.store.answers();
        self.begin_history();
        self.store.put(&format!("{PREFIX}/config"), self.shape.config);
        self.put_foreign_keys();
        for number in 0..self.shape.peers {
            self.join(100 + number);
        }
    }

    /// Starts all agents and, once they are in step, the flow.
    pub(crate) fn start_agents(&mut self) {
        let world = self;
        (0..world.agents.len()).for_each(|index| world.start_agent(index));
        (0..world.agents.len()).for_each(|index| world.settle_in(index));
        let at_first = world.converges(PATIENCE);
        world.claim(at_first.is_ok(), || format!("never in step at first: {at_first:?}"));
        // Rules, file and readiness follow.
        let ready = world.comes(PATIENCE, |world| (0..world.agents.len()).all(|index| world.is_ready(index)));
        world.claim(ready.is_some(), || "not ready at first".into());
        world.start_flow();
    }

    pub(crate) fn put_foreign_keys(&mut self) {
        for (key, value) in FOREIGN_KEYS {
            self.store.put(key, value);
        }
    }

    pub(crate) fn begin_history(&mut self) {
        let lines = Lines::create(&self.records.path("history.jsonl"));
        let user = self.store.user.clone();
        self.history = Some(History::record(&self.lab.wire(), self.members.endpoints(), user, lines));
    }

    /// Waits for an agent's subnet and gives the host what dockerd would.
    pub(crate) fn settle_in(&mut self, index: usize) {
        let agent = &mut self.agents[index];
        agent.subnet = agent.host.subnet();
        agent.host.bridge(&agent.subnet);
    }

    pub(crate) fn start_flow(&mut self) {
        let all: Vec<usize> = (0..self.agents.len()).collect();
        self.start_flow_between(&all);
    }

    pub(crate) fn start_flow_between(&mut self, hosts: &[usize]) {
        if self.shape.rate == 0 {
            return;
        }
        let agents = hosts.iter().map(|&index| &self.agents[index]);
        let ends = agents.map(|agent| FlowEnd::at(&agent.host, &agent.subnet)).collect();
        self.flow =
            Some(Flow::start(ends, self.shape.rate, Lines::create(&self.records.path("packets.jsonl"))));
        // The first packets learn the way of the underlay.
        let since = now();
        thread::sleep(Duration::from_millis(500));
        for index in 0..self.agents.len() {
            self.excuse(index, since - 1.0, now(), "the first packets");
        }
        thread::sleep(Duration::from_millis(500));
    }

    /// Starts the agent of a host.
    pub(crate) fn start_agent(&mut self, index: usize) {
        let endpoints = self.members.endpoints().join(",");
        let grace = self.shape.grace;
        let log = self.records.log(index + 1);
        let agent = &mut self.agents[index];
        let host = &agent.host;
        fs::create_dir_all(&host.directory).expect("a directory can be made");
        // A machine of its own has a name and a boot of its own.
        let boot = host.directory.join("boot_id");
        if !boot.exists() {
            fs::write(&boot, format!("{:032x}\n", rand::rng().random::<u128>()))
                .expect("a file can be written");
        }
        let mut command = host.command("unshare");
        command.args(["--uts", "sh", "-c"]);
        command.arg("hostname $1; mount --bind $2 /proc/sys/kernel/random/boot_id; shift 2; exec \"$@\"");
        command.args(["sh", &format!("host{}", host.number)]).arg(boot).arg(flanneld());
        let has_endpoints = agent.flags.iter().any(|flag| flag.starts_with("--etcd-endpoints"));
        if !has_endpoints {
            command.arg(format!("--etcd-endpoints={endpoints}"));
        }
        command.arg(format!("--subnet-file={}", host.subnet_file().display()));
        command.args(["--iface=eth0", "--healthz-ip=127.0.0.1", &format!("--healthz-port={HEALTH_PORT}")]);
        if agent_knows("--state-dir") {
            command.arg(format!("--state-dir={}", host.state_dir().display()));
        }
        if agent_knows("--removal-grace") {
            command.arg(format!("--removal-grace={grace}"));
        }
        command.args(&self.shape.flags).args(&agent.flags);
        // Given, and not asked for as long as etcd has no users; nobody may ever read it.
        command.env("FLANNELD_ETCD_USERNAME", USER);
        if !agent.flags.iter().any(|flag| flag.starts_with("--etcd-password")) {
            command.env("FLANNELD_ETCD_PASSWORD", CANARY);
        }
        command.env("XTABLES_LOCKFILE", host.directory.join("xtables.lock"));
        let process = Process::start(command, log);
        agent.monitor.pid.store(process.pid(), Ordering::SeqCst);
        agent.process = Some(process);
    }

    /// Kills an agent without a warning.
    pub(crate) fn kill_agent(&mut self, index: usize) {
        let agent = &mut self.agents[index];
        agent.monitor.pid.store(0, Ordering::SeqCst);
        if let Some(mut process) = agent.process.take() {
            process.signal(Signal::SIGCONT);
            process.kill();
        }
    }

    pub(crate) fn signal_agent(&self, index: usize, signal: Signal) {
        if let Some(process) = &self.agents[index].process {
            process.signal(signal);
        }
    }

    /// What an agent has said so far.
    pub(crate) fn log(&self, index: usize) -> String {
        fs::read_to_string(self.records.log(index + 1)).unwrap_or_default()
    }

    /// What the agent of a host said of its readiness when it was last asked, and the code.
    pub(crate) fn page(&self, index: usize) -> (u16, String) {
        self.host(index).page(HEALTH_PORT, "/readyz")
    }

    pub(crate) fn is_ready(&self, index: usize) -> bool {
        self.page(index).0 == 200
    }

    pub(crate) fn host(&self, index: usize) -> &Host {
        &self.agents[index].host
    }

    // Peers

    /// A peer joins, or says something else than before.
    pub(crate) fn join(&mut self, number: u8) {
        let peer = self.peers.peer(number);
        self.store.put_peer(&peer);
        self.there.insert(number, peer);
    }

    /// A peer leaves.
    pub(crate) fn leave(&mut self, number: u8) {
        if let Some(peer) = self.there.remove(&number) {
            self.store.remove_peer(&peer);
        }
    }

    // Time

    /// Waits until every kernel is what the leases say; how long that took, or what is still different.
    pub(crate) fn converges(&mut self, patience: Duration) -> Result<Duration, String> {
        let all: Vec<usize> = (0..self.agents.len()).collect();
        self.converge(&all, patience)
    }

    /// The same for some hosts.
    pub(crate) fn converge(&mut self, hosts: &[usize], patience: Duration) -> Result<Duration, String> {
        let start = Instant::now();
        loop {
            let Some(list) = self.store.try_list(&leases(), patience) else {
                return Err("etcd does not answer".into());
            };
            let sound = list.iter().filter(|(key, _)| !self.poison.contains(*key));
            let list: Vec<Lease> = sound.filter_map(|(key, value)| Lease::read(key, value)).collect();
            let difference = hosts.iter().find_map(|&index| {
                let host = self.host(index);
                let wanted = kernel::wanted(&list, &host.address.to_string());
                let difference = kernel::difference(&wanted, &kernel::held(host))?;
                Some(format!("host {}: {difference}", host.number))
            });
            match difference {
                None => return Ok(start.elapsed()),
                Some(difference) if start.elapsed() > patience => return Err(difference),
                Some(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Waits until `is_so`; whether it came to be.
    pub(crate) fn comes(
        &mut self,
        patience: Duration,
        mut is_so: impl FnMut(&mut Self) -> bool,
    ) -> Option<Duration> {
        let start = Instant::now();
        while !is_so(self) {
            if start.elapsed() > patience {
                return None;
            }
            thread::sleep(Duration::from_millis(50));
        }
        Some(start.elapsed())
    }

    // Words

    /// Something that has to be so.
    pub(crate) fn claim(&mut self, is_so: bool, otherwise: impl FnOnce() -> String) {
        if !is_so {
            let words = otherwise();
            self.say(&words);
            self.broken.push(words);
        }
    }

    pub(crate) fn mark(&self, mark: &Mark) {
        self.marks.write(mark);
    }

    pub(crate) fn say(&self, what: &str) {
        self.mark(&Mark::Said { t: now(), what: what.into() });
    }

    /// A fault that each of these hosts has to show.
    pub(crate) fn fault(&self, what: &str, hosts: impl IntoIterator<Item = usize>) {
        let hosts = hosts.into_iter().map(|index| index + 1).collect();
        self.mark(&Mark::Fault { t: now(), what: what.into(), hosts });
    }

    pub(crate) fn excuse(&self, index: usize, since: Time, until: Time, why: &str) {
        self.mark(&Mark::Excused { host: index + 1, since, until, why: why.into() });
    }

    pub(crate) fn blind(&self, index: usize, since: Time) {
        self.mark(&Mark::Blind { host: index + 1, since, until: now() });
    }

    /// Waits until the recorder has seen all that has happened in etcd.
    pub(crate) fn catch_up(&mut self) {
        // Under the prefix, where the recorder hears of it, and where agents do not look.
        let revision = self.store.put(&format!("{PREFIX}/mark"), now().to_string());
        self.recorded(revision);
    }

    /// Waits until the recorder has seen a revision at which something happened under the prefix.
    pub(crate) fn recorded(&mut self, revision: i64) {
        let seen = self.history.as_ref().is_none_or(|history| history.reaches(revision, PATIENCE));
        self.claim(seen, || "the recorder of etcd's history has fallen behind".into());
    }

    /// In what lies about while the agents run; what is recorded is searched later.
    fn look_for_secrets(&mut self) {
        let mut places: Vec<PathBuf> = vec![];
        for agent in &self.agents {
            if let Some(process) = &agent.process {
                places.push(format!("/proc/{}/cmdline", process.pid()).into());
            }
            places.extend(files_below(&agent.host.directory));
        }
        let has_it = |path: &PathBuf| fs::read(path).is_ok_and(|bytes| contains(&bytes, CANARY.as_bytes()));
        for place in places.into_iter().filter(has_it) {
            self.claim(false, || format!("I7: the password is in {}", place.display()));
        }
    }

    // Faults

    /// Kills all members and waits until they answer again as a cluster of their own, without any data.
    pub(crate) fn wipe(&mut self) {
        self.members.kill_all(Data::Gone);
        self.members.new_token();
        self.members.start_all();
        self.store.answers();
    }

    // The end

    /// Stops the agents, sees that packets still go, writes the end down and takes all apart.
    pub(crate) fn finish(mut self) -> Vec<String> {
        self.catch_up();
        self.look_for_secrets();
        // For one more look at each agent.
        thread::sleep(Duration::from_millis(1200));
        self.mark(&Mark::Stopped { t: now() });
        for index in 0..self.agents.len() {
            self.signal_agent(index, Signal::SIGCONT);
            self.signal_agent(index, Signal::SIGTERM);
        }
        for index in 0..self.agents.len() {
            let Some(mut process) = self.agents[index].process.take() else { continue };
            let start = Instant::now();
            while process.runs() && start.elapsed() < Duration::from_secs(5) {
                thread::sleep(Duration::from_millis(10));
            }
            let runs = process.runs();
            self.claim(!runs, || format!("the agent of host {} does not stop", index + 1));
            self.agents[index].monitor.pid.store(0, Ordering::SeqCst);
        }
        let all_run_down = now();
        if self.flow.is_some() {
            thread::sleep(Duration::from_millis(1500));
        }
        self.mark(&Mark::Said { t: all_run_down, what: "all agents have ended".into() });
        self.write_end();
        self.mark(&Mark::End { t: now() });
        if let Some(flow) = self.flow.take() {
            flow.end();
        }
        let broken = std::mem::take(&mut self.broken);
        fs::write(self.records.path("broken.txt"), broken.join("\n")).expect("there is room for the records");
        broken
    }

    fn write_end(&mut self) {
        let list = self.store.list(&leases());
        let mut end = End { leases: list, ..End::default() };
        for (key, value) in FOREIGN_KEYS {
            if self.store.get(key).map(|(value, _)| value).as_deref() != Some(value) {
                end.lost_keys.push(key.into());
            }
        }
        for agent in &self.agents {
            let host = HostEnd {
                address: agent.host.address.to_string(),
                held: kernel::held(&agent.host).into_iter().collect(),
                lost_objects: lost_objects(&agent.host),
                file: fs::read_to_string(agent.host.subnet_file()).unwrap_or_default(),
            };
            end.hosts.insert(agent.host.number, host);
        }
        let text = serde_json::to_string_pretty(&end).expect("plain structs serialise");
        fs::write(self.records.path("end.json"), text).expect("there is room for the records");
    }
}

fn agent(host: Host, records: &Records) -> Agent {
    plant(&host);
    let kernel = KernelMonitor::start(&host, records.kernel(host.number));
    let lines = Lines::create(&records.agent(host.number));
    let monitor = AgentMonitor::start(&host, records.log(host.number), lines);
    Agent { host, process: None, flags: vec![], subnet: String::new(), monitor, kernel }
}

/// All plain files in a directory and below.
fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let below = |path: PathBuf| if path.is_dir() { files_below(&path) } else { vec![path] };
    entries.filter(|path| !path.is_symlink()).flat_map(below).collect()
}

/// Whether `words` stand in `bytes`.
pub(crate) fn contains(bytes: &[u8], words: &[u8]) -> bool {
    bytes.windows(words.len()).any(|window| window == words)
}

/// Things that are somebody else's, and how they are seen to be there.
const FOREIGN: [(&str, &str, &str); 6] = [
    ("ip route add 172.30.0.0/16 via 192.168.77.254", "ip route show 172.30.0.0/16", "via 192.168.77.254"),
    // Inside the network, where no lease is.
    (
        "ip route add 10.5.250.0/24 via 192.168.77.9 proto static",
        "ip route show 10.5.250.0/24",
        "via 192.168.77.9",
    ),
    (
        "ip neigh add 192.168.77.99 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
        "ip neigh show dev eth0 nud permanent",
        "02:00:00:00:00:99",
    ),
    ("ip rule add from 10.99.0.0/16 lookup 99 priority 999", "ip rule show", "from 10.99.0.0/16 lookup 99"),
    ("ip link add other0 type bridge", "ip link show dev other0", "other0"),
    ("bridge fdb add 02:00:00:00:00:98 dev other0 self", "bridge fdb show dev other0", "02:00:00:00:00:98"),
];

/// Makes what has to be there still at the end, if it is not there.
pub(crate) fn plant(host: &Host) {
    for lost in lost_objects(host) {
        host.run(&lost.split(' ').collect::<Vec<_>>());
    }
}

fn lost_objects(host: &Host) -> Vec<String> {
    let show = |words: &str| {
        let words: Vec<&str> = words.split(' ').collect();
        let output = output(&[&["ip", "netns", "exec", &host.namespace], &words[..]].concat());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let rule = ("iptables -A INPUT -s 10.98.0.0/16 -j ACCEPT", "iptables -S INPUT", "10.98.0.0/16");
    let gone = FOREIGN.into_iter().chain([rule]).filter(|(_, look, words)| !show(look).contains(words));
    gone.map(|(make, _, _)| make.to_owned()).collect()
}

/// Runs `ip` or `bridge` with plain words on a host; it may fail.
pub(crate) fn attempt(host: &Host, words: &str) -> bool {
    let mut command: Command = host.command(words.split(' ').next().unwrap_or_default());
    command.args(words.split(' ').skip(1));
    command.output().is_ok_and(|output| output.status.success())
}

/// Deletes the backend's device of a host.
pub(crate) fn delete_device(host: &Host) {
    attempt(host, &format!("ip link del {DEVICE}"));
}

/// Deletes one object, in the words of [`kernel::held`].
pub(crate) fn delete_object(host: &Host, object: &str) {
    let words: Vec<&str> = object.split(' ').collect();
    let command = match words[..] {
        ["route", subnet, ..] => format!("ip route del {subnet}"),
        ["neighbour", address, _] => format!("ip neigh del {address} dev {DEVICE}"),
        ["entry", mac, to] => format!("bridge fdb del {mac} dev {DEVICE} dst {to} self"),
        _ => return,
    };
    attempt(host, &command);
}
