//! A real dockerd on a host of a [`Lab`](crate::lab::Lab), that shares nothing with the machine's own.
//!
//! It takes its options from `mk-docker-opts.sh`, and its one image from this
//! machine's static busybox, as there may be no registry. `scripts/lib.sh` says
//! more of what keeps it apart.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{Host, Process, output, run, until};

/// What runs it: no child outlives it, its mounts are its own, `/run` and `/etc/docker` are empty.
const APART: &str = r#"
    mount -t tmpfs tmpfs /run
    [ ! -d /etc/docker ] || mount -t tmpfs tmpfs /etc/docker
    exec dockerd "$@""#;

/// A dockerd, and what it keeps when it is started anew.
pub struct Dockerd {
    host: Host,
    group: String,
    process: Option<Process>,
}

impl Dockerd {
    /// One that is not started yet.
    pub fn on(host: &Host) -> Self {
        Self { host: host.clone(), group: host.namespace.clone(), process: None }
    }

    /// Starts it and waits until it answers; it has started its old containers by then.
    ///
    /// # Panics
    /// It does not.
    pub fn start(&mut self) {
        let directory = self.directory();
        fs::create_dir_all(&directory).expect("a directory can be made");
        fs::write(directory.join("daemon.json"), "{}").expect("a file can be written");
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.host.namespace));
        command.args("-- unshare -m -p -f --kill-child --mount-proc sh -c".split(' ')).args([APART, "sh"]);
        let path = |name: &str| directory.join(name).display().to_string();
        command.args(["--config-file", &path("daemon.json"), "--pidfile", &path("pid")]);
        command.args(["-H", &format!("unix://{}", path("sock")), "--data-root", &path("data")]);
        command.args(["--exec-root", &path("exec"), "--storage-driver", "vfs"]);
        command.args(["--exec-opt", "native.cgroupdriver=cgroupfs"]);
        command.args(["--cgroup-parent", &format!("/{}", self.group)]).args(self.options());
        // A pid that it kept from the last time would be somebody else's.
        drop(fs::remove_file(directory.join("pid")));
        self.process = Some(Process::start(command, self.host.directory.join("dockerd.log")));
        until("dockerd answers", || self.ask(&["version"]).is_ok());
    }

    /// Stops it as `systemctl stop` does, and with it its containers.
    ///
    /// # Panics
    /// It does not end.
    pub fn stop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let children = format!("/proc/{0}/task/{0}/children", process.pid());
        let dockerd = fs::read_to_string(&children).expect("unshare has one child");
        let dockerd = Pid::from_raw(dockerd.trim().parse().expect("its number"));
        kill(dockerd, Signal::SIGTERM).expect("it runs");
        process.ended();
    }

    /// Brings a busybox and nothing else into it, as the image `busybox`.
    ///
    /// # Panics
    /// It does not take it.
    pub fn import_busybox(&self) {
        let root = self.directory().join("image");
        fs::create_dir_all(root.join("bin")).expect("a directory can be made");
        let busybox = run(&["sh", "-c", "command -v busybox"]);
        fs::copy(busybox.trim(), root.join("bin/busybox")).expect("busybox can be copied");
        let tar = self.directory().join("image.tar").display().to_string();
        run(&["tar", "-C", &root.display().to_string(), "-cf", &tar, "."]);
        self.docker(&["import", &tar, "busybox"]);
    }

    /// Runs docker; what it prints.
    ///
    /// # Panics
    /// It fails.
    pub fn docker(&self, words: &[&str]) -> String {
        self.ask(words).unwrap_or_else(|said| panic!("docker {words:?}: {said}"))
    }

    /// Runs docker; what it prints, or what it says as it fails.
    ///
    /// # Errors
    /// It fails.
    pub fn ask(&self, words: &[&str]) -> Result<String, String> {
        let socket = format!("unix://{}", self.directory().join("sock").display());
        let output = output(&[&["docker", "-H", &socket], words].concat());
        let (shown, said) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() { Ok(shown.trim().to_owned()) } else { Err(said.into_owned()) }
    }

    /// The address of a container.
    ///
    /// # Panics
    /// There is none of that name.
    pub fn address(&self, container: &str) -> String {
        self.docker(&["inspect", "-f", "{{.NetworkSettings.Networks.bridge.IPAddress}}", container])
    }

    fn directory(&self) -> PathBuf {
        self.host.directory.join("docker")
    }

    fn options(&self) -> Vec<String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/mk-docker-opts.sh");
        let (from, to) = (self.host.subnet_file(), self.directory().join("options"));
        let (from, to) = (from.display().to_string(), to.display().to_string());
        self.host.run(&[&script.display().to_string(), "-f", &from, "-d", &to, "-c", "-j", "/dev/null"]);
        let written = fs::read_to_string(&to).expect("it was just written");
        let options = written.trim().strip_prefix("DOCKER_OPTS=").expect("its only line").trim_matches('"');
        options.split_whitespace().map(str::to_owned).collect()
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        if self.process.is_some() && !std::thread::panicking() {
            self.stop();
        }
        self.process = None;
        // What it has made outside its own directory.
        let group = &self.group;
        let mut find = Command::new("find");
        find.args(["/sys/fs/cgroup", "-depth", "-type", "d", "(", "-path", &format!("*/{group}/*")]);
        drop(find.args(["-o", "-name", group, ")", "-exec", "rmdir", "{}", "+"]).output());
    }
}
