//! What is written to the kernel reads back equal, and nobody else's is touched.
//!
//! Each test has a network namespace of its own with an underlay `eth0`,
//! 192.168.0.1/24; our node has 10.5.1.0/24 of 10.5.0.0/16.
#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::thread;

use flannel_core::claim::Claim;
use flannel_core::diff::{Step, diff};
use flannel_core::host::{Changes, Failure, Network};
use flannel_core::state::{
    HostState, Key, Link, LinkKind, LinkName, MacAddr, ROUTE_PROTOCOL, ROUTE_PROTOCOL_BOOT, Route, RouteKey,
    Vxlan,
};
use flannel_core::underlay::Facts;
use flannel_linux::LinuxNetwork;
use flannel_tests::need;
use flannel_tests::netns::{Netns, in_netns};
use ipnetwork::IpNetwork;

fn name(text: &str) -> LinkName {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn flannel() -> LinkName {
    name("flannel.1")
}

fn claim() -> Claim {
    Claim { links: vec![flannel()], networks: vec![prefix("10.5.0.0/16")], underlay: Some(name("eth0")) }
}

fn vxlan() -> Vxlan {
    Vxlan {
        vni: 1,
        port: 8472,
        local: Some(ip("192.168.0.1")),
        lower: Some(name("eth0")),
        learning: false,
        gbp: false,
    }
}

fn device() -> Link {
    Link { kind: LinkKind::Vxlan(vxlan()), mac: MacAddr([0x0e, 0, 0, 0, 0, 1]), mtu: 1450, up: true }
}

/// Our device and its address.
fn node() -> HostState {
    node_with(device())
}

fn node_with(link: Link) -> HostState {
    let mut state = HostState::default();
    state.links.insert(flannel(), link);
    state.addresses.insert((flannel(), prefix("10.5.1.0/32")));
    state
}

fn via_flannel(gateway: IpAddr) -> Route {
    Route {
        link: flannel(),
        gateway: Some(gateway),
        onlink: true,
        protocol: ROUTE_PROTOCOL,
        decorated: false,
        nexthop: None,
    }
}

fn via_eth0(gateway: &str) -> Route {
    Route {
        link: name("eth0"),
        gateway: Some(ip(gateway)),
        onlink: false,
        protocol: ROUTE_PROTOCOL,
        decorated: false,
        nexthop: None,
    }
}

fn to(destination: &str) -> RouteKey {
    RouteKey::to(prefix(destination))
}

fn mac_of(number: u32) -> MacAddr {
    let [a, b, c, d] = number.to_be_bytes();
    MacAddr([0x0e, 1, a, b, c, d])
}

/// A node with so many peers, whose subnets are /24 up to 254 and /28 beyond.
fn peers(count: u32) -> HostState {
    let mut state = node();
    let size = if count <= 200 { 24 } else { 28 };
    for number in 2..count + 2 {
        let subnet = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 5, 2, 0)) + ((number - 2) << (32 - size)));
        let host = Ipv4Addr::from(u32::from(Ipv4Addr::new(192, 168, 0, 0)) + number);
        let mac = mac_of(number);
        let network = IpNetwork::new(subnet.into(), size).unwrap();
        state.neighbours.insert((flannel(), subnet.into()), mac);
        state.fdb.insert((flannel(), mac), host.into());
        state.routes.insert(RouteKey::to(network), via_flannel(subnet.into()));
    }
    state
}

/// The way to the kernel, with the claim of all these tests.
struct Host {
    netns: Netns,
    network: LinuxNetwork,
}

impl Host {
    async fn observe(&mut self) -> HostState {
        self.observe_as(&claim()).await
    }

    async fn observe_as(&mut self, claim: &Claim) -> HostState {
        self.network.observe(claim, None).await.unwrap().state
    }

    async fn apply(&mut self, steps: Vec<Step>) -> Vec<Failure> {
        self.network.apply(steps).await.unwrap()
    }

    async fn reconcile(&mut self, desired: &HostState) -> Vec<Failure> {
        let observed = self.observe().await;
        self.apply(diff(desired, &observed)).await
    }

    /// Writes the state and checks that it reads back.
    async fn hold(&mut self, desired: &HostState) {
        let failures = self.reconcile(desired).await;
        assert_eq!(failures, []);
        self.check(desired).await;
    }

    async fn check(&mut self, desired: &HostState) {
        let observed = self.observe().await;
        assert!(observed == *desired, "left: observed, right: desired\n{}", differing(&observed, desired));
    }

