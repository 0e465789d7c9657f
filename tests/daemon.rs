//! Rung 7: real daemons on hosts of their own, with a real etcd and a real kernel.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use flannel_tests::lab::{self, Host, Lab, Ping, Process, until};
use flannel_tests::say;
use nix::sys::signal::Signal;

const PREFIX: &str = "/coreos.com/network";
const VXLAN: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// Two hosts with agents, each with the bridge address of its subnet, and routes to each other.
struct Pair {
    lab: Lab,
    agents: [Process; 2],
    subnets: [String; 2],
}

impl Pair {
    fn new(config: &str, flags: &[&str]) -> Self {
        let lab = Lab::new(2);
        lab.put_config(PREFIX, config);
        let agents = [lab.host(1).agent(flags), lab.host(2).agent(flags)];
        let subnets = [lab.host(1).subnet(), lab.host(2).subnet()];
        for (host, subnet) in [(1, &subnets[0]), (2, &subnets[1])] {
            lab.host(host).bridge(subnet);
            until("the hosts have routes", || lab.host(host).routes() == 1);
        }
        Self { lab, agents, subnets }
    }

    fn first(&self) -> Host {
        self.lab.host(1)
    }

    /// Starts a ping from the first host's bridge to the second's.
    fn ping(&self, count: u32, flags: &[&str]) -> Ping {
        self.first().ping(&self.subnets[0], &self.subnets[1], count, flags)
    }
}

#[test]
fn two_hosts_reach_each_other_over_vxlan() {
    let pair = Pair::new(VXLAN, &["--ip-masq"]);
    let [ours, theirs] = &pair.subnets;
    let host = pair.first();

    let (lost, ping) = pair.ping(5, &["-M", "do", "-s", "1422"]).lost();

    assert_eq!(lost, 0, "{ping}");
    assert_eq!(
        fs::read_to_string(host.subnet_file()).unwrap(),
        format!(
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={ours}.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        )
    );
    let device = host.run(&["ip", "-d", "link", "show", "flannel.1"]);
    assert!(
        device.contains("vxlan id 1 local 192.168.77.1 dev eth0") && device.contains("nolearning"),
        "{device}"
    );
    let addresses = host.run(&["ip", "-4", "-o", "addr", "show", "flannel.1"]);
    assert!(addresses.contains(&format!("{ours}.0/32")), "{addresses}");
    let routes = host.run(&["ip", "route"]);
    assert!(routes.contains(&format!("{theirs}.0/24 via {theirs}.0 dev flannel.1")), "{routes}");
    let leases = pair.lab.leases(PREFIX);
    let mac = host.run(&["cat", "/sys/class/net/flannel.1/address"]);
    assert!(leases.contains(&(
        format!("{PREFIX}/subnets/{ours}.0-24"),
        format!(
            r#"{{"PublicIP":"192.168.77.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
            mac.trim()
        )
    )), "{leases:?}");
}

#[test]
fn two_hosts_reach_each_other_over_plain_routes() {
    let pair = Pair::new(HOST_GW, &[]);
    let theirs = &pair.subnets[1];

    let (lost, ping) = pair.ping(5, &["-M", "do", "-s", "1472"]).lost();

    assert_eq!(lost, 0, "{ping}");
    assert!(fs::read_to_string(pair.first().subnet_file()).unwrap().contains("FLANNEL_MTU=1500\n"));
    let routes = pair.first().run(&["ip", "route"]);
    assert!(routes.contains(&format!("{theirs}.0/24 via 192.168.77.2 dev eth0")), "{routes}");
    assert!(!pair.first().run(&["ip", "link"]).contains("flannel"));
}

