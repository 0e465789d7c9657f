//! What the daemon may do and what it gives away: an ordinary user with two capabilities, the unit, secrets.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use flannel_tests::etcd::PREFIX;
use flannel_tests::firewalld::{Bus, Talker};
use flannel_tests::lab::{self, ETCD, Host, Lab, Process, until};
use flannel_tests::{need, pass_over, say};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const VXLAN: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
const PEER: &str = r#"{"PublicIP":"192.168.77.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:09"}}"#;
const HEALTH: &str = "--healthz-port=8471";

/// `nobody`.
const USER: u32 = 65534;

/// What the unit leaves.
const CAPABILITIES: &str = "-all,+net_admin,+net_raw";

/// A password that is nowhere but where this test has put it.
fn canary(test: &str) -> String {
    format!("canary-{}-of-{test}", std::process::id())
}

/// How a password can be given.
const WAYS: [&str; 3] = ["flag", "variable", "file"];

/// A lab of one host with a peer in its store.
fn lab() -> (Lab, Host) {
    let lab = Lab::new(1);
    lab.put_config(PREFIX, VXLAN);
    lab.etcdctl(&["put", &format!("{PREFIX}/subnets/10.5.201.0-24"), PEER]);
    let host = lab.host(1);
    fs::create_dir_all(&host.directory).unwrap();
    (lab, host)
}

/// A command that leads to the host, as `user` with the two capabilities and in front of that iptables.
fn confined(host: &Host, user: u32, iptables: &str) -> Command {
    let programs = host.directory.join(iptables);
    fs::create_dir_all(&programs).unwrap();
    for name in ["iptables", "iptables-restore"] {
        let program = name.replace("iptables", iptables);
        let path = lab::run(&["sh", "-c", &format!("command -v {program}")]);
        symlink(path.trim(), programs.join(name)).unwrap();
    }
    let path = std::env::var("PATH").unwrap();
    let id = user.to_string();
    let mut command = host.command("setpriv");
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--no-new-privs"]);
    command.args(["--inh-caps", CAPABILITIES, "--bounding-set", CAPABILITIES]);
    if user != 0 {
        command.args(["--ambient-caps", CAPABILITIES]);
    }
    command.env("PATH", format!("{}:{path}", programs.display()));
    command
}

/// The daemon where an ordinary user can run it, whatever directory it was built in.
fn daemon_for_all(lab: &Lab) -> PathBuf {
    let daemon = lab.path("flanneld");
    fs::copy(lab::flanneld(), &daemon).unwrap();
    fs::set_permissions(&daemon, Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(daemon.parent().unwrap(), Permissions::from_mode(0o711)).unwrap();
    daemon
}

fn is_ready(host: &Host) -> bool {
    host.page(8471, "/readyz").0 == 200
}

#[test]
fn an_ordinary_user_with_two_capabilities_can_run_the_daemon() {
    if !need("setpriv") || !Bus::possible() {
        return;
    }
    for iptables in ["iptables-nft", "iptables-legacy"].into_iter().filter(|program| need(program)) {
        let (lab, host) = lab();
        let daemon = daemon_for_all(&lab);
        chown(&host.directory, Some(USER), Some(USER)).unwrap();
        // What an earlier run as root may have left.
        fs::write(host.subnet_file(), "FLANNEL_SUBNET=10.5.7.1/24\n").unwrap();
        fs::set_permissions(host.subnet_file(), Permissions::from_mode(0o600)).unwrap();
        let bus = Bus::started();
        let mut firewalld = Talker::standing(&bus);
        let mut command = confined(&host, USER, iptables);
        command.arg(&daemon).env(Bus::VARIABLE, bus.address());

        // Not the clock puts rules right, but what is heard.
        let flags = ["--ip-masq", HEALTH, "--iptables-resync=3600"];
        let agent = host.start(command, "agent", &host.subnet_file(), &flags);
        until("it is ready", || is_ready(&host));

        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
        assert!(status.contains(&format!("Uid:\t{USER}\t")), "{status}");
        // CAP_NET_ADMIN is bit 12, CAP_NET_RAW bit 13.
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(status.contains(&format!("{set}:\t0000000000003000\n")), "{status}");
        }
        assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
        agent.until_logged("the previous subnet is not known");
        let shows = |words: &[&str], expected: &str| host.run(words).contains(expected);
        let stands = || {
            shows(&["ip", "route"], "10.5.201.0/24 via 10.5.201.0 dev flannel.1")
                && shows(&["ip", "neigh"], "10.5.201.0 dev flannel.1 lladdr 0e:00:00:00:00:09 PERMANENT")
                && shows(&["bridge", "fdb", "show", "dev", "flannel.1"], "0e:00:00:00:00:09 dst 192.168.77.9")
                && shows(&["cat", "/proc/sys/net/ipv6/conf/flannel.1/accept_ra"], "0")
                && shows(&[iptables, "-S", "FORWARD"], "-j FLANNEL-FWD")
                && shows(&[iptables, "-S", "FLANNEL-FWD"], "-j ACCEPT")
                && shows(&[iptables, "-t", "nat", "-S", "FLANNEL-POSTRTG"], "-j MASQUERADE")
        };
        assert!(stands(), "{}", agent.log());

        for undone in [
            ["ip", "route", "del", "10.5.201.0/24"].as_slice(),
            &["ip", "neigh", "del", "10.5.201.0", "dev", "flannel.1"],
            &["bridge", "fdb", "del", "0e:00:00:00:00:09", "dev", "flannel.1"],
            &["ip", "link", "del", "flannel.1"],
            &[iptables, "-F", "FLANNEL-FWD"],
        ] {
            host.run(undone);
            firewalld.reload();
            until("it is put right", || host.routes() == 1 && stands());
        }
        until("it is ready again", || is_ready(&host));
        until("the state is written", || fs::read_dir(host.state_dir()).unwrap().count() == 2);
        say(&format!("{iptables}: ready and repaired as user {USER} with CAP_NET_ADMIN and CAP_NET_RAW"));
    }
}

