//! Rung 7: real daemons on hosts that lack a tool, share its lock or mix two kinds of it.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use flannel_tests::etcd::PREFIX;
use flannel_tests::lab::{self, Host, Lab, Process, until};
use flannel_tests::{need, say};

const IPTABLES: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
const NFTABLES: &str = r#"{"Network":"10.5.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#;
const PEER: &str = r#"{"PublicIP":"192.168.77.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:09"}}"#;
const FLAGS: [&str; 3] = ["--ip-masq", "--healthz-port=8471", "--iptables-resync=1"];

/// A lab of one host with a peer in its store.
fn lab(config: &str) -> (Lab, Host) {
    let lab = Lab::new(1);
    lab.put_config(PREFIX, config);
    lab.etcdctl(&["put", &format!("{PREFIX}/subnets/10.5.201.0-24"), PEER]);
    let host = lab.host(1);
    fs::create_dir_all(&host.directory).unwrap();
    (lab, host)
}

/// Starts an agent that finds these tools and no other: a name, and what it leads to.
fn agent_with(host: &Host, name: &str, tools: &[(&str, &str)]) -> Process {
    agent_of(host, name, tools, &FLAGS)
}

/// The same with flags of its own.
fn agent_of(host: &Host, name: &str, tools: &[(&str, &str)], flags: &[&str]) -> Process {
    let programs = host.directory.join(format!("{name}-programs"));
    fs::create_dir_all(&programs).unwrap();
    for (name, tool) in tools {
        let path = lab::run(&["sh", "-c", &format!("command -v {tool}")]);
        symlink(path.trim(), programs.join(name)).unwrap();
    }
    let mut command = host.command("env");
    command.arg(format!("PATH={}", programs.display())).arg(lab::flanneld());
    host.start(command, name, &host.subnet_file(), flags)
}

fn readiness(host: &Host) -> (u16, String) {
    host.page(8471, "/readyz")
}

/// How often the log has these words.
fn times(agent: &Process, words: &str) -> usize {
    agent.log().lines().filter(|line| line.contains(words)).count()
}

/// Somebody who holds the lock of the host's iptables.
struct Holder(Child);