    async fn facts(&mut self, can_reach: Option<&str>) -> Facts {
        self.network.observe(&claim(), can_reach.map(ip)).await.unwrap().facts
    }

    fn run(&self, command: &str) -> String {
        self.netns.run(command)
    }

    /// What a command prints, one trimmed line each.
    fn lines(&self, command: &str) -> Vec<String> {
        let printed = self.run(command);
        printed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }
}

/// The lines that only one of two states has.
fn differing(one: &HostState, other: &HostState) -> String {
    let (one, other) = (one.to_string(), other.to_string());
    let only = |mark: &'static str, of: &str, not_of: &str| {
        let not_of: Vec<String> = not_of.lines().map(str::to_owned).collect();
        let lines = of.lines().filter(|line| !not_of.iter().any(|other| other == line));
        lines.take(10).map(|line| format!("{mark} {line}\n")).collect::<String>()
    };
    only("<", &one, &other) + &only(">", &other, &one)
}

fn on_a_host(test: impl AsyncFnOnce(Host) + Send + 'static) {
    if !need("bridge") {
        return;
    }
    in_netns(async move |netns| {
        netns.underlay("192.168.0.1/24");
        let network = LinuxNetwork::new().unwrap();
        test(Host { netns, network }).await;
    });
}

// What is written reads back.

#[test]
fn a_state_with_200_peers_reads_back_equal() {
    on_a_host(async |mut host| host.hold(&peers(200)).await);
}

#[test]
fn a_state_with_5000_peers_reads_back_equal() {
    // In a /14, so that 5000 subnets of sixteen addresses fit with room.
    on_a_host(async |mut host| {
        let wide = Claim { links: vec![flannel()], networks: vec![prefix("10.4.0.0/14")], underlay: None };
        let desired = peers(5000);

        let failures = host.apply(diff(&desired, &HostState::default())).await;

        assert_eq!(failures, []);
        let observed = host.observe_as(&wide).await;
        assert!(observed == desired, "{}", differing(&observed, &desired));
    });
}

#[test]
fn what_stands_needs_no_second_write() {
    on_a_host(async |mut host| {
        let desired = peers(20);
        host.hold(&desired).await;

        let observed = host.observe().await;

        assert_eq!(diff(&desired, &observed), []);
    });
}

#[test]
fn all_that_was_written_can_be_taken_away_again() {
    on_a_host(async |mut host| {
        host.hold(&peers(20)).await;

        host.hold(&HostState::default()).await;

        assert!(host.netns.attempt("ip link show flannel.1").is_err());
    });
}

#[test]
fn peers_that_go_leave_nothing_behind() {
    on_a_host(async |mut host| {
        host.hold(&peers(20)).await;

        host.hold(&node()).await;

        assert_eq!(host.lines("ip neigh show dev flannel.1 nud permanent"), Vec::<String>::new());
        assert_eq!(host.lines("bridge fdb show dev flannel.1"), Vec::<String>::new());
        assert_eq!(host.lines("ip route show dev flannel.1"), Vec::<String>::new());
    });
}

#[test]
fn a_peer_that_moves_is_followed() {
    on_a_host(async |mut host| {
        let mut desired = peers(3);
        host.hold(&desired).await;
        let entry = desired.fdb.first_entry().unwrap();
        *entry.into_mut() = ip("192.168.0.99");

        host.hold(&desired).await;
    });
}

#[test]
fn a_route_with_a_metric_of_its_own_reads_back() {
    on_a_host(async |mut host| {
        let mut desired = node();
        let key = RouteKey { destination: prefix("10.5.2.0/24"), metric: 77 };
        desired.routes.insert(key, via_flannel(ip("10.5.2.0")));

        host.hold(&desired).await;
        host.hold(&node()).await;
    });
}

#[test]
fn a_state_of_ipv6_reads_back_equal() {
    on_a_host(async |mut host| {
        host.run("ip address add fd00::1/64 dev eth0 nodad");
        let device = name("flannel-v6.1");
        let claim = Claim { links: vec![device], networks: vec![prefix("fd05::/48")], underlay: None };
        let mut desired = HostState::default();
        let kind = LinkKind::Vxlan(Vxlan { local: Some(ip("fd00::1")), ..vxlan() });
        desired.links.insert(device, Link { kind, mac: mac_of(1), mtu: 1430, up: true });
        desired.addresses.insert((device, prefix("fd05::1:0/128")));
        desired.neighbours.insert((device, ip("fd05::2:0")), mac_of(2));
        desired.fdb.insert((device, mac_of(2)), ip("fd00::2"));
        let route = Route { link: device, ..via_flannel(ip("fd05::2:0")) };
        desired.routes.insert(to("fd05::2:0/112"), route);

        let failures = host.apply(diff(&desired, &HostState::default())).await;

        assert_eq!(failures, []);
        let observed = host.observe_as(&claim).await;
        assert!(observed == desired, "{}", differing(&observed, &desired));
        let gone = host.apply(diff(&HostState::default(), &observed)).await;
        assert_eq!(gone, []);
    });
}

