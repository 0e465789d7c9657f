//! Hosts to run real daemons on: network namespaces on one wire, and an etcd.
//!
//! ```text
//!   namespace wire     br0 192.168.77.254   etcd on :2379
//!                       │        │
//!   namespaces h1 …    eth0     eth0        192.168.77.1, .2 …
//! ```
//!
//! Every name is the lab's own, every process is ended by its pid, and all of
//! it goes when the lab is dropped. Needs root.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything is waited for before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The address of etcd in every lab.
pub const ETCD: &str = "http://192.168.77.254:2379";

/// Waits until `is_so`.
///
/// # Panics
/// It is not so after [`PATIENCE`].
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The daemon under test: `FLANNELD`, or ours, built if need be.
///
/// # Panics
/// It cannot be built.
pub fn flanneld() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("FLANNELD") {
            return path.into();
        }
        let tests = std::env::current_exe().expect("a test has a path");
        let profile = tests.parent().and_then(Path::parent).expect("a test lies in target/<profile>/deps");
        let mut build = Command::new(env!("CARGO"));
        // As the tests themselves are built, or cargo would build much of it twice.
        build.args(["build", "--quiet", "--workspace"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        for (name, _) in std::env::vars_os() {
            let of_a_package = name.to_string_lossy().starts_with("CARGO_PKG_");
            if of_a_package || name == "CARGO_MANIFEST_DIR" || name == "CARGO_MANIFEST_PATH" {
                build.env_remove(name);
            }
        }
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo runs").success(), "flanneld does not build");
        profile.join("flanneld")
    })
}

