//! Rung 6, with the agent: what others do to the kernel is put right, at once.
//!
//! Each test has a network namespace of its own, an agent on a store in memory
//! and the real kernel, and a thousand peers. It meddles as an operator or some
//! other program would, waits for the kernel to be as it should be by listening
//! to it, and says how long that took.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flannel_core::backend::{self, Node};
use flannel_core::claim::Claim;
use flannel_core::diff::Step;
use flannel_core::firewall::Wanted;
use flannel_core::host::{Changes, Failure, HostError, Network, Observed};
use flannel_core::lease::{BackendData, Expiry, HeldLease, Lease, LeaseAttrs, Subnet, Tenure};
use flannel_core::plan::{FEW_PEERS, MANY_PEERS, Planner, RouteMode};
use flannel_core::state::{HostState, Link, MacAddr};
use flannel_core::underlay::{self, Selection, Underlay};
use flannel_core::view::LeaseView;
use flannel_linux::LinuxNetwork;
use flannel_tests::build::{self, link};
use flannel_tests::fake_network::FakeFirewall;
use flannel_tests::memory_store::{MemoryStore, TERM};
use flannel_tests::netns::{Netns, in_netns};
use flannel_tests::{need, say};
use flanneld::agent::{Agent, Options, Parts};
use flanneld::health::Status;
use flanneld::reconcile::Reconciler;
use flanneld::subnet_file::SubnetFile;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const CONFIG: &str = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;

const PEERS: u32 = 1000;

/// Far beyond what any repair may take; a test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// The lease of a peer: 10.16.0.0/24 and on.
fn lease(number: u32) -> Lease {
    let subnet = format!("{}/24", gateway(number)).parse().unwrap();
    let attrs = LeaseAttrs {
        public_ip: Some(Ipv4Addr::from_bits(u32::from_be_bytes([172, 16, 0, 1]) + number)),
        public_ipv6: None,
        backend_type: "vxlan".into(),
        backend_data: Some(BackendData::Vtep { vni: Some(1), mac: mac(number) }),
        backend_v6_data: None,
    };
    Lease { subnet: Subnet::V4(subnet), attrs, tenure: Tenure::Leased }
}

fn gateway(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from_be_bytes([10, 16, 0, 0]) + (number << 8))
}

fn mac(number: u32) -> MacAddr {
    let [_, _, high, low] = number.to_be_bytes();
    MacAddr([0x0e, 1, 0, 0, high, low])
}

/// A host of a cluster, in a namespace of its own.
struct Host {
    netns: Netns,
    store: MemoryStore,
    counts: Arc<Counts>,
    /// Listens as the agent does, and hears the agent.
    ear: LinuxNetwork,
    claim: Claim,
    mode: RouteMode,
    /// What the agent's listening socket holds, in bytes, if not the usual.
    room: Option<usize>,
    status: watch::Receiver<Status>,
    directory: tempfile::TempDir,
    stop: CancellationToken,
}

fn selection() -> Selection {
    Selection { interfaces: vec!["eth0".into()], ..Selection::default() }
}

impl Host {
    /// A host with so many peers, in sync; `room` is what the agent's listening socket holds, in bytes.
    async fn start(netns: Netns, mode: RouteMode, room: Option<usize>, peers: u32) -> Self {
        netns.underlay("192.168.0.1/24");
        let config = build::config(CONFIG);
        let (backend, _) = backend::from_config(&config).unwrap();
        let claim = Claim { links: backend.links(), networks: config.networks().collect(), underlay: None };
        let mut ear = LinuxNetwork::new().unwrap();
        let facts = ear.observe(&claim, None).await.unwrap().facts;
        let underlay = underlay::choose(&facts, &selection()).unwrap().underlay;
        let attrs = backend.attributes(&underlay, &HostState::default(), MacAddr([0x0e, 0, 0, 0, 0, 1]));
        let own = Lease { subnet: build::subnet(1), attrs, tenure: Tenure::Leased };
        let mut host = Self {
            netns,
            store: MemoryStore::holding((0..peers).map(lease).chain([own])),
            counts: Arc::default(),
            ear,
            claim,
            mode,
            room,
            status: watch::channel(Status::default()).1,
            directory: tempfile::tempdir().unwrap(),
            stop: CancellationToken::new(),
        };
        host.launch(underlay).await;
        host.until_as_planned("the start").await;
        host
    }

