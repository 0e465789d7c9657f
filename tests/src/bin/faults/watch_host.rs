//! Writes down what the kernel of a host tells, and how its agent is doing.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use flannel_tests::lab::Host;

use crate::record::{Lines, Sample, Told, now};
use crate::world::enter;

/// Where agents tell how they are doing.
pub(crate) const HEALTH_PORT: u16 = 8471;

/// Between two looks at an agent.
const PACE: Duration = Duration::from_millis(500);

/// `ip monitor` and `bridge monitor` of a host.
pub(crate) struct KernelMonitor {
    children: [Child; 2],
}

impl KernelMonitor {
    /// # Panics
    /// Nothing is heard of a change that is made for the purpose.
    pub(crate) fn start(host: &Host, path: PathBuf) -> Self {
        let namespace = host.namespace.as_str();
        let lines = Lines::create(&path);
        let words = ["-4", "-o", "-rc", "33554432", "monitor", "link", "address", "route", "neigh"];
        let ip = start("ip", &[&["-n", namespace], &words[..]].concat(), "", &lines);
        let bridge = start("bridge", &["-n", namespace, "monitor", "fdb"], "fdb ", &lines);
        let monitor = Self { children: [ip, bridge] };
        // Until both listen, nothing is heard of the mark.
        host.run(&["ip", "link", "add", "mark0", "type", "bridge"]);
        host.run(&["ip", "link", "set", "mark0", "up"]);
        let start = Instant::now();
        let mut mtu = 1000;
        loop {
            mtu += 1;
            host.run(&["ip", "link", "set", "mark0", "mtu", &mtu.to_string()]);
            let mac = format!("0e:ff:00:00:{:02x}:{:02x}", mtu / 256, mtu % 256);
            host.run(&["bridge", "fdb", "add", &mac, "dev", "mark0", "self"]);
            thread::sleep(Duration::from_millis(20));
            let told = fs::read_to_string(&path).unwrap_or_default();
            if told.contains("mtu 1") && told.contains("0e:ff:00:00") {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "ip monitor is silent");
        }
        monitor
    }
}

impl Drop for KernelMonitor {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended by itself.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn start(program: &str, words: &[&str], before: &'static str, lines: &Lines) -> Child {
    let mut command = Command::new(program);
    command.args(words).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{program}: {error}"));
    let printed = child.stdout.take().expect("it was asked for");
    let lines = lines.clone();
    thread::spawn(move || {
        for line in BufReader::new(printed).lines().map_while(Result::ok) {
            lines.write(&Told { t: now(), line: format!("{before}{}", line.trim_end()) });
        }
    });
    child
}

/// Looks at an agent again and again.
pub(crate) struct AgentMonitor {
    stop: Arc<AtomicBool>,
    /// The agent to look at; 0 for none.
    pub(crate) pid: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl AgentMonitor {
    pub(crate) fn start(host: &Host, log: PathBuf, lines: Lines) -> Self {
        let (stop, pid) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let look = Look { log, file: host.subnet_file(), lines, page: String::new(), env: String::new() };
        let (namespace, stops, of) = (host.namespace.clone(), stop.clone(), pid.clone());
        let thread = thread::spawn(move || {
            enter(&namespace);
            let mut look = look;
            while !stops.load(Ordering::SeqCst) {
                let start = Instant::now();
                look.once(of.load(Ordering::SeqCst));
                thread::sleep(PACE.saturating_sub(start.elapsed()));
            }
        });
        Self { stop, pid, thread: Some(thread) }
    }
}

impl Drop for AgentMonitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

struct Look {
    log: PathBuf,
    file: PathBuf,
    lines: Lines,
    page: String,
    env: String,
}

impl Look {
    fn once(&mut self, pid: u32) {
        let (code, page) = if pid == 0 { (0, String::new()) } else { page("/readyz") };
        let env = fs::read_to_string(&self.file).unwrap_or_default();
        let new = |last: &mut String, text: String| {
            let new = *last != text;
            *last = text;
            new.then(|| last.clone())
        };
        let sample = Sample {
            t: now(),
            pid,
            rss: resident(pid),
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count),
            log: fs::metadata(&self.log).map_or(0, |data| data.len()),
            cpu: processor(pid),
            code,
            page: new(&mut self.page, page),
            file: new(&mut self.env, env),
        };
        self.lines.write(&sample);
    }
}

/// A page of the agent in this thread's namespace; code 0 if there is none.
pub(crate) fn page(path: &str) -> (u16, String) {
    let ask = || -> std::io::Result<String> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, HEALTH_PORT));
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_millis(300))?;
        stream.set_read_timeout(Some(Duration::from_millis(300)))?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let text = ask().unwrap_or_default();
    let code = text.split_whitespace().nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    (code, text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

/// Resident memory, in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Processor time in milliseconds, of user and system, in ticks of ten.
fn processor(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in brackets, may hold blanks; utime is field 14 of proc(5).
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3).and_then(|text| text.parse().ok()).unwrap_or(0);
    (ticks(14) + ticks(15)) * 10
}