#[test]
fn direct_routing_takes_the_plain_way_to_a_host_on_the_same_network() {
    let pair = Pair::new(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#, &[]);
    let theirs = &pair.subnets[1];

    let (lost, ping) = pair.ping(5, &[]).lost();

    assert_eq!(lost, 0, "{ping}");
    let routes = pair.first().run(&["ip", "route"]);
    assert!(routes.contains(&format!("{theirs}.0/24 via 192.168.77.2 dev eth0")), "{routes}");
    assert!(pair.first().run(&["ip", "link"]).contains("flannel.1"));
    assert_eq!(pair.first().run(&["bridge", "fdb", "show", "dev", "flannel.1"]), "");
}

#[test]
fn a_blackhole_holds_what_no_bridge_takes_and_goes_with_its_flag() {
    let lab = Lab::new(1);
    lab.put_config(PREFIX, VXLAN);
    let host = lab.host(1);
    let mut agent = host.agent(&["--ip-blackhole-route"]);
    let subnet = host.subnet();
    let blackholes = || host.run(&["ip", "route", "show", "type", "blackhole"]);
    let route = format!("blackhole {subnet}.0/24 proto 76 metric 4294967295");
    until("the route is there", || blackholes().contains(&route) || blackholes().contains("proto flannel"));

    host.bridge(&subnet);
    let taken = host.run(&["ip", "route", "get", &format!("{subnet}.9")]);
    host.run(&["ip", "route", "del", "blackhole", &format!("{subnet}.0/24"), "metric", "4294967295"]);
    until("the route is back", || blackholes().contains(&format!("{subnet}.0/24")));
    agent.kill();
    let agent = host.agent(&[]);

    assert!(!taken.contains("eth0") && !taken.contains("flannel.1"), "{taken}");
    until("the route is gone", || blackholes().is_empty());
    drop(agent);
}

#[test]
fn alloc_leases_a_subnet_and_makes_nothing_and_an_unknown_key_is_named() {
    let lab = Lab::new(1);
    lab.put_config(PREFIX, r#"{"Network":"10.5.0.0/16","SubnetLenght":24,"Backend":{"Type":"alloc"}}"#);
    let host = lab.host(1);
    let links = host.run(&["ip", "-br", "link"]);

    let agent = host.agent(&["--iptables-forward-rules=false"]);
    let subnet = host.subnet();

    assert_eq!(host.run(&["ip", "-br", "link"]), links);
    let value = r#"{"PublicIP":"192.168.77.1","PublicIPv6":null}"#.to_owned();
    assert_eq!(lab.leases(PREFIX), [(format!("{PREFIX}/subnets/{subnet}.0-24"), value)]);
    agent.until_logged("SubnetLenght");
}

#[test]
fn a_kill_and_a_restart_lose_no_packet_of_a_running_flow() {
    for config in [VXLAN, HOST_GW] {
        let mut pair = Pair::new(config, &["--ip-masq"]);
        let macs = || pair.lab.host(1).run(&["ip", "-br", "link"]);
        let (before, leases) = (macs(), pair.lab.leases(PREFIX));

        let ping = pair.ping(200, &[]);
        for index in [0, 1] {
            pair.agents[index].kill();
            let host = pair.lab.host(index + 1);
            fs::remove_file(host.subnet_file()).unwrap();
            pair.agents[index] = host.agent(&["--ip-masq"]);
            assert_eq!(host.subnet(), pair.subnets[index]);
        }
        let (lost, ping) = ping.lost();

        assert_eq!(lost, 0, "{ping}");
        assert_eq!(pair.lab.host(1).run(&["ip", "-br", "link"]), before);
        assert_eq!(pair.lab.leases(PREFIX), leases);
        assert_eq!(
            pair.lab.etcdctl(&["lease", "list"]).lines().filter(|line| !line.starts_with("found")).count(),
            2
        );
    }
}

#[test]
fn routes_change_their_form_without_a_lost_packet_and_leave_nothing_behind() {
    let mut pair = Pair::new(VXLAN, &[]);
    let nexthops = |pair: &Pair| pair.first().run(&["ip", "nexthop"]).lines().count();
    assert_eq!(nexthops(&pair), 0);

    let ping = pair.ping(300, &[]);
    for (mode, count) in [("nexthop", 1), ("plain", 0), ("nexthop", 1), ("auto", 0)] {
        pair.agents[0].kill();
        let host = pair.first();
        fs::remove_file(host.subnet_file()).unwrap();
        pair.agents[0] = host.agent(&[&format!("--route-mode={mode}")]);
        assert_eq!(host.subnet(), pair.subnets[0]);
        assert_eq!(nexthops(&pair), count, "{mode}");
        assert_eq!(host.routes(), 1, "{mode}");
    }
    let (lost, ping) = ping.lost();

    assert_eq!(lost, 0, "{ping}");
}

#[test]
fn a_host_whose_address_changes_is_reached_again_within_three_seconds() {
    for (config, first_away) in [(VXLAN, true), (VXLAN, false), (HOST_GW, true)] {
        let pair = Pair::new(config, &[]);
        let host = pair.lab.host(2);
        let leases = pair.lab.leases(PREFIX);
        let revision = |pair: &Pair| {
            let key = format!("{PREFIX}/subnets/{}.0-24", pair.subnets[1]);
            let shown = pair.lab.etcdctl(&["get", &key, "-w", "fields"]);
            let version = shown.lines().find(|line| line.starts_with("\"Version\"")).unwrap().to_owned();
            version.rsplit(' ').next().unwrap().parse::<u32>().unwrap()
        };
        let before = revision(&pair);

        let ping = pair.ping(400, &[]);
        let (away, there) = (["addr", "del", "192.168.77.2/24"], ["addr", "add", "192.168.77.102/24"]);
        host.run(&["sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1"]);
        for words in if first_away { [away, there] } else { [there, away] } {
            host.run(&[&["ip"], words.as_slice(), &["dev", "eth0"]].concat());
        }
        host.run(&["ip", "route", "replace", "default", "via", "192.168.77.254"]);
        let (lost, ping) = ping.lost();

        assert!(lost <= 150, "{config}: {lost} of 400 at 50 a second: {ping}");
        assert_eq!(host.subnet(), pair.subnets[1]);
        let now = pair.lab.leases(PREFIX);
        assert_eq!(now.len(), leases.len());
        assert!(
            now.iter().any(|(key, value)| key.contains(&pair.subnets[1]) && value.contains("192.168.77.102"))
        );
        assert_eq!(revision(&pair), before + 1, "one write");
        say(&format!("{config}: another address, {lost} packets lost at 50 a second"));
    }
}

#[test]
fn a_host_whose_default_route_moves_to_another_interface_is_reached_there() {
    let lab = Lab::new(2);
    lab.put_config(PREFIX, VXLAN);
    let (first, second) = (lab.host(1), lab.host(2));
    let wire = lab.wire();
    // The second host has a second interface to the same wire.
    second.run(&["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "spare"]);
    second.run(&["ip", "link", "set", "spare", "netns", &wire]);
    lab.run_on_wire(&["ip", "link", "set", "spare", "master", "br0", "up"]);
    second.run(&["ip", "link", "set", "eth1", "up"]);
    second.run(&["ip", "addr", "add", "192.168.77.202/24", "dev", "eth1"]);
    let (_first, agent) = (first.agent(&[]), second.agent(&[]));
    let subnets = [first.subnet(), second.subnet()];
    first.bridge(&subnets[0]);
    second.bridge(&subnets[1]);
    until("both have routes", || first.routes() == 1 && second.routes() == 1);

    let ping = first.ping(&subnets[0], &subnets[1], 400, &[]);
    second.run(&["ip", "route", "replace", "default", "via", "192.168.77.254", "dev", "eth1"]);
    agent.until_logged("following the interface between the hosts");
    let (lost, ping) = ping.lost();

    assert!(lost <= 150, "{lost} of 400 at 50 a second: {ping}");
    assert!(second.run(&["ip", "-d", "link", "show", "flannel.1"]).contains("local 192.168.77.202 dev eth1"));
    assert_eq!(second.subnet(), subnets[1]);
    say(&format!("the default route moved, {lost} packets lost at 50 a second"));
}

#[test]
fn the_subnet_of_the_file_is_asked_for_again_when_the_key_is_gone() {
    let mut pair = Pair::new(VXLAN, &[]);
    pair.agents[0].kill();
    pair.lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{}.0-24", pair.subnets[0])]);

    pair.agents[0] = pair.first().agent(&[]);

    until("the key is back", || pair.lab.leases(PREFIX).len() == 2);
    assert_eq!(pair.first().subnet(), pair.subnets[0]);
    assert!(pair.lab.leases(PREFIX).iter().any(|(key, _)| key.contains(&pair.subnets[0])));
}

#[test]
fn a_reservation_stays_one_while_we_run_and_when_we_start_again() {
    let mut pair = Pair::new(VXLAN, &[]);
    let key = format!("{PREFIX}/subnets/{}.0-24", pair.subnets[0]);
    let value = pair.lab.leases(PREFIX).into_iter().find(|(name, _)| *name == key).unwrap().1;
    let is_reserved = || !pair.lab.etcdctl(&["get", &key, "-w", "json"]).contains("\"lease\"");
    assert!(!is_reserved());

    pair.lab.etcdctl(&["put", &key, &value]);
    pair.agents[0].until_logged("the tenure of our lease was changed");
    assert!(is_reserved());
    pair.agents[0].kill();
    pair.agents[0] = pair.first().agent(&[]);
    pair.agents[0].until_logged("host in sync");

    pair.agents[0].until_logged("it is a reservation");
    assert!(is_reserved());
    assert_eq!(pair.first().subnet(), pair.subnets[0]);
}

#[test]
fn a_device_that_does_not_fit_the_config_any_more_is_made_anew_with_its_mac() {
    let mut pair = Pair::new(VXLAN, &[]);
    let host = pair.first();
    let mac = || host.run(&["cat", "/sys/class/net/flannel.1/address"]);
    let (before, leases) = (mac(), pair.lab.leases(PREFIX));
    pair.lab.put_config(
        PREFIX,
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","Port":4789,"MTU":1400,"Learning":true,"GBP":true}}"#,
    );

    for index in [0, 1] {
        pair.agents[index].kill();
        let host = pair.lab.host(index + 1);
        fs::remove_file(host.subnet_file()).unwrap();
        pair.agents[index] = host.agent(&[]);
        assert_eq!(host.subnet(), pair.subnets[index]);
    }

    let device = host.run(&["ip", "-d", "link", "show", "flannel.1"]);
    for words in ["dstport 4789", "mtu 1350", "gbp"] {
        assert!(device.contains(words), "{words} in {device}");
    }
    assert!(!device.contains("nolearning"), "{device}");
    assert_eq!((mac(), pair.lab.leases(PREFIX)), (before, leases));
    let (lost, ping) = pair.ping(5, &["-M", "do", "-s", "1322"]).lost();
    assert_eq!(lost, 0, "{ping}");
}

#[test]
fn what_a_peer_left_behind_while_we_were_away_goes_and_foreign_things_stay() {
    let mut pair = Pair::new(VXLAN, &[]);
    let host = pair.first();
    pair.agents[0].kill();
    pair.agents[1].kill();
    pair.lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{}.0-24", pair.subnets[1])]);
    // 10.5.0.0/24 is inside the network and never leased, whatever the dice say.
    for foreign in [
        vec!["ip", "route", "add", "172.16.0.0/12", "via", "192.168.77.9"],
        vec!["ip", "route", "add", "172.31.0.0/16", "dev", "flannel.1"],
        vec!["ip", "neigh", "add", "192.168.77.9", "lladdr", "0e:00:00:00:00:99", "dev", "eth0"],
        vec!["ip", "route", "add", "10.5.0.0/24", "via", "192.168.77.9", "proto", "static"],
    ] {
        host.run(&foreign);
    }

    let agent = host.agent(&["--audit-interval=1"]);

    until("the stale route is gone", || {
        !host.run(&["ip", "route"]).contains(&format!("{}.0/24", pair.subnets[1]))
    });
    until("the stale entries are gone", || {
        host.run(&["bridge", "fdb", "show", "dev", "flannel.1"]).is_empty()
            && host.run(&["ip", "neigh", "show", "dev", "flannel.1", "nud", "permanent"]).is_empty()
    });
    let (routes, neighbours) = (host.run(&["ip", "route"]), host.run(&["ip", "neigh"]));
    for foreign in
        ["172.16.0.0/12 via 192.168.77.9", "172.31.0.0/16 dev flannel.1", "10.5.0.0/24 via 192.168.77.9"]
    {
        assert!(routes.contains(foreign), "{routes}");
    }
    assert!(neighbours.contains("0e:00:00:00:00:99"), "{neighbours}");
    assert_eq!(agent.log().matches("leads to no lease").count(), 1, "{}", agent.log());
}

#[test]
fn a_deleted_range_takes_no_route_and_our_own_key_is_back_within_two_seconds() {
    let lab = Lab::new(1);
    lab.put_config(PREFIX, VXLAN);
    let put = |number: u32| {
        let value = format!(
            r#"{{"PublicIP":"192.168.77.10{number}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:00:0{number}"}}}}"#
        );
        lab.etcdctl(&["put", &format!("{PREFIX}/subnets/10.5.{number}.0-24"), &value]);
    };
    (1..=8).for_each(put);
    let host = lab.host(1);
    let agent = host.agent(&["--removal-grace=8", "--healthz-port=8471"]);
    let own = format!("{PREFIX}/subnets/{}.0-24", host.subnet());
    until("all peers have a route", || host.routes() == 8);
    let kernel = || [host.run(&["ip", "route"]), host.run(&["ip", "neigh", "show", "dev", "flannel.1"])];
    let before = kernel();
    let value = lab.leases(PREFIX).into_iter().find(|(key, _)| *key == own).unwrap().1;

    let start = Instant::now();
    lab.etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/")]);
    until("our own key is back", || !lab.leases(PREFIX).is_empty());
    let back = start.elapsed();
    until("the page says so", || host.page(8471, "/readyz").1.contains("holding 8 peers that vanished"));
    put(8);

    assert!(back < Duration::from_secs(2), "{back:?}");
    assert!(lab.leases(PREFIX).contains(&(own, value)));
    assert_eq!(kernel(), before);
    until("the page says so", || {
        let (code, body) = host.page(8471, "/readyz");
        code == 200 && body.starts_with("flanneld is ready\nholding 7 peers that vanished from etcd at once")
    });
    assert!(start.elapsed() < Duration::from_secs(8), "this machine is too slow for this test");

    until("those who are still gone are believed gone", || host.routes() == 1);
    let held = start.elapsed();
    assert!(held >= Duration::from_secs(8) && held < Duration::from_secs(12), "{held:?}");
    assert!(host.run(&["ip", "route"]).contains("10.5.8.0/24 via 10.5.8.0 dev flannel.1"));
    until("the page says no more of it", || host.page(8471, "/readyz") == (200, "flanneld is ready".into()));
    let log = agent.log();
    for words in
        ["many peers vanished from the store at once", "still lacks these peers", "no peer is held any more"]
    {
        assert_eq!(log.matches(words).count(), 1, "{words} in {log}");
    }
}

#[test]
fn a_signal_ends_it_at_once_with_success_and_leaves_everything() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut pair = Pair::new(VXLAN, &[]);
        let state =
            |host: Host| [host.run(&["ip", "route"]), host.run(&["ip", "neigh", "show", "nud", "permanent"])];
        let (before, leases) = (state(pair.first()), pair.lab.leases(PREFIX));

        let start = Instant::now();
        pair.agents[0].signal(signal);
        let status = pair.agents[0].ended();

        assert!(status.success(), "{status}");
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        assert_eq!(state(pair.first()), before);
        assert_eq!(pair.lab.leases(PREFIX), leases);
        assert!(pair.first().subnet_file().exists());
    }
}

#[test]
fn a_signal_ends_a_start_that_waits() {
    let lab = Lab::without_etcd(1);
    let mut agent = lab.host(1).agent(&[]);
    agent.until_logged("waiting for a network config");

    let start = Instant::now();
    agent.signal(Signal::SIGTERM);
    let status = agent.ended();

    assert!(
        status.success() && start.elapsed() < Duration::from_secs(1),
        "{status} after {:?}",
        start.elapsed()
    );
}

#[test]
fn it_waits_for_etcd_and_then_for_a_config_and_says_so_once() {
    let mut lab = Lab::without_etcd(1);
    let host = lab.host(1);
    let mut agent = host.agent(&["--v=0"]);
    agent.until_logged("no answer from http://192.168.77.254:2379");
    assert!(agent.runs());

    lab.start_etcd();
    agent.until_logged("no network config at /coreos.com/network/config");
    lab.put_config(PREFIX, r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":99999999}}"#);
    agent.until_logged("Backend.VNI is 99999999");
    assert_eq!(lab.leases(PREFIX), []);
    assert!(!host.run(&["ip", "link"]).contains("flannel") && !host.subnet_file().exists());
    lab.put_config(PREFIX, VXLAN);
    host.subnet();

    let log = agent.log();
    for words in ["no answer from", "no network config at", "Backend.VNI is"] {
        assert_eq!(log.matches(words).count(), 1, "{words} in {log}");
    }
}

#[test]
fn readiness_is_told_by_page_and_to_systemd() {
    let lab = Lab::new(1);
    let host = lab.host(1);
    fs::create_dir_all(&host.directory).unwrap();
    let socket = host.directory.join("notify");
    let systemd = UnixDatagram::bind(&socket).unwrap();
    systemd.set_read_timeout(Some(lab::PATIENCE)).unwrap();
    let mut command = host.command(lab::flanneld());
    command
        .arg(format!("--etcd-endpoints={}", lab::ETCD))
        .arg(format!("--subnet-file={}", host.subnet_file().display()));
    command.arg("--healthz-port=8471").env("NOTIFY_SOCKET", &socket);
    command.arg(format!("--state-dir={}", host.state_dir().display()));
    let agent = Process::start(command, host.directory.join("agent.log"));
    agent.until_logged("no network config");

    assert_eq!(host.page(8471, "/healthz"), (200, "flanneld is running".into()));
    let (code, body) = host.page(8471, "/readyz");
    assert_eq!((code, body.lines().next()), (503, Some("flanneld is not ready yet")), "{body}");
    assert!(body.contains("waiting for a network config: no network config at"), "{body}");
    assert_eq!(host.page(8471, "/other").0, 404);

    lab.put_config(PREFIX, VXLAN);
    let mut message = [0; 64];
    let length = systemd.recv(&mut message).unwrap();
    assert_eq!(&message[..length], b"READY=1\n");
    assert!(host.subnet_file().exists());
    until("the page says ready", || host.page(8471, "/readyz") == (200, "flanneld is ready".into()));
}

#[test]
fn a_full_range_is_waited_for_and_the_first_subnet_freed_is_taken() {
    let lab = Lab::new(2);
    lab.put_config(PREFIX, r#"{"Network":"10.5.0.0/22","SubnetMin":"10.5.2.0","SubnetMax":"10.5.2.0","Backend":{"Type":"vxlan"}}"#);
    let _first = lab.host(1).agent(&[]);
    assert_eq!(lab.host(1).subnet(), "10.5.2");

    let mut second = lab.host(2).agent(&[]);
    second.until_logged("no free /24 left in 10.5.0.0/22");
    assert!(second.log().contains("/coreos.com/network/config"), "{}", second.log());
    drop(_first);
    lab.etcdctl(&["del", "/coreos.com/network/subnets/10.5.2.0-24"]);

    assert_eq!(lab.host(2).subnet(), "10.5.2");
    assert!(second.runs());
}

#[test]
fn a_host_that_waits_for_a_subnet_follows_its_address_meanwhile() {
    let lab = Lab::new(2);
    lab.put_config(PREFIX, r#"{"Network":"10.5.0.0/22","SubnetMin":"10.5.2.0","SubnetMax":"10.5.2.0","Backend":{"Type":"vxlan"}}"#);
    let (first, host) = (lab.host(1).agent(&[]), lab.host(2));
    assert_eq!(lab.host(1).subnet(), "10.5.2");
    let second = host.agent(&[]);
    second.until_logged("no free /24 left in 10.5.0.0/22");
    // By now it has had its look.
    std::thread::sleep(Duration::from_secs(3));

    for (from, to) in [(2, 102), (102, 103)] {
        host.run(&["ip", "addr", "add", &format!("192.168.77.{to}/24"), "dev", "eth0"]);
        host.run(&["ip", "addr", "del", &format!("192.168.77.{from}/24"), "dev", "eth0"]);
        host.run(&["ip", "addr", "replace", &format!("192.168.77.{to}/24"), "dev", "eth0"]);
        host.run(&["ip", "route", "replace", "default", "via", "192.168.77.254"]);
        second.until_logged(&format!("address=192.168.77.{to}"));
    }
    drop(first);
    lab.etcdctl(&["del", "/coreos.com/network/subnets/10.5.2.0-24"]);

    assert_eq!(host.subnet(), "10.5.2");
    assert!(lab.leases(PREFIX).iter().any(|(_, value)| value.contains("192.168.77.103")));
    assert_eq!(second.log().matches("this host is at another address now").count(), 2, "{}", second.log());
}

#[test]
fn our_deleted_key_comes_back_under_the_same_subnet_without_a_lost_packet() {
    let pair = Pair::new(VXLAN, &[]);
    let key = format!("{PREFIX}/subnets/{}.0-24", pair.subnets[0]);
    let before = pair.lab.leases(PREFIX);

    let ping = pair.ping(150, &[]);
    for _ in 0..3 {
        pair.lab.etcdctl(&["del", &key]);
        until("the key is back", || pair.lab.leases(PREFIX) == before);
    }
    let (lost, ping) = ping.lost();

    // The peer heard of a removal and of a return; the flow may pause for the moment between.
    assert!(lost < 20, "{ping}");
    until("the peer has the route again", || pair.lab.host(2).routes() == 1);
}

#[test]
fn containers_pass_a_forward_policy_of_drop() {
    let pair = Pair::new(VXLAN, &[]);
    let host = pair.first();

    until("the rules stand", || host.run(&["iptables", "-S", "FORWARD"]).contains("FLANNEL-FWD"));

    let rules = host.run(&["iptables", "-S", "FLANNEL-FWD"]);
    assert_eq!(
        rules,
        "-N FLANNEL-FWD\n\
         -A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
         -A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n"
    );
}

#[test]
fn two_agents_of_one_host_reach_over_their_own_backend_only() {
    let lab = Lab::new(2);
    lab.put_config("/one", VXLAN);
    lab.put_config("/two", r#"{"Network":"10.6.0.0/16","Backend":{"Type":"host-gw"}}"#);
    let mut agents = vec![];
    for number in [1, 2] {
        let host = lab.host(number);
        for name in ["one", "two"] {
            let file = host.directory.join(format!("{name}.env"));
            let prefix = format!("--etcd-prefix=/{name}");
            agents.push(host.daemon(lab::flanneld(), name, &file, &[&prefix, "--iptables-resync=1"]));
        }
    }
    let subnet =
        |host: usize, name: &str| lab::subnet_of(&lab.host(host).directory.join(format!("{name}.env")));
    for number in [1, 2] {
        let host = lab.host(number);
        for name in ["one", "two"] {
            let bridge = format!("pods-{name}");
            host.run(&["ip", "link", "add", &bridge, "type", "bridge"]);
            host.run(&["ip", "addr", "add", &format!("{}.1/24", subnet(number, name)), "dev", &bridge]);
            host.run(&["ip", "link", "set", &bridge, "up"]);
        }
    }
    for name in ["one", "two"] {
        let (from, to) = (format!("{}.1", subnet(1, name)), format!("{}.1", subnet(2, name)));
        until("the hosts reach each other", || {
            lab::output(&[
                "ip",
                "netns",
                "exec",
                &lab.host(1).namespace,
                "ping",
                "-c1",
                "-W1",
                "-I",
                &from,
                &to,
            ])
            .status
            .success()
        });
    }

    let routes = lab.host(1).run(&["ip", "route"]);
    let by = |network: &str| {
        routes.lines().filter(|line| line.starts_with(network) && line.contains(" via ")).collect::<Vec<_>>()
    };
    assert!(by("10.5.").len() == 1 && by("10.5.")[0].contains("dev flannel.1"), "{routes}");
    assert!(by("10.6.").len() == 1 && by("10.6.")[0].contains("via 192.168.77.2 dev eth0"), "{routes}");
    // Both agents' rules share a chain and neither takes the other's away.
    for number in [1, 2] {
        let rules = || lab.host(number).run(&["iptables", "-S", "FLANNEL-FWD"]);
        until("both agents' rules stand", || {
            rules().contains("10.5.0.0/16") && rules().contains("10.6.0.0/16")
        });
    }
    // A rule that is written anew has a new handle.
    let handles = || {
        let list =
            |number| lab.host(number).run(&["nft", "-a", "list", "chain", "ip", "filter", "FLANNEL-FWD"]);
        let text = [1, 2].map(list).concat();
        let handles = text.lines().filter_map(|line| line.split_once("# handle "));
        handles.map(|(_, handle)| handle.to_owned()).collect::<Vec<_>>()
    };
    let before = handles();
    assert_eq!(before.len(), 2 * 5, "{before:?}");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(handles(), before, "the agents rewrite each other's rules");
}

#[test]
fn sixty_agents_at_once_on_sixty_one_subnets_all_get_one_and_all_mesh() {
    const HOSTS: usize = 60;
    let lab = Lab::new(HOSTS);
    lab.put_config(
        PREFIX,
        r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.10.0","SubnetMax":"10.5.70.0","Backend":{"Type":"vxlan"}}"#,
    );
    let agents: Vec<Process> =
        (1..=HOSTS).map(|number| lab.host(number).agent(&["--iptables-forward-rules=false"])).collect();

    let mut subnets: Vec<String> = (1..=HOSTS).map(|number| lab.host(number).subnet()).collect();
    subnets.sort();
    subnets.dedup();
    assert_eq!(subnets.len(), HOSTS);
    assert_eq!(lab.leases(PREFIX).len(), HOSTS);
    for number in 1..=HOSTS {
        until("every host has a route to every other", || lab.host(number).routes() == HOSTS - 1);
    }
    drop(agents);
}

#[test]
fn a_wrong_command_line_starts_nothing_and_exits_with_2() {
    let output = Command::new(lab::flanneld()).args(["-nonsense", "-v=x"]).output().unwrap();

    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "flanneld: --nonsense: there is no such flag\nflanneld: --v is \"x\": must be a whole number\n\
         flanneld: nothing was started; --help lists the flags\n"
    );
}

#[test]
fn an_interface_that_is_not_there_ends_the_start_with_the_candidates() {
    let lab = Lab::new(1);
    lab.put_config(PREFIX, VXLAN);
    let mut agent = lab.host(1).agent(&["--iface=eth7"]);

    let status = agent.ended();

    assert_eq!(status.code(), Some(1));
    let log = agent.log();
    assert!(log.contains("--iface eth7: there is no such interface"), "{log}");
    assert!(log.contains("eth0 (192.168.77.1/24"), "{log}");
    assert_eq!(lab.leases(PREFIX), []);
}

/// Takes from a host what a reboot takes.
fn reboot(host: &Host) {
    fs::remove_file(host.subnet_file()).unwrap();
    host.run(&["ip", "link", "del", "flannel.1"]);
}

/// Three hosts whose leases everybody remembers.
fn remembered(lab: &Lab) -> Vec<Process> {
    lab.put_config(PREFIX, VXLAN);
    let agents: Vec<Process> = (1..=3).map(|host| lab.host(host).agent(&["--healthz-port=8471"])).collect();
    for host in 1..=3 {
        lab.host(host).subnet();
        until("the hosts have routes", || lab.host(host).routes() == 2);
    }
    agents
}

#[test]
fn a_host_that_boots_while_etcd_is_away_has_its_subnet_and_peers_in_two_seconds() {
    let mut lab = Lab::new(3);
    let mut agents = remembered(&lab);
    let host = lab.host(1);
    let (ours, theirs) = (host.subnet(), lab.host(2).subnet());
    host.bridge(&ours);
    lab.host(2).bridge(&theirs);
    let mac = host.run(&["cat", "/sys/class/net/flannel.1/address"]);
    agents[0].signal(Signal::SIGTERM);
    agents[0].ended();
    lab.etcd = None;
    reboot(&host);

    let start = Instant::now();
    agents[0] = host.agent(&["--healthz-port=8471"]);
    assert_eq!(host.subnet(), ours);
    until("the peers are there", || host.routes() == 2);
    let took = start.elapsed();

    say(&format!("boot without etcd: subnet.env and 2 peers after {took:?}"));
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(host.run(&["cat", "/sys/class/net/flannel.1/address"]), mac);
    let (lost, ping) = host.ping(&ours, &theirs, 10, &[]).lost();
    assert_eq!(lost, 0, "{ping}");
    let (code, page) = host.page(8471, "/readyz");
    assert!(code == 503 && page.contains("going by what this host remembers"), "{code} {page}");

    // A peer that went meanwhile: the truth wins.
    agents[2].kill();
    let ping = host.ping(&ours, &theirs, 300, &[]);
    lab.start_etcd();
    let gone = lab.host(3).subnet();
    lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{gone}.0-24")]);
    until("the host is ready", || host.page(8471, "/readyz").0 == 200);
    until("the peer that went is gone", || host.routes() == 1);
    let (lost, ping) = ping.lost();
    assert_eq!(lost, 0, "{ping}");
    assert_eq!(lab.leases(PREFIX).len(), 2);
    assert_eq!(host.subnet(), ours);
}

#[test]
fn a_config_that_changed_while_etcd_was_away_is_followed_when_it_answers() {
    let mut lab = Lab::new(3);
    let mut agents = remembered(&lab);
    let host = lab.host(1);
    // They are killed, so what they remember is what they wrote while they ran.
    until("the state is written", || host.state_dir().join("coreos.com-network.state").exists());
    agents.iter_mut().for_each(Process::kill);
    lab.put_config(PREFIX, r#"{"Network":"10.6.0.0/16","Backend":{"Type":"vxlan"}}"#);
    lab.etcd = None;
    reboot(&host);
    agents[0] = host.agent(&["--healthz-port=8471"]);
    host.subnet();

    lab.start_etcd();

    until("the host is in the other network", || {
        fs::read_to_string(host.subnet_file()).unwrap().contains("FLANNEL_SUBNET=10.6.")
    });
    until("the host is ready", || host.page(8471, "/readyz").0 == 200);
}

#[test]
fn a_state_file_that_cannot_be_believed_is_set_aside_with_a_word() {
    let mut lab = Lab::new(3);
    let mut agents = remembered(&lab);
    let host = lab.host(1);
    agents[0].signal(Signal::SIGTERM);
    agents[0].ended();
    let file = host.state_dir().join("coreos.com-network.state");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, &text[..text.len() - 1]).unwrap();
    lab.etcd = None;
    reboot(&host);

    agents[0] = host.agent(&[]);
    agents[0].until_logged("waiting for a network config");

    assert!(agents[0].log().contains("its checksum is wrong"), "{}", agents[0].log());
    assert!(!host.subnet_file().exists());
    lab.start_etcd();
    host.subnet();
}