// What others see of it.

#[test]
fn the_device_is_the_one_that_flannel_makes() {
    on_a_host(async |mut host| {
        host.hold(&node()).await;

        let shown = host.lines("ip -d link show flannel.1").join(" ");
        for part in [
            "mtu 1450 qdisc noqueue",
            "link/ether 0e:00:00:00:00:01 brd",
            "vxlan id 1 local 192.168.0.1 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 \
             udpcsum noudp6zerocsumtx noudp6zerocsumrx",
        ] {
            assert!(shown.contains(part), "{part} is not in {shown}");
        }
        // ip leaves out what is off, and a queue length of 0.
        for part in ["gbp", "l2miss", "l3miss", "proxy", "rsc", "external", "qlen"] {
            assert!(!shown.contains(part), "{part} is in {shown}");
        }
        assert!(shown.contains(",UP"), "{shown}");
    });
}

#[test]
fn the_three_entries_of_a_peer_are_flannel_s() {
    on_a_host(async |mut host| {
        host.hold(&peers(1)).await;

        assert_eq!(host.lines("ip route show dev flannel.1"), ["10.5.2.0/24 via 10.5.2.0 proto 76 onlink"]);
        assert_eq!(
            host.lines("ip neigh show dev flannel.1 nud permanent"),
            ["10.5.2.0 lladdr 0e:01:00:00:00:02 PERMANENT"]
        );
        assert_eq!(
            host.lines("bridge fdb show dev flannel.1"),
            ["0e:01:00:00:00:02 dst 192.168.0.2 self permanent"]
        );
    });
}

#[test]
fn the_address_is_global_and_without_broadcast() {
    on_a_host(async |mut host| {
        host.hold(&node()).await;

        let shown = host.lines("ip -4 -o address show dev flannel.1").join(" ");
        assert!(shown.contains("inet 10.5.1.0/32 scope global flannel.1"), "{shown}");
        assert!(!shown.contains("brd"), "{shown}");
    });
}

#[test]
fn the_device_does_not_listen_to_routers() {
    on_a_host(async |mut host| {
        host.hold(&node()).await;

        assert_eq!(host.lines("cat /proc/sys/net/ipv6/conf/flannel.1/accept_ra"), ["0"]);
    });
}

#[test]
fn a_host_gw_route_leads_to_the_peer_itself() {
    on_a_host(async |mut host| {
        let mut desired = HostState::default();
        desired.routes.insert(to("10.5.2.0/24"), via_eth0("192.168.0.2"));

        host.hold(&desired).await;

        assert_eq!(
            host.lines("ip route show 10.5.2.0/24"),
            ["10.5.2.0/24 via 192.168.0.2 dev eth0 proto 76"]
        );
    });
}

#[test]
fn a_peer_that_becomes_direct_leaves_the_tunnel() {
    on_a_host(async |mut host| {
        host.hold(&peers(2)).await;
        let mut desired = peers(1);
        desired.routes.insert(to("10.5.3.0/24"), via_eth0("192.168.0.3"));

        host.hold(&desired).await;

        assert_eq!(
            host.lines("ip route show root 10.5.0.0/16"),
            [
                "10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto 76 onlink",
                "10.5.3.0/24 via 192.168.0.3 dev eth0 proto 76",
            ]
        );
    });
}

#[test]
fn a_route_without_a_next_hop_reads_back() {
    on_a_host(async |mut host| {
        let mut desired = node();
        let route = Route { gateway: None, onlink: false, ..via_flannel(ip("10.5.2.0")) };
        desired.routes.insert(to("10.5.2.0/24"), route);

        host.hold(&desired).await;

        assert_eq!(host.lines("ip route show dev flannel.1"), ["10.5.2.0/24 proto 76 scope link"]);
        host.hold(&node()).await;
    });
}

// The device.

