//! Rung 7, the walk-through: two hosts, two real dockerds started from `subnet.env`, a container on each.
//!
//! `scripts/demo` does the walking and stops at the first thing that is not as it should be; here what it shows is read
//! again, line by line. What comes after it is about the traffic rules: that they let containers reach each other
//! whoever starts first, and that the rules of Docker in `firewall/` are those of a real one.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use flannel_tests::dockerd::Dockerd;
use flannel_tests::lab::{Host, Lab, Process, flanneld, until};
use flannel_tests::packets::rules::fixture;
use flannel_tests::{announce, need, say};

fn demo(backend: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/demo");
    let output =
        Command::new(script).args(["--backend", backend]).env("FLANNELD", flanneld()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    text
}

/// The value of `name` on the first host.
fn value<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .find_map(|line| line.trim().strip_prefix(&format!("{name}=")))
        .unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// The subnet of the first host, and that of the second, without their last bytes.
fn subnets(text: &str) -> [String; 2] {
    let lines: Vec<&str> =
        text.lines().filter_map(|line| line.trim().strip_prefix("FLANNEL_SUBNET=")).collect();
    [0, 1].map(|host: usize| lines[host].strip_suffix(".1/24").unwrap().to_owned())
}

fn has(text: &str, words: &[&str]) {
    assert!(
        text.lines().any(|line| words.iter().all(|word| line.contains(word))),
        "no line with {words:?} in\n{text}"
    );
}

#[test]
fn containers_of_two_dockerds_reach_each_other_over_vxlan() {
    let text = demo("vxlan");

    let [ours, theirs] = subnets(&text);
    assert_eq!(value(&text, "FLANNEL_NETWORK"), "10.5.0.0/16");
    assert_eq!(value(&text, "FLANNEL_MTU"), "1450");
    assert_eq!(value(&text, "FLANNEL_IPMASQ"), "true");
    has(&text, &[&format!("inet {ours}.0/32"), "flannel.1"]);
    has(&text, &[&format!("{theirs}.0/24 via {theirs}.0 dev flannel.1"), "onlink"]);
    has(&text, &[&format!("{theirs}.0 lladdr"), "PERMANENT"]);
    has(&text, &["dst 192.0.2.2 self permanent"]);
    has(&text, &[&format!("/coreos.com/network/subnets/{ours}.0-24")]);
    has(
        &text,
        &[
            r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":""#,
        ],
    );
    has(&text, &[&format!("--bip={ours}.1/24"), "--mtu=1450"]);
    has(&text, &["ttl=62"]);
    has(&text, &["1 ", &format!("{ours}.1 ")]);
    has(&text, &["2 ", &format!("{theirs}.0 ")]);
}

#[test]
fn containers_of_two_dockerds_reach_each_other_over_plain_routes() {
    let text = demo("host-gw");

    let [ours, theirs] = subnets(&text);
    assert_eq!(value(&text, "FLANNEL_MTU"), "1500");
    has(&text, &[&format!("{theirs}.0/24 via 192.0.2.2 dev eth0")]);
    has(&text, &[&format!("--bip={ours}.1/24"), "--mtu=1500"]);
    has(&text, &["ttl=62"]);
    assert!(!text.contains("flannel.1"), "{text}");
}

/// How long containers may be out of each other's reach once engine and agent are up.
const REACH: Duration = Duration::from_secs(5);

/// A host whose FORWARD drops, as Docker has it where nobody has switched forwarding on before.
struct Site {
    host: Host,
    agent: Option<Process>,
    dockerd: Dockerd,
}

impl Site {
    fn new(lab: &Lab, number: usize) -> Self {
        let host = lab.host(number);
        host.run(&["iptables", "-w", "-P", "FORWARD", "DROP"]);
        Self { dockerd: Dockerd::on(&host), agent: None, host }
    }

    fn start_agent(&mut self) {
        self.agent = Some(self.host.agent(&["--ip-masq"]));
        self.host.subnet();
    }

    /// Has a container listen at a port that is not published, also when its engine comes back.
    fn start_container(&self) {
        self.dockerd.import_busybox();
        let server = ["/bin/busybox", "httpd", "-f", "-p", "7000"];
        let run = ["run", "-d", "--name", "box", "--restart", "always", "--stop-signal", "KILL", "busybox"];
        self.dockerd.docker(&[&run[..], &server].concat());
    }

    fn reaches(&self, other: &Self) -> bool {
        let there = other.dockerd.address("box");
        let connect = ["/bin/busybox", "nc", "-w", "1", &there, "7000", "-e", "/bin/busybox", "true"];
        self.dockerd.ask(&[&["exec", "box"], &connect[..]].concat()).is_ok()
    }

    /// As after a reboot: no engine, no agent, no rules.
    fn forget_rules(&self) {
        for words in ["-F", "-X", "-t nat -F", "-t nat -X"] {
            self.host.run(&[&["iptables", "-w"], &words.split(' ').collect::<Vec<_>>()[..]].concat());
        }
    }

    /// The rules of ours, to be counted.
    fn rules(&self) -> usize {
        let rules = self.host.run(&["iptables-save"]);
        rules.lines().filter(|line| line.contains("FLANNEL-")).count()
    }
}

/// How long it takes from now on until containers reach each other, both ways.
fn until_reached(sites: &[Site; 2]) -> Duration {
    let start = Instant::now();
    until("containers reach each other", || sites[0].reaches(&sites[1]) && sites[1].reaches(&sites[0]));
    start.elapsed()
}

fn two_sites(lab: &Lab) -> [Site; 2] {
    lab.put_config("/coreos.com/network", r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
    [1, 2].map(|number| Site::new(lab, number))
}

fn tools() -> bool {
    ["dockerd", "docker", "busybox", "etcd"].into_iter().all(need)
}

#[test]
fn containers_reach_each_other_whoever_starts_first_and_after_each_restart_of_docker() {
    if !tools() {
        return;
    }
    let lab = Lab::new(2);
    let mut sites = two_sites(&lab);
    let mut longest = Duration::ZERO;
    let mut reached = |sites: &[Site; 2], when: &str| {
        let took = until_reached(sites);
        assert!(took < REACH, "{when}: {took:?}");
        longest = longest.max(took);
    };

    // The agent and then docker.
    sites.iter_mut().for_each(Site::start_agent);
    for site in &mut sites {
        site.dockerd.start();
        site.start_container();
    }
    reached(&sites, "docker after the agent");

    let rules = sites.each_ref().map(Site::rules);
    for round in 0..20 {
        let dockerd = &mut sites[round % 2].dockerd;
        dockerd.stop();
        dockerd.start();
        reached(&sites, &format!("restart {round} of docker"));
    }
    assert_eq!(sites.each_ref().map(Site::rules), rules);

    // Docker and then the agent, with nothing left of it but subnet.env.
    for site in &mut sites {
        site.dockerd.stop();
        site.agent = None;
        site.forget_rules();
        site.dockerd.start();
    }
    assert!(!sites[0].reaches(&sites[1]), "without our rules nothing is to pass");
    sites.iter_mut().for_each(Site::start_agent);
    reached(&sites, "the agent after docker");

    say(&format!("containers reached each other within {longest:?} of each start"));
}

#[test]
fn the_rules_of_docker_in_files_are_those_of_a_real_one() {
    if !tools() {
        return;
    }
    let lab = Lab::new(1);
    lab.put_config("/coreos.com/network", r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let mut site = Site::new(&lab, 1);
    site.start_agent();
    site.dockerd.start();
    site.start_container();
    site.dockerd.docker(&[
        "run",
        "-d",
        "-p",
        "8080:80",
        "--stop-signal",
        "KILL",
        "busybox",
        "/bin/busybox",
        "sleep",
        "9999",
    ]);

    let version = site.dockerd.docker(&["version", "-f", "{{.Server.Version}}"]);
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    let (file, options): (_, &[&str]) = match (numbers.next().unwrap(), numbers.next().unwrap()) {
        (20, 10) => ("docker-20.10.iptables", &[]),
        (24, _) => ("docker-24.iptables", &[]),
        (27, _) => ("docker-27.iptables", &[]),
        (28, 0 | 1) => ("docker-28.0.iptables", &[]),
        (28, 2) => ("docker-28.2.iptables", &["--allow-direct-routing"]),
        (29, _) => ("docker-29.iptables", &["--allow-direct-routing", "--bridge-accept-fwmark"]),
        _ => return announce(&format!("there are no rules of docker {version} in a file")),
    };
    let subnet = site.host.subnet();
    let expected = fixture(file, 1, options).replace("10.5.1.", &format!("{subnet}."));
    let rules = |text: &str| -> Vec<String> {
        let rules = text.lines().filter(|line| line.starts_with("-A") && !line.contains("FLANNEL-"));
        rules.map(str::to_owned).collect()
    };
    let mut real = String::new();
    for table in ["raw", "filter", "nat"] {
        real += &site.host.run(&["iptables-save", "-t", table]);
    }

    assert_eq!(rules(&real), rules(&expected), "docker {version}");
}