    /// Starts an agent that stands there.
    async fn launch(&mut self, underlay: Underlay) {
        let network = match self.room {
            Some(room) => LinuxNetwork::with_room(room).unwrap(),
            None => LinuxNetwork::new().unwrap(),
        };
        let network = Counted { network, counts: self.counts.clone() };
        let config = build::config(CONFIG);
        let (backend, _) = backend::from_config(&config).unwrap();
        let (status, seen) = watch::channel(Status::default());
        self.status = seen;
        let expiry = Expiry::At((tokio::time::Instant::now() + TERM).into_std());
        let pools = config.pools().copied().collect();
        let node = Node { pools, underlay, lease: self.own(), mtu: None };
        let planner = Planner::new(backend, node, self.mode);
        let day = Duration::from_secs(86_400);
        let parts = Parts {
            store: Arc::new(self.store.clone()),
            reconciler: Reconciler::new(network, planner, self.claim.clone(), selection()),
            config,
            held: HeldLease { lease: self.own(), expiry, handle: 7 },
            file: SubnetFile::new(self.directory.path().join("subnet.env")),
            options: Options {
                wanted: Wanted { masquerade: false, random_fully: true, forward: false },
                former: vec![],
                rules_interval: day,
                // Nothing here is to be repaired by an audit.
                audit_interval: day,
                renew_margin: Duration::from_secs(3600),
                removal_grace: Duration::ZERO,
            },
            status,
            on_ready: None,
            state: None,
            recalled: None,
        };
        self.stop = CancellationToken::new();
        tokio::spawn(Agent::new(parts, FakeFirewall::default()).run(self.stop.clone()));
    }

    /// A new agent over the same kernel, with routes of the other form.
    async fn restart(&mut self) {
        self.stop.cancel();
        self.mode = if self.mode == RouteMode::Plain { RouteMode::Nexthop } else { RouteMode::Plain };
        let facts = self.look().await.facts;
        let underlay = underlay::choose(&facts, &selection()).unwrap().underlay;
        self.launch(underlay).await;
    }

    /// What the kernel holds, once it stands still for long enough to be read.
    async fn look(&mut self) -> Observed {
        let began = Instant::now();
        loop {
            match self.ear.observe(&self.claim, None).await {
                Ok(observed) => return observed,
                Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
            }
        }
    }

    /// Our own lease, as published.
    fn own(&self) -> Lease {
        self.store.inner().leases[&build::subnet(1)].clone()
    }

    fn own_mac(&self) -> MacAddr {
        match self.own().attrs.backend_data {
            Some(BackendData::Vtep { mac, .. }) => mac,
            other => panic!("{other:?} is no tunnel end"),
        }
    }

    /// What the kernel should hold, from what the store and the host say now.
    async fn plan(&mut self) -> Option<HostState> {
        let facts = self.look().await.facts;
        let underlay = underlay::choose(&facts, &selection()).ok()?.underlay;
        let config = build::config(CONFIG);
        let pools = config.pools().copied().collect();
        let (backend, _) = backend::from_config(&config).unwrap();
        let node = Node { pools, underlay, lease: self.own(), mtu: None };
        let mut view = LeaseView::default();
        let leases = self.store.inner().leases.values().cloned().collect();
        view.apply(flannel_core::store::LeaseEvent::Snapshot(flannel_core::store::Snapshot {
            leases,
            unreadable: vec![],
        }));
        Some(Planner::new(backend, node, self.mode).plan(&view).desired)
    }

    /// Waits until the kernel holds what is planned; says how long that took.
    async fn until_as_planned(&mut self, abuse: &str) -> Duration {
        let began = Instant::now();
        loop {
            let planned = self.plan().await;
            let state = self.look().await.state;
            if planned.as_ref() == Some(&state) {
                break;
            }
            let left = PATIENCE.checked_sub(began.elapsed());
            let left = left
                .unwrap_or_else(|| panic!("{abuse}: not repaired\n{}", differing(&state, planned.as_ref())));
            // Whatever brings it nearer is told.
            drop(tokio::time::timeout(left, self.ear.changed()).await);
        }
        let took = began.elapsed();
        say(&format!("{abuse}: right again after {} ms", took.as_millis()));
        took
    }