#[test]
fn every_option_of_the_device_reads_back() {
    on_a_host(async |mut host| {
        let kind = LinkKind::Vxlan(Vxlan { vni: 1, port: 4789, learning: true, gbp: true, ..vxlan() });

        host.hold(&node_with(Link { kind, ..device() })).await;

        let shown = host.lines("ip -d link show flannel.1").join(" ");
        assert!(shown.contains("dstport 4789"), "{shown}");
        assert!(shown.contains(" gbp "), "{shown}");
        assert!(!shown.contains("nolearning"), "{shown}");
    });
}

#[test]
fn a_device_without_a_lower_one_reads_back() {
    on_a_host(async |mut host| {
        let kind = LinkKind::Vxlan(Vxlan { lower: None, local: None, ..vxlan() });

        host.hold(&node_with(Link { kind, ..device() })).await;
    });
}

#[test]
fn an_incompatible_device_is_made_anew_with_its_peers() {
    on_a_host(async |mut host| {
        host.hold(&peers(3)).await;
        let before = host.netns.index_of("flannel.1");
        let mut desired = peers(3);
        let kind = LinkKind::Vxlan(Vxlan { port: 4789, ..vxlan() });
        desired.links.insert(flannel(), Link { kind, ..device() });

        host.hold(&desired).await;

        assert_ne!(host.netns.index_of("flannel.1"), before);
    });
}

#[test]
fn a_device_with_what_flannel_never_sets_is_named_and_made_anew() {
    on_a_host(async |mut host| {
        for (options, words) in [
            ("group 239.1.1.1", "vxlan with a default remote 239.1.1.1"),
            ("remote 192.168.0.9", "vxlan with a default remote 192.168.0.9"),
            ("l2miss", "vxlan with l2miss"),
            ("l3miss", "vxlan with l3miss"),
            ("proxy", "vxlan with proxy"),
            ("rsc", "vxlan with rsc"),
            ("ttl 3", "vxlan with ttl 3"),
            ("external", "vxlan with external control"),
        ] {
            let id = if options == "external" { "" } else { "id 1" };
            host.run(&format!(
                "ip link add flannel.1 type vxlan {id} dev eth0 dstport 8472 nolearning {options}"
            ));

            let seen = host.observe().await.links[&flannel()].kind.clone();

            assert_eq!(seen, LinkKind::Other(words.into()));
            host.hold(&node()).await;
            host.run("ip link del flannel.1");
        }
    });
}

#[test]
fn a_bridge_of_our_name_is_replaced() {
    on_a_host(async |mut host| {
        host.run("ip link add flannel.1 type bridge");
        assert_eq!(host.observe().await.links[&flannel()].kind, LinkKind::Other("bridge".into()));

        host.hold(&node()).await;
    });
}

#[test]
fn a_device_of_a_go_flanneld_is_kept_with_its_mac() {
    on_a_host(async |mut host| {
        host.run(
            "ip link add flannel.1 address 0e:aa:aa:aa:aa:aa mtu 1450 txqueuelen 0 type vxlan id 1 \
             local 192.168.0.1 dev eth0 dstport 8472 nolearning",
        );
        host.run("ip link set flannel.1 up");
        let before = host.netns.index_of("flannel.1");

        let seen = host.observe().await.links[&flannel()].clone();

        let mac = MacAddr([0x0e, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa]);
        assert_eq!(seen, Link { mac, ..device() });
        host.hold(&node_with(Link { mac, ..device() })).await;
        assert_eq!(host.netns.index_of("flannel.1"), before);
    });
}

#[test]
fn a_device_that_is_right_is_not_touched() {
    on_a_host(async |mut host| {
        host.hold(&peers(3)).await;
        let mut monitor = host.netns.monitor();

        let failures = host.apply(vec![Step::ChangeLink(flannel(), Box::new(device()))]).await;

        assert_eq!(failures, []);
        assert_eq!(monitor.changes(&host.netns, "flannel.1"), Vec::<String>::new());
        host.check(&peers(3)).await;
    });
}

#[test]
fn mtu_and_learning_change_without_losing_a_peer() {
    on_a_host(async |mut host| {
        host.hold(&peers(3)).await;
        let before = host.netns.index_of("flannel.1");
        let mut monitor = host.netns.monitor();
        let mut desired = peers(3);
        let kind = LinkKind::Vxlan(Vxlan { learning: true, ..vxlan() });
        desired.links.insert(flannel(), Link { mtu: 1400, kind, ..device() });

        host.hold(&desired).await;

        let lost = |line: &String| line.starts_with("Deleted");
        let changes = monitor.changes(&host.netns, "flannel.1");
        assert!(!changes.iter().any(lost), "{changes:#?}");
        assert_eq!(host.netns.index_of("flannel.1"), before);
    });
}

