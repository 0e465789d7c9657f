//! An etcd of three members, each on a host of its own, that can be hurt.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;

use flannel_tests::lab::{Host, Lab, Process, run};
use nix::sys::signal::Signal;

/// The last bytes of their addresses, and so the numbers of their hosts.
pub(crate) const NUMBERS: [usize; 3] = [251, 252, 253];

/// Whether a member is to keep its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    Kept,
    Gone,
}

pub(crate) struct Members {
    list: Vec<Member>,
    directory: PathBuf,
    logs: PathBuf,
    token: u32,
    /// Further flags of every member.
    pub(crate) flags: Vec<String>,
    /// Words before the program, for each member.
    pub(crate) before: Vec<Vec<String>>,
}

struct Member {
    host: Host,
    process: Option<Process>,
}

impl Members {
    /// Three members that are not started yet, their data under `directory`.
    pub(crate) fn new(lab: &Lab, logs: PathBuf) -> Self {
        let list = NUMBERS.map(|number| Member { host: lab.host(number), process: None });
        Self {
            list: list.into(),
            directory: lab.path("etcd"),
            logs,
            token: 0,
            flags: vec![],
            before: vec![vec![]; NUMBERS.len()],
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.list.len()
    }

    pub(crate) fn endpoint(&self, index: usize) -> String {
        format!("http://{}:2379", self.list[index].host.address)
    }

    pub(crate) fn endpoints(&self) -> Vec<String> {
        (0..self.count()).map(|index| self.endpoint(index)).collect()
    }

    pub(crate) fn host(&self, index: usize) -> &Host {
        &self.list[index].host
    }

    pub(crate) fn data(&self, index: usize) -> PathBuf {
        self.directory.join(format!("m{index}"))
    }

    /// What a restored snapshot has to be told too.
    pub(crate) fn cluster(&self) -> String {
        let member = |index: usize| format!("m{index}=http://{}:2380", self.host(index).address);
        (0..self.count()).map(member).collect::<Vec<_>>().join(",")
    }

    pub(crate) fn token(&self) -> String {
        format!("token-{}", self.token)
    }

    /// The next cluster that is made of nothing is another one.
    pub(crate) fn new_token(&mut self) {
        self.token += 1;
    }

    /// How many requests of a kind all members have counted since they were started; the calling thread has to be in
    /// a namespace that reaches them.
    pub(crate) fn count_of(&self, method: &str) -> u64 {
        let (kind, word) = ("grpc_server_started_total", format!("grpc_method=\"{method}\""));
        let page = |index: usize| {
            let mut stream = TcpStream::connect((self.host(index).address, 2379)).ok()?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        };
        let count = |text: String| -> f64 {
            let lines = text.lines().filter(|line| line.starts_with(kind) && line.contains(&word));
            lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
        };
        (0..self.count()).filter_map(page).map(count).sum::<f64>() as u64
    }

    /// Starts a member on its data, without waiting for it.
    pub(crate) fn start(&mut self, index: usize) {
        fs::create_dir_all(&self.directory).expect("a directory can be made");
        let Host { namespace, address, .. } = self.host(index).clone();
        let client = format!("http://{address}:2379");
        let peer = format!("http://{address}:2380");
        let mut command = std::process::Command::new("ip");
        command.args(["netns", "exec", &namespace]).args(&self.before[index]);
        command.args(["etcd", "--name", &format!("m{index}")]);
        command.arg("--data-dir").arg(self.data(index));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &self.cluster(), "--initial-cluster-token", &self.token()]);
        // Fast enough for a short scenario, slow enough for a machine that is busy.
        command.args(["--heartbeat-interval", "100", "--election-timeout", "1000"]);
        command.args(["--log-level", "error", "--bcrypt-cost", "4"]).args(&self.flags);
        // A proxy of the surroundings is nothing for members.
        for name in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
            command.env_remove(name);
        }
        let log = self.logs.join(format!("etcd-m{index}.log"));
        self.list[index].process = Some(Process::start(command, log));
    }

    pub(crate) fn start_all(&mut self) {
        (0..self.count()).for_each(|index| self.start(index));
    }

    pub(crate) fn kill(&mut self, index: usize, data: Data) {
        if let Some(mut process) = self.list[index].process.take() {
            // It may be stopped.
            process.signal(Signal::SIGCONT);
            process.kill();
        }
        if data == Data::Gone {
            fs::remove_dir_all(self.data(index)).expect("its data can be removed");
        }
    }

    pub(crate) fn kill_all(&mut self, data: Data) {
        (0..self.count()).for_each(|index| self.kill(index, data));
    }

    pub(crate) fn is_up(&self, index: usize) -> bool {
        self.list[index].process.is_some()
    }

    /// The process that is, or leads to, the member.
    pub(crate) fn pid(&self, index: usize) -> Option<u32> {
        self.list[index].process.as_ref().map(Process::pid)
    }

    /// Stops it where it stands, or lets it go on.
    pub(crate) fn signal(&self, index: usize, signal: Signal) {
        if let Some(process) = &self.list[index].process {
            process.signal(signal);
        }
    }

    /// Lets clients' packets from and to it vanish; the other members do not notice.
    pub(crate) fn hole(&self, index: usize) {
        hole(self.host(index), "dport", "sport");
    }

    pub(crate) fn mend(&self, index: usize) {
        mend(self.host(index));
    }
}

/// Cuts a host off from etcd: its packets vanish.
pub(crate) fn cut(host: &Host) {
    hole(host, "sport", "dport");
}

/// Ends [`cut`] and [`Members::hole`].
pub(crate) fn mend(host: &Host) {
    host.run(&["nft", "delete", "table", "ip", "hole"]);
}

fn hole(host: &Host, inward: &str, outward: &str) {
    let rules = format!(
        "table ip hole {{\n\
         chain in {{ type filter hook prerouting priority raw; tcp {inward} 2379 drop; }}\n\
         chain out {{ type filter hook output priority raw; tcp {outward} 2379 drop; }}\n}}\n"
    );
    let file = std::env::temp_dir().join(format!("hole-{}", host.namespace));
    fs::write(&file, rules).expect("a file can be written");
    run(&["ip", "netns", "exec", &host.namespace, "nft", "-f", &file.display().to_string()]);
    fs::remove_file(file).expect("it was just written");
}