fn unit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/flanneld.service")
}

#[test]
fn the_unit_exposes_less_than_three_of_ten() {
    if !need("systemd-analyze") {
        return;
    }

    let told = lab::output(&[
        "systemd-analyze",
        "security",
        "--offline=true",
        "--no-pager",
        &unit().display().to_string(),
    ]);

    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let words = told.lines().find_map(|line| line.split_once("exposure level for flanneld.service: "));
    let (_, words) = words.unwrap_or_else(|| panic!("{told}"));
    let exposure: f32 = words.split(' ').next().unwrap().parse().unwrap();
    say(&format!("exposure of the unit, by systemd-analyze security: {exposure} of 10"));
    assert!(exposure < 3.0, "{told}");
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    if !need("systemd-analyze") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("flanneld.service");
    // The programs are not installed here.
    let programs = ["/usr/local/bin/flanneld", "/usr/local/libexec/flannel-rs/mk-docker-opts.sh"];
    let text = fs::read_to_string(unit()).unwrap();
    fs::write(&copy, programs.iter().fold(text, |text, program| text.replace(program, "/bin/true"))).unwrap();

    let told = lab::output(&["systemd-analyze", "verify", "--man=no", &copy.display().to_string()]);

    let words = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.status.success() && !words.contains("flanneld.service"), "{words}");
}

/// The calls that the unit allows.
fn allowed_calls() -> BTreeSet<String> {
    let text = fs::read_to_string(unit()).unwrap();
    let value =
        |key| text.lines().find_map(|line| line.strip_prefix(key)).unwrap().split(' ').map(String::from);
    // systemd allows these in any case: without them there would be no program.
    let always = ["execve", "exit", "exit_group", "rt_sigreturn"];
    let mut calls: BTreeSet<String> = always.map(String::from).into();
    calls.extend(value("RestrictAddressFamilies=").map(|family| format!("socket {family}")));
    let mut sets: Vec<String> = value("SystemCallFilter=").collect();
    while let Some(set) = sets.pop() {
        let listed = lab::run(&["systemd-analyze", "syscall-filter", "--no-pager", &set]);
        let words = listed.lines().skip(1).map(|line| line.trim().to_owned());
        let (inner, named): (Vec<_>, Vec<_>) = words.partition(|word| word.starts_with('@'));
        sets.extend(inner);
        calls.extend(named.into_iter().filter(|word| !word.is_empty() && !word.starts_with('#')));
    }
    calls
}