#[test]
fn a_mac_changes_while_the_device_is_up() {
    on_a_host(async |mut host| {
        host.hold(&peers(3)).await;
        let mut desired = peers(3);
        desired.links.insert(flannel(), Link { mac: mac_of(9), ..device() });

        host.hold(&desired).await;
    });
}

#[test]
fn a_device_that_was_switched_off_comes_back_with_all_its_peers() {
    on_a_host(async |mut host| {
        let desired = peers(3);
        host.hold(&desired).await;
        host.run("ip link set flannel.1 down");

        let observed = host.observe().await;
        assert!(!observed.links[&flannel()].up);
        assert!(observed.routes.is_empty() && observed.neighbours.is_empty());
        assert_eq!(observed.fdb, desired.fdb);

        host.hold(&desired).await;
    });
}

#[test]
fn a_device_that_was_deleted_comes_back_with_all_its_peers() {
    on_a_host(async |mut host| {
        host.hold(&peers(3)).await;
        host.run("ip link del flannel.1");

        assert_eq!(host.observe().await, HostState::default());

        host.hold(&peers(3)).await;
    });
}

#[test]
fn a_device_that_is_not_there_is_nothing_and_no_error() {
    on_a_host(async |mut host| assert_eq!(host.observe().await, HostState::default()));
}

#[test]
fn a_device_that_comes_and_goes_meanwhile_is_no_error() {
    on_a_host(async |mut host| {
        // A thread started here is in the same namespace.
        let churn = thread::spawn(|| {
            let ip = |words: &str| Command::new("ip").args(words.split(' ')).status();
            for _ in 0..60 {
                ip("link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 nolearning").unwrap();
                ip("address add 10.5.1.0/32 dev flannel.1").unwrap();
                ip("link del flannel.1").unwrap();
            }
        });

        while !churn.is_finished() {
            host.observe().await;
            host.facts(None).await;
        }

        churn.join().unwrap();
    });
}

#[test]
fn a_blackhole_for_our_subnet_stands_behind_every_other_route_to_it() {
    on_a_host(async |mut host| {
        let mut desired = node();
        desired.blackholes.insert(RouteKey::blackhole("10.5.1.0/24".parse().unwrap()));
        host.hold(&desired).await;
        let is_dropped = |host: &Host| host.netns.attempt("ip route get 10.5.1.9").is_err();
        assert!(is_dropped(&host));

        host.run("ip link add br0 type bridge");
        host.run("ip link set br0 up");
        host.run("ip address add 10.5.1.1/24 dev br0");
        assert!(host.run("ip route get 10.5.1.9").contains("dev br0"));
        host.check(&desired).await;

        host.run("ip link del br0");
        assert!(is_dropped(&host));
        host.hold(&node()).await;
        assert_eq!(host.run("ip route show type blackhole"), "");
    });
}

// What is not ours.

#[test]
fn what_is_not_ours_is_neither_seen_nor_touched() {
    on_a_host(async |mut host| {
        host.hold(&node()).await;
        let foreign = [
            "ip route add 10.5.77.0/24 dev flannel.1 proto static",
            "ip route add 10.7.0.0/16 dev flannel.1 proto boot",
            "ip route add 10.5.78.0/24 via 192.168.0.78 proto boot",
            "ip route add 10.9.3.0/24 via 192.168.0.3 dev eth0 proto 76",
            "ip route add 10.5.79.0/24 dev flannel.1 table 100 proto 76",
            "ip route add blackhole 10.5.80.0/24 proto 76",
            "ip address add 172.16.0.1/32 dev flannel.1",
            "ip neigh add 10.5.81.0 lladdr 0e:00:00:00:00:81 dev flannel.1 nud stale",
            "ip neigh add 192.168.0.82 lladdr 0e:00:00:00:00:82 dev eth0 nud permanent",
        ];
        foreign.iter().for_each(|command| drop(host.run(command)));
        let shown = |host: &Host| {
            let mut lines = host.lines("ip -4 route show table all");
            lines.extend(host.lines("ip -4 address show dev flannel.1"));
            lines.extend(host.lines("ip -4 neigh show nud all"));
            lines
        };
        let before = shown(&host);

        host.check(&node()).await;
        host.hold(&peers(3)).await;
        host.hold(&node()).await;

        assert_eq!(shown(&host), before);
    });
}

