//! Follows a daemon from call to call, names those that leave something outside
//! it, and kills it as it is about to make one of them.
//!
//! ```text
//!   write /state/.host-id.new ─▶ link /state/host-id ─▶ etcd LeaseGrant ─▶ netlink NEWLINK ─▶ …
//!                              ▲
//!                              └─ a point: all before it is done, nothing after it
//! ```
//!
//! This is ptrace(2) and not strace, which can kill as well: strace counts the
//! calls of each thread by themselves and kills whoever makes the call, so that a
//! point would be another one with every run, or the end of an iptables and not
//! of its daemon. What a program does that the daemon has started is a point of
//! the daemon: it goes on without it.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

mod wire;

use wire::Frames;

/// What the daemon says last: `READY=1`.
pub const READY: &str = "notify READY=1";

/// A call about to be made, which leaves something outside the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Point {
    /// What it does, with no name in it that another run would not have.
    pub what: String,
    /// How many of these came before it.
    pub before: usize,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, before } = self;
        if *before == 0 { f.write_str(what) } else { write!(f, "{what} (no. {})", before + 1) }
    }
}

/// A daemon that is followed. Dropping it kills it.
pub struct Traced {
    pid: Pid,
    armed: Arc<AtomicBool>,
    points: Receiver<Point>,
    thread: Option<JoinHandle<()>>,
}

/// How to follow a daemon.
pub struct Watch {
    /// Its program.
    pub program: PathBuf,
    /// Its own directory, which is left out of names.
    pub directory: PathBuf,
    /// Where it is to be killed, if anywhere.
    pub kill_at: Option<Point>,
    /// Whether points count from the start, and not from [`Traced::arm`] on.
    pub armed: bool,
}

impl Traced {
    /// Starts a command that leads to the daemon; what it prints goes to `log`.
    ///
    /// # Panics
    /// It cannot be started, or not be traced.
    pub fn start(command: &Command, log: &Path, watch: Watch) -> Self {
        let mut gated = Command::new("sh");
        gated.args(["-c", r#"read -r go; exec "$@" </dev/null"#, "sh"]);
        gated.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => gated.env(name, value),
                None => gated.env_remove(name),
            };
        }
        let file = File::options().create(true).append(true).open(log).expect("the log can be opened");
        let copy = file.try_clone().expect("a handle can be copied");
        gated.stdin(Stdio::piped()).stdout(file).stderr(copy);

        let armed = Arc::new(AtomicBool::new(watch.armed));
        let (send, points) = mpsc::channel();
        let (send_pid, pid) = mpsc::channel();
        let is_armed = armed.clone();
        // A tracee answers to the thread that has seized it.
        let thread = thread::spawn(move || {
            #[allow(clippy::zombie_processes, reason = "the tracer waits for all there is")]
            let mut child = gated.spawn().expect("a shell can be started");
            let pid = Pid::from_raw(child.id().try_into().expect("a pid fits"));
            ptrace::seize(pid, options()).expect("our own child can be traced");
            ptrace::interrupt(pid).expect("a tracee can be interrupted");
            let mut go = child.stdin.take().expect("it was asked for");
            go.write_all(b"\n").expect("the shell reads");
            send_pid.send(pid).expect("the pid is waited for");
            Tracer::new(pid, watch, is_armed, send).run();
        });
        let pid = pid.recv().expect("the daemon can be started and traced");
        Self { pid, armed, points, thread: Some(thread) }
    }

    /// Has points count from now on.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }

    /// The next point; `None` if there is none for so long, or the daemon has been killed.
    pub fn next(&self, patience: Duration) -> Option<Point> {
        self.points.recv_timeout(patience).ok()
    }

    /// Kills it if it has not been, and waits for it and all it has started.
    pub fn end(mut self) {
        self.join();
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        // It may have ended by itself.
        let _ = kill(self.pid, Signal::SIGKILL);
        if thread.join().is_err() && !thread::panicking() {
            panic!("the tracer has failed");
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        self.join();
    }
}

fn options() -> Options {
    Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL
}

struct Tracer {
    daemon: Pid,
    watch: Watch,
    armed: Arc<AtomicBool>,
    points: Sender<Point>,
    /// Whether the daemon's program runs already.
    begun: bool,
    killed: bool,
    /// The process of each thread, the daemon's and those of programs that it has started.
    processes: HashMap<Pid, Pid>,
    /// What each program that the daemon has started is.
    programs: HashMap<Pid, String>,
    /// What each request to etcd asks for, by connection and stream.
    requests: HashMap<(String, u32), String>,
    seen: HashMap<String, usize>,
}

impl Tracer {
    fn new(daemon: Pid, watch: Watch, armed: Arc<AtomicBool>, points: Sender<Point>) -> Self {
        Self {
            daemon,
            watch,
            armed,
            points,
            begun: false,
            killed: false,
            processes: HashMap::new(),
            programs: HashMap::new(),
            requests: HashMap::new(),
            seen: HashMap::new(),
        }
    }