/// The calls that strace has written down, a line each: `1234  openat(…`. One that opens a socket is named with its
/// family, as the unit has words on these too: `socket AF_INET`.
fn made_calls(trace: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(trace).unwrap();
    let name = |line: &str| {
        let (name, arguments) = line.split_once(' ')?.1.trim_start().split_once('(')?;
        if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return None;
        }
        let family = arguments.split(',').next().filter(|_| name == "socket");
        Some(family.map_or_else(|| name.to_owned(), |family| format!("socket {family}")))
    };
    text.lines().filter_map(name).collect()
}

#[test]
fn no_call_of_the_daemon_is_one_that_the_unit_forbids() {
    if !need("strace") || !need("systemd-analyze") || !need("setpriv") || !Bus::possible() {
        return;
    }
    let allowed = allowed_calls();
    let mut made = BTreeSet::new();
    for iptables in ["iptables-nft", "iptables-legacy"].into_iter().filter(|program| need(program)) {
        let (_lab, host) = lab();
        let trace = host.directory.join("trace");
        let strace = ["strace", "-f", "-qq", "-s", "0", "-o"];
        let bus = Bus::started();
        let mut firewalld = Talker::standing(&bus);
        let mut command = confined(&host, 0, iptables);
        command.args(strace).arg(&trace).arg(lab::flanneld()).env(Bus::VARIABLE, bus.address());

        // From the start over repairs and a note of the state to the end.
        let flags = ["--ip-masq", HEALTH, "--iptables-resync=1"];
        let mut agent = host.start(command, "agent", &host.subnet_file(), &flags);
        until("it is ready", || is_ready(&host));
        host.run(&["ip", "link", "del", "flannel.1"]);
        host.run(&[iptables, "-F", "FLANNEL-FWD"]);
        firewalld.reload();
        until("the routes are back", || host.routes() == 1);
        until("the rules are back", || host.run(&[iptables, "-S", "FLANNEL-FWD"]).contains("ACCEPT"));
        until("the state is written", || fs::read_dir(host.state_dir()).unwrap().count() == 2);
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid())).unwrap();
        kill(Pid::from_raw(children.trim().parse().unwrap()), Signal::SIGTERM).unwrap();
        agent.ended();
        made.extend(made_calls(&trace));

        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/mk-docker-opts.sh");
        let mut command = Command::new(strace[0]);
        command.args(&strace[1..]).arg(&trace).arg(script).arg("-f").arg(host.subnet_file());
        let status = command.arg("-d").arg(host.directory.join("docker")).status().unwrap();
        assert!(status.success());
        made.extend(made_calls(&trace));
    }

    say(&format!("{} calls of {} that the unit allows were made", made.len(), allowed.len()));
    assert!(made.len() > 50, "{made:?}");
    assert_eq!(made.difference(&allowed).collect::<Vec<_>>(), [""; 0]);
}

/// Asks everybody for a user from now on; that of the agents has this password.
fn switch_users_on(lab: &Lab, password: &str) {
    for words in [
        ["role", "add", "flannel"].as_slice(),
        &["role", "grant-permission", "--prefix", "flannel", "readwrite", PREFIX],
        &["user", "add", "root:another-secret"],
        &["user", "add", &format!("flannel:{password}")],
        &["user", "grant-role", "flannel", "flannel"],
        &["user", "grant-role", "root", "root"],
        &["auth", "enable"],
    ] {
        lab.etcdctl(words);
    }
}

/// The files below a directory that hold these words.
fn files_with(words: &str, directory: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(words, &path));
        } else if fs::read(&path).unwrap().windows(words.len()).any(|window| window == words.as_bytes()) {
            found.push(path);
        }
    }
    found
}

/// The processes that show these words in a list of processes.
fn processes_with(words: &str) -> Vec<String> {
    let commands = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| fs::read(entry.unwrap().path().join("cmdline")).ok());
    let commands = commands.map(|command| String::from_utf8_lossy(&command).replace('\0', " "));
    commands.filter(|command| command.contains(words)).collect()
}

/// Starts a daemon that is given the canary in that way, with all there is to log.
fn with_canary(host: &Host, canary: &str, way: &str, endpoint: &str) -> Process {
    let mut command = host.command(lab::flanneld());
    let secret = host.directory.parent().unwrap().join("password");
    fs::write(&secret, format!("{canary}\n")).unwrap();
    let flag = match way {
        "flag" => format!("--etcd-password={canary}"),
        "file" => format!("--etcd-password-file={}", secret.display()),
        _ => {
            command.env("FLANNELD_ETCD_PASSWORD", canary);
            "--ip-masq".into()
        }
    };
    let endpoint = format!("--etcd-endpoints={endpoint}");
    let flags = ["-v=9", HEALTH, "--etcd-username=flannel", &flag, &endpoint];
    host.start(command, "agent", &host.subnet_file(), &flags)
}