#[test]
fn a_route_that_a_go_flanneld_left_is_replaced_and_not_doubled() {
    on_a_host(async |mut host| {
        host.hold(&node()).await;
        host.run("ip neigh add 10.5.2.0 lladdr 0e:01:00:00:00:02 dev flannel.1 nud permanent");
        host.run("ip route add 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink");
        let key = to("10.5.2.0/24");
        assert_eq!(host.observe().await.routes[&key].protocol, ROUTE_PROTOCOL_BOOT);

        host.hold(&peers(1)).await;

        assert_eq!(
            host.lines("ip route show 10.5.2.0/24"),
            ["10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto 76 onlink"]
        );
    });
}

#[test]
fn a_route_that_a_go_flanneld_left_of_a_peer_long_gone_is_removed() {
    on_a_host(async |mut host| {
        host.hold(&node()).await;
        host.run("ip route add 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink");

        host.hold(&node()).await;

        assert_eq!(host.lines("ip route show 10.5.2.0/24"), Vec::<String>::new());
    });
}

#[test]
fn a_foreign_route_to_a_peer_is_replaced_in_place() {
    on_a_host(async |mut host| {
        host.run("ip route add 10.5.2.0/24 via 192.168.0.77 proto static");

        host.hold(&peers(1)).await;

        assert_eq!(
            host.lines("ip route show 10.5.2.0/24"),
            ["10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto 76 onlink"]
        );
    });
}

#[test]
fn a_foreign_route_that_took_our_place_survives_the_removal_of_ours() {
    on_a_host(async |mut host| {
        host.hold(&peers(1)).await;
        let observed = host.observe().await;
        host.run("ip route replace 10.5.2.0/24 via 192.168.0.77 proto static");

        let failures = host.apply(diff(&node(), &observed)).await;

        assert_eq!(failures, []);
        assert_eq!(
            host.lines("ip route show 10.5.2.0/24"),
            ["10.5.2.0/24 via 192.168.0.77 dev eth0 proto static"]
        );
    });
}

#[test]
fn a_route_with_more_than_we_set_is_put_right() {
    on_a_host(async |mut host| {
        host.hold(&peers(1)).await;
        for more in ["src 192.168.0.1", "mtu 1300", "realms 7"] {
            host.run(&format!(
                "ip route replace 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink proto 76 {more}"
            ));
            assert!(host.observe().await.routes[&to("10.5.2.0/24")].decorated, "{more}");

            host.hold(&peers(1)).await;
        }
    });
}

#[test]
fn a_route_over_several_hops_is_put_right() {
    on_a_host(async |mut host| {
        host.hold(&peers(1)).await;
        host.run(
            "ip route replace 10.5.2.0/24 proto 76 nexthop via 10.5.2.0 dev flannel.1 onlink \
             nexthop via 192.168.0.9 dev eth0",
        );

        assert!(host.observe().await.routes[&to("10.5.2.0/24")].decorated);

        host.hold(&peers(1)).await;
    });
}

#[test]
fn a_forwarding_entry_with_a_port_of_its_own_is_put_right() {
    on_a_host(async |mut host| {
        host.hold(&peers(1)).await;
        host.run(
            "bridge fdb replace 0e:01:00:00:00:02 dev flannel.1 dst 192.168.0.2 port 4789 self permanent",
        );
        assert_ne!(host.observe().await, peers(1));

        host.hold(&peers(1)).await;

        assert_eq!(
            host.lines("bridge fdb show dev flannel.1"),
            ["0e:01:00:00:00:02 dst 192.168.0.2 self permanent"]
        );
    });
}

#[test]
fn an_entry_for_everybody_with_several_destinations_is_removed_whole() {
    on_a_host(async |mut host| {
        host.hold(&node()).await;
        for remote in ["192.168.0.7", "192.168.0.8"] {
            host.run(&format!(
                "bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst {remote} self permanent"
            ));
        }

        host.hold(&node()).await;

        assert_eq!(host.lines("bridge fdb show dev flannel.1"), Vec::<String>::new());
    });
}

// What the kernel refuses.

#[test]
fn a_refused_step_fails_alone_and_says_why() {
    on_a_host(async |mut host| {
        let mut desired = HostState::default();
        desired.routes.insert(to("10.5.2.0/24"), via_eth0("192.168.0.2"));
        desired.routes.insert(to("10.5.3.0/24"), via_eth0("192.168.9.9"));
        desired.routes.insert(to("10.5.4.0/24"), via_eth0("192.168.0.4"));

        let failures = host.reconcile(&desired).await;

        let step = Step::PutRoute(to("10.5.3.0/24"), via_eth0("192.168.9.9"));
        let reason = "Network is unreachable (192.168.9.9 is not on a network of eth0)".into();
        assert_eq!(failures, [Failure { step, reason }]);
        desired.routes.remove(&to("10.5.3.0/24"));
        host.check(&desired).await;
    });
}