    fn run(&mut self) {
        loop {
            // Nobody else's children: those of other threads have other tracers, or none.
            let status = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD));
            match status {
                Ok(WaitStatus::PtraceSyscall(thread)) => {
                    self.at_call(thread);
                    self.go_on(thread, None);
                }
                Ok(WaitStatus::PtraceEvent(thread, _, event)) => {
                    if event == ptrace::Event::PTRACE_EVENT_EXEC as i32 {
                        self.at_start(thread);
                    }
                    self.go_on(thread, None);
                }
                Ok(WaitStatus::Stopped(thread, signal)) => self.go_on(thread, Some(signal)),
                Ok(WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..)) => {
                    self.processes.remove(&thread);
                    if thread == self.daemon {
                        self.killed = true;
                    }
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::ECHILD) => return,
                Err(error) => panic!("waitpid: {error}"),
            }
        }
    }

    fn go_on(&self, thread: Pid, signal: Option<Signal>) {
        // One that has been killed meanwhile is no longer there to go on.
        let _ = if self.killed { ptrace::cont(thread, signal) } else { ptrace::syscall(thread, signal) };
    }

    /// A program has just replaced another one.
    fn at_start(&mut self, thread: Pid) {
        if thread == self.daemon {
            self.begun |=
                fs::read_link(format!("/proc/{thread}/exe")).is_ok_and(|exe| exe == self.watch.program);
            return;
        }
        let words = fs::read(format!("/proc/{thread}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ");
        let words = words.replace(" --wait 5", "");
        self.programs.insert(thread, words.clone());
        self.point(Some(format!("start {words}")));
    }

    fn at_call(&mut self, thread: Pid) {
        // Stops come at the entry of a call and at its exit.
        let is_entry =
            ptrace::syscall_info(thread).is_ok_and(|info| info.op == libc::PTRACE_SYSCALL_INFO_ENTRY);
        if !is_entry || !self.begun || self.killed {
            return;
        }
        let Some(call) = Call::read(thread) else { return };
        let process = *self.processes.entry(thread).or_insert_with(|| process_of(thread));
        let what = if process == self.daemon { self.name(&call) } else { self.name_of_child(process, &call) };
        self.point(what);
    }

    fn point(&mut self, what: Option<String>) {
        let Some(what) = what.filter(|_| self.armed.load(Ordering::SeqCst) && !self.killed) else { return };
        let before = self.seen.entry(what.clone()).or_default();
        let point = Point { what, before: *before };
        *before += 1;
        if self.watch.kill_at.as_ref() == Some(&point) {
            self.killed = true;
            // It may be ending by itself.
            let _ = kill(self.daemon, Signal::SIGKILL);
        }
        // Whoever has heard enough may be gone.
        let _ = self.points.send(point);
    }

    /// What a call of the daemon's own leaves outside, if anything.
    fn name(&mut self, call: &Call) -> Option<String> {
        match call.number {
            libc::SYS_fsync | libc::SYS_fdatasync => self.name_file("sync", &call.file()?),
            libc::SYS_fchmod => self.name_file("chmod", &call.file()?),
            libc::SYS_ftruncate => self.name_file("truncate", &call.file()?),
            libc::SYS_openat => {
                let flags = i32::try_from(call.arguments[2]).ok()?;
                let path = call.path(1);
                let creates = flags & libc::O_CREAT != 0 && !path.starts_with("/proc");
                self.name_file("create", &path).filter(|_| creates)
            }
            libc::SYS_mkdirat => self.name_new(&call.path(1)),
            libc::SYS_renameat | libc::SYS_renameat2 => self.name_file("rename", &call.path(3)),
            libc::SYS_linkat => self.name_file("link", &call.path(3)),
            libc::SYS_unlinkat => self.name_removed(&call.path(1)),
            _ => self.name_old(call).or_else(|| self.name_write(call)),
        }
    }

    /// The same for calls that only older architectures have.
    #[cfg(target_arch = "x86_64")]
    fn name_old(&self, call: &Call) -> Option<String> {
        match call.number {
            libc::SYS_mkdir => self.name_new(&call.path(0)),
            libc::SYS_rename => self.name_file("rename", &call.path(1)),
            libc::SYS_link => self.name_file("link", &call.path(1)),
            libc::SYS_unlink | libc::SYS_rmdir => self.name_removed(&call.path(0)),
            _ => None,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn name_old(&self, _: &Call) -> Option<String> {
        None
    }

    fn name_write(&mut self, call: &Call) -> Option<String> {
        let bytes = call.written()?;
        let file = call.file()?;
        let name = file.to_str()?;
        if name.starts_with("socket:") {
            let ready = bytes.starts_with(b"READY=1").then(|| READY.to_owned());
            return ready.or_else(|| wire::netlink(&bytes)).or_else(|| self.name_request(name, &bytes));
        }
        if name.starts_with("pipe:") {
            return Some("feed a program".into());
        }
        // What is left without a path: its own wake-ups. And what it logs is for eyes alone.
        let is_file = file.is_absolute() && call.arguments[0] > 2;
        is_file.then(|| self.name_file("write", &file)).flatten()
    }

    /// What a write to etcd asks for, if that changes anything there.
    fn name_request(&mut self, connection: &str, bytes: &[u8]) -> Option<String> {
        let mut named = None;
        for frame in Frames(bytes) {
            let stream = (connection.to_owned(), frame.stream);
            if let Some(method) = frame.method() {
                self.requests.insert(stream, method);
            } else if frame.has_data()
                && let Some(method) = self.requests.get(&stream)
                && !["Range", "Watch", "LeaseTimeToLive", "LeaseLeases"].contains(&method.as_str())
            {
                named = Some(format!("etcd {method}"));
            }
        }
        named
    }

    /// What a program that the daemon has started does to the kernel: its rules go there in one message.
    fn name_of_child(&self, process: Pid, call: &Call) -> Option<String> {
        let program = self.programs.get(&process)?;
        match call.number {
            libc::SYS_sendmsg if call.file()?.to_str()?.starts_with("socket:") => {
                Some(format!("{program} commits"))
            }
            libc::SYS_exit_group => Some(format!("{program} ends")),
            _ => None,
        }
    }

    fn name_new(&self, path: &Path) -> Option<String> {
        let is_possible = !path.exists() && path.parent().is_some_and(Path::exists);
        is_possible.then(|| self.name_file("make", path)).flatten()
    }

    fn name_removed(&self, path: &Path) -> Option<String> {
        if path.symlink_metadata().is_ok() { self.name_file("remove", path) } else { None }
    }

    fn name_file(&self, verb: &str, path: &Path) -> Option<String> {
        let shown = path.strip_prefix(&self.watch.directory).unwrap_or(path);
        let shown = if shown == Path::new("") { Path::new("its directory") } else { shown };
        Some(format!("{verb} {}", shown.display()))
    }
}

fn process_of(thread: Pid) -> Pid {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let group = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    group.and_then(|group| group.trim().parse().ok()).map_or(thread, Pid::from_raw)
}

/// A call as it is entered.
struct Call {
    thread: Pid,
    number: libc::c_long,
    arguments: [u64; 6],
}

impl Call {
    fn read(thread: Pid) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{thread}/syscall")).ok()?;
        let mut words = text.split_whitespace();
        let number = words.next()?.parse().ok()?;
        let mut arguments = [0; 6];
        for argument in &mut arguments {
            *argument = u64::from_str_radix(words.next()?.trim_start_matches("0x"), 16).ok()?;
        }
        Some(Self { thread, number, arguments })
    }

    /// The file that its first argument is a handle of.
    fn file(&self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/fd/{}", self.thread, self.arguments[0])).ok()
    }

    /// The path that its argument with that number leads to.
    fn path(&self, argument: usize) -> PathBuf {
        let bytes = self.memory(self.arguments[argument], 4096);
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..end]).into_owned().into()
    }

    /// What it is to write.
    fn written(&self) -> Option<Vec<u8>> {
        let [_, second, third, ..] = self.arguments;
        match self.number {
            libc::SYS_write | libc::SYS_sendto => Some(self.memory(second, third)),
            libc::SYS_writev => Some(self.gathered(second, third)),
            libc::SYS_sendmsg => {
                // `struct msghdr`: the vector and its length are the third and the fourth word.
                let header = self.words(second, 4);
                Some(self.gathered(*header.get(2)?, *header.get(3)?))
            }
            _ => None,
        }
    }

    /// What a vector of buffers holds together.
    fn gathered(&self, vector: u64, count: u64) -> Vec<u8> {
        let parts = self.words(vector, 2 * count.min(64));
        parts.chunks_exact(2).flat_map(|part| self.memory(part[0], part[1])).collect()
    }

    fn words(&self, address: u64, count: u64) -> Vec<u64> {
        let bytes = self.memory(address, 8 * count);
        bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
    }

    /// The memory at an address, as much of it as there is.
    fn memory(&self, address: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length.min(1 << 20)).expect("a megabyte fits")];
        let memory = File::open(format!("/proc/{}/mem", self.thread));
        let got = memory.and_then(|memory| memory.read_at(&mut bytes, address)).unwrap_or(0);
        bytes.truncate(got);
        bytes
    }
}
