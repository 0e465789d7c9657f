//! Rung 7: what a daemon writes to is full, read-only, or holds what somebody else has put there.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use flannel_core::memory::Memory;
use flannel_tests::lab::{self, Host, Lab, Process, until};
use flannel_tests::say;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

const PREFIX: &str = "/coreos.com/network";
const VXLAN: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
const STATE: &str = "coreos.com-network.state";
const HEALTH: &str = "--healthz-port=8471";

/// Somebody's route through our device, in the half of the world that a file cut off in the middle might claim.
const THEIRS: &str = "100.64.0.0/10 dev flannel.1";

/// After a disk is mended, and after a start, all is as it should be so soon.
const LIMIT: Duration = Duration::from_secs(2);

/// A host whose daemon keeps its files on a disk of 64 kB.
struct SmallDisk {
    lab: Lab,
    host: Host,
    disk: PathBuf,
}

impl SmallDisk {
    fn new() -> Self {
        let lab = Lab::new(1);
        lab.put_config(PREFIX, VXLAN);
        let peer = r#"{"PublicIP":"192.168.77.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:09"}}"#;
        lab.etcdctl(&["put", &format!("{PREFIX}/subnets/10.5.201.0-24"), peer]);
        let host = lab.host(1);
        let disk = host.directory.join("disk");
        fs::create_dir_all(&disk).unwrap();
        lab::run(&[
            "mount",
            "-t",
            "tmpfs",
            "-o",
            "size=64k,nr_inodes=64",
            "tmpfs",
            &disk.display().to_string(),
        ]);
        Self { lab, host, disk }
    }

    fn remount(&self, how: &str) {
        lab::run(&["mount", "-o", &format!("remount,{how}"), &self.disk.display().to_string()]);
    }

    fn fill(&self) {
        let mut file = File::create(self.disk.join("filler")).unwrap();
        while file.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    }

    fn file(&self) -> PathBuf {
        self.disk.join("run/subnet.env")
    }

    fn state(&self) -> PathBuf {
        self.disk.join("state").join(STATE)
    }

    fn agent(&self) -> Process {
        let state = format!("--state-dir={}", self.disk.join("state").display());
        // Not "ip netns exec", which gives it mounts of its own: they would stay read-only.
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.host.namespace)).arg(lab::flanneld());
        self.host.start(command, "agent", &self.file(), &[&state, HEALTH])
    }

    fn is_ready(&self) -> bool {
        self.host.page(8471, "/readyz").0 == 200
    }

    fn has_state(&self) -> bool {
        fs::read_to_string(self.state()).is_ok_and(|text| text.parse::<Memory>().is_ok())
    }

    /// Starts a daemon that does all it can without its disk; then mends that, and takes the time.
    fn without_disk(&self, why: &str, mend: impl FnOnce()) {
        let agent = self.agent();
        agent.until_logged("the subnet file cannot be written; trying again");
        agent.until_logged("host in sync");
        until("the rules stand", || self.host.run(&["iptables", "-S", "FORWARD"]).contains("FLANNEL-FWD"));

        assert_eq!(self.host.routes(), 1);
        assert_eq!(self.lab.leases(PREFIX).len(), 2);
        let (code, body) = self.host.page(8471, "/readyz");
        assert_eq!(code, 503, "{body}");
        assert!(
            body.contains(&format!("subnet file {}", self.file().display())) && body.contains(why),
            "{body}"
        );
        agent.until_logged("the state file cannot be written");
        let log = agent.log();
        for words in ["the subnet file cannot be written", "the state file cannot be written"] {
            let lines: Vec<&str> = log.lines().filter(|line| line.contains(words)).collect();
            assert!(lines.len() == 1 && lines[0].contains(why), "{log}");
        }

        let mended = Instant::now();
        mend();
        until("it is ready", || self.is_ready());
        let ready = mended.elapsed();
        until("it has written down what it knows", || self.has_state());
        let wrote = mended.elapsed();
        say(&format!("{why}: ready {ready:?} after it was mended, the state file written after {wrote:?}"));
        assert!(ready < LIMIT && wrote < LIMIT, "ready {ready:?}, state file {wrote:?}");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        lab::output(&["umount", "-l", &self.disk.display().to_string()]);
    }
}

#[test]
fn a_full_disk_costs_readiness_alone_and_is_made_good_at_once() {
    let small = SmallDisk::new();
    small.fill();

    small.without_disk("No space left on device", || fs::remove_file(small.disk.join("filler")).unwrap());
}

#[test]
fn a_read_only_disk_costs_readiness_alone_and_is_made_good_at_once() {
    let small = SmallDisk::new();
    small.remount("ro");

    small.without_disk("Read-only file system", || small.remount("rw"));
}

#[test]
fn a_disk_that_fills_or_turns_read_only_keeps_a_standing_host_ready() {
    let small = SmallDisk::new();
    let mut agent = small.agent();
    let subnet = lab::subnet_of(&small.file());
    agent.signal(Signal::SIGTERM);
    agent.ended();
    let files = || [fs::read(small.file()).unwrap(), fs::read(small.state()).unwrap()];
    let before = files();

    small.fill();
    for trouble in ["full", "read-only"] {
        agent = small.agent();
        until("it is ready", || small.is_ready());

        assert_eq!(lab::subnet_of(&small.file()), subnet, "{trouble}");
        assert!(!agent.log().contains("the subnet file cannot be written"), "{}", agent.log());
        agent.kill();
        assert_eq!(files(), before, "{trouble}");
        small.remount("ro");
    }
}