#[test]
fn among_3000_steps_each_of_300_failures_is_told_by_its_step() {
    on_a_host(async |mut host| {
        host.hold(&node()).await;
        let steps: Vec<Step> = (0..3000)
            .map(|number| {
                let destination = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 5, 0, 0)) + (number << 4));
                let key = RouteKey::to(IpNetwork::new(destination.into(), 28).unwrap());
                let hop = if number % 10 == 3 { "192.168.9.9" } else { "192.168.0.2" };
                Step::PutRoute(key, via_eth0(hop))
            })
            .collect();
        let wrong: Vec<Step> = steps.iter().skip(3).step_by(10).cloned().collect();

        let failures = host.apply(steps).await;

        let failed: Vec<Step> = failures.into_iter().map(|failure| failure.step).collect();
        assert!(failed == wrong, "{} failed", failed.len());
        assert_eq!(host.observe().await.routes.len(), 2700);
    });
}

#[test]
fn a_datagram_in_which_every_step_fails_is_told_whole() {
    on_a_host(async |mut host| {
        let steps: Vec<Step> = (0..192)
            .map(|number| Step::PutRoute(to(&format!("10.5.{number}.0/24")), via_eth0("192.168.9.9")))
            .collect();

        assert_eq!(host.apply(steps).await.len(), 192);
    });
}

#[test]
fn removing_what_is_gone_is_no_failure() {
    on_a_host(async |mut host| {
        host.hold(&peers(3)).await;
        let removals = diff(&HostState::default(), &peers(3));
        let objects = diff(&HostState { links: node().links, ..HostState::default() }, &peers(3));
        assert_eq!(host.apply(objects.clone()).await, []);

        assert_eq!(host.apply(objects).await, []);
        assert_eq!(host.apply(removals.clone()).await, []);
        assert_eq!(host.apply(removals).await, []);
    });
}

#[test]
fn an_address_that_is_there_already_is_no_failure() {
    on_a_host(async |mut host| {
        host.hold(&node()).await;

        assert_eq!(host.apply(vec![Step::AddAddress(flannel(), prefix("10.5.1.0/32"))]).await, []);
    });
}

#[test]
fn without_the_device_its_steps_fail_and_the_others_go_on() {
    on_a_host(async |mut host| {
        let steps = vec![
            Step::PutNeighbour(flannel(), ip("10.5.2.0"), mac_of(2)),
            Step::PutRoute(to("10.5.3.0/24"), via_eth0("192.168.0.3")),
        ];

        let failures = host.apply(steps.clone()).await;

        let reason = "No such device (flannel.1 is not there)".into();
        assert_eq!(failures, [Failure { step: steps[0].clone(), reason }]);
        assert_eq!(host.observe().await.routes.len(), 1);
    });
}

#[test]
fn a_twin_with_our_vni_and_port_is_named() {
    on_a_host(async |mut host| {
        host.run("ip link add vx-other type vxlan id 1 dev eth0 dstport 8472 nolearning");

        let failures = host.reconcile(&node()).await;

        let reason =
            "File exists (vx-other holds VNI 1 on port 8472 already; remove it or choose another VNI)";
        assert_eq!(failures[0].reason, reason);
    });
}

#[test]
fn a_lower_device_that_is_not_there_is_named() {
    on_a_host(async |mut host| {
        let kind = LinkKind::Vxlan(Vxlan { lower: Some(name("eth9")), ..vxlan() });

        let failures = host.apply(vec![Step::AddLink(flannel(), Box::new(Link { kind, ..device() }))]).await;

        assert_eq!(failures[0].reason, "No such device (eth9 is not there)");
    });
}

#[test]
fn a_route_through_a_device_that_is_down_says_so() {
    on_a_host(async |mut host| {
        host.hold(&node_with(Link { up: false, ..device() })).await;

        let failures = host.apply(vec![Step::PutRoute(to("10.5.2.0/24"), via_flannel(ip("10.5.2.0")))]).await;

        assert_eq!(failures[0].reason, "Network is down (flannel.1 is down)");
    });
}

// Facts.