    /// Meddles, and has it put right within a second with the MAC that it had.
    async fn survives(&mut self, abuse: &str, meddle: impl AsyncFnOnce(&mut Self)) {
        let mac = self.own_mac();
        meddle(self).await;
        let took = self.until_as_planned(abuse).await;
        assert_eq!(self.own_mac(), mac, "{abuse}");
        assert!(took < PATIENCE);
    }

    fn run(&self, command: &str) -> String {
        self.netns.run(command)
    }

    /// Runs commands one behind the other, in one breath; some may fail.
    fn script(&self, commands: &str) {
        let status = Command::new("sh").args(["-c", commands]).stderr(Stdio::null()).status();
        status.unwrap();
    }

    /// Makes things that look like ours and are not.
    fn add_foreign(&self) {
        for command in [
            "ip route add 10.200.0.0/24 via 192.168.0.9",
            "ip route add 10.201.0.0/24 via 192.168.0.9 proto static",
            "ip route add 172.20.0.0/16 via 192.168.0.9 proto 76",
            "ip route add 10.16.77.0/24 via 192.168.0.9 metric 50",
            "ip nexthop add id 5 via 192.168.0.9 dev eth0",
            "ip nexthop add id 168822529 via 192.168.0.9 dev eth0 proto 76",
            "ip route add 10.202.0.0/24 nhid 5",
            "ip neigh add 192.168.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
            "ip addr add 172.21.0.1/24 dev eth0",
        ] {
            self.run(command);
        }
    }

    /// What is left of those, as `ip` shows them.
    fn foreign(&self) -> Vec<String> {
        let shown = ["ip route", "ip neigh show dev eth0", "ip nexthop", "ip -4 addr show dev eth0"];
        let shown: String = shown.iter().map(|command| self.run(command)).collect();
        let theirs = ["10.20", "172.2", "192.168.0.9", "metric 50"];
        let lines = shown.lines().filter(|line| theirs.iter().any(|theirs| line.contains(theirs)));
        let mut lines: Vec<String> = lines.map(|line| line.trim().to_owned()).collect();
        lines.sort();
        lines
    }

    /// Feeds lines to `ip -batch` or `bridge -batch`.
    fn batch(&self, program: &str, lines: &str) {
        let mut child =
            Command::new(program).args(["-force", "-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{program} -batch");
    }

    /// Waits until the kernel has told of nothing for a while.
    async fn until_quiet(&mut self) {
        while tokio::time::timeout(Duration::from_millis(200), self.ear.changed()).await.is_ok() {}
    }

    async fn device(&mut self) -> Option<Link> {
        let state = self.look().await.state;
        state.links.get(&link("flannel.1")).cloned()
    }
}

/// What the agent does to the kernel, counted.
#[derive(Default)]
struct Counts {
    looks: AtomicUsize,
    steps: AtomicUsize,
    wakes: AtomicUsize,
    /// Why all was looked at.
    reasons: Mutex<Vec<String>>,
}

/// The real kernel, with a count of how it is used.
struct Counted {
    network: LinuxNetwork,
    counts: Arc<Counts>,
}

impl Network for Counted {
    async fn observe(&mut self, claim: &Claim, can_reach: Option<IpAddr>) -> Result<Observed, HostError> {
        self.counts.looks.fetch_add(1, Ordering::SeqCst);
        self.network.observe(claim, can_reach).await
    }

    async fn apply(&mut self, steps: Vec<Step>) -> Result<Vec<Failure>, HostError> {
        self.counts.steps.fetch_add(steps.len(), Ordering::SeqCst);
        self.network.apply(steps).await
    }