/// What somebody may have put where one of our files should be, given what should be there.
type Prank = (&'static str, fn(&Path, &[u8]));

const PRANKS: &[Prank] = &[
    ("nothing in it", |path, _| fs::write(path, "").unwrap()),
    ("one byte", |path, whole| fs::write(path, &whole[..1]).unwrap()),
    ("cut within a name", |path, whole| fs::write(path, &whole[..7]).unwrap()),
    // FLANNEL_NETWORK=10.5.0.0/1
    ("cut within a value", |path, whole| fs::write(path, &whole[..26]).unwrap()),
    ("cut in the middle", |path, whole| fs::write(path, &whole[..whole.len() / 2]).unwrap()),
    ("cut before its end", |path, whole| fs::write(path, &whole[..whole.len() - 1]).unwrap()),
    ("NULs", |path, _| fs::write(path, [0; 4096]).unwrap()),
    ("the right length in NULs", |path, whole| fs::write(path, vec![0; whole.len()]).unwrap()),
    ("garbage", |path, _| fs::write(path, (0..=255).cycle().take(30_000).collect::<Vec<u8>>()).unwrap()),
    ("lines without end", |path, _| fs::write(path, "x\n".repeat(30_000)).unwrap()),
    ("100 MB", |path, _| File::create(path).unwrap().set_len(100 << 20).unwrap()),
    ("a pipe", |path, _| nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap()),
    ("a link to nowhere", |path, _| symlink("/nowhere/at/all", path).unwrap()),
    ("a link to itself", |path, _| symlink(path, path).unwrap()),
    ("a link to zeros without end", |path, _| symlink("/dev/zero", path).unwrap()),
    ("a directory", |path, _| fs::create_dir(path).unwrap()),
];

#[test]
fn what_somebody_has_put_in_the_place_of_a_file_costs_one_line() {
    let lab = Lab::new(1);
    lab.put_config(PREFIX, VXLAN);
    let host = lab.host(1);
    let mut agent = host.agent(&[HEALTH]);
    let subnet = host.subnet();
    agent.signal(Signal::SIGTERM);
    agent.ended();
    host.run(&[&["ip", "route", "add"], THEIRS.split(' ').collect::<Vec<_>>().as_slice()].concat());
    let state = host.state_dir();
    let paths = [host.subnet_file(), state.join(STATE), state.join("host-id")];
    let right = paths.each_ref().map(|path| fs::read(path).unwrap());
    let mut slowest = Duration::ZERO;

    for (path, right) in paths.iter().zip(&right) {
        for (prank, play) in PRANKS {
            let case = format!("{prank} at {}", path.display());
            drop(fs::remove_file(agent.log_path()));
            drop(fs::remove_dir(path).or_else(|_| fs::remove_file(path)));
            play(path, right);
            // Or a host that has lost its id would ask the one that it was whether it lives.
            lab.etcdctl(&["del", "--prefix", &format!("{PREFIX}/hosts/")]);

            let mut begun = Instant::now();
            let mut most_lines = 1;
            agent = host.agent(&[HEALTH]);
            if path.is_dir() && *path == host.subnet_file() {
                // Something may be mounted there: only who has put it there can take it away.
                agent.until_logged("the subnet file cannot be written");
                fs::remove_dir(path).unwrap();
                (begun, most_lines) = (Instant::now(), 2);
            }
            until(&format!("it is ready: {case}"), || host.page(8471, "/readyz").0 == 200);
            let took = begun.elapsed();
            agent.signal(Signal::SIGTERM);
            agent.ended();

            assert!(took < LIMIT, "{case}: {took:?}");
            slowest = slowest.max(took);
            assert_eq!(host.subnet(), subnet, "{case}");
            let log = agent.log();
            let lines = log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR "));
            let lines: Vec<&str> = lines.filter(|line| !line.contains("leads to no lease")).collect();
            assert!(lines.len() <= most_lines, "{case}: {log}");
            assert!(lines.iter().all(|line| line.contains(&path.display().to_string())), "{case}: {log}");
            // Where the id should be, a link may lead to a disk that comes later: it stays.
            let stays = path.ends_with("host-id") && *prank == "a link to nowhere";
            assert_eq!(fs::symlink_metadata(path).unwrap().is_file(), !stays, "{case}");
            assert!(host.run(&["ip", "route"]).contains(THEIRS), "{case}: {log}");
            let whole = fs::read_to_string(state.join(STATE)).unwrap().parse::<Memory>();
            assert!(whole.is_ok(), "{case}: {whole:?}");
            if *path == host.subnet_file() {
                assert_eq!(&fs::read(path).unwrap(), right, "{case}");
            }
        }
    }
    say(&format!(
        "{} files that are none, the slowest start ready after {slowest:?}",
        PRANKS.len() * paths.len()
    ));
}