#[test]
fn facts_tell_interfaces_in_order_with_their_addresses() {
    on_a_host(async |mut host| {
        host.run("ip address add 192.168.0.5/24 dev eth0");
        host.run("ip address add 192.168.1.5/24 dev eth0 valid_lft 1000 preferred_lft 0");

        let facts = host.facts(None).await;

        let names: Vec<&str> = facts.interfaces.iter().map(|interface| interface.name.as_str()).collect();
        assert_eq!(names, ["lo", "peer0", "eth0"]);
        let eth0 = &facts.interfaces[2];
        assert_eq!(eth0.mtu, 1500);
        let v4 = eth0.addresses.iter().filter(|own| own.network.is_ipv4());
        let flags: Vec<(String, bool, bool, bool)> =
            v4.map(|own| (own.network.to_string(), own.permanent, own.temporary, own.deprecated)).collect();
        assert_eq!(
            flags,
            [
                ("192.168.0.1/24".into(), true, false, false),
                ("192.168.1.5/24".into(), false, false, true),
                ("192.168.0.5/24".into(), true, true, false),
            ]
        );
    });
}

#[test]
fn facts_tell_the_routes_that_no_flannel_made() {
    on_a_host(async |mut host| {
        host.run("ip route add default via 192.168.0.254 metric 10");
        host.run("ip route add 172.16.0.0/12 nexthop via 192.168.0.7 nexthop via 192.168.0.8");
        host.run("ip route add unreachable 172.15.0.0/16");
        let mut desired = peers(2);
        desired.routes.insert(to("10.5.9.0/24"), via_eth0("192.168.0.9"));
        host.hold(&desired).await;
        host.run("ip route add 10.5.77.0/24 dev flannel.1");

        let facts = host.facts(None).await;

        let v4 = facts.routes.iter().filter(|route| route.destination.is_ipv4());
        let told: Vec<(String, Option<IpAddr>, Option<LinkName>)> =
            v4.map(|route| (route.destination.to_string(), route.gateway, route.link)).collect();
        assert_eq!(
            told,
            [
                ("0.0.0.0/0".into(), Some(ip("192.168.0.254")), Some(name("eth0"))),
                ("172.16.0.0/12".into(), None, None),
                ("192.168.0.0/24".into(), None, Some(name("eth0"))),
            ]
        );
    });
}

#[test]
fn facts_tell_the_way_to_an_address_or_why_there_is_none() {
    on_a_host(async |mut host| {
        let reached = host.facts(Some("192.168.0.7")).await.can_reach;
        let unreached = host.facts(Some("203.0.113.7")).await.can_reach;

        assert_eq!(reached, Some(Ok((name("eth0"), ip("192.168.0.1")))));
        assert_eq!(unreached, Some(Err("Network is unreachable".into())));
        assert_eq!(host.facts(None).await.can_reach, None);
    });
}

#[test]
fn facts_of_an_empty_namespace_are_no_error() {
    in_netns(async |_| {
        let facts = LinuxNetwork::new().unwrap().observe(&claim(), None).await.unwrap().facts;

        assert_eq!(facts.interfaces.len(), 1);
        assert_eq!(facts.routes, []);
    });
}

// What the kernel tells.

#[test]
fn what_happens_to_any_device_with_routes_of_ours_is_told() {
    on_a_host(async |mut host| {
        host.run("ip link add eth1 type veth peer name peer1");
        host.run("ip link set peer1 up");
        host.run("ip link set eth1 up");
        host.run("ip addr add 192.168.9.1/24 dev eth1");
        host.observe().await;
        let route = Route { link: name("eth1"), ..via_eth0("192.168.9.2") };
        assert_eq!(host.apply(vec![Step::PutRoute(to("10.5.2.0/24"), route)]).await, []);

        host.run("ip link set eth1 down");

        assert_eq!(host.network.changed().await, Changes::Everything("eth1 was changed".into()));
    });
}

#[test]
fn what_happens_to_devices_that_do_not_concern_us_is_not_told() {
    on_a_host(async |mut host| {
        host.hold(&peers(3)).await;
        host.run("ip link add veth7 type veth peer name veth8");
        host.run("ip link set veth7 up");
        host.run("ip neigh add 192.168.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
        host.run("ip route add 172.30.0.0/16 via 192.168.0.9");

        host.run("ip neigh del 10.5.3.0 dev flannel.1");

        let Changes::Objects(told) = host.network.changed().await else { panic!("everything") };
        assert_eq!(told.keys().collect::<Vec<_>>(), [&Key::Neighbour(flannel(), ip("10.5.3.0"))]);
    });
}