impl Holder {
    fn of(host: &Host) -> Self {
        let lock = host.directory.join("xtables.lock");
        let mut child = Command::new("flock")
            .arg(lock)
            .args(["sh", "-c", "echo held; read line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
        Self(child)
    }

    fn let_go(mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn a_lock_that_is_held_holds_up_nothing_but_the_rules() {
    if !need("iptables-legacy") || !need("flock") || !need("ps") {
        return;
    }
    let (_lab, host) = lab(IPTABLES);
    let holder = Holder::of(&host);

    let legacy = [("iptables", "iptables-legacy"), ("iptables-restore", "iptables-legacy-restore")];
    let agent = agent_with(&host, "agent", &legacy);
    agent.until_logged("firewall pending");
    until("the file is there", || host.subnet_file().exists());
    until("the route is there", || host.routes() == 1);
    let (status, words) = readiness(&host);
    // Iptables waits five seconds for the lock, each time it is tried.
    let waits =
        || lab::output(&["sh", "-c", &format!("ip netns pids {} | xargs -r ps -o comm= -p", host.namespace)]);
    let is_waiting = || String::from_utf8_lossy(&waits().stdout).contains("iptables");
    for _ in 0..2 {
        until("it is tried again", is_waiting);
        until("it is refused again", || !is_waiting());
    }
    let told = times(&agent, "xtables lock");
    holder.let_go();
    let freed = Instant::now();
    until("it is ready", || readiness(&host).0 == 200);

    assert_eq!(status, 503);
    assert!(words.contains("firewall pending: somebody holds the xtables lock"), "{words}");
    assert_eq!(told, 1, "{}", agent.log());
    assert!(host.run(&["iptables-legacy", "-S", "FLANNEL-FWD"]).contains("ACCEPT"));
    say(&format!("the rules stood {:?} after the lock was let go", freed.elapsed()));
}

#[test]
fn no_iptables_is_needed_where_the_config_says_nftables() {
    if !need("nft") {
        return;
    }
    let (_lab, host) = lab(NFTABLES);

    let agent = agent_with(&host, "agent", &[("nft", "nft")]);
    until("it is ready", || readiness(&host).0 == 200);
    host.run(&["nft", "flush", "ruleset"]);
    let flushed = Instant::now();
    until("the rules are back", || host.run(&["nft", "list", "ruleset"]).contains("masquerade"));

    say(&format!("the rules stood {:?} after a flush", flushed.elapsed()));
    agent.until_logged("traffic rules that somebody had changed or removed were put right");
    assert_eq!(times(&agent, "WARN") + times(&agent, "ERROR"), 1, "{}", agent.log());
}

#[test]
fn a_tool_that_is_missing_is_named_with_what_helps() {
    for (config, missing) in [
        (IPTABLES, "iptables is not there: install iptables"),
        (NFTABLES, "nft is not there: install nftables"),
    ] {
        let (_lab, host) = lab(config);

        let agent = agent_with(&host, "agent", &[]);
        agent.until_logged("firewall pending");
        until("the file is there", || host.subnet_file().exists());

        let (status, words) = readiness(&host);
        assert!(status == 503 && words.contains(&format!("firewall pending: {missing}")), "{words}");
        assert_eq!(times(&agent, "firewall pending"), 1, "{}", agent.log());
    }
}

#[test]
fn rules_in_both_kinds_of_iptables_are_pending_and_told_once_with_both_names() {
    if !need("iptables-legacy") || !need("iptables-nft") {
        return;
    }
    let (_lab, host) = lab(IPTABLES);
    host.run(&["iptables-legacy", "-A", "FORWARD", "-j", "ACCEPT"]);

    let agent = host.agent(&FLAGS);
    agent.until_logged("firewall pending");
    until("the file is there", || host.subnet_file().exists());
    until("the route is there", || host.routes() == 1);
    let (status, words) = readiness(&host);

    let both = "this host has rules in iptables-legacy (1) and in iptables-nft";
    assert!(status == 503 && words.contains(&format!("firewall pending: {both}")), "{words}");
    assert_eq!(times(&agent, both), 1, "{}", agent.log());
    assert!(host.run(&["iptables-nft", "-S", "FLANNEL-FWD"]).contains("ACCEPT"));
    drop(agent);
    host.run(&["iptables-legacy", "-F", "FORWARD"]);
    let agent = host.daemon(lab::flanneld(), "again", &host.subnet_file(), &FLAGS);
    until("it is ready", || readiness(&host).0 == 200);
    assert_eq!(times(&agent, "in iptables-legacy"), 0, "{}", agent.log());
}

#[test]
fn what_is_not_wanted_needs_no_tool_and_goes_from_the_other_engine_all_the_same() {
    if !need("iptables-nft") || !need("nft") {
        return;
    }
    let (lab, host) = lab(IPTABLES);
    let agent = host.agent(&FLAGS);
    until("it is ready", || readiness(&host).0 == 200);
    drop(agent);
    let chains = || host.run(&["nft", "list", "ruleset"]).matches("FLANNEL-").count();
    assert!(chains() > 0);

    lab.put_config(PREFIX, NFTABLES);
    let tools = [("iptables-nft", "iptables-nft"), ("iptables-nft-restore", "iptables-nft-restore")];
    let flags = ["--iptables-forward-rules=false", "--healthz-port=8471"];
    let agent = agent_of(&host, "bare", &tools, &flags);
    until("it is ready", || readiness(&host).0 == 200);

    assert_eq!(chains(), 0, "{}", agent.log());
}

#[test]
fn a_kernel_without_nat_forwards_all_the_same_where_nobody_asked_to_masquerade() {
    if !need("iptables-legacy") {
        return;
    }
    let (_lab, host) = lab(IPTABLES);
    let legacy = lab::run(&["sh", "-c", "command -v iptables-legacy"]);
    let without_nat = host.directory.join("without-nat");
    let refusal = "can't initialize iptables table `nat': Table does not exist (do you need to insmod?)";
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *'-t nat'*) echo \"{}\" >&2; exit 3;; esac\nexec {} \"$@\"\n",
        refusal.replace('`', "\\`"),
        legacy.trim()
    );
    fs::write(&without_nat, script).unwrap();
    fs::set_permissions(&without_nat, PermissionsExt::from_mode(0o755)).unwrap();
    let without_nat = without_nat.display().to_string();
    let tools = [("iptables", without_nat.as_str()), ("iptables-restore", "iptables-legacy-restore")];

    let agent = agent_of(&host, "plain", &tools, &["--healthz-port=8471"]);
    until("it is ready", || readiness(&host).0 == 200);
    assert!(host.run(&["iptables-legacy", "-S", "FLANNEL-FWD"]).contains("ACCEPT"), "{}", agent.log());
    drop(agent);

    let agent = agent_of(&host, "masquerading", &tools, &FLAGS);
    agent.until_logged("firewall pending");
    assert!(readiness(&host).1.contains("masquerading needs NAT"), "{}", readiness(&host).1);
}

#[test]
fn the_engine_changes_with_the_config_and_leaves_no_rule_behind() {
    if !need("nft") || !need("iptables-nft") {
        return;
    }
    let (lab, host) = lab(IPTABLES);
    let agent = host.agent(&FLAGS);
    until("it is ready", || readiness(&host).0 == 200);
    drop(agent);
    let shown = || host.run(&["nft", "list", "ruleset"]);
    let chains = |words: &str| shown().matches(words).count();
    assert!(chains("FLANNEL-FWD") > 0 && chains("flannel-ipv4") == 0, "{}", shown());

    for (config, gone, stands) in
        [(NFTABLES, "FLANNEL-", "flannel-ipv4"), (IPTABLES, "flannel-ipv4", "FLANNEL-")]
    {
        lab.put_config(PREFIX, config);
        let agent = host.daemon(lab::flanneld(), "again", &host.subnet_file(), &FLAGS);
        until("the engine has changed", || chains(gone) == 0 && chains(stands) > 0);
        until("it is ready", || readiness(&host).0 == 200);
        drop(agent);
    }
}