#[test]
fn a_password_is_shown_nowhere() {
    let (lab, host) = lab();
    let canary = canary("a-good-one");
    switch_users_on(&lab, &canary);
    for way in WAYS {
        // It logs in, leases, writes everything; then loses its lease and puts it back.
        let mut agent = with_canary(&host, &canary, way, ETCD);
        until("it is ready", || is_ready(&host));
        let key = format!("{PREFIX}/subnets/{}.0-24", host.subnet());
        lab.etcdctl(&["--user", "root:another-secret", "del", &key]);
        agent.until_logged("the lease is as it should be again");
        let listed = processes_with(&canary);
        assert_eq!(listed.is_empty(), way != "flag", "{way}: {listed:?}");
        agent.signal(Signal::SIGTERM);
        agent.ended();

        assert!(agent.log().contains("h2::codec"), "not all there is to log");
        assert_eq!(files_with(&canary, &host.directory), Vec::<PathBuf>::new(), "{way}");
        fs::remove_dir_all(&host.directory).unwrap();
    }
}

#[test]
fn a_password_that_does_not_help_is_shown_nowhere() {
    let (lab, host) = lab();
    let canary = canary("a-bad-one");
    switch_users_on(&lab, "not-the-canary");
    for (endpoint, trouble) in [(ETCD, "authentication failed"), ("http://192.168.77.254:1", "no answer")] {
        for way in WAYS {
            let agent = with_canary(&host, &canary, way, endpoint);
            agent.until_logged(trouble);
            let (_, page) = host.page(8471, "/readyz");
            drop(agent);

            assert!(!page.contains(&canary) && page.contains("not ready yet"), "{page}");
            assert_eq!(files_with(&canary, &host.directory), Vec::<PathBuf>::new(), "{way}");
            fs::remove_dir_all(&host.directory).unwrap();
        }
    }
}

#[test]
fn a_password_on_a_command_line_that_is_refused_is_not_repeated() {
    let canary = canary("a-mistake");
    let word = format!("--etcd-password={canary}");
    let endpoint = format!("--etcd-endpoints=http://flannel:{canary}@10.0.0.1:2379");
    for words in [vec![word.as_str()], vec![&word, "--nonsense"], vec![&word, "--v=x"], vec![&endpoint]] {
        let output = Command::new(lab::flanneld()).args(&words).output().unwrap();

        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(!said.contains(&canary), "{said}");
    }
}

#[test]
fn a_crash_leaves_no_core_with_a_password_in_it() {
    let (_lab, host) = lab();
    let canary = canary("a-core");
    let crash = |has_secret: bool| {
        let mut command = host.command("sh");
        command.args(["-c", r#"ulimit -c unlimited && exec "$@""#, "sh"]).arg(lab::flanneld());
        command.current_dir(&host.directory);
        if has_secret {
            command.env("FLANNELD_ETCD_USERNAME", "flannel").env("FLANNELD_ETCD_PASSWORD", &canary);
        }
        let flags = ["--etcd-endpoints=http://192.168.77.254:1"];
        let mut agent = host.start(command, "agent", &host.subnet_file(), &flags);
        agent.until_logged("no answer");
        let limits = fs::read_to_string(format!("/proc/{}/limits", agent.pid())).unwrap();
        agent.signal(Signal::SIGABRT);
        let status = agent.ended();
        assert_eq!(status.signal(), Some(Signal::SIGABRT as i32), "{}", agent.log());
        fs::remove_file(agent.log_path()).unwrap();
        (status.core_dumped(), limits)
    };

    let (control, _) = crash(false);
    if !control {
        pass_over("this machine keeps no core of any process (/proc/sys/kernel/core_pattern)");
    }
    let (dumped, limits) = crash(true);

    assert!(!dumped);
    assert_eq!(files_with(&canary, &host.directory), Vec::<PathBuf>::new());
    // Nor do the programs that it starts, which have its variables.
    let limit = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(limit.split_whitespace().skip(4).collect::<Vec<_>>(), ["0", "0", "bytes"]);
}