/// Runs a program to its end.
///
/// # Panics
/// It cannot be started.
pub fn output(words: &[&str]) -> Output {
    Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

/// What a program prints on stdout.
///
/// # Panics
/// It fails.
pub fn run(words: &[&str]) -> String {
    let output = output(words);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{words:?} failed with {}:\n{stdout}{stderr}", output.status);
    stdout.into_owned()
}

/// A process that ends with the value.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with all it prints going to `log`.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(mut command: Command, log: PathBuf) -> Self {
        let file = File::options().create(true).append(true).open(&log).expect("the log can be opened");
        let copy = file.try_clone().expect("a handle can be copied");
        command.stdin(Stdio::null()).stdout(file).stderr(copy);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { child, log }
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has printed `words`.
    pub fn until_logged(&self, words: &str) {
        let start = Instant::now();
        while !self.log().contains(words) {
            assert!(start.elapsed() < PATIENCE, "never said {words:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Where it prints to.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(self.child.id().try_into().expect("a pid fits")), signal);
    }

    /// Kills it without a warning.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It does not end.
    pub fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        until("a process ends", || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        status.expect("it has ended")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.runs() {
            self.kill();
        }
    }
}

/// Hosts on a wire.
pub struct Lab {
    name: String,
    directory: tempfile::TempDir,
    hosts: Vec<usize>,
    /// The etcd of the wire.
    pub etcd: Option<Process>,
}

impl Lab {
    /// A lab of `hosts` hosts without a config, with etcd answering.
    ///
    /// # Panics
    /// Not root, or a tool is missing.
    pub fn new(hosts: usize) -> Self {
        let mut lab = Self::without_etcd(hosts);
        lab.start_etcd();
        lab
    }

    /// A lab whose etcd is not started yet.
    ///
    /// # Panics
    /// Not root, or a tool is missing.
    pub fn without_etcd(hosts: usize) -> Self {
        Self::of_hosts(1..=hosts)
    }

    /// A lab of the hosts with these numbers, without etcd; some may be there for an etcd of their own.
    ///
    /// # Panics
    /// Not root, or a tool is missing.
    pub fn of_hosts(hosts: impl IntoIterator<Item = usize>) -> Self {
        static LABS: AtomicUsize = AtomicUsize::new(0);
        let name = format!("flt{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::SeqCst));
        let directory = tempfile::tempdir().expect("a directory");
        let lab = Self { name, directory, hosts: hosts.into_iter().collect(), etcd: None };
        lab.build();
        lab
    }

    fn build(&self) {
        let wire = self.wire();
        run(&["ip", "netns", "add", &wire]);
        self.batch(
            &wire,
            "link set lo up\nlink add br0 address 02:00:00:00:77:fe type bridge\nlink set br0 up\naddr add 192.168.77.254/24 dev br0\n",
        );
        for &host in &self.hosts {
            self.plug_in(&self.host(host));
        }
    }

    /// Makes the host anew, as if nothing had ever run on it; whatever did has ended.
    pub fn renew(&self, host: &Host) {
        // At once, and not when the kernel comes to it.
        run(&["ip", "-n", &self.wire(), "link", "del", &format!("v{}", host.number)]);
        run(&["ip", "netns", "del", &host.namespace]);
        // It may have had no files.
        drop(fs::remove_dir_all(&host.directory));
        self.plug_in(host);
    }

    fn plug_in(&self, host: &Host) {
        let Host { number, namespace, address, .. } = host;
        run(&["ip", "netns", "add", namespace]);
        self.batch(
            &self.wire(),
            &format!(
                "link add v{number} type veth peer name eth0 netns {namespace}\nlink set v{number} master br0 up\n"
            ),
        );
        self.batch(
            namespace,
            &format!(
                "link set lo up\nlink set eth0 up\naddr add {address}/24 dev eth0\nroute add default via 192.168.77.254\n"
            ),
        );
        host.run(&["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"]);
    }

    fn batch(&self, namespace: &str, lines: &str) {
        let file = self.path("batch");
        fs::write(&file, lines).expect("a file can be written");
        run(&["ip", "-n", namespace, "-batch", &file.display().to_string()]);
    }

    /// The name of the namespace that etcd is in.
    pub fn wire(&self) -> String {
        format!("{}-wire", self.name)
    }

    /// A path in the lab's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The host with that number, from 1.
    pub fn host(&self, number: usize) -> Host {
        let last = u8::try_from(number).expect("few hosts");
        Host {
            number,
            namespace: format!("{}-h{number}", self.name),
            address: Ipv4Addr::new(192, 168, 77, last),
            directory: self.path(&format!("h{number}")),
        }
    }

    /// Starts etcd on its old data, if any, and waits until it answers.
    pub fn start_etcd(&mut self) {
        let mut command = Command::new("ip");
        let data = self.path("etcd");
        command.args(["netns", "exec", &self.wire(), "etcd", "--data-dir", &data.display().to_string()]);
        command.args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
        command.args(["--listen-peer-urls", "http://127.0.0.1:2380", "--log-level", "error"]);
        command.args(["--unsafe-no-fsync", "--heartbeat-interval", "50", "--election-timeout", "250"]);
        if !run(&["etcd", "--version"]).contains("Version: 3.5") {
            // The flag came with 3.5.
            command = without(command, "--unsafe-no-fsync");
        }
        self.etcd = Some(Process::start(command, self.path("etcd.log")));
        until("etcd answers", || self.etcdctl_output(&["get", "x"]).status.success());
    }

    /// Runs etcdctl.
    ///
    /// # Panics
    /// It fails.
    pub fn etcdctl(&self, words: &[&str]) -> String {
        let output = self.etcdctl_output(words);
        assert!(output.status.success(), "etcdctl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn etcdctl_output(&self, words: &[&str]) -> Output {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.wire(), "etcdctl", "--endpoints", ETCD]).args(words);
        command.env("ETCDCTL_API", "3").output().expect("etcdctl can be started")
    }

    /// Runs etcdctl with that on its stdin.
    ///
    /// # Panics
    /// It fails.
    pub fn etcdctl_fed(&self, words: &[&str], input: &str) {
        let file = self.path("input");
        fs::write(&file, input).expect("a file can be written");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.wire(), "etcdctl", "--endpoints", ETCD]).args(words);
        command.env("ETCDCTL_API", "3").stdin(File::open(&file).expect("it was just written"));
        let output = command.output().expect("etcdctl can be started");
        assert!(output.status.success(), "etcdctl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs a program on the wire.
    pub fn run_on_wire(&self, words: &[&str]) -> String {
        run(&[&["ip", "netns", "exec", &self.wire()], words].concat())
    }

    /// Writes the network config of a prefix.
    pub fn put_config(&self, prefix: &str, config: &str) {
        self.etcdctl(&["put", &format!("{prefix}/config"), config]);
    }

    /// The keys and values of all leases under a prefix.
    pub fn leases(&self, prefix: &str) -> Vec<(String, String)> {
        let text = self.etcdctl(&["get", "--prefix", &format!("{prefix}/subnets/")]);
        let lines: Vec<&str> = text.lines().collect();
        lines.chunks(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect()
    }
}

fn without(command: Command, flag: &str) -> Command {
    let mut other = Command::new(command.get_program());
    other.args(command.get_args().filter(|word| *word != flag));
    other
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.etcd = None;
        for &host in &self.hosts {
            output(&["ip", "netns", "del", &self.host(host).namespace]);
        }
        output(&["ip", "netns", "del", &self.wire()]);
    }
}

/// One host of a lab.
#[derive(Clone, Debug)]
pub struct Host {
    /// From 1.
    pub number: usize,
    /// The name of its namespace.
    pub namespace: String,
    /// Of its eth0.
    pub address: Ipv4Addr,
    /// Where its files go.
    pub directory: PathBuf,
}

impl Host {
    /// Runs a program on the host; what it prints.
    pub fn run(&self, words: &[&str]) -> String {
        run(&[&["ip", "netns", "exec", &self.namespace], words].concat())
    }

    /// A program to be started on the host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        command
    }

    /// Where the agent writes.
    pub fn subnet_file(&self) -> PathBuf {
        self.directory.join("subnet.env")
    }

    /// Where the agent keeps what outlives a reboot.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Starts our daemon on the host.
    pub fn agent(&self, flags: &[&str]) -> Process {
        self.daemon(flanneld(), "agent", &self.subnet_file(), flags)
    }

    /// Starts a daemon with that file on the host; its log is named after `name`.
    ///
    /// # Panics
    /// The host's directory cannot be made.
    pub fn daemon(&self, program: &Path, name: &str, file: &Path, flags: &[&str]) -> Process {
        self.start(self.command(program), name, file, flags)
    }

    /// Starts a daemon by a command that leads to the host, with what follows the program's name.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(&self, command: Command, name: &str, file: &Path, flags: &[&str]) -> Process {
        Process::start(self.complete(command, file, flags), self.directory.join(format!("{name}.log")))
    }

    /// A command that leads to the host and a daemon, with what follows the program's name.
    ///
    /// # Panics
    /// The host's directory cannot be made.
    pub fn complete(&self, mut command: Command, file: &Path, flags: &[&str]) -> Command {
        fs::create_dir_all(&self.directory).expect("a directory can be made");
        command.arg(format!("--etcd-endpoints={ETCD}")).arg(format!("--subnet-file={}", file.display()));
        // Each host of a lab has a lock of its own, as a host of its own would.
        command.args(flags).env("XTABLES_LOCKFILE", self.directory.join("xtables.lock"));
        command.env("FLANNELD_STATE_DIR", self.state_dir());
        command
    }

    /// Waits for the subnet file of [`Host::agent`] and gives its subnet, `10.5.7`.
    pub fn subnet(&self) -> String {
        subnet_of(&self.subnet_file())
    }

    /// Gives the host the address that dockerd's bridge would have.
    pub fn bridge(&self, subnet: &str) {
        self.run(&["ip", "link", "add", "pods", "type", "bridge"]);
        self.run(&["ip", "addr", "add", &format!("{subnet}.1/24"), "dev", "pods"]);
        self.run(&["ip", "link", "set", "pods", "up"]);
    }

    /// Starts a ping, fifty a second, from one bridge to another's, `10.5.7` to `10.5.9`.
    ///
    /// # Panics
    /// There is no ping.
    pub fn ping(&self, from: &str, to: &str, count: u32, flags: &[&str]) -> Ping {
        let mut ping = self.command("ping");
        ping.args(["-i", "0.02", "-W", "1", "-c", &count.to_string(), "-I", &format!("{from}.1")]);
        ping.args(flags).arg(format!("{to}.1")).stdout(Stdio::piped());
        Ping(ping.spawn().expect("ping can be started"))
    }

    /// How many routes lead into the network 10.5.0.0/16 by other hosts.
    pub fn routes(&self) -> usize {
        self.run(&["ip", "route"])
            .lines()
            .filter(|line| line.starts_with("10.5.") && line.contains(" via "))
            .count()
    }

    /// The page that the health server gives, with its status code.
    pub fn page(&self, port: u16, path: &str) -> (u16, String) {
        let request = format!("GET {path} HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n");
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}; printf '{request}' >&3; cat <&3");
        let output = self.command("bash").args(["-c", &script]).output().expect("bash can be started");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let code = text.split_whitespace().nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        (code, text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
    }
}

/// Waits for a subnet file and gives its subnet without the last byte, `10.5.7`.
///
/// # Panics
/// It does not come.
pub fn subnet_of(file: &Path) -> String {
    let mut subnet = None;
    until(&format!("{} is there", file.display()), || {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=").map(String::from));
        subnet = line.and_then(|line| line.strip_suffix(".1/24").map(String::from));
        subnet.is_some()
    });
    subnet.expect("it is there")
}

/// A ping on its way.
pub struct Ping(Child);

impl Ping {
    /// Waits for its end; how many packets did not come back, and all it printed.
    ///
    /// # Panics
    /// It prints what no ping prints.
    pub fn lost(self) -> (u32, String) {
        let output = self.0.wait_with_output().expect("ping can be waited for");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let number = |word: &str| -> u32 {
            let before = text.split(word).next().and_then(|text| text.split_whitespace().last());
            before.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("not from ping: {text}"))
        };
        (number(" packets transmitted") - number(" received"), text)
    }
}