    async fn changed(&mut self) -> Changes {
        let changes = self.network.changed().await;
        if let Changes::Everything(reason) = &changes {
            self.counts.reasons.lock().unwrap().push(reason.clone());
        }
        self.counts.wakes.fetch_add(1, Ordering::SeqCst);
        changes
    }
}

impl Counts {
    /// Looks, steps and wakes since the last time.
    fn take(&self) -> (usize, usize, usize) {
        let take = |count: &AtomicUsize| count.swap(0, Ordering::SeqCst);
        (take(&self.looks), take(&self.steps), take(&self.wakes))
    }
}

fn differing(is: &HostState, planned: Option<&HostState>) -> String {
    let Some(planned) = planned else { return "there is no underlay".into() };
    let steps = flannel_core::diff::diff(planned, is);
    steps.iter().take(20).map(|step| format!("lacks: {step}\n")).collect()
}

fn on_a_host(mode: RouteMode, test: impl AsyncFnOnce(Host) + Send + 'static) {
    on_a_host_with_room(mode, None, test);
}

fn on_a_host_with_room(mode: RouteMode, room: Option<usize>, test: impl AsyncFnOnce(Host) + Send + 'static) {
    if !need("bridge") {
        return;
    }
    in_netns(async move |netns| test(Host::start(netns, mode, room, PEERS).await).await);
}

/// In both forms of routes.
fn in_both_forms(test: impl AsyncFnOnce(Host) + Send + Copy + 'static) {
    for mode in [RouteMode::Plain, RouteMode::Nexthop] {
        on_a_host(mode, test);
    }
}

#[test]
fn a_route_that_is_deleted_bent_or_blackholed_is_put_right() {
    in_both_forms(async |mut host| {
        for meddling in [
            "ip route del 10.16.7.0/24",
            "ip route replace 10.16.7.0/24 via 192.168.0.9",
            "ip route replace blackhole 10.16.7.0/24",
            "ip route replace unreachable 10.16.7.0/24",
            "ip route prepend 10.16.7.0/24 via 192.168.0.9",
            "ip route prepend blackhole 10.16.7.0/24",
            "ip route append 10.16.7.0/24 via 192.168.0.9",
        ] {
            host.survives(meddling, async |host| drop(host.run(meddling))).await;

            let now = host.run("ip route get 10.16.7.9");
            assert!(now.contains("via 10.16.7.0 dev flannel.1"), "{meddling}: {now}");
        }
    });
}

#[test]
fn a_neighbour_and_a_forwarding_entry_that_are_deleted_or_bent_are_put_right() {
    in_both_forms(async |mut host| {
        for meddling in [
            "ip neigh del 10.16.7.0 dev flannel.1",
            "ip neigh replace 10.16.7.0 lladdr 0e:01:00:00:00:09 dev flannel.1 nud permanent",
            "ip neigh replace 10.16.7.0 lladdr 0e:01:00:00:00:07 dev flannel.1 nud reachable",
            "ip neigh add 10.99.0.1 lladdr 0e:01:00:00:99:99 dev flannel.1 nud permanent",
            "bridge fdb del 0e:01:00:00:00:07 dev flannel.1",
            "bridge fdb replace 0e:01:00:00:00:07 dst 192.168.0.66 dev flannel.1 self permanent",
            "bridge fdb replace 0e:01:00:00:00:07 dst 172.16.0.8 port 9999 dev flannel.1 self permanent",
            "bridge fdb add 0e:01:00:00:99:99 dst 192.168.0.66 dev flannel.1 self permanent",
        ] {
            host.survives(meddling, async |host| drop(host.run(meddling))).await;
        }
    });
}

#[test]
fn a_nexthop_object_that_is_deleted_or_bent_is_put_right_with_its_route() {
    on_a_host(RouteMode::Nexthop, async |mut host| {
        let id = u32::from(gateway(7));
        for meddling in [
            format!("ip nexthop del id {id}"),
            format!("ip nexthop replace id {id} via 192.168.0.9 dev eth0"),
            format!("ip nexthop replace id {id} blackhole"),
            format!("ip nexthop replace id {id} via 10.16.8.0 dev flannel.1 onlink"),
            format!(
                "ip nexthop del id {id}; ip nexthop add id {id} via 10.16.7.0 dev flannel.1 onlink proto 76"
            ),
            format!(
                "ip nexthop add id 5 via 192.168.0.9 dev eth0; ip nexthop del id {id}; ip nexthop add id {id} group 5"
            ),
            "ip nexthop flush dev flannel.1".into(),
        ] {
            host.survives(&meddling, async |host| host.script(&meddling)).await;
        }
    });
}

#[test]
fn a_kernel_that_tells_only_the_numbers_of_nexthop_objects_is_understood() {
    on_a_host(RouteMode::Nexthop, async |mut host| {
        host.run("sysctl -qw net.ipv4.nexthop_compat_mode=0");
        host.run("ip nexthop add id 5 via 192.168.0.9 dev eth0");
        host.run("ip route add 10.200.0.0/24 nhid 5");
        let id = u32::from(gateway(7));

        for meddling in [
            "ip route del 10.16.7.0/24",
            &format!("ip nexthop del id {id}"),
            "ip link set flannel.1 down",
            "ip link del flannel.1",
        ] {
            host.survives(meddling, async |host| host.script(meddling)).await;
        }

        assert!(host.run("ip route show 10.200.0.0/24").contains("nhid 5"), "what is not ours stays");
    });
}

#[test]
fn routes_change_their_form_with_the_size_of_the_cluster_and_none_is_gone_meanwhile() {
    const MANY: u32 = MANY_PEERS as u32;
    const FEW: u32 = FEW_PEERS as u32;
    if !need("bridge") {
        return;
    }
    in_netns(async |netns| {
        let mut host = Host::start(netns, RouteMode::Auto, None, MANY).await;
        let mut monitor = host.netns.monitor();
        let mut routes_gone = |host: &Host| {
            let lines = monitor.changes(&host.netns, "dev flannel.1");
            lines.iter().filter(|line| line.starts_with("Deleted 10.") && line.contains("/24 ")).count()
        };
        assert_eq!(host.run("ip nexthop"), "");

        host.store.put(lease(MANY));
        host.until_as_planned("one peer more than many").await;
        assert_eq!(host.run("ip nexthop").lines().count(), MANY as usize + 1);
        assert_eq!(routes_gone(&host), 0);

        (FEW..=MANY).for_each(|number| host.store.remove(lease(number).subnet));
        host.until_as_planned("few peers").await;
        assert_eq!(host.run("ip nexthop"), "");
        assert_eq!(routes_gone(&host), (MANY - FEW) as usize + 1, "those of the peers that left");
    });
}

#[test]
fn a_third_of_all_entries_deleted_at_once_come_back() {
    in_both_forms(async |mut host| {
        host.survives("30 % of all routes, neighbours and forwarding entries deleted", async |host| {
            let (mut ip, mut bridge) = (String::new(), String::new());
            for number in (0..PEERS).filter(|number| number % 10 < 3) {
                writeln!(ip, "route del {}/24", gateway(number)).unwrap();
                writeln!(ip, "neigh del {} dev flannel.1", gateway(number)).unwrap();
                writeln!(bridge, "fdb del {} dev flannel.1", mac(number)).unwrap();
            }
            host.batch("ip", &ip);
            host.batch("bridge", &bridge);
        })
        .await;
    });
}

#[test]
fn all_entries_flushed_come_back() {
    on_a_host(RouteMode::Plain, async |mut host| {
        for meddling in [
            "ip route flush dev flannel.1",
            "ip addr flush dev flannel.1",
            // It goes on for as long as entries come back, and gives up after ten rounds.
            "ip neigh flush dev flannel.1 nud permanent",
        ] {
            host.survives(meddling, async |host| drop(host.netns.attempt(meddling))).await;
        }
    });
}

#[test]
fn a_device_that_is_set_down_renamed_changed_deleted_or_replaced_is_put_right() {
    in_both_forms(async |mut host| {
        for meddling in [
            &["ip link set flannel.1 down"][..],
            &["ip link set flannel.1 mtu 1300"],
            &["ip link set flannel.1 address 0e:00:00:00:00:99"],
            &["ip link set flannel.1 name other"],
            &[
                "ip link set flannel.1 down",
                "ip link set flannel.1 name other",
                "ip link set other address 0e:00:00:00:00:01",
            ],
            &["ip link set flannel.1 type vxlan id 1 local 192.168.0.9"],
            &["ip link set flannel.1 type vxlan id 1 learning"],
            &["ip link del flannel.1"],
            &["ip link del flannel.1", "ip link add flannel.1 type bridge"],
            &[
                "ip link del flannel.1",
                "ip link add flannel.1 type vxlan id 1 dstport 4789 local 192.168.0.1",
            ],
        ] {
            // What comes second may be too late: then our own device is there again.
            host.survives(&meddling.join("; "), async |host| {
                meddling.iter().for_each(|command| drop(host.netns.attempt(command)));
            })
            .await;
        }
    });
}

#[test]
fn a_device_that_is_set_down_while_it_is_set_right_gets_its_routes_back() {
    // Three times each, so that no agent takes it for a fight.
    for start in 0..14 {
        on_a_host(RouteMode::Plain, async move |mut host| {
            for round in 0..3 {
                let wait = 5 + (start * 3 + round) * 3;
                let script = format!(
                    "(echo link set flannel.1 mtu 13{round:02}; sleep 0.{wait:04}; \
                     echo link set flannel.1 down; echo link set flannel.1 up) | ip -batch -"
                );
                host.script(&script);
                let abuse = format!("set down {wait} tenths of a millisecond after another change");
                host.until_as_planned(&abuse).await;
            }
        });
    }
}

#[test]
fn an_mtu_that_moves_with_the_interface_is_no_fight() {
    on_a_host(RouteMode::Plain, async |mut host| {
        for mtu in [1400, 1500, 1400, 1500, 1400, 1500] {
            host.run(&format!("ip link set eth0 mtu {mtu}"));
            host.until_as_planned(&format!("eth0 has MTU {mtu}")).await;
            assert_eq!(host.device().await.unwrap().mtu, mtu - 50);
        }
    });
}

#[test]
fn what_others_made_is_not_touched_while_ours_is_repaired() {
    in_both_forms(async |mut host| {
        host.add_foreign();
        let before = host.foreign();
        assert_eq!(before.len(), 10, "{before:#?}");

        for meddling in [
            "ip route del 10.16.77.0/24 metric 0 proto 76",
            "ip link set flannel.1 mtu 1300",
            "bridge fdb del 0e:01:00:00:00:07 dev flannel.1",
        ] {
            host.survives(meddling, async |host| drop(host.run(meddling))).await;
        }

        assert_eq!(host.foreign(), before);
    });
}

/// What may happen to a host, as a cast of the dice.
async fn happen(host: &mut Host, dice: &mut StdRng) {
    let number = dice.random_range(0..20);
    let other = dice.random_range(0..20);
    let (route, neighbour, entry) =
        (format!("{}/24", gateway(number)), gateway(number).to_string(), mac(number).to_string());
    let command = match dice.random_range(0..17) {
        0..=3 => {
            let changed = Lease { subnet: lease(number).subnet, ..lease(other) };
            return host.store.put(changed);
        }
        4 => return host.store.put(lease(number)),
        5 | 6 => return host.store.remove(lease(number).subnet),
        7 => {
            // Changed behind the watch's back, and listed anew.
            host.store.inner().leases.insert(lease(number).subnet, lease(number));
            host.store.inner().leases.remove(&lease(other).subnet);
            return host.store.relist();
        }
        8 => format!("ip route del {route}"),
        9 => format!("ip route replace {route} via 192.168.0.9"),
        10 => format!("ip neigh del {neighbour} dev flannel.1"),
        11 => format!("ip neigh replace {neighbour} lladdr {} dev flannel.1 nud permanent", mac(other)),
        12 => format!("bridge fdb del {entry} dev flannel.1"),
        13 => format!("bridge fdb replace {entry} dst 192.168.0.66 dev flannel.1 self permanent"),
        14 => format!("ip nexthop del id {}", u32::from(gateway(number))),
        15 => ["ip link set flannel.1 down", "ip link del flannel.1", "ip link set flannel.1 mtu 1300"]
            [dice.random_range(0..3)]
        .into(),
        _ => return host.restart().await,
    };
    // What is to be bent or deleted may not be there.
    drop(host.netns.attempt(&command));
}

#[test]
fn random_histories_end_as_planned_beside_what_others_made() {
    if !need("bridge") {
        return;
    }
    for seed in 0..24 {
        in_netns(async move |netns| {
            let mode = if seed % 2 == 0 { RouteMode::Plain } else { RouteMode::Nexthop };
            let mut host = Host::start(netns, mode, None, 20).await;
            host.add_foreign();
            let foreign = host.foreign();
            let mut dice = StdRng::seed_from_u64(seed);

            for _ in 0..50 {
                happen(&mut host, &mut dice).await;
                if dice.random_range(0..3) == 0 {
                    // Sometimes the agent has time to hear of it.
                    tokio::task::yield_now().await;
                }
            }

            host.until_as_planned(&format!("seed {seed}")).await;
            let now = host.foreign();
            assert!(foreign.iter().all(|line| now.contains(line)), "seed {seed}: {now:#?}");
        });
    }
}

#[test]
fn our_own_writes_wake_nobody_and_one_change_is_one_repair() {
    in_both_forms(async |mut host| {
        let one_peer = if host.mode == RouteMode::Nexthop { 4 } else { 3 };
        host.until_quiet().await;
        assert_eq!(host.counts.take(), (1, 1 + 1 + one_peer * PEERS as usize, 0), "the start");

        host.store.put(lease(PEERS));
        host.until_as_planned("a peer more").await;
        host.until_quiet().await;
        assert_eq!(host.counts.take(), (0, one_peer, 0), "a peer comes");

        host.store.remove(lease(PEERS).subnet);
        host.until_as_planned("a peer less").await;
        host.until_quiet().await;
        assert_eq!(host.counts.take(), (0, one_peer, 0), "a peer goes");

        host.run("ip link set flannel.1 address 0e:00:00:00:00:99");
        host.until_as_planned("another MAC").await;
        host.until_quiet().await;
        let (looks, steps, _) = host.counts.take();
        assert_eq!(steps, 1 + PEERS as usize, "the kernel drops the neighbours with the MAC");
        assert!(looks <= 2, "{looks}");

        for meddling in [
            "ip neigh replace 10.16.7.0 lladdr 0e:01:00:00:00:09 dev flannel.1 nud permanent",
            "bridge fdb replace 0e:01:00:00:00:07 dst 192.168.0.66 dev flannel.1 self permanent",
            "ip route replace 10.16.7.0/24 via 192.168.0.9",
        ] {
            host.run(meddling);
            host.until_as_planned(meddling).await;
            host.until_quiet().await;
            assert_eq!(host.counts.take(), (0, 1, 1), "{meddling}");
        }

        // What does not concern us.
        host.run("ip neigh replace 192.168.0.9 lladdr 02:00:00:00:00:09 dev eth0");
        host.run("ip route add 172.30.0.0/16 via 192.168.0.9 table 77");
        host.run("ip link add veth7 type veth peer name veth8");
        host.run("ip link set veth7 up");
        host.run("ip addr add 172.31.0.1/24 dev veth7");
        host.until_quiet().await;
        assert_eq!(host.counts.take(), (0, 0, 0), "others' things");
    });
}

#[test]
fn twenty_thousand_words_of_the_kernel_without_room_for_them_lead_to_a_look_at_everything() {
    // Room for some three words.
    on_a_host_with_room(RouteMode::Plain, Some(2304), async |mut host| {
        let mut lines = String::new();
        for number in 0..20_000u32 {
            let [_, _, high, low] = number.to_be_bytes();
            writeln!(lines, "neigh replace 10.250.{high}.{low} lladdr 0e:02:00:00:{high:02x}:{low:02x} dev flannel.1 nud permanent").unwrap();
            if number % 100 == 0 {
                writeln!(lines, "route del {}/24", gateway(number / 100)).unwrap();
                writeln!(lines, "neigh del {} dev flannel.1", gateway(number / 100)).unwrap();
            }
        }
        host.survives("20,000 neighbours injected and 200 peers' entries deleted", async |host| {
            host.batch("ip", &lines);
        })
        .await;

        let reasons = host.counts.reasons.lock().unwrap().join("; ");
        assert!(reasons.contains("more than there was room for"), "{reasons}");
    });
}

#[test]
fn a_mac_that_somebody_keeps_setting_is_published_in_the_end() {
    on_a_host(RouteMode::Plain, async |mut host| {
        let theirs = MacAddr([0x0e, 0, 0, 0, 0, 0x99]);
        let mut rounds = 0;
        while host.own_mac() != theirs {
            assert!(rounds < 5, "no end of it");
            host.run("ip link set flannel.1 address 0e:00:00:00:00:99");
            rounds += 1;
            host.until_as_planned("a MAC that comes back").await;
        }

        assert_eq!(rounds, 4, "three are set back, the fourth is published");
        assert_eq!(host.device().await.unwrap().mac, theirs);
    });
}

#[test]
fn an_mtu_that_somebody_keeps_setting_is_published_in_the_end() {
    on_a_host(RouteMode::Plain, async |mut host| {
        let file = host.directory.path().join("subnet.env");
        for _ in 0..3 {
            host.run("ip link set flannel.1 mtu 1300");
            host.until_as_planned("an MTU that comes back").await;
        }

        host.run("ip link set flannel.1 mtu 1300");
        let began = Instant::now();
        while !std::fs::read_to_string(&file).unwrap_or_default().contains("FLANNEL_MTU=1300") {
            assert!(began.elapsed() < PATIENCE, "not published");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }

        assert_eq!(host.device().await.unwrap().mtu, 1300);
        let ready =
            tokio::time::timeout(PATIENCE, host.status.wait_for(|status| status.pending().is_empty()));
        ready.await.unwrap().unwrap();
    });
}

#[test]
fn the_underlay_is_followed_to_another_address_mtu_and_back() {
    in_both_forms(async |mut host| {
        let subnet = host.own().subnet;
        let file = host.directory.path().join("subnet.env");
        // An address by DHCP: the old one goes first.
        host.survives("another address", async |host| {
            host.run("ip addr del 192.168.0.1/24 dev eth0");
            host.run("ip addr add 192.168.0.77/24 dev eth0");
            let began = Instant::now();
            host.store
                .until(|leases| {
                    leases.leases[&build::subnet(1)].attrs.public_ip == Some(Ipv4Addr::new(192, 168, 0, 77))
                })
                .await;
            say(&format!("another address: published after {} ms", began.elapsed().as_millis()));
        })
        .await;
        assert_eq!(host.own().subnet, subnet);
        assert_eq!(host.store.inner().writes, 1, "one write for one change");
        let local: IpAddr = "192.168.0.77".parse().unwrap();
        assert!(host.device().await.unwrap().to_string().contains(&format!("local {local}")));

        // A second address is no reason to move.
        host.run("ip addr add 192.168.0.78/24 dev eth0");
        host.until_as_planned("a second address").await;
        assert_eq!(host.own().attrs.public_ip, Some(Ipv4Addr::new(192, 168, 0, 77)));

        for (mtu, inner) in [(1400, 1350), (1500, 1450)] {
            host.survives(&format!("MTU {mtu} on the interface"), async |host| {
                host.run(&format!("ip link set eth0 mtu {mtu}"));
            })
            .await;
            let began = Instant::now();
            while !std::fs::read_to_string(&file)
                .unwrap_or_default()
                .contains(&format!("FLANNEL_MTU={inner}"))
            {
                assert!(began.elapsed() < PATIENCE, "not written");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }

        host.survives("the link down and up", async |host| {
            host.run("ip link set eth0 down");
            host.run("ip link set eth0 up");
        })
        .await;
        assert_eq!(host.store.inner().writes, 1, "no write without a change");
    });
}

#[test]
fn an_interface_that_is_lost_changes_nothing_until_it_is_back() {
    on_a_host(RouteMode::Plain, async |mut host| {
        let before = host.look().await.state;

        host.run("ip addr del 192.168.0.1/24 dev eth0");
        let lost = host.status.wait_for(|status| !status.pending().is_empty());
        let said = tokio::time::timeout(PATIENCE, lost).await.unwrap().unwrap().pending().join("; ");

        assert!(said.contains("eth0 has no usable IPv4 address"), "{said}");
        assert_eq!(host.look().await.state, before);

        host.run("ip addr add 192.168.0.1/24 dev eth0");
        let back = host.status.wait_for(|status| status.pending().is_empty());
        tokio::time::timeout(PATIENCE, back).await.unwrap().unwrap();
        host.until_as_planned("the interface is back").await;
        assert_eq!(host.store.inner().writes, 0);
    });
}
